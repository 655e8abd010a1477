"""Cuts that move up to where values are born: what becomes smaller, what stays, and that nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import zoo
from torch import Tensor, nn

from tpcompile.collectives import transition_of
from tpcompile.compiler import rewrite, rewrite_captured
from tpcompile.equivalence import Report, verify_program
from tpcompile.passes import PIPELINE
from tpcompile.passes.constants import constants
from tpcompile.passes.tidy import tidy
from tpcompile.per_rank import PerRank
from tpcompile.program import Pass, Program
from tpcompile.rules import op_name

aten = torch.ops.aten
NAMES = [step.__name__ for step in PIPELINE]
BEFORE: tuple[Pass, ...] = tuple(p for p in PIPELINE[: NAMES.index("emit")] if p is not constants)
EMIT: Pass = PIPELINE[NAMES.index("emit")]
WITHOUT, WITH = (*BEFORE, EMIT), (*BEFORE, constants, EMIT, tidy)
SPEC = "{q,k,v}  column\no  row\n"


class Attention(nn.Module):
    """Four heads, and a bias of the scores that is made for each of them."""

    def __init__(self, bias: Callable[[Attention, Tensor], Tensor]):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.slopes = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (part(x).view(b, s, 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(4) + self.bias(self, x)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, 16))


def born_in_a_mask(module: Attention, x: Tensor) -> Tensor:
    s = x.shape[1]
    zeros = torch.zeros(1, 4, s, s)
    return torch.where(torch.ones(s, s).tril().bool(), zeros, float("-inf"))


def broadcast(module: Attention, x: Tensor) -> Tensor:
    s = x.shape[1]
    distance = torch.arange(s).view(1, 1, 1, s).to(x.dtype)
    return (-distance).expand(1, 4, s, s) * 0.5


def learned(module: Attention, x: Tensor) -> Tensor:
    """A parameter that is not cut: it has a gradient, so where it is cut is not free."""
    return (module.slopes * torch.arange(x.shape[1]).to(x.dtype)).expand(1, 4, x.shape[1], x.shape[1])


def used_whole(module: Attention, x: Tensor) -> Tensor:
    zeros = torch.zeros(1, 4, 1, x.shape[1])
    return zeros + zeros.sum()


def both(bias: Callable[[Attention, Tensor], Tensor], degree: int) -> tuple[Program, Program, Report]:
    """The program without and with the pass, and what verify says of the latter."""
    torch.manual_seed(0)
    model, inputs = Attention(bias), (torch.randn(2, 5, 16),)
    without, given = (
        rewrite(model, spec_of(), degree=degree, example_inputs=inputs, pipeline=steps) for steps in (WITHOUT, WITH)
    )
    return without, given, verify_program(given, model, inputs)


def spec_of() -> zoo.Spec:
    return zoo.Spec.parse(SPEC)


def calls(program: Program, *names: str) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if op_name(node) in names]


def transitions(program: Program) -> list[str]:
    return sorted(row.name for node in program.graph.nodes if (row := transition_of(node.target)) is not None)


@pytest.mark.parametrize(("degree", "heads"), [(2, 2), (3, PerRank((2, 1, 1))), (4, 1)])
def test_a_constant_is_born_cut(degree: int, heads: object) -> None:
    """A mask of zeros for every head: each rank makes those of its own heads, and no more."""
    without, with_, report = both(born_in_a_mask, degree)
    assert report.ok, report.mismatch
    (before,), (after,) = (calls(p, "aten.zeros.default") for p in (without, with_))
    assert (before.args[0][1], after.args[0][1]) == (4, heads)  # type: ignore[index]
    assert transitions(with_) == [name for name in transitions(without) if name != "cut"]


@pytest.mark.parametrize("degree", [2, 3])
def test_a_cut_vanishes_where_its_axis_is_broadcast(degree: int) -> None:
    without, with_, report = both(broadcast, degree)
    assert report.ok, report.mismatch
    assert "cut" in transitions(without)
    assert "cut" not in transitions(with_)
    assert report.collectives == without.collectives


SDPA = "aten.scaled_dot_product_attention.default"


def test_repeated_kv_heads_are_repeated_only_as_often_as_needed() -> None:
    """Four ranks on two kv heads: each repeats its kv head for its own query heads, inside of attention."""
    case = zoo.case("llama_few_kv", 1)
    without, with_ = (
        rewrite_captured(case.captured, case.spec, case.model, 4, ((), case.inputs), pipeline)
        for pipeline in (WITHOUT, WITH)
    )
    report = verify_program(with_, case.model, case.inputs)
    assert report.ok, report.mismatch
    sizes: list[list[Any]] = [[n.args[1] for n in calls(p, "aten.expand.default")] for p in (without, with_)]
    assert [[size[2] for size in own if len(size) == 5] for own in sizes] == [[4, 4], []]
    assert [node.kwargs.get("enable_gqa", False) for p in (without, with_) for node in calls(p, SDPA)] == [False, True]
    assert [transitions(p).count("cut") for p in (without, with_)] == [2, 0]
    assert report.collectives == without.collectives


@pytest.mark.parametrize("bias", [learned, used_whole])
def test_what_would_cost_something_stays(bias: Callable[[Attention, Tensor], Tensor]) -> None:
    """Moving the cut of a learned value could add a collective; a value used whole must be made whole."""
    without, with_, report = both(bias, 2)
    assert report.ok, report.mismatch
    assert report.collectives == without.collectives
    assert transitions(with_) == transitions(without)


def test_only_the_table_changes() -> None:
    inputs = (torch.randn(2, 5, 16),)
    program = rewrite(Attention(born_in_a_mask), spec_of(), degree=2, example_inputs=inputs, pipeline=BEFORE)
    after = constants(program)
    assert after.graph_module is program.graph_module
    changed = {name for name, row in after.table.items() if row != program.table[name]}
    assert [op_name(node) for node in program.graph.nodes if node.name in changed] == ["aten.where.ScalarOther"]
