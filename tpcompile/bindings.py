"""Python's own functions for the ops that rewritten code calls most.

An op called as ``torch.ops.aten.add.Tensor`` boxes its arguments and matches them with its schema; ``torch.add`` is the
same op with the same autograd, bound ahead of time, at half the cost or less. It matters where the kernels are small.
The graph keeps the ops, which have one name each; only the code that is made of it calls the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.fx

from tpcompile.layout import axes_of

_nn: Any = getattr(getattr(torch, "_C"), "_nn")  # noqa: B009 - where torch.nn.functional has them from


def _of(namespace: Any, names: str) -> dict[object, Callable[..., Any]]:
    """``"mm add.Tensor"``: ops without their ``aten.``, and without ``.default``; same name, same arguments."""
    found: dict[object, Callable[..., Any]] = {}
    for text in names.split():
        name, _, overload = text.partition(".")
        found[getattr(getattr(torch.ops.aten, name), overload or "default")] = getattr(namespace, name)
    return found


BINDINGS: Mapping[object, Callable[..., Any]] = {
    **_of(torch, "add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar neg exp log rsqrt tanh sigmoid relu"),
    **_of(torch, "mm bmm addmm matmul layer_norm rms_norm softmax.int dropout embedding mean.dim"),
    **_of(torch, "sum.dim_IntList cat transpose.int unsqueeze squeeze.dim reshape detach masked_fill.Scalar"),
    **_of(torch, "cos sin cumsum eq.Tensor ne.Scalar le.Tensor split_with_sizes"),
    **_of(torch.Tensor, "view expand permute contiguous"),
    torch.ops.aten.sym_size.int: torch.Tensor.size,
    torch.ops.aten.to.dtype: torch.Tensor.to,
    torch.ops.aten.arange.default: torch.arange,
    **_of(_nn, "linear gelu silu scaled_dot_product_attention"),
}
"""Overload -> the function that does the same for the same arguments."""


def bind_directly(graph: torch.fx.Graph) -> None:
    """Call the functions of :data:`BINDINGS` where ``graph`` calls their ops, in place."""
    for node in graph.nodes:
        if node.op == "call_function":
            if node.target is torch.ops.aten.slice.Tensor:
                _narrow(node)
            node.target = BINDINGS.get(node.target, node.target)


def _narrow(node: torch.fx.Node) -> None:
    """A slice with known ends of a dim that every rank holds whole is a ``narrow``, which is bound ahead of time."""
    given: Any = node.args
    x, dim, start, end, step = cast("tuple[Any, ...]", (*given, *(0, 0, None, None, 1)[len(given) :]))
    value, placed = x.meta.get("val"), x.meta.get("placement")
    if node.kwargs or step != 1 or value is None or placed is None or axes_of(placed.dims[dim]):
        return
    size, start = value.shape[dim], 0 if start is None else start
    if all(isinstance(n, int) for n in (size, start, end)) and 0 <= start <= min(size, end):
        node.target, node.args = torch.narrow, (x, dim, start, min(size, end) - start)


__all__ = ["BINDINGS", "bind_directly"]
