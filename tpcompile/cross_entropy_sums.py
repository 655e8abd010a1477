"""The statistics of cross-entropy on cut logits as one node of autograd, which keeps one tensor of their size.

The shifted logits, their exponentials and the gradients of both are as large as the logits, the largest tensors of many
a training step. Here the exponentials overwrite the shifted logits, and both gradients are one tensor (Megatron-LM's
``_VocabParallelCrossEntropy``). Programs keep the ops; only the code that is made of a graph calls them together.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor

from tpcompile import collectives, kernels
from tpcompile.effects import has_effect
from tpcompile.onlookers import is_eager
from tpcompile.runs import Runs

aten = torch.ops.aten


def cross_entropy_sums(
    x: Tensor, largest: Tensor, dim: int, keepdim: bool, index: Tensor, held: Runs, total: int
) -> tuple[Tensor, ...]:
    """The sum of ``exp(x - largest)`` along ``dim``, and ``x - largest`` at ``index``; a third is not for callers.

    Args:
        x: this rank's logits ``[..., v, ...]``.
        largest: what is subtracted, with a dim of one in the place of ``dim``; it has no gradient.
        dim: the dim of ``v`` classes, not negative.
        keepdim: whether the sum keeps it.
        index: classes ``[..., 1, ...]`` in ``[0, total)``.
        held: the classes that this rank has, as in :func:`tpcompile.kernels.gather_part`.
        total: how many classes there are.

    Raises:
        IndexError: see :func:`tpcompile.kernels.gather_part`.
    """
    if is_eager(x, largest, index):
        return cast("tuple[Tensor, ...]", _Sums.apply(x, largest, index, (dim, keepdim, held, total)))
    shifted = x - largest
    return shifted.exp().sum([dim], keepdim), kernels.gather_part(shifted, dim, index, held, total)


class _Sums(torch.autograd.Function):
    """The sum, what was picked, and the exponentials, which a backward of backward asks for."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, largest: Tensor, index: Tensor, call: tuple[int, bool, Runs, int]
    ) -> tuple[Tensor, ...]:
        dim, keepdim, held, total = ctx.call = call
        shifted = x - largest
        kernels.check_indices(index, total)
        elsewhere, local = kernels.locate(index, held)
        picked = shifted.gather(dim, local).masked_fill_(elsewhere, 0)
        exponentials = shifted.exp_()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(exponentials, local, elsewhere)
        return exponentials.sum([dim], keepdim), picked, exponentials

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        exponentials, local, elsewhere = ctx.saved_tensors
        dim, keepdim, _, _ = ctx.call
        of_sum, of_picked, of_exponentials = grads
        if of_sum is not None and not keepdim:
            of_sum = of_sum.unsqueeze(dim)
        factors = [x for x in (of_sum, of_exponentials) if x is not None]
        result = exponentials * (factors[0] if len(factors) == 1 else sum(factors)) if factors else None
        if of_picked is not None:
            result = torch.zeros_like(exponentials) if result is None else result
            of_picked = of_picked.masked_fill(elsewhere, 0)
            again = torch.is_grad_enabled()
            result = (result.scatter_add if again else result.scatter_add_)(dim, local, of_picked)
        return result, None, None, None


# ------------------------------------------------------------------------------------------------ finding them
def sum_together(graph: torch.fx.Graph) -> None:
    """Make one call of the ops that :func:`cross_entropy_sums` is, wherever they stand, in place."""
    for node in list(graph.nodes):
        found = _parts(node)
        if found is None:
            continue
        exponentials, summed, picked, before = found
        first = min(summed, picked)
        for other in before:
            first.prepend(other)
        _, dim, *index = picked.args
        with graph.inserting_before(first):
            made = graph.call_function(cross_entropy_sums, (*node.args, dim, _keepdim(summed), *index))
            for number, part in enumerate((summed, picked)):
                item = graph.call_function(operator.getitem, (made, number))
                item.meta = dict(part.meta)
                part.replace_all_uses_with(item)
        for part in (picked, summed, exponentials, node):
            graph.erase_node(part)


def _parts(
    shifted: torch.fx.Node,
) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node, list[torch.fx.Node]] | None:
    """exp, sum and pick of shifted logits that nothing else reads, and what must be there before the sum."""
    if shifted.target is not aten.sub.Tensor or shifted.kwargs or len(shifted.users) != 2:
        return None
    by_target = {user.target: user for user in shifted.users}
    exponentials, picked = by_target.get(aten.exp.default), by_target.get(kernels.gather_part)
    if exponentials is None or picked is None or len(exponentials.users) != 1:
        return None
    (summed,) = exponentials.users
    largest: Any = shifted.args[1]
    if not isinstance(largest, torch.fx.Node) or largest.target is not collectives.all_reduce_max:
        return None  # it might have a gradient
    if summed.target is not aten.sum.dim_IntList or summed.kwargs or summed.args[1] != [picked.args[1]]:
        return None
    first, between = min(summed, picked), max(summed, picked)
    while (between := between.prev) is not first:
        if has_effect(between):  # what is read before it must not be read behind it, or the other way round
            return None
    before = _ancestors(picked, behind=shifted)
    if exponentials in before or summed in before:
        return None
    return exponentials, summed, picked, [x for x in before if first < x]


def _keepdim(summed: torch.fx.Node) -> bool:
    return len(summed.args) > 2 and bool(summed.args[2])


def _ancestors(node: torch.fx.Node, behind: torch.fx.Node) -> list[torch.fx.Node]:
    """What a node is made of that stands behind another one, in order."""
    found, pending = set[torch.fx.Node](), [node]
    while pending:
        for x in pending.pop().all_input_nodes:
            if behind < x and x not in found:
                found.add(x)
                pending.append(x)
    return sorted(found)


__all__ = ["cross_entropy_sums", "sum_together"]
