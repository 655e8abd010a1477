"""The transitions between placements, each one a differentiable function with a known adjoint.

A value is Replicate (R: same value everywhere, gradient complete everywhere), R whose gradient is partial (H), Shard
(S) or Partial (P). ``TRANSITIONS`` says, as data, what every transition does forward and backward, in terms of a few
linear primitives; the functions below, the simulation, the reports and the tests all read that one table. In the
rewritten graph a transition is one call of the function of the same name.

Eager runs plain c10d calls; what is traced (torch.compile, fake tensors) gets functional collectives; torch.export
gets one custom op, since it would inline an autograd function and lose its adjoint. Everything that torch renames
between versions is in this file. Tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import distributed_c10d as c10d

from tpcompile.errors import TpcompileError
from tpcompile.failures import begin, issue

Runs = tuple[tuple[int, int], ...]
"""Runs ``(start, length)`` of one dim, in local order."""

Parts = tuple[Runs, ...]
"""For each member of a group the runs it holds, in the coordinates of the gathered dim. A partition of it."""

Where = Parts | int
"""How a dim is cut: by ``Parts``; or, where the size is known only at run time, that size, for a ``balanced`` cut."""


@dataclass(frozen=True)
class Transition:
    """One row of the table: from which state to which, and the linear primitives that do it and its adjoint."""

    name: str
    source: str  # state letter of the operand
    target: str  # state letter of the result
    forward: str  # a key of PRIMITIVES
    backward: str  # a key of PRIMITIVES: the adjoint of forward, given what the states mean
    also_known_as: str


TRANSITIONS: Mapping[str, Transition] = {
    row.name: row
    for row in (
        Transition("copy", "R", "H", "identity", "all_reduce", "Megatron f"),
        Transition("all_reduce", "P", "R", "all_reduce", "identity", "Megatron g"),
        Transition("gather", "S", "R", "all_gather", "cut", "gather the output"),
        Transition("all_gather", "S", "H", "all_gather", "reduce_scatter", "sequence-parallel gather"),
        Transition("scatter", "R", "S", "cut", "all_gather", "scatter"),
        Transition("cut", "H", "S", "cut", "zero_pad", "f then cut"),
        Transition("reduce_scatter", "P", "S", "reduce_scatter", "all_gather", "sequence-parallel scatter"),
        Transition("once", "R", "P", "keep_first", "identity", "add a bias once"),
        Transition("leave", "H", "R", "identity", "keep_first", "leaving a partial-gradient region"),
        Transition("copy_segments", "R", "H", "identity", "all_reduce_runs", "f on replicated segments"),
        Transition("copy_all", "R", "H", "identity", "all_reduce_bucket", "f on parameters, in one bucket"),
    )
}

STATISTICS: Mapping[str, Transition] = {
    "all_reduce_max": Transition(
        "all_reduce_max", "P", "R", "all_reduce_max", "identity", "the maximum that softmax subtracts; no gradient"
    )
}
"""Collectives on values without a gradient, which need no adjoint."""

MESSAGES: Mapping[str, str] = {
    "all_reduce_max": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_runs": "all_reduce",
    "all_reduce_bucket": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}
"""The primitives that communicate, and the collective that each one is."""


def sent_bytes(kind: str, numel_full: int, itemsize: int, ranks: int) -> int:
    """Bytes that one of ``ranks`` sends in a ring collective over ``numel_full`` elements, rounded down.

    ``numel_full`` counts the elements of the reduced tensor, or of the gathered one. An all-reduce of n elements sends
    2n(t-1)/t, an all-gather or a reduce-scatter n(t-1)/t (Patarasuk and Yuan 2009).
    """
    match kind:
        case "all_reduce":
            return 2 * numel_full * (ranks - 1) * itemsize // ranks
        case "all_gather" | "reduce_scatter":
            return numel_full * (ranks - 1) * itemsize // ranks
        case _:
            raise ValueError(f"{kind!r} is not a collective: all_reduce, all_gather or reduce_scatter")


@dataclass(frozen=True)
class Message:
    """What one transition sends in one direction: a ring collective over ``numel`` elements."""

    kind: str
    direction: str  # "forward" or "backward"
    numel: int
    bytes: int  # from each rank


def messages(transition: Transition, numel: int, itemsize: int, ranks: int) -> tuple[Message, ...]:
    """The collectives of ``transition`` over ``numel`` elements, forward then backward; none on one rank.

    ``numel`` counts the gathered tensor for gathers, scatters and cuts; the listed runs for ``copy_segments``; the sum
    over the tensors for ``copy_all``.
    """
    found: list[Message] = []
    for direction, primitive in (("forward", transition.forward), ("backward", transition.backward)):
        kind = MESSAGES.get(primitive)
        if kind is not None and ranks > 1:
            found.append(Message(kind, direction, numel, sent_bytes(kind, numel, itemsize, ranks)))
    return tuple(found)


def transition_of(target: object) -> Transition | None:
    """The row of the table whose function is ``target`` (as in ``node.target``), or None."""
    if isinstance(target, FunctionType) and target.__module__ == __name__:
        return TRANSITIONS.get(target.__name__) or STATISTICS.get(target.__name__)
    return None


# Cutting and joining one dim: the arithmetic of runs.


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


# The linear primitives on this rank's tensor. ``where`` is the parts of the group's members, or copy_segments' runs as
# its only item, or (); ``owned`` says that x may be overwritten.


_resolve_process_group: Callable[[str], dist.ProcessGroup] = getattr(c10d, "_resolve_process_group")  # noqa: B009


def resolve_group(group: str | dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group of that name; None is the one of all ranks. Raises TpcompileError if there is none."""
    why = "torch.distributed has no process group yet"
    if isinstance(group, str):  # first: it is asked at every collective
        try:
            return _resolve_process_group(group)
        except (RuntimeError, LookupError, ValueError) as error:
            if dist.is_initialized():
                why = (str(error).splitlines() or ["torch.distributed does not know it"])[0]
    elif group is not None:
        return group
    elif dist.is_initialized():
        return cast("dist.ProcessGroup", dist.group.WORLD)
    raise TpcompileError(
        f"there is no process group {group!r}" if group else "there is no process group",
        why=why,
        help="bind the program to a mesh (tpcompile.compile does), or run it with tpcompile.simulate"
        if dist.is_initialized()
        else 'start the program with torchrun, and call torch.distributed.init_process_group("gloo") first ("nccl" on '
        "GPUs); tpcompile.verify needs neither",
    )


