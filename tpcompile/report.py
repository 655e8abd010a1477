"""What a program does, as rows: every value, every collective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx

from tpcompile import shards
from tpcompile.collectives import transition_of
from tpcompile.per_rank import PerRank, resolve
from tpcompile.program import Program, where
from tpcompile.recomputation import MARK
from tpcompile.rules import op_name
from tpcompile.runs import run_length
from tpcompile.transitions import messages


@dataclass(frozen=True)
class Line:
    """One value of a program: its name, the op, whole shape, dtype, placement, module path and the model's source."""

    name: str
    op: str
    shape: str
    dtype: str
    placement: str
    module: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} = {self.op}  {self.dtype}{self.shape}  {self.placement}  {self.module}".rstrip()


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: ``all_reduce``, ``all_gather`` or ``reduce_scatter``.
        direction: ``forward`` or ``backward``.
        bytes: sent by each rank for one occurrence (ring formulas: 2n(t-1)/t for an all-reduce, n(t-1)/t otherwise).
        count: occurrences per step.
        where: op and source line of the model that it serves.
        shape: shape of the tensor, at the example inputs.
        module: dotted module path.
        of: ``parameters`` when it sums gradients of parameters, else ``activations``.
    """

    kind: str
    direction: str
    bytes: int
    count: int
    where: str
    shape: tuple[int, ...]
    module: str
    of: str


def lines(program: Program) -> tuple[Line, ...]:
    """One line per value, in program order; a parameter stands before its first use."""
    found: list[Line] = []
    for node in _reading_order(program.graph):
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else [value]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        shape = ", ".join("[" + ", ".join(str(n) for n in v.shape) + "]" for v in tensors)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        source = node.meta.get("source")
        place = f"{source.file}:{source.line}" if source is not None else ""
        found.append(
            Line(node.name, _call(node), shape, dtype, _placement(program, node), node.meta.get("module") or "", place)
        )
    return tuple(found)


def _reading_order(graph: torch.fx.Graph) -> Iterator[torch.fx.Node]:
    shown: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and operand not in shown:
                shown.add(operand)
                yield operand
        yield node


def _call(node: torch.fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return str(node.target)
    arguments = [_argument(x) for x in node.args] + [f"{k}={_argument(x)}" for k, x in node.kwargs.items()]
    if node.op == "output":
        return f"return {arguments[0]}"
    return f"{op_name(node).removeprefix('aten.').removesuffix('.default')}({', '.join(arguments)})"


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_argument(x) for x in value)  # pyright: ignore[reportUnknownVariableType]
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, PerRank):
        return "<" + " | ".join(map(str, value.values)) + ">"
    return str(value)


def _placement(program: Program, node: torch.fx.Node) -> str:
    placed = node.meta.get("placement")
    if placed is None and not program.emitted and (row := program.table.get(node.name)) is not None:
        placed = row.settled[0] if len(row.settled) == 1 else row.settled
    if isinstance(placed, tuple):
        return program.mesh.named(", ".join(map(str, placed)))
    return "" if placed is None else program.mesh.named(str(placed))


def text(program: Program) -> str:
    """The program as text, one value a line."""
    return "\n".join(map(str, lines(program)))


def sizes_at(program: Program, inputs: Sequence[torch.Tensor]) -> Mapping[sympy.Symbol, int]:
    """Value of every size symbol for the given input tensors."""
    found: dict[sympy.Symbol, int] = {}
    for given, wanted in zip(inputs, program.captured.inputs, strict=True):
        for n, symbolic in zip(given.shape, wanted.example.shape, strict=True):
            if isinstance(symbolic, torch.SymInt) and isinstance(expression := symbolic.node.expr, sympy.Symbol):
                found[expression] = int(n)
    return found


def collectives_of(program: Program, sizes: Mapping[sympy.Symbol, int]) -> tuple[Collective, ...]:
    """Every collective of an emitted program, in program order, at the given input sizes."""
    return tuple(c for node in program.graph.nodes for c in _messages(program, node, sizes))


def held(program: Program) -> tuple[float, ...]:
    """Per rank, the share of the model's parameter bytes that it holds: unlike where a cut is uneven."""
    total, mine = 0, [0] * program.mesh.degree
    for name, parameter in program.captured.parameters.items():
        dims = program.parameters.get(name)
        total += parameter.numel() * parameter.element_size()
        for rank in range(program.mesh.degree):
            numel = parameter.numel() if dims is None else math.prod(shards.shape(dims, program.mesh, rank))
            mine[rank] += numel * parameter.element_size()
    return tuple(n / max(total, 1) for n in mine)


