"""Emission: the table becomes code. One rank's graph of plain tensors, local sizes and explicit transitions.

Every transition is made once per value and target state (so Q, K and V share one backward all-reduce) and carries the
module it serves. Arguments that differ between ranks are :class:`~tpcompile.per_rank.PerRank`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx

from tpcompile import collectives, kernels
from tpcompile.aliasing import aliases, holders, is_inplace
from tpcompile.errors import ShardingError
from tpcompile.layout import (
    Layout,
    LayoutError,
    Owned,
    Product,
    Spread,
    axes_of,
    drop,
    local_size,
    positions,
    product,
    relative_runs,
    runs,
    same,
    size,
    whole_segments,
)  # fmt: skip
from tpcompile.localize import LocalCall, per_rank
from tpcompile.passes.place import needs_grad
from tpcompile.placement import Placement, cut_as, uncut
from tpcompile.program import Program, Row, module_of, where
from tpcompile.rules import RULES, op_name

_NAMES = "linear mm addmm bmm layer_norm rms_norm embedding contiguous native_layer_norm"
ORDERLY = frozenset(f"aten.{name}.default" for name in _NAMES.split()) | {"aten.softmax.int", "aten.log_softmax.int"}
"""Ops whose result lies in memory in the order of its dims, whatever its operands do."""
DISORDERLY = frozenset(f"aten.{name}.default" for name in ("einsum", "tensordot", "matmul", "inner"))


def emit(program: Program) -> Program:
    """Replace the graph by one rank's code. ``meta`` of a new node: ``placement``, ``origin`` (the old node's name)."""
    return _Emitter(program).run()


class _Emitter:
    def __init__(self, program: Program):
        self.program = program
        self.mesh = program.mesh
        self.graph = torch.fx.Graph()
        self.grads = needs_grad(program)
        self.env: dict[torch.fx.Node, torch.fx.Node] = {}
        self.made: dict[tuple[torch.fx.Node, Placement], torch.fx.Node] = {}
        self.lengths: dict[Any, torch.fx.Node] = {}  # of dims whose size is known only when the program runs
        self.unlike: set[torch.fx.Node] = set()  # "the same on all ranks" but for rounding

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            before = next(iter(reversed(self.graph.nodes)), None)
            if node.op == "output":
                self._output(node)
                continue
            self.env[node] = made = self._node(node)
            self._describe(node, before)
            row = self.program.table.get(node.name)
            if row is not None and self._rounds_differently(node, row):
                self.unlike.add(node)
            if row is not None and len(row.settled) == 1:
                self._birth(node, made, row)
            if node.op == "call_function" and is_inplace(node):
                self._forget(node)
        module = module_of(self.program.graph_module, self.graph)
        return self.program.with_(graph_module=module, emitted=True)

    # ------------------------------------------------------------------------------------------------ one node
    def _node(self, node: torch.fx.Node) -> torch.fx.Node:
        if node.op != "call_function":
            return self.graph.node_copy(node, lambda n: self.env[n])
        row = self.program.table.get(node.name)
        if node.target is operator.getitem or row is None:
            made = self.graph.node_copy(node, lambda n: self.env[n])
            return self._whole_size(node, made) if op_name(node) == "aten.sym_size.int" else made
        call = self.program.call(node)
        operands = iter([self.place(x, want, node) for x, want in zip(call.operands, row.operands, strict=True)])
        args, kwargs = self._substitute(node, operands)
        rule = RULES.get(op_name(node))
        here = any(axes_of(d) for p in (*row.operands, *row.results) for d in p.dims)
        if rule is None or not (here or (rule.random and self._may_lie_otherwise(node))):
            return self._call(node, node.target, args, kwargs)
        local = LocalCall(
            call, rule.sentence(call), row.operands, row.results, self.mesh, self.graph, args, kwargs, node.target,
            tuple(self.program.captured.hints.values()), self._whole_length,
        )  # fmt: skip
        try:
            if rule.kernel is not None and (made := rule.kernel(local)) is not None:
                return made
            if rule.localize is not None:
                rule.localize(local)
        except LayoutError as error:
            raise ShardingError(
                f"{op_name(node)} cannot run on one rank's part of its operand",
                where=where(node),
                why=str(error),
                help="cut another axis, `replicate` the block, or let the model keep the cut dim apart from the batch",
            ) from error
        return self._call(node, local.target, local.args, local.kwargs)

    def _may_lie_otherwise(self, node: torch.fx.Node) -> bool:
        """Whether a whole value may have its dims in another order in memory than on one device: random numbers are
        drawn in that order, and what einsum makes depends on sizes, which are local before it."""
        pending, seen = [*node.all_input_nodes], set[torch.fx.Node]()
        while pending:
            found = pending.pop()
            row = self.program.table.get(found.name)
            if found in seen or row is None or op_name(found) in ORDERLY:
                continue
            seen.add(found)
            if op_name(found) in DISORDERLY and any(axes_of(d) for p in row.operands for d in p.dims):
                return True
            pending += found.all_input_nodes
        return False

    def _call(self, node: torch.fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.fx.Node:
        return self.graph.create_node("call_function", target, tuple(args), kwargs, name=node.name)

    def _substitute(self, node: torch.fx.Node, operands: Iterable[torch.fx.Node]) -> tuple[list[Any], dict[str, Any]]:
        remaining = iter(operands)

        def visit(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [visit(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
            if isinstance(value, torch.fx.Node):
                return next(remaining) if isinstance(value.meta.get("val"), torch.Tensor) else self.env[value]
            return value

        return [visit(x) for x in node.args], {k: visit(x) for k, x in node.kwargs.items()}

    def _whole_size(self, node: torch.fx.Node, made: torch.fx.Node) -> torch.fx.Node:
        """``size`` of a cut dim, back to the whole: scalars stay global."""
        source, dim = node.args
        layout = self.program.table[source.name].settled[0].dims[dim]  # type: ignore[union-attr, index]
        if not axes_of(layout):
            return made
        if isinstance(layout, Spread):
            self.graph.erase_node(made)
            return self._whole_length(source, dim)  # type: ignore[arg-type]
        mine = [local_size(layout, self.mesh, r) for r in range(self.mesh.degree)]
        whole = size(layout)
        common = [int(np.gcd(n, whole)) for n in mine]
        unit = self.graph.call_function(
            operator.floordiv, (made, per_rank([n // c for n, c in zip(mine, common, strict=True)]))
        )
        return self.graph.call_function(operator.mul, (unit, per_rank([whole // c for c in common])))

    def _whole_length(self, value: torch.fx.Node, dim: int) -> Any:
        """The whole length of a dim: a number, or that of a value with the same dim of which nothing is cut."""
        length = value.meta["val"].shape[dim]
        if isinstance(length, int):
            return length
        expression = length.node.expr
        if expression in self.lengths:
            return self.lengths[expression]
        for source, made in self.env.items():
            found = source.meta.get("val")
            if isinstance(found, torch.SymInt) and found.node.expr == expression:
                return self.lengths.setdefault(expression, made)
        for source, made in self.env.items():
            found, row = source.meta.get("val"), self.program.table.get(source.name)
            if not isinstance(found, torch.Tensor) or row is None or source.name not in self.program.table:
                continue
            for d, n in enumerate(found.shape):
                if isinstance(n, torch.SymInt) and n.node.expr == expression and not axes_of(row.settled[0].dims[d]):
                    size_of = self.graph.call_function(torch.ops.aten.sym_size.int, (made, d))
                    size_of.meta = {"val": n, "origin": ""}
                    return self.lengths.setdefault(expression, size_of)
        raise LayoutError(f"the length {expression} is known only when the program runs")

    def _describe(self, node: torch.fx.Node, before: torch.fx.Node | None) -> None:
        """Give every node made for ``node`` its metadata, and the last of them its placement."""
        row = self.program.table.get(node.name)
        placed = row is None
        for made in reversed(self.graph.nodes):
            if made is before:
                break
            if "origin" in made.meta:
                continue
            made.meta = {k: v for k, v in node.meta.items() if k != "tensor_meta"} | {"origin": node.name}
            if row is not None and not placed:
                placed = True
                made.meta["placement"] = row.results[0] if len(row.results) == 1 else row.results
                made.meta["reason"] = row.reason

    def _birth(self, node: torch.fx.Node, made: torch.fx.Node, row: Row) -> None:
        """What happens to a value as soon as it exists: segments held whole get f, partial sums their all-reduce."""
        if node.op == "get_attr" and node.name in self.grads:
            for dim, layout in enumerate(row.results[0].dims):
                for axis in sorted(axes_of(layout)):
                    if whole_segments(layout, axis):
                        made = self._copy_segments(node, made, dim, layout, axis)
        self.made[node, row.results[0]] = made
        if row.results[0] != row.settled[0]:
            made = self.place(node, row.settled[0], node)
        self.env[node] = made

    def _rounds_differently(self, node: torch.fx.Node, row: Row) -> bool:
        """Whether ranks compute a value that all of them hold beside parts of unlike sizes, in one product: its last
        bits may differ, which is harmless until it leaves the region where gradients are partial."""
        shared = any("H" in placed.letters for placed in row.results)
        apart = any(
            whole_segments(d, a) and len({local_size(d, self.mesh, r) for r in range(self.mesh.degree)}) > 1
            for placed in (*row.operands, *row.results)
            for d in placed.dims
            for a in axes_of(d)
        )
        return apart or (shared and any(x in self.unlike for x in node.all_input_nodes))

    def _forget(self, node: torch.fx.Node) -> None:
        """What was made of the values that an in-place op writes to is not what they are any more."""
        written = aliases(node, holders(self.program.graph))
        states = {x: self.program.table[x.name].settled for x in written if x.name in self.program.table}
        self.made = {key: made for key, made in self.made.items() if key[0] not in written or key[1] in states[key[0]]}

    def _copy_segments(
        self, node: torch.fx.Node, made: torch.fx.Node, dim: int, layout: Layout, axis: int
    ) -> torch.fx.Node:
        """f on the segments of a parameter that every rank along ``axis`` holds."""
        found: list[tuple[tuple[int, int], ...]] = []
        for rank in range(self.mesh.degree):
            group = next(g for g in self.mesh.groups([axis]) if rank in g)
            mine = positions(layout, self.mesh, rank)
            shared = mine
            for other in group:
                shared = np.intersect1d(shared, positions(layout, self.mesh, other))
            at = np.searchsorted(mine, shared)
            pieces = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
            found.append(tuple((int(p[0]), len(p)) for p in pieces if len(p)))
        new = self.graph.call_function(
            collectives.copy_segments, (made, dim, per_rank(found), self.mesh.group_name([axis]))
        )
        self._annotate(new, node, self.program.table[node.name].results[0], node)
        return new

    # ------------------------------------------------------------------------------------------------ transitions
    def place(self, node: torch.fx.Node, want: Placement, user: torch.fx.Node) -> torch.fx.Node:
        """The value of ``node`` in the state ``want``, through as few transitions as possible, each made once."""
        have = self.program.table[node.name].settled[0]
        if (node, have) not in self.made:
            have = self.program.table[node.name].results[0]  # while settling
        if node.name not in self.grads:  # without a gradient H and R are one state
            want = want.with_letters(
                [h if {h, w} == {"R", "H"} else w for h, w in zip(have.letters, want.letters, strict=True)]
            )
        current = have
        for step in self._steps(node, have, want):
            if (node, step) not in self.made:
                self.made[node, step] = self._transition(node, current, step, user)
            current = step
        return self.made[node, current]

    def _steps(self, node: torch.fx.Node, have: Placement, want: Placement) -> list[Placement]:
        """Intermediate states, each one transition from the last."""
        steps: list[Placement] = []
        current = have

        def go(axes: Iterable[int], letter: str, dims: tuple[Layout, ...] | None = None) -> None:
            nonlocal current
            chosen = set(axes)
            if not chosen:
                return
            letters = [letter if a in chosen else x for a, x in enumerate(current.letters)]
            current = Placement(tuple(letters), dims if dims is not None else current.dims)
            steps.append(current)

        def axes(source: str, target: str) -> list[int]:
            return [a for a in self.mesh.axes if current.letters[a] == source and want.letters[a] == target]

        def by_dim(found: list[int], dims: Sequence[Layout]) -> list[tuple[int, list[int]]]:
            return [(d, [a for a in found if a in axes_of(x)]) for d, x in enumerate(dims) if set(found) & axes_of(x)]

        # axes that newly cut one dim go together; segments that stay whole are cut locally, behind f
        new = [{a for a in axes_of(x) if have.letters[a] != "S"} for x in want.dims]
        mixed = {
            a
            for x, over in zip(want.dims, new, strict=True)
            for a in over
            if isinstance(x, Owned) or any(whole_segments(x, b) for b in over)
        }
        alone = {a for over in new if all(have.letters[b] == "P" for b in over) for a in over - mixed}
        for dim, over in by_dim([a for a in axes("P", "S") if a in alone], want.dims):
            go(over, "S", _with_dim(current.dims, dim, _only(want.dims[dim], axes_of(current.dims[dim]) | set(over))))
        go([*axes("P", "R"), *axes("P", "H"), *axes("P", "S")], "R")
        for dim, layout in enumerate(current.dims):  # what several axes cut as one is gathered over all of them
            if isinstance(layout, Spread) and len({want.letters[a] for a in layout.axes}) > 1:
                go(layout.axes, "R", _with_dim(current.dims, dim, drop(layout, layout.axes)))
        for target in "RHP":
            for dim, over in by_dim(axes("S", target), current.dims):
                go(over, "R" if target == "P" else target, _with_dim(current.dims, dim, drop(current.dims[dim], over)))
        go(axes("H", "R") + axes("H", "P"), "R")
        behind = set(axes("R", "H")) | (mixed if node.name in self.grads else set())
        for over in new:  # an f that exists already makes the cut free
            if any(current.letters[a] == "H" or (node, _letter(current, a, "H")) in self.made for a in over):
                behind |= over
        go([a for a in self.mesh.axes if a in behind and current.letters[a] == "R"], "H")
        for source in "RH":
            for dim, over in by_dim(axes(source, "S"), want.dims):
                go(
                    over,
                    "S",
                    _with_dim(current.dims, dim, _only(want.dims[dim], axes_of(current.dims[dim]) | set(over))),
                )
        go(axes("R", "P"), "P")
        cut = [(a, b) for a, b in zip(current.dims, want.dims, strict=True) if axes_of(a) | axes_of(b)]
        arrived = all(same(a, b, self.mesh) for a, b in cut)
        if current.letters != want.letters or not arrived:
            raise AssertionError(f"no way from {have} to {want} for {node.name}")
        return steps

    def _transition(self, node: torch.fx.Node, have: Placement, want: Placement, user: torch.fx.Node) -> torch.fx.Node:
        changed = [a for a in self.mesh.axes if have.letters[a] != want.letters[a]]
        source, target = have.letters[changed[0]], want.letters[changed[0]]
        x, group = self.made[node, have], self.mesh.group_name(changed)
        has_grad = node.name in self.grads
        if source == "S":
            dim = next(d for d, (a, b) in enumerate(zip(have.dims, want.dims, strict=True)) if a != b)
            if isinstance(have.dims[dim], Owned) or any(whole_segments(have.dims[dim], a) for a in changed):
                raise ShardingError(
                    f"a value cut as {have.dims[dim]} would have to be gathered",
                    where=where(user),
                    why="only the data know which rows a rank holds"
                    if isinstance(have.dims[dim], Owned)
                    else "some of its segments are cut and others are held whole",
                    help="cut another axis, or `replicate` the block",
                )
            function = collectives.gather if target == "R" else collectives.all_gather
            made = self._along(function, x, node, dim, have, want, changed, user)
        elif target == "S":
            dim = next(d for d, (a, b) in enumerate(zip(have.dims, want.dims, strict=True)) if a != b)
            if isinstance(rows := want.dims[dim], Owned):
                ends = self.env[next(n for n in self.program.graph.nodes if n.name == rows.ends)]
                held = [runs(rows.experts, self.mesh.sizes, self.mesh.coordinates(r)) for r in range(self.mesh.degree)]
                made = self.graph.call_function(kernels.keep_rows, (x, dim, ends, per_rank(held)))
            elif any(whole_segments(want.dims[dim], a) for a in changed):
                held = [relative_runs(want.dims[dim], have.dims[dim], self.mesh, r) for r in range(self.mesh.degree)]
                made = self.graph.call_function(kernels.take, (x, dim, per_rank(held)))
            else:
                function = {"P": collectives.reduce_scatter, "R": collectives.scatter, "H": collectives.cut}[source]
                if source == "R" and not has_grad:
                    function = collectives.cut
                made = self._along(function, x, node, dim, have, want, changed, user)
        else:
            function = {
                ("P", "R"): collectives.all_reduce,
                ("R", "H"): collectives.copy,
                ("R", "P"): collectives.once,
                ("H", "R"): collectives.leave,
            }[source, target]
            made = self.graph.call_function(function, (x, group))
            if function is collectives.leave and node in self.unlike:  # the first rank's value for everybody
                self._annotate(made, node, want, user)
                first = self.graph.call_function(collectives.once, (made, group))
                self._annotate(first, node, _letters(want, changed, "P"), user)
                made = self.graph.call_function(collectives.all_reduce, (first, group))
        self._annotate(made, node, want, node if source == "P" else user)
        return made

    def _along(
        self,
        function: Any,
        x: torch.fx.Node,
        node: torch.fx.Node,
        dim: int,
        have: Placement,
        want: Placement,
        axes: Sequence[int],
        user: torch.fx.Node,
    ) -> torch.fx.Node:
        """A transition that takes a dim apart or puts it together. Of a dim of a size that is known only when the
        program runs (a batch merged with what is cut), the cut part is made a dim of its own meanwhile."""
        now = have.dims[dim]
        cut, whole = (now, want.dims[dim]) if axes_of(now) & set(axes) else (want.dims[dim], now)
        group = self.mesh.group_name(axes)
        if isinstance(node.meta["val"].shape[dim], int):
            return self.graph.call_function(function, (x, dim, self._parts(cut, whole, axes), group))
        if isinstance(cut, Spread):
            return self.graph.call_function(function, (x, dim, self._whole_length(node, dim), group))
        factors = cut.factors if isinstance(cut, Product) else (cut,)
        moved = [i for i, f in enumerate(factors) if axes_of(f) & set(axes)]
        first, last = moved[0], moved[-1] + 1
        inside = product(factors[first:last])
        around = [product(factors[:first]), product(factors[last:])]
        hints = self.program.captured.hints.values()
        unknown = [any(size(f) % hint == 0 for hint in hints) for f in (around[0], inside, around[1])]
        if sum(unknown) != 1 or unknown[1]:
            raise ShardingError(
                f"a value cut as {cut} would have to be gathered",
                where=where(user),
                why="the size of the dim is known only when the program runs",
                help="cut another axis, `replicate` the block, or return the value before its dims are merged",
            )
        wholly, now_inside = drop(inside, axes), inside if now is cut else drop(inside, axes)
        held = [
            per_rank([local_size(f, self.mesh, r) for r in range(self.mesh.degree)])
            for f in (around[0], now_inside, around[1])
        ]
        sizes = [-1 if open_ else n for open_, n in zip(unknown, held, strict=True)]
        opened = self.graph.call_function(torch.ops.aten.unflatten.int, (x, dim, sizes))
        made = self.graph.call_function(function, (opened, dim + 1, self._parts(inside, wholly, axes), group))
        value = node.meta["val"]
        with torch.no_grad():
            value = value.unflatten(
                dim, [-1 if o else size(f) for o, f in zip(unknown, (around[0], inside, around[1]), strict=True)]
            )
        for new, placed, f in ((opened, have, now_inside), (made, want, wholly if now is cut else inside)):
            dims = (*placed.dims[:dim], around[0], f, around[1], *placed.dims[dim + 1 :])
            new.meta = {k: v for k, v in user.meta.items() if k in ("module", "modules", "source", "no_grad")}
            new.meta |= {"val": value, "placement": Placement(placed.letters, dims), "origin": "", "user": user.name}
        return self.graph.call_function(torch.ops.aten.flatten.using_ints, (made, dim, dim + 2))

    def _parts(self, cut: Layout, whole: Layout, axes: Sequence[int]) -> Any:
        """Runs that each member of the group holds, in coordinates of the gathered dim."""
        found: list[Any] = []
        groups = self.mesh.groups(axes)
        for rank in range(self.mesh.degree):
            group = next(g for g in groups if rank in g)
            found.append(tuple(relative_runs(cut, whole, self.mesh, m) for m in group))
        return per_rank(found)

    def _annotate(self, made: torch.fx.Node, value: torch.fx.Node, placed: Placement, user: torch.fx.Node) -> None:
        made.meta = {k: v for k, v in user.meta.items() if k in ("module", "modules", "source", "no_grad")}
        made.meta |= {"val": value.meta["val"], "placement": placed, "origin": value.name, "user": user.name}

    def _output(self, node: torch.fx.Node) -> None:
        """Outputs are gathered, but for what stays where it is: tensors of caches, and logits if that is asked for."""

        def leave(index: int, value: Any) -> Any:
            if isinstance(value, torch.fx.Node) and value.name in self.program.table:
                want = uncut(self.program.shape(value), self.mesh)
                have = self.program.table[value.name].settled[0]
                last = have.dims[-1:]
                cut = [d for d in last if axes_of(d) and not isinstance(d, Spread)]
                if index in self.program.resident and all(self._stays(d) for d in have.dims):
                    want = cut_as(have.dims, self.mesh)
                elif cut and not self.program.options.gather_logits:
                    want = cut_as((*want.dims[:-1], *last), self.mesh)
                return self.place(value, want, value)
            return self.env[value] if isinstance(value, torch.fx.Node) else value

        outputs: Any = node.args[0]
        self.graph.output(tuple(leave(i, x) for i, x in enumerate(outputs)))

    def _stays(self, layout: Layout) -> bool:
        """Whether a dim is whole, or cut alike whatever the sizes of a call."""
        return not axes_of(layout) or not any(size(layout) % hint == 0 for hint in self.program.captured.hints.values())


def _with_dim(dims: tuple[Layout, ...], dim: int, layout: Layout) -> tuple[Layout, ...]:
    return (*dims[:dim], layout, *dims[dim + 1 :])


def _only(layout: Layout, axes: Iterable[int]) -> Layout:
    """The layout with only these axes cut."""
    return drop(layout, axes_of(layout) - frozenset(axes))


def _letter(placement: Placement, axis: int, letter: str) -> Placement:
    return _letters(placement, (axis,), letter)


def _letters(placement: Placement, axes: Sequence[int], letter: str) -> Placement:
    return placement.with_letters([letter if a in axes else x for a, x in enumerate(placement.letters)])


__all__ = ["emit"]
