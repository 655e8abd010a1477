"""All-reduces that may overwrite what they sum, because nobody else can hold that memory.

Forward: the operand is fresh memory that its op does not read in backward, and nothing else uses it. Backward: the
gradient that f receives is the operand's of products only, which autograd computes into fresh memory; adding several
up, it takes fresh memory too, or the memory of one of them that nobody else holds. An op that hands its own gradient
on (an addition, a view) would share it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx

from tpcompile import collectives
from tpcompile.program import Program, copy_graph
from tpcompile.rules import op_name
from tpcompile.sentence import tensor_operands


def _ops(names: str) -> frozenset[str]:
    """``"mm sum.dim_IntList"``: op names without their ``aten.``, and without ``.default``."""
    return frozenset(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in names.split())


PRODUCTS = _ops("linear mm bmm matmul mv mul.Tensor conv1d conv2d")

FRESH = PRODUCTS | _ops("addmm baddbmm add.Tensor sub.Tensor div.Tensor sum sum.dim_IntList") | {"embedding_rows"}
"""Ops whose result is new memory that their backward does not read."""

OWN_GRADIENT: Mapping[str, frozenset[int]] = {
    **dict.fromkeys(PRODUCTS, frozenset({0, 1})),
    **dict.fromkeys(_ops("addmm baddbmm"), frozenset({1, 2})),
    **dict.fromkeys(_ops("layer_norm rms_norm pow.Tensor_Scalar"), frozenset({0})),
    **dict.fromkeys(_ops("silu gelu relu tanh sigmoid rsqrt"), frozenset({0})),
}
"""Tensor operands whose gradient an op's backward writes to new memory, whatever the operands are."""

SAME_MEMORY = _ops("view reshape transpose.int permute unsqueeze squeeze.dim t")
"""Ops whose backward hands the gradient on as it is, only looked at in another way."""


def in_place(program: Program) -> Program:
    """Mark the all-reduces, forward and backward, that may work in place."""
    module, graph = copy_graph(program.graph_module)
    for node in graph.nodes:
        if node.target is collectives.all_reduce and "pending" not in node.kwargs and _is_fresh(node.args[0]):
            node.kwargs = {**node.kwargs, "inplace": True}
        elif node.target is collectives.copy and _gradient_is_own(node):
            node.kwargs = {**node.kwargs, "inplace_backward": True}
    module.recompile()
    return program.with_(graph_module=module)


def _is_fresh(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in FRESH and len(node.users) == 1


def _gradient_is_own(node: torch.fx.Node) -> bool:
    """Whether every use of the value gives it a gradient in memory that nobody else holds."""
    return bool(node.users) and all(_gives_own(user, node) for user in node.users)


def _gives_own(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    if user.op != "call_function":
        return False
    if op_name(user) in SAME_MEMORY:
        return _gradient_is_own(user)
    uses = {i for i, x in enumerate(tensor_operands(user)) if x is node}
    return uses <= OWN_GRADIENT.get(op_name(user), frozenset())


__all__ = ["in_place"]
