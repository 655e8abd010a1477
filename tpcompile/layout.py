"""Which positions of a tensor dim a rank holds, written as a term.

``Leaf(size, axes)`` is a run of ``size`` positions, cut over the listed mesh axes (jointly, balanced, the first ranks
get one more when it does not divide); ``Product`` is a row-major product of terms; ``Concat`` puts terms one after the
other. GPT-2's packed ``[q|k|v]`` rows cut by heads are ``3 * heads/tp * head_dim``. One function over these terms
(:func:`runs`) cuts, loads, gathers and checks every tensor; equality of two layouts is equality of held positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Runs = tuple[tuple[int, int], ...]  # (start, length) pieces of a dim, ascending


class LayoutError(Exception):
    """A dim cannot be regrouped or split without breaking a cut; the message says which part is in the way."""


@dataclass(frozen=True)
class Leaf:
    """``size`` positions; cut into contiguous balanced pieces over the mesh axes ``axes`` (row-major) if any."""

    size: int
    axes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.size}" + (f"/{'+'.join(f'tp{a}' for a in self.axes)}" if self.axes else "")


@dataclass(frozen=True)
class Spread(Leaf):
    """Positions cut because a value may be, not because a weight is: made whole wherever an op needs them whole."""


@dataclass(frozen=True)
class Product:
    """Row-major product of terms; build it with :func:`product`."""

    factors: tuple[Layout, ...]

    def __str__(self) -> str:
        return "*".join(map(str, self.factors))


@dataclass(frozen=True)
class Concat:
    """Terms one after the other; build it with :func:`concat`."""

    parts: tuple[Layout, ...]

    def __str__(self) -> str:
        return "[" + "|".join(map(str, self.parts)) + "]"


@dataclass(frozen=True)
class Owned:
    """``total`` rows, each of which belongs to one of several experts, and so to the ranks that hold it.

    Which rows these are only the data know: ``ends`` names the value that says where the rows of each expert end. Every
    rank stores all rows; those of other ranks' experts mean nothing.
    """

    total: int
    experts: Leaf
    ends: str

    def __str__(self) -> str:
        return f"{self.total} rows of {self.experts} experts"


Layout = Leaf | Product | Concat | Owned


@lru_cache(maxsize=65536)
def size(layout: Layout) -> int:
    """Number of positions of the whole (un-cut) dim."""
    match layout:
        case Leaf(n, _) | Owned(n, _, _):
            return n
        case Product(factors):
            return math.prod(size(f) for f in factors)
        case Concat(parts):
            return sum(size(p) for p in parts)


@lru_cache(maxsize=65536)
def axes_of(layout: Layout) -> frozenset[int]:
    """Mesh axes that cut any part of the dim."""
    match layout:
        case Leaf(_, axes):
            return frozenset(axes)
        case Owned(_, experts, _):
            return axes_of(experts)
        case Product(inner) | Concat(inner):
            return frozenset[int]().union(*(axes_of(x) for x in inner))


@lru_cache(maxsize=65536)
def whole_segments(layout: Layout, axis: int) -> bool:
    """Whether some segment of a concatenation is held whole although another one is cut over ``axis``."""
    match layout:
        case Leaf() | Owned():
            return False
        case Product(factors):
            return any(whole_segments(f, axis) for f in factors)
        case Concat(parts):
            having = [axis in axes_of(p) for p in parts]
            return (any(having) and not all(having)) or any(whole_segments(p, axis) for p in parts)


def product(terms: Iterable[Layout]) -> Layout:
    """Row-major product in canonical form: flat, no factors of size 1, neighbouring un-cut leaves merged."""
    flat: list[Layout] = []
    for term in terms:
        for f in term.factors if isinstance(term, Product) else (term,):
            if isinstance(f, Leaf) and not f.axes:
                if f.size == 1:
                    continue
                if flat and isinstance(last := flat[-1], Leaf) and not last.axes:
                    flat[-1] = Leaf(last.size * f.size)
                    continue
            flat.append(f)
    if not flat:
        return Leaf(1)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(terms: Iterable[Layout]) -> Layout:
    """Concatenation in canonical form: flat, nothing empty, un-cut neighbours merged, k equal parts as ``k * part``."""
    flat: list[Layout] = []
    for term in terms:
        for p in term.parts if isinstance(term, Concat) else (term,):
            if size(p) == 0:
                continue
            if flat and not axes_of(p) and not axes_of(flat[-1]):
                flat[-1] = Leaf(size(flat[-1]) + size(p))
            else:
                flat.append(p)
    if not flat:
        return Leaf(0)
    if len(flat) > 1 and all(p == flat[0] for p in flat):
        return product([Leaf(len(flat)), flat[0]])
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def drop(layout: Layout, axes: Iterable[int]) -> Layout:
    """The layout after gathering over ``axes``. A leaf cut over several axes is gathered over all of them or none."""
    gone = frozenset(axes)
    match layout:
        case Leaf(n, cut):
            if not gone & set(cut):
                return layout
            if not set(cut) <= gone:
                raise LayoutError(f"{layout} is cut over axes {cut} as one and cannot be gathered over {sorted(gone)}")
            return Leaf(n)
        case Owned(n, experts, _):
            return Leaf(n) if not axes_of(drop(experts, gone)) else layout
        case Product(factors):
            return product(drop(f, gone) for f in factors)
        case Concat(parts):
            return concat(drop(p, gone) for p in parts)


@dataclass(frozen=True)
class Mesh:
    """A row-major grid of ranks. One axis unless a head count needs the degree factored (4 = 2 * 2)."""

    sizes: tuple[int, ...]

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    @property
    def axes(self) -> tuple[int, ...]:
        """Indices of the mesh axes."""
        return tuple(range(len(self.sizes)))

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Place of a rank in the grid."""
        return tuple(int(c) for c in np.unravel_index(rank, self.sizes))

    def group_name(self, axes: Iterable[int]) -> str:
        """``tp`` for everybody, else ``tp0``, ``tp0+tp1``."""
        chosen = sorted(set(axes))
        return "tp" if chosen == list(self.axes) else "+".join(f"tp{a}" for a in chosen)

    def named(self, text: str) -> str:
        """A text about layouts with the only axis called ``tp`` instead of ``tp0``."""
        return text.replace("/tp0", "/tp") if len(self.sizes) == 1 else text

    def groups(self, axes: Iterable[int]) -> list[list[int]]:
        """Ranks that differ only in ``axes``, one list per group, each in row-major order."""
        chosen = sorted(set(axes))
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.degree):
            rest = tuple(c for a, c in enumerate(self.coordinates(rank)) if a not in chosen)
            found.setdefault(rest, []).append(rank)
        return list(found.values())

    def all_groups(self) -> dict[str, list[list[int]]]:
        """Every group an emitted collective can name."""
        subsets: list[tuple[int, ...]] = [()]
        for axis in self.axes:
            subsets += [(*s, axis) for s in subsets]
        return {self.group_name(s): self.groups(s) for s in subsets if s}