def group_device(group: dist.ProcessGroup) -> torch.device:
    """Where small tensors must be for a collective of ``group``."""
    backend = dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


_seats: dict[str, tuple[int, int]] = {}


@contextlib.contextmanager
def seated(seats: Mapping[str, tuple[int, int]]) -> Generator[None]:
    """Be the rank that has this index and size in each of the named groups: to run its code on fake tensors alone."""
    before = dict(_seats)
    _seats.update(seats)
    try:
        yield
    finally:
        _seats.clear()
        _seats.update(before)


def _seat(group: str) -> tuple[int, int]:
    """This rank's index in ``group``, and the group's size; a constant of the program when traced."""
    if group in _seats:
        return _seats[group]
    found = resolve_group(group)
    return found.rank(), found.size()


setattr(_seat, "_dynamo_marked_constant", True)  # noqa: B010 - assume_constant_result, without importing Dynamo


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no tracer, no tensor of another kind, no transform of torch.func."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not is_transformed()
    )


def _is_whole() -> bool:
    """Whether every transition must be whole: one op, or one Function, that who looks on knows how to differentiate."""
    return torch.compiler.is_exporting() or _is_transformed()


def _is_transformed() -> bool:
    """Whether torch.func, or differentiation in forward mode, looks on (what is compiled is traced with them)."""
    return not torch.compiler.is_compiling() and (
        is_transformed() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    )


