"""Regions of a program that are run again in backward instead of keeping what they make (``passes/recompute.py``).

A region is a run of nodes with the same mark in ``meta["recompute"]``. Both who runs programs (the layers' functions
and the simulation) run it through ``recompute``: what autograd keeps of it are its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tpcompile.effects import is_random

MARK = "recompute"
"""Key of the region's name in ``node.meta``."""

GATHER = "(gather)"
"""How the name of a region ends that is a gather and the products that read it."""


@dataclass(frozen=True)
class Region:
    """Neighbouring nodes, what they read from outside, and what outside reads from them, in program order."""

    name: str
    nodes: tuple[torch.fx.Node, ...]
    inputs: tuple[torch.fx.Node, ...]
    outputs: tuple[torch.fx.Node, ...]
    random: bool  # whether it draws random numbers
    regathers: bool  # whether it is a gather and the products that read it: only the gather is run again


def regions(graph: torch.fx.Graph) -> list[Region]:
    """The regions of a graph. Attributes may be read between their nodes: they stand outside."""
    runs: list[tuple[str, list[torch.fx.Node]]] = []
    last = ""
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        name = str(node.meta.get(MARK, ""))
        if name and name == last:
            runs[-1][1].append(node)
        elif name:
            runs.append((name, [node]))
        last = name
    return [_region(name, nodes) for name, nodes in runs]


def _region(name: str, nodes: list[torch.fx.Node]) -> Region:
    own = set(nodes)
    inputs = tuple(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in own))
    outputs = tuple(node for node in nodes if any(user not in own for user in node.users))
    return Region(name, tuple(nodes), inputs, outputs, any(map(is_random, nodes)), name.endswith(GATHER))


def recompute(function: Callable[..., Any], region: Region, *args: Any) -> Any:
    """``function(*args)``, run again in backward, with the random numbers of the first time."""
    random = region.random
    if not region.regathers:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, context_fn=_keeping_products)


def _keeping_products() -> tuple[Any, Any]:
    """Results of matrix products are kept, since others keep them anyway; what they read is made again."""
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    return create_selective_checkpoint_contexts(kept)


FunctionOf = Callable[[torch.fx.Graph, Region], Callable[..., Any]]


def folded(graph: torch.fx.Graph, function_of: FunctionOf) -> torch.fx.Graph:
    """The graph with each region as one call of ``function_of(its graph, region)``; itself if there is none."""
    found = regions(graph)
    if not found:
        return graph
    first = {region.nodes[0]: region for region in found}
    inside = {node for region in found for node in region.nodes}
    made = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}

    def of(node: torch.fx.Node) -> torch.fx.Node:
        if node not in env:
            assert node.op == "get_attr", f"{node} is used before it is made"
            env[node] = made.node_copy(node)
        return env[node]

    for node in graph.nodes:
        if node in first:
            region = first[node]
            function = function_of(_graph_of(region), region)
            call = made.call_function(function, tuple(of(x) for x in region.inputs))
            for index, output in enumerate(region.outputs):
                env[output] = made.call_function(_item, (call, index))
        elif node not in inside and node not in env:
            env[node] = made.node_copy(node, of)
    return made


def _graph_of(region: Region) -> torch.fx.Graph:
    """The region's nodes as a graph of their own, under names that say nothing of where they stand."""
    graph = torch.fx.Graph()
    env = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(region.inputs)}
    for node in region.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda x: env[x])
        env[node] = graph.create_node(node.op, node.target, args, kwargs)  # pyright: ignore[reportArgumentType]
        env[node].meta = {key: value for key, value in node.meta.items() if key != MARK}
    graph.output(tuple(env[node] for node in region.outputs))
    return graph


def _item(values: Any, index: int) -> Any:
    return values[index]


__all__ = ["GATHER", "MARK", "Region", "folded", "recompute", "regions"]
