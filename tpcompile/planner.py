"""Plans: a spec for any model, from its captured graph alone; names and classes are only written, never read.

An inner axis is an index space that some weights make (their column index) and others sum over (their row index):
attention heads, the width of an MLP. Cutting it costs one all-reduce behind the weights that sum, and one, backward,
in front of those that make it; what lies between is local (Megatron-LM, section 3). No weight can have both indexes
cut over the same ranks, so axes compete: a maximum-weight independent set is cut, where the weight of an axis is the
parameter bytes that it saves per byte that its collectives send. The vocabulary is cut if that is more than one byte.
A cut that placement refuses is dropped and its reason kept, so that a plan always compiles.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import sympy
import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from tpcompile import shards
from tpcompile.capture import Captured, capture
from tpcompile.errors import ShardingError, Where
from tpcompile.globs import fold
from tpcompile.layout import axes_of
from tpcompile.passes import PIPELINE
from tpcompile.passes.axes import Use, axes, candidates, cuttable, divide_atoms, uses_of
from tpcompile.passes.canonicalize import VIEWS
from tpcompile.passes.decompose import DECOMPOSITIONS
from tpcompile.passes.place import needs_grad
from tpcompile.program import Program, Structure, where
from tpcompile.report import sizes_at
from tpcompile.rules import RULES, op_name
from tpcompile.sentence import Sentence
from tpcompile.spec import Claim, Line, Pattern, Spec, resolve
from tpcompile.structure import Atom, Cat, Prod, Term, atoms, factors, find, segments, size

WORDS = ("column", "row", "vocab")
"""The words of a plan, in the order in which it writes them."""

COMMENT_WIDTH = 108
OTHER_INDEX = "stay whole because the weights along them are cut along their other index"


def plan(model: nn.Module, degree: int, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None) -> Spec:
    """A spec for ``model`` on ``degree`` ranks, made from its graph. Its ``text()`` has comments: what stays whole and why.

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
    return plan_captured(capture(model, args, kwargs), degree, (args, kwargs))


