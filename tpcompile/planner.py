"""Plans: a spec for any model, from its captured graph alone; names and classes are only written, never read.

An inner axis is an index space that some weights make (their column index) and others sum over (their row index):
attention heads, the width of an MLP. Cutting it costs one all-reduce behind the weights that sum and, backward, one in
front of those that make it; what lies between is local (Megatron-LM, section 3). No weight can have both of its indexes
cut over the same ranks, so axes compete: a maximum-weight independent set is cut, where the weight of an axis is the
parameter bytes that it saves per byte that its collectives send. A vocabulary is cut if that is more than one byte.
A cut that placement refuses is dropped and its reason kept, so that a plan always compiles.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import sympy
import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from tpcompile.aliasing import VIEWS
from tpcompile.capture import Captured
from tpcompile.compile_cache import cached_capture
from tpcompile.errors import ShardingError, Where
from tpcompile.first_passes import FIRST, first_passes
from tpcompile.globs import fold
from tpcompile.layout import axes_of
from tpcompile.passes import PIPELINE
from tpcompile.passes.axes import Use, candidates, cuttable, divide_atoms, uses_of
from tpcompile.passes.decompose import DECOMPOSITIONS
from tpcompile.passes.place import needs_grad
from tpcompile.program import Program, Structure, where
from tpcompile.report import held, held_text, sizes_at
from tpcompile.rules import RULES, op_name
from tpcompile.sentence import Sentence
from tpcompile.spec import Claim, Line, Pattern, Spec, resolve
from tpcompile.structure import Atom, Cat, Prod, Term, atoms, factors, find, segments, size

WORDS = ("column", "row", "vocab")
"""The words of a plan, in the order in which it writes them."""

AFTER = PIPELINE[len(FIRST) :]
COMMENT_WIDTH = 108


def plan(model: nn.Module, degree: int, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None) -> Spec:
    """A spec for ``model`` on ``degree`` ranks, made from its graph. Its ``text()`` says what stays whole, and why.

    Args:
        model: any module, unmodified; it may live on the meta device.
        degree: number of ranks.
        example_inputs: as for :func:`tpcompile.rewrite`; bytes are counted at their sizes.

    Raises:
        CaptureError: the model cannot be captured as one graph.
    """
    from tpcompile.compiler import call_arguments, check_degree

    check_degree(degree)
    args, kwargs = call_arguments(model, example_inputs)
    return plan_captured(cached_capture(model, args, kwargs), degree, (args, kwargs))


def plan_captured(captured: Captured, degree: int, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Spec:
    """The plan of a model that is captured already; ``inputs`` are its example arguments."""
    made = first_passes(captured)[-1]
    program = Program(captured, made.graph_module, degree, structure=made.structure)
    program = program.with_(sizes=sizes_at(program, captured.flatten(*inputs)))
    planner = _Planner(program)
    return _written(planner, *planner.settle())


@dataclass(frozen=True)
class _Reason:
    """Why something stays whole, and where the model says so."""

    text: str
    where: Where | None = None

    def __str__(self) -> str:
        if self.where is None:
            return self.text
        module, file = self.where.module, self.where.file
        parts = [self.where.op or "", f"in {module}" if module else "", f"at {file}:{self.where.line}" if file else ""]
        return f"{self.text} ({' '.join(filter(None, parts))})"


@dataclass(eq=False)
class _Axis:
    """Index spaces that are cut together, or not at all; ``refused`` says why not."""

    index: int  # in the planner's list
    atoms: tuple[Atom, ...]
    space: Term  # the finest index of a weight along it
    units: tuple[Atom, ...]  # what may be cut of that, outermost first
    words: Mapping[str, str]  # weight -> the word that claims it for this axis
    vocabulary: bool
    saved: int = 0  # parameter bytes that a rank is spared
    sent: int = 0  # bytes that a rank sends for it in one step
    refused: _Reason | None = None
    outweighed: bool = False  # refused because axes that exclude it are worth more

    @property
    def worth(self) -> float:
        """Bytes saved per byte sent."""
        return self.saved / max(self.sent, 1)

    @property
    def shown(self) -> str:
        return " x ".join(str(a.size) for a in self.units) + " positions"


class _Planner:
    """The axes of a program, what each is worth, which exclude each other, and which are cut in the end."""

    def __init__(self, program: Program):
        assert program.structure is not None
        self.program = program
        self.structure: Structure = program.structure
        self.grads = needs_grad(program)
        used = {n: p for n, p in program.captured.parameters.items() if n in self.structure.parameters}
        self.weights = {n: uses_of(program, n) for n, p in used.items() if p.dim() > 1}
        self.axes = self._find()
        self.of = {id(a): axis for axis in self.axes for a in axis.atoms}
        self.conflicts: Any = nx.Graph()  # of positions in `axes`
        self.conflicts.add_nodes_from(range(len(self.axes)))
        self._exclude()
        self._price()

    # ------------------------------------------------------------------------------------------------ the axes
    def _find(self) -> list[_Axis]:
        """Cuttable atoms, joined where one index is their product or a sum runs over all of them."""
        joined: Any = nx.Graph()  # of ids: atoms compare by identity
        seen: dict[int, Atom] = {}

        def join(found: Sequence[Atom]) -> None:
            seen.update((id(a), a) for a in found)
            joined.add_nodes_from(id(a) for a in found)
            joined.add_edges_from((id(a), id(b)) for a, b in itertools.pairwise(found))

        for use in itertools.chain.from_iterable(self.weights.values()):
            for part in segments(use.column) if use.column is not None else ():
                join(cuttable(part))
            if use.row is not None:
                join(candidates(use.row) if use.table else cuttable(use.row))
        order = {key: i for i, key in enumerate(seen)}
        groups = [sorted(group, key=order.__getitem__) for group in nx.connected_components(joined)]
        found: list[_Axis] = []
        for group in sorted(groups, key=lambda g: order[g[0]]):
            axis = self._axis(len(found), [seen[key] for key in group])
            found += [axis] if axis is not None else []
        return found

    def _axis(self, index: int, members: list[Atom]) -> _Axis | None:
        """The axis of these atoms, if it is an inner one or a vocabulary."""
        inside = {id(a) for a in members}
        made = summed = tokens = head = False
        spaces: list[tuple[Term, list[Atom]]] = []
        words: dict[str, str] = {}
        for name, uses in self.weights.items():
            for i, use in enumerate(uses):
                for part in segments(use.column) if use.column is not None else ():
                    if _has(part, inside):
                        made = made or not use.table  # a lookup alone makes the width of the model
                        head = head or _is_head(use)
                        spaces.append((part, [a for a in candidates(part) if id(a) in inside]))
                if use.row is not None and _has(use.row, inside):
                    summed = summed or not use.table
                    tokens = tokens or (use.table and _from_input(use.node.args[1]))
                    if use.table:
                        spaces.append((use.row, candidates(use.row)))
                # a line means the first use of a weight; `vocab` means all of them
                if use.table and use.row is not None and _has(use.row, inside):
                    words[name] = "vocab"
                elif i == 0 and use.column is not None and _has(use.column, inside):
                    words[name] = "column"
                elif i == 0 and use.row is not None and _has(use.row, inside):
                    words[name] = "row"
        inner = made and summed
        if not inner:
            words = dict.fromkeys(words, "vocab")
        if not (inner or tokens or head):
            return None
        space, units = max(spaces, key=lambda found: len(found[1]))
        axis = _Axis(index, tuple(members), space, tuple(units), words, not inner)
        if not {"column", "vocab"} & set(words.values()):
            axis.refused = _Reason("no line can name this index: a line means that of the first use of a weight")
        return axis

    def _exclude(self) -> None:
        """Two axes on two dims of one value cannot be cut over the same ranks; nor can one on both."""

        def visit(dims: Iterable[Term]) -> set[int]:
            found: set[int] = set()
            for dim in map(find, dims):
                match dim:
                    case Atom():
                        inside = {id(dim)} & self.of.keys()
                    case Prod():
                        inside = visit(factors(dim))
                    case Cat():
                        inside = set[int]().union(*(visit([part]) for part in segments(dim)))
                for a, b in itertools.product(found, inside):
                    one, two = self.of[a], self.of[b]
                    if a == b:
                        one.refused = _Reason(f"{one.shown} are both indexes of one value")
                    elif one is not two:
                        self.conflicts.add_edge(one.index, two.index)
                found |= inside
            return found

        for results in (*self.structure.values.values(), tuple(self.structure.parameters.values())):
            for dims in results:
                visit(dims)

    # ------------------------------------------------------------------------------------------------ their worth
    def _price(self) -> None:
        """Bytes that the cut of every axis saves, and those that its collectives send (ring formulas)."""
        share = 1 - 1 / max(self.program.degree, 2)  # the plan for one rank is that for two
        for name, dims in self.structure.parameters.items():
            if (parameter := self.program.captured.parameters.get(name)) is not None:
                for axis in self._on(dims):
                    axis.saved += int(share * parameter.numel() * parameter.element_size())
        charged: set[tuple[int, torch.fx.Node]] = set()
        for node in self.program.graph.nodes:
            for axis, value, times in self._messages(node):
                if (axis.index, value) not in charged:
                    charged.add((axis.index, value))
                    axis.sent += int(times * share * self._bytes(value))

    def _messages(self, node: torch.fx.Node) -> Iterator[tuple[_Axis, torch.fx.Node, float]]:
        """``(axis, value, times)``: the cut of the axis makes this node send the value's bytes so many times."""
        if node.op == "placeholder" and node.name in self.grads:
            yield from ((axis, node, 1) for axis in self._on(self._dims(node)))  # its gradient is gathered
        elif node.op == "output":
            for given in node.all_input_nodes:
                yield from ((axis, given, 1) for axis in self._on(self._dims(given)))
        elif node.op == "call_function" and (sentence := self._sentence(node)) is not None:
            operands = self.program.call(node).operands
            carried = [self._on(self._dims(x)) for x in operands]
            kept = self._on(self._dims(node))
            for axis in dict.fromkeys(itertools.chain.from_iterable(carried)):
                if axis not in kept and sentence.sums:
                    yield axis, node, 2
                if op_name(node) in DECOMPOSITIONS and (along := self._along(axis, operands[0], sentence)):
                    yield axis, node, 8 / along  # two statistics of the axis, forward and backward
                for i, (x, found) in enumerate(zip(operands, carried, strict=True)):
                    if axis not in found and x.name in self.grads and i not in sentence.references:
                        yield axis, x, 2  # backward, in front of what is cut

    def _along(self, axis: _Axis, operand: torch.fx.Node, sentence: Sentence) -> int:
        """Positions of the operand's dim that the op needs whole and that lies along the axis; 0 if there is none."""
        dims = zip(sentence.operands[0], self._dims(operand), strict=True)
        return next((size(term) for label, term in dims if label in sentence.whole and axis in self._on([term])), 0)

    def _on(self, dims: Iterable[Term]) -> list[_Axis]:
        return list(dict.fromkeys(self.of[id(a)] for d in dims for a in atoms(d) if id(a) in self.of))

    def _dims(self, node: torch.fx.Node) -> list[Term]:
        return [term for dims in self.structure.values.get(node.name, ()) for term in dims]

    def _sentence(self, node: torch.fx.Node) -> Sentence | None:
        rule = RULES.get(op_name(node))
        if rule is None or node.name not in self.structure.values:
            return None
        try:
            return rule.sentence(self.program.call(node))
        except ValueError:
            return None

    def _bytes(self, node: torch.fx.Node) -> int:
        """Bytes of a value at the example inputs."""
        tensors = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
        return sum(math.prod(_at(n, self.program.sizes) for n in x.shape) * x.element_size() for x in tensors)

    # ------------------------------------------------------------------------------------------------ which are cut
    def choose(self) -> list[_Axis]:
        """The axes worth most together, no two of which exclude each other; the others get their reason."""
        for axis in self.axes:
            axis.refused = axis.refused or self._unfit(axis)
        possible = frozenset(axis.index for axis in self.axes if axis.refused is None)
        chosen = heaviest(self.conflicts.subgraph(possible), [axis.worth for axis in self.axes])
        for axis in (self.axes[index] for index in possible - chosen):
            axis.outweighed = True
            axis.refused = _Reason(
                f"{axis.shown} stay whole because the weights along them are cut along their other index"
            )
        return [self.axes[index] for index in sorted(chosen)]

    def _unfit(self, axis: _Axis) -> _Reason | None:
        if divide_atoms(axis.space, axis.units, self.program.degree) is None:
            return _Reason(f"{axis.shown} cannot be divided among {self.program.degree} ranks")
        if axis.vocabulary and axis.saved < axis.sent:
            saved, sent = (f"{n:,}".replace(",", " ") for n in (axis.saved, axis.sent))
            return _Reason(f"it does not pay: a rank would save {saved} bytes and send {sent} in every step")
        return None

    def settle(self) -> tuple[list[_Axis], Program]:
        """The chosen axes that compile, and the program with them cut."""
        chosen = self.choose()
        while True:
            program = self._claimed(chosen)
            for count, step in enumerate(AFTER, 1):
                try:
                    program = step(program)
                except ShardingError as error:
                    blamed = self._blamed(error, chosen, count)
                    blamed.refused = _Reason((error.why or error.what).partition(" (cuts come from")[0], error.where)
                    chosen = [axis for axis in chosen if axis is not blamed]
                    break
            else:
                return chosen, program

    def _claimed(self, chosen: Iterable[_Axis]) -> Program:
        return self.program.with_(claims=tuple(_claims(chosen)))

    def _blamed(self, error: ShardingError, chosen: Sequence[_Axis], count: int) -> _Axis:
        """The axis that the first ``count`` passes refuse: of those at the op, the least worth that settles it."""
        meeting: dict[_Axis, None] = {}
        for node in self.program.graph.nodes:
            if error.where is not None and where(node) == error.where:
                for value in (node, *node.all_input_nodes):
                    meeting |= dict.fromkeys(axis for axis in self._on(self._dims(value)) if axis in chosen)
        suspects = sorted(meeting or chosen, key=lambda axis: axis.worth)
        for suspect in suspects if len(suspects) > 1 else ():
            program = self._claimed(axis for axis in chosen if axis is not suspect)
            try:
                for step in AFTER[:count]:
                    program = step(program)
            except ShardingError as other:
                if other.where == error.where:
                    continue
            return suspect
        return suspects[0]


