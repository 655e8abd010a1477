"""What one op asks of its operands and makes of them; and every way from one placement to another, as emitted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from rule_samples import bools, call, imaginary, ints, real

from tpcompile.errors import ShardingError
from tpcompile.layout import Concat, Layout, Leaf, Mesh, Product, axes_of, whole_segments
from tpcompile.passes.place import needs_grad
from tpcompile.placement import Placement, PlacementError, Solution, cut_as, solve, uncut
from tpcompile.rule_truth import Case, cut_layouts, emission_with, execute, grid_placements, placements
from tpcompile.rules import RULES
from tpcompile.sentence import Sentence

TWO = Mesh((2,))
GRID = Mesh((2, 2))


def sentence(op: str, *args: Any, **kwargs: Any) -> Sentence:
    return Case(call(op, *args, **kwargs)).sentence(RULES[f"aten.{op}"])


def whole(*shape: int, letter: str = "R", mesh: Mesh = TWO) -> Placement:
    return uncut(shape, mesh, letter)


def cut(*dims: int | Layout, letter: str = "R", mesh: Mesh = TWO) -> Placement:
    return cut_as([Leaf(d) if isinstance(d, int) else d for d in dims], mesh, letter)


def shown(solution: Solution) -> tuple[list[str], list[str]]:
    return [str(p) for p in solution.operands], [str(p) for p in solution.results]


# ---------------------------------------------------------------------------------------------- placements


def test_placements_print_letters_and_cuts() -> None:
    assert str(whole(4, 6)) == "R"
    assert str(cut(4, Leaf(6, (0,)))) == "S(1:6/tp0)"
    assert str(cut(Leaf(4, (1,)), 6, letter="H", mesh=GRID)) == "HS(0:4/tp1)"
    assert whole(4).replicated
    assert not whole(4, letter="H").replicated
    assert whole(4, 6, mesh=GRID).with_letters("PH") == Placement(("P", "H"), (Leaf(4), Leaf(6)))


# ---------------------------------------------------------------------------------------------- one op


LINEAR = ("linear.default", real(3, 6), real(4, 6))
HEADS = Leaf(4, (0,))
HIDDEN = Leaf(6, (0,))
SEGMENTS = Concat((Leaf(4, (0,)), Leaf(2)))


@pytest.mark.parametrize(
    ("ins", "operands", "results"),
    [
        ([whole(3, 6), whole(4, 6)], ["R", "R"], ["R"]),
        ([whole(3, 6), cut(HEADS, 6)], ["H", "S(0:4/tp0)"], ["S(1:4/tp0)"]),  # column: f before it
        ([cut(3, HIDDEN), cut(4, HIDDEN)], ["S(1:6/tp0)", "S(1:6/tp0)"], ["P"]),  # row: g after it
        ([whole(3, 6), cut(4, HIDDEN)], ["S(1:6/tp0)", "S(1:6/tp0)"], ["P"]),  # its input is cut for it
        ([cut(Leaf(3, (0,)), 6), whole(4, 6)], ["S(0:3/tp0)", "H"], ["S(0:3/tp0)"]),  # data: f on the weight
        ([whole(3, 6, letter="H"), whole(4, 6)], ["H", "H"], ["H"]),
        ([whole(3, 6, letter="P"), whole(4, 6)], ["R", "R"], ["R"]),  # all-reduced first
        ([whole(3, 6, letter="P"), cut(HEADS, 6)], ["H", "S(0:4/tp0)"], ["S(1:4/tp0)"]),
    ],
)
def test_a_linear(ins: list[Placement], operands: list[str], results: list[str]) -> None:
    assert shown(solve(sentence(*LINEAR), ins, TWO)) == (operands, results)


def test_early_runs_a_replicated_op_behind_f() -> None:
    found = solve(sentence(*LINEAR), [whole(3, 6), whole(4, 6)], TWO, early=frozenset({0}))
    assert shown(found) == (["H", "H"], ["H"])


@pytest.mark.parametrize(
    ("op", "ins", "operands", "result"),
    [
        (LINEAR, "PR", ["P", "H"], "P"),  # linear in each: one partial operand passes
        (LINEAR, "PP", ["R", "R"], "R"),  # but not two
        (("add.Tensor", real(3, 6), real(3, 6)), "PR", ["P", "P"], "P"),  # linear in both together
        (("add.Tensor", real(3, 6), real(3, 6)), "PH", ["P", "P"], "P"),
        (("add.Tensor", real(3, 6), real(3, 6)), "PP", ["P", "P"], "P"),
        (("add.Tensor", real(3, 6), 0.5), "P", ["R"], "R"),  # each rank would add its own 0.5
        (("div.Tensor", real(3, 6), real(3, 6)), "PR", ["P", "H"], "P"),
        (("div.Tensor", real(3, 6), real(3, 6)), "RP", ["R", "R"], "R"),
        (("exp.default", real(3, 6)), "P", ["R"], "R"),
        (("sum.dim_IntList", real(3, 6), [1]), "P", ["P"], "P"),
        (("cat.default", [real(3, 6), real(2, 6)]), "PR", ["P", "P"], "P"),
        (("where.self", bools(3, 6), real(3, 6), real(3, 6)), "RPP", ["R", "R", "R"], "R"),
    ],
)
def test_a_partial_sum_passes_where_the_op_is_linear(
    op: tuple[Any, ...], ins: str, operands: list[str], result: str
) -> None:
    found = sentence(*op)
    shapes = [tuple(found.sizes[x] if x else 1 for x in labels) for labels in found.operands]
    given = [whole(*shape, letter=letter) for shape, letter in zip(shapes, ins, strict=True)]
    assert shown(solve(found, given, TWO, keep=True)) == (operands, [result])
    assert "P" not in "".join(shown(solve(found, given, TWO))[1]), "partial sums are reduced at once unless asked"


def test_on_two_axes_each_decides_for_itself() -> None:
    x = cut(3, Leaf(6, (0,)), mesh=GRID)
    w = cut(Leaf(4, (1,)), 6, mesh=GRID)
    found = solve(sentence(*LINEAR), [x, w], GRID)
    assert shown(found) == (["SH(1:6/tp0)", "SS(0:4/tp1, 1:6/tp0)"], ["PS(1:4/tp1)"])


def test_the_finer_cut_of_an_index_wins() -> None:
    """Queries cut over all ranks meet keys cut over kv heads: the keys are cut further, without communication."""
    coarse, fine = Product((Leaf(2, (0,)), Leaf(2))), Product((Leaf(2, (0,)), Leaf(2, (1,))))
    found = solve(sentence("mul.Tensor", real(4), real(4)), [cut(coarse, mesh=GRID), cut(fine, mesh=GRID)], GRID)
    assert shown(found)[0] == ["SS(0:2/tp0*2/tp1)"] * 2
    joint = cut(Leaf(4, (0, 1)), mesh=GRID)
    with pytest.raises(PlacementError, match="cut as 4/tp0 by one operand and as 4/tp0\\+tp1 by another"):
        solve(sentence("mul.Tensor", real(4), real(4)), [cut(Leaf(4, (0,)), mesh=GRID), joint], GRID)


def test_reshapes_and_segments_carry_layouts() -> None:
    packed = Product((Leaf(3), Leaf(2, (0,)), Leaf(2)))
    found = solve(sentence("view.default", real(5, 12), [5, 3, 2, 2]), [cut(5, packed)], TWO)
    assert shown(found)[1] == ["S(2:2/tp0)"]
    found = solve(sentence("split.sizes", real(5, 6), [4, 2], 1), [cut(5, SEGMENTS)], TWO)
    assert shown(found)[1] == ["S(1:4/tp0)", "H"]
    found = solve(sentence("cat.default", [real(5, 4), real(5, 2)], 1), [cut(5, HEADS), whole(5, 2)], TWO)
    assert shown(found) == (["S(1:4/tp0)", "H"], ["S(1:[4/tp0|2])"])


@pytest.mark.parametrize(
    ("op", "ins", "message", "operand"),
    [
        (
            ("softmax.int", real(3, 6), 1),
            [cut(3, HIDDEN)],
            "softmax runs over the whole axis, but it is cut as 6/tp0",
            0,
        ),
        (
            ("add.Tensor", real(6, 6), real(6, 6)),
            [cut(HIDDEN, 6), cut(6, HIDDEN)],
            "two of its axes (6/tp0, 6/tp0) are cut over the same ranks",
            0,
        ),
        (
            ("add.Tensor", real(6), real(6)),
            [cut(HIDDEN), cut(Product((Leaf(2), Leaf(3, (0,)))))],
            "cut as 6/tp0 by one operand and as 2*3/tp0 by another",
            1,
        ),
        (("linear.default", real(3, 6), real(4, 6)), [whole(3, 6), cut(4, SEGMENTS)], "add the segments that every", 1),
        (("mean.dim", real(3, 6), [1]), [cut(3, SEGMENTS)], "would add the segments that every rank holds once", 0),
        (("unbind.int", real(3, 6), 1), [cut(3, HIDDEN)], "unbind takes it apart", 0),
        (("view.default", real(5, 6), [5, 3, 2]), [cut(5, Leaf(6, (0,)))], "do not split into 3 x 2 whole rows", None),
        (("split.sizes", real(5, 6), [4, 2], 1), [cut(5, HIDDEN)], "begins inside the cut 6/tp0", None),
        (("add.Tensor", real(1, 6), real(4, 6)), [cut(Leaf(1, (0,)), 6), whole(4, 6)], "one position is cut", 0),
        (("glu.default", real(3, 4)), [cut(3, Leaf(4, (0,)))], "a gated unit pairs its two halves", None),
    ],
)
def test_refusals_say_what_is_in_the_way(
    op: tuple[Any, ...], ins: list[Placement], message: str, operand: int | None
) -> None:
    with pytest.raises(PlacementError) as raised:
        solve(sentence(*op), ins, TWO)
    assert message in str(raised.value)
    assert raised.value.operand == operand


def test_a_derived_label_that_vanishes_is_not_overlooked() -> None:
    """A cut that a reshape equation moves to an index that no result has would be lost without a word."""
    lost = Sentence((("d",),), (("b",),), {"d": 4, "a": 2, "b": 2}, products=((("d",), ("a", "b")),))
    with pytest.raises(PlacementError, match="the axis cut as 2/tp0 does not reach its result"):
        solve(lost, [cut(Leaf(4, (0,)))], TWO)
    kept = solve(lost, [cut(Product((Leaf(2), Leaf(2, (0,)))))], TWO)
    assert shown(kept)[1] == ["S(0:2/tp0)"]


# ---------------------------------------------------------------------------------------------- from one to another

CLONE = call("clone.default", real(4, 6))


def reachable(have: Placement, want: Placement) -> bool:
    """What ops may ask: a cut stays or is refined; everything may be gathered whole, for an output."""
    if want.replicated:
        return True
    mesh_axes = range(len(have.letters))
    for a in mesh_axes:
        if have.letters[a] == "S":
            before = [d for d, x in enumerate(have.dims) if a in axes_of(x)]
            if want.letters[a] != "S" or any(have.dims[d] != want.dims[d] for d in before):
                return False
    return True


def mixed(placed: Placement) -> bool:
    return any(whole_segments(x, a) for x in placed.dims for a in axes_of(x))


def check_all_ways(case: Case, every: list[Placement], mesh: Mesh) -> tuple[int, int]:
    """Run every reachable way; how many were run and how many refused."""
    ran = refused = 0
    with emission_with(RULES[case.sample.op]):
        for have, want in itertools.product(every, every):
            if not reachable(have, want):
                continue
            try:
                error = execute(case, [have], mesh, Solution((want,), (want,), ""))
            except ShardingError:
                assert mixed(have), "only segments held whole cannot be gathered"
                refused += 1
                continue
            assert error is None, f"{have} -> {want}: {error}"
            ran += 1
    return ran, refused


@pytest.mark.parametrize("degree", [2, 3])
def test_every_way_between_placements(degree: int) -> None:
    mesh = Mesh((degree,))
    case = Case(CLONE)
    ran, refused = check_all_ways(case, placements(case.inputs[0], mesh), mesh)
    assert ran >= 40
    assert refused == sum(whole_segments(x, 0) for n in (4, 6) for x in cut_layouts(n, mesh))


def test_every_way_between_placements_on_two_axes() -> None:
    case = Case(CLONE)
    ran, _ = check_all_ways(case, grid_placements(case.inputs[0], GRID), GRID)
    assert ran > 300


def test_every_way_between_placements_without_a_gradient() -> None:
    """Without a gradient H is R, and nothing but the value counts."""
    case = Case(call("clone.default", ints(4, 6)))
    ran, _ = check_all_ways(case, placements(case.inputs[0], TWO), TWO)
    assert ran > 50


def test_a_way_that_does_not_arrive_is_a_defect() -> None:
    case = Case(CLONE)
    with emission_with(RULES[CLONE.op]), pytest.raises(AssertionError, match="no way from"):
        execute(case, [cut(Leaf(4, (0,)), 6)], TWO, Solution((cut(4, HIDDEN),), (cut(4, HIDDEN),), ""))


@pytest.mark.parametrize(
    ("have", "wrong", "right"),
    [
        (whole(4, 6), "H", "R"),
        (whole(4, 6, letter="P"), "R", "P"),
        (whole(4, 6, letter="H"), "R", "H"),
        (cut(4, HIDDEN), "R", "S"),
    ],
)
def test_the_runner_sees_a_state_that_is_not_what_it_says(have: Placement, wrong: str, right: str) -> None:
    """Negative control: the same call with the letter of its result mistyped."""
    case = Case(CLONE)
    with emission_with(RULES[CLONE.op]):
        assert execute(case, [have], TWO, Solution((have,), (have,), "")) is None
        claimed = have.with_letters([wrong]) if right != "S" else uncut((4, 6), TWO)
        assert execute(case, [have], TWO, Solution((have,), (claimed,), "")) is not None


def test_gradients_flow_through_complex_values() -> None:
    """Rotary embeddings as complex numbers: what they touch needs its f like any other value."""
    case = Case(call("view_as_real.default", imaginary(4, 6)))
    assert needs_grad(case.program(TWO, {})) == {"x0", "view_as_real_default"}
    case = Case(call("argmax.default", real(4, 6)))
    assert needs_grad(case.program(TWO, {})) == {"x0"}


def test_a_lookup_is_not_differentiable_in_its_ids() -> None:
    case = Case(call("embedding.default", real(4, 6), ints(3, below=4)))
    assert case.differentiable == [True, False]
    assert case.grads[0] is not None
    assert case.grads[1] is None
    assert isinstance(case.inputs[1], torch.Tensor)
