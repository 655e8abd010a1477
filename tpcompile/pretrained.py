"""``from_pretrained``: a Hugging Face checkpoint on N ranks, each of which reads its own parts of the files alone.

The model is built from its config with parameters on the meta device, rewritten, and filled. Which tensor of the files
is which parameter, transformers' own renamings say.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from tpcompile.capture import set_apart
from tpcompile.checkpoint_files import Checkpoint, Files, names_in, whole
from tpcompile.checkpoint_sources import Sources, keys_pattern, sources_of
from tpcompile.compiler import Inputs, SpecLike, rewrite
from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.gguf_files import GgufFile
from tpcompile.groups import group_device, group_of
from tpcompile.huggingface import without_weights
from tpcompile.launch import check_same_program
from tpcompile.layout import Layout, Mesh, Runs, axes_of, runs
from tpcompile.module import Read, TensorParallel, call_arguments_as_inputs, forget_weights
from tpcompile.program import Asked, Program
from tpcompile.same_ranks import check_same

Progress = Callable[[int, int], None]
"""Told the bytes of this rank's parameters that are loaded, and of all of them."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint that fits its config: nothing but headers and persistent buffers has been read."""

    place: Path
    model: nn.Module  # parameters on meta, buffers with their values
    files: Files
    sources: Sources


def from_pretrained(
    directory: str | os.PathLike[str],
    spec: SpecLike = None,
    *,
    gguf_file: str | None = None,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: Inputs = None,
    **options: Unpack[Asked],
) -> TensorParallel:
    """This rank's module of a checkpoint that transformers' ``save_pretrained`` has written, in eval mode.

    Equal to ``tpcompile.compile(AutoModel....from_pretrained(directory))``, and no rank ever holds the whole model:
    each reads the bytes of its own parts. Collective: every rank of the mesh calls it with the same arguments, and the
    same files. Nothing is downloaded. On the CPU, or on this rank's GPU if the group is NCCL's.

    Args:
        directory: with ``config.json``, and ``model.safetensors`` or ``model.safetensors.index.json`` and its files; or
            with a GGUF file alone, or the path of one.
        spec: as for :func:`tpcompile.compile`.
        gguf_file: the name of a GGUF file in the directory, as for transformers. It is dequantized a tensor at a time.
        mesh: as for :func:`tpcompile.compile`.
        dtype: of the parameters; None: the config's, or else that of the files.
        example_inputs: as for :func:`tpcompile.compile`.
        options: see :class:`tpcompile.program.Options`.

    Raises:
        TpcompileError: see :func:`tpcompile.compile`; and, naming file and tensor, when a tensor is missing, has
            another shape or kind of dtype, when a file is truncated or of another format, when tied weights differ
            in the files, and when transformers computes a parameter from several tensors otherwise than by stacking
            and concatenating them. On every rank, or on none.
    """
    module, _ = load(directory, spec, gguf_file, mesh, dtype, example_inputs, **options)
    return module


@set_apart()
def load(
    directory: str | os.PathLike[str],
    spec: SpecLike = None,
    gguf_file: str | None = None,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: Inputs = None,
    progress: Progress | None = None,
    **options: Unpack[Asked],
) -> tuple[TensorParallel, int]:
    """:func:`from_pretrained`, and how many bytes this rank has read. ``progress`` is told after every parameter."""
    group = group_of(mesh)
    home = group_device(group)
    with contextlib.ExitStack() as stack:
        with _all_or_none(group):
            opened = stack.enter_context(open_checkpoint(directory, gguf_file, dtype))
        _check_same_files(opened.files, group)
        if dist.get_rank(group) == 0:
            warn_of_unused(opened)
        given = pytree.tree_map_only(torch.Tensor, _to(home), call_arguments_as_inputs(opened.model, example_inputs))
        for name, buffer in opened.model.named_buffers():
            path, _, last = name.rpartition(".")
            setattr(opened.model.get_submodule(path), last, buffer.to(home))
        program = rewrite(opened.model, spec, degree=group.size(), example_inputs=given, **options)
        check_same(program, group)
        assert program.spec is not None, "rewrite finds or plans one"
        rank = dist.get_rank(group)
        read = reader(opened.files, opened.sources, program, rank, home)
        if progress is not None:
            read = _reporting(read, progress, held_bytes(program, rank))
        with _all_or_none(group):
            module = TensorParallel(opened.model, program, program.spec, group, read)
    forget_weights(program)
    return module, opened.files.bytes_read


