"""Column-parallel products of one activation as one node of autograd: its gradient travels while theirs are made.

f (or the gather of sequence parallelism) and all products that read it are called together. Backward then adds up the
gradient of the activation, starts its all-reduce (or reduce-scatter), multiplies the gradients of the weights
meanwhile, and waits: Megatron-LM's ``LinearWithGradAccumulationAndAsyncCommunication`` (Korthikanti et al. 2022,
section 4.2.2), for as many products as there are. Programs keep the transition and the products; only the code that is
made of a training graph calls them together.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor

from tpcompile import collectives
from tpcompile.onlookers import is_eager
from tpcompile.primitives import PRIMITIVES
from tpcompile.runs import Where
from tpcompile.transitions import TRANSITIONS, Transition

aten = torch.ops.aten
_linear: Any = getattr(getattr(torch, "_C"), "_nn").linear  # noqa: B009 - where torch.nn.functional has it from
OPERANDS: Mapping[object, tuple[str, int, int, int]] = {
    aten.linear.default: ("linear", 0, 1, 2),
    aten.mm.default: ("mm", 0, 1, 2),
    aten.addmm.default: ("addmm", 1, 2, 0),
}
"""A product's kind, and which of its arguments are the activation, the weight and the bias.

``linear`` multiplies with the transpose of a weight ``[n, k]``, the others with a weight ``[k, n]``.
"""


def column_products(
    x: Tensor, transition: str, dim: int, where: Where, group: str, kinds: Sequence[str], *weights: Tensor | None
) -> tuple[Tensor, ...]:
    """The products of a transition's result with each weight; what else there may be behind them is not for callers.

    Args:
        x: what the transition is given; its result is ``[..., k]``.
        transition: ``copy`` or ``all_gather``.
        dim: which dim ``all_gather`` gathers, not negative.
        where: how that dim is cut, or ().
        group: c10d name of the ranks.
        kinds: one of the kinds of :data:`OPERANDS` for each product.
        weights: of each product the weight, then of each the bias (or None).
    """
    row = TRANSITIONS[transition]
    if torch.is_grad_enabled() and x.requires_grad and is_eager(x, *weights):
        return cast("tuple[Tensor, ...]", _Products.apply(x, (row, dim, where, group, kinds), *weights))
    return _multiplied(collectives.apply(x, row.forward, row.backward, dim, where, group), kinds, weights)


def _multiplied(y: Tensor, kinds: Sequence[str], weights: Sequence[Any]) -> tuple[Tensor, ...]:
    made: list[Tensor] = []
    for kind, weight, bias in zip(kinds, weights, weights[len(kinds) :], strict=False):
        if kind == "linear":
            made.append(_linear(y, weight, bias))
        else:
            made.append(torch.mm(y, weight) if bias is None else torch.addmm(bias, y, weight))
    return tuple(made)


class _Products(torch.autograd.Function):
    """The products, and behind them what was gathered for them, if anything was: a backward of backward asks for it."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, call: tuple[Transition, int, Where, str, Sequence[str]], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        row, dim, where, group, kinds = ctx.call = call
        y = x if row.forward == "identity" else PRIMITIVES[row.forward](x, dim, where, group, False)
        ctx.biases = [None if bias is None else bias.shape for bias in weights[len(kinds) :]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, *weights[: len(kinds)])
        made = _multiplied(y, kinds, weights)
        return made if y is x else (*made, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        row, dim, where, group, kinds = ctx.call
        y, *weights = ctx.saved_tensors
        count, again = len(kinds), torch.is_grad_enabled()
        if again and row.forward == "identity":
            y = collectives.apply(y, row.forward, row.backward, dim, where, group)
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        total = flat[count] if len(flat) > count else None
        owned = False
        for grad, weight, kind in zip(flat, weights, kinds, strict=False):
            if grad is None:
                continue
            if kind != "linear":
                weight = weight.t()
            if total is None:
                total, owned = grad.mm(weight), not again
            else:
                total = total.addmm_(grad, weight) if owned else total.addmm(grad, weight)
        if total is None:
            return (None,) * len(ctx.needs_input_grad)
        total = total.view(y.shape)
        done = collectives.begun(row, total, dim, where, group)
        rows, asked = y.reshape(-1, y.shape[-1]), ctx.needs_input_grad
        of_weights: list[Tensor | None] = [None] * count
        of_biases: list[Tensor | None] = [None] * count
        for i, kind in enumerate(kinds):
            grad, whole = flat[i], grads[i]
            if grad is not None and asked[2 + i]:
                of_weights[i] = grad.t().mm(rows) if kind == "linear" else rows.t().mm(grad)
            if whole is not None and asked[2 + count + i]:
                of_biases[i] = whole.sum_to_size(ctx.biases[i])
        return done(), None, *of_weights, *of_biases


# ------------------------------------------------------------------------------------------------ finding them
def call_together(graph: torch.fx.Graph) -> None:
    """Make one call of every f or gather and the products that alone read it, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (collectives.copy, collectives.all_gather):
            value = _flattened(node)
            products = _products(value)
            if products:
                _join(graph, node, value, products)


def _flattened(transition: torch.fx.Node) -> torch.fx.Node:
    """What products read: the value itself, or f's rows, as GPT-2's Conv1D makes them."""
    readers = [*transition.users]
    if transition.target is collectives.copy and len(readers) == 1 and readers[0].target is aten.view.default:
        return readers[0]
    return transition


def _products(value: torch.fx.Node) -> list[torch.fx.Node]:
    """What reads the value, in order, if these are products with weights that are there before it."""
    readers = sorted(value.users)
    for node in readers:
        if node.target not in OPERANDS or node.kwargs:
            return []
        _, x, weight, bias = _operands(node)
        if x is not value or any(w is value or (w.op != "get_attr" and not w < value) for w in (weight, bias) if w):
            return []
        if "val" not in node.meta or node.meta["val"].dim() != value.meta["val"].dim():  # by a vector
            return []
    return readers


def _operands(product: torch.fx.Node) -> tuple[str, Any, Any, Any]:
    kind, x, weight, bias = OPERANDS[product.target]
    return kind, product.args[x], product.args[weight], product.args[bias] if bias < len(product.args) else None


def _join(
    graph: torch.fx.Graph, transition: torch.fx.Node, value: torch.fx.Node, products: list[torch.fx.Node]
) -> None:
    if transition.target is collectives.copy:
        x, group = transition.args
        how: tuple[Any, ...] = ("copy", 0, (), group)
    else:
        x, dim, where, group = transition.args
        how = ("all_gather", dim, where, group)
    kinds, _, weights, biases = zip(*map(_operands, products), strict=True)
    for operand in (*weights, *biases):
        if operand is not None and value < operand:
            value.prepend(operand)  # it reads an attribute
    with graph.inserting_before(value):
        if value is not transition:
            x = graph.call_function(aten.view.default, (x, value.args[1]))
            x.meta = dict(value.meta)
        made = graph.call_function(column_products, (x, *how, kinds, *weights, *biases))
        for index, product in enumerate(products):
            item = graph.call_function(operator.getitem, (made, index))
            item.meta = dict(product.meta)
            product.replace_all_uses_with(item)
            graph.erase_node(product)
    graph.erase_node(value)
    if value is not transition:
        graph.erase_node(transition)


__all__ = ["call_together", "column_products"]
