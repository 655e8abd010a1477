"""Sizes of inputs: which are symbols, which are fixed and by whose line, and what stands for a symbol."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import capturing
import pytest
import sympy
import torch
from capturing import (
    NanoGPT,
    difference,
    ids,
    llama,
    message,
    t5,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tpcompile import untouched
from tpcompile.capture import capture
from tpcompile.errors import CaptureError

line_of = functools.partial(capturing.line_of, __file__)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from capturing.one_thread()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 6), (5, 1), (7, 7), (4, 4)])
def test_no_example_size_is_baked_in(batch: int, length: int) -> None:
    model = NanoGPT().double()
    captured = capture(model, (ids(batch, length),))
    assert captured.inputs[0].dynamic == (True, True)
    assert captured.inputs[0].example.shape[0] != captured.inputs[0].example.shape[1]
    for shape in ((2, 3), (1, 1), (6, 2)):
        assert difference(model, captured, ((ids(*shape),), {})) == 0.0


def test_a_batch_the_size_of_the_heads_is_still_a_batch() -> None:
    model = NanoGPT().double()
    captured = capture(model, (ids(4, 16),))  # 4 heads, width 16
    assert captured.inputs[0].dynamic == (True, True)
    assert difference(model, captured, ((ids(3, 5),), {})) == 0.0


def test_inputs_of_one_size_share_a_symbol_and_an_encoder_has_its_own() -> None:
    call = (), {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long), "labels": ids(2, 6)}
    decoder = capture(llama(num_hidden_layers=1), *call)
    assert len({tuple(map(str, wanted.example.shape)) for wanted in decoder.inputs}) == 1
    pair = capture(t5(), (), {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 6), "use_cache": False})
    assert len({str(wanted.example.shape[1]) for wanted in pair.inputs}) == 2
    assert len({str(wanted.example.shape[0]) for wanted in pair.inputs}) == 1


def test_the_same_tensor_twice_is_two_inputs() -> None:
    model = NanoGPT().double()
    tokens = ids(2, 6)
    captured = capture(model, (tokens,), {"targets": tokens})
    assert [wanted.path for wanted in captured.inputs] == ["idx", "targets"]
    assert difference(model, captured, ((ids(3, 4), ids(3, 4)), {})) == 0.0


def test_hints_are_distinct_primes_and_evaluate_sizes() -> None:
    captured = capture(NanoGPT(), (ids(2, 6),))
    assert len(set(captured.hints.values())) == len(captured.hints) == 2
    assert all(map(sympy.isprime, captured.hints.values()))
    batch, length = captured.inputs[0].example.shape
    assert captured.size(batch) > 10_000
    assert captured.size(length) < NanoGPT().block_size, "there are no more positions"
    assert captured.size(5) == 5
    assert captured.size(batch * length + 1) == captured.size(batch) * captured.size(length) + 1


def test_hints_have_the_divisors_that_the_model_asks_for() -> None:
    class Folded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1] % 6 == 0
            return x.view(x.shape[0], 6, -1, x.shape[2]).sum(1)

    captured = capture(Folded(), (torch.randn(2, 12, 5),))
    length = captured.size(captured.inputs[0].example.shape[1])
    assert length % 6 == 0
    assert sympy.isprime(length // 6)


class Chunks(nn.Module):
    """Positions padded to whole chunks of 64 and run chunk by chunk, as in linear attention, each position of a chunk
    by itself: every small size occurs in the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, (64 - x.shape[1] % 64) % 64))
        chunks = padded.reshape(x.shape[0], -1, 64, x.shape[2])
        rows = [chunks[:, i, :n].sum(1) for i in range(chunks.shape[1]) for n in range(1, 64)]
        return torch.stack(rows, 1).sum(1)


def test_a_hint_is_no_common_size_where_every_prime_is_a_size() -> None:
    captured = capture(Chunks(), (torch.randn(2, 8, 48),))
    length = captured.size(captured.inputs[0].example.shape[1])
    assert sympy.isprime(length)
    assert 12 < length <= 64, "one chunk, and no divisor of many sizes, as the 8 of the example is"
    captured.flatten((torch.randn(3, 60, 48),))
    with pytest.raises(CaptureError):
        captured.flatten((torch.randn(3, 65, 48),))


