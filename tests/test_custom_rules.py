"""Rules for custom ops: believed only when the truth test agrees, and then the op is cut like any other."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import rules
from tpcompile.errors import ShardingError, TpcompileError
from tpcompile.rules import Rule

OP = "tpcompile_tests.scaled_tanh.default"
SPEC = "up column\ndown row\n"
CALL = (torch.randn(4, 6), torch.randn(6))


@torch.library.custom_op("tpcompile_tests::scaled_tanh", mutates_args=())
def scaled_tanh(x: Tensor, scale: Tensor) -> Tensor:
    return torch.tanh(x) * scale


@scaled_tanh.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, scale = ctx.saved_tensors
    t = torch.tanh(x)
    return grad * scale * (1 - t * t), (grad * t).flatten(0, -2).sum(0)


scaled_tanh.register_autograd(_backward, setup_context=_keep)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(scaled_tanh(self.up(x), self.scale))


@pytest.fixture
def table() -> Generator[None]:
    """Rules that a test adds are gone after it."""
    before = dict(rules._TABLE)  # pyright: ignore[reportPrivateUsage]
    yield
    rules._TABLE.clear()  # pyright: ignore[reportPrivateUsage]
    rules._TABLE.update(before)  # pyright: ignore[reportPrivateUsage]


def verified() -> tpcompile.Report:
    return tpcompile.verify(Model(), tpcompile.Spec.parse(SPEC), degree=2, example_inputs=(torch.randn(3, 6),))


@pytest.mark.usefixtures("table")
def test_a_custom_op_with_a_rule_is_cut_like_any_other() -> None:
    with pytest.raises(ShardingError, match=r"tpcompile\.rules\.add\(Rule\(.tpcompile_tests") as refused:
        verified()
    assert refused.value.where is not None
    assert refused.value.where.line is not None
    rules.add(Rule(OP, "... d, d -> ... d"), CALL)
    report = verified()
    assert report.ok, report.mismatch
    assert [c.kind for c in report.collectives if c.direction == "forward"] == ["all_reduce"]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(OP, "... d, d -> ... d", "each"), "is wrong"),  # not linear in x: a partial sum must not pass
        (Rule(OP, "... d, e -> ... d"), "is wrong"),  # the scale follows the last dim
        (Rule(OP, "a! d!, d! -> a d"), "lets nothing be cut"),
        (Rule(OP, "a, d -> a d"), "does not fit a tensor of 2 dims"),
        (Rule("tpcompile_tests.nothing.default", "... -> ..."), "there is no op"),
        (Rule("aten.add.Tensor", "..., ... -> ..."), "has a rule already"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_rule_that_is_not_true_is_not_added(rule: Rule, message: str) -> None:
    before = dict(rules.RULES)
    with pytest.raises(TpcompileError, match=message):
        rules.add(rule, CALL)
    assert dict(rules.RULES) == before


def test_a_rule_needs_an_example() -> None:
    with pytest.raises(TpcompileError, match="without an example call"):
        rules.add(Rule(OP, "... d, d -> ... d"))
