"""int8 weights of torchao: refused as they are, and cut with their scales once they are plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from distributed import run
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.errors import CaptureError, ShardingError
from tpcompile.layout import axes_of
from tpcompile.spec import Spec

SPEC = Spec.parse("0 column\n2 row")


def quantized(model: nn.Module, unwrap: bool = True) -> Any:
    quantization: Any = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.eval(), quantization.Int8WeightOnlyConfig())
    return pytest.importorskip("torchao.utils").unwrap_tensor_subclass(model) if unwrap else model


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 17), nn.ReLU(), nn.Linear(17, 8))


def llama() -> nn.Module:
    configs: Any = transformers
    return models.build(
        configs.LlamaConfig(
            hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            vocab_size=131, tie_word_embeddings=False,
        ),
        dtype=torch.float32,
    )  # fmt: skip


def test_wrapped_weights_are_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError) as refused:
        tpcompile.rewrite(quantized(mlp(), unwrap=False), SPEC, degree=2, example_inputs=(torch.ones(4, 8),))
    assert refused.value.what == "0.weight is a Int8Tensor, which holds other tensors"
    assert "torchao.utils.unwrap_tensor_subclass(model)" in str(refused.value.help)


def test_integers_and_scales_are_cut_alike() -> None:
    """A column's scales with its rows; a row's scales stay whole, behind the sum."""
    report = tpcompile.verify(quantized(mlp()), SPEC, degree=2, example_inputs=(torch.randn(4, 8),))
    assert report.ok, report.mismatch
    assert report.output_error < 1e-12
    program = tpcompile.rewrite(quantized(mlp()), SPEC, degree=2, example_inputs=(torch.randn(4, 8),))
    cut = {name: tuple(bool(axes_of(d)) for d in dims) for name, dims in program.parameters.items()}
    assert cut["0.parametrizations.weight.original0"] == cut["0.parametrizations.weight.original1"] == (True, False)
    assert cut["2.parametrizations.weight.original0"] == (False, True)
    assert cut["2.parametrizations.weight.original1"] == (False, False)
    spec = Spec.parse("0.parametrizations.weight.original1 column\n0.parametrizations.weight.original0 replicate")
    with pytest.raises(ShardingError, match="not the weight of a Linear"):
        tpcompile.rewrite(quantized(mlp()), spec, degree=2, example_inputs=(torch.randn(4, 8),))


def answers() -> tuple[float, bool, float]:
    torch.set_num_threads(1)
    model: Any = quantized(llama())
    ids = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    tp = tpcompile.compile(model, example_inputs={"input_ids": ids, "use_cache": False})
    whole, cut = model(input_ids=ids, use_cache=False).logits, tp(input_ids=ids, use_cache=False).logits
    state = tpcompile.full_state_dict(tp)
    same = all(torch.equal(x, state[n]) for n, x in model.state_dict().items() if isinstance(x, Tensor))
    held = sum(p.nbytes for p in tp.parameters()) / sum(p.nbytes for p in model.parameters())
    return float((whole - cut).abs().max() / whole.abs().max()), same, held


@pytest.mark.slow
@pytest.mark.distributed
def test_the_shipped_spec_on_ranks() -> None:
    for degree in (2, 3):
        ids = torch.randint(0, 100, (2, 8))
        report = tpcompile.verify(
            quantized(llama()), degree=degree, example_inputs={"input_ids": ids, "use_cache": False}
        )
        assert report.ok, report.mismatch
    for error, same, held in run(answers, 2):
        assert error < 1e-5
        assert same
        assert held < 0.62
