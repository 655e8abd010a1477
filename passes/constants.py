"""Values that every rank would make whole, only to cut them: made cut from the start.

A cut moves up through the op that makes the value, by the op's own rule, as long as it costs nothing: it then stands on
operands that are no larger, or nowhere at all, because the cut axis was born there (a repeated kv head's ``expand``, a
mask broadcast over heads, a constant). Nothing is ever moved that would change what is communicated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace

import torch.fx

from tpcompile.aliasing import is_inplace
from tpcompile.layout import Layout, LayoutError, Leaf, Mesh, axes_of, regroup
from tpcompile.passes.place import needs_grad
from tpcompile.placement import Placement, PlacementError, solve
from tpcompile.program import Program, Row
from tpcompile.rules import RULES, op_name
from tpcompile.sentence import Sentence

BROADCASTS = ("aten.expand.default",)
"""Ops that give one value to all positions of a dim that their operand lacks, and know how to make a part of it."""


def constants(program: Program) -> Program:
    """Move cuts up, from the last op to the first; only rows of the table change."""
    grads = needs_grad(program)
    table = dict(program.table)
    for node in reversed(program.graph.nodes):
        wanted = _wanted(program, node, table, grads)
        row = _made_cut(program, node, wanted, table, grads) if wanted is not None else None
        if row is not None:
            table[node.name] = row
    return program.with_(table=table)


def _wanted(program: Program, node: torch.fx.Node, table: Mapping[str, Row], grads: frozenset[str]) -> Placement | None:
    """The placement, cut further than the value's own without communication, in which all users want it."""
    row = table.get(node.name)
    if row is None or len(row.results) != 1 or row.results != row.settled or node.op != "call_function":
        return None
    have = row.results[0]
    found: set[Placement] = set()
    for user in node.users:
        using = table.get(user.name)
        if using is None and op_name(user).startswith("aten.sym_"):
            continue  # a size is made whole again
        if using is None or not using.operands:
            return None
        operands = program.call(user).operands
        found |= {want for x, want in zip(operands, using.operands, strict=True) if x is node}
    if node.name not in grads:
        found = {_without_gradient(want, have) for want in found}
    if len(found) != 1:
        return None
    (want,) = found
    changed = [(a, b) for a, b in zip(have.letters, want.letters, strict=True) if a != b]
    free = {("H", "S")} if node.name in grads else {("H", "S"), ("R", "S")}
    return want if changed and set(changed) <= free else None


def _without_gradient(want: Placement, have: Placement) -> Placement:
    """Without a gradient R and H are one state: that of the value."""
    return want.with_letters(
        [h if {h, w} == {"R", "H"} else w for h, w in zip(have.letters, want.letters, strict=True)]
    )


def _made_cut(
    program: Program, node: torch.fx.Node, want: Placement, table: Mapping[str, Row], grads: frozenset[str]
) -> Row | None:
    """The row in which the node makes ``want``, or None if it cannot or that would cost something."""
    rule, row = RULES.get(op_name(node)), table[node.name]
    if rule is None or rule.random or is_inplace(node) or node.target is operator.getitem or not row.operands:
        return None
    call = program.call(node)
    if node.name not in grads and any(x.name in grads for x in call.operands):
        return None  # the operands' f would have to be made for a gradient that never comes
    try:
        sentence = rule.sentence(call)
        layouts = _upwards(sentence, want, program.mesh)
        ins = [
            Placement(placed.letters, tuple(layouts.get(x, d) for x, d in zip(labels, placed.dims, strict=True)))
            for labels, placed in zip(sentence.operands, row.operands, strict=True)
        ]
        early = frozenset(axis for name, axis in program.early if name == node.name)
        solution = solve(sentence, ins, program.mesh, early=early)
    except (ValueError, LayoutError, PlacementError):
        return None
    result = solution.results[0]
    if op_name(node) in BROADCASTS:
        result = _broadcast(sentence, result, want, "H" if node.name in grads else "RH")
    if node.name not in grads:
        result = _without_gradient(result, want)
    if result != want or any(n.dims != p.dims for n, p in zip(solution.operands, ins, strict=True)):
        return None
    cut: set[torch.fx.Node] = set()
    for i, (x, old, new) in enumerate(zip(call.operands, row.operands, solution.operands, strict=True)):
        have = table[x.name].settled[0]
        if i in sentence.references or new.dims == old.dims:
            continue
        if new.dims != have.dims:
            cut.add(x)
        if x.name in grads and any(h == "R" and n == "S" for h, n in zip(have.letters, new.letters, strict=True)):
            return None  # a gather in backward
    if sum(math.prod(program.shape(x)) for x in cut) > math.prod(program.shape(node)):
        return None
    reason = f"{solution.reason}; made cut, as all its users want it"
    return replace(row, operands=solution.operands, results=(want,), settled=(want,), reason=reason)


def _broadcast(sentence: Sentence, result: Placement, want: Placement, free: str) -> Placement:
    """``result``, cut as wanted along the dims that no operand has, over the axes on which it is ``free``."""
    inherited = {label for labels in sentence.operands for label in labels}
    new = [label not in inherited for label in sentence.results[0]]
    dims = tuple(w if is_new else d for w, d, is_new in zip(want.dims, result.dims, new, strict=True))
    over = frozenset[int]().union(*(axes_of(d) for d, is_new in zip(want.dims, new, strict=True) if is_new))
    letters = tuple("S" if a in over and x in free else x for a, x in enumerate(result.letters))
    return Placement(letters, dims)


def _upwards(sentence: Sentence, want: Placement, mesh: Mesh) -> dict[str | None, Layout]:
    """Layouts of the labels that are cut in the result, and through the sentence's products to the operands."""
    found: dict[str | None, Layout] = {
        label: layout for label, layout in zip(sentence.results[0], want.dims, strict=True) if axes_of(layout)
    }
    for left, right in sentence.products:
        if any(label in found for label in right):
            sizes = sentence.sizes
            known = [found.get(x, Leaf(sizes[x])) for x in right]
            found |= dict(zip(left, regroup(known, [sizes[x] for x in left], mesh), strict=True))
    return found


__all__ = ["constants"]