def test_a_length_that_no_other_one_can_stand_for_is_a_fixed_size() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.arange(16.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count = x.shape[1] // 4
            parts = x[:, : 4 * count].reshape(x.shape[0], count, 4, x.shape[2])
            return torch.stack([parts[:, i] for i in range(count)], 1) * self.scale

    captured = capture(Pairs(), (torch.randn(2, 8, 16),))
    (x,) = captured.inputs
    assert x.dynamic == (True, False, False), "the length may only be 8, a divisor of 16"
    assert all(map(sympy.isprime, captured.hints.values()))
    given = torch.randn(5, 8, 16)
    assert torch.equal(captured.graph_module(*captured.flatten((given,)))[0], Pairs()(given))


def test_height_and_width_are_static_and_masks_are_not() -> None:
    class Convolves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.convolution(image)

    captured = capture(Convolves(), (torch.randn(2, 3, 8, 8),))
    assert captured.inputs[0].dynamic == (True, False, False, False)
    with pytest.raises(CaptureError, match="input `image` has size 9 in dim 3, captured with 8"):
        captured.flatten((torch.randn(2, 3, 8, 9),))

    class Masks(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q = x.unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    masked = capture(Masks(), (torch.randn(2, 5, 8), torch.zeros(2, 1, 5, 5)))
    assert masked.inputs[1].dynamic == (True, False, True, True)
    masked.flatten((torch.randn(3, 7, 8), torch.zeros(3, 1, 7, 7)))


class Unrolled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x[:, 0]
        for i in range(x.shape[1]):  # HERE
            total = total + x[:, i] * i
        return total


def test_a_size_that_the_model_fixes_is_recorded_and_refused() -> None:
    model = Unrolled()
    captured = capture(model, (torch.randn(3, 4, 5),))
    (wanted,) = captured.inputs
    assert wanted.dynamic == (True, False, True)
    captured.flatten((torch.randn(2, 4, 6),))
    assert message(lambda: captured.flatten((torch.randn(2, 7, 5),))) == [
        "input `x` has size 7 in dim 1, captured with 4",
        f"  --> tests/test_dynamic_sizes.py:{line_of('for i in range(x.shape[1]):')}",
        f"  {line_of('for i in range(x.shape[1]):'):>5} | for i in range(x.shape[1]):  # HERE",
        "  why:  this size is fixed in the captured graph",
        "  help: pass size 4, or compile with example_inputs of size 7 in that dim",
    ]


def test_an_unrolled_batch_keeps_the_size_of_the_example() -> None:
    class OverBatch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([row * i for i, row in enumerate(x)])

    model = OverBatch()
    captured = capture(model, (torch.randn(1, 5, 6),))  # capture tries a batch of 2 first
    assert captured.inputs[0].dynamic[0] is False
    assert torch.equal(captured.graph_module(*captured.flatten((torch.ones(1, 5, 6),)))[0], model(torch.ones(1, 5, 6)))


def test_an_assert_on_the_length_is_enforced_at_its_line() -> None:
    captured = capture(NanoGPT(), (ids(2, 6),))
    captured.flatten((ids(2, 16),))
    code = 'assert t <= self.block_size, f"cannot forward {t} tokens"'
    line = capturing.line_of(capturing.__file__, code)
    assert message(lambda: captured.flatten((ids(2, 17),))) == [
        "the captured graph does not cover idx.shape[1] = 17",
        f"  --> tests/capturing.py:{line}",
        f"  {line:>5} | {code}  # HERE",
        "  why:  the model requires idx.shape[1] <= 16",
        "  help: compile with example_inputs of these sizes, if it takes them",
    ]


class SingleToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if tokens.shape[1] == 1:  # HERE
            return x * 2
        return x


def test_a_branch_at_size_one_is_guarded_where_it_matters() -> None:
    model = SingleToken()
    captured = capture(model, (ids(2, 6),))
    captured.flatten((ids(1, 6),))
    assert message(lambda: captured.flatten((ids(2, 1),))) == [
        "the captured graph does not cover tokens.shape[1] = 1",
        f"  --> tests/test_dynamic_sizes.py:{line_of('if tokens.shape[1] == 1:')}",
        f"  {line_of('if tokens.shape[1] == 1:'):>5} | if tokens.shape[1] == 1:  # HERE",
        "  why:  it was captured with tokens.shape[1] != 1, and the model takes another branch there",
        "  help: compile with example_inputs of these sizes",
    ]
    single = capture(model, (ids(2, 1),))  # asked for: the other branch
    assert single.inputs[0].dynamic == (True, False)
    assert difference(model, single, ((ids(5, 1),), {})) == 0.0


def test_a_branch_that_changes_nothing_is_not_guarded() -> None:
    class Harmless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kind = "decode" if x.shape[1] == 1 else "prefill"
            return x.expand(x.shape[0], -1, -1) + len(kind) * 0

    captured = capture(Harmless(), (torch.randn(2, 6, 3),))
    assert captured.guards == ()
    captured.flatten((torch.randn(2, 1, 3),))


def test_a_constant_that_depends_on_the_branch_is_guarded() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.topk(2 if x.shape[1] > 1 else 1, dim=-1).values

    captured = capture(Scaled(), (torch.randn(2, 6, 5),))
    with pytest.raises(CaptureError, match=r"does not cover x.shape\[1\] = 1"):
        captured.flatten((torch.randn(2, 1, 5),))


def test_a_model_without_weights_is_where_its_inputs_are() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    mode = FakeTensorMode()
    with mode:
        given = torch.empty(2, 3, device=gpu)
    assert untouched.home_of([torch.empty(2, device="meta"), given]) == gpu
    assert untouched.home_of([torch.empty(2, device="meta")]) == untouched.home_of([]) == cpu
    model = nn.BatchNorm1d(3, device="meta")
    model.weight = nn.Parameter(torch.ones(3))
    with untouched.preserved(model):
        untouched.fake_tensors(model, mode, lambda x: x.is_meta, gpu)
        assert (model.weight.device, model.bias.device) == (cpu, gpu)
        assert model.running_mean is not None
        assert model.running_mean.device == gpu
    assert model.bias.is_meta


def test_tied_sizes_must_agree() -> None:
    captured = capture(NanoGPT(), (ids(2, 6), ids(2, 6)))
    assert message(lambda: captured.flatten((ids(2, 6), ids(2, 5)))) == [
        "input `targets` has size 5 in dim 1, expected 6",
        "  why:  the captured graph ties it to idx.shape[1] = 6",
        "  help: pass inputs whose sizes agree, or compile with example_inputs of these sizes",
    ]
