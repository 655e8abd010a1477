"""Mixtures of experts: cut along their inner axis, or so that every rank holds some of the experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tpcompile
from tpcompile import example_inputs, huggingface, kernels
from tpcompile.errors import ShardingError
from tpcompile.spec import Spec

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 96,
}
ALONG = {
    "inner": "model.layers.*.mlp.experts.gate_up_proj column\nmodel.layers.*.mlp.experts.down_proj row\n",
    "experts": "model.layers.*.mlp.experts.gate_up_proj  model.layers.*.mlp.experts.down_proj  experts\n",
}


def mixture(name: str) -> nn.Module:
    configs: Any = transformers
    match name:
        case "mixtral":
            config = configs.MixtralConfig(**SIZES, num_local_experts=5)
        case "qwen3":
            config = configs.Qwen3MoeConfig(
                **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8
            )
        case _:
            config = configs.GptOssConfig(
                **SIZES, num_local_experts=4, head_dim=8, layer_types=["full_attention"], pad_token_id=0
            )
    return huggingface.build(config)


def verified(name: str, spec: str, degree: int) -> tpcompile.Report:
    model = mixture(name)
    args, kwargs = example_inputs.default_inputs(model)
    return tpcompile.verify(model, Spec.parse(spec), degree=degree, example_inputs=kwargs or args)


@pytest.mark.parametrize(
    ("name", "along", "degree"),
    [
        ("mixtral", "inner", 2),
        ("mixtral", "experts", 2),  # 5 experts: 3 and 2
        ("mixtral", "experts", 4),
        ("qwen3", "inner", 3),
        ("qwen3", "experts", 3),
        ("gptoss", "experts", 2),  # a bias per expert, picked by the rows' experts
    ],
)
def test_experts_are_cut_either_way(name: str, along: str, degree: int) -> None:
    report = verified(name, ALONG[along], degree)
    assert report.ok, report.mismatch
    kinds = Counter(
        (c.kind, c.direction) for c in report.collectives if c.of == "activations" and c.direction == "forward"
    )
    assert kinds == {("all_reduce", "forward"): 1}, "the rows are summed over their experts before they are reduced"


def test_a_rank_that_counted_rows_of_other_ranks_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def every_row(x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, held: Any = None) -> torch.Tensor:
        made = kept(x, weights, offs, held)
        return made + x.new_ones(made.shape) * 1e-3  # rows of other ranks' experts are not zero

    kept = kernels.grouped_product
    monkeypatch.setattr(kernels, "grouped_product", every_row)
    assert not verified("mixtral", ALONG["experts"], 2).ok


def test_experts_of_one_weight_alone_are_refused() -> None:
    with pytest.raises(ShardingError, match="meet experts cut as"):
        verified("mixtral", "model.layers.*.mlp.experts.gate_up_proj experts\n", 2)


def test_experts_of_what_has_none_are_refused() -> None:
    with pytest.raises(ShardingError, match="has no index of several experts"):
        verified("mixtral", "model.layers.*.self_attn.q_proj experts\n", 2)