def _renamed(*names: str) -> Callable[..., Any]:
    """What torch.distributed calls by the first of ``names`` that it knows."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


_functional = torch.ops._c10d_functional
is_transformed: Callable[[], bool] = getattr(getattr(torch, "_C"), "_are_functorch_transforms_active")  # noqa: B009
"""Whether this runs inside of a transform of torch.func."""
_all_gather_single = _renamed("all_gather_single", "all_gather_into_tensor")  # since 2.13, until then
_reduce_scatter_single = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


def _identity(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    return x


def _keep_first(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    return x if _seat(group)[0] == 0 else torch.zeros_like(x)


def _all_reduce(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    if _traced(x):
        if _seat(group)[1] == 1:
            return x
        return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "sum", group))
    members = resolve_group(group)
    if members.size() == 1:
        return x
    # gloo sums a strided tensor's storage and gets it silently wrong
    y = x if owned and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    if y.numel():
        issue(dist.all_reduce, y, group=members)
    return y


def _pending_all_reduce(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    """``_all_reduce`` whose result may be read only after ``_wait``."""
    return _functional.all_reduce(x.contiguous(), "sum", group) if _seat(group)[1] > 1 and x.numel() else x


def _wait(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    return _functional.wait_tensor(x)


def _all_reduce_max(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    if _seat(group)[1] == 1:
        return x
    if _traced(x):
        return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "max", group))
    y = x.clone(memory_format=torch.contiguous_format)
    if y.numel():
        issue(dist.all_reduce, y, op=dist.ReduceOp.MAX, group=resolve_group(group))
    return y


def _all_reduce_runs(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    (runs,) = cast("Parts", where)
    if _seat(group)[1] == 1 or not runs:
        return x
    total = _all_reduce(pick_copy(x, dim, runs), dim, (), group, True)
    return place(total, dim, runs, x.clone(memory_format=torch.contiguous_format))


def _cut(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    index, size = _seat(group)
    parts = parts_of(where, size)
    return x if size == 1 and len(parts[0]) == 1 else pick_copy(x, dim, parts[index])


def _zero_pad(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    index, size = _seat(group)
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
    size = _seat(group)[1]
    parts = parts_of(where, size)
    if size == 1:
        return x if len(parts[0]) == 1 else join([x], dim, parts)
    longest = max(run_length(runs) for runs in parts)
    mine = _padded(x, dim, longest)
    if _traced(x):
        flat = _functional.wait_tensor(_functional.all_gather_into_tensor(mine, size, group))
    else:
        flat = mine.new_empty([size * mine.shape[0], *mine.shape[1:]])
        if flat.numel():
            issue(_all_gather_single, flat, mine, group=resolve_group(group))
    if mine.shape[0] and _in_order(parts, longest):
        return flat if dim == 0 else torch.cat(flat.chunk(size), dim)
    return join(flat.chunk(size) if mine.shape[0] else [mine] * size, dim, parts)


def _pending_reduce_scatter(x: Tensor, dim: int, where: Where, group: str, owned: bool) -> Tensor:
    """``_reduce_scatter`` whose result may be read only after ``_wait``; what must be unpadded is waited for here."""
    size = _seat(group)[1]
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
    index, size = _seat(group)
    parts = parts_of(where, size)
    if size == 1:
        return x if len(parts[0]) == 1 else pick_copy(x, dim, parts[0])
    longest, stacked = max(run_length(runs) for runs in parts), _stacked(x, dim, parts)
    if _traced(x):
        mine = _functional.wait_tensor(_functional.reduce_scatter_tensor(stacked, "sum", size, group))
    else:
        mine = _member_of(stacked, size)
        if mine.numel():
            issue(_reduce_scatter_single, mine, stacked, group=resolve_group(group))
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
"""What each primitive does on one rank's tensor; ``all_reduce_bucket`` is ``_many``'s."""


# Differentiation.


class _Linear(torch.autograd.Function):
    """A primitive whose backward is another one; differentiable any number of times."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, call: tuple[str, str, int, Where, str, bool, bool]
    ) -> Tensor:
        ctx.call = call
        forward, _, dim, where, group, own, _ = call
        y = PRIMITIVES[forward](x, dim, where, group, own)
        if y is x and own and forward == "all_reduce":
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forward, backward, dim, where, group, _, own = ctx.call
        if torch.is_grad_enabled() or _is_whole():
            return apply(grads[0], backward, forward.removeprefix("pending_"), dim, where, group), None
        return PRIMITIVES[backward](grads[0], dim, where, group, own), None


class _Transformed(torch.autograd.Function):
    """A primitive as torch.func and forward mode ask for it. Eager has no use for it: such a Function is slower."""

    @staticmethod
    def forward(x: Tensor, call: tuple[str, str, int, Where, str]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        forward, _, dim, where, group = call
        y = PRIMITIVES[forward](x, dim, where, group, False)
        return y.clone() if y is x else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forward, backward, *place = ctx.call
        return apply(grads[0], backward, forward, *place), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return apply(tangents[0], *ctx.call)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], x: Tensor, call: tuple[str, str, int, Where, str]
    ) -> tuple[Tensor, int]:
        forward, backward, dim, where, group = call
        return apply(x.movedim(in_dims[0], 0), forward, backward, dim + 1, where, group), 0


