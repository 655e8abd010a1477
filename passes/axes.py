"""Axes: from the spec's lines to atoms, from atoms to cuts, from cuts to the layout of every parameter.

A ``column`` line cuts the index of its weight that reaches the output, ``vocab`` the vocabulary, and ``row`` asserts
that the contracted index is one that a ``column`` line cut. Which atom of a fused or grouped index is cut (heads, kv
heads, segments) is read off the structure; everything else that shares the atom is cut with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.fx

from tpcompile.errors import ShardingError, Where
from tpcompile.layout import Layout, Leaf, Mesh, axes_of, concat, product
from tpcompile.passes.decompose import DECOMPOSITIONS
from tpcompile.passes.structure import SUMMED
from tpcompile.program import Cut, Program, where
from tpcompile.rules import RULES, how_to_add, op_name
from tpcompile.sentence import Sentence
from tpcompile.spec import Claim, parametrized
from tpcompile.structure import Atom, Cat, Pin, Prod, Term, atoms, factors, find, prod, segments, size


@dataclass(frozen=True)
class Use:
    """Where a parameter is multiplied: the terms of its index that reaches the output, of the one summed away, and of
    the one that says whose matrix it is."""

    node: torch.fx.Node
    column: Term | None
    row: Term | None
    table: bool  # an embedding: `row` is looked up, not summed
    experts: Term | None = None

    def meant(self, word: str) -> Term | None:
        """The index that a line with ``word`` means here, if there is one."""
        if word == "vocab":
            return self.row if self.table else self.column
        if word == "row":
            return None if self.table else self.row
        return self.experts if word == "experts" else self.column


MEANT = {  # a line's word -> the index that it means, and why there may be none
    "column": ("of outputs", "no dim of what it makes is its own"),
    "row": ("to sum over", "a lookup picks rows, a convolution of each channel by itself sums over no channels"),
    "vocab": ("of a vocabulary", "no dim of what it makes is its own, and no lookup reads it"),
    "experts": ("of several experts", "no product of rows with the matrix of their expert reads it"),
}


@dataclass(frozen=True)
class _Planned:
    """Neighbouring atoms to cut as one over ``over`` ranks, inside ``before`` ranks that an outer cut takes."""

    atoms: tuple[Atom, ...]
    before: int
    over: int
    claim: Claim


def axes(program: Program) -> Program:
    """Decide the cuts and lay every parameter out. Degree 1 cuts nothing."""
    if program.degree == 1:
        return program.with_(mesh=Mesh((1,)), parameters=_layouts(program, (), frozenset()))
    wanted: list[tuple[Claim, Term, Use]] = []
    rows: list[tuple[Claim, Term, Use]] = []
    for claim in program.claims:
        if claim.word in ("replicate", "sequence"):
            continue
        for use, term in _terms(program, claim):
            (rows if claim.word == "row" else wanted).append((claim, term, use))
    _check_every_line_names_a_weight(program)
    plan: list[_Planned] = []
    cut: set[int] = set()
    considered: set[int] = set()  # what stands beside a cut atom is left whole on purpose (kv heads, a head's inside)
    beside, places = _beside(program), _places(program)
    refused: list[tuple[Term, ShardingError]] = []
    segmented = [(claim, term, part) for claim, term, _ in wanted for part in segments(term)]
    summed = {id(a) for _, term, _ in rows for a in atoms(term)}

    def order(item: tuple[Claim, Term, Term]) -> tuple[int, bool]:
        """Segments that no other line names come last: what that line names is meant for certain."""
        _, term, part = item
        return -len(candidates(part)), part is not find(term) and not any(id(a) in summed for a in atoms(part))

    for claim, term, part in sorted(segmented, key=order):
        inside = {id(a) for a in candidates(part)}
        if inside & cut or (inside and inside <= considered):
            continue
        before = 1
        try:
            chosen = _choose(program, claim, part, term)
            if part is not find(term):
                _check_no_weight_would_be_cut_twice(places, chosen, cut, claim)
        except ShardingError as error:
            refused.append((term, error))
            continue
        for together, over in chosen:
            for atom in together:
                cut.add(id(atom))
                considered |= beside[id(atom)]
            plan.append(_Planned(together, before, over, claim))
            before *= over
    for term, error in refused:  # a fused weight whose segments are cut one by one may keep some of them whole
        if not any(id(a) in cut for a in atoms(term)):
            raise error
    _check_rows(program, rows, cut, wanted)
    mesh = _mesh(program.degree, plan)
    cuts = tuple(
        Cut(p.atoms, _axes_between(mesh, p.before, p.before * p.over), p.claim.parameter, p.claim) for p in plan
    )
    whole = frozenset(c.parameter for c in program.claims if c.word == "replicate")
    return program.with_(mesh=mesh, cuts=cuts, parameters=_layouts(program, cuts, whole), whole=whole)


def _beside(program: Program) -> dict[int, set[int]]:
    """For every atom of a parameter those that stand in one product with it, in any parameter."""
    assert program.structure is not None
    found: dict[int, set[int]] = {}
    for part in (p for dims in program.structure.parameters.values() for term in dims for p in segments(term)):
        inside = {id(a) for a in candidates(part)}
        for atom in inside:
            found.setdefault(atom, set()).update(inside)
    return found


def _places(program: Program) -> dict[int, set[tuple[str, int]]]:
    """Of every atom the parameters and their dims in which it is."""
    assert program.structure is not None
    found: dict[int, set[tuple[str, int]]] = {}
    for name, dims in program.structure.parameters.items():
        for dim, term in enumerate(dims):
            for atom in atoms(term):
                found.setdefault(id(atom), set()).add((name, dim))
    return found


def _check_no_weight_would_be_cut_twice(
    places: Mapping[int, set[tuple[str, int]]],
    chosen: list[tuple[tuple[Atom, ...], int]],
    cut: set[int],
    claim: Claim,
) -> None:
    """A segment of a packed weight stays whole where the index of another one is cut in a weight that has both."""
    taken = {place for atom in cut for place in places.get(atom, ())}
    for name, dim in (place for together, _ in chosen for atom in together for place in places.get(id(atom), ())):
        if any(other == name and d != dim for other, d in taken):
            raise ShardingError(
                f"{claim.parameter} cannot be cut `{claim.word}` as a whole: two dims of {name} would be cut",
                where=claim.line.where,
                why="two segments of the axis are the two dims of one weight",
                help=f"say `replicate` for {name}",
            )


def _check_every_line_names_a_weight(program: Program) -> None:
    """A module that a `column`, `row` or `vocab` line names has a weight with an index to cut."""
    structure = program.structure
    assert structure is not None
    matrices = {c.module for c in program.claims if len(structure.parameters.get(c.parameter, ())) > 1}
    for claim in program.claims:
        used = claim.parameter in structure.parameters
        if claim.word in ("column", "row", "vocab", "experts") and used and claim.module not in matrices:
            raise ShardingError(
                f"`{claim.word}` claims {claim.module or claim.parameter}, which has no matrix to cut",
                where=claim.line.where,
                why="column, row and vocab name the index of the weight of a Linear or an Embedding",
                help=f"say `sequence` or `replicate` for {claim.module or claim.parameter}",
            )


def _terms(program: Program, claim: Claim) -> Iterator[tuple[Use, Term]]:
    """The index that a line means, for every weight it claims (biases and norms have none of their own).

    Of a weight whose uses disagree (a tied autoencoder's ``W`` and ``W.T``), the first use is meant.
    """
    structure = program.structure
    assert structure is not None
    dims = structure.parameters.get(claim.parameter)
    if dims is None or len(dims) < 2:
        return
    uses = uses_of(program, claim.parameter)
    if not uses and any(uses_of(program, c.parameter) for c in program.claims if _beside_in_weight(c, claim)):
        return  # the scales of a quantized weight
    if not uses:
        raise ShardingError(
            f"`{claim.word}` claims {claim.parameter}, which is not the weight of a Linear or an Embedding",
            where=claim.line.where,
            why="no matrix product, convolution or lookup reads it",
            help="remove it from the line, or say `replicate`",
        )
    first: Term | None = None
    for use in uses:
        term = use.meant(claim.word)
        if term is None:
            continue
        first = term if first is None else first
        if claim.word == "vocab" or any(a is b for a in atoms(first) for b in atoms(term)):
            yield use, term
    if first is None:
        what, why = MEANT[claim.word]
        others = [
            word
            for word in MEANT
            if any(use.meant(word) is not None and (use.table or word != "vocab") for use in uses)
        ]
        raise ShardingError(
            f"`{claim.word}` claims {claim.parameter}, which has no index {what}",
            where=claim.line.where,
            why=why,
            help=(f"say {' or '.join(f'`{word}`' for word in others)} for {claim.parameter}, or " if others else "")
            + "remove it from the line",
        )


def _beside_in_weight(other: Claim, claim: Claim) -> bool:
    """Whether two parameters are parts of one parametrized weight."""
    parts = parametrized(other.parameter), parametrized(claim.parameter)
    return parts[0] is not None and parts[0] == parts[1] and other.line is claim.line


def uses_of(program: Program, parameter: str) -> list[Use]:
    """Every product or lookup that reads a parameter, directly or through transposes, casts, reshapes and picks."""
    structure = program.structure
    assert structure is not None
    found: list[Use] = []
    pending = list(program.graph.find_nodes(op="get_attr", target=parameter))
    seen = set(pending)
    while pending:
        node = pending.pop()
        for user in node.users:
            rule = RULES.get(op_name(user)) if user.op == "call_function" else None
            if rule is None or user in seen or user.name not in structure.values:
                continue
            call = program.call(user)
            try:
                sentence = rule.sentence(call)
            except ValueError:
                continue
            index = call.operands.index(node)
            others = call.operands[:index] + call.operands[index + 1 :]
            if sentence.sums and others:
                seen.add(user)
                found.append(_use(program, user, sentence, index))
            elif not sentence.sums and not any(x.meta["val"].is_floating_point() for x in others):
                seen.add(user)
                pending.append(user)
    return sorted(found, key=lambda use: use.node)  # in the order of the graph


def _use(program: Program, node: torch.fx.Node, sentence: Sentence, index: int) -> Use:
    structure = program.structure
    assert structure is not None
    call = program.call(node)
    terms = structure.values[call.operands[index].name][0]
    own = dict(zip(sentence.operands[index], terms, strict=True))
    others = {x for i, labels in enumerate(sentence.operands) if i != index for x in labels}
    results = {x for labels in sentence.results for x in labels}
    experts = {x for _, x, _ in sentence.owners}
    table = not any(x.meta["val"].is_floating_point() for i, x in enumerate(call.operands) if i != index)
    column = [x for x in own if x in results - others] or [x for x in own if x in results]  # (else one of each channel)
    row = [x for x in own if x not in results | experts and (table or x in others)]

    def product_of(labels: Sequence[str | None]) -> Term | None:
        return prod([own[x] for x in labels]) if labels else None

    return Use(node, product_of(column), product_of(row), table, next((own[x] for x in own if x in experts), None))


def candidates(term: Term) -> list[Atom]:
    """Atoms of more than one position, outermost first; in a concatenation those that all segments share come first."""
    found: dict[int, Atom] = {}

    def walk(t: Term) -> None:
        t = find(t)
        match t:
            case Atom():
                if t.size > 1:
                    found.setdefault(id(t), t)
            case Prod():
                for f in factors(t):
                    walk(f)
            case Cat():
                parts = segments(t)
                shared = [a for a in atoms(parts[0]) if all(any(b is a for b in atoms(p)) for p in parts[1:])]
                for a in shared:
                    walk(a)
                for p in parts:
                    walk(p)

    walk(term)
    return list(found.values())


def cuttable(term: Term) -> list[Atom]:
    """The candidates that no op pins; if there are none, those that only ops pin which can be written out."""
    everything = candidates(term)
    free = [a for a in everything if not a.pins]
    return free or [a for a in everything if all(_costs_only(p) for p in a.pins)]


def _choose(program: Program, claim: Claim, term: Term, whole: Term) -> list[tuple[tuple[Atom, ...], int]]:
    """Atoms of ``term``, a segment of ``whole``, to cut and over how many ranks each, outermost first; they multiply to
    the degree."""
    everything = candidates(term)
    free = everything if claim.word == "vocab" else cuttable(term)
    if not everything and size(whole) > 1 and not candidates(whole):
        tied = next((a.ties[-1] for a in atoms(whole) if a.ties), None)
        raise ShardingError(
            f"{claim.parameter} cannot be cut `{claim.word}`: its {size(whole)} positions are used one by one",
            where=where(tied) if tied is not None else claim.line.where,
            why=f"slices of the axis meet shifted against one another; the line is {_line(claim)}",
            help=f"say `replicate` for {claim.module}, or cut another axis",
        )
    if not free:
        pin = next((p for a in everything for p in a.pins if not _costs_only(p)), None)
        raise ShardingError(
            f"{claim.parameter} cannot be cut `{claim.word}`: the axis of "
            f"{' * '.join(str(a.size) for a in everything)} positions meets an op that needs it whole",
            where=where(pin.node) if pin else claim.line.where,
            why=(pin.reason if pin else "the axis has one position") + f"; the line is {_line(claim)}",
            help=(f"{how_to_add(op_name(pin.node))}, or " if pin and "no rule" in pin.reason else "")
            + f"say `replicate` for {claim.module}, or cut another axis",
        )
    chosen = divide_atoms(term, free, program.degree)
    if chosen is None:
        legal = [t for t in range(1, 129) if divide_atoms(term, free, t) is not None]
        names = " x ".join(str(a.size) for a in free)
        raise ShardingError(
            f"{claim.parameter} cannot be cut over {program.degree} ranks",
            where=claim.line.where,
            why=f"its axis has {names} positions that may be cut, and every rank needs at least one",
            help=f"use a degree of {', '.join(map(str, legal[:12]))}" + (", ..." if len(legal) > 12 else ""),
        )
    if claim.by is not None:
        sizes = [math.prod(a.size for a in group) for group, _ in chosen]
        if claim.by not in {sizes[0], math.prod(sizes), math.prod(a.size for a in free)}:
            raise ShardingError(
                f"the spec says {claim.by} units, the graph shows {sizes[0]}",
                where=claim.line.where,
                why=f"{claim.parameter} is used as {' x '.join(str(a.size) for a in everything)}",
                help=f"write `by {sizes[0]}`, or leave `by` out: the count is read off the graph",
            )
    return chosen


def divide_atoms(term: Term, free: Sequence[Atom], degree: int) -> list[tuple[tuple[Atom, ...], int]] | None:
    """:func:`divide` for atoms ``free`` of a term: ``[(atoms cut as one, ranks)]``, or None."""
    nested = len(free) > 1 and _neighbours(term, free[0], free[1])
    chosen = divide([a.size for a in free], degree, nested)
    return None if chosen is None else [(tuple(free[i] for i in group), over) for group, over in chosen]


def _costs_only(pin: Pin) -> bool:
    """Whether a cut is possible in spite of the pin, at the price of collectives: taken only where nothing else is."""
    return pin.reason == SUMMED or op_name(pin.node) in DECOMPOSITIONS


def _neighbours(term: Term, outer: Atom, inner: Atom) -> bool:
    """Whether the two atoms stand side by side in a row-major product."""
    inside = [find(f) for f in factors(term)]
    return any(a is outer and b is inner for a, b in itertools.pairwise(inside))


def divide(sizes: Sequence[int], degree: int, nested: bool = False) -> list[tuple[tuple[int, ...], int]] | None:
    """Which of the index sizes, outermost first, to cut over how many ranks: ``[(indices cut as one, ranks)]``.

    Even cuts first: the outermost index alone, then the outermost by its common divisor with the degree and the next
    one by the rest (kv heads below the degree: 4 = 2 * 2). Else an uneven cut: of the outermost index, if it has a
    place for every rank, of the two outermost as one, where they are ``nested`` neighbours (9 heads on 3 kv heads
    over 4 ranks: 3, 2, 2, 2), or of the second. None if there is no place for every rank.
    """
    if degree == 1 or sizes[0] % degree == 0:
        return [((0,), degree)]
    if len(sizes) > 1:
        common = math.gcd(sizes[0], degree)
        if sizes[1] % (degree // common) == 0:
            return [((1,), degree)] if common == 1 else [((0,), common), ((1,), degree // common)]
    if sizes[0] >= degree:
        return [((0,), degree)]
    if len(sizes) > 1 and nested and sizes[0] * sizes[1] >= degree:
        return [((0, 1), degree)]
    if len(sizes) > 1 and sizes[1] >= degree:
        return [((1,), degree)]
    return None


def _mesh(degree: int, plan: Sequence[_Planned]) -> Mesh:
    """The coarsest grid whose axes every cut is a run of."""
    marks = sorted({m for p in plan for m in (p.before, p.before * p.over)} | {1, degree})
    for low, high in itertools.pairwise(marks):
        if high % low:
            raise ShardingError(
                f"the cuts ask for factors {low} and {high} of {degree} ranks at once",
                where=next(p.claim.line.where for p in plan if high in (p.before, p.before * p.over)),
                why="head counts of different blocks factor the degree in ways that do not nest",
                help="use another degree, or `replicate` one of the blocks",
            )
    return Mesh(tuple(high // low for low, high in itertools.pairwise(marks)) or (degree,))


def _axes_between(mesh: Mesh, low: int, high: int) -> tuple[int, ...]:
    before = [math.prod(mesh.sizes[:a]) for a in range(len(mesh.sizes))]
    return tuple(a for a in mesh.axes if low <= before[a] < high)


def _layouts(program: Program, cuts: Sequence[Cut], whole: frozenset[str]) -> dict[str, tuple[Layout, ...]]:
    structure = program.structure
    assert structure is not None
    alone = {id(c.atoms[0]): c.axes for c in cuts if len(c.atoms) == 1}
    pairs = {(id(c.atoms[0]), id(c.atoms[1])): c.axes for c in cuts if len(c.atoms) == 2}

    def layout(term: Term) -> Layout:
        term = find(term)
        match term:
            case Atom():
                return Leaf(term.size, alone.get(id(term), ()))
            case Prod():
                found: list[Layout] = []
                inner = [find(f) for f in factors(term)]
                while inner:
                    first = inner.pop(0)
                    if inner and (over := pairs.get((id(first), id(inner[0])))) is not None:
                        found.append(Leaf(size(first) * size(inner.pop(0)), over))
                    else:
                        found.append(layout(first))
                return product(found)
            case Cat():
                return concat(layout(p) for p in segments(term))

    found: dict[str, tuple[Layout, ...]] = {}
    for name, dims in structure.parameters.items():
        if name not in program.captured.parameters:
            continue
        found[name] = tuple(Leaf(size(t)) if name in whole else layout(t) for t in dims)
        for i, a in enumerate(found[name]):
            for b in found[name][i + 1 :]:
                if axes_of(a) & axes_of(b):
                    raise ShardingError(
                        f"two dims of {name} ({a} and {b}) would be cut over the same ranks",
                        where=where(uses[0].node) if (uses := uses_of(program, name)) else _line_of(cuts, name),
                        why="both index spaces are tied to one that the spec cuts",
                        help=f"say `replicate` for {name}, or remove one of the lines that cut it",
                    )
    return found


def _line_of(cuts: Sequence[Cut], name: str) -> Where:
    """The line that cuts a parameter, else its module."""
    lines = (c.claim.line.where for c in cuts if c.parameter == name and c.claim is not None)
    return next(lines, None) or Where(module=name.rpartition(".")[0] or None)


def _check_rows(
    program: Program, rows: list[tuple[Claim, Term, Use]], cut: set[int], wanted: list[tuple[Claim, Term, Use]]
) -> None:
    structure = program.structure
    assert structure is not None
    claimed = {claim.parameter for claim, _, _ in wanted}
    for claim, term, _ in rows:
        space = atoms(term)
        if any(id(a) in cut for a in space):
            continue
        partners = sorted(
            name
            for name, dims in structure.parameters.items()
            if name != claim.parameter
            and name in program.captured.parameters
            and len(dims) > 1
            and any(a is b for d in dims for a in atoms(d) for b in space)
        )
        pin = next((p for a in space for p in a.pins), None)
        if partners and not claimed & set(partners) and not all(a.pins for a in space):
            raise ShardingError(
                f"`row` line without its `column` partner: {claim.parameter}",
                where=claim.line.where,
                why=f"its inner axis comes from {', '.join(partners[:4])}, which no line cuts `column`",
                help="add: " + "  ".join(dict.fromkeys(p.rpartition(".")[0] or p for p in partners[:4])) + "  column",
            )
        raise ShardingError(
            f"`row` does not hold: the inner axis of {claim.parameter} is not one that a `column` line cuts",
            where=where(pin.node) if pin else claim.line.where,
            why=(pin.reason if pin else f"no parameter shares its {size(term)} positions") + f"; {_line(claim)}",
            help="remove the line, or say `column`: its input stays whole on every rank"
            if pin
            else "name the Linear before it with `column`, or remove the `row` line",
        )


def _line(claim: Claim) -> str:
    place = claim.line.where
    return f"{place.file}:{place.line}"


__all__ = ["Use", "axes", "candidates", "cuttable", "divide", "divide_atoms", "uses_of"]
