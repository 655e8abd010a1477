"""The matcher, and the check that tells true patterns from false ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.fx
from pattern_truth import Given, failures

from tpcompile import collectives
from tpcompile.layout import Leaf, Mesh
from tpcompile.patterns import Match, Pattern, explain, leaf, match, rewrite, write
from tpcompile.per_rank import PerRank
from tpcompile.placement import Placement
from tpcompile.program import Program
from tpcompile.runs import balanced

aten = torch.ops.aten
all_gather, all_reduce, copy, cut, gather, leave, once, reduce_scatter, scatter = (
    leaf(getattr(collectives, name))
    for name in ("all_gather", "all_reduce", "copy", "cut", "gather", "leave", "once", "reduce_scatter", "scatter")
)

MEET = Pattern(
    "meet",
    lambda x, y, group: aten.add.Tensor(all_reduce(x, group), all_reduce(y, group)),
    lambda x, y, group: all_reduce(aten.add.Tensor(x, y), group),
)


def graph_of(function: Any, **values: Any) -> torch.fx.Graph:
    """The graph of a pattern-like function; a value that is a Tensor becomes a placeholder with that fake value."""
    graph = torch.fx.Graph()
    nodes: dict[str, Any] = {}
    for name, value in values.items():
        nodes[name] = graph.placeholder(name) if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.Tensor):
            nodes[name].meta |= {"val": value, "placement": Placement(("P",), tuple(map(Leaf, value.shape)))}
    root, made = write(graph, function, nodes)
    for node in made:
        first = node.args[0]
        node.meta |= dict(first.meta) if isinstance(first, torch.fx.Node) else {}
    graph.output(root)
    return graph


def last(graph: torch.fx.Graph) -> torch.fx.Node:
    return cast("torch.fx.Node", next(reversed(graph.nodes)).args[0])


def program_of(ranks: int = 2) -> Program:
    return Program(cast("Any", SimpleNamespace(size=int)), cast("Any", None), ranks, mesh=Mesh((ranks,)))


X, Y = torch.zeros(3, 4), torch.zeros(3, 4)


def test_variables_stand_for_nodes_and_for_literals() -> None:
    graph = graph_of(MEET.before, x=X, y=Y, group="tp")
    found = match(MEET, last(graph))
    assert found is not None
    assert {name: str(value) for name, value in found.values.items()} == {"x": "x", "y": "y", "group": "tp"}
    assert [node.name for node in found.nodes] == ["all_reduce", "all_reduce_1", "add"]


def test_a_pattern_is_written_in_place_of_what_it_matches() -> None:
    graph = graph_of(MEET.before, x=X, y=Y, group="tp")
    last(graph).meta |= {"origin": "sum", "placement": Placement(("R",), (Leaf(3), Leaf(4)))}
    rewrite(graph, [MEET], program_of())
    graph.lint()
    assert [node.name for node in graph.nodes] == ["x", "y", "add_1", "all_reduce_2", "output"]
    add, total = list(graph.nodes)[2:4]
    assert [str(node.meta["placement"]) for node in (add, total)] == ["P", "R"]
    assert [node.meta["origin"] for node in (add, total)] == ["sum", "sum"]
    assert all(tuple(node.meta["val"].shape) == (3, 4) for node in (add, total))


def test_patterns_apply_until_none_fits() -> None:
    three = lambda x, y, z, group: aten.add.Tensor(MEET.before(x, y, group), all_reduce(z, group))  # noqa: E731
    graph = graph_of(three, x=X, y=Y, z=X, group="tp")
    rewrite(graph, [MEET], program_of())
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        aten.add.Tensor, aten.add.Tensor, collectives.all_reduce,
    ]  # fmt: skip


def test_untouched_nodes_are_left_alone() -> None:
    graph = graph_of(MEET.before, x=X, y=Y, group="tp")
    before = str(graph)
    rewrite(graph, [MEET], program_of(), frozenset({next(iter(graph.nodes))}))
    assert str(graph) == before


def reason(pattern: Pattern, function: Any, **values: Any) -> str:
    return explain(pattern, last(graph_of(function, **values)))


TWICE = Pattern("twice", lambda x, a, b: aten.transpose.int(aten.transpose.int(x, a, b), a, b), lambda x, a, b: x)
REASONS = {
    "'meet' fits add: it takes all_reduce, all_reduce_1, add": lambda: reason(MEET, MEET.before, x=X, y=Y, group="tp"),
    "'meet' does not fit mul: the last call is mul = aten.mul.Tensor, not a call of aten.add.Tensor": lambda: reason(
        MEET, lambda x, y: aten.mul.Tensor(x, y), x=X, y=Y
    ),
    "'meet' does not fit add: other of add is y (placeholder), not a call of all_reduce": lambda: reason(
        MEET, lambda x, y, group: aten.add.Tensor(all_reduce(x, group), y), x=X, y=Y, group="tp"
    ),
    "'meet' does not fit add: group is 'tp0', but group of all_reduce_1 is 'tp1'": lambda: reason(
        MEET, lambda x, y: aten.add.Tensor(all_reduce(x, "tp0"), all_reduce(y, "tp1")), x=X, y=Y
    ),
    "'meet' does not fit add: alpha of add is 2, not 1": lambda: reason(
        MEET, lambda x, y: aten.add.Tensor(all_reduce(x, "tp"), all_reduce(y, "tp"), alpha=2), x=X, y=Y
    ),
    "'meet' does not fit add: inplace of all_reduce is True, not False": lambda: reason(
        MEET, lambda x, y: aten.add.Tensor(all_reduce(x, "tp", inplace=True), all_reduce(y, "tp")), x=X, y=Y
    ),
    "'twice' does not fit transpose_1: b is 1, but dim1 of transpose_1 is 2": lambda: reason(
        TWICE, lambda x: aten.transpose.int(aten.transpose.int(x, 0, 1), 0, 2), x=X
    ),
    "'never' does not fit relu: it is Tuesday": lambda: reason(
        Pattern("never", lambda x: aten.relu.default(x), lambda x: x, lambda match: "it is Tuesday"),
        lambda x: aten.relu.default(x), x=X,
    ),
    "'cat' does not fit cat: tensors of cat has 3 items, not 2": lambda: reason(
        Pattern("cat", lambda x, y: aten.cat.default([x, y]), lambda x, y: x),
        lambda x, y: aten.cat.default([x, y, x]), x=X, y=Y,
    ),
}  # fmt: skip


@pytest.mark.parametrize("expected", REASONS)
def test_explain_says_why_a_pattern_does_not_fit(expected: str) -> None:
    assert REASONS[expected]() == expected


def test_what_is_made_on_the_way_may_have_no_other_user() -> None:
    graph = graph_of(MEET.before, x=X, y=Y, group="tp")
    first = next(node for node in graph.nodes if node.name == "all_reduce")
    with graph.inserting_after(first):
        graph.call_function(aten.relu.default, (first,))
    assert explain(MEET, last(graph)) == "'meet' does not fit add: all_reduce has another user, relu_default"


def test_sizes_that_are_made_on_the_way_may_have_others() -> None:
    divided = Pattern("divided", lambda n, a, b: n * a // b, lambda n, a, b: n * (a // b))
    graph = torch.fx.Graph()
    n = graph.placeholder("n")
    n.meta["val"] = 7
    root, (product, _) = write(graph, divided.before, {"n": n, "a": 6, "b": 2})
    product.meta["val"], root.meta["val"] = 42, 21
    graph.output((root, product))
    rewrite(graph, [divided], program_of())
    graph.lint()
    assert [node.args for node in list(graph.nodes)[1:3]] == [(n, 6), (n, 3)]


def test_a_literal_is_matched_with_its_type() -> None:
    one = Pattern("one", lambda x: aten.mul.Tensor(x, 1), lambda x: x)
    for number, fits in ((1, True), (1.0, False), (True, False)):
        found = match(one, last(graph_of(lambda x, number=number: aten.mul.Tensor(x, number), x=X)))
        assert (found is not None) is fits, number


def test_literals_may_differ_between_ranks_and_after_computes_with_them() -> None:
    def shift(parts: Any) -> Any:
        return PerRank(tuple(start + 1 for start in parts.values))

    narrow = Pattern(
        "narrow",
        lambda x, start: aten.narrow.default(x, 0, start, 1),
        lambda x, start: aten.slice.Tensor(x, 0, start, shift(start)),
    )
    graph = graph_of(lambda x: aten.narrow.default(x, 0, PerRank((0, 2)), 1), x=X)
    rewrite(graph, [narrow], program_of())
    assert last(graph).args[1:] == (0, PerRank((0, 2)), PerRank((1, 3)))


def test_unless_sees_the_match() -> None:
    def other_shape(found: Match) -> str | None:
        return None if found["x"].meta["val"].shape == found.root.meta["val"].shape else "the shape changes"

    view = Pattern("view", lambda x, shape: aten.view.default(x, shape), lambda x, shape: x, other_shape)
    graph = graph_of(lambda x: aten.view.default(x, [3, 4]), x=X)
    rewrite(graph, [view], program_of())
    assert last(graph).name == "x"
    graph = graph_of(lambda x: aten.view.default(x, [12]), x=X)
    last(graph).meta["val"] = torch.zeros(12)
    assert explain(view, last(graph)) == "'view' does not fit view: the shape changes"


# ---------------------------------------------------------------------------------------------- true and false
def parts_of(size: int) -> Any:
    return lambda ranks: balanced(size, ranks)  # pyright: ignore[reportUnknownLambdaType]


def sample(ranks: int, **values: Any) -> dict[str, Any]:
    """Literals that are functions are of the number of ranks."""
    return {name: value(ranks) if callable(value) else value for name, value in values.items()}


CUT = {"x": Given((3, 8)), "dim": 1, "parts": parts_of(8), "group": "tp"}
TRUE = {
    "a partial sum of all is the sum": (
        Pattern("", lambda x, group: all_reduce(once(x, group), group), lambda x, group: x),
        {"x": Given((3, 4)), "group": "tp"},
    ),
    "in and out again": (
        Pattern("", lambda x, group: leave(copy(x, group), group), lambda x, group: x),
        {"x": Given((3, 4)), "group": "tp"},
    ),
    "gathered is whole": (
        Pattern(
            "",
            lambda x, dim, parts, group: all_gather(reduce_scatter(x, dim, parts, group), dim, parts, group),
            lambda x, dim, parts, group: copy(all_reduce(x, group), group),
        ),
        CUT,
    ),
    "partial gradients are equal if their sums are": (
        Pattern(
            "",
            lambda x, dim, parts, group: gather(cut(x, dim, parts, group), dim, parts, group),
            lambda x, dim, parts, group: leave(x, group),
        ),
        CUT,
    ),
    "f commutes with what is replicated": (
        Pattern(
            "",
            lambda x, group: copy(aten.relu.default(x), group),
            lambda x, group: aten.relu.default(copy(x, group)),
        ),
        {"x": Given((3, 4)), "group": "tp"},
    ),
}
FALSE = {
    "no states: the cut of an all-reduce has the wrong adjoint": (
        Pattern(
            "",
            lambda x, dim, parts, group: cut(all_reduce(x, group), dim, parts, group),
            lambda x, dim, parts, group: reduce_scatter(x, dim, parts, group),
        ),
        CUT,
        "no states",
    ),
    "the same the other way round": (
        Pattern(
            "",
            lambda x, dim, parts, group: scatter(all_reduce(x, group), dim, parts, group),
            lambda x, dim, parts, group: cut(all_reduce(x, group), dim, parts, group),
        ),
        CUT,
        "ill typed",
    ),
    "f is dropped": (
        Pattern("", lambda x, group: copy(all_reduce(x, group), group), lambda x, group: all_reduce(x, group)),
        {"x": Given((3, 4)), "group": "tp"},
        "becomes R",
    ),
    "f is dropped from one of two": (
        Pattern(
            "",
            lambda x, y, group: aten.mul.Tensor(copy(x, group), copy(y, group)),
            lambda x, y, group: aten.mul.Tensor(copy(x, group), y),
        ),
        {"x": Given((3, 4)), "y": Given((3, 4)), "group": "tp"},
        "ill typed",
    ),
    "parts in another order": (
        Pattern(
            "",
            lambda x, dim, parts, group: scatter(all_reduce(x, group), dim, parts, group),
            lambda x, dim, parts, group: reduce_scatter(x, dim, tuple(reversed(parts)), group),
        ),
        CUT,
        "the value on rank 0 differs",
    ),
    "all-reduces meet in a product": (
        Pattern(
            "",
            lambda x, y, group: aten.mul.Tensor(all_reduce(x, group), all_reduce(y, group)),
            lambda x, y, group: all_reduce(aten.mul.Tensor(x, y), group),
        ),
        {"x": Given((3, 4)), "y": Given((3, 4)), "group": "tp"},
        "ill typed",
    ),
    "a difference is no sum": (
        Pattern(MEET.name, MEET.before, lambda x, y, group: all_reduce(aten.sub.Tensor(x, y), group)),
        {"x": Given((3, 4)), "y": Given((3, 4)), "group": "tp"},
        "the value on rank 0 differs",
    ),
    "a bias added before the sum": (
        Pattern(
            "",
            lambda x, w, b, group: aten.add.Tensor(all_reduce(aten.linear.default(x, w), group), b),
            lambda x, w, b, group: all_reduce(aten.linear.default(x, w, b), group),
        ),
        {"x": Given((3, 4)), "w": Given((5, 4)), "b": Given((5,)), "group": "tp"},
        "ill typed",
    ),
    "the same value, half of the gradient": (
        Pattern("", lambda x: aten.mul.Tensor(x, 2), lambda x: aten.add.Tensor(x, aten.detach.default(x))),
        {"x": Given((3, 4))},
        "the gradient of x on rank 0 differs",
    ),
    "the same value, no gradient": (
        Pattern(
            "",
            lambda x, group: copy(aten.neg.default(x), group),
            lambda x, group: copy(aten.detach.default(aten.neg.default(x)), group),
        ),
        {"x": Given((3, 4)), "group": "tp"},
        "the gradient of x is missing",
    ),
    "a shape that only looks the same": (
        Pattern("", lambda x: aten.transpose.int(x, 0, 1), lambda x: x),
        {"x": Given((4, 4))},
        "the value on rank 0 differs",
    ),
    "another type": (
        Pattern("", lambda x: aten.add.Tensor(x, 0.0), lambda x: x),
        {"x": Given((3, 4), torch.int64)},
        "is torch.int64[3, 4], was torch.float32[3, 4]",
    ),
    "it does not fit its own sample": (
        Pattern("", lambda x: aten.relu.default(x), lambda x: x, lambda match: "never"),
        {"x": Given((3, 4))},
        "does not fit relu: never",
    ),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", TRUE)
def test_a_true_pattern_passes_the_check(name: str, ranks: int) -> None:
    pattern, values = TRUE[name]
    assert failures(pattern, sample(ranks, **values), ranks) == []


@pytest.mark.parametrize("name", FALSE)
def test_a_false_pattern_is_found(name: str) -> None:
    pattern, values, expected = FALSE[name]
    found = failures(pattern, sample(2, **values), 2)
    assert any(expected in failure for failure in found), found
