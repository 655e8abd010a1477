"""Sequence parallelism: between the cut blocks values are spread over the ranks along their positions.

Norms, dropout and residuals then run on a part of the positions, and a block's all-reduce becomes a reduce-scatter
behind it and an all-gather in front of the next (Korthikanti et al. 2022, section 4.2.2). Nothing is matched: the
partial sums that placement settles are settled another way, and what needs all positions gathers them.
"""

from __future__ import annotations

import math

import torch.fx

from tpcompile.errors import ShardingError
from tpcompile.passes.forward_all_reduces import path_of
from tpcompile.passes.place import gathered, is_spread, place, stream_dim
from tpcompile.program import Program
from tpcompile.rules import MATRIX_PRODUCTS, RULES, op_name
from tpcompile.structure import Atom, find


def sequence_parallel(program: Program) -> Program:
    """Spread the streams of positions that partial sums belong to, if the options ask for it.

    The streams are those of the modules that the spec's ``sequence`` lines name; without such lines all of them.

    Raises:
        ShardingError: no partial sum has positions to spread.
    """
    if not program.options.sequence_parallel or program.degree == 1:
        return program
    paths = [
        path_of(program, node, row)
        for node in program.graph.nodes
        if (row := program.table.get(node.name)) is not None and len(row.results) == 1 and row.results != row.settled
    ]
    streams = _streams(program, paths)
    if not streams:
        raise ShardingError(
            "there is no sequence to spread over the ranks",
            why=f"no partial sum has a dim of positions of at least {program.degree}"
            + (" in the modules of the `sequence` lines" if _named(program) else ""),
            help="compile without sequence_parallel",
        )
    program = program.with_(streams=streams)
    keep = set(program.keep)
    for path in paths:  # a sum over merged dims ([b * s, h]) travels on until its positions are a dim of their own
        reach = next((i for i, node in enumerate(path) if stream_dim(program, node) is not None), 0)
        keep |= {node.name for node in path[:reach]}
    program = place(program.with_(keep=frozenset(keep)))
    whole = _read_whole(program)
    return place(program.with_(gathered=frozenset(whole))) if whole else program


def _named(program: Program) -> set[str]:
    return {claim.module for claim in program.claims if claim.word == "sequence"}


def _streams(program: Program, paths: list[list[torch.fx.Node]]) -> tuple[Atom, ...]:
    """One atom per stream: the positions that attention runs over, else the dim before the last."""
    assert program.structure is not None
    values = program.structure.values
    named = _named(program)
    allowed: set[int] = set()
    attended: set[int] = set()
    for node in program.graph.nodes:
        terms = values.get(node.name)
        if terms and node.meta.get("module") in named:
            allowed |= {id(find(t)) for t in terms[0]}
        rule = RULES.get(op_name(node)) if node.op == "call_function" else None
        if rule is not None and terms and ("softmax" in op_name(node) or "attention" in op_name(node)):
            sentence = rule.sentence(program.call(node))
            for labels, operand in zip(sentence.operands, program.call(node).operands, strict=True):
                dims = values.get(operand.name, ((),))[0]
                attended |= {id(find(t)) for x, t in zip(labels, dims, strict=False) if x in sentence.whole}
    found: dict[int, Atom] = {}
    for path in paths:
        for node in path:
            terms = values.get(node.name, ((),))[0]
            if not node.meta["val"].is_floating_point():
                continue
            leading = [(d, find(t)) for d, t in enumerate(terms[:-1])]
            fitting = [(d, t) for d, t in leading if isinstance(t, Atom) and t.size >= max(2, program.degree)]
            if named:
                fitting = [(d, t) for d, t in fitting if id(t) in allowed]
            seen = [t for _, t in fitting if id(t) in attended]
            chosen = seen or [t for d, t in fitting if len(terms) > 2 and d == len(terms) - 2]
            if chosen:
                found.setdefault(id(chosen[-1]), chosen[-1])
                break
    return tuple(found.values())


def _read_whole(program: Program) -> set[str]:
    """Spread values that products shall read whole: those that are gathered for some op anyway, and those from which a
    larger value is made that would be gathered (a whole head's logits)."""
    found: set[str] = set()
    for node in program.graph.nodes:
        row = program.table.get(node.name)
        if row is None or not row.operands:
            continue
        for x, want in zip(program.call(node).operands, row.operands, strict=True):
            have = program.table[x.name].settled[0]
            if is_spread(have) and not is_spread(want):
                found.add(_smallest(program, x).name)
    return found


def _smallest(program: Program, value: torch.fx.Node) -> torch.fx.Node:
    """The smallest spread value on the way back from ``value`` to the first op with several of them."""
    best, at = value, value
    while at.op == "call_function" and at.name in program.table:
        row = program.table[at.name]
        operands = program.call(at).operands
        spread = [x for x, placed in zip(operands, row.operands, strict=True) if is_spread(placed)]
        if len(set(spread)) != 1 or gathered(row.operands[operands.index(spread[0])], program.mesh) == row.operands:
            break
        at = spread[0]
        product = any(op_name(user) in MATRIX_PRODUCTS for user in at.users)
        if product and math.prod(program.shape(at)) < math.prod(program.shape(best)):
            best = at
    return best


__all__ = ["sequence_parallel"]
