"""Whole parameters that cut regions read: one f for many of them, so one bucketed all-reduce in backward.

Such are Qwen3's q_norm, kv weights that several ranks share, and norm weights behind f. Their partial gradients are
summed together when the last of them is there: once per step and group; or once per layer and group, where a layer must
read its own parameters (FSDP2 has them whole only while the layer runs, and a pipeline's stage has no others).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch.fx

from tpcompile import collectives
from tpcompile.layers import repeated_layers
from tpcompile.program import Program, copy_graph


def parameter_copies(program: Program) -> Program:
    """Merge every ``copy`` of a parameter into one ``copy_all`` per group, at the top.

    With ``options.per_layer`` every f of a layer's own parameters stands in that layer, with a ``copy_all`` of its own.
    """
    per_layer = program.options.per_layer
    layers = repeated_layers(program.captured.module_classes) if per_layer else frozenset[str]()
    homes = {node: _home(node, layers) for node in program.graph.nodes if _parameter(node) is not None}
    found: dict[tuple[str, str], list[torch.fx.Node]] = {}  # (layer, group) -> copies
    for node, layer in homes.items():
        if node.target is collectives.copy and node.args[0].op == "get_attr":  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            found.setdefault((layer, str(node.args[1])), []).append(node)
    # (per layer, the root's own stay apart: the stages of a pipeline divide them)
    several = {key: copies for key, copies in found.items() if len(copies) > 1 and (key[0] or not per_layer)}
    merged = {node for copies in several.values() for node in copies}
    alone = [(node, layer) for node, layer in homes.items() if layer and node not in merged]
    if not several and not alone:
        return program
    module, graph = copy_graph(program.graph_module)
    same = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    moved = {same[node] for node in homes}
    starts = {
        layer: next(
            n for n in graph.nodes if n.op not in ("placeholder", "get_attr") and n not in moved and _in(n, layer)
        )
        for layer in {layer for layer, _ in several} | {layer for _, layer in alone}
    }
    for (layer, group), copies in several.items():
        _merge(graph, group, [same[node] for node in copies], starts[layer], layer)
    for node, layer in alone:
        _before(graph, [cast("torch.fx.Node", _parameter(same[node]))], starts[layer])
        starts[layer].prepend(same[node])
        same[node].meta |= _at(layer)
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


def _parameter(node: torch.fx.Node) -> torch.fx.Node | None:
    """The parameter that an f, or an f of it, copies."""
    given = node
    while given.op == "call_function" and given.target in (collectives.copy, collectives.copy_segments):
        given = cast("torch.fx.Node", given.args[0])
    return given if given is not node and given.op == "get_attr" else None


def _home(copy: torch.fx.Node, layers: frozenset[str]) -> str:
    """The layer that has the parameter, if only this layer uses the copy; else "", the root."""
    parameter = _parameter(copy)
    assert parameter is not None
    owner = next((layer for layer in layers if str(parameter.target).startswith(f"{layer}.")), "")
    return owner if all(_in(user, owner) for user in _users(copy)) else ""


def _users(copy: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Who uses a copy, or a copy of it."""
    for user in copy.users:
        if _parameter(user) is None:
            yield user
        else:
            yield from _users(user)


def _at(layer: str) -> dict[str, Any]:
    return {"module": layer, "modules": (layer,) if layer else ()}


def _in(node: torch.fx.Node, layer: str) -> bool:
    return not layer or layer in (node.meta.get("modules") or ())


def _merge(graph: torch.fx.Graph, group: str, copies: list[torch.fx.Node], first: torch.fx.Node, layer: str) -> None:
    """One ``copy_all`` in front of ``first`` instead of ``copies``, and its items, all in ``layer`` (or in none)."""
    parameters: list[Any] = [node.args[0] for node in copies]
    _before(graph, parameters, first)
    with graph.inserting_before(first):
        every = graph.create_node("call_function", collectives.copy_all, (parameters, group), name="copy_all")
        every.meta = {
            "val": tuple(node.meta["val"] for node in copies),
            "placement": tuple(node.meta["placement"] for node in copies),
        } | _at(layer)
        for index, (node, parameter) in enumerate(zip(copies, parameters, strict=True)):
            item = graph.create_node("call_function", operator.getitem, (every, index), name=f"{parameter.name}_copy")
            item.meta = dict(node.meta) | _at(layer)
            node.replace_all_uses_with(item)
            graph.erase_node(node)


def _before(graph: torch.fx.Graph, parameters: list[torch.fx.Node], first: torch.fx.Node) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    for parameter in parameters:
        if order[parameter] > order[first]:
            first.prepend(parameter)


__all__ = ["parameter_copies"]
