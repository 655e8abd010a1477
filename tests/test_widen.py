"""Widening: no float32 rounding is left in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tpcompile.capture import capture
from tpcompile.widen import WIDE, widen, widen_tensor

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class InDouble(TorchFunctionMode):
    """Another way to the same end: every dtype that the model's code names is read as float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return WIDE.get(value, value) if isinstance(value, torch.dtype) else value

        named: dict[str, Any] = pytree.tree_map(wide, kwargs or {})
        args = pytree.tree_map(wide, args)
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **named)


class Narrow(TorchDispatchMode):
    """Ops that returned a float narrower than 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype in WIDE for leaf in pytree.tree_leaves(result)):
            self.found.add(str(func))
        return result


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.abs().max())


def test_a_llama_that_upcasts_agrees_with_itself_in_double() -> None:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    tokens = torch.randint(3, 64, (2, 7))
    wide = widen(capture(model, (), {"input_ids": tokens, "use_cache": False}).graph_module)
    with Narrow() as narrow:
        (got,) = wide(tokens)
    assert narrow.found == set()
    with torch.no_grad():
        model.double()
        with InDouble():
            wanted = model(tokens, use_cache=False).logits
        rounded = model(tokens, use_cache=False).logits
    assert error(got, wanted) < 1e-12
    assert error(rounded, wanted) > 1e-9  # double parameters alone: what the model's own upcasts leave
    got.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype is torch.float64 for parameter in wide.parameters())


class EveryKind(nn.Module):
    """Floats from dtype arguments, from the default dtype, from integers, and under autocast."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x.to(torch.float32)).softmax(-1, dtype=torch.float32)
        y = y + torch.arange(0.0, 4.0) / 3 + torch.full((4,), 1 / 3) + torch.zeros(4, dtype=torch.bfloat16)
        y = y + self.steps / 3 + torch.tensor([0.1, 0.2, 0.3, 0.4]) + torch.ones_like(y, dtype=torch.float16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = y + self.linear(y)
        return y * (self.steps > 1)


def test_every_kind_of_float_is_widened() -> None:
    torch.manual_seed(0)
    captured = capture(EveryKind(), (torch.randn(3, 4),))
    wide = widen(captured.graph_module)
    with Narrow() as narrow:
        (got,) = wide(torch.randn(2, 4, dtype=torch.float64))
    assert narrow.found == set()
    assert got.dtype is torch.float64
    for node in wide.graph.nodes:
        assert not any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in WIDE for leaf in pytree.tree_leaves(node.meta["val"])
        )
    with Narrow() as narrow:  # the control: the graph as it was
        captured.graph_module(torch.randn(2, 4))
    assert len(narrow.found) >= 5


def test_integers_and_the_original_stay_as_they_are() -> None:
    captured = capture(EveryKind(), (torch.randn(3, 4),))
    code = captured.graph_module.code
    wide = widen(captured.graph_module)
    assert captured.graph_module.code == code
    assert captured.parameters["linear.weight"].dtype is torch.float32
    assert wide.get_buffer("steps").dtype is torch.int64
    assert wide.get_parameter("linear.weight").data_ptr() != captured.parameters["linear.weight"].data_ptr()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_parameter_stays_a_parameter(requires_grad: bool) -> None:
    wide = widen_tensor(nn.Parameter(torch.ones(2), requires_grad=requires_grad))
    assert isinstance(wide, nn.Parameter)
    assert wide.dtype is torch.float64
    assert wide.requires_grad is requires_grad
    assert type(widen_tensor(torch.ones(2, dtype=torch.int32))) is torch.Tensor