def _has(term: Term, inside: set[int]) -> bool:
    return any(id(a) in inside for a in atoms(term))


def _is_head(use: Use) -> bool:
    """More columns than rows: what is narrower (poolers, classifiers) is small beside the layers of a model."""
    return use.column is not None and use.row is not None and not use.table and size(use.column) > size(use.row)


_MASKS = "clone.default masked_fill.Scalar where.self where.ScalarSelf where.ScalarOther clamp.default cat.default"
TOKENS_PASS = frozenset((*VIEWS, *(f"aten.{name}" for name in _MASKS.split())))
"""Ops after which tokens are still tokens."""


def _from_input(node: Any) -> bool:
    """Whether an index is an input of the model, perhaps reshaped or masked: tokens, and not computed positions."""
    if not isinstance(node, torch.fx.Node) or not isinstance(value := node.meta.get("val"), torch.Tensor):
        return False
    if value.is_floating_point() or value.dtype == torch.bool:
        return False
    return node.op == "placeholder" or (op_name(node) in TOKENS_PASS and any(map(_from_input, node.all_input_nodes)))


def _at(n: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(n.node.expr.xreplace(sizes)) if isinstance(n, torch.SymInt) else int(n)


def heaviest(conflicts: Any, worth: Sequence[float]) -> frozenset[int]:
    """The independent set of most worth of a graph of integers: exact, branching on the most constrained node.

    Axes exclude one another in chains and stars, which fall apart at once: their components are solved one by one.
    """
    known: dict[frozenset[int], frozenset[int]] = {}

    def best(nodes: frozenset[int]) -> frozenset[int]:
        found = frozenset[int]()
        for component in map(frozenset, nx.connected_components(conflicts.subgraph(nodes))):
            if component not in known:
                node = max(sorted(component), key=conflicts.subgraph(component).degree)
                taken = best(component - {node} - set(conflicts[node])) | {node}
                left = best(component - {node}) if len(component) > 1 else taken
                known[component] = max(taken, left, key=lambda chosen: sum(worth[i] for i in sorted(chosen)))
            found |= known[component]
        return found

    return best(frozenset(conflicts))


def _claims(chosen: Iterable[_Axis]) -> Iterator[Claim]:
    """What the lines of the plan will claim."""
    for axis in chosen:
        for name, word in axis.words.items():
            yield Claim(name, word, Line((), word), name.rpartition(".")[0], name)


# ---------------------------------------------------------------------------------------------------- the text
def _written(planner: _Planner, chosen: Sequence[_Axis], program: Program) -> Spec:
    """The plan as a spec whose places are those of its own text."""
    captured = program.captured
    names = _Names(captured)
    planned = {c.parameter: c.word for c in _claims(chosen)}
    root = captured.module_classes[""]
    lines = tuple(line for word in WORDS for line in names.lines(word, planned))
    spec = Spec((root,), lines, head=_head(program, root), notes=_notes(planner, planned, program, names))
    parsed = Spec.parse(spec.text(), f"the plan for {root}")
    claims = resolve(parsed, captured.module_classes, list(captured.parameters), captured.aliases)
    claimed = {(c.parameter, c.word) for c in claims if captured.parameters[c.parameter].dim() > 1}
    assert claimed == set(planned.items()), "the lines of a plan claim what was planned"
    return replace(parsed, head=spec.head, notes=spec.notes)


class _Names:
    """The names of a model's parameters, all of those of a tied one, as patterns."""

    def __init__(self, captured: Captured):
        self.canonical = {n: n for n in captured.parameters}
        self.canonical |= {n: c for n, c in captured.aliases.items() if c in captured.parameters}
        self.inside: dict[str, list[str]] = {}  # module -> the names of its own parameters
        for name in self.canonical:
            self.inside.setdefault(name.rpartition(".")[0], []).append(name)
        weights = {n for n, c in self.canonical.items() if captured.parameters[c].dim() > 1}
        self.weights = {m: [n for n in own if n in weights] for m, own in self.inside.items()}
        self.known = [*filter(None, self.inside), *self.canonical]

    def lines(self, word: str, planned: Mapping[str, str]) -> Iterator[Line]:
        """The lines for one word."""
        claimed = [n for n, c in self.canonical.items() if planned.get(c) == word]
        yield from (Line((p,), word) for p in self.patterns(claimed, self.weights))

    def patterns(self, names: Sequence[str], inside: Mapping[str, Sequence[str]]) -> list[Pattern]:
        """Patterns for parameters: their module where all that is ``inside`` it is meant."""
        meant = set(names)
        modules = ((n, n.rpartition(".")[0]) for n in names)
        return fold((m if m and meant.issuperset(inside[m]) else n for n, m in modules), self.known)


def _head(program: Program, root: str) -> tuple[str, ...]:
    try:
        version = " " + importlib.metadata.version("tpcompile")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    ranks = f"{program.degree} ranks; {held_text(held(program))}"
    return (f"Planned by tpcompile{version} for {root} on {ranks}.",)


def _notes(planner: _Planner, planned: Mapping[str, str], program: Program, names: _Names) -> tuple[str, ...]:
    """What stays whole, alike parameters together, each with its reasons."""
    if program.degree == 1:
        return ()
    found: dict[tuple[tuple[str, str | None], ...], tuple[tuple[_Reason, ...], list[str]]] = {}
    for name in program.captured.parameters:
        if not any(axes_of(d) for d in program.parameters.get(name, ())):
            reasons = _why_whole(planner, name, name in planned)
            key = tuple((r.text, r.where.op if r.where is not None else None) for r in reasons)
            found.setdefault(key, (reasons, []))[1].append(name)
    rows: list[str] = []
    for reasons, members in found.values():
        row = f"{', '.join(map(str, names.patterns(members, names.inside)))}: {'; '.join(map(str, reasons))}"
        rows += textwrap.wrap(
            row, COMMENT_WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    return ("Whole on every rank:", *(f"  {row}" for row in rows)) if rows else ()


def _why_whole(planner: _Planner, name: str, claimed: bool) -> tuple[_Reason, ...]:
    """The reasons of a parameter's dims, the most telling ones only."""
    dims = planner.structure.parameters.get(name)
    if dims is None:
        return (_Reason("the graph does not use it"),)
    if claimed:
        return (_Reason("every rank holds all of its units: what they are repeated for is cut"),)
    found = [_why_atom(planner, atom) for term in dims for atom in candidates(term)[:1]]
    best = max((rank for rank, _ in found), default=0)
    reasons = {reason.text: reason for rank, reason in found if rank == best}
    return tuple(reasons.values()) or (_Reason("it has one position"),)


def _why_atom(planner: _Planner, atom: Atom) -> tuple[int, _Reason]:
    """How telling, and why: first what was tried, then the part that the index plays, then what pins it."""
    axis, inside = planner.of.get(id(atom)), {id(atom)}
    if axis is not None and axis.refused is not None and not axis.outweighed:
        return 3, axis.refused
    uses = list(itertools.chain.from_iterable(planner.weights.values()))
    made = any(u.column is not None and _has(u.column, inside) for u in uses)
    summed = any(u.row is not None and not u.table and _has(u.row, inside) for u in uses)
    if axis is None and any(u.row is not None and u.table and _has(u.row, inside) for u in uses):
        return 2, _Reason("its rows are looked up by computed positions, not by an input of the model")
    if axis is None and made and not summed and not atom.pins:
        return 2, _Reason("no weight sums over its columns")
    if atom.pins:
        return 1, _Reason(atom.pins[0].reason, where(atom.pins[0].node))
    if axis is not None and axis.refused is not None:
        return 0, axis.refused
    return 0, _Reason("no weight makes what it sums over" if summed else "no weight shares its index")


__all__ = ["heaviest", "plan", "plan_captured"]
