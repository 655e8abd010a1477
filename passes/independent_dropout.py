"""Dropout in cut regions with a stream of random numbers per part, if the options ask for it: Megatron's way.

The exact way draws the mask of the whole value on every rank, so that it is the mask of one device; here a rank draws
that of its own part alone. The numbers are as good, but they are not those of one device (Megatron-LM, Shoeybi et al.
2019, section 3). Values that ranks hold in common keep one mask for all of them.
"""

from __future__ import annotations

from tpcompile import kernels
from tpcompile.effects import drop_dead
from tpcompile.layout import axes_of
from tpcompile.localize import per_rank
from tpcompile.program import Program, copy_graph


def independent_dropout(program: Program) -> Program:
    """Let ranks draw the masks of their own parts, where ``options.dropout`` is ``independent``."""
    if program.options.dropout == "exact":
        return program
    module, graph = copy_graph(program.graph_module)
    for node in graph.find_nodes(op="call_function", target=kernels.dropout_part):
        cut = sorted(frozenset[int]().union(*map(axes_of, node.meta["placement"].dims)))
        if not cut:
            continue
        parts: dict[tuple[int, ...], int] = {}
        for rank in range(program.mesh.degree):
            coordinates = program.mesh.coordinates(rank)
            parts.setdefault(tuple(coordinates[a] for a in cut), len(parts))
        streams = [parts[tuple(program.mesh.coordinates(rank)[a] for a in cut)] for rank in range(program.mesh.degree)]
        node.target, node.args = kernels.own_dropout, (*node.args[:2], per_rank(streams))
    drop_dead(graph)
    module.recompile()
    return program.with_(graph_module=module)


__all__ = ["independent_dropout"]
