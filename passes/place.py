"""Placement: one forward walk that gives every value a state per mesh axis, or refuses with the place and the reason.

The result is a table (node -> operand states, result states, reason) that emission, reports, ``explain`` and
``verify`` all read. Nothing is ever gathered silently: a cut value that meets an op which needs it whole is an error,
unless the op's parameter is claimed ``replicate``; only the model's own outputs are gathered.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
import torch.fx

from tpcompile.aliasing import Holders, aliases, holders, is_inplace
from tpcompile.errors import ShardingError
from tpcompile.layout import Mesh, Owned, Spread, axes_of, size
from tpcompile.placement import Placement, PlacementError, Solution, cut_as, solve, uncut
from tpcompile.program import Program, Row, where
from tpcompile.rules import ANY_LENGTH, ROW_BY_ROW, RULES, how_to_add, op_name
from tpcompile.sentence import Call
from tpcompile.structure import same_space


def place(program: Program) -> Program:
    """Fill ``program.table``.

    Raises:
        ShardingError: a cut value meets an op that has no rule, or that needs the axis whole.
    """
    table: dict[str, Row] = {}
    grads = needs_grad(program)
    writes = [n for n in program.graph.nodes if n.op == "call_function" and is_inplace(n)]
    held = holders(program.graph) if writes else {}
    shared = {x.name for n in writes for x in aliases(n.args[0], held)}  # no f parts what shares memory that is written
    program = program.with_(early=frozenset((name, axis) for name, axis in program.early if name not in shared))
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and is_inplace(node):
            _refuse_cut_memory(node, table, held)
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            table[node.name] = _input(program, node)
        elif node.op == "get_attr" and isinstance(value, torch.Tensor):
            table[node.name] = _attribute(program, node)
        elif node.op == "call_function" and node.target is operator.getitem:
            source = node.args[0]
            if source.name in table and isinstance(value, torch.Tensor):
                row, index = table[source.name], node.args[1]
                table[node.name] = Row((), (row.results[index],), (row.settled[index],), row.reason)
        elif node.op == "call_function" and isinstance(value, (torch.Tensor, tuple, list)):
            table[node.name] = _settle(program, node, _solve(program, node, table), grads, node.name not in shared)
        elif node.op == "call_function" and not _is_scalar_op(node):
            _refuse_cut_inputs(node, table)
    return program.with_(table=table)


def needs_grad(program: Program) -> frozenset[str]:
    """Names of values through which a gradient may flow (to a parameter or a floating-point input)."""

    def carries(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())

    found: set[str] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        floating = any(map(carries, value)) if isinstance(value, (tuple, list)) else carries(value)
        if not floating or node.meta.get("no_grad") or op_name(node) == "aten.detach.default":
            continue
        if node.op == "placeholder":
            found.add(node.name)
        elif node.op == "get_attr":
            parameter = program.captured.parameters.get(str(node.target))
            if parameter is not None and parameter.requires_grad:
                found.add(node.name)
        elif any(x.name in found for x in node.all_input_nodes):
            found.add(node.name)
    return frozenset(found)


def _given(placement: Placement, reason: str) -> Row:
    return Row((), (placement,), (placement,), reason)


def _input(program: Program, node: torch.fx.Node) -> Row:
    placed = uncut(program.shape(node), program.mesh)
    if held := program.held.get(node.name):
        placed = cut_as([held.get(d, whole) for d, whole in enumerate(placed.dims)], program.mesh)
        return _given(placed, "a cache: every rank holds its own part")
    return _given(placed, "an input: the same on every rank")


def _attribute(program: Program, node: torch.fx.Node) -> Row:
    name = str(node.target)
    dims = program.parameters.get(name)
    if dims is None:
        return _given(uncut(program.shape(node), program.mesh), "a buffer or constant: the same on every rank")
    cuts = [f"dim {d} as {x}" for d, x in enumerate(dims) if axes_of(x)]
    return _given(cut_as(dims, program.mesh), f"a parameter, cut along {', '.join(cuts)}" if cuts else "a parameter")


def _is_scalar_op(node: torch.fx.Node) -> bool:
    return op_name(node).startswith("aten.sym_") or not any(
        isinstance(x.meta.get("val"), torch.Tensor) for x in node.all_input_nodes
    )


def _refuse_cut_inputs(node: torch.fx.Node, table: dict[str, Row]) -> None:
    for operand in node.all_input_nodes:
        row = table.get(operand.name)
        if row is not None and not set(row.settled[0].letters) <= {"R", "H"}:
            raise _no_rule(node)


def _refuse_cut_memory(node: torch.fx.Node, table: dict[str, Row], held: Holders) -> None:
    """What is left of writes: into memory that no cut or partial value may share."""
    family = aliases(node.args[0], held)  # type: ignore[arg-type]
    rows = [table[x.name] for x in family if x.name in table and x < node]
    if any(set(p.letters) & {"S", "P"} for row in rows for p in (*row.results, *row.settled)):
        raise ShardingError(
            f"{op_name(node)} writes into a cut value that is read again",
            where=where(node),
            why="an in-place op on memory that other values may share cannot be cut safely",
            help="write the line without the in-place form, or `replicate` the block",
        )


def _no_rule(node: torch.fx.Node) -> ShardingError:
    return ShardingError(
        f"a cut value reaches {op_name(node)}, which has no rule",
        where=where(node),
        why="what the op does to a cut axis is not known, and a guess could be silently wrong",
        help=f"{how_to_add(op_name(node))}, or `replicate` the block",
    )


def _solve(program: Program, node: torch.fx.Node, table: dict[str, Row]) -> Solution:
    """Placement of one op. Spread operands stay spread if the op can run on a part of the positions; else they are
    gathered."""
    call = program.call(node)
    ins = [table[x.name].settled[0] for x in call.operands]
    if not any(map(is_spread, ins)):
        return _solve_call(program, node, call, ins)
    if op_name(node) in RULES and node.name not in program.whole_ops:
        with contextlib.suppress(ShardingError):
            found = _solve_call(program, node, call, ins)
            if runs_spread(program, node, found):
                return found
    return _solve_call(program, node, call, [gathered(p, program.mesh) for p in ins])


def is_spread(placed: Placement) -> bool:
    """Whether a value's positions are spread over the ranks (sequence parallelism)."""
    return any(isinstance(d, Spread) for d in placed.dims)