def plan_captured(captured: Captured, degree: int, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Spec:
    """The plan of a model that is captured already; ``inputs`` are its example arguments."""
    program = Program(captured, captured.graph_module, degree)
    program = program.with_(sizes=sizes_at(program, captured.flatten(*inputs)))
    for step in PIPELINE[: PIPELINE.index(axes)]:
        program = step(program)
    planner = _Planner(program)
    return _written(planner, planner.settle())


@dataclass(eq=False)
class _Axis:
    """Index spaces that are cut together, or not at all; ``refused`` says why not."""

    index: int  # in the planner's list
    atoms: tuple[Atom, ...]
    index_space: Term  # the finest index of a weight along it
    units: tuple[Atom, ...]  # what may be cut of that, outermost first
    words: dict[str, str] = field(default_factory=dict[str, str])  # weight -> the word that claims it for this axis
    vocabulary: bool = False
    saved: int = 0  # parameter bytes that a rank is spared
    sent: int = 0  # bytes that a rank sends for it in one step
    refused: _Reason | None = None
    outweighed: bool = False  # refused because axes that exclude it are worth more

    @property
    def worth(self) -> float:
        """Bytes saved per byte sent."""
        return self.saved / max(self.sent, 1)


@dataclass(frozen=True)
class _Reason:
    """Why something stays whole, and where the model says so."""

    text: str
    where: Where | None = None


class _Planner:
    """The axes of a program, what each is worth, which exclude each other, and which are cut in the end."""

    def __init__(self, program: Program):
        assert program.structure is not None
        self.program = program
        self.structure: Structure = program.structure
        shapes = {n: p for n, p in program.captured.parameters.items() if n in self.structure.parameters}
        self.weights = {n: list(uses_of(program, n)) for n, p in shapes.items() if p.dim() > 1}
        self.axes = self._find()
        self.of = {id(a): axis for axis in self.axes for a in axis.atoms}
        self.conflicts: Any = nx.Graph()  # of positions in `axes`
        self.conflicts.add_nodes_from(range(len(self.axes)))
        self._exclude()
        self._price()

    # ------------------------------------------------------------------------------------------------ the axes
    def _find(self) -> list[_Axis]:
        """Unpinned atoms, joined where one index is their product or a sum runs over all of them."""
        joined: Any = nx.Graph()  # keys are ids: atoms compare by identity
        seen: dict[int, Atom] = {}

        def join(found: Sequence[Atom]) -> None:
            seen.update((id(a), a) for a in found)
            joined.add_nodes_from(id(a) for a in found)
            joined.add_edges_from((id(a), id(b)) for a, b in itertools.pairwise(found))

        for use in self._uses():
            for part in segments(use.column) if use.column is not None else ():
                join(cuttable(part))
            if use.row is not None:
                join(candidates(use.row) if use.table else cuttable(use.row))
        order = {key: i for i, key in enumerate(seen)}
        groups = sorted(
            (sorted(g, key=order.__getitem__) for g in nx.connected_components(joined)), key=lambda g: order[g[0]]
        )
        found = [axis for g in groups if (axis := self._axis([seen[k] for k in g])) is not None]
        return [replace(axis, index=i) for i, axis in enumerate(found)]

    def _uses(self) -> Iterator[Use]:
        for uses in self.weights.values():
            yield from uses

    def _axis(self, members: list[Atom]) -> _Axis | None:
        """The axis of these atoms if it is an inner one or a vocabulary."""
        inside = {id(a) for a in members}
        made = summed = looked_up = head = False
        finest: tuple[Term, list[Atom]] = (members[0], [])
        words: dict[str, str] = {}
        for name, uses in self.weights.items():
            for use in uses:
                for part in segments(use.column) if use.column is not None else ():
                    if _has(part, inside):
                        made = True
                        head = head or _is_head(use)
                        words.setdefault(name, "column")
                        finest = max(finest, (part, [a for a in candidates(part) if id(a) in inside]), key=_fineness)
                if use.row is not None and _has(use.row, inside):
                    summed = summed or not use.table
                    looked_up = looked_up or (use.table and _from_input(use.node.args[1]))
                    if use.table:
                        words[name] = "vocab"
                        finest = max(finest, (use.row, candidates(use.row)), key=_fineness)
                    else:
                        words.setdefault(name, "row")
        inner = made and summed
        if not inner and not looked_up and not (made and head):
            return None
        if not inner:
            words = dict.fromkeys(words, "vocab")
        return _Axis(-1, tuple(members), finest[0], tuple(finest[1]), words, vocabulary=not inner)

    def _exclude(self) -> None:
        """Two axes on two dims of one value cannot be cut over the same ranks; nor can one on both."""

        def visit(dims: Iterable[Term]) -> dict[int, Atom]:
            found: dict[int, Atom] = {}
            for dim in dims:
                dim = find(dim)
                match dim:
                    case Atom():
                        inside = {id(dim): dim} if id(dim) in self.of else {}
                    case Prod():
                        inside = visit(factors(dim))
                    case Cat():
                        inside = dict(x for part in segments(dim) for x in visit([part]).items())
                for a, b in itertools.product(found, inside):
                    one, two = self.of[a], self.of[b]
                    if a == b:
                        one.refused = _Reason("it is both indexes of one value")
                    elif one is not two:
                        self.conflicts.add_edge(one.index, two.index)
                found |= inside
            return found

        for results in (*self.structure.values.values(), tuple(self.structure.parameters.values())):
            for dims in results:
                visit(dims)

    # ------------------------------------------------------------------------------------------------ what they are worth
    def _price(self) -> None:
        """Bytes that the cut of every axis saves, and those that its collectives send (ring formulas)."""
        share = 1 - 1 / self.program.degree
        for name, dims in self.structure.parameters.items():
            parameter = self.program.captured.parameters.get(name)
            if parameter is not None:
                for axis in self._on(dims):
                    axis.saved += int(share * parameter.numel() * parameter.element_size())
        grads = needs_grad(self.program)
        charged: set[tuple[int, torch.fx.Node]] = set()

        def charge(axis: _Axis, node: torch.fx.Node, times: float) -> None:
            if (id(axis), node) not in charged:
                charged.add((id(axis), node))
                axis.sent += int(times * share * self._bytes(node))

        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in grads:
                for axis in self._on(self._dims(node)):
                    charge(axis, node, 1)  # backward, its gradient is gathered
            elif node.op == "output":
                for given in node.all_input_nodes:
                    for axis in self._on(self._dims(given)):
                        charge(axis, given, 1)
            elif node.op == "call_function" and (sentence := self._sentence(node)) is not None:
                operands = self.program.call(node).operands
                carried = [self._on(self._dims(x)) for x in operands]
                kept = self._on(self._dims(node))
                for axis in dict.fromkeys(a for found in carried for a in found):
                    if axis not in kept and sentence.sums:
                        charge(axis, node, 2)
                    if op_name(node) in DECOMPOSITIONS and (along := self._whole(axis, node, sentence)):
                        charge(axis, node, 8 / along)  # two statistics of the axis, and the same backward
                    for i, (x, found) in enumerate(zip(operands, carried, strict=True)):
                        if axis not in found and x.name in grads and i not in sentence.references:
                            charge(axis, x, 2)  # backward, in front of what is cut

    def _on(self, dims: Iterable[Term]) -> list[_Axis]:
        return list(dict.fromkeys(self.of[id(a)] for d in dims for a in atoms(d) if id(a) in self.of))

    def _dims(self, node: torch.fx.Node) -> list[Term]:
        return [term for dims in self.structure.values.get(node.name, ()) for term in dims]

    def _sentence(self, node: torch.fx.Node) -> Sentence | None:
        rule = RULES.get(op_name(node))
        try:
            return (
                None
                if rule is None or node.name not in self.structure.values
                else rule.sentence(self.program.call(node))
            )
        except ValueError:
            return None

    def _whole(self, axis: _Axis, node: torch.fx.Node, sentence: Sentence) -> int:
        """Positions of the dim along which the op reads the whole axis; 0 if it does not."""
        for label, term in zip(sentence.operands[0], self._dims(self.program.call(node).operands[0]), strict=True):
            if label in sentence.whole and axis in self._on([term]):
                return size(term)
        return 0

    def _bytes(self, node: torch.fx.Node) -> int:
        """Bytes of a value at the example inputs."""
        tensors = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
        return sum(math.prod(_at(n, self.program.sizes) for n in x.shape) * x.element_size() for x in tensors)

    # ------------------------------------------------------------------------------------------------ which are cut
    def choose(self) -> list[_Axis]:
        """The axes worth most together, no two of which exclude each other; the others get their reason."""
        for axis in self.axes:
            axis.refused = axis.refused or self._too_small(axis)
        possible = frozenset(axis.index for axis in self.axes if axis.refused is None)
        chosen = heaviest(self.conflicts.subgraph(possible), [axis.worth for axis in self.axes])
        for index in possible - chosen:
            self.axes[index].outweighed = True
            self.axes[index].refused = _Reason(f"{_units(self.axes[index])} {OTHER_INDEX}")
        return [self.axes[index] for index in sorted(chosen)]

    def _too_small(self, axis: _Axis) -> _Reason | None:
        degree = self.program.degree
        if divide_atoms(axis.index_space, axis.units, degree) is None:
            return _Reason(f"{_units(axis)} cannot be divided among {degree} ranks")
        if axis.vocabulary and axis.saved < axis.sent:
            saved, sent = (f"{n:,}".replace(",", " ") for n in (axis.saved, axis.sent))
            return _Reason(f"it does not pay: a rank would save {saved} bytes and send {sent} in every step")
        return None

    def settle(self) -> tuple[list[_Axis], Program]:
        """The chosen axes that compile, and the program with them cut."""
        chosen = self.choose()
        while True:
            try:
                return chosen, self.trial(chosen)
            except ShardingError as error:
                blamed = self._blame(error, chosen)
                blamed.refused = _Reason((error.why or error.what).partition(" (cuts come from")[0], error.where)
                chosen = [axis for axis in chosen if axis is not blamed]

    def trial(self, chosen: Sequence[_Axis]) -> Program:
        """The program rewritten with these axes cut.

        Raises:
            ShardingError: some op cannot take one of the cuts.
        """
        program = self.program.with_(claims=tuple(_claims(chosen)))
        for step in PIPELINE[PIPELINE.index(axes) :]:
            program = step(program)
        return program

    def _blame(self, error: ShardingError, chosen: Sequence[_Axis]) -> _Axis:
        """The axis whose cut is refused: of those that meet the op, the least worth without which the op is content."""
        meeting: dict[_Axis, None] = {}
        for node in self.program.graph.nodes:
            if error.where is not None and where(node) == error.where:
                for value in (node, *node.all_input_nodes):
                    meeting |= dict.fromkeys(a for a in self._on(self._dims(value)) if a in chosen)
        suspects = sorted(meeting or chosen, key=lambda axis: axis.worth)
        for suspect in suspects if len(suspects) > 1 else ():
            try:
                self.trial([axis for axis in chosen if axis is not suspect])
            except ShardingError as other:
                if other.where == error.where:
                    continue
            return suspect
        return suspects[0]


def _fineness(found: tuple[Term, list[Atom]]) -> int:
    return len(found[1])


def _has(term: Term, inside: set[int]) -> bool:
    return any(id(a) in inside for a in atoms(term))


def _is_head(use: Use) -> bool:
    """More columns than rows: what is narrower (poolers, classifiers) is small beside the layers of a model."""
    return use.column is not None and use.row is not None and not use.table and size(use.column) > size(use.row)


INTEGERS_PASS = frozenset(
    (*VIEWS, *(f"aten.{n}" for n in ["clone.default", "masked_fill.Scalar", "where.self", "where.ScalarSelf", "where.ScalarOther", "clamp.default", "clamp_min.default", "clamp_max.default", "cat.default"]))
)  # fmt: skip


def _from_input(node: Any) -> bool:
    """Whether an index is one of the model's inputs, perhaps reshaped or masked: tokens, and not computed positions."""
    if not isinstance(node, torch.fx.Node) or not isinstance(value := node.meta.get("val"), torch.Tensor):
        return False
    if value.is_floating_point() or value.dtype == torch.bool:
        return False
    return node.op == "placeholder" or (op_name(node) in INTEGERS_PASS and any(map(_from_input, node.all_input_nodes)))


def _units(axis: _Axis) -> str:
    return " x ".join(str(a.size) for a in axis.units) + " positions"


def _at(n: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(n.node.expr.xreplace(sizes)) if isinstance(n, torch.SymInt) else int(n)


def heaviest(conflicts: Any, worth: Sequence[float]) -> frozenset[int]:
    """The independent set of most worth: exact, branching on the most constrained node of every component."""
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


# ---------------------------------------------------------------------------------------------- the text
def _written(planner: _Planner, settled: tuple[list[_Axis], Program]) -> Spec:
    """The plan as a spec whose places are those of its own text."""
    chosen, program = settled
    captured = program.captured
    names = _Names(captured)
    lines = tuple(line for word in WORDS for line in names.lines(word, list(_claims(chosen))))
    root = captured.module_classes[""]
    spec = Spec((root,), lines, head=_head(program, root), notes=_notes(planner, chosen, program, names))
    parsed = Spec.parse(spec.text(), f"the plan for {root}")
    got = resolve(parsed, captured.module_classes, list(captured.parameters), captured.aliases)
    weights = {(c.parameter, c.word) for c in got if captured.parameters[c.parameter].dim() > 1}
    assert weights == {(c.parameter, c.word) for c in _claims(chosen)}, "the lines of a plan claim what was planned"
    return replace(parsed, head=spec.head, notes=spec.notes)


class _Names:
    """The names of a model's parameters, all of those of a tied one, as patterns."""

    def __init__(self, captured: Captured):
        self.captured = captured
        self.canonical = {n: n for n in captured.parameters}
        self.canonical |= {n: c for n, c in captured.aliases.items() if c in captured.parameters}
        self.inside: dict[str, list[str]] = {}  # module -> the names of its own parameters
        for name in self.canonical:
            self.inside.setdefault(name.rpartition(".")[0], []).append(name)
        self.known = [*filter(None, self.inside), *self.canonical]

    def lines(self, word: str, claims: Sequence[Claim]) -> list[Line]:
        """The lines for one word."""
        words = {c.parameter: c.word for c in claims}
        claimed = [n for n, c in self.canonical.items() if words.get(c) == word]
        weights = {m: [n for n in own if self._weight(n)] for m, own in self.inside.items()}
        return [Line((p,), word) for p in self.patterns(claimed, weights)]

    def _weight(self, name: str) -> bool:
        return self.captured.parameters[self.canonical[name]].dim() > 1

    def patterns(self, names: Sequence[str], inside: Mapping[str, Sequence[str]]) -> list[Pattern]:
        """Patterns for parameters: their module where all that counts ``inside`` it is meant."""
        meant = set(names)
        modules = ((n, n.rpartition(".")[0]) for n in names)
        return fold((m if m and meant.issuperset(inside[m]) else n for n, m in modules), self.known)


def _head(program: Program, root: str) -> tuple[str, ...]:
    try:
        version = " " + importlib.metadata.version("tpcompile")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    total = held = 0
    for name, parameter in program.captured.parameters.items():
        dims = program.parameters.get(name, ())
        local = math.prod(shards.shape(dims, program.mesh, 0)) if dims else parameter.numel()
        total += parameter.numel() * parameter.element_size()
        held += local * parameter.element_size()
    share = f"{held / max(total, 1):.0%} of the parameters"
    return (f"Planned by tpcompile{version} for {root} on {program.degree} ranks; one of them holds {share}.",)


def _notes(planner: _Planner, chosen: Sequence[_Axis], program: Program, names: _Names) -> tuple[str, ...]:
    """What stays whole, alike parameters together, each with its reason."""
    claimed = {c.parameter for c in _claims(chosen)}
    found: dict[tuple[str, str | None], tuple[_Reason, list[str]]] = {}
    for name in program.captured.parameters:
        if any(axes_of(d) for d in program.parameters.get(name, ())):
            continue
        reason = _why_whole(planner, name, name in claimed)
        op = reason.where.op if reason.where is not None else None
        found.setdefault((reason.text, op), (reason, []))[1].append(name)
    rows: list[str] = []
    for reason, members in found.values():
        shown = ", ".join(map(str, names.patterns(members, names.inside)))
        row = f"{shown}: {reason.text}{_place(reason.where)}"
        rows += textwrap.wrap(
            row, COMMENT_WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    return ("Whole on every rank:", *(f"  {row}" for row in rows)) if rows else ()


def _place(where: Where | None) -> str:
    if where is None:
        return ""
    parts = [where.op or "", f"in {where.module}" if where.module else ""]
    parts.append(f"at {where.file}:{where.line}" if where.file else "")
    return f" ({' '.join(filter(None, parts))})" if any(parts) else ""


def _why_whole(planner: _Planner, name: str, claimed: bool) -> _Reason:
    dims = planner.structure.parameters.get(name)
    if dims is None:
        return _Reason("the graph does not use it")
    if claimed:
        return _Reason("it has fewer units than there are ranks, so each holds all of them")
    uses = planner.weights.get(name, ())
    reasons = [r for term in dims if (r := _why_dim(planner, term, uses)) is not None]
    telling = list({r.text: r for r in reasons if not r.text.endswith(OTHER_INDEX)}.values()) or reasons[:1]
    if not telling:
        return _Reason("it has one position" if all(size(t) == 1 for t in dims) else "no weight shares its axes")
    if len(telling) == 1:
        return telling[0]
    return _Reason("; ".join(r.text for r in telling), telling[0].where)


def _why_dim(planner: _Planner, term: Term, uses: Sequence[Use]) -> _Reason | None:
    for atom in candidates(term):
        axis = planner.of.get(id(atom))
        if axis is not None and axis.refused is not None and not (axis.outweighed and atom.pins):
            return axis.refused
        if axis is not None and axis.refused is None:
            continue
        if atom.pins:
            return _Reason(atom.pins[0].reason, where(atom.pins[0].node))
        if any(u.table and u.row is not None and _has(u.row, {id(atom)}) for u in uses):
            return _Reason("its rows are looked up by computed positions, not by an input of the model")
        if any(u.column is not None and _has(u.column, {id(atom)}) for u in uses):
            return _Reason("no weight sums over its columns")
        if uses:
            return _Reason("no weight makes the features that it sums over")
    return None


__all__ = ["heaviest", "plan", "plan_captured"]