def apply(
    x: Tensor,
    forward: str,
    backward: str,
    dim: int,
    where: Where,
    group: str,
    own: bool = False,
    own_grad: bool = False,
) -> Tensor:
    """One primitive on x whose gradient is made by another one; ``own`` and ``own_grad`` may be overwritten."""
    if torch.compiler.is_exporting():
        return _exported(x, forward, backward, dim, _encode(where), group)
    if _is_transformed():
        return cast("Tensor", _Transformed.apply(x, (forward, backward, dim, where, group)))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return PRIMITIVES[forward](x, dim, where, group, own)
    # autograd copies more for a view than one clone, and refuses a leaf
    own = own and not _traced(x) and not x.is_leaf and not x._is_view()
    return cast("Tensor", _Linear.apply(x, (forward, backward, dim, where, group, own, own_grad)))


def begun(row: Transition, grad: Tensor, dim: int, where: Where, group: str) -> Callable[[], Tensor]:
    """Start the backward of ``copy`` or ``all_gather`` in eager, which may overwrite ``grad``; the result waits for it.

    What cannot be started, or must be differentiable itself, is done at once.
    """
    members = resolve_group(group)
    size = members.size()
    parts: Parts = parts_of(where, size) if row.backward == "reduce_scatter" else ()
    uneven = len({run_length(runs) for runs in parts}) > 1  # it must be unpadded
    if torch.is_grad_enabled() or size == 1 or not grad.numel() or uneven or _is_whole():
        done = apply(grad, row.backward, row.forward, dim, where, group)
        return lambda: done
    if row.backward == "all_reduce":
        return begin(grad, dist.all_reduce, grad, group=members)
    stacked = _stacked(grad, dim, parts)
    mine = _member_of(stacked, size)
    return begin(mine, _reduce_scatter_single, mine, stacked, group=members)


class _LinearMany(torch.autograd.Function):
    """A primitive on many tensors, whose backward is another one; gradients that do not exist stay None."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, forward: str, backward: str, group: str, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.primitives, ctx.group = (backward, forward), group
        ctx.set_materialize_grads(False)
        return cast("tuple[Tensor, ...]", tuple(_many(forward, xs, group)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forward, backward = ctx.primitives
        if not (torch.is_grad_enabled() or _is_whole()):
            return None, None, None, *_many(forward, grads, ctx.group)
        forward = MESSAGES.get(forward, forward)  # one by one
        return None, None, None, *(None if g is None else apply(g, forward, backward, 0, (), ctx.group) for g in grads)


def _many(primitive: str, xs: Sequence[Tensor | None], group: str) -> list[Tensor | None]:
    if primitive == "all_reduce_bucket":
        return bucketed(xs, lambda flat: _all_reduce(flat, 0, (), group, True))
    return [None if x is None else PRIMITIVES[primitive](x, 0, (), group, False) for x in xs]


def bucketed(xs: Sequence[Tensor | None], reduce: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """``xs`` after ``reduce`` on one flat copy per dtype and device; the results are views of it."""
    buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(xs):
        if x is not None:
            buckets.setdefault((x.dtype, x.device), []).append(i)
    result: list[Tensor | None] = [None] * len(xs)
    for indices in buckets.values():
        members = [cast("Tensor", xs[i]) for i in indices]
        flat = reduce(torch.cat([x.reshape(-1) for x in members]))
        for i, x, piece in zip(indices, members, flat.split([x.numel() for x in members]), strict=True):
            result[i] = piece.view(x.shape)
    return result


# torch.export keeps a custom op whole, with its adjoint; ``where`` travels as flat integers.


def _encode(where: Where) -> list[int]:
    """Each member's runs as their number, then their starts and lengths; a size as -1 and itself."""
    if not isinstance(where, tuple):
        return [-1, where]
    return [number for runs in where for number in (len(runs), *(value for run in runs for value in run))]


def _decode(flat: Sequence[int]) -> Where:
    if flat and flat[0] == -1:
        return flat[1]
    parts: list[Runs] = []
    at = 0
    while at < len(flat):
        end = at + 1 + 2 * flat[at]
        parts.append(tuple(zip(flat[at + 1 : end : 2], flat[at + 2 : end : 2], strict=True)))
        at = end
    return tuple(parts)