def balanced(n: int, pieces: int, index: int) -> tuple[int, int]:
    """(start, length) of piece ``index`` of ``n`` positions: sizes differ by at most one, the longer ones first."""
    base, extra = divmod(n, pieces)
    return index * base + min(index, extra), base + (index < extra)


def _merge(pieces: Iterable[tuple[int, int]]) -> Runs:
    merged: list[tuple[int, int]] = []
    for start, length in pieces:
        if length == 0:
            continue
        if merged and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return tuple(merged)


@lru_cache(maxsize=65536)
def runs(layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]) -> Runs:
    """Positions held at ``coordinates`` of a mesh of ``sizes``, as ascending runs; local order is this order."""
    match layout:
        case Leaf(n, axes):
            count, index = 1, 0
            for a in axes:
                count, index = count * sizes[a], index * sizes[a] + coordinates[a]
            return _merge([balanced(n, count, index)])
        case Owned():
            raise LayoutError(f"only the data know which of the {layout} a rank holds")
        case Concat(parts):
            out: list[tuple[int, int]] = []
            offset = 0
            for p in parts:
                out += [(offset + s, n) for s, n in runs(p, sizes, coordinates)]
                offset += size(p)
            return _merge(out)
        case Product(factors):
            inner: Runs = ((0, 1),)
            total = 1
            for f in reversed(factors):
                if inner == ((0, total),):
                    inner = tuple((s * total, n * total) for s, n in runs(f, sizes, coordinates))
                else:
                    rows = [i for s, n in runs(f, sizes, coordinates) for i in range(s, s + n)]
                    inner = _merge((i * total + s, n) for i in rows for s, n in inner)
                total *= size(f)
            return inner