def gathered(placed: Placement, mesh: Mesh) -> Placement:
    """The same with spread positions made whole."""
    return uncut([size(d) for d in placed.dims], mesh) if is_spread(placed) else placed


def runs_spread(program: Program, node: torch.fx.Node, found: Solution) -> bool:
    """Whether spread positions are all that is cut, they stay one dim or are summed, and every argument that becomes
    local can be computed when the length is known only at run time."""
    cut = [d for p in (*found.operands, *found.results) for d in p.dims if axes_of(d)]
    if not all(isinstance(d, Spread) for d in cut):
        return False
    rule = RULES[op_name(node)]
    fixed = not any(size(d) % hint == 0 for d in cut for hint in program.captured.hints.values())
    if fixed or (rule.kernel is None and rule.localize is None):
        return True
    return op_name(node) in ANY_LENGTH and all(is_spread(p) for p in found.results)


def _solve_call(program: Program, node: torch.fx.Node, call: Call, ins: list[Placement]) -> Solution:
    early = frozenset(a for name, a in program.early if name == node.name)
    if any(x.op == "get_attr" and x.target in program.whole for x in call.operands) and any(
        set(p.letters) - {"R", "H"} for p in ins if not is_spread(p)
    ):
        # `replicate`: the op runs whole, its cut operands are gathered
        whole = tuple(uncut(s, program.mesh) for s in call.shapes)
        results = tuple(uncut(s, program.mesh) for s in call.results)
        return Solution(whole, results, "its parameter is kept whole by the spec: operands are gathered")
    rule = RULES.get(op_name(node))
    cut = any(set(p.letters) & {"S", "P"} for p in ins)
    if rule is None and not cut:
        return _replicated(program, call.shapes, call.results, ins, early)
    if rule is None:
        raise _no_rule(node)
    try:
        sentence = rule.sentence(call)
    except ValueError as error:
        if not cut:
            return _replicated(program, call.shapes, call.results, ins, early)
        raise ShardingError(f"a cut value reaches {op_name(node)}", where=where(node), why=str(error)) from error
    try:
        found = solve(sentence, ins, program.mesh, early=early, keep=_wants_partial(program, node))
    except PlacementError as error:
        raise _blocked(program, node, error) from error
    divided = [d for p in (*found.operands, *found.results) for d in p.dims if isinstance(d, Owned)]
    if divided and op_name(node) not in ROW_BY_ROW:
        raise _blocked(program, node, PlacementError(f"it is not known to treat {divided[0]} row by row"))
    return found


