"""The linear primitives on this rank's tensor, of which every transition and its adjoint are made.

``where`` is the parts of the group's members, or copy_segments' runs as its only item, or (); ``owned`` says that x may
be overwritten. Eager runs plain c10d calls; what is traced (torch.compile, fake tensors) gets functional collectives.
What torch renamed in 2.13 is named here and in ``shared_memory.py``. Tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tpcompile.failures import begin, issue
from tpcompile.groups import resolve_group, seat
from tpcompile.onlookers import is_traced
from tpcompile.runs import (
    Parts,
    Where,
    full_size,
    join,
    parts_of,
    pick,
    pick_copy,
    place,
    run_length,
    zero_pad,
)


def _renamed(*names: str) -> Callable[..., Any]:
    """What torch.distributed calls by the first of ``names`` that it knows."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


_functional = torch.ops._c10d_functional
all_gather_single = _renamed("all_gather_single", "all_gather_into_tensor")  # since 2.13, until then
reduce_scatter_single = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


def all_reduce(x: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """The sum over ``group``, written over x: ``dist.all_reduce`` without what it does before it asks the group.

    That (a log, a look for overrides and for groups of calls) takes longer than a small product.
    """
    x = torch.view_as_real(x) if x.is_complex() else x
    work = cast("Any", group).allreduce([x], _LATER if async_op else _AT_ONCE)
    if async_op or work is None:  # some backends wait themselves
        return work
    return work.wait()


def _options(async_op: bool) -> Any:
    options = dist.AllreduceOptions()
    options.asyncOp = async_op
    return options


_AT_ONCE, _LATER = _options(False), _options(True)


def _identity(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    return x


def _keep_first(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    return x if seat(group)[0] == 0 else torch.zeros_like(x)


def _all_reduce(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    if is_traced(x):
        if seat(group)[1] == 1:
            return x
        return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "sum", group))
    members = resolve_group(group)
    if members.size() == 1:
        return x
    # gloo sums a strided tensor's storage and gets it silently wrong
    y = x if owned and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    if y.numel():
        issue(all_reduce, y, group=members)
    return y


def _pending_all_reduce(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    """``_all_reduce`` whose result may be read only after ``_wait``."""
    return _functional.all_reduce(x.contiguous(), "sum", group) if seat(group)[1] > 1 and x.numel() else x


def _wait(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    return _functional.wait_tensor(x)


def _all_reduce_max(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    if seat(group)[1] == 1:
        return x
    if is_traced(x):
        return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "max", group))
    y = x.clone(memory_format=torch.contiguous_format)
    if y.numel():
        issue(dist.all_reduce, y, op=dist.ReduceOp.MAX, group=resolve_group(group))
    return y


def _all_reduce_runs(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    (runs,) = cast("Parts", where)
    if seat(group)[1] == 1 or not runs:
        return x
    total = _all_reduce(pick_copy(x, dim, runs), dim, (), group, True)
    return place(total, dim, runs, x.clone(memory_format=torch.contiguous_format))


def _cut(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    index, size = seat(group)
    parts = parts_of(where, size)
    return x if size == 1 and len(parts[0]) == 1 else pick_copy(x, dim, parts[index])


def _zero_pad(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    index, size = seat(group)
    parts = parts_of(where, size)
    return x if size == 1 and len(parts[0]) == 1 else zero_pad(x, dim, parts[index], full_size(where))


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    """x with zeros at the end of ``dim`` up to ``length``, contiguous."""
    missing = length - x.shape[dim]
    x = x if missing == 0 else F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])
    return x.contiguous()


def _in_order(parts: Parts, longest: int) -> bool:
    """Whether ``parts`` are equal pieces, one after the other: then padding and joining are nothing."""
    return all(runs == ((i * longest, longest),) for i, runs in enumerate(parts))


def _all_gather(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    size = seat(group)[1]
    parts = parts_of(where, size)
    if size == 1:
        return x if len(parts[0]) == 1 else join([x], dim, parts)
    longest = max(run_length(runs) for runs in parts)
    mine = _padded(x, dim, longest)
    if is_traced(x):
        flat = _functional.wait_tensor(_functional.all_gather_into_tensor(mine, size, group))
    else:
        flat = mine.new_empty([size * mine.shape[0], *mine.shape[1:]])
        if flat.numel():
            issue(all_gather_single, flat, mine, group=resolve_group(group))
    if mine.shape[0] and _in_order(parts, longest):
        return flat if dim == 0 else torch.cat(flat.chunk(size), dim)
    return join(flat.chunk(size) if mine.shape[0] else [mine] * size, dim, parts)


def _pending_reduce_scatter(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    """``_reduce_scatter`` whose result may be read only after ``_wait``; what must be unpadded is waited for here."""
    size = seat(group)[1]
    parts = parts_of(where, size)
    if size == 1 or any(run_length(runs) != run_length(parts[0]) for runs in parts) or not x.numel():
        return _reduce_scatter(x, dim, where, group, owned)
    return _functional.reduce_scatter_tensor(_stacked(x, dim, parts), "sum", size, group)


def _stacked(x: Tensor, dim: int, parts: Parts) -> Tensor:
    """The members' parts of x one after the other along dim 0, padded to the longest."""
    longest = max(run_length(runs) for runs in parts)
    if _in_order(parts, longest):  # what Inductor knows to fuse with the product in front of it
        return x.contiguous() if dim == 0 else torch.cat(x.chunk(len(parts), dim))
    return torch.cat([_padded(pick(x, dim, runs), dim, longest) for runs in parts])


def _reduce_scatter(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    index, size = seat(group)
    parts = parts_of(where, size)
    if size == 1:
        return x if len(parts[0]) == 1 else pick_copy(x, dim, parts[0])
    longest, stacked = max(run_length(runs) for runs in parts), _stacked(x, dim, parts)
    if is_traced(x):
        mine = _functional.wait_tensor(_functional.reduce_scatter_tensor(stacked, "sum", size, group))
    else:
        mine = _member_of(stacked, size)
        if mine.numel():
            issue(reduce_scatter_single, mine, stacked, group=resolve_group(group))
    length = run_length(parts[index])
    return mine if length == longest else pick_copy(mine, dim, ((0, length),))


def _member_of(stacked: Tensor, size: int) -> Tensor:
    return stacked.new_empty([stacked.shape[0] // size, *stacked.shape[1:]])


PRIMITIVES: Mapping[str, Callable[[Tensor, int, Where, str, bool], Tensor]] = {
    "identity": _identity,
    "all_reduce": _all_reduce,
    "all_reduce_max": _all_reduce_max,
    "all_reduce_runs": _all_reduce_runs,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "cut": _cut,
    "zero_pad": _zero_pad,
    "keep_first": _keep_first,
    "pending_all_reduce": _pending_all_reduce,
    "pending_reduce_scatter": _pending_reduce_scatter,
    "wait": _wait,
}
"""What each primitive does on one rank's tensor; ``all_reduce_bucket`` is that of ``collectives.copy_all``."""


def start(primitive: str, x: Tensor, dim: int, where: Where, group: str) -> Callable[[], Tensor] | None:
    """Start ``all_reduce`` or ``reduce_scatter`` in eager, which may overwrite ``x``; the result waits for it.

    None where there is nothing to send, and where what arrives must be unpadded.
    """
    members = resolve_group(group)
    size = members.size()
    if size == 1 or not x.numel():
        return None
    if primitive == "all_reduce":
        return begin(x, all_reduce, x, group=members)
    parts = parts_of(where, size)
    if len({run_length(runs) for runs in parts}) > 1:
        return None
    stacked = _stacked(x, dim, parts)
    mine = _member_of(stacked, size)
    return begin(mine, reduce_scatter_single, mine, stacked, group=members)