@torch.library.custom_op("tpcompile::transition", mutates_args=())
def _exported(x: Tensor, forward: str, backward: str, dim: int, where: Sequence[int], group: str) -> Tensor:
    y = PRIMITIVES[forward](x, dim, _decode(where), group, False)
    return y.clone() if y is x else y


@_exported.register_fake
def _(x: Tensor, forward: str, backward: str, dim: int, where: Sequence[int], group: str) -> Tensor:
    found = _decode(where)
    shape = list(x.shape)
    if forward in ("cut", "reduce_scatter"):
        index, members = _seat(group)
        shape[dim] = run_length(parts_of(found, members)[index])
    elif forward in ("all_gather", "zero_pad"):
        shape[dim] = full_size(found)
    return x.new_empty(shape)


def _exported_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.forward, ctx.backward, *ctx.place = inputs


def _exported_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _exported(grad, ctx.backward, ctx.forward, *ctx.place), None, None, None, None, None


_exported.register_autograd(_exported_backward, setup_context=_exported_setup)


# The transitions: targets of call_function nodes.


def _axis(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim {dim} of a tensor of {x.ndim} dims")
    return dim % x.ndim


def _where_of_whole(x: Tensor, dim: int, parts: Where | None) -> Where:
    """How x's own dim is cut."""
    size = x.shape[dim]
    if parts is None:
        return size
    if not torch.compiler.is_compiling() and full_size(parts) != size:
        raise ValueError(f"parts {parts} for dim {dim} of shape {tuple(x.shape)}")
    return parts


def _where_of_part(x: Tensor, dim: int, parts: Where | None, group: str) -> Where:
    """How the dim is cut of which x holds this member's part."""
    index, members = _seat(group)
    traced = torch.compiler.is_compiling()
    if parts is None:
        if traced:
            raise ValueError("a gather that is compiled needs its parts, or the size of the gathered dim")
        mine = torch.tensor([x.shape[dim]], device=x.device)
        parts = int(_all_gather(mine, 0, members, group, False).sum())
    if not traced and run_length(parts_of(parts, members)[index]) != x.shape[dim]:
        raise ValueError(f"parts {parts} for dim {dim} of shape {tuple(x.shape)} on member {index} of {group!r}")
    return parts


def copy(x: Tensor, group: str, inplace_backward: bool = False) -> Tensor:
    """R -> H: x itself; its gradient is the sum over ``group`` of the ranks' partial ones (Megatron's f).

    ``inplace_backward`` lets the backward overwrite the gradient it is given: only where no other tensor can hold
    that buffer, as when all users of the result are products.
    """
    if not (x.requires_grad or _is_whole()):
        return x
    row = TRANSITIONS["copy"]
    return apply(x, row.forward, row.backward, 0, (), group, False, inplace_backward)


def all_reduce(x: Tensor, group: str, inplace: bool = False, pending: bool = False) -> Tensor:
    """P -> R: the sum of x over ``group``; the gradient passes as it is (Megatron's g).

    ``inplace`` lets the sum overwrite x, where it is contiguous and autograd allows it. ``pending`` only starts it: the
    result may be read by :func:`wait` alone.
    """
    if inplace and not pending and _may_overwrite(x):
        return _overwritten(x, group)
    row = TRANSITIONS["all_reduce"]
    return apply(x, _begun(row.forward, pending), row.backward, 0, (), group, inplace and not pending, False)


def _may_overwrite(x: Tensor) -> bool:
    """Whether x can be summed where it is without autograd: contiguous, and no leaf or view of what it knows."""
    return is_eager(x) and x.is_contiguous() and not (x.requires_grad and (x.is_leaf or x._is_view()))


def _overwritten(x: Tensor, group: str) -> Tensor:
    """The sum over ``group``, written over x. Its gradient is that of x, so autograd needs no node for it; that x is
    another one now, it is told by the version, and whoever kept x for backward is refused there. Only a backward of
    backward needs one: the gradient of that gradient is partial."""
    if not x.requires_grad:
        return PRIMITIVES["all_reduce"](x, 0, (), group, True)
    PRIMITIVES["all_reduce"](x.detach(), 0, (), group, True)
    torch.autograd.graph.increment_version(x)
    x.register_hook(lambda grad: copy(grad, group) if torch.is_grad_enabled() else None)
    return x


def wait(x: Tensor) -> Tensor:
    """x itself, once the ``pending`` collective that makes it is done; the gradient passes as it is."""
    return x if _is_whole() else apply(x, "wait", "identity", 0, (), "")


def _begun(primitive: str, pending: bool) -> str:
    """The primitive that only starts, where one is asked for; what is exported has no use for it."""
    return f"pending_{primitive}" if pending and not _is_whole() else primitive


def gather(x: Tensor, dim: int, parts: Where | None, group: str) -> Tensor:
    """S -> R: the whole of which the members hold ``parts`` along ``dim``; the gradient is cut again.

    ``parts`` may be the size of the gathered dim, for a balanced cut; None asks the other members, with one more
    collective, and is refused when compiled. Raises ValueError if x is not this member's part.
    """
    row, dim = TRANSITIONS["gather"], _axis(x, dim)
    return apply(x, row.forward, row.backward, dim, _where_of_part(x, dim, parts, group), group)


def all_gather(x: Tensor, dim: int, parts: Where | None, group: str) -> Tensor:
    """S -> H: the whole, as ``gather``; the gradients are partial, and are summed and cut in a reduce-scatter."""
    row, dim = TRANSITIONS["all_gather"], _axis(x, dim)
    return apply(x, row.forward, row.backward, dim, _where_of_part(x, dim, parts, group), group)


def scatter(x: Tensor, dim: int, parts: Where | None, group: str) -> Tensor:
    """R -> S: this member's part of x along ``dim``; the gradients are gathered.

    ``parts`` None: balanced. Raises ValueError if ``parts`` are not of a dim of x's size.
    """
    row, dim = TRANSITIONS["scatter"], _axis(x, dim)
    return apply(x, row.forward, row.backward, dim, _where_of_whole(x, dim, parts), group)


def cut(x: Tensor, dim: int, parts: Where | None, group: str) -> Tensor:
    """H -> S: this member's part of x along ``dim``; the gradient stays partial: zeros elsewhere, nothing is sent."""
    row, dim = TRANSITIONS["cut"], _axis(x, dim)
    return apply(x, row.forward, row.backward, dim, _where_of_whole(x, dim, parts), group)


def reduce_scatter(x: Tensor, dim: int, parts: Where | None, group: str, pending: bool = False) -> Tensor:
    """P -> S: this member's part along ``dim`` of the sum of x over ``group``; the gradients are gathered.

    ``pending`` only starts it: the result may be read by :func:`wait` alone.
    """
    row, dim = TRANSITIONS["reduce_scatter"], _axis(x, dim)
    return apply(x, _begun(row.forward, pending), row.backward, dim, _where_of_whole(x, dim, parts), group)


def once(x: Tensor, group: str) -> Tensor:
    """R -> P: x on the first member of ``group``, zeros on the others; the gradient passes as it is."""
    row = TRANSITIONS["once"]
    return apply(x, row.forward, row.backward, 0, (), group)


def leave(x: Tensor, group: str) -> Tensor:
    """H -> R: x itself; the gradient is kept on the first member of ``group`` and zero on the others."""
    row = TRANSITIONS["leave"]
    return apply(x, row.forward, row.backward, 0, (), group)


def copy_segments(x: Tensor, dim: int, runs: Runs, group: str) -> Tensor:
    """R -> H on the local indices ``runs`` of ``dim``, nothing elsewhere: f for a cut dim with replicated segments."""
    row, dim = TRANSITIONS["copy_segments"], _axis(x, dim)
    return apply(x, row.forward, row.backward, dim, (tuple(runs),), group)


def copy_all(xs: Sequence[Tensor], group: str) -> tuple[Tensor, ...]:
    """``copy`` of many tensors, with one bucketed all-reduce for all their gradients, once the last one is there."""
    if not xs or _seat(group)[1] == 1:
        return tuple(xs)
    if _is_whole():
        return tuple(copy(x, group) for x in xs)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
        return tuple(xs)
    row = TRANSITIONS["copy_all"]
    return cast("tuple[Tensor, ...]", _LinearMany.apply(row.forward, row.backward, group, *xs))


def all_reduce_max(x: Tensor, group: str) -> Tensor:
    """The elementwise maximum over ``group``, for statistics: x must not require a gradient (ValueError)."""
    if x.requires_grad:
        raise ValueError("all_reduce_max has no gradient: detach its operand")
    row = STATISTICS["all_reduce_max"]
    return apply(x, row.forward, row.backward, 0, (), group)
