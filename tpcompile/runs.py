"""How one dim is cut over the members of a group: the arithmetic of runs, and tensors that are cut and joined by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]
"""Runs ``(start, length)`` of one dim, in local order."""

Parts = tuple[Runs, ...]
"""For each member of a group the runs it holds, in the coordinates of the gathered dim. A partition of it."""

Where = Parts | int
"""How a dim is cut: by ``Parts``; or, where the size is known only at run time, that size, for a ``balanced`` cut."""


def balanced(size: int, members: int) -> Parts:
    """Contiguous parts of a dim of ``size``; the first ``size % members`` members hold one more."""
    lengths = [(size + members - 1 - member) // members for member in range(members)]
    return tuple(((sum(lengths[:member]), lengths[member]),) for member in range(members))


def parts_of(where: Where, members: int) -> Parts:
    """``where`` as parts, one for each member. Raises ValueError if they are not as many."""
    parts = where if isinstance(where, tuple) else balanced(where, members)
    if len(parts) != members:
        raise ValueError(f"parts {parts} for a group of {members}")
    return parts


def run_length(runs: Runs) -> int:
    """How many indices ``runs`` hold."""
    return sum(length for _, length in runs)


def full_size(where: Where) -> int:
    """The size of the dim that is cut."""
    return sum(run_length(runs) for runs in where) if isinstance(where, tuple) else where


def pick(x: Tensor, dim: int, runs: Runs) -> Tensor:
    """The indices ``runs`` of ``dim``, in their order; a view of x where that is possible."""
    pieces = [x.narrow(dim, start, length) for start, length in runs]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)


def pick_copy(x: Tensor, dim: int, runs: Runs) -> Tensor:
    """As ``pick``, always new and contiguous: a small part does not keep the whole alive."""
    return pick(x, dim, runs).clone(memory_format=torch.contiguous_format) if len(runs) < 2 else pick(x, dim, runs)


def join(chunks: Sequence[Tensor], dim: int, parts: Parts) -> Tensor:
    """The tensor of which member i holds ``chunks[i]``; longer chunks are padded at the end."""
    pieces = [
        (start, member, sum(length for _, length in runs[:i]), length)
        for member, runs in enumerate(parts)
        for i, (start, length) in enumerate(runs)
    ]
    ordered: list[tuple[int, int, int, int]] = []
    for piece in pieces:  # by start; Dynamo compares symbols, but does not sort them
        at = len(ordered)
        while at and ordered[at - 1][0] > piece[0]:
            at -= 1
        ordered.insert(at, piece)
    found = [chunks[member].narrow(dim, offset, length) for _, member, offset, length in ordered]
    return torch.cat(found or [chunks[0].narrow(dim, 0, 0)], dim)


def place(x: Tensor, dim: int, runs: Runs, base: Tensor) -> Tensor:
    """``base`` with x written over its indices ``runs`` of ``dim``, in place."""
    offset = 0
    for start, length in runs:
        base.narrow(dim, start, length).copy_(x.narrow(dim, offset, length))
        offset += length
    return base


def zero_pad(x: Tensor, dim: int, runs: Runs, size: int) -> Tensor:
    """x at the indices ``runs`` of a dim of ``size``, zeros elsewhere."""
    shape = list(x.shape)
    shape[dim] = size
    return place(x, dim, runs, x.new_zeros(shape))


def check_parts(parts: Parts) -> None:
    """Raise ValueError unless ``parts`` is a partition of ``range(full_size(parts))``."""
    end = 0
    for start, length in sorted(run for runs in parts for run in runs if run[1]):
        if start != end:
            raise ValueError(f"parts {parts} {'overlap' if start < end else 'leave a gap'} at index {min(start, end)}")
        end += length
