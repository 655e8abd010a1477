"""Parameters that cut regions read whole: one message for all their gradients."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import zoo

from tpcompile import collectives
from tpcompile.compiler import rewrite_captured
from tpcompile.equivalence import verify_program
from tpcompile.layers import read_outside, repeated_layers
from tpcompile.passes import PIPELINE
from tpcompile.passes.parameter_copies import parameter_copies
from tpcompile.program import Options, Pass, Program

BASE: tuple[Pass, ...] = tuple(PIPELINE[: [p.__name__ for p in PIPELINE].index("emit") + 1])


def both(name: str, degree: int) -> tuple[Program, Program]:
    """A model of the catalogue before and after the pass."""
    case = zoo.case(name)
    before = rewrite_captured(case.captured, case.spec, case.model, degree, ((), case.inputs), BASE)
    return before, parameter_copies(before)


def messages(program: Program, name: str) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Backward messages about parameters, as a run records them."""
    rows = zoo.step(program, zoo.inputs(name)).recorder.rows
    of = [row for row in rows if row.node.target in (collectives.copy, collectives.copy_all)]
    return [
        (row.group, row.shape, row.dtype)
        for row in of
        if row.direction == "backward" and all(x.op == "get_attr" for x in row.node.all_input_nodes)
    ]


@pytest.mark.parametrize(
    ("name", "degree", "one_by_one", "together"),
    [
        # q_norm and k_norm of two layers
        ("qwen3", 2, [("tp", (8,), torch.float32)] * 4, [("tp", (32,), torch.float32)]),
        # k_proj and v_proj of two layers, each held by two of four ranks
        ("llama_few_kv", 4, [("tp1", (8, 64), torch.float32)] * 4, [("tp1", (2048,), torch.float32)]),
    ],
)
def test_one_message_for_all(
    name: str,
    degree: int,
    one_by_one: list[tuple[str, tuple[int, ...], torch.dtype]],
    together: list[tuple[str, tuple[int, ...], torch.dtype]],
) -> None:
    before, after = both(name, degree)
    assert messages(before, name) == one_by_one
    assert messages(after, name) == together
    case = zoo.case(name)
    report = verify_program(after.with_(history=before.history), case.model, case.inputs)
    assert report.ok, report.mismatch


def test_each_parameter_keeps_its_own_metadata() -> None:
    before, after = both("qwen3", 2)
    copies = {node.meta["origin"]: node for node in before.graph.nodes if node.target is collectives.copy}
    (bucket,) = (node for node in after.graph.nodes if node.target is collectives.copy_all)
    items = [node for node in after.graph.nodes if node.target is operator.getitem and node.args[0] is bucket]
    names = [f"model_layers_{layer}_self_attn_{part}_norm_weight" for layer in (0, 1) for part in ("q", "k")]
    assert [parameter.name for parameter in bucket.args[0]] == names
    assert [node.name for node in items] == [f"{name}_copy" for name in names]
    assert [node.meta["origin"] for node in items] == names
    for name, node in zip(names, items, strict=True):
        assert all(node.meta[key] is copies[name].meta[key] for key in ("val", "placement", "source"))
        assert node.meta["modules"] == ()  # it stands outside of the layers
        assert [user.name for user in node.users] == [user.name for user in copies[name].users]


@pytest.mark.parametrize(
    ("name", "degree", "read", "numbers"),
    [
        ("qwen3", 2, ("q_norm.weight", "k_norm.weight"), [16, 16]),  # of each of two layers
        ("llama_few_kv", 4, ("k_proj.weight", "v_proj.weight"), [1024, 1024]),
        ("falcon_mqa", 2, ("query_key_value.weight",), [16 * 64, 16 * 64]),  # whole segments: k and v
    ],
)
def test_or_one_for_each_layer_which_then_reads_its_own(
    name: str, degree: int, read: tuple[str, ...], numbers: list[int]
) -> None:
    case, together = zoo.case(name), zoo.program(name, degree)
    program = zoo.program(name, degree, options=Options(per_layer=True))
    layers = repeated_layers(case.captured.module_classes)
    outside = read_outside(together.graph, layers)
    assert {x for x in outside if x.endswith(read)} == {n for n in together.parameters if n.endswith(read)}
    assert read_outside(program.graph, layers) == []
    rows = zoo.step(program, case.inputs).recorder.rows
    kinds = (collectives.copy_all, collectives.copy_segments)
    assert [math.prod(r.shape) for r in rows if r.node.target in kinds and r.direction == "backward"] == numbers
    report = verify_program(program, case.model, case.inputs)
    assert report.ok, report.mismatch


def test_one_alone_and_other_values_stay_as_they_are() -> None:
    before, after = both("mlp", 2)
    assert after.text() == before.text()
    assert any(node.target is collectives.copy for node in after.graph.nodes)
