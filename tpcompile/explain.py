"""``explain``: why a parameter is cut as it is, or stays whole: the line, the axis, the path of ops that ties them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
import torch.fx

from tpcompile import shards
from tpcompile.errors import ShardingError, did_you_mean
from tpcompile.layout import axes_of
from tpcompile.program import Cut, Program, where
from tpcompile.rules import op_name
from tpcompile.structure import Term, atoms, show

LONGEST_PATH = 12


def explain(program: Program, name: str) -> str:
    """The explanation, one block per parameter; ``name`` is a parameter, an alias of one, or a module.

    Raises:
        ShardingError: nothing has that name (with the nearest ones).
    """
    names = _parameters(program, name)
    return "\n\n".join("\n".join(_explain_one(program, n)) for n in names)


def _parameters(program: Program, name: str) -> list[str]:
    captured = program.captured
    canonical = captured.aliases.get(name, name)
    if canonical in captured.parameters:
        return [canonical]
    direct = [n for n in captured.parameters if n.rpartition(".")[0] == name]
    below = direct or [n for n in captured.parameters if n.startswith(f"{name}.")]
    if below:
        return below
    known = [*captured.parameters, *captured.module_classes]
    raise ShardingError(
        f"nothing in the model is called {name}",
        why=f"it has {len(captured.parameters)} parameters, for example {', '.join(list(captured.parameters)[:3])}",
        help=did_you_mean(name, known) or "give a dotted parameter or module name",
    )


def _explain_one(program: Program, name: str) -> Iterator[str]:
    structure = _structure(program)
    dims = structure.parameters.get(name)
    parameter = program.captured.parameters[name]
    yield f"{name}  {list(parameter.shape)}"
    if dims is None:
        yield "  is not used in the graph: every rank keeps it whole"
        return
    names = {id(a): f"{a.size}/{program.mesh.group_name(c.axes)}" for c in program.cuts for a in c.atoms}
    yield "  index spaces: " + ", ".join(show(t, names) for t in dims)
    for claim in program.claims:
        if claim.parameter == name:
            place = claim.line.where
            yield f"  claimed `{claim.word}` by {place.file}:{place.line}: {(place.text or '').strip()}"
    layouts = program.parameters.get(name, ())
    if any(axes_of(x) for x in layouts):
        shapes = [shards.shape(layouts, program.mesh, r) for r in range(program.degree)]
        shown = f"{list(shapes[0])} on each rank" if len(set(shapes)) == 1 else f"{[list(s) for s in shapes]} by rank"
        yield f"  cut: {shown}"
        for dim, term in enumerate(dims):
            inside = {id(a) for a in atoms(term)} if axes_of(layouts[dim]) else set[int]()
            found = [c for c in program.cuts if inside & {id(a) for a in c.atoms}]
            for parameter in dict.fromkeys(c.parameter for c in found):
                yield from _tie(program, name, dim, [c for c in found if c.parameter == parameter])
        return
    yield from _why_whole(program, name, dims)


def _structure(program: Program) -> Any:
    assert program.structure is not None, "explain needs the structure pass"
    return program.structure


def _tie(program: Program, name: str, dim: int, cuts: list[Cut]) -> Iterator[str]:
    """The path from the parameter to the line that asked for the cut of its axis (or axes, nested)."""
    cut = cuts[0]
    line = cut.claim.line.where if cut.claim is not None else None
    spot = f"{line.file}:{line.line}" if line is not None else "the plan"
    if cut.parameter == name:
        yield f"  dim {dim} is the axis that {spot} cuts"
        return
    sizes = " * ".join(str(c.size) for c in cuts)
    yield f"  dim {dim} shares its axis of {sizes} with {cut.parameter}, which {spot} cuts, through:"
    path = _path(program, name, cut)
    for node in path[:LONGEST_PATH]:
        place = where(node)
        at = f"  ({place.file}:{place.line})" if place.file else ""
        what = node.target if node.op == "get_attr" else op_name(node)
        yield f"    {what}  in {place.module or 'the model'}{at}"
    if len(path) > LONGEST_PATH:
        yield f"    ... {len(path) - LONGEST_PATH} more"


def _path(program: Program, name: str, cut: Cut) -> list[torch.fx.Node]:
    """Shortest path between the two parameters over values that carry the cut atom."""
    structure = _structure(program)
    canonical = next(s.program for s in program.history if s.name == "structure")
    carrying = {
        n.name: n
        for n in canonical.graph.nodes
        if any(a is cut.atoms[0] for dims in structure.values.get(n.name, ()) for t in dims for a in atoms(t))
    }
    network: Any = nx.Graph()
    for node in carrying.values():
        touching = [x for x in node.all_input_nodes if x.name in carrying]
        network.add_edges_from((node.name, x.name) for x in touching)
        # operands of one op that share the atom are tied by it even where its result has lost it (a contraction)
    for node in canonical.graph.nodes:
        if node.name not in carrying and node.op == "call_function":
            touching = [x for x in node.all_input_nodes if x.name in carrying]
            network.add_edges_from((node.name, x.name) for x in touching if len(touching) > 1)
    nodes = {n.name: n for n in canonical.graph.nodes}
    start = [n.name for n in canonical.graph.nodes if n.op == "get_attr" and n.target == name]
    end = [n.name for n in canonical.graph.nodes if n.op == "get_attr" and n.target == cut.parameter]
    if start and end and network.has_node(start[0]) and network.has_node(end[0]) and nx.has_path(
        network, start[0], end[0]
    ):  # fmt: skip
        return [nodes[n] for n in nx.shortest_path(network, start[0], end[0])]
    return []


def _why_whole(program: Program, name: str, dims: tuple[Term, ...]) -> Iterator[str]:
    if name in program.whole:
        yield "  whole on every rank, because the spec says `replicate`"
        return
    yield "  whole on every rank: no line of the spec cuts one of its axes"
    for dim, term in enumerate(dims):
        pins = [(a, a.pins[0]) for a in atoms(term) if a.pins and a.size > 1]
        if not pins:
            yield f"  dim {dim} could be cut: `column` or `row` would name it"
        for atom, pin in pins[:2]:
            place = where(pin.node)
            at = f" ({place.file}:{place.line})" if place.file else ""
            op = f"{op_name(pin.node)} in {place.module or 'the model'}{at}"
            yield f"  dim {dim} ({atom.size} positions) cannot: {pin.reason}: {op}"


__all__ = ["explain"]
