"""Every op rule is true: cut in every way, run per rank, joined, it is the dense op, forward and backward.

`rule_truth` is the test, `rule_samples` what it is tried on. Wrong rows are planted to see that it can fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.fx
from goldens import Golden
from rule_samples import SAME, SAMPLES, bools, call, ints, positive, real, samples_of

from tpcompile import kernels, rules
from tpcompile.layout import Leaf, Mesh, axes_of
from tpcompile.localize import LocalCall
from tpcompile.placement import PlacementError, cut_as, solve, uncut
from tpcompile.rule_truth import Case, Report, Sample, check, placements
from tpcompile.rules import ROWS, RULES, Rule, _names, table
from tpcompile.sentence import Call, Sentence, parse_row, reshape_sentence

NOWHERE = {
    "aten.cross_entropy_loss.default",
    *(f"aten.{n}.default" for n in ("max", "min", "prod", "any", "all")),
}
"""Rows that let no cut operand pass: they are there for their reason."""


# ---------------------------------------------------------------------------------------------- the truth of every row


def test_every_row_has_a_sample_and_every_sample_a_row() -> None:
    assert [rule.op for rule in ROWS if not samples_of(rule.op)] == []
    assert [str(s) for s in SAMPLES if s.op not in RULES] == []


@pytest.mark.parametrize("rule", ROWS, ids=lambda rule: rule.op.removeprefix("aten."))
def test_rule_is_true(rule: Rule, record_property: Callable[[str, object], None]) -> None:
    report = check(replace(rule, op=SAME.get(rule.op, rule.op)), samples_of(rule.op))
    for name in ("tried", "accepted", "ran"):
        record_property(name, getattr(report, name))
    assert not report.failures, "\n".join(report.failures[:5])
    assert report.tried == report.accepted + report.refused.total()
    assert (report.cut == 0) == (rule.op in NOWHERE), "a row that no cut operand passes must say so"


GRID = (
    call("linear.default", real(4, 6), real(4, 6)),
    call("bmm.default", real(4, 2, 4), real(4, 4, 1)),
    call("add.Tensor", real(4, 6), real(6)),
    call("mul.Tensor", real(4, 6), real(4, 1)),
    call("where.ScalarOther", bools(4, 1), real(4, 4), 0.5),
    call("view.default", real(4, 12), [4, 4, 3]),
    call("view.default", real(4, 12), [2, 2, 2, 6]),
    call("view.default", real(2, 2, 6), [4, 6]),
    call("view.default", real(2, 2, 6), [24]),
    call("split_with_sizes.default", real(4, 8), [2, 2, 4], 1),
    call("slice.Tensor", real(4, 8), 1, 4, 8),
    call("cat.default", [real(4, 4), real(4, 2)], 1),
    call("stack.default", [real(4, 4), real(4, 4)], 1),
    call("embedding.default", real(8, 4), ints(4, below=8)),
    call("sum.dim_IntList", real(4, 4, 2), [1]),
    call("mean.dim", real(4, 6), [0, 1]),
    call("softmax.int", real(4, 6), 1),
    call("transpose.int", real(4, 6), 1, 0),
    call("dropout.default", real(4, 6), 0.4, True),
    call("index.Tensor", real(4, 4), [ints(4, below=4)]),
    call("repeat_interleave.self_int", real(4, 4), 2, 0),
    call("expand.default", real(4, 1), [4, 4]),
    call("squeeze.default", real(2, 1, 4)),
    call("zeros_like.default", real(2, 4)),
    call("conv1d.default", real(1, 4, 1), real(4, 1, 1), None, [1], [0], [1], 4),
)


@pytest.mark.parametrize("sample", GRID, ids=str)
def test_rule_is_true_on_a_mesh_of_two_axes(sample: Sample) -> None:
    report = check(RULES[sample.op], [sample], meshes=lambda _: [Mesh((2, 2))])
    assert not report.failures, "\n".join(report.failures[:5])
    assert report.cut


def test_a_rule_given_twice_is_a_defect() -> None:
    with pytest.raises(ValueError, match=r"two rules for aten\.mm\.default"):
        table([*ROWS, RULES["aten.mm.default"]])


def test_what_must_be_whole(golden: Golden) -> None:
    """Which dims of which calls may not be cut at all, as a text to read."""
    lines: list[str] = []
    free = 0
    for sample in SAMPLES:
        refused = _refused_dims(sample)
        free += not refused
        if refused:
            lines.append(f"{sample}: {refused}")
    golden("rules-whole", "\n".join([f"{free} calls may be cut along any dim.", "", *sorted(set(lines))]))


def _refused_dims(sample: Sample) -> str:
    case, mesh = Case(sample), Mesh((2,))
    try:
        sentence = case.sentence(RULES[sample.op])
    except ValueError as error:
        return str(error)
    shapes = [tuple(case.inputs[i].shape) for i in case.tensors]
    found: list[str] = []
    for i, shape in enumerate(shapes):
        for d, n in enumerate(shape):
            ins = [uncut(s, mesh) for s in shapes]
            ins[i] = cut_as([Leaf(m, (0,) if e == d else ()) for e, m in enumerate(shape)], mesh)
            if n > 1:
                try:
                    solve(sentence, ins, mesh)
                except PlacementError:
                    found.append(f"{i}:{d}")
    return " ".join(found)


# ---------------------------------------------------------------------------------------------- planted wrong rows


@dataclass(frozen=True)
class Wrong:
    """A wrong row; tried on the samples of its op unless it has its own."""

    what: str
    rule: Rule
    samples: tuple[Sample, ...] = ()


def _facts(op: str, **facts: Any) -> Rule:
    """The row of ``op`` with other facts in its sentences."""
    rule = RULES[f"aten.{op}"]
    return replace(rule, row=lambda call: replace(rule.sentence(call), **facts))


def _text(op: str, row: str, **facts: Any) -> Rule:
    return Rule(f"aten.{op}", row, **facts)


def _without(op: str, *names: str) -> Rule:
    return replace(RULES[f"aten.{op}"], **dict.fromkeys(names))


def _reversed_parts(call: Call) -> Sentence:
    found = RULES[f"aten.{call.node.target.__name__}"].sentence(call)  # type: ignore[union-attr]
    return replace(found, concats=tuple((whole, parts[::-1]) for whole, parts in found.concats))


def _other_way_round(call: Call) -> Sentence:
    found = RULES[f"aten.{call.node.target.__name__}"].sentence(call)  # type: ignore[union-attr]
    return replace(found, products=tuple((left[::-1], right[::-1]) for left, right in found.products))


def _in_place_order(call: Call) -> Sentence:
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    return Sentence((labels,), (labels,), dict(zip(labels, call.shapes[0], strict=True)), linear="each")


def _equal_shares(local: LocalCall) -> torch.fx.Node | None:
    if local.held_share() is None:
        return None
    return local.emit(torch.ops.aten.mul.Tensor, (local.emit_op(), 1 / local.mesh.degree))


def _from_the_start(local: LocalCall) -> torch.fx.Node | None:
    rows = local.operands[0].dims[0]
    if not axes_of(rows):
        return None
    return local.emit(kernels.embedding_rows, (local.args[0], local.args[1], ((0, 12 // local.mesh.degree),), -1, 12))


def _eval_batch_norm(call: Call) -> Sentence:
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    operands = (labels, *((labels[1],) for _ in call.shapes[1:]))
    return Sentence(operands, (labels,), dict(zip(labels, call.shapes[0], strict=True)))


WRONG = (
    Wrong("exp is linear", _text("exp.default", "... -> ...", linear="each")),
    Wrong("abs is linear", _text("abs.default", "... -> ...", linear="each")),
    Wrong("division is linear in both", _text("div.Tensor", "..., ... -> ...", linear="each")),
    Wrong("division is linear in its denominator", _text("div.Tensor", "..., ... -> ...", linear=frozenset({1}))),
    Wrong("addition is linear in each alone", _text("add.Tensor", "..., ... -> ...", linear="each")),
    Wrong("multiplication is linear in both together", _text("mul.Tensor", "..., ... -> ...", linear="joint")),
    Wrong("adding a number is linear", _facts("add.Tensor", linear="each"), (call("add.Tensor", real(4, 6), 0.6),)),
    Wrong("where is linear", _text("where.self", "..., ..., ... -> ...", linear="joint")),
    Wrong("masked_fill is linear", _text("masked_fill.Scalar", "..., ... -> ...", linear=frozenset({0}))),
    Wrong("lerp by a tensor is linear", _text("lerp.Tensor", "..., ..., ... -> ...", linear="joint")),
    Wrong("a matrix product is linear in both together", _facts("mm.default", linear="joint")),
    Wrong("attention is linear in its queries", _facts("scaled_dot_product_attention.default", linear=frozenset({0}))),
    Wrong("attention needs no whole keys", _facts("scaled_dot_product_attention.default", whole={})),
    Wrong("softmax needs nothing whole", _text("softmax.int", "... -> ...")),
    Wrong("softmax needs the other dim whole", _text("softmax.int", "d! ... -> d ..."), (
        call("softmax.int", real(4, 6), 1),)),
    Wrong("log_softmax needs nothing whole", _facts("log_softmax.int", whole={})),
    Wrong("layer_norm needs nothing whole", _facts("layer_norm.default", whole={})),
    Wrong("rms_norm needs nothing whole", _facts("rms_norm.default", whole={})),
    Wrong("group_norm needs nothing whole", _facts("group_norm.default", whole={})),
    Wrong("batch_norm in training needs nothing whole", Rule("aten.batch_norm.default", _eval_batch_norm)),
    Wrong("cumsum needs nothing whole", _facts("cumsum.default", whole={})),
    Wrong("flip needs nothing whole", _facts("flip.default", whole={})),
    Wrong("roll needs nothing whole", _facts("roll.default", whole={})),
    Wrong("sort needs nothing whole", _facts("sort.default", whole={})),
    Wrong("topk needs nothing whole", _text("topk.default", "... -> ..., ..."), (call("topk.default", real(4, 6), 6),)),
    Wrong("a triangle needs nothing whole", _text("tril.default", "... -> ...", linear="each")),
    Wrong("padding needs nothing whole", _text("pad.default", "... -> ..."), (
        call("pad.default", real(4, 4), [1, -1]),)),
    Wrong("a maximum is a sum", Rule("aten.amax.default", rules._reduction(True, ""))),
    Wrong("argmax is a sum", Rule("aten.argmax.default", rules._reduction(True, ""))),
    Wrong("a product is a sum", Rule("aten.prod.dim_int", rules._reduction(True, ""))),
    Wrong("logsumexp is a sum", Rule("aten.logsumexp.default", rules._reduction(True, ""))),
    Wrong("a variance is a sum", Rule("aten.var.correction", rules._reduction(True, ""))),
    Wrong("a mean is a sum", _without("mean.dim", "kernel")),
    Wrong("a mean over an uneven cut is an even one", replace(RULES["aten.mean.dim"], kernel=_equal_shares)),
    Wrong("a table is looked up in part", _without("embedding.default", "kernel")),
    Wrong("every part of a table starts at 0", replace(RULES["aten.embedding.default"], kernel=_from_the_start)),
    Wrong("dropout draws the mask of a part", _without("dropout.default", "kernel")),
    Wrong("mm sums over the rows", _text("mm.default", "k m, k n -> m n", linear="each", sums=True), (
        call("mm.default", real(4, 4), real(4, 4)),)),
    Wrong("mm gives the transposed product", _text("mm.default", "m k, k n -> n m", linear="each", sums=True), (
        call("mm.default", real(4, 4), real(4, 4)),)),
    Wrong("linear has no label in common", _text("linear.default", "... k, n q -> ... n", linear="each", sums=True)),
    Wrong("a convolution passes its spatial dims", _facts("conv1d.default", whole={})),
    Wrong("a depthwise convolution keeps its groups", _without("conv1d.default", "localize")),
    Wrong("transpose keeps the order", Rule("aten.transpose.int", _in_place_order), (
        call("transpose.int", real(4, 4), 0, 1),)),
    Wrong("permute is its inverse", Rule("aten.permute.default", rules._permuted(
        lambda call, n: sorted(range(n), key=rules._permute(call, n).__getitem__))), (
        call("permute.default", real(4, 4, 4), [2, 0, 1]),)),
    Wrong("repeat interleaves", Rule("aten.repeat.default", _other_way_round)),
    Wrong("repeat_interleave repeats", Rule("aten.repeat_interleave.self_int", _other_way_round)),
    Wrong("a gated unit interleaves its halves", Rule("aten.glu.default", _other_way_round)),
    Wrong("cat joins back to front", Rule("aten.cat.default", _reversed_parts)),
    Wrong("split hands out back to front", replace(RULES["aten.split.sizes"], row=_reversed_parts)),
    Wrong("gather needs nothing whole", _facts("gather.default", whole={})),
    Wrong("an index picks a sum", _facts("index.Tensor", whole={}, sums=True)),
    Wrong("gather picks a sum", _facts("gather.default", whole={}, sums=True)),
    Wrong("scatter needs nothing whole", _facts("scatter_add.default", whole={})),
    Wrong("index_add is linear together with its index", _facts("index_add.default", linear="joint")),
    Wrong("index_put needs nothing whole", _facts("index_put.default", whole={})),
    Wrong("expand_as reads only the shape", _text("expand_as.default", "..., ... -> ...", references=frozenset({1}))),
    Wrong("prelu has a slope per row", _text("prelu.default", "a b, a -> a b"), (
        call("prelu.default", real(4, 4), real(4)),)),
    *(
        Wrong(f"{op} keeps its sizes", _without(op, "localize"))
        for op in _names("""view.default reshape.default expand.default unflatten.int slice.Tensor narrow.default
        select.int split.Tensor split_with_sizes.default chunk.default squeeze.default squeeze.dim""")
    ),
)  # fmt: skip


def test_planted_wrong_rows_are_caught() -> None:
    def is_caught(wrong: Wrong) -> bool:
        samples = [replace(s, degrees=(2,)) for s in wrong.samples or samples_of(wrong.rule.op)]
        return bool(check(wrong.rule, samples, first_only=True).failures)

    survivors = [wrong.what for wrong in WRONG if not is_caught(wrong)]
    print(f"killed {len(WRONG) - len(survivors)} of {len(WRONG)} planted wrong rows")
    assert survivors == []


def test_a_wrong_row_with_other_samples_would_not_be_caught_by_chance() -> None:
    """The control of the control: the right row passes where the wrong one is caught."""
    for wrong in WRONG:
        if wrong.samples:
            report = check(RULES[wrong.rule.op], wrong.samples)
            assert not report.failures, wrong.what


# ---------------------------------------------------------------------------------------------- kernels


def test_dropout_of_a_part_leaves_the_generator_where_the_whole_does() -> None:
    x = torch.ones(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    whole = torch.dropout(x, 0.4, True)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    part = kernels.dropout_part(x[:, 1:3], 0.4, ((1, 6, ((1, 2),)),), [0, 1])
    assert torch.equal(part, whole[:, 1:3])
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(kernels.dropout_part(x, 0.0, (), [0, 1]), x)
    assert not kernels.dropout_part(x, 1.0, (), [0, 1]).any()


def test_lookup_of_held_rows_refuses_ids_outside_the_whole_table() -> None:
    weight = torch.randn(4, 2)
    assert not kernels.embedding_rows(weight, torch.tensor([7]), ((0, 4),), -1, 8).any()
    for wrong in (-1, 8):
        with pytest.raises(IndexError, match=f"runs from {wrong} to {wrong}, the embedding has 8 rows"):
            kernels.embedding_rows(weight, torch.tensor([wrong]), ((0, 4),), -1, 8)


# ---------------------------------------------------------------------------------------------- sentences


def test_parse_row_labels_broadcast_dims_from_the_right() -> None:
    found = parse_row("..., ... k! -> ...", [(3, 1), (2, 1, 4, 6)], [(2, 3, 4)], "op")
    assert found.operands == ((".1", None), (".2", None, ".0", "k"))
    assert found.results == ((".2", ".1", ".0"),)
    assert found.sizes == {".0": 4, ".1": 3, ".2": 2, "k": 6}
    assert found.whole == {"k": "op reads the whole axis"}


def test_parse_row_of_nothing_is_nothing() -> None:
    found = parse_row("..., ... -> ...", [(1, 4), (0, 4)], [(0, 4)], "op")
    assert found.sizes[".1"] == 0
    assert found.operands == ((None, ".0"), (".1", ".0"))


@pytest.mark.parametrize(
    ("row", "shapes", "message"),
    [
        ("a b -> a", [(2, 3, 4)], "does not fit a tensor of 3 dims"),
        ("a ... b -> a", [(2,)], "does not fit a tensor of 1 dims"),
        ("a -> a", [(2,), (2,)], "is for fewer than 2 tensors"),
    ],
)
def test_parse_row_refuses_what_does_not_fit(row: str, shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row(row, shapes, [(2,)], "op")


@pytest.mark.parametrize(
    ("before", "after", "products"),
    [
        ((2, 12), (2, 3, 4), [(("i1",), ("o1", "o2"))]),
        ((2, 3, 4), (6, 4), [(("i0", "i1"), ("o0",))]),
        ((4, 6), (6, 4), [(("i0", "i1"), ("o0", "o1"))]),
        ((4, 1, 6), (1, 4, 6, 1), []),
        ((6,), (1, 6), []),
        ((2, 3), (3, 2), [(("i0", "i1"), ("o0", "o1"))]),
        ((), (1, 1), []),
    ],
)
def test_reshape_sentence(before: tuple[int, ...], after: tuple[int, ...], products: list[Any]) -> None:
    found = reshape_sentence(before, after)
    assert list(found.products) == products
    for labels, shape in ((found.operands[0], before), (found.results[0], after)):
        assert len(labels) == len(shape)
        assert all(n == 1 if x is None else found.sizes[x] == n for x, n in zip(labels, shape, strict=True))


def test_references_are_not_read() -> None:
    """A constant takes its cut from the value that its shape is read from, and asks nothing of it."""
    mesh = Mesh((2,))
    case = Case(call("zeros_like.default", real(4, 6)))
    for placed in placements(case.inputs[0], mesh):
        found = solve(case.sentence(RULES["aten.zeros_like.default"]), [placed], mesh)
        assert found.operands == (placed,)
        assert found.results[0].dims == placed.dims
        assert found.results[0].letters == (("S",) if axes_of(placed.dims[0]) | axes_of(placed.dims[1]) else ("R",))


def test_the_report_adds_up() -> None:
    one = check(RULES["aten.exp.default"], [call("exp.default", positive(2, 3))])
    two = one + Report(tried=1, failures=["x"])
    assert (two.tried, two.ran, two.failures) == (one.tried + 1, one.ran, ["x"])
