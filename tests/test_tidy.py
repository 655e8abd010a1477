"""Tidying: the truth of every pattern, where each one fires, and what is left of the emitted code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx
import zoo
from goldens import Golden
from pattern_truth import Given, failures

from tpcompile.compiler import rewrite_captured
from tpcompile.equivalence import verify_program
from tpcompile.layout import Leaf
from tpcompile.passes import PIPELINE
from tpcompile.passes.tidy import CONVOLUTIONS, PATTERNS, tidy
from tpcompile.patterns import Pattern, explain, write
from tpcompile.placement import Placement
from tpcompile.program import Pass, Program
from tpcompile.rules import op_name
from tpcompile.runs import Parts, balanced

aten = torch.ops.aten
BY_NAME = {pattern.name: pattern for pattern in PATTERNS}


def uneven(ranks: int) -> Parts:
    """Eight positions, the first of which go to the last rank, and more of them than to the others."""
    lengths = [1] * (ranks - 1) + [8 - (ranks - 1)]
    starts = [8 - 1 - rank for rank in range(ranks - 1)] + [0]
    return tuple(((start, length),) for start, length in zip(starts, lengths, strict=True))


def scattered(ranks: int) -> Parts:
    """Eight positions, of which every rank holds each ``ranks``-th."""
    return tuple(tuple((i, 1) for i in range(rank, 8, ranks)) for rank in range(ranks))


def even(ranks: int) -> Parts:
    return balanced(12, ranks)


CUTS: list[dict[str, Any]] = [
    {"x": Given((3, 8)), "dim": 1, "parts": uneven, "group": "tp"},
    {"x": Given((3, 8)), "dim": 1, "parts": scattered, "group": "tp"},
    {"x": Given((12,)), "dim": 0, "parts": even, "group": "tp"},
]


def product(x: tuple[int, ...], w: tuple[int, ...], b: int) -> dict[str, Given]:
    return {"x": Given(x), "w": Given(w), "b": Given((b,))}


LINEAR = [
    product((3, 4), (5, 4), 5),
    product((2, 3, 4), (5, 4), 5),
    product((4,), (5, 4), 5),
    product((1, 1), (1, 1), 1),
]
MM = [product((3, 4), (4, 5), 5), product((2, 1), (1, 1), 1)]
BIASED = {
    f"a bias goes into its {conv}": [
        {
            "x": Given((2, 4, *[3] * dims)), "w": Given((3, 4, *[2] * dims)), "b": Given((3,)),
            "stride": [1] * dims, "padding": "same" if str(conv).endswith("padding") else [1] * dims,
            "dilation": [1] * dims, "groups": 1,
        } | ({"w": Given((4, 3, *[2] * dims)), "more": [0] * dims} if "transpose" in str(conv) else {})
    ]
    for conv, dims in CONVOLUTIONS
}  # fmt: skip
NORM = [{"x": Given((2, 3, 4)), "shape": [4], "eps": 1e-6, "w": Given((4,))}]
PLAIN = {"dtype": torch.float64, "layout": None, "device": torch.device("cpu"), "pin_memory": False}
FACTORY = [
    {"size": [2, 8], "dim": 1, "parts": uneven, "group": "tp", **PLAIN},
    {"size": [12], "dim": 0, "parts": even, "group": "tp", **PLAIN, "dtype": torch.bool},
]
INTEGERS = Given((3, 4), torch.int64)


def grouped(q: tuple[int, ...], kv: tuple[int, ...], mask: Any) -> dict[str, Any]:
    """Attention of ``q`` on fewer heads of k and v, each of them repeated."""
    sizes, shape = [*kv[:2], q[1] // kv[1], *kv[2:]], [kv[0], q[1], *kv[2:]]
    causal = mask == "causal"
    return {
        "q": Given(q), "k": Given(kv), "v": Given(kv), "k_sizes": sizes, "k_shape": shape, "v_sizes": sizes,
        "v_shape": shape, "mask": None if causal else mask, "p": 0.0, "causal": causal, "scale": 0.5,
    }  # fmt: skip


SAMPLES: dict[str, Sequence[dict[str, Any]]] = {
    "two all-reduces that meet are one": [
        {"x": Given((3, 4)), "y": Given((3, 4)), "group": "tp"},
        {"x": Given((3, 4)), "y": Given((4,)), "group": "tp"},
        {"x": Given((3, 1), torch.float32), "y": Given((1, 4), torch.float32), "group": "tp"},
    ],
    "a part of a complete value": CUTS,
    "a part of an all-reduce is a reduce-scatter": CUTS,
    "a bias goes into its linear": LINEAR,
    "a bias goes into its linear, bias first": LINEAR,
    "a bias goes into its mm": MM,
    "a bias goes into its mm, bias first": MM,
    **BIASED,
    "a part of zeros is smaller": FACTORY,
    "a part of ones is smaller": FACTORY,
    "a part of full is smaller": [{**values, "value": 1} for values in FACTORY],
    "gelu, written out": [{"x": Given((3, 4))}, {"x": Given((2, 3, 4))}],
    "an RMS norm, written out": [{"x": Given((3, 4)), "eps": 1e-6}, {"x": Given((2, 3, 4), torch.float32), "eps": 1}],
    "an RMS norm has its weight": NORM,
    "an RMS norm has its weight, weight first": NORM,
    "attention repeats kv heads by itself": [
        grouped((2, 4, 5, 3), (2, 2, 5, 3), "causal"),
        grouped((2, 3, 5, 3), (2, 1, 6, 3), None),
        grouped((1, 6, 5, 3), (1, 2, 6, 3), Given((1, 1, 5, 6))),
    ],
    "x + 0 is x": [{"x": INTEGERS, "number": 0}, {"x": INTEGERS, "number": False}],
    "x * 1 is x": [{"x": Given((3, 4)), "number": 1.0}, {"x": INTEGERS, "number": 1}, {"x": Given(()), "number": 1}],
    "True & x is x": [
        {"x": Given((3, 4), torch.bool), "y": Given((2,)), "dtype": torch.bool, "pin_memory": False},
    ],
    "a reshape to the same shape": [{"x": Given((3, 4)), "shape": [3, 4]}, {"x": Given((3, 4)), "shape": [-1, 4]}],
    "a view of the same shape": [{"x": Given((3, 4)), "shape": [3, 4]}, {"x": Given((3, 4)), "shape": [3, -1]}],
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "(n * a) // b, divided"])
def test_a_pattern_is_true(name: str, ranks: int) -> None:
    """In all states of its variables, forward and backward; a pattern without samples fails here."""
    for values in SAMPLES[name]:
        given = {k: v(ranks) if isinstance(v, Callable) else v for k, v in values.items()}
        assert failures(BY_NAME[name], given, ranks) == [], values


def test_sizes_are_divided_exactly() -> None:
    pattern = BY_NAME["(n * a) // b, divided"]
    for n in range(5):
        assert all(pattern.before(n, a, b) == pattern.after(n, a, b) for a, b in ((4, 2), (6, 6), (9, 1)))
    assert why_not(pattern, a=3, b=2, n=torch.zeros(())) == "2 does not divide 3"


# ---------------------------------------------------------------------------------------------- where they do not fit
def why_not(pattern: Pattern, result: Any = None, output: bool = False, **values: Any) -> str:
    """The reason that ``pattern`` gives on its own ``before``, where tensor variables have the given fake values."""
    graph = torch.fx.Graph()
    nodes: dict[str, Any] = {}
    for name, value in values.items():
        nodes[name] = graph.placeholder(name) if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.Tensor):
            nodes[name].meta["val"] = value
    root, made = write(graph, pattern.before, nodes)
    for node in made:
        node.meta["val"] = result if result is not None else torch.zeros(3, 4)
    graph.output((root,) if output else (graph.call_function(aten.relu.default, (root,)),))
    return explain(pattern, root).split(": ", 1)[1]


F64 = torch.float64
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x is torch.float32 and y is torch.float64: the message would be in the wider of the two": (
        "two all-reduces that meet are one",
        {"x": torch.zeros(3, 4), "y": torch.zeros(3, 4, dtype=F64), "group": "tp"},
    ),
    "b is [3, 4], not one number for each of the 4 columns": (
        "a bias goes into its linear", {"x": torch.zeros(3, 5), "w": torch.zeros(4, 5), "b": torch.zeros(3, 4)},
    ),
    "b is [1], not one number for each of the 4 columns": (
        "a bias goes into its mm", {"x": torch.zeros(3, 5), "w": torch.zeros(5, 4), "b": torch.zeros(1)},
    ),
    "a product with bias takes one dtype, not ['torch.float32', 'torch.float64']": (
        "a bias goes into its mm", {"x": torch.zeros(3, 5), "w": torch.zeros(5, 4), "b": torch.zeros(4, dtype=F64)},
    ),
    "x is torch.bfloat16: the fused op rounds once, these each": (
        "gelu, written out", {"x": torch.zeros(3, 4, dtype=torch.bfloat16)},
    ),
    "eps and the width must be known": (
        "an RMS norm, written out", {"x": torch.zeros(3, 4), "eps": torch.zeros(())},
    ),
    "w is [3, 1], not one number for each of the 4 columns": (
        "an RMS norm has its weight", {"x": torch.zeros(3, 4), "shape": [4], "eps": 1e-6, "w": torch.zeros(3, 1)},
    ),
    "a norm with weight takes one dtype, not ['torch.float32', 'torch.float64']": (
        "an RMS norm has its weight",
        {"x": torch.zeros(3, 4), "shape": [4], "eps": 1e-6, "w": torch.zeros(4, dtype=F64)},
    ),
    "more than the heads of k is repeated": (
        "attention repeats kv heads by itself",
        {x: torch.zeros(3, 4) for x in "qkv"} | {name: [4] for name in ("k_sizes", "k_shape", "v_sizes", "v_shape")}
        | {"mask": None, "p": 0.0, "causal": True, "scale": None},
    ),
    "the number is 1, not 0": ("x + 0 is x", {"x": torch.zeros(3, 4), "number": 1}),
    "-0.0 + 0 is 0.0": ("x + 0 is x", {"x": torch.zeros(3, 4), "number": 0}),
    "the number is y (placeholder), not 1": ("x * 1 is x", {"x": torch.zeros(3, 4), "number": torch.ones(())}),
    "it makes torch.float32 of torch.int64": ("x * 1 is x", {"x": torch.zeros(3, 4).long(), "number": 1.0}),
    "it is laid out in memory in another way": ("x * 1 is x", {"x": torch.zeros(3, 1).expand(3, 4), "number": 1.0}),
    "the program's output must be a tensor of its own": (
        "x * 1 is x", {"x": torch.zeros(3, 4), "number": 1.0, "output": True},
    ),
    "x is torch.float32, not bool": (
        "True & x is x", {"x": torch.zeros(3, 4), "y": torch.zeros(1), "dtype": torch.bool, "pin_memory": False},
    ),
    "the shape becomes [3, 4], it was [12]": ("a reshape to the same shape", {"x": torch.zeros(12), "shape": [3, 4]}),
    "the placement becomes None, it was None": ("a view of the same shape", {"x": torch.zeros(3, 4), "shape": [3, 4]}),
    "ranks hold parts of different sizes": (
        "a part of ones is smaller", {"size": [2, 8], "dim": 1, "parts": uneven(2), "group": "tp0", **PLAIN},
    ),
    "the size of the part is known only at run time": (
        "a part of ones is smaller", {"size": [2, 8], "dim": 1, "parts": None, "group": "tp", **PLAIN},
    ),
}  # fmt: skip


@pytest.mark.parametrize("expected", WRONG)
def test_a_pattern_says_where_it_is_not_true(expected: str) -> None:
    name, values = WRONG[expected]
    assert why_not(BY_NAME[name], **values) == expected.replace("y (placeholder)", "number")


# ---------------------------------------------------------------------------------------------- on models
BASE: tuple[Pass, ...] = tuple(PIPELINE[: [p.__name__ for p in PIPELINE].index("emit") + 1])


def emitted(name: str, degree: int, *after: Pass, training: bool = False) -> Program:
    """A model of the catalogue, one layer of it, through the pipeline up to ``emit``, and the passes ``after`` it."""
    case = zoo.case(name, 1, training)
    return rewrite_captured(case.captured, case.spec, case.model, degree, ((), case.inputs), (*BASE, *after))


def ops(program: Program) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("name", "degree", "expected"),
    [
        ("gpt2", 2, {"mm.default": (4, 2), "addmm.default": (0, 2), "add.Tensor": (10, 5)}),
        ("torch_transformer", 3, {"linear.default": (4, 4), "add.Tensor": (6, 4)}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_models_are_equal_and_shorter(
    name: str, degree: int, training: bool, expected: dict[str, tuple[int, int]]
) -> None:
    """In training too: a mask of dropout is drawn in the order in which its operand lies in memory."""
    before, after = emitted(name, degree, training=training), emitted(name, degree, tidy, training=training)
    counts = {op: (ops(before).count(f"aten.{op}"), ops(after).count(f"aten.{op}")) for op in expected}
    assert counts == expected
    case = zoo.case(name, 1, training)
    report = verify_program(after, case.model, case.inputs)
    assert report.ok, report.mismatch
    assert report.collectives == before.collectives


def test_metadata_is_kept() -> None:
    program = emitted("gpt2", 2, tidy)
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            assert {"val", "placement", "module", "modules", "source", "origin"} <= node.meta.keys(), node
    biased = [node for node in program.graph.nodes if node.target is aten.addmm.default]
    assert [str(node.meta["placement"]) for node in biased[:2]] == ["S(1:3*4/tp0*16)", "S(1:256/tp0)"]
    assert [node.meta["module"] for node in biased[:2]] == ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]


def test_the_program_given_is_left_alone_and_tidying_twice_is_tidying_once() -> None:
    program = emitted("mlp", 2)
    before = program.text()
    once = tidy(program)
    assert program.text() == before
    assert tidy(once).text() == once.text() != before


def test_the_code_of_a_layer_reads_well(golden: Golden) -> None:
    golden("tidy_mlp", emitted("mlp", 2, tidy).graph_module.code)


def test_equal_sizes_are_computed_once_in_a_module() -> None:
    """``batch * heads // 2``, three times in the attention of torch."""
    program = emitted("torch_transformer", 2, tidy)
    products = [node for node in program.graph.nodes if op_name(node) in ("mul", "floordiv")]
    batch, length = (next(n for n in program.graph.nodes if n.args == (program_input(program), d)) for d in (0, 1))
    assert [(op_name(node), node.args) for node in products] == [("mul", (batch, 2)), ("mul", (batch, length))]


