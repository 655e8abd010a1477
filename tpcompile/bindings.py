"""Python's own functions for the ops that rewritten code calls most.

An op called as ``torch.ops.aten.add.Tensor`` boxes its arguments and matches them with its schema; ``torch.add`` is the
same op with the same autograd, bound ahead of time, at half the cost or less. It matters where the kernels are small.
The graph keeps the ops, which have one name each; only the code that is made of it calls the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from tpcompile.localize import known_part

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
    if (part := known_part(node)) is not None:
        dim, start, end = part
        node.target, node.args = torch.narrow, (node.args[0], dim, start, end - start)


__all__ = ["BINDINGS", "bind_directly"]