def local_size(layout: Layout, mesh: Mesh, rank: int) -> int:
    """Number of positions that ``rank`` holds."""
    return _held(layout, mesh.sizes, mesh.coordinates(rank))


@lru_cache(maxsize=65536)
def _held(layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]) -> int:
    match layout:
        case Leaf():
            return sum(n for _, n in runs(layout, sizes, coordinates))
        case Owned(n, _, _):
            return n
        case Product(factors):
            return math.prod(_held(f, sizes, coordinates) for f in factors)
        case Concat(parts):
            return sum(_held(p, sizes, coordinates) for p in parts)


def positions(layout: Layout, mesh: Mesh, rank: int) -> NDArray[np.int64]:
    """Global positions that ``rank`` holds, ascending."""
    pieces = [np.arange(s, s + n) for s, n in runs(layout, mesh.sizes, mesh.coordinates(rank))]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def same(a: Layout, b: Layout, mesh: Mesh) -> bool:
    """Whether every rank holds the same positions under both layouts."""
    if a == b:
        return True
    if size(a) != size(b) or axes_of(a) != axes_of(b) or Owned in (type(a), type(b)):
        return False
    a, b = _without_common_factors(a, b)
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.degree)]
    return all(runs(a, mesh.sizes, c) == runs(b, mesh.sizes, c) for c in coordinates)


def _without_common_factors(a: Layout, b: Layout) -> tuple[Layout, Layout]:
    """Both without the factors that they share at their ends, which cannot make them differ (a batch can be large)."""
    left, right = ([*x.factors] if isinstance(x, Product) else [x] for x in (a, b))
    for end in (0, -1):
        while left and right and left[end] == right[end]:
            left.pop(end)
            right.pop(end)
    return product(left), product(right)


def relative_runs(before: Layout, after: Layout, mesh: Mesh, rank: int) -> Runs:
    """Where ``rank``'s positions under ``before`` lie inside what it holds under ``after`` (a superset)."""
    if not axes_of(after):
        return runs(before, mesh.sizes, mesh.coordinates(rank))
    held = positions(after, mesh, rank)
    at = np.searchsorted(held, positions(before, mesh, rank))
    breaks = np.flatnonzero(np.diff(at) != 1) + 1
    return tuple((int(piece[0]), len(piece)) for piece in np.split(at, breaks) if len(piece))


