"""The transitions between placements, each one a differentiable function with a known adjoint.

What each one does is a row of :mod:`tpcompile.transitions`; in the rewritten graph a transition is one call of the
function of the same name here. Eager runs an autograd function over the primitives (:mod:`tpcompile.primitives`);
torch.export gets one custom op, since it would inline an autograd function and lose its adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from tpcompile.groups import seat
from tpcompile.onlookers import is_differentiated, is_eager, is_traced, is_whole
from tpcompile.primitives import PRIMITIVES, start
from tpcompile.runs import Runs, Where, full_size, parts_of, run_length
from tpcompile.transitions import MESSAGES, STATISTICS, TRANSITIONS, Transition


def transition_of(target: object) -> Transition | None:
    """The row of the table whose function is ``target`` (as in ``node.target``), or None."""
    if isinstance(target, FunctionType) and target.__module__ == __name__:
        return TRANSITIONS.get(target.__name__) or STATISTICS.get(target.__name__)
    return None


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
        if torch.is_grad_enabled() or is_whole():
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
    if is_differentiated():
        return cast("Tensor", _Transformed.apply(x, (forward, backward, dim, where, group)))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return PRIMITIVES[forward](x, dim, where, group, own)
    # autograd copies more for a view than one clone, and refuses a leaf
    own = own and not is_traced(x) and not x.is_leaf and not x._is_view()
    return cast("Tensor", _Linear.apply(x, (forward, backward, dim, where, group, own, own_grad)))


def begun(row: Transition, grad: Tensor, dim: int, where: Where, group: str) -> Callable[[], Tensor]:
    """Start the backward of ``copy`` or ``all_gather`` in eager, which may overwrite ``grad``; the result waits for it.

    What cannot be started, or must be differentiable itself, is done at once.
    """
    if not (torch.is_grad_enabled() or is_whole()):
        started = start(row.backward, grad, dim, where, group)
        if started is not None:
            return started
    done = apply(grad, row.backward, row.forward, dim, where, group)
    return lambda: done


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
        if not (torch.is_grad_enabled() or is_whole()):
            return None, None, None, *_many(forward, grads, ctx.group)
        forward = MESSAGES.get(forward, forward)  # one by one
        return None, None, None, *(None if g is None else apply(g, forward, backward, 0, (), ctx.group) for g in grads)


def _many(primitive: str, xs: Sequence[Tensor | None], group: str) -> list[Tensor | None]:
    if primitive == "all_reduce_bucket":
        return bucketed(xs, lambda flat: PRIMITIVES["all_reduce"](flat, 0, (), group, True))
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
        index, members = seat(group)
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
    index, members = seat(group)
    traced = torch.compiler.is_compiling()
    if parts is None:
        if traced:
            raise ValueError("a gather that is compiled needs its parts, or the size of the gathered dim")
        mine = torch.tensor([x.shape[dim]], device=x.device)
        parts = int(PRIMITIVES["all_gather"](mine, 0, members, group, False).sum())
    if not traced and run_length(parts_of(parts, members)[index]) != x.shape[dim]:
        raise ValueError(f"parts {parts} for dim {dim} of shape {tuple(x.shape)} on member {index} of {group!r}")
    return parts


def copy(x: Tensor, group: str, inplace_backward: bool = False) -> Tensor:
    """R -> H: x itself; its gradient is the sum over ``group`` of the ranks' partial ones (Megatron's f).

    ``inplace_backward`` lets the backward overwrite the gradient it is given: only where no other tensor can hold
    that buffer, as when all users of the result are products.
    """
    if not (x.requires_grad or is_whole()):
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
    return x if is_whole() else apply(x, "wait", "identity", 0, (), "")


def _begun(primitive: str, pending: bool) -> str:
    """The primitive that only starts, where one is asked for; what is exported has no use for it."""
    return f"pending_{primitive}" if pending and not is_whole() else primitive


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
    if not xs or seat(group)[1] == 1:
        return tuple(xs)
    if is_whole():
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
