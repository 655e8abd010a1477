"""int8 weights of torchao: refused as they are, and cut with their scales once they are plain tensors."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import transformers
from distributed import run
from torch import Tensor, nn

import tpcompile
from tpcompile import huggingface
from tpcompile.errors import CaptureError, ShardingError
from tpcompile.layout import axes_of
from tpcompile.spec import Spec

SPEC = Spec.parse("0 column\n2 row")


class Int8(Tensor):
    """A weight ``[n, k]`` as integers and a scale for every row ``[n, 1]``, applied after the product: as torchao's."""

    q: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: Any, q: Tensor, scale: Tensor) -> Any:
        made = cast("Any", Tensor)._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)
        made.q, made.scale = q, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Any:
        return Int8(inner["q"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.q.to(x.dtype)) * weight.scale.flatten() + bias
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default
        return Int8(args[0].q, args[0].scale)


class Unwrapped(nn.Module):
    def forward(self, q: Tensor, scale: Tensor) -> Any:
        return Int8(q, scale)

    def right_inverse(self, weight: Int8) -> tuple[Tensor, Tensor]:
        return weight.q, weight.scale


def mlp(unwrap: bool = True) -> nn.Module:
    torch.manual_seed(0)
    linears = nn.Linear(8, 17), nn.Linear(17, 8)
    for linear in linears:
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = Int8((linear.weight.detach() / scale).round().to(torch.int8), scale)
        linear.weight = nn.Parameter(whole, requires_grad=False)
        if unwrap:
            nn.utils.parametrize.register_parametrization(linear, "weight", Unwrapped(), unsafe=True)
    return nn.Sequential(linears[0], nn.ReLU(), linears[1])


def quantized(model: nn.Module, unwrap: bool = True) -> Any:
    quantization: Any = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.eval(), quantization.Int8WeightOnlyConfig())
    return pytest.importorskip("torchao.utils").unwrap_tensor_subclass(model) if unwrap else model


def llama() -> nn.Module:
    configs: Any = transformers
    return huggingface.build(
        configs.LlamaConfig(
            hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            vocab_size=131, tie_word_embeddings=False,
        ),
        dtype=torch.float32,
    )  # fmt: skip


def test_wrapped_weights_are_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError) as refused:
        tpcompile.rewrite(mlp(unwrap=False), SPEC, degree=2, example_inputs=(torch.ones(4, 8),))
    assert refused.value.what == "0.weight is a Int8, which holds other tensors"
    assert "q, scale are what is computed with" in str(refused.value.why)


def test_integers_and_scales_are_cut_alike() -> None:
    """A column's scales with its rows; a row's scales stay whole, behind the sum."""
    report = tpcompile.verify(mlp(), SPEC, degree=2, example_inputs=(torch.randn(4, 8),))
    assert report.ok, report.mismatch
    assert report.output_error < 1e-12
    program = tpcompile.rewrite(mlp(), SPEC, degree=2, example_inputs=(torch.randn(4, 8),))
    cut = {name: tuple(bool(axes_of(d)) for d in dims) for name, dims in program.parameters.items()}
    assert cut["0.parametrizations.weight.original0"] == cut["0.parametrizations.weight.original1"] == (True, False)
    assert cut["2.parametrizations.weight.original0"] == (False, True)
    assert cut["2.parametrizations.weight.original1"] == (False, False)
    spec = Spec.parse("0.parametrizations.weight.original1 column\n0.parametrizations.weight.original0 replicate")
    with pytest.raises(ShardingError, match="not the weight of a Linear"):
        tpcompile.rewrite(mlp(), spec, degree=2, example_inputs=(torch.randn(4, 8),))


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
def test_torchao_and_the_shipped_spec_on_ranks() -> None:
    with pytest.raises(CaptureError, match=r"torchao\.utils\.unwrap_tensor_subclass\(model\)"):
        tpcompile.rewrite(quantized(llama(), unwrap=False), degree=2)
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
