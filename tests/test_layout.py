"""Layouts against a model that says, position by position, who holds it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from tpcompile.layout import (
    Concat,
    Layout,
    LayoutError,
    Leaf,
    Mesh,
    Owned,
    Product,
    axes_of,
    balanced,
    concat,
    drop,
    local_size,
    positions,
    product,
    regroup,
    relative_runs,
    runs,
    same,
    size,
    split,
    whole_segments,
)

MESHES = [Mesh(sizes) for sizes in [(2,), (3,), (4,), (2, 2), (2, 3), (3, 2)]]

# A position is held by the ranks whose coordinates agree with its condition: {mesh axis: coordinate}.
Condition = dict[int, int]


def conditions(layout: Layout, mesh: Mesh) -> list[Condition]:
    """The model: the condition of every position, straight from what the three kinds of terms mean."""
    match layout:
        case Leaf(n, axes):
            shape = [mesh.sizes[a] for a in axes]
            ranks = math.prod(shape)
            lengths = [n // ranks + (i < n % ranks) for i in range(ranks)]
            pieces = [i for i, length in enumerate(lengths) for _ in range(length)]
            return [dict(zip(axes, map(int, np.unravel_index(i, shape)), strict=True)) for i in pieces]
        case Product(factors):
            every = itertools.product(*(conditions(f, mesh) for f in factors))
            return [{a: c for part in parts for a, c in part.items()} for parts in every]
        case Concat(parts):
            return [c for p in parts for c in conditions(p, mesh)]
        case Owned():
            raise AssertionError("only the data know its positions")


def held(found: Sequence[Condition], mesh: Mesh, rank: int) -> list[int]:
    own = mesh.coordinates(rank)
    return [i for i, c in enumerate(found) if all(own[a] == x for a, x in c.items())]


@st.composite
def layouts(draw: st.DrawFn, mesh: Mesh, axes: frozenset[int] | None = None, depth: int = 2, limit: int = 36) -> Layout:
    """Any canonical term of at most ``limit`` positions; factors of a product are cut over different axes."""
    free = frozenset(mesh.axes) if axes is None else axes
    kind = draw(st.sampled_from(["leaf", "product", "concat"])) if depth and limit >= 4 else "leaf"
    if kind == "product":
        owner = {a: draw(st.integers(0, 2)) for a in free}
        first = draw(layouts(mesh, frozenset(a for a in free if owner[a] == 0), depth - 1, max(limit // 3, 1)))
        rest = frozenset(a for a in free if owner[a] == 1)
        second = draw(layouts(mesh, rest, depth - 1, max(limit // max(size(first), 1), 1)))
        return product([first, second])
    if kind == "concat":
        parts = draw(st.integers(2, 3))
        return concat([draw(layouts(mesh, free, depth - 1, limit // parts)) for _ in range(parts)])
    chosen = tuple(a for a in sorted(free) if draw(st.booleans()))
    return Leaf(draw(st.integers(min(2, limit) if chosen else 1, limit)), chosen if limit > 1 else ())


@st.composite
def on_mesh(draw: st.DrawFn, count: int = 1, disjoint: bool = False) -> tuple[Mesh, list[Layout]]:
    mesh = draw(st.sampled_from(MESHES))
    if not disjoint:
        return mesh, [draw(layouts(mesh)) for _ in range(count)]
    owner = {a: draw(st.integers(0, count - 1)) for a in mesh.axes}
    each = [frozenset(a for a in mesh.axes if owner[a] == i) for i in range(count)]
    return mesh, [draw(layouts(mesh, axes, limit=12)) for axes in each]


def uncut(layout: Layout) -> bool:
    return not axes_of(layout)


# ---------------------------------------------------------------------------------------------- positions


@given(on_mesh())
def test_runs_are_the_positions_of_the_model(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, (layout,) = given_
    model = conditions(layout, mesh)
    assert len(model) == size(layout)
    for rank in range(mesh.degree):
        expected = held(model, mesh, rank)
        assert positions(layout, mesh, rank).tolist() == expected
        assert local_size(layout, mesh, rank) == len(expected)
        found = runs(layout, mesh.sizes, mesh.coordinates(rank))
        assert all(n > 0 for _, n in found)
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found)), "neighbouring runs are merged"


@given(on_mesh())
def test_every_position_is_held_once_along_the_axes_that_cut_it(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, (layout,) = given_
    count = np.zeros(size(layout), dtype=int)
    for rank in range(mesh.degree):
        count[positions(layout, mesh, rank)] += 1
    for i, condition in enumerate(conditions(layout, mesh)):
        assert count[i] == math.prod(mesh.sizes[a] for a in mesh.axes if a not in condition)


@given(on_mesh())
def test_segments_held_whole(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, (layout,) = given_
    assume(all(n for n in _leaf_sizes(layout)))
    for axis in mesh.axes:
        having = [axis in c for c in conditions(layout, mesh)]
        assert whole_segments(layout, axis) == (any(having) and not all(having))


def _leaf_sizes(layout: Layout) -> list[int]:
    match layout:
        case Leaf(n, _):
            return [n]
        case Product(inner) | Concat(inner):
            return [n for x in inner for n in _leaf_sizes(x)]
        case Owned(n, _, _):
            return [n]


@given(st.integers(0, 40), st.integers(1, 9))
def test_balanced_pieces_follow_each_other(n: int, pieces: int) -> None:
    found = [balanced(n, pieces, i) for i in range(pieces)]
    assert [start for start, _ in found] == list(itertools.accumulate((k for _, k in found[:-1]), initial=0))
    assert sum(k for _, k in found) == n
    lengths = [k for _, k in found]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


# ---------------------------------------------------------------------------------------------- canonical forms


@given(on_mesh(3, disjoint=True))
def test_product_keeps_positions(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, terms = given_
    found = product(terms)
    assert conditions(found, mesh) == conditions(Product(tuple(terms)), mesh)
    assert _is_canonical(found)


@given(on_mesh(3))
def test_concat_keeps_positions(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, terms = given_
    found = concat(terms)
    assert conditions(found, mesh) == conditions(Concat(tuple(terms)), mesh)
    if isinstance(found, Concat):
        assert len(found.parts) > 1
        assert not any(isinstance(p, Concat) for p in found.parts)
        assert not any(uncut(a) and uncut(b) for a, b in itertools.pairwise(found.parts))


def _is_canonical(layout: Layout) -> bool:
    if not isinstance(layout, Product):
        return True
    plain = [isinstance(f, Leaf) and not f.axes for f in layout.factors]
    return (
        len(layout.factors) > 1
        and not any(isinstance(f, Product) or (p and size(f) == 1) for f, p in zip(layout.factors, plain, strict=True))
        and not any(a and b for a, b in itertools.pairwise(plain))
    )


def test_rows_that_only_the_data_know_are_never_listed() -> None:
    mesh, rows = Mesh((2,)), Owned(6, Leaf(4, (0,)), "ends")
    assert (size(rows), axes_of(rows), local_size(rows, mesh, 1)) == (6, frozenset({0}), 6), "all rows are stored"
    assert drop(rows, [0]) == Leaf(6)
    assert same(rows, Owned(6, Leaf(4, (0,)), "ends"), mesh)
    assert not same(rows, Owned(6, Leaf(4, (0,)), "other ends"), mesh)
    assert not same(rows, Leaf(6, (0,)), mesh)
    assert regroup([rows, Leaf(2)], [6, 2], mesh) == (rows, Leaf(2))
    for refused in (
        lambda: runs(rows, mesh.sizes, (0,)),
        lambda: regroup([rows], [3, 2], mesh),
        lambda: split(rows, [2, 4]),
    ):
        with pytest.raises(LayoutError):
            refused()


def test_equal_segments_are_a_product() -> None:
    heads = Product((Leaf(4, (0,)), Leaf(8)))
    assert concat([heads, heads, heads]) == Product((Leaf(3), Leaf(4, (0,)), Leaf(8)))
    assert concat([Leaf(2), Leaf(0), Leaf(3)]) == Leaf(5)
    assert concat([]) == Leaf(0)
    assert product([]) == Leaf(1)
    assert product([Leaf(1), Leaf(4, (0,)), Leaf(1)]) == Leaf(4, (0,))


@given(on_mesh(), st.data())
def test_drop_forgets_the_conditions_on_the_axes(given_: tuple[Mesh, list[Layout]], data: st.DataObject) -> None:
    mesh, (layout,) = given_
    gone = frozenset(a for a in mesh.axes if data.draw(st.booleans()))
    try:
        found = drop(layout, gone)
    except LayoutError:
        assert any(gone & set(x) and not set(x) <= gone for x in _leaf_axes(layout))
        return
    expected = [{a: x for a, x in c.items() if a not in gone} for c in conditions(layout, mesh)]
    assert conditions(found, mesh) == expected


def _leaf_axes(layout: Layout) -> list[tuple[int, ...]]:
    match layout:
        case Leaf(_, axes):
            return [axes]
        case Product(inner) | Concat(inner):
            return [a for x in inner for a in _leaf_axes(x)]
        case Owned():
            raise AssertionError("only the data know its positions")


# ---------------------------------------------------------------------------------------------- comparing


@given(on_mesh(3))
def test_same_is_an_equivalence_of_held_positions(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, terms = given_
    twins = [*terms, *(product([Leaf(1), t]) for t in terms)]
    for a, b in itertools.product(twins, repeat=2):
        equal = size(a) == size(b) and all(
            positions(a, mesh, r).tolist() == positions(b, mesh, r).tolist() for r in range(mesh.degree)
        )
        assert same(a, b, mesh) == same(b, a, mesh) == (equal and axes_of(a) == axes_of(b))
    assert all(same(t, product([Leaf(1), t]), mesh) for t in terms)


def test_same_sees_through_how_a_cut_is_written() -> None:
    mesh = Mesh((2,))
    assert same(Leaf(8, (0,)), Product((Leaf(4, (0,)), Leaf(2))), mesh)
    assert not same(Leaf(8, (0,)), Product((Leaf(2), Leaf(4, (0,)))), mesh)
    assert not same(Leaf(8, (0,)), Leaf(8), mesh)


@given(on_mesh(), st.data())
def test_relative_runs_find_the_cut_in_the_gathered(given_: tuple[Mesh, list[Layout]], data: st.DataObject) -> None:
    mesh, (before,) = given_
    gone = frozenset(a for a in mesh.axes if data.draw(st.booleans()))
    try:
        after = drop(before, gone)
    except LayoutError:
        assume(False)
        raise
    for rank in range(mesh.degree):
        whole = positions(after, mesh, rank)
        picked = [i for s, n in relative_runs(before, after, mesh, rank) for i in range(s, s + n)]
        assert whole[picked].tolist() == positions(before, mesh, rank).tolist()


# ---------------------------------------------------------------------------------------------- reshaping


def flat(dims: Sequence[Layout], mesh: Mesh, rank: int) -> list[int]:
    """Row-major positions of a block that a rank holds, by numpy."""
    shape = [size(d) for d in dims]
    block = np.arange(math.prod(shape)).reshape(shape)
    return block[np.ix_(*(positions(d, mesh, rank) for d in dims))].ravel().tolist() if dims else [0]


@st.composite
def factorized(draw: st.DrawFn, n: int) -> list[int]:
    """Sizes of dims that multiply to ``n``."""
    sizes = list[int]()
    while n > 1:
        sizes.append(draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0])))
        n //= sizes[-1]
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return draw(st.permutations(sizes))


@given(on_mesh(2, disjoint=True), st.data())
def test_regroup_is_a_reshape(given_: tuple[Mesh, list[Layout]], data: st.DataObject) -> None:
    mesh, dims = given_
    sizes = data.draw(factorized(math.prod(size(d) for d in dims)))
    try:
        found = regroup(dims, sizes, mesh)
    except LayoutError:
        assert not all(map(uncut, dims)), "nothing is in the way of an un-cut reshape"
        return
    assert [size(d) for d in found] == sizes
    for rank in range(mesh.degree):
        assert flat(found, mesh, rank) == flat(dims, mesh, rank)


@given(on_mesh(2, disjoint=True))
def test_regroup_undoes_itself(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, dims = given_
    try:
        (joined,) = regroup(dims, [math.prod(size(d) for d in dims)], mesh)
    except LayoutError:
        pytest.fail("dims can always be flattened into one")
    back = regroup([joined], [size(d) for d in dims], mesh)
    assert all(same(a, b, mesh) for a, b in zip(back, dims, strict=True))


@given(on_mesh(), st.data())
def test_split_hands_out_consecutive_windows(given_: tuple[Mesh, list[Layout]], data: st.DataObject) -> None:
    mesh, (layout,) = given_
    ends = sorted(data.draw(st.lists(st.integers(0, size(layout)), max_size=3)))
    sizes = [b - a for a, b in itertools.pairwise([0, *ends, size(layout)])]
    try:
        found = split(layout, sizes)
    except LayoutError:
        assert not uncut(layout), "nothing is in the way of splitting an un-cut dim"
        return
    assert [size(p) for p in found] == sizes
    model = conditions(layout, mesh)
    for part, start in zip(found, [0, *ends], strict=True):
        assert conditions(part, mesh) == model[start : start + size(part)]


@given(on_mesh(3))
def test_split_undoes_concat(given_: tuple[Mesh, list[Layout]]) -> None:
    mesh, terms = given_
    found = split(concat(terms), [size(t) for t in terms])
    assert all(same(a, b, mesh) for a, b in zip(found, terms, strict=True))


@pytest.mark.parametrize(
    ("dims", "sizes", "expected"),
    [
        ([Leaf(32, (0,))], [4, 8], ["4/tp0", "8"]),  # heads * head_dim
        ([Product((Leaf(3), Leaf(4, (0,)), Leaf(8)))], [3, 4, 8], ["3", "4/tp0", "8"]),  # packed q, k, v
        ([Product((Leaf(4, (0,)), Leaf(3), Leaf(8)))], [4, 24], ["4/tp0", "24"]),  # interleaved
        ([Leaf(4, (0,)), Leaf(8)], [32], ["4/tp0*8"]),
        ([Leaf(9, (0,)), Leaf(8)], [72], ["9/tp0*8"]),  # 9 heads on 2 ranks: 5 and 4
        ([Product((Leaf(9, (0,)), Leaf(8)))], [9, 8], ["9/tp0", "8"]),
        ([Leaf(2), Leaf(3), Leaf(4, (0,))], [3, 2, 4], ["3", "2", "4/tp0"]),
        ([Concat((Product((Leaf(4, (0,)), Leaf(2))), Leaf(2)))], [5, 2], ["[4/tp0|1]", "2"]),
    ],
)
def test_regroup_of_what_models_do(dims: list[Layout], sizes: list[int], expected: list[str]) -> None:
    assert [str(d) for d in regroup(dims, sizes, Mesh((2,)))] == expected


@pytest.mark.parametrize(
    ("dims", "sizes", "message"),
    [
        ([Leaf(36, (0,))], [9, 4], r"36 positions cut 2 ways do not split into 9 x 4 whole rows"),
        ([Leaf(6, (0,))], [4], r"6/tp0 does not fit a dim of 4"),
        ([Leaf(2), Leaf(3, (0,))], [3, 2], r"3/tp0 does not fit a dim of 2"),
        ([Concat((Leaf(2, (0,)), Leaf(4)))], [3, 2], r"segments \[2/tp0\|4\] are cut differently inside their last 2"),
        ([Concat((Leaf(4, (0,)), Leaf(4)))], [4, 2], None),
        ([Concat((Leaf(3, (0,)), Leaf(3)))], [3, 2], r"segments \[3/tp0\|3\] have no common factor 2"),
        ([Leaf(1, (0,)), Leaf(4)], [4], r"one position is cut"),
        ([Leaf(4)], [2], r"cannot regroup"),
    ],
)
def test_regroup_names_what_is_in_the_way(dims: list[Layout], sizes: list[int], message: str | None) -> None:
    mesh = Mesh((2,))
    if message is None:
        assert regroup(dims, sizes, mesh)
        return
    with pytest.raises(LayoutError, match=message):
        regroup(dims, sizes, mesh)


@pytest.mark.parametrize("sizes", [[2, 6], [5, 3]])
def test_split_names_what_is_in_the_way(sizes: list[int]) -> None:
    with pytest.raises(LayoutError, match="begins inside"):
        split(Leaf(8, (0,)), sizes)


# ---------------------------------------------------------------------------------------------- meshes


def test_groups_of_a_mesh() -> None:
    mesh = Mesh((2, 3))
    assert mesh.degree == 6
    assert mesh.coordinates(4) == (1, 1)
    assert mesh.groups([0]) == [[0, 3], [1, 4], [2, 5]]
    assert mesh.groups([1]) == [[0, 1, 2], [3, 4, 5]]
    assert mesh.groups([1, 0]) == [[0, 1, 2, 3, 4, 5]]
    assert [mesh.group_name(a) for a in ([0], [1], [1, 0])] == ["tp0", "tp1", "tp"]
    assert set(mesh.all_groups()) == {"tp0", "tp1", "tp"}
    assert set(Mesh((2, 2, 2)).all_groups()) == {"tp", "tp0", "tp1", "tp2", "tp0+tp1", "tp0+tp2", "tp1+tp2"}
    assert Mesh((4,)).all_groups() == {"tp": [[0, 1, 2, 3]]}
