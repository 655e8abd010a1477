"""``from_pretrained``: a Hugging Face checkpoint on N ranks, each of which reads its own parts of the files alone.

The model is built from its config with parameters on the meta device, rewritten, and filled. Which tensor of the files
is which parameter, transformers' own renamings say.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.checkpoint_files import Checkpoint, Stored
from tpcompile.collectives import group_device
from tpcompile.compiler import Inputs, SpecLike, rewrite
from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.inlining import Names
from tpcompile.launch import check_same_program
from tpcompile.layout import Layout, Mesh, Runs, axes_of, runs
from tpcompile.models import without_weights
from tpcompile.module import Read, TensorParallel, call_arguments_as_inputs, check_same, forget_weights, group_of
from tpcompile.program import Asked, Program

Sources = Mapping[str, tuple[Stored, ...]]
"""From the canonical name of a parameter or buffer to the tensors in the files that hold it (one, or tied copies)."""


def from_pretrained(
    directory: str | os.PathLike[str],
    spec: SpecLike = None,
    *,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: Inputs = None,
    **options: Unpack[Asked],
) -> TensorParallel:
    """This rank's module of a checkpoint that transformers' ``save_pretrained`` has written, in eval mode.

    Equal to ``tpcompile.compile(AutoModel....from_pretrained(directory))``, and no rank ever holds the whole model:
    each reads the bytes of its own parts. Collective: every rank of the mesh calls it with the same arguments, and the
    same files. Nothing is downloaded. On the CPU.

    Args:
        directory: with ``config.json``, and ``model.safetensors`` or ``model.safetensors.index.json`` and its files.
        spec: as for :func:`tpcompile.compile`.
        mesh: as for :func:`tpcompile.compile`.
        dtype: of the parameters; None: the config's, or else that of the files.
        example_inputs: as for :func:`tpcompile.compile`.
        options: see :class:`tpcompile.program.Options`.

    Raises:
        TpcompileError: see :func:`tpcompile.compile`; and, naming file and tensor, when a tensor is missing, has
            another shape or kind of dtype, when a file is truncated or no safetensors file, when tied weights differ
            in the files, and when transformers computes a parameter from several tensors. On every rank, or on none.
    """
    group, place = group_of(mesh), Path(directory)
    if group_device(group).type != "cpu":
        raise TpcompileError(
            "from_pretrained loads onto the CPU, and the process group is of GPUs",
            why="what has no weights yet is captured for the CPU",
            help="use a gloo process group, or load the model on the GPU and pass it to tpcompile.compile",
        )
    with contextlib.ExitStack() as stack:
        with _all_or_none(group):
            files = stack.enter_context(Checkpoint(place))
            model = without_weights(place, dtype, _float_dtype(files))
            sources = sources_of(model, files, place)
            _fill_buffers(model, files, sources)
        _check_same_files(files, group)
        if dist.get_rank(group) == 0:
            _warn_of_unused(model, files, sources, place)
        given = call_arguments_as_inputs(model, example_inputs)
        program = rewrite(model, spec, degree=group.size(), example_inputs=given, **options)
        check_same(program, group)
        assert program.spec is not None, "rewrite finds or plans one"
        with _all_or_none(group):
            read = reader(files, sources, program, dist.get_rank(group))
            module = TensorParallel(model, program, program.spec, group, read)
    forget_weights(program)
    return module


def reader(files: Checkpoint, sources: Sources, program: Program, rank: int) -> Read:
    """Reads the parts of ``rank``. Tied copies are read too, and compared."""

    def read(name: str) -> torch.Tensor:
        whole = program.captured.parameters[name]
        first, *copies = sources[name]
        held = held_by(program.parameters.get(name, ()), first.shape, program.mesh, rank)
        part = files.read(first, held, whole.dtype)
        for copy in copies:
            if not torch.equal(files.read(copy, held, whole.dtype).view(torch.uint8), part.view(torch.uint8)):
                raise TpcompileError(
                    f"{copy} differs from {first.name}",
                    why=f"the model has one parameter for both, {name}",
                    help="set tie_word_embeddings to false in config.json, or leave the tensor that is wrong out",
                )
        return part

    return read


def held_by(dims: tuple[Layout, ...], shape: tuple[int, ...], mesh: Mesh, rank: int) -> tuple[Runs, ...]:
    """The positions of every dim that a rank holds, as runs; all of them where nothing is cut."""
    whole: tuple[Runs, ...] = tuple(((0, n),) for n in shape)
    cut = [runs(d, mesh.sizes, mesh.coordinates(rank)) if axes_of(d) else w for d, w in zip(dims, whole, strict=False)]
    return (*cut, *whole[len(cut) :])


def sources_of(model: nn.Module, files: Checkpoint, directory: Path) -> Sources:
    """Where every parameter and persistent buffer of ``model`` is in the files.

    Raises:
        TpcompileError: see :func:`from_pretrained`.
    """
    state = {n: x for n, x in model.state_dict(keep_vars=True).items() if isinstance(x, torch.Tensor)}
    aliases = Names.of(model).aliases
    renamed = _renaming(model, state)
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in files.tensors.items():
        name, converted = renamed(key)
        if converted and name in state:
            raise TpcompileError(
                f"{stored} is only a part of {name}, or is computed with others",
                why="transformers merges, splits or permutes such tensors when it loads them",
                help="load the model with transformers and pass it to tpcompile.compile",
            )
        if name not in state:
            continue
        copies = found.setdefault(aliases[name], {})
        if name in copies:
            raise TpcompileError(f"{stored} is {name}", why=f"so is tensor {copies[name].name}")
        copies[name] = stored
        _check_kind(stored, name, state[name])
    ignored = _pattern(model, "_keys_to_ignore_on_load_missing")
    for name, tensor in state.items():
        optional = not isinstance(tensor, nn.Parameter) and ignored is not None and ignored.search(name)
        if aliases[name] not in found and not optional:
            raise TpcompileError(
                f"{directory}: tensor {name} is missing",
                why=f"{type(model).__name__} has this {'parameter' if isinstance(tensor, nn.Parameter) else 'buffer'}, "
                f"and the files ({', '.join(sorted({s.path.name for s in files.tensors.values()}))}) have it under no "
                "name that transformers knows",
                help='save the class that is to be loaded, or name the class of the files in "architectures" of '
                "config.json",
            )
    return {name: tuple(copies.values()) for name, copies in found.items()}


def _renaming(model: Any, state: Mapping[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """From a tensor's name in the files to its name in the model, as transformers has it, and whether it is more than
    renamed."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    conversions: Any = importlib.import_module("transformers.conversion_mapping")
    steps = conversions.get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, loading.WeightConverter)]

    def renamed(key: str) -> tuple[str, bool]:
        name, pattern = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = loading.rename_source_key(key, [], [], model.base_model_prefix, state)
        return name, pattern is not None

    return renamed


