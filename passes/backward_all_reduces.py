"""Where the backward all-reduces (Megatron's f) go: a minimum cut per mesh axis.

f commutes with every replicated op, so each op outside the cut regions may run before it (R) or behind it (H). An f
costs the bytes of the value it stands on, a parameter's f next to nothing (all of them are reduced together, once,
after backward). The cheapest choice is a minimum cut between what must be complete and what must be partial; among
equal ones the earliest is taken. GPT-NeoX and Falcon fall from two backward all-reduces per layer to one.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import networkx as nx
import torch
import torch.fx

from tpcompile.passes.place import is_spread, needs_grad, place
from tpcompile.placement import Placement
from tpcompile.program import Program
from tpcompile.rules import op_name

PARAMETER_DISCOUNT = 1024
UNWANTED = 1 << 80  # more than all f together: a value that must be partial is left (H -> R) only where it has to be
SOURCE, SINK = "complete", "partial"


def backward_all_reduces(program: Program) -> Program:
    """Decide which replicated ops run behind f (``program.early``) and place again."""
    grads = needs_grad(program)
    early: set[tuple[str, int]] = set()
    for axis in program.mesh.axes if program.degree > 1 else ():
        early |= {(name, axis) for name in _behind(program, axis, grads)}
    return place(program.with_(early=frozenset(early))) if early else program


def _behind(program: Program, axis: int, grads: frozenset[str]) -> set[str]:
    """Names of the replicated ops that run behind f on ``axis``.

    An edge u -> v of the flow network is cut when u is complete and v is partial. Per value an extra node stands for
    "somebody needs it partial", so that one f serves all its users.
    """
    network: Any = nx.DiGraph()
    network.add_nodes_from((SOURCE, SINK))
    free = {n.name for n in program.graph.nodes if _is_free(program, n, axis, grads)}
    for node in program.graph.nodes:
        row = program.table.get(node.name)
        if row is None or node.name not in grads or not isinstance(node.meta["val"], torch.Tensor):
            continue  # (of an op with several results each is a value of its own)
        if is_spread(row.settled[0]):
            _add_gathered(network, program, node, axis, free)
            continue
        if row.settled[0].letters[axis] not in "RH":
            continue
        # the op that makes the value, and what it costs to put f behind it
        source = str(node.args[0]) if node.target is operator.getitem else node.name
        maker = source if source in free else (SOURCE if row.settled[0].letters[axis] == "R" else SINK)
        wanted = ("value", node.name)
        if maker != SINK:
            network.add_edge(maker, wanted, capacity=_cost(program, node))
        for user in node.users:
            if user.name in free:
                network.add_edge(wanted, user.name)  # a partial op has partial operands
                if maker != SOURCE:
                    network.add_edge(user.name, maker)  # a partial value has partial users
                continue
            for letter in _wanted_by(program, user, node, axis):
                if letter in "HS" and maker != SINK:
                    network.add_edge(wanted, SINK)
                elif letter in "RP" and maker not in (SOURCE, SINK):
                    network.add_edge(SOURCE, maker, capacity=UNWANTED)
    # the larger of the sinks' sides: the earliest minimum cut
    _, (late, _) = nx.minimum_cut(network.reverse(copy=False), SINK, SOURCE)
    return {name for name in late if isinstance(name, str) and name in free}


def _add_gathered(network: Any, program: Program, node: torch.fx.Node, axis: int, free: set[str]) -> None:
    """A spread value that some users read whole. One gather serves them all if they agree: complete, with nothing to
    do in backward, or partial, with a reduce-scatter; users that differ cost another gather."""
    wanted, cost = ("value", node.name), _cost(program, node) // 2
    complete = cost
    for user in node.users:
        for letter in _wanted_by(program, user, node, axis):
            if user.name in free and letter in "RH":
                network.add_edge(wanted, user.name)
                network.add_edge(user.name, wanted, capacity=cost)
            elif letter == "H":
                network.add_edge(wanted, SINK)
            elif letter in "RP":
                complete += cost
    network.add_edge(SOURCE, wanted, capacity=complete)


def _is_free(program: Program, node: torch.fx.Node, axis: int, grads: frozenset[str]) -> bool:
    """A replicated op with a gradient, whose operands and results could all be R or all be H on the axis."""
    row = program.table.get(node.name)
    if row is None or node.op != "call_function" or node.name not in grads or node.target is operator.getitem:
        return False
    states: list[Placement] = [*row.operands, *row.results]
    return bool(row.operands) and all(p.letters[axis] in "RH" for p in states)


def _wanted_by(program: Program, user: torch.fx.Node, node: torch.fx.Node, axis: int) -> list[str]:
    """States in which a user that cannot move wants the value."""
    if op_name(user).startswith("aten.sym_"):
        return []  # a size is the same in every state
    row = program.table.get(user.name)
    if row is None or not row.operands:
        return ["R"]  # the output, a scalar op
    operands = program.call(user).operands
    return [p.letters[axis] for x, p in zip(operands, row.operands, strict=True) if x is node]


def _cost(program: Program, node: torch.fx.Node) -> int:
    size = math.prod(program.shape(node)) * node.meta["val"].element_size()
    if node.op == "get_attr":
        return max(1, size // PARAMETER_DISCOUNT)
    return size * PARAMETER_DISCOUNT


__all__ = ["backward_all_reduces"]