def _wants_partial(program: Program, node: torch.fx.Node) -> bool:
    """Whether a partial sum may pass the op: it comes from a node whose partial sum is kept."""
    return any(x.name in program.keep for x in node.all_input_nodes)


def _replicated(
    program: Program, shapes: tuple[Any, ...], results: tuple[Any, ...], ins: list[Placement], early: frozenset[int]
) -> Solution:
    letters = tuple("H" if a in early or any(p.letters[a] == "H" for p in ins) else "R" for a in program.mesh.axes)
    if not ins:
        letters = tuple("R" for _ in letters)
    operands = tuple(uncut(s, program.mesh).with_letters(letters) for s in shapes)
    return Solution(operands, tuple(uncut(s, program.mesh).with_letters(letters) for s in results), "replicated")


def _blocked(program: Program, node: torch.fx.Node, error: PlacementError) -> ShardingError:
    lines = [c.claim.line.where for c in program.cuts if c.claim is not None]
    asked = ", ".join(dict.fromkeys(f"{w.file}:{w.line}" for w in lines if w.file))
    return ShardingError(
        f"a cut axis meets {op_name(node)}, which cannot run on a part of it",
        where=where(node),
        why=program.mesh.named(str(error)) + (f" (cuts come from {asked})" if asked else ""),
        help=f"say `replicate` for the Linear that feeds {node.meta.get('module') or 'this op'}, or cut another axis",
    )


def _settle(
    program: Program, node: torch.fx.Node, solution: Solution, grads: frozenset[str], may_spread: bool = True
) -> Row:
    """All-reduce partial sums at once unless they are kept, or reduce-scatter them along a stream of positions; without
    a gradient H and R are the same."""
    results = solution.results
    if node.name not in grads:
        results = tuple(p.with_letters(["R" if x == "H" else x for x in p.letters]) for p in results)
    settled = results
    if node.name not in program.keep:
        settled = tuple(_reduced(program, node, i, p, may_spread) for i, p in enumerate(results))
    return Row(solution.operands, results, settled, solution.reason)


def _reduced(program: Program, node: torch.fx.Node, index: int, placed: Placement, may_spread: bool) -> Placement:
    """What becomes of a partial sum."""
    dim = stream_dim(program, node, index) if may_spread and set(placed.letters) == {"P"} else None
    if dim is None:
        return placed.with_letters(["R" if x == "P" else x for x in placed.letters])
    spread = Spread(size(placed.dims[dim]), program.mesh.axes)
    return cut_as((*placed.dims[:dim], spread, *placed.dims[dim + 1 :]), program.mesh)


def stream_dim(program: Program, node: torch.fx.Node, index: int = 0) -> int | None:
    """The dim of a result that is a stream of positions to be spread over the ranks."""
    if not program.streams or program.structure is None:
        return None
    terms = program.structure.values.get(node.name, ())
    dims = terms[index] if index < len(terms) else ()
    return next((d for d, term in enumerate(dims) if any(same_space(term, s) for s in program.streams)), None)


__all__ = ["gathered", "is_spread", "needs_grad", "place", "runs_spread", "stream_dim"]
