"""`verify` must be able to fail: every mutant of an emitted program is caught, and the place is named.

Each transition of each program is deleted, doubled, swapped with its neighbours, given another dim, other parts or
another group; each constant that emission made local is given back its whole value, another rank's, or one more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import fx
from torch.utils import _pytree as pytree

from tpcompile import collectives
from tpcompile.collectives import TRANSITIONS, transition_of
from tpcompile.equivalence import Report, verify_program
from tpcompile.per_rank import PerRank
from tpcompile.program import Program, copy_graph

PROGRAMS = [("gpt2", 2), ("llama_gqa", 2), ("llama_few_kv", 4), ("falcon_mqa", 3), ("t5", 2)]

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


# -------------------------------------------------------------------------------------------- what is done to a transition
SWAPS = {
    "copy": ("leave", "all_reduce", "once"),
    "leave": ("copy",),
    "all_reduce": ("copy", "leave", "once"),
    "once": ("copy", "all_reduce"),
    "gather": ("all_gather",),
    "all_gather": ("gather",),
    "scatter": ("cut",),
    "cut": ("scatter", "reduce_scatter"),
    "reduce_scatter": ("scatter", "cut"),
}


def delete(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is collectives.copy_all:
        for user in list(node.users):
            user.replace_all_uses_with(node.args[0][user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(node.all_input_nodes[0])
    graph.erase_node(node)


def double(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        first = graph.node_copy(node)
        first.name = f"first_{node.name}"
        if node.target is collectives.copy_all:
            xs = [graph.call_function(lambda ys, i=i: ys[i], (first,)) for i in range(len(node.args[0]))]  # type: ignore[arg-type]
            node.update_arg(0, xs)
        else:
            node.update_arg(0, first)
    for made in (n for n in graph.nodes if n.name not in {node.name} and "origin" in n.meta and n is first):
        made.meta = {k: v for k, v in made.meta.items() if k not in ("origin", "placement")}


def swap(name: str) -> Edit:
    def edit(graph: fx.Graph, node: fx.Node) -> None:
        wanted, given = TRANSITIONS[name], TRANSITIONS[node.target.__name__]  # type: ignore[union-attr]
        node.target = getattr(collectives, wanted.name)
        assert given is not wanted

    return edit


def without(index: int) -> Edit:
    """One parameter of a bucket goes unreduced."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        (user,) = (u for u in node.users if u.args[1] == index)
        user.replace_all_uses_with(node.args[0][index])  # type: ignore[index]

    return edit


def argument(position: int, value: Any) -> Edit:
    return lambda graph, node: node.update_arg(position, value)


def of_transition(program: Program, node: fx.Node) -> Iterator[Mutant]:
    transition = transition_of(node.target)
    assert transition is not None
    yield Mutant("deleted", node.name, delete)
    yield Mutant("doubled", node.name, double)
    for other in SWAPS.get(transition.name, ()):
        yield Mutant(f"swapped for {other}", node.name, swap(other))
    if transition.name == "copy_all":
        for index in range(len(node.args[0])):  # type: ignore[arg-type]
            yield Mutant(f"without its operand {index}", node.name, without(index))
    group = node.args[-1]
    for other in program.mesh.all_groups():
        if other != group:
            yield Mutant(f"over {other}", node.name, argument(len(node.args) - 1, other))
    if len(node.args) == 4:
        dim, parts = node.args[1:3]
        rank = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
        yield Mutant("along another dim", node.name, argument(1, (dim - 1) % rank))  # type: ignore[operator]
        if transition.name == "copy_segments":
            yield Mutant("one index off", node.name, argument(2, every_rank(parts, _shifted)))
        else:
            yield Mutant("parts turned", node.name, argument(2, every_rank(parts, lambda p: (*p[1:], p[0]))))


def _shifted(runs: Any) -> Any:
    return tuple((start - 1, length) for start, length in runs)


def every_rank(value: Any, change: Callable[[Any], Any]) -> Any:
    return PerRank(tuple(map(change, value.values))) if isinstance(value, PerRank) else change(value)


# ------------------------------------------------------------------------------------------------ what is done to a constant
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
        if isinstance(leaf, PerRank) and not all(isinstance(v, int) for v in leaf.values):
            continue
        if before is None and not isinstance(leaf, PerRank):
            continue
        if comparable and isinstance(old[at], int):
            yield Mutant(f"argument {at} whole again", node.name, leaf_set(at, old[at]))
        yield Mutant(f"argument {at} one more", node.name, leaf_set(at, every_rank(leaf, lambda v: v + 1)))
        if isinstance(leaf, PerRank):
            yield Mutant(f"argument {at} rank 0's", node.name, leaf_set(at, leaf.values[0]))


def leaf_set(at: int, value: Any) -> Edit:
    def edit(graph: fx.Graph, node: fx.Node) -> None:
        leaves, shape = pytree.tree_flatten(node.args)
        leaves[at] = value
        node.args = pytree.tree_unflatten(leaves, shape)

    return edit


def mutants(program: Program) -> Iterator[Mutant]:
    canonical = next(s.program for s in program.history if s.name == "canonicalize").graph
    before = {n.name: n for n in canonical.nodes}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if transition_of(node.target) is not None:
            yield from of_transition(program, node)
        else:
            yield from of_constants(program, node, before.get(node.name))
