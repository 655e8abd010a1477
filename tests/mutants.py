"""Wrong programs: what can be done to one node of an emitted program so that it no longer is the model.

A mutant is an edit of one node of the emitted graph: a transition deleted, doubled, swapped for one of the same
arguments, given another group, dim or parts; a constant that emission made local given back its whole value, another
rank's, or one more. Knows no model by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from tpcompile import collectives
from tpcompile.collectives import transition_of
from tpcompile.per_rank import PerRank
from tpcompile.placement import Placement
from tpcompile.program import Program, copy_graph

Edit = Callable[[fx.Graph, fx.Node], None]


@dataclass(frozen=True)
class Mutant:
    """One wrong program: what was done to which node."""

    what: str
    node: str
    edit: Edit

    def program(self, program: Program) -> Program:
        module, graph = copy_graph(program.graph_module)
        self.edit(graph, next(n for n in graph.nodes if n.name == self.node))
        return program.with_(graph_module=module)

    def __str__(self) -> str:
        return f"{self.node}: {self.what}"


# ----------------------------------------------------------------------------------------- what is done to a transition
SWAPS: Mapping[str, tuple[str, ...]] = {
    "copy": ("leave", "all_reduce", "once"),
    "leave": ("copy", "all_reduce", "once"),
    "all_reduce": ("copy", "leave", "once"),
    "once": ("copy", "all_reduce", "leave"),
    "gather": ("all_gather",),
    "all_gather": ("gather",),
    "scatter": ("cut", "reduce_scatter"),
    "cut": ("scatter", "reduce_scatter"),
    "reduce_scatter": ("scatter", "cut"),
    "all_reduce_max": ("all_reduce", "copy"),
}
"""For each transition those that take the same arguments."""


def delete(graph: fx.Graph, node: fx.Node) -> None:
    """The value as it was before."""
    if node.target is collectives.copy_all:
        for user in list(node.users):
            user.replace_all_uses_with(node.args[0][user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(node.all_input_nodes[0])
    graph.erase_node(node)


def double(graph: fx.Graph, node: fx.Node) -> None:
    """The same again on its own result."""
    with graph.inserting_before(node):
        first = graph.node_copy(node)
        xs = node.args[0]
        if isinstance(xs, (list, tuple)):
            parts = [graph.call_function(operator.getitem, (first, index)) for index in range(len(xs))]
            for part, x in zip(parts, xs, strict=True):
                part.meta = dict(x.meta)  # type: ignore[union-attr]
            first = parts
    node.update_arg(0, first)


def swap(name: str) -> Edit:
    """Another transition with the same arguments; what only the first one takes is left out."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        node.target = getattr(collectives, name)
        node.kwargs = {}

    return edit


def without(index: int) -> Edit:
    """One parameter of a bucket goes unreduced."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        (user,) = (u for u in node.users if u.args[1] == index)
        user.replace_all_uses_with(node.args[0][index])  # type: ignore[index]

    return edit


def argument(position: int, value: Any) -> Edit:
    """Another argument."""
    return lambda graph, node: node.update_arg(position, value)


def of_transition(program: Program, node: fx.Node) -> Iterator[Mutant]:
    """Mutants of one transition."""
    transition = transition_of(node.target)
    assert transition is not None
    yield Mutant("deleted", node.name, delete)
    yield Mutant("doubled", node.name, double)
    for other in SWAPS.get(transition.name, ()):
        yield Mutant(f"swapped for {other}", node.name, swap(other))
    if transition.name == "copy_all":
        for index in range(len(node.args[0])):  # type: ignore[arg-type]
            yield Mutant(f"without its operand {index}", node.name, without(index))
    group, groups = node.args[-1], program.mesh.all_groups()
    for other, members in groups.items():
        if members != groups[group]:  # type: ignore[index]
            yield Mutant(f"over {other}", node.name, argument(len(node.args) - 1, other))
    if len(node.args) == 4:
        dim, parts = node.args[1:3]
        rank = _dims(node.args[0])  # type: ignore[arg-type]
        if rank > 1:
            yield Mutant("along another dim", node.name, argument(1, (dim - 1) % rank))  # type: ignore[operator]
        if transition.name == "copy_segments":
            yield Mutant("one index off", node.name, argument(2, every_rank(parts, _shifted)))
        elif isinstance(parts, tuple):
            yield Mutant("parts turned", node.name, argument(2, (*parts[1:], parts[0])))


def _dims(node: fx.Node) -> int:
    placed = node.meta.get("placement")
    return len(placed.dims) if isinstance(placed, Placement) else node.meta["val"].ndim


def _shifted(runs: Any) -> Any:
    return tuple((start - 1, length) for start, length in runs)


def every_rank(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` changed, on every rank alike."""
    return PerRank(tuple(map(change, value.values))) if isinstance(value, PerRank) else change(value)


# ------------------------------------------------------------------------------------------- what is done to a constant
def of_constants(program: Program, node: fx.Node, before: fx.Node | None) -> Iterator[Mutant]:
    """Mutants of the constants of ``node`` that are not those of the canonical graph's node ``before``."""
    leaves, _ = pytree.tree_flatten(node.args)
    old, _ = pytree.tree_flatten(before.args) if before is not None else ([], None)
    comparable = before is not None and before.target == node.target and len(old) == len(leaves)
    for at, leaf in enumerate(leaves):
        if not isinstance(leaf, PerRank) and (isinstance(leaf, bool) or not isinstance(leaf, int)):
            continue
        if comparable and old[at] == leaf:
            continue
        if before is None and not isinstance(leaf, PerRank):
            continue
        if comparable and isinstance(old[at], int):
            yield Mutant(f"argument {at} whole again", node.name, leaf_set(at, old[at]))
        if not isinstance(leaf, PerRank):
            yield Mutant(f"argument {at} one more", node.name, leaf_set(at, leaf + 1))
            yield Mutant(f"argument {at} one less", node.name, leaf_set(at, leaf - 1))
            continue
        if all(isinstance(v, (int, float)) for v in leaf.values):
            yield Mutant(f"argument {at} one more", node.name, leaf_set(at, every_rank(leaf, lambda v: v + 1)))
            yield Mutant(f"argument {at} one less", node.name, leaf_set(at, every_rank(leaf, lambda v: v - 1)))
        if len(set(leaf.values)) > 1:
            yield Mutant(f"argument {at} rank 0's", node.name, leaf_set(at, leaf.values[0]))
            turned = PerRank((*leaf.values[1:], leaf.values[0]))
            yield Mutant(f"argument {at} the next rank's", node.name, leaf_set(at, turned))


def leaf_set(at: int, value: Any) -> Edit:
    """Another leaf of the arguments."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        leaves, shape = pytree.tree_flatten(node.args)
        leaves[at] = value
        node.args = pytree.tree_unflatten(leaves, shape)

    return edit


def mutants(program: Program) -> Iterator[Mutant]:
    """Every mutant of an emitted program, in program order."""
    whole = [stage.program for stage in program.history if not stage.program.emitted][-1]
    before = {n.name: n for n in whole.graph.nodes}
    for node in program.graph.nodes:
        if transition_of(node.target) is not None:
            yield from of_transition(program, node)
        elif node.op == "call_function":
            yield from of_constants(program, node, before.get(node.name))
