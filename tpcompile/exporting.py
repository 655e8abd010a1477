"""A trained module as the original model's files: whole tensors, one at a time, in the layout of Hugging Face.

Only rank 0 writes. It holds one whole tensor at a time, and the other ranks nothing but their parts.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcompile import shards
from tpcompile.checkpoints import WRITING, check_can_be_saved, compiled, mesh_of, names_of, tensors_of
from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.groups import group_device
from tpcompile.layout import Layout, axes_of
from tpcompile.module import TensorParallel
from tpcompile.pieces import Part, Shapes, order, sync, write_safetensors
from tpcompile.together import all_do


def export(
    path: str | os.PathLike[str], module: nn.Module, *, max_shard_size: int = 5 * 10**9, timeout: float = 60.0
) -> None:
    """Write the original model: ``model.safetensors`` with the original names, and ``config.json`` if it has a config.

    Collective: every rank of the default process group calls it. Of tied weights the first name is written, and the
    others are in the file's metadata, as ``safetensors.torch.save_model`` has it. What is at ``path`` is complete: the
    files are written to a folder beside it, which is renamed.

    Args:
        path: a folder that does not exist or is empty.
        module: what :func:`tpcompile.compile` returned.
        max_shard_size: bytes; a larger model goes to ``model-00001-of-0000N.safetensors`` with an index.
        timeout: seconds that ranks wait for the last of them to call it.

    Raises:
        TpcompileError: there are files at ``path``, or they cannot be written.
        RuntimeMismatchError: a rank did not call it (it says which).
    """
    folder = Path(path)
    partial = folder.absolute().with_name(f".{folder.name}.exporting")

    def prepare() -> list[Any]:
        check_can_be_saved(compiled(module))
        if dist.get_rank() == 0:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise TpcompileError(
                    f"{folder} is there already",
                    why="files of two models in one folder would be mixed up",
                    help="export to a new folder, or remove this one first",
                )
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return [str(folder), max_shard_size]

    given = all_do("tpcompile.export", prepare, timeout)
    if any(other != given[0] for other in given):
        raise RuntimeMismatchError("ranks export to different paths, or in different sizes", why=f"they bring {given}")
    tp = compiled(module)

    def write() -> None:
        if 0 not in dist.get_process_group_ranks(tp.group):
            return
        _write(partial, tp, max_shard_size)
        if dist.get_rank() == 0:
            os.replace(partial, folder)

    all_do("tpcompile.export: write", write, WRITING)


def _write(folder: Path, tp: TensorParallel, max_shard_size: int) -> None:
    tensors = tensors_of(tp)
    shapes = {name: (x.dtype, Part(x, dims).whole) for name, (x, dims) in tensors.items()}
    files = _files(shapes, max_shard_size)
    ties = {alias: name for alias, name in names_of(tp).items() if alias != name}
    first = dist.get_rank(tp.group) == 0
    for file, part in files.items():
        gathered = _gathered(tp, [tensors[name] for name in order(part)])
        if first:
            told = {alias: name for alias, name in ties.items() if name in part}
            write_safetensors(folder / file, part, gathered, {"format": "pt", **told})
        else:
            for _ in gathered:
                pass
    if not first:
        return
    if len(files) > 1:
        total = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes.values())
        places = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with (folder / "model.safetensors.index.json").open("w") as opened:
            json.dump(index, opened, indent=2)
            sync(opened)
    _write_config(folder, tp)


def _files(shapes: Shapes, max_shard_size: int) -> Mapping[str, Shapes]:
    """What goes to which file: as many in one as fit, in the model's order."""
    found: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    held = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if found[-1] and held + size > max_shard_size:
            found.append({})
            held = 0
        found[-1][name] = dtype, shape
        held += size
    if len(found) == 1:
        return {"model.safetensors": found[0]}
    return {f"model-{i:05}-of-{len(found):05}.safetensors": part for i, part in enumerate(found, start=1)}


def _gathered(tp: TensorParallel, tensors: Sequence[tuple[Tensor, tuple[Layout, ...]]]) -> Iterator[Tensor]:
    """Each tensor whole, on the first rank of the group, and this rank's part on the others."""
    mesh, group = mesh_of(tp), tp.group
    rank = dist.get_rank(group)
    for tensor, dims in tensors:
        part = tensor.detach()
        if not any(map(axes_of, dims)):
            yield part
        elif rank:
            dist.send(part.to(group_device(group)).contiguous(), group=group, group_dst=0)
            yield part
        else:
            whole = part.new_empty(Part(part, dims).whole)
            for other in reversed(range(1, mesh.degree)):
                theirs = torch.empty(shards.shape(dims, mesh, other), dtype=part.dtype, device=group_device(group))
                dist.recv(theirs, group=group, group_src=other)
                shards.assign(whole, theirs.to(part.device), dims, mesh, other)
            shards.assign(whole, part, dims, mesh, 0)
            yield whole


def _write_config(folder: Path, tp: TensorParallel) -> None:
    """The files beside the weights that transformers writes and reads."""
    config: Any = getattr(tp, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    original: Any = tp.original
    config = copy.deepcopy(config)
    if original is not None:
        config.architectures = [type(original).__name__]
    dtype = next((x.dtype for x in tp.parameters() if x.is_floating_point()), None)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    generation: Any = getattr(original, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)


__all__ = ["export"]
