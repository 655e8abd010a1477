"""Reductions in float32, if the options ask for it: a sum over ranks in bfloat16 rounds once per rank.

A transition that sums, forward or backward, gets casts around it. What it gathers in the other direction travels in
float32 too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from tpcompile.collectives import transition_of
from tpcompile.program import Program, copy_graph

NARROW = (torch.bfloat16, torch.float16)
SUMS = ("all_reduce", "all_reduce_runs", "all_reduce_bucket", "reduce_scatter")
cast = torch.ops.aten.to.dtype


def wide_reductions(program: Program) -> Program:
    """Cast the operands of summing transitions to ``options.reduce_dtype``, and their results back."""
    wide = program.options.reduce_dtype
    if wide is None:
        return program
    module, graph = copy_graph(program.graph_module)
    for node in list(graph.nodes):
        transition = transition_of(node.target)
        if transition is None or not {transition.forward, transition.backward} & set(SUMS):
            continue
        operand: Any = node.args[0]
        if isinstance(operand, (list, tuple)):
            node.update_arg(0, [_cast(graph, node, x, wide) if _narrow(x) else x for x in operand])
            for item in node.users:
                assert item.target is operator.getitem
                if _narrow(operand[item.args[1]]):  # type: ignore[index]
                    _back(graph, item, wide)
        elif _narrow(operand):
            node.update_arg(0, _cast(graph, node, operand, wide))
            _back(graph, node, wide)
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


def _narrow(x: torch.fx.Node) -> bool:
    return x.meta["val"].dtype in NARROW


def _cast(graph: torch.fx.Graph, before: torch.fx.Node, x: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
    with graph.inserting_before(before):
        made = graph.call_function(cast, (x, dtype))
    with torch.no_grad():
        made.meta = {**x.meta, "val": x.meta["val"].to(dtype)}
    made.meta |= {key: before.meta[key] for key in ("module", "modules", "source") if key in before.meta}
    return made


def _back(graph: torch.fx.Graph, node: torch.fx.Node, wide: torch.dtype) -> None:
    """The users of ``node`` read it in the dtype that they know; itself it is wide now."""
    narrow = node.meta["val"]
    with graph.inserting_after(node):
        made = graph.call_function(cast, (node, narrow.dtype))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    with torch.no_grad():
        node.meta["val"] = narrow.to(wide)


__all__ = ["wide_reductions"]
