"""How far a model may be from its ranks in its own precision: as far as rounding moves the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import equivalence
from tpcompile.equivalence import verify_program
from tpcompile.program import Program, copy_graph

aten = torch.ops.aten


class Amplifier(nn.Module):
    """An MLP whose result is multiplied so much that its last bits are seen."""

    def __init__(self, gain: float):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.gain = nn.Linear(8, 16), nn.Linear(16, 8), gain

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.gain * self.down(torch.relu(self.up(x))))


def program(gain: float) -> tuple[Program, nn.Module, tuple[Tensor]]:
    model, inputs = Amplifier(gain), (torch.randn(4, 8, generator=torch.Generator().manual_seed(1)),)
    return tpcompile.rewrite(model, degree=2, example_inputs=inputs), model, inputs


def narrowed(program: Program) -> Program:
    """With the operand of the sine rounded to bfloat16, which no run in fp64 sees."""
    module, graph = copy_graph(program.graph_module)
    (sine,) = graph.find_nodes(op="call_function", target=aten.sin.default)
    with graph.inserting_before(sine):
        x = sine.args[0]
        for dtype in (torch.bfloat16, torch.float32):
            x = graph.call_function(aten.to.dtype, (x, dtype))
            x.meta = {**sine.args[0].meta, "val": sine.args[0].meta["val"].to(dtype)}
    sine.args = (x,)
    module.recompile()
    return program.with_(graph_module=module)


@pytest.mark.parametrize("gain", [1.0, 1e4])
def test_a_model_that_amplifies_rounding_is_equal(gain: float) -> None:
    report = verify_program(*program(gain))
    assert report.ok, report.mismatch
    assert (report.native_output_error > torch.finfo(torch.float32).eps ** 0.5) == (gain > 1)
    assert report.output_error < 1e-11


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return self.table(ids) * scale  # HERE


def test_what_the_model_itself_refuses_is_the_users_error() -> None:
    with pytest.raises(tpcompile.CaptureError, match="Looks itself raised IndexError for the example inputs") as caught:
        tpcompile.verify(Looks(), degree=1, example_inputs=(torch.tensor([[1, 4]]),))
    assert caught.value.where is not None
    assert caught.value.where.text is not None
    assert "# HERE" in caught.value.where.text
    assert caught.value.why == "index out of range in self"


def test_inputs_that_forward_does_not_take_are_named_with_those_it_takes() -> None:
    with pytest.raises(tpcompile.CaptureError, match="Looks does not take these example inputs") as caught:
        tpcompile.verify(Looks(), degree=1, example_inputs={"input_ids": torch.tensor([[1, 3]])})
    assert caught.value.why == "missing a required argument: 'ids'"
    assert str(caught.value.help).startswith("its forward takes ids: ")


def test_what_is_allowed_to_rounding_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    given, model, inputs = program(1e4)
    native = verify_program(given, model, inputs).native_output_error
    monkeypatch.setattr(equivalence, "MOST", native / 2)
    assert not verify_program(given, model, inputs).ok


def test_a_narrower_dtype_is_no_rounding() -> None:
    given, model, inputs = program(1.0)
    report = verify_program(narrowed(given), model, inputs)
    assert not report.ok
    assert report.output_error < 1e-11
    assert "in the model's own precision they differ" in (report.mismatch or "")


def test_a_graph_that_is_not_the_model_is_not_excused() -> None:
    given, model, inputs = program(1e4)
    other = Amplifier(1e4)
    with torch.no_grad():
        other.down.bias.add_(0.01)
    report = verify_program(given, other, inputs)
    assert not report.ok
    assert report.output_error < 1e-11
    assert verify_program(given, model, inputs).ok


def test_a_cache_that_counts_in_python_is_compared() -> None:
    """Its sliding layers count tokens in numbers, which a graph returns as numbers, too; gradients as without it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, vocab_size=32, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config)
    given = {"input_ids": torch.randint(0, 32, (2, 6)), "use_cache": True}
    assert any("cumulative_length" in str(vars(layer)) for layer in model(**given).past_key_values.layers)
    report = tpcompile.verify(model, degree=2, example_inputs=given)
    assert report.ok, report.mismatch
    assert report.native_gradient_error < 1e-4
