"""Where the forward all-reduces go: partial sums that meet in an addition travel there and are reduced once.

A partial sum is reduced where it is made, unless a chain of single-use linear ops leads it to an addition with another
partial sum (the parallel residual of GPT-J, Phi, GPT-NeoX, Falcon, Cohere: one forward all-reduce per layer, not two)
or to where it has fewer bytes (a sequence summed or sliced away). Keeping partial sums lazily everywhere would be
wrong: a value with two users would be reduced twice.
"""

from __future__ import annotations

import math

import torch.fx

from tpcompile.passes.place import place
from tpcompile.placement import solve
from tpcompile.program import Program, Row
from tpcompile.rules import RULES, op_name


def forward_all_reduces(program: Program) -> Program:
    """Decide which partial sums travel on (``program.keep``) and place again."""
    paths: list[list[torch.fx.Node]] = []
    for node in program.graph.nodes:
        row = program.table.get(node.name)
        if row is not None and len(row.results) == 1 and row.results[0] != row.settled[0]:
            paths.append(path_of(program, node, row))
    keep: set[str] = set()
    on_path: dict[torch.fx.Node, list[int]] = {}
    for index, path in enumerate(paths):
        for node in path:
            on_path.setdefault(node, []).append(index)
    for node, found in on_path.items():
        carried = [x for x in node.all_input_nodes if x in on_path]
        if len(found) > 1 and len(carried) > 1:
            for index in found:
                keep |= {n.name for n in paths[index][: paths[index].index(node)]}
    for path in paths:
        sizes = [math.prod(program.shape(n)) for n in path]
        smallest = sizes.index(min(sizes))
        if sizes[smallest] < sizes[0]:
            keep |= {n.name for n in path[:smallest]}
    return place(program.with_(keep=frozenset(keep))) if keep else program


def path_of(program: Program, start: torch.fx.Node, row: Row) -> list[torch.fx.Node]:
    """``start`` and the single-use ops after it that its partial sum could pass."""
    partial = {a for a, x in enumerate(row.results[0].letters) if x == "P"}
    path = [start]
    while len(path[-1].users) == 1:
        user = next(iter(path[-1].users))
        rule = RULES.get(op_name(user)) if user.op == "call_function" else None
        if rule is None or user.name not in program.table:
            break
        call = program.call(user)
        ins = [row.results[0] if x is start else program.table[x.name].settled[0] for x in call.operands]
        here = program.table[path[-1].name].settled[0].dims
        for i, x in enumerate(call.operands):
            if x is path[-1]:
                letters = ["P" if a in partial else letter for a, letter in enumerate(ins[i].letters)]
                ins[i] = ins[i].with_letters(letters)
                assert ins[i].dims == here, "a path follows one value"
        try:
            solution = solve(rule.sentence(call), ins, program.mesh, keep=True)
        except Exception:  # noqa: BLE001  the op cannot take it: the path ends here
            break
        if len(solution.results) != 1 or any(solution.results[0].letters[a] != "P" for a in partial):
            break
        if any(
            solution.operands[i].letters[a] != "P"
            for i, x in enumerate(call.operands)
            if x is path[-1]
            for a in partial
        ):
            break
        path.append(user)
    return path


__all__ = ["forward_all_reduces", "path_of"]
