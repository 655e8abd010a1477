"""Tensors in pieces, in safetensors files: which positions of the whole a rank writes, and which it reads.

A piece is a box: for every dim the runs of positions of the whole tensor that it has. Every position is in one piece,
of the first rank that holds it. A reader takes what it needs of every piece, so it need not know who wrote them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tpcompile import shards
from tpcompile.errors import TpcompileError
from tpcompile.gradients import counted
from tpcompile.layout import Layout, Leaf, Mesh, Runs, positions, runs, size
from tpcompile.runs import pick, run_length

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the safetensors format."""


@dataclass(frozen=True)
class Part:
    """A tensor as one rank has it: ``tensor`` is what it holds of one that is cut as ``dims`` say."""

    tensor: Tensor
    dims: tuple[Layout, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(map(size, self.dims))


def uncut(tensor: Tensor) -> Part:
    """The part that is the whole."""
    return Part(tensor.detach(), tuple(Leaf(n) for n in tensor.shape))


def described(parts: Mapping[str, Part], mesh: Mesh) -> dict[str, Any]:
    """Shape, dtype and pieces of every tensor, as JSON: what a reader must know. The same on every rank."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        pieces = [
            {"rank": rank, "key": f"{name}#{i}", "box": box}
            for rank in range(mesh.degree)
            for i, box in enumerate(_whole_boxes(part.dims, mesh, rank))
        ]
        found[name] = {"shape": list(part.whole), "dtype": dtype_name(name, part.tensor.dtype), "pieces": pieces}
    return found


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The name that the safetensors format has for ``dtype``, the dtype of the tensor ``name``."""
    if dtype not in DTYPES:
        raise TpcompileError(
            f"{name} is {dtype}, which safetensors files cannot hold",
            help=f"use one of {', '.join(map(str, DTYPES))}",
        )
    return DTYPES[dtype]


def write_parts(path: Path, parts: Mapping[str, Part], mesh: Mesh, rank: int) -> None:
    """Write what ``rank`` is the first to hold, one tensor at a time."""
    found: dict[str, tuple[Part, tuple[Runs, ...]]] = {}
    for name, part in parts.items():
        for i, box in enumerate(_boxes(part.dims, mesh, rank)):
            found[f"{name}#{i}"] = part, box
    shapes = {key: (part.tensor.dtype, tuple(map(run_length, box))) for key, (part, box) in found.items()}
    write_safetensors(path, shapes, (_piece(*found[key]) for key in order(shapes)), {})


def _piece(part: Part, box: Sequence[Runs]) -> Tensor:
    piece = part.tensor
    for dim, kept in enumerate(box):
        if run_length(kept) < piece.shape[dim]:
            piece = pick(piece, dim, kept)
    return piece


def _boxes(dims: tuple[Layout, ...], mesh: Mesh, rank: int) -> list[tuple[Runs, ...]]:
    """What ``rank`` is the first to hold, in local positions."""
    return [box for box in counted(dims, mesh, rank) if all(map(run_length, box))]


def _whole_boxes(dims: tuple[Layout, ...], mesh: Mesh, rank: int) -> list[list[Runs]]:
    """The same in positions of the whole tensor."""
    return [
        [_of_whole(d, kept, mesh, rank) for d, kept in zip(dims, box, strict=True)] for box in _boxes(dims, mesh, rank)
    ]


def _of_whole(layout: Layout, kept: Runs, mesh: Mesh, rank: int) -> Runs:
    held = positions(layout, mesh, rank)
    at = np.concatenate([held[s : s + n] for s, n in kept])
    ends = np.flatnonzero(np.diff(at) != 1) + 1
    return tuple((int(run[0]), len(run)) for run in np.split(at, ends))


def read_part(
    files: Mapping[int, Any], name: str, stored: Mapping[str, Any], dims: Sequence[Layout], mesh: Mesh, rank: int
) -> Tensor:
    """What ``rank`` holds, under ``dims``, of the tensor ``name`` that :func:`described` has described as ``stored``.

    Args:
        files: by rank that wrote it, the file as ``safetensors.safe_open`` opens it.

    Raises:
        TpcompileError: the pieces do not have all that the rank holds.
    """
    dtype = next(d for d, text in DTYPES.items() if text == stored["dtype"])
    part = torch.empty(shards.shape(dims, mesh, rank), dtype=dtype)
    wanted = [runs(d, mesh.sizes, mesh.coordinates(rank)) for d in dims]
    missing = part.numel()
    for piece in stored["pieces"]:
        sides = [overlaps(box, mine) for box, mine in zip(piece["box"], wanted, strict=True)]
        if not all(sides):
            continue
        file, key = files[piece["rank"]], piece["key"]
        if not dims:
            return file.get_tensor(key)
        source = file.get_slice(key)
        for place in product(*sides):
            taken = source[tuple(slice(s, s + n) for s, _, n in place)]
            part[tuple(slice(t, t + n) for _, t, n in place)] = taken
            missing -= taken.numel()
    if missing:
        raise TpcompileError(
            f"the checkpoint has not all of {name}",
            why=f"{missing} of the {part.numel()} elements that this rank holds are in none of its pieces",
            help="the index is damaged: use another checkpoint",
        )
    return part


def overlaps(stored: Iterable[Sequence[int]], wanted: Iterable[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Where two ascending lists of runs (start, length) meet: (place in the first, place in the second, length)."""
    found: list[tuple[int, int, int]] = []
    at = 0
    for s, n in stored:
        to = 0
        for t, m in wanted:
            low, high = max(s, t), min(s + n, t + m)
            if low < high:
                found.append((at + low - s, to + low - t, high - low))
            to += m
        at += n
    return found


# ---------------------------------------------------------------------------------------------- the file format
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def order(shapes: Shapes) -> list[str]:
    """Names in the order in which a file has them: wide elements first, so that all are aligned."""
    return sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))


def write_safetensors(path: Path, shapes: Shapes, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file in the safetensors format, one tensor at a time; ``tensors`` come in the :func:`order` of shapes.

    ``safetensors.torch.save_file`` wants all of them at once.
    Source: https://github.com/huggingface/safetensors, section Format.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order(shapes):
        dtype, shape = shapes[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": dtype_name(name, dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        put(file, len(text).to_bytes(8, "little") + text)
        for name, tensor in zip(order(shapes), tensors, strict=True):
            assert shapes[name] == (tensor.dtype, tuple(tensor.shape)), name
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            put(file, flat.view(torch.uint8).numpy().data)
        sync(file)


def put(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write to a file: all that a checkpoint consists of goes through here."""
    file.write(content)


def sync(file: Any) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


__all__ = [
    "DTYPES",
    "Part",
    "described",
    "dtype_name",
    "order",
    "put",
    "read_part",
    "sync",
    "uncut",
    "write_parts",
    "write_safetensors",
]
