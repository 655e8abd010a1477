"""Sequence parallelism: between the cut blocks values are spread over the ranks along their positions.

Norms, dropout and residuals then run on a part of the positions, and a block's all-reduce becomes a reduce-scatter
behind it and an all-gather in front of the next (Korthikanti et al. 2022, section 4.2.2). Nothing is matched: the
partial sums that placement settles are settled another way, and what needs all positions gathers them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch.fx

from tpcompile.errors import ShardingError
from tpcompile.passes.forward_all_reduces import path_of
from tpcompile.passes.place import is_spread, place, stream_dim
from tpcompile.program import Program, copy_graph
from tpcompile.rules import RULES, op_name
from tpcompile.structure import Term, same_space, size

SPREAD, WHOLE = "spread", "whole"
ATTENTION = frozenset({"aten.softmax.int", "aten.scaled_dot_product_attention.default"})


def sequence_parallel(program: Program) -> Program:
    """Spread the streams of positions that partial sums belong to, if the options ask for it.

    The streams are those of the modules that the spec's ``sequence`` lines name; without such lines all of them.

    Raises:
        ShardingError: no partial sum has positions to spread.
    """
    if not program.options.sequence_parallel or program.degree == 1:
        return program
    program = _partial_sums_first(program)
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
    whole = _run_whole(program)
    return place(program.with_(whole_ops=frozenset(whole))) if whole else program


def _partial_sums_first(program: Program) -> Program:
    """``(x + p) + q`` of partial sums p and q becomes ``x + (p + q)``: one reduce-scatter (as in Cohere)."""
    changed: list[tuple[str, str, str]] = []
    for node in program.graph.nodes:
        if not _adds(node) or node.name not in program.keep or len(node.users) != 1:
            continue
        (user,) = node.users
        terms = [(x, program.table[x.name].settled[0]) for x in node.args]
        partial = [x for x, placed in terms if "P" in placed.letters]
        whole = [x for x, placed in terms if "P" not in placed.letters]
        other = next((x for x in user.args if x is not node), None) if _adds(user) else None
        if len(partial) != 1 or len(whole) != 1 or other is None or other.name not in program.table:
            continue
        alike = {(program.shape(x), x.meta["val"].dtype) for x in (*partial, *whole, other, user)}
        if "P" in program.table[other.name].settled[0].letters and len(alike) == 1:
            changed.append((node.name, partial[0].name, whole[0].name))
    if not changed:
        return program
    module, graph = copy_graph(program.graph_module)
    named = {node.name: node for node in graph.nodes}
    for name, partial_name, whole_name in changed:
        node = named[name]
        (user,) = node.users
        other = next(x for x in user.args if x is not node)
        node.args, user.args = (named[partial_name], other), (named[whole_name], node)
        user.prepend(node)
    module.recompile()
    return place(program.with_(graph_module=module))


def _adds(node: torch.fx.Node) -> bool:
    """Whether the op is the plain sum of two tensors."""
    return (
        op_name(node) == "aten.add.Tensor"
        and len(set(node.args)) == 2
        and all(isinstance(x, torch.fx.Node) for x in node.args)
        and not node.kwargs
    )


def _named(program: Program) -> set[str]:
    return {claim.module for claim in program.claims if claim.word == "sequence"}


def _streams(program: Program, paths: list[list[torch.fx.Node]]) -> tuple[Term, ...]:
    """One term per stream: the positions that attention runs over, else the dim before the last."""
    assert program.structure is not None
    values = program.structure.values
    named, attended = _named(program), list[Term]()
    allowed: list[Term] | None = [] if named else None
    for node in program.graph.nodes:
        terms = values.get(node.name)
        if allowed is not None and terms and node.meta.get("module") in named:
            allowed += terms[0]
        if op_name(node) in ATTENTION and terms:
            call = program.call(node)
            sentence = RULES[op_name(node)].sentence(call)
            for labels, operand in zip(sentence.operands, call.operands, strict=True):
                attended += [t for x, t in zip(labels, values[operand.name][0], strict=True) if x in sentence.whole]
    found: list[Term] = []
    for path in paths:
        before_last: list[Term] = []
        seen: list[Term] = []
        for node in path:
            dims = values.get(node.name, ((),))[0]
            fitting = [t for t in dims[:-1] if size(t) >= max(2, program.degree)]
            fitting = [t for t in fitting if allowed is None or _among(t, allowed)]
            seen += [t for t in fitting if _among(t, attended)]
            before_last += [t for t in fitting if len(dims) > 2 and t is dims[-2]]
        found += [t for t in (seen or before_last)[-1:] if not _among(t, found)]
    return tuple(found)


def _among(term: Term, terms: Sequence[Term]) -> bool:
    return any(same_space(term, other) for other in terms)


def _run_whole(program: Program) -> set[str]:
    """Ops that shall run on all positions although a part would do: a minimum cut.

    Going from spread to whole costs the bytes of a value, once for all its users; and so does going back. One gather
    then serves two norms of one residual (GPT-NeoX), a whole k of multi-query attention is made of what q gathers
    anyway, and no whole head's logits are gathered instead of what they are made of. Among equal cuts the latest is
    taken.
    """
    network: Any = nx.DiGraph()
    network.add_nodes_from((SPREAD, WHOLE))
    free: set[str] = set()
    for node in program.graph.nodes:
        row = program.table.get(node.name)
        if row is None or node.target is operator.getitem or not any(map(is_spread, row.operands)):
            continue
        free.add(node.name)
        for x in program.call(node).operands:
            if "P" in program.table[x.name].settled[0].letters:
                # it is summed here: by a reduce-scatter, or by an all-reduce if the op runs whole
                network.add_edge(SPREAD, node.name, capacity=math.prod(program.shape(x)))
    for node in program.graph.nodes:
        row = program.table.get(node.name)
        if row is None or not any(map(is_spread, row.settled)):
            continue
        maker = str(node.args[0]) if node.target is operator.getitem else node.name
        gate, cost = ("value", node.name), math.prod(program.shape(node)) if len(row.settled) == 1 else 0
        network.add_edge(maker if maker in free else SPREAD, gate, capacity=cost)
        for user in node.users:
            using = program.table.get(user.name)
            if user.name in free:
                network.add_edge(gate, user.name)
                if maker in free:
                    network.add_edge(user.name, maker, capacity=cost)
            elif using is None or using.operands:  # the output, or an op that cannot run on a part
                network.add_edge(gate, WHOLE)
    _, (_, whole) = nx.minimum_cut(network, SPREAD, WHOLE)  # the smaller of the sinks' sides: the latest cut
    return {name for name in whole if name in free}


__all__ = ["sequence_parallel"]