def _check_kind(stored: Stored, name: str, wanted: torch.Tensor) -> None:
    if stored.shape != tuple(wanted.shape):
        raise TpcompileError(
            f"{stored} has shape {list(stored.shape)}, and {name} {list(wanted.shape)}",
            why="config.json and the files do not belong together",
            help="download or save the whole directory again",
        )
    if stored.dtype != wanted.dtype and not (stored.dtype.is_floating_point and wanted.dtype.is_floating_point):
        raise TpcompileError(
            f"{stored} is {stored.dtype}, and {name} {wanted.dtype}",
            why="only floating-point numbers are converted to other ones",
            help="quantized weights must be dequantized and saved again",
        )


def _pattern(model: nn.Module, attribute: str, *others: str) -> re.Pattern[str] | None:
    patterns = [*(getattr(model, attribute, None) or ()), *others]
    return re.compile("|".join(f"(?:{p})" for p in patterns)) if patterns else None


def _fill_buffers(model: nn.Module, files: Checkpoint, sources: Sources) -> None:
    for name, buffer in model.named_buffers():
        if name in sources:
            buffer.copy_(files.whole(sources[name][0], buffer.dtype))


def _float_dtype(files: Checkpoint) -> torch.dtype:
    return next((x.dtype for x in files.tensors.values() if x.dtype.is_floating_point), torch.float32)


def _warn_of_unused(model: nn.Module, files: Checkpoint, sources: Sources, directory: Path) -> None:
    """What the model has no place for; what used to be stored and is computed now is nothing to warn of."""
    used = {stored.name for copies in sources.values() for stored in copies}
    computed = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    ignored = _pattern(model, "_keys_to_ignore_on_load_unexpected", *computed)
    unused = [n for n in files.tensors if n not in used and not (ignored is not None and ignored.search(n))]
    if unused:
        shown = ", ".join(f"{n} ({files.tensors[n].path.name})" for n in unused[:5])
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        warnings.warn(
            f"{directory}: {type(model).__name__} has no place for {shown}{more}; not loaded", UserWarning, stacklevel=3
        )


def _check_same_files(files: Checkpoint, group: dist.ProcessGroup) -> None:
    described = files.fingerprint()
    try:
        check_same_program(described, group, described)
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(
            "ranks read different files",
            why=(error.why or "").replace("of the program", "of the files' fingerprints"),
            help="give every rank the same checkpoint",
        ) from error


@contextlib.contextmanager
def _all_or_none(group: dist.ProcessGroup) -> Generator[None]:
    """An error of one rank ends the call on all of them, each with its own error if it has one. Collective."""
    failed: TpcompileError | None = None
    try:
        yield
    except TpcompileError as error:
        failed = error
    said = "" if failed is None else failed.what
    try:
        check_same_program(said, group, said or "no error")
    except RuntimeMismatchError as error:
        raise failed or RuntimeMismatchError(
            "another rank could not load its part of the checkpoint",
            why=(error.why or "").replace("of the program", "of what they say"),
        ) from error
    if failed is not None:
        raise failed


__all__ = ["from_pretrained"]
