"""One call on one rank: how its arguments become local. The emitter builds a :class:`LocalCall` per cut call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

import torch
import torch.fx

from tpcompile import kernels
from tpcompile.layout import Layout, LayoutError, Mesh, Product, Runs, Spread, axes_of, local_size, product, runs, size
from tpcompile.per_rank import PerRank
from tpcompile.placement import Placement
from tpcompile.sentence import Call, Sentence


def per_rank(values: list[Any]) -> Any:
    """The value itself where all ranks agree, else a :class:`PerRank`."""
    return values[0] if all(v == values[0] for v in values) else PerRank(tuple(values))


def known_part(node: torch.fx.Node) -> tuple[int, int, int] | None:
    """``(dim, start, end)`` of a slice, where its bounds are known and every rank holds the dim whole; else None."""
    given: Any = node.args
    x, dim, start, end, step = cast("tuple[Any, ...]", (*given, *(0, 0, None, None, 1)[len(given) :]))
    value, placed = x.meta.get("val"), x.meta.get("placement")
    if node.kwargs or step != 1 or value is None or placed is None or axes_of(placed.dims[dim]):
        return None
    length, start = value.shape[dim], start or 0
    if not all(isinstance(n, int) for n in (length, start, end)) or not 0 <= start <= min(length, end):
        return None
    return dim % value.dim(), start, min(length, end)


def _unknown(value: torch.fx.Node, dim: int) -> Any:
    raise LayoutError(f"the length of dim {dim} of {value} is known only when the program runs")


@dataclass
class LocalCall:
    """A call being emitted: its sentence, the placements of operands (as wanted) and results, and the new arguments."""

    call: Call
    sentence: Sentence
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    mesh: Mesh
    graph: torch.fx.Graph
    args: list[Any]
    kwargs: dict[str, Any]
    target: Any
    hints: tuple[int, ...] = ()  # factors of the sizes that are known only when the program runs
    whole_length: Callable[[torch.fx.Node, int], Any] = field(default=_unknown)  # of a dim of a value of the old graph

    def _index(self, name: str) -> int:
        arguments = self.target._schema.arguments
        return next(i for i, a in enumerate(arguments) if a.name == name)

    def current(self, name: str) -> Any:
        """The new value of argument ``name``."""
        if name in self.kwargs:
            return self.kwargs[name]
        index = self._index(name)
        return self.args[index] if index < len(self.args) else self.target._schema.arguments[index].default_value

    def set(self, name: str, value: Any) -> None:
        """Give argument ``name`` a new value."""
        index = self._index(name)
        if name in self.kwargs or index >= len(self.args):
            self.kwargs[name] = value
        else:
            self.args[index] = value

    def replace(self, op: str, args: tuple[Any, ...]) -> None:
        """Call another overload (``aten.name.overload``) instead."""
        _, name, overload = op.split(".")
        self.target, self.args, self.kwargs = getattr(getattr(torch.ops.aten, name), overload), list(args), {}

    def emit(self, target: Any, args: tuple[Any, ...]) -> torch.fx.Node:
        """A new node in the rewritten graph."""
        return self.graph.call_function(target, args)

    def emit_op(self) -> torch.fx.Node:
        """The call itself with its new arguments."""
        return self.graph.call_function(self.target, tuple(self.args), self.kwargs)

    def ranks(self) -> range:
        """All ranks of the mesh."""
        return range(self.mesh.degree)

    def size(self, value: Any, layout: Layout) -> Any:
        """A size argument for a dim of ``layout``: local int, or arithmetic on the symbolic size; -1 stays."""
        if not axes_of(layout) or (isinstance(value, int) and value == -1):
            return value
        if isinstance(value, int):
            return self.length(layout)
        if isinstance(layout, Spread):
            return self.part_of(value)
        locals_ = [local_size(layout, self.mesh, r) for r in self.ranks()]
        shares = [Fraction(n, size(layout)) for n in locals_]
        whole = math.lcm(*(s.denominator for s in shares))
        unit = self.graph.call_function(operator.floordiv, (value, whole))
        times = per_rank([int(s * whole) for s in shares])
        return unit if times == 1 else self.graph.call_function(operator.mul, (unit, times))

    def part_of(self, length: Any) -> Any:
        """How many of ``length`` positions, known only when the program runs, a rank holds of a balanced cut."""
        ranks = self.mesh.degree
        rounded = self.graph.call_function(operator.add, (length, per_rank([ranks - 1 - r for r in self.ranks()])))
        return self.graph.call_function(operator.floordiv, (rounded, ranks))

    def _fixed(self, layout: Layout) -> Layout:
        """The layout, if its size is known now.

        Raises:
            LayoutError: positions of a dim cannot be listed whose size is known only when the program runs.
        """
        if any(size(layout) % hint == 0 for hint in self.hints):
            raise LayoutError(f"the size of a dim cut as {layout} is known only when the program runs")
        return layout

    def offset(self, layout: Layout, at: int) -> Any:
        """How many of the first ``at`` positions a rank holds."""
        return per_rank([sum(max(0, min(s + n, at) - s) for s, n in held) for held in self._runs(layout)])

    def _runs(self, layout: Layout) -> list[Runs]:
        sizes = self.mesh.sizes
        return [runs(self._fixed(layout), sizes, self.mesh.coordinates(r)) for r in self.ranks()]

    def held(self, layout: Layout) -> Any:
        """The runs that a rank holds."""
        return per_rank(self._runs(layout))

    def length(self, layout: Layout) -> Any:
        """How many positions a rank holds."""
        return per_rank([local_size(self._fixed(layout), self.mesh, r) for r in self.ranks()])

    def summed_axes(self) -> frozenset[int]:
        """Mesh axes over which a summed label of operand 0 is cut."""
        kept = {x for labels in self.sentence.results for x in labels}
        cut = [
            axes_of(d) for x, d in zip(self.sentence.operands[0], self.operands[0].dims, strict=True) if x not in kept
        ]
        return frozenset[int]().union(*cut)

    def held_share(self) -> Any:
        """Share of the summed positions that a rank holds (per rank), or None when no summed axis is cut."""
        kept = {x for labels in self.sentence.results for x in labels}
        shares = [Fraction(1)] * self.mesh.degree
        found = False
        for label, layout in zip(self.sentence.operands[0], self.operands[0].dims, strict=True):
            if label is not None and label not in kept and axes_of(layout):
                found = True
                layout = self._fixed(layout) if isinstance(layout, Spread) else layout
                for r in self.ranks():
                    shares[r] *= Fraction(local_size(layout, self.mesh, r), size(layout))
        return per_rank([float(s) for s in shares]) if found else None

    def cut_dims(self, operand: int) -> tuple[tuple[int, int, Any], ...]:
        """``(dim, period, runs held of every period)`` of every cut dim of an operand.

        The period is the whole dim, or what follows the part of it that is known only when the program runs.
        """
        found: list[tuple[int, int, Any]] = []
        for dim, layout in enumerate(self.operands[operand].dims):
            length = self.call.operands[operand].meta["val"].shape[dim]
            if isinstance(layout, Spread) and not isinstance(length, int):
                whole = self.whole_length(self.call.operands[operand], dim)
                seats = (whole, per_rank(list(self.ranks())), self.mesh.degree)
                found.append((dim, whole, self.graph.call_function(kernels.balanced_part, seats)))
            elif axes_of(layout):
                factors = layout.factors if isinstance(layout, Product) else (layout,)
                first = next(i for i, f in enumerate(factors) if axes_of(f))
                lead = product(factors[:first])
                inner = product(factors[first:]) if any(size(lead) % hint == 0 for hint in self.hints) else layout
                found.append((dim, size(inner), self.held(inner)))
        return tuple(found)
