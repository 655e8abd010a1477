"""Arguments of a captured graph: the same call in other words, and calls that it is not for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import capturing
import pytest
import torch
from capturing import (
    Call,
    difference,
    gpt2,
    ids,
    llama,
    message,
    mlp,
)
from torch import nn

from tpcompile.capture import capture
from tpcompile.errors import CaptureError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from capturing.one_thread()


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
        pair: tuple[torch.Tensor, torch.Tensor] | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        y = self.linear(x) * scale
        if bias is not None:
            y = y + bias
        return y if pair is None else y + pair[0] - pair[1]


def test_the_same_call_written_in_another_way() -> None:
    model, x, bias = Options(), torch.randn(3, 4), torch.randn(4)
    captured = capture(model, (x,), {"scale": 2.0, "bias": bias})
    assert [wanted.name for wanted in captured.inputs] == ["x", "bias"]
    for args, kwargs in (
        ((x, bias, 2.0), {}),
        ((), {"scale": 2.0, "bias": bias, "x": x}),
        ((x, bias), {"scale": 2.0, "pair": None}),
    ):
        flat = captured.flatten(args, kwargs)
        assert flat[0] is x
        assert flat[1] is bias


def test_nested_arguments_are_named_as_the_caller_says_them() -> None:
    model = Options()
    pair = (torch.randn(3, 4), torch.randn(3, 4))
    captured = capture(model, (torch.randn(3, 4),), {"pair": pair})
    assert [(wanted.path, wanted.name) for wanted in captured.inputs] == [
        ("x", "x"), ("pair[0]", "pair_0"), ("pair[1]", "pair_1"),
    ]  # fmt: skip
    assert difference(model, captured, ((torch.randn(5, 4),), {"pair": (torch.randn(5, 4), torch.randn(5, 4))})) == 0.0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            ((), {"x": torch.zeros(2, 4)}),
            [
                "argument `bias` is missing",
                "  why:  the model was captured with it",
                "  help: pass bias, or compile with example_inputs that leave it out",
            ],
        ),
        (
            ((torch.zeros(2, 4), torch.zeros(4)), {"scale": 2.0, "mask": torch.zeros(2)}),
            [
                "argument `mask` was not there when the model was captured",
                "  why:  captured tensors: x, bias",
                "  help: leave mask out, or compile with example_inputs that contain it",
            ],
        ),
        (
            ((torch.zeros(2, 4), torch.zeros(4)), {"scale": 3.0}),
            [
                "argument `scale` is 3.0, captured with 2.0",
                "  why:  everything but tensors is a constant of the captured graph",
                "  help: pass 2.0, or compile with example_inputs in which scale is 3.0",
            ],
        ),
        (
            ((torch.zeros(2, 4), None), {"scale": 2.0}),
            [
                "argument `bias` is None, captured with a tensor",
                "  why:  everything but tensors is a constant of the captured graph",
                "  help: pass a tensor, or compile with example_inputs in which bias is None",
            ],
        ),
        (
            ((torch.zeros(2, 4).double(), torch.zeros(4)), {"scale": 2.0}),
            [
                "input `x` has dtype torch.float64, captured with torch.float32",
                "  help: pass x.to(torch.float32), or compile with example_inputs of dtype torch.float64",
            ],
        ),
        (
            ((torch.zeros(4), torch.zeros(4)), {"scale": 2.0}),
            [
                "input `x` has 1 dims [4], captured with 2",
                "  help: pass 2 dims, or compile with example_inputs of that rank",
            ],
        ),
        (
            ((torch.zeros(2, 4, device="meta"), torch.zeros(4)), {"scale": 2.0}),
            [
                "input `x` is on meta, captured on cpu",
                "  help: move it to 'cpu', or compile with model and example_inputs on meta",
            ],
        ),
    ],
)
def test_another_call_is_refused_by_name(call: Call, expected: list[str]) -> None:
    captured = capture(Options(), (torch.randn(3, 4), torch.randn(4)), {"scale": 2.0})
    assert message(lambda: captured.flatten(*call)) == expected


def test_a_call_without_tensors_fails_as_the_model_does() -> None:
    with pytest.raises(CaptureError, match="must be Tensor, not"):
        capture(nn.Linear(4, 4), (3,))


def test_an_argument_that_hides_tensors_is_refused() -> None:
    class Box:
        tensor = torch.ones(4)

    class Unboxes(nn.Module):
        def forward(self, x: torch.Tensor, box: Box) -> torch.Tensor:
            return x + box.tensor

    assert message(lambda: capture(Unboxes(), (torch.randn(2, 4), Box())))[0] == (
        "argument `box` is a Box, neither a tensor nor a plain value"
    )


def test_outputs_keep_their_structure() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.table = torch.arange(4.0)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y = self.linear(x)
            return {"y": y, "n": 3, "none": None, "deep": [(y.sum(), "text")], "rows": x.shape[0], "x": x,
                    "weight": self.linear.weight, "table": self.table}  # fmt: skip

    model, x = Many(), torch.randn(5, 4)
    captured = capture(model, (torch.randn(3, 4),))
    got = captured.unflatten(captured.graph_module(*captured.flatten((x,))))
    assert list(got) == ["y", "n", "none", "deep", "rows", "x", "weight", "table"]
    assert torch.equal(got["y"], model(x)["y"])
    assert (got["n"], got["none"], got["deep"][0][1], got["rows"]) == (3, None, "text", 5)
    assert got["x"] is x
    assert got["weight"] is model.linear.weight
    assert got["table"] is model.table


def test_a_cache_goes_in_and_out() -> None:
    model = llama(num_hidden_layers=1).double().eval()
    with torch.no_grad():
        prefill = capture(model, (), {"input_ids": ids(2, 5), "use_cache": True})
        tokens = ids(2, 5)
        flat = prefill.flatten((), {"input_ids": tokens, "use_cache": True})
        caches = [prefill.unflatten(prefill.graph_module(*flat)).past_key_values, model(tokens).past_key_values]
        token = ids(2, 1)
        kwargs = {"input_ids": token, "past_key_values": copy.deepcopy(caches[0]), "use_cache": True}
        decode = capture(model, (), kwargs)
        assert decode.inputs[1].dynamic == (True, False, True, False)
        for _ in range(3):
            flat = decode.flatten((), {"input_ids": token, "past_key_values": caches[0], "use_cache": True})
            mine = decode.unflatten(decode.graph_module(*flat))
            theirs = model(token, past_key_values=caches[1], use_cache=True)
            assert (mine.logits - theirs.logits).abs().max() < 1e-12
            caches = [mine.past_key_values, theirs.past_key_values]
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 8


def test_default_inputs_are_used_where_there_are_none() -> None:
    captured = capture(gpt2(n_layer=1))
    assert [wanted.path for wanted in captured.inputs] == ["input_ids"]
    assert message(lambda: capture(mlp())) == [
        "example inputs are needed for Sequential",
        "  why:  sizes and dtypes of what it eats cannot be known from the module",
        "  help: pass example_inputs=(torch.randn(2, 16),), or a dict of keyword arguments; on the command line, let "
        "the function return (model, example inputs)",
    ]
