"""Fewer layers, to count the work of many: a run of alike layers costs what one of them costs, times their number.

``runs`` finds layers that follow one another, are alike in code, shapes and placements (or alternate with a period),
and hand their values to the next one alone. ``shortened`` leaves all but the first of them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from tpcompile.layers import Segment, layer_graph, repeated_layers, segments
from tpcompile.program import Program, copy_graph
from tpcompile.recomputation import MARK

LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Run:
    """Calls of layers, ``times`` periods of ``period`` calls; a period costs what every other one costs."""

    calls: tuple[Segment, ...]
    period: int

    @property
    def times(self) -> int:
        """How many periods there are."""
        return len(self.calls) // self.period


def runs(program: Program) -> tuple[Run, ...]:
    """The runs of at least three periods, in program order."""
    calls = [s for s in segments(program.graph, repeated_layers(program.captured.module_classes)) if s.path is not None]
    home = {node: i for i, call in enumerate(calls) for node in call.nodes}
    keys = [_key(call, i, home) for i, call in enumerate(calls)]
    found: list[Run] = []
    start = 0
    while start < len(calls):
        length, period = max(((_alike(keys, start, p), -p) for p in range(1, LONGEST_PERIOD + 1)), default=(0, -1))
        run = Run(tuple(calls[start : start + length]), -period)
        if run.times >= 3 and shortened(program, ((run, 1),)) is not None:
            found.append(run)
            start += length
        else:
            start += 1
    return tuple(found)


def shortened(program: Program, keep: Sequence[tuple[Run, int]]) -> Program | None:
    """The program with so many periods of each run; None where something else reads what would be left out."""
    module, graph = copy_graph(program.graph_module)
    same = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    for run, periods in keep:
        kept, last = run.calls[periods * run.period - 1], run.calls[-1]
        dropped = {node for call in run.calls[periods * run.period :] for node in call.nodes}
        if not dropped:
            continue
        outputs = (layer_graph(kept)[2], layer_graph(last)[2])
        if any(u not in dropped and n not in outputs[1] for n in dropped for u in n.users):
            return None
        for before, after in zip(*outputs, strict=True):
            same[after].replace_all_uses_with(same[before])
        for node in reversed(program.graph.nodes):
            if node in dropped:
                if same[node].users:
                    return None
                graph.erase_node(same[node])
    module.recompile()
    return program.with_(graph_module=module)


def _key(call: Segment, index: int, home: Mapping[torch.fx.Node, int]) -> str:
    """What alike calls have in common: code, shapes, and what they read of others (a mask that all of them share)."""
    graph, passed, _ = layer_graph(call)
    made = [f"{n.format_node()} {_described(n)} {MARK in n.meta}" for n in graph.nodes if n.op == "call_function"]
    parameters = [_described(x) for n in call.nodes for x in n.all_input_nodes if x.op == "get_attr"]
    read: list[str] = []
    for node in passed:
        shared = len({home.get(user, -1) for user in node.users}) > 1
        origin = str(index - home[node]) if node in home else node.name if shared else "its own"
        read.append(f"{origin} {_described(node)}")
    return "\n".join([*made, *parameters, *read])


def _described(node: torch.fx.Node) -> str:
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    shapes = [f"{x.dtype}{tuple(x.shape)}" if isinstance(x, torch.Tensor) else str(x) for x in tensors]
    return f"{shapes} {node.meta.get('placement')}"


def _alike(keys: Sequence[str], start: int, period: int) -> int:
    """How many calls from ``start`` on repeat with ``period``, in whole periods; 0 if the first does not."""
    end = start + period
    while end < len(keys) and keys[end] == keys[end - period]:
        end += 1
    length = (end - start) // period * period
    return length if length > period else 0


__all__ = ["Run", "runs", "shortened"]
