"""Weights with several names or several uses: cut once, with one gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tpcompile
from tpcompile import example_inputs, huggingface
from tpcompile.errors import SpecError
from tpcompile.spec import Spec


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_layers_that_share_their_weights(degree: int) -> None:
    """ALBERT: every layer is the same one."""
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 36, "vocab_size": 96}
    configs: Any = transformers
    model = huggingface.build(configs.AlbertConfig(**sizes, embedding_size=12, num_hidden_layers=3))
    args, kwargs = example_inputs.default_inputs(model)
    report = tpcompile.verify(model, tpcompile.plan(model, degree, kwargs or args), degree=degree,
                              example_inputs=kwargs or args)  # fmt: skip
    assert report.ok, report.mismatch
    assert min(report.held) < 0.8, "something is cut"
    forward = [c for c in report.collectives if c.direction == "forward" and c.kind == "all_reduce"]
    assert len(forward) >= 6, "two for each of the three uses of the one layer"


class Twice(nn.Module):
    """One matrix as the rows of a table and, twice, as the columns of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x), self.head(x * 2)


@pytest.mark.parametrize("degree", [2, 3])
def test_a_tied_table_and_layers_used_twice(degree: int) -> None:
    spec = Spec.parse("up column\ndown row\ntable head vocab\n")
    report = tpcompile.verify(Twice(), spec, degree=degree, example_inputs=(torch.randint(0, 11, (3, 4)),))
    assert report.ok, report.mismatch


def test_lines_that_disagree_on_a_tied_weight_are_refused_with_both_names() -> None:
    spec = Spec.parse("up column\ndown row\ntable vocab\nhead row\n")
    with pytest.raises(SpecError) as refused:
        tpcompile.rewrite(Twice(), spec, degree=2, example_inputs=(torch.randint(0, 11, (3, 4)),))
    assert "table" in str(refused.value)
    assert "head" in str(refused.value)