def _split_minor(term: Layout, minor: int, mesh: Mesh) -> tuple[Layout, Layout]:
    """``term`` as ``major * minor`` with ``minor`` of the given size, or LayoutError."""
    match term:
        case Owned():
            raise LayoutError(f"{term} cannot be regrouped")
        case Leaf(n, axes):
            if not axes:
                return Leaf(n // minor), Leaf(minor)
            pieces = math.prod(mesh.sizes[a] for a in axes)
            if (n // minor) % pieces == 0:
                return Leaf(n // minor, axes), Leaf(minor)
            raise LayoutError(f"{n} positions cut {pieces} ways do not split into {n // minor} x {minor} whole rows")
        case Concat(parts):
            split: list[tuple[Layout, Layout]] = []
            for p in parts:
                if size(p) % minor:
                    raise LayoutError(f"segments {term} have no common factor {minor}")
                split.append(regroup([p], [size(p) // minor, minor], mesh))  # pyright: ignore[reportArgumentType]
            if any(m != split[0][1] for _, m in split):
                raise LayoutError(f"segments {term} are cut differently inside their last {minor}")
            return concat(m for m, _ in split), split[0][1]
        case Product():
            major, low = regroup([term], [size(term) // minor, minor], mesh)
            return major, low


def regroup(dims: Sequence[Layout], sizes: Sequence[int], mesh: Mesh) -> tuple[Layout, ...]:
    """Layouts of dims of the given ``sizes`` after a row-major reshape of ``dims``.

    Raises:
        LayoutError: a cut would fall apart (e.g. the cut index is in the middle of a new dim).
    """
    stack: list[Layout] = []
    for d in dims:
        stack += d.factors if isinstance(d, Product) else (d,)
    if any(size(f) == 1 and axes_of(f) for f in stack):
        raise LayoutError(f"one position is cut in {[str(d) for d in dims]}")
    stack = [f for f in stack if size(f) != 1]
    result: list[Layout] = []
    for wanted in reversed(sizes):
        taken: list[Layout] = []
        remaining = wanted
        while remaining != 1:
            if not stack:
                raise LayoutError(f"cannot regroup {[str(d) for d in dims]} into {list(sizes)}")
            factor = stack.pop()
            n = size(factor)
            if remaining % n == 0:
                taken.insert(0, factor)
                remaining //= n
            elif n % remaining == 0:
                if isinstance(factor, Product):
                    stack += factor.factors
                    continue
                major, minor = _split_minor(factor, remaining, mesh)
                taken.insert(0, minor)
                remaining = 1
                stack += major.factors if isinstance(major, Product) else (major,)
                stack = [f for f in stack if size(f) != 1]
            else:
                # neither divides: merge with the next un-cut factor, else give up
                if not axes_of(factor) and stack and not axes_of(stack[-1]):
                    stack.append(Leaf(size(stack.pop()) * n))
                    continue
                common = math.gcd(n, remaining)
                if axes_of(factor) or common == 1:
                    raise LayoutError(f"{factor} does not fit a dim of {wanted}")
                taken.insert(0, Leaf(common))
                remaining //= common
                stack.append(Leaf(n // common))
        result.insert(0, product(taken))
    if any(size(f) != 1 for f in stack):
        raise LayoutError(f"cannot regroup {[str(d) for d in dims]} into {list(sizes)}")
    return tuple(result)


def split(layout: Layout, sizes: Sequence[int]) -> tuple[Layout, ...]:
    """Layouts of consecutive pieces of the given ``sizes``.

    Raises:
        LayoutError: a piece would begin inside a cut part.
    """
    pieces: list[Layout] = []
    rest = layout
    for n in sizes[:-1]:
        head, rest = _split_at(rest, n)
        pieces.append(head)
    return (*pieces, rest)


def _split_at(layout: Layout, at: int) -> tuple[Layout, Layout]:
    total = size(layout)
    if at == 0:
        return Leaf(0), layout
    if at == total:
        return layout, Leaf(0)
    match layout:
        case Owned():
            raise LayoutError(f"{layout} cannot be taken apart")
        case Leaf(n, axes):
            if axes:
                raise LayoutError(f"a piece of {at} of {n} positions begins inside the cut {layout}")
            return Leaf(at), Leaf(n - at)
        case Concat(parts):
            head: list[Layout] = []
            for i, p in enumerate(parts):
                if at < size(p):
                    left, right = _split_at(p, at)
                    return concat([*head, left]), concat([right, *parts[i + 1 :]])
                at -= size(p)
                head.append(p)
                if at == 0:
                    return concat(head), concat(parts[i + 1 :])
            raise AssertionError("unreachable: the piece lies inside the dim")
        case Product(factors):
            inner = product(factors[1:])
            if at % size(inner) == 0:
                left, right = _split_at(factors[0], at // size(inner))
                return product([left, inner]), product([right, inner])
            if isinstance(factors[0], Leaf) and not factors[0].axes:
                whole, offset = divmod(at, size(inner))
                left, right = _split_at(inner, offset)
                rest = product([Leaf(factors[0].size - whole - 1), inner]) if factors[0].size > whole + 1 else Leaf(0)
                first = product([Leaf(whole), inner]) if whole else Leaf(0)
                return concat([first, left]), concat([right, rest])
            raise LayoutError(f"a piece of {at} positions begins inside {inner} of {layout}")
