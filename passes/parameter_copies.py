"""Whole parameters that cut regions read: one f for all of them, so one bucketed all-reduce in backward.

Such are Qwen3's q_norm, kv weights that several ranks share, and norm weights behind f. Their partial gradients are
summed together, once per step and group, when the last of them is there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.fx

from tpcompile import collectives
from tpcompile.program import Program, copy_graph


def parameter_copies(program: Program) -> Program:
    """Merge every ``copy`` of a parameter into one ``copy_all`` per group, at the top."""
    by_group: dict[str, list[torch.fx.Node]] = {}
    for node in program.graph.find_nodes(op="call_function", target=collectives.copy):
        if node.args[0].op == "get_attr":
            by_group.setdefault(node.args[1], []).append(node)
    several = {group: copies for group, copies in by_group.items() if len(copies) > 1}
    if not several:
        return program
    module, graph = copy_graph(program.graph_module)
    same = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for group, copies in several.items():
        _merge(graph, group, [same[node] for node in copies], first)
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


def _merge(graph: torch.fx.Graph, group: str, copies: list[torch.fx.Node], first: torch.fx.Node) -> None:
    """One ``copy_all`` in front of ``first`` instead of ``copies``, and its items, all outside of any layer."""
    parameters: list[Any] = [node.args[0] for node in copies]
    order = {node: i for i, node in enumerate(graph.nodes)}
    for parameter in parameters:
        if order[parameter] > order[first]:
            first.prepend(parameter)
    top: dict[str, Any] = {"module": "", "modules": ()}
    with graph.inserting_before(first):
        every = graph.create_node("call_function", collectives.copy_all, (parameters, group), name="copy_all")
        every.meta = {
            "val": tuple(node.meta["val"] for node in copies),
            "placement": tuple(node.meta["placement"] for node in copies),
        } | top
        for index, (node, parameter) in enumerate(zip(copies, parameters, strict=True)):
            item = graph.create_node("call_function", operator.getitem, (every, index), name=f"{parameter.name}_copy")
            item.meta = dict(node.meta) | top
            node.replace_all_uses_with(item)
            graph.erase_node(node)


__all__ = ["parameter_copies"]
