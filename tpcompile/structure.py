"""Index spaces by unification: every tensor dim is a term ``Atom | Prod (row-major) | Cat``, ops tie terms together.

Undirected, and ignorant of placement. Atoms are union-find variables that may later be bound to a finer term, so
"the heads of this block" becomes one atom running through many values and parameters. Where two terms cannot be
matched, or an op needs a dim whole, a :class:`Pin` is recorded: never an exception, it matters only if somebody wants
to cut that atom. Structure only proposes cuts; placement checks every one of them op by op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.fx


@dataclass(frozen=True)
class Pin:
    """Why an atom cannot be cut: ``reason``, at ``node``."""

    reason: str
    node: torch.fx.Node


@dataclass(eq=False)
class Atom:
    """A variable index space of ``size`` positions; ``bound`` once it is known to be a finer term (or another atom)."""

    size: int
    from_parameter: bool = False
    bound: Term | None = None
    pins: list[Pin] = field(default_factory=list[Pin])
    ties: list[torch.fx.Node] = field(default_factory=list[torch.fx.Node])  # ops that tied it to others, in order


@dataclass(frozen=True, eq=False)
class Prod:
    """Row-major product."""

    factors: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Cat:
    """Segments one after the other."""

    parts: tuple[Term, ...]


Term = Atom | Prod | Cat


def size(term: Term) -> int:
    """Number of positions."""
    match term:
        case Atom():
            return term.size
        case Prod(factors):
            return math.prod(map(size, factors))
        case Cat(parts):
            return sum(map(size, parts))


def find(term: Term) -> Term:
    """The term an atom stands for now (with path compression)."""
    if not isinstance(term, Atom) or term.bound is None:
        return term
    root: Term = term
    while isinstance(root, Atom) and root.bound is not None:
        root = root.bound
    while isinstance(term, Atom) and term.bound is not None and term.bound is not root:
        term.bound, term = root, term.bound
    return root


def factors(term: Term) -> list[Term]:
    """Row-major factors, products flattened, factors of size 1 dropped."""
    term = find(term)
    if isinstance(term, Prod):
        return [f for inner in term.factors for f in factors(inner)]
    return [term] if size(term) != 1 else []


def segments(term: Term) -> list[Term]:
    """Segments, concatenations flattened, empty ones dropped."""
    term = find(term)
    if isinstance(term, Cat):
        return [p for inner in term.parts for p in segments(inner)]
    return [term] if size(term) else []


def atoms(term: Term) -> list[Atom]:
    """Unbound atoms, left to right, each once."""
    found: dict[int, Atom] = {}

    def walk(t: Term) -> None:
        t = find(t)
        if isinstance(t, Atom):
            found.setdefault(id(t), t)
        else:
            for inner in t.factors if isinstance(t, Prod) else t.parts:
                walk(inner)

    walk(term)
    return list(found.values())


def same_space(a: Term, b: Term) -> bool:
    """Whether two terms are the same index spaces, put together in the same way."""
    a, b = find(a), find(b)
    match a, b:
        case Prod(), Prod():
            inside = factors(a), factors(b)
        case Cat(), Cat():
            inside = segments(a), segments(b)
        case _:
            return a is b
    return len(inside[0]) == len(inside[1]) and all(same_space(x, y) for x, y in zip(*inside, strict=True))


def prod(terms: Sequence[Term]) -> Term:
    """Row-major product, flat."""
    flat = [f for t in terms for f in factors(t)]
    if len(flat) == 1:
        return flat[0]
    return Prod(tuple(flat)) if flat else Atom(1)


def cat(terms: Sequence[Term]) -> Term:
    """Concatenation, flat."""
    flat = [p for t in terms for p in segments(t)]
    if len(flat) == 1:
        return flat[0]
    return Cat(tuple(flat)) if flat else Atom(0)


def show(term: Term, names: dict[int, str]) -> str:
    """``heads*16`` or ``[a|b]``: atoms by their name in ``names`` (keyed by id), else by size."""
    term = find(term)
    match term:
        case Atom():
            return names.get(id(term), str(term.size))
        case Prod():
            return "*".join(show(f, names) for f in factors(term))
        case Cat():
            return "[" + "|".join(show(p, names) for p in segments(term)) + "]"


class Unifier:
    """Ties terms together on behalf of one node at a time (``node`` is what pins and ties are recorded under)."""

    def __init__(self) -> None:
        self.node: torch.fx.Node | None = None

    def pin(self, term: Term, reason: str) -> None:
        """Record that every atom of ``term`` must stay whole at the current node."""
        assert self.node is not None
        for atom in atoms(term):
            atom.pins.append(Pin(reason, self.node))

    def _bind(self, atom: Atom, to: Term) -> None:
        if self.node is not None and self.node not in atom.ties[-1:]:
            atom.ties.append(self.node)
        for target in atoms(to):
            target.from_parameter |= atom.from_parameter
            target.pins += [p for p in atom.pins if p not in target.pins]
            target.ties += [t for t in atom.ties if t not in target.ties]
        atom.bound = to

    def unify(self, a: Term, b: Term) -> None:
        """Tie two terms of equal size: from now on, cut alike."""
        a, b = find(a), find(b)
        if a is b:
            return
        if size(a) != size(b):
            for term in (a, b):
                self.pin(term, f"sizes {size(a)} and {size(b)} meet here")
            return
        if isinstance(a, Atom) or isinstance(b, Atom):
            atom, other = (a, b) if isinstance(a, Atom) else (b, a)
            assert isinstance(atom, Atom)
            if isinstance(other, Atom) or all(x is not atom for x in atoms(other)):
                self._bind(atom, other)
            else:
                self.pin(other, "the index space would contain itself")
        elif isinstance(a, Cat) and isinstance(b, Cat):
            self._unify_segments(segments(a), segments(b))
        else:
            self._unify_factors(factors(a), factors(b))

    def unify_products(self, left: Sequence[Term], right: Sequence[Term]) -> None:
        """Tie two row-major products dim by dim: the equations of a reshape."""
        self._unify_factors([f for t in left for f in factors(t)], [f for t in right for f in factors(t)])

    def unify_segments(self, whole: Term, parts: Sequence[Term]) -> None:
        """Tie a term to its consecutive segments: the equation of a slice, a split or a concatenation."""
        self.unify(whole, cat(parts))

    def _unify_factors(self, xs: list[Term], ys: list[Term]) -> None:
        while xs and ys:
            x, y = find(xs.pop()), find(ys.pop())
            if isinstance(x, Prod) or isinstance(y, Prod):
                if isinstance(x, Prod) and isinstance(y, Prod) and size(x) == size(y):
                    self._unify_factors(factors(x), factors(y))
                else:
                    xs += factors(x)
                    ys += factors(y)
                continue
            if size(x) == size(y):
                self.unify(x, y)
                continue
            big, small, bigs = (x, y, xs) if size(x) > size(y) else (y, x, ys)
            major = self._split_minor(big, small) if size(big) % size(small) == 0 else None
            if major is None:
                for term in (*xs, *ys, x, y):
                    self.pin(term, "a reshape mixes its positions with those of another dim")
                return
            bigs += factors(major)
        for term in (*xs, *ys):
            if size(term) != 1:
                self.pin(term, "a reshape leaves it without a counterpart")

    def _split_minor(self, term: Term, minor: Term) -> Term | None:
        """Make ``term = major * minor`` and return the major part; None when its segments do not allow it."""
        n = size(minor)
        match term:
            case Atom():
                major = Atom(term.size // n)
                self._bind(term, Prod((major, minor)))
                return major
            case Cat():
                majors: list[Term] = []
                for part in segments(term):
                    if size(part) % n:
                        return None
                    if size(part) == n:
                        self.unify(part, minor)
                        majors.append(Atom(1))
                        continue
                    major = Atom(size(part) // n)
                    self._unify_factors(factors(part), [major, *factors(minor)])
                    majors.append(major)
                return Cat(tuple(majors))
            case Prod():
                raise AssertionError("products are flattened before they are split")

    def _unify_segments(self, xs: list[Term], ys: list[Term]) -> None:
        while xs and ys:
            x, y = find(xs.pop(0)), find(ys.pop(0))
            if isinstance(x, Cat) or isinstance(y, Cat):  # an earlier pair has taken it apart
                xs, ys = [*segments(x), *xs], [*segments(y), *ys]
                continue
            if size(x) == size(y):
                self.unify(x, y)
                continue
            big, small, rest = (x, y, xs) if size(x) > size(y) else (y, x, ys)
            pieces = self._split_at(big, size(small))
            if pieces is None:
                for term in (*xs, *ys, x, y):
                    self.pin(term, f"segments of {size(x)} and {size(y)} positions overlap")
                return
            self.unify(pieces[0], small)
            rest.insert(0, pieces[1])

    def _split_at(self, term: Term, at: int) -> tuple[Term, Term] | None:
        """``term`` as two segments, the first of ``at`` positions."""
        match term:
            case Atom():
                head, rest = Atom(at, term.from_parameter), Atom(term.size - at, term.from_parameter)
                self._bind(term, Cat((head, rest)))
                return head, rest
            case Prod():
                first, *others = factors(term)
                inner = prod(others)
                if at % size(inner):
                    return None
                if isinstance(first, Cat):
                    before, after, room = list[Term](), list[Term](), at // size(inner)
                    for part in segments(first):
                        if size(part) <= room:
                            before.append(part)
                            room -= size(part)
                        elif room:
                            pieces = self._split_at(find(part), room)
                            if pieces is None:
                                return None
                            before.append(pieces[0])
                            after.append(pieces[1])
                            room = 0
                        else:
                            after.append(part)
                    return prod([cat(before), inner]), prod([cat(after), inner])
                pieces = self._split_at(first, at // size(inner))
                return None if pieces is None else (prod([pieces[0], inner]), prod([pieces[1], inner]))
            case Cat():
                raise AssertionError("concatenations are flattened before they are split")