def held_text(shares: Sequence[float]) -> str:
    """``57% on each rank``, or the extremes of an uneven cut."""
    most, least = max(shares), min(shares)
    if most - least < 0.005:
        return f"{most:.0%} of the bytes on each rank"
    return f"{most:.0%} of the bytes on the fullest rank, {least:.0%} on the emptiest"


def _messages(program: Program, node: torch.fx.Node, sizes: Mapping[sympy.Symbol, int]) -> Iterator[Collective]:
    transition = transition_of(node.target)
    if transition is None:
        return
    group = node.kwargs.get("group", None) or next(a for a in reversed(node.args) if isinstance(a, str))
    ranks = len(program.mesh.all_groups()[str(group)][0])
    first = node.args[0]
    operands: list[Any] = list(first) if isinstance(first, (list, tuple)) else [first]
    shapes = [tuple(_at(n, sizes) for n in x.meta["val"].shape) for x in operands]
    itemsize = operands[0].meta["val"].element_size()
    many = isinstance(first, (list, tuple))
    shapes = [_local(program, x if many else node, s, whole=not many) for x, s in zip(operands, shapes, strict=True)]
    numel = sum(_product(s) for s in shapes)
    if transition.name == "copy_segments":
        dim, runs = int(node.args[1]), resolve(node.args[2], 0)  # type: ignore[arg-type]
        shape = (*shapes[0][:dim], run_length(runs), *shapes[0][dim + 1 :])  # type: ignore[arg-type]
        numel = _product(shape)
    of = "parameters" if all(_is_parameter(x) for x in operands) else "activations"
    place = where(node)
    spot = f"{op_name(node)}" + (f" at {place.file}:{place.line}" if place.file else "")
    module = node.meta.get("module") or ""
    for message in messages(transition, numel, itemsize, ranks):
        yield Collective(message.kind, message.direction, message.bytes, 1, spot, shapes[0], module, of)
        if message.direction == "forward" and MARK in node.meta:
            again = f"{spot} (recomputed)"
            yield Collective(message.kind, "backward", message.bytes, 1, again, shapes[0], module, of)


def _is_parameter(node: torch.fx.Node) -> bool:
    return node.op == "get_attr" or (transition_of(node.target) is not None and all(
        _is_parameter(x) for x in node.all_input_nodes
    ))  # fmt: skip


def _local(program: Program, node: torch.fx.Node, shape: tuple[int, ...], whole: bool) -> tuple[int, ...]:
    """Local shape of the node's value; where ``whole``, the dims that the node itself gathers or cuts stay whole."""
    from tpcompile.layout import axes_of, local_size, size

    placed = node.meta.get("placement")
    if placed is None or isinstance(placed, tuple):
        return shape
    changed = {a for a in program.mesh.axes if whole and _changes(node, placed, a)}
    return tuple(
        n * local_size(d, program.mesh, 0) // size(d) if axes_of(d) and not axes_of(d) & changed else n
        for n, d in zip(shape, placed.dims, strict=True)
    )


def _changes(node: torch.fx.Node, placed: Any, axis: int) -> bool:
    before = node.all_input_nodes[0].meta.get("placement")
    return before is None or isinstance(before, tuple) or before.letters[axis] != placed.letters[axis]


def _at(n: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(n.node.expr.xreplace(sizes)) if isinstance(n, torch.SymInt) else int(n)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