def place_of(directory: str | os.PathLike[str], gguf_file: str | None = None) -> Path:
    """The directory of safetensors files, or the GGUF file, that is meant."""
    place = Path(directory) if gguf_file is None else Path(directory) / gguf_file
    if place.is_dir() and not (place / "config.json").exists() and len(found := [*place.glob("*.gguf")]) == 1:
        (place,) = found
    return place


@contextlib.contextmanager
def open_checkpoint(
    directory: str | os.PathLike[str], gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> Generator[Opened]:
    """The model of a checkpoint without its weights, and where they are; needs no process group.

    Raises:
        TpcompileError: see :func:`from_pretrained`.
    """
    place = place_of(directory, gguf_file)
    with contextlib.ExitStack() as stack:
        files: Files
        if place.suffix == ".gguf":
            model = without_weights(place, dtype, torch.float32)
            files = GgufFile(place, model)
        else:
            files = stack.enter_context(Checkpoint(place))
            model = without_weights(place, dtype, _float_dtype(files))
        sources = sources_of(model, files, place)
        _fill_buffers(model, files, sources)
        yield Opened(place, model, files, sources)


def held_bytes(program: Program, rank: int) -> int:
    """Bytes of the parameters that a rank holds."""
    total = 0
    for name, parameter in program.captured.parameters.items():
        held = held_by(program.parameters.get(name, ()), tuple(parameter.shape), program.mesh, rank)
        total += math.prod(sum(n for _, n in runs) for runs in held) * parameter.element_size()
    return total


def _reporting(read: Read, progress: Progress, total: int) -> Read:
    done = 0

    def reporting(name: str) -> torch.Tensor:
        nonlocal done
        part = read(name)
        done += part.nbytes
        progress(done, total)
        return part

    return reporting


def _to(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x if x.is_meta else x.to(device)


def reader(files: Files, sources: Sources, program: Program, rank: int, home: torch.device | str = "cpu") -> Read:
    """Reads the parts of ``rank``, onto the device ``home``. Tied copies are read too, and compared."""

    def read(name: str) -> torch.Tensor:
        wanted = program.captured.parameters[name].dtype
        first, *copies = sources[name]
        held = held_by(program.parameters.get(name, ()), first.shape, program.mesh, rank)
        part = files.read(first, held, wanted)
        for copy in copies:
            if not torch.equal(files.read(copy, held, wanted).view(torch.uint8), part.view(torch.uint8)):
                raise TpcompileError(
                    f"{copy} differs from {first.name}",
                    why=f"the model has one parameter for both, {name}",
                    help="set tie_word_embeddings to false in config.json, or leave the tensor that is wrong out",
                )
        return part.to(home)

    return read


def held_by(dims: tuple[Layout, ...], shape: tuple[int, ...], mesh: Mesh, rank: int) -> tuple[Runs, ...]:
    """The positions of every dim that a rank holds, as runs; all of them where nothing is cut."""
    whole: tuple[Runs, ...] = tuple(((0, n),) for n in shape)
    cut = [runs(d, mesh.sizes, mesh.coordinates(rank)) if axes_of(d) else w for d, w in zip(dims, whole, strict=False)]
    return (*cut, *whole[len(cut) :])


def _fill_buffers(model: nn.Module, files: Files, sources: Sources) -> None:
    for name, buffer in model.named_buffers():
        if name in sources:
            buffer.copy_(whole(files, sources[name][0], buffer.dtype))


def _float_dtype(files: Files) -> torch.dtype:
    return next((x.dtype for x in files.tensors.values() if x.dtype.is_floating_point), torch.float32)


def warn_of_unused(opened: Opened) -> None:
    """What the model has no place for; what used to be stored and is computed now is nothing to warn of."""
    model, tensors = opened.model, opened.files.tensors
    used = {name for copies in opened.sources.values() for stored in copies for name in names_in(stored)}
    computed = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    ignored = keys_pattern(model, "_keys_to_ignore_on_load_unexpected", *computed)
    unused = [n for n in tensors if n not in used and not (ignored is not None and ignored.search(n))]
    if unused:
        shown = ", ".join(f"{n} ({tensors[n].path.name})" for n in unused[:5])
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        warnings.warn(
            f"{opened.place}: {type(model).__name__} has no place for {shown}{more}; not loaded",
            UserWarning,
            stacklevel=4,
        )


def _check_same_files(files: Files, group: dist.ProcessGroup) -> None:
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