def program_input(program: Program) -> torch.fx.Node:
    return next(node for node in program.graph.nodes if node.op == "placeholder")


@pytest.mark.parametrize(
    ("bounds", "parted"),
    [
        (((0, 2), (2, 2**63 - 1)), [2, 2]),
        (((3, 4), (0, 1), (1, 3)), [1, 2, 1]),
        (((0, 2), (3, 4)), None),  # a gap
        (((0, 3), (2, 4)), None),  # twice
        (((1, 2), (2, 4)), None),  # not from the start
        (((0, 2), (2, 3)), None),  # not to the end
        (((0, 4),), None),
        (((0, -2), (2, 4)), None),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_slices_that_part_a_whole_dim_are_one_split(
    bounds: tuple[tuple[int, int], ...], parted: list[int] | None, whole: bool
) -> None:
    value = torch.arange(12.0).view(3, 4)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = [
        graph.call_function(aten.neg.default, (graph.call_function(aten.slice.Tensor, (x, 1, *b)),)) for b in bounds
    ]
    graph.output(tuple(made))
    placed = Placement(("H",), (Leaf(3), Leaf(4))) if whole else Placement(("S",), (Leaf(3), Leaf(8, (0,))))
    for node in graph.nodes:
        node.meta |= {"val": value, "placement": placed}
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    expected = module(value)
    tidied = tidy(Program(zoo.case("mlp").captured, module, 2))
    splits = tidied.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    assert [node.args[1] for node in splits] == ([parted] if parted and whole else [])
    assert all(map(torch.equal, tidied.graph_module(value), expected))


def test_parts_of_parts_are_splits_of_splits() -> None:
    """Rotary halves of a rotary part."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    left, right = (graph.call_function(aten.slice.Tensor, (x, 1, low, low + 4)) for low in (0, 4))
    halves = [graph.call_function(aten.slice.Tensor, (left, -1, low, low + 2)) for low in (0, 2)]
    graph.output(tuple(graph.call_function(aten.neg.default, (part,)) for part in (*halves, right)))
    for node, size in zip(graph.nodes, (8, 4, 4, 2, 2, 2, 2, 4, 0), strict=True):
        node.meta |= {"val": torch.zeros(3, size), "placement": Placement(("H",), (Leaf(3), Leaf(size)))}
    module, value = torch.fx.GraphModule(torch.nn.Module(), graph), torch.arange(24.0).view(3, 8)
    expected = module(value)
    tidied = tidy(Program(zoo.case("mlp").captured, module, 2))
    assert ops(tidied).count("aten.split_with_sizes.default") == 2
    assert all(map(torch.equal, tidied.graph_module(value), expected))


def test_what_an_in_place_op_writes_is_left_alone() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    same = graph.call_function(aten.mul.Tensor, (x, 1.0))
    other = graph.call_function(aten.mul.Tensor, (x, 1.0))
    written = graph.call_function(aten.add_.Tensor, (graph.call_function(aten.view.default, (other, [12])), x))
    graph.output((graph.call_function(aten.relu.default, (same,)), graph.call_function(aten.relu.default, (written,))))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(3, 4)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    case = zoo.case("mlp")
    tidied = tidy(Program(case.captured, module, 2))
    assert ops(tidied) == [
        "aten.mul.Tensor", "aten.view.default", "aten.add_.Tensor", "aten.relu.default", "aten.relu.default",
    ]  # fmt: skip
