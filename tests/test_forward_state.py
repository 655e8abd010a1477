"""What a forward keeps from call to call, in buffers and elsewhere."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import capturing
import numpy as np
import pytest
import torch
from capturing import (
    difference,
    floats,
    gpt2,
    gradients,
    message,
    mlp,
    text,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from tpcompile.capture import capture
from tpcompile.errors import CaptureError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from capturing.one_thread()


def test_batch_norm_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    twin = copy.deepcopy(model)
    captured = capture(model, *floats(-1, 4)(3, 0))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    for batch in (5, 2):
        (x,), _ = floats(-1, 4)(batch, 0)
        assert torch.equal(captured.graph_module(*captured.flatten((x,)))[0], twin(x))
    assert model[1].num_batches_tracked == 2
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    with pytest.raises(CaptureError, match=r"does not cover input\.shape"):
        captured.flatten((torch.randn(1, 4, dtype=torch.float64),))  # as batch norm itself refuses it


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.table = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        with torch.no_grad():
            self.table.mul_(2)
        return self.inner(x) + self.count + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_buffers_and_plain_tensors_are_the_models_own() -> None:
    model = Counting()
    twin = copy.deepcopy(model)
    captured = capture(model, (torch.randn(3, 4),))
    assert set(captured.constants) == {"table", "_lifted.0"}
    x = torch.randn(2, 4)
    for _ in range(2):
        assert torch.equal(captured.graph_module(*captured.flatten((x,)))[0], twin(x))
    assert model.count == twin.count == 2
    assert torch.equal(model.table, twin.table)


def test_what_forward_leaves_on_the_module_is_warned_of() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Counter()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x * 2
            return self.inner(x)

    class Counter(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x

    model = Remembers()
    with pytest.warns(
        UserWarning, match=r"^Remembers: forward sets inner.calls, last; the captured graph has the same"
    ):
        capture(model, (torch.randn(3, 4),))
    assert "last" not in vars(model)
    assert model.inner.calls == 0


class Remembering(nn.Module):
    """Calls ``forward`` with itself, a linear layer and what it keeps in ``kept``."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], kept: Any):
        super().__init__()
        self.linear, self.kept, self.function = nn.Linear(4, 4), kept, forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.linear(x))


def counted(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.kept += 1
    return x * model.kept


def listed(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.kept.append(len(model.kept))
    return x + model.kept[-1]


def summed(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.kept[0] = model.kept[0] + 1
    return x * model.kept[0]


def told(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    model.kept += 1
    return x, model.kept


def privately(model: Any, x: torch.Tensor) -> torch.Tensor:
    model._kept = x.detach().mean() + getattr(model, "_kept", 0)
    return x * model._kept


@pytest.mark.parametrize(
    ("forward", "kept"), [(counted, 0), (listed, []), (summed, [torch.ones(())]), (told, 0), (privately, None)]
)
def test_what_depends_on_earlier_calls_is_refused(forward: Callable[[Any, torch.Tensor], Any], kept: Any) -> None:
    with pytest.raises(CaptureError, match=r"depends on what an earlier call left in `_?kept`") as refused:
        capture(Remembering(forward, kept), (torch.randn(3, 4),))
    assert refused.value.where is not None
    assert refused.value.help is not None


def test_a_table_that_is_made_once_is_no_memory() -> None:
    def cached(model: Any, x: torch.Tensor) -> torch.Tensor:
        if model.kept is None or len(model.kept) < x.shape[0]:
            model.kept = torch.arange(x.shape[0]).cos()
        return x * model.kept[: x.shape[0], None]

    model = Remembering(cached, None)
    with pytest.warns(UserWarning, match="forward sets kept"):
        captured = capture(model, (torch.randn(3, 4),))
    assert model.kept is None
    assert difference(model, captured, ((torch.randn(3, 4),), {})) == 0.0


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.manual_seed(3).initial_seed()])
def test_random_numbers_that_a_trace_does_not_see_are_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(CaptureError, match="draws random numbers that the trace does not see") as refused:
        capture(Remembering(lambda _, x: x if draw() < 0.5 else 2 * torch.rand_like(x), None), (torch.randn(3, 4),))
    assert refused.value.where is not None


@pytest.mark.parametrize("path", ["code", "graph", "meta", "_code"])
def test_names_that_a_graph_needs_for_itself_are_refused(path: str) -> None:
    model = nn.Sequential()
    setattr(model, path, nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=f"it has an attribute `{path}`") as refused:
        capture(model, (torch.randn(3, 4),))
    assert refused.value.where is not None


def test_a_result_that_is_written_out_is_a_write() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4).double()).train()  # F.normalize(..., out=self._u)
    twin, x = copy.deepcopy(model), torch.randn(3, 4, dtype=torch.float64)
    captured = capture(model, (x,))
    for _ in range(2):
        got, wanted = captured.graph_module(*captured.flatten((x,)))[0], twin(x)
        mine, theirs = gradients(model, [got]), gradients(twin, [wanted])
        assert torch.equal(got, wanted)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


def test_gradient_checkpointing_is_left_out_and_said_so() -> None:
    model = gpt2(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double().train()
    model.activation_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is not part of the captured graph"):
        captured = capture(model, *text(2, 5))
    assert model.is_activation_checkpointing
    assert difference(model, captured, text(3, 4)) == 0.0


def test_checkpointing_that_is_not_reentrant_is_inlined() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.linear, x, use_reentrant=False)

    model = Checkpointed().double()
    captured = capture(model, *floats(-1, 4)(3, 0))
    assert difference(model, captured, floats(-1, 4)(2, 0)) == 0.0


def test_forward_hooks_are_part_of_the_graph() -> None:
    model = mlp().double().eval()
    model[0].register_forward_hook(lambda *found: found[2] * 3)
    captured = capture(model, *floats(-1, 8)(3, 0))
    assert difference(model, captured, floats(-1, 8)(2, 0)) == 0.0
    assert "mul" in captured.graph_module.code


def test_hooks_that_would_be_lost_are_refused() -> None:
    model = mlp()
    handle = model[0].register_full_backward_hook(lambda module, gradient, output: None)
    assert message(lambda: capture(model, (torch.randn(2, 8),))) == [
        "module '0' has a backward hook",
        "  in 0",
        "  why:  a graph keeps what forward hooks compute, but has no modules on which backward hooks could run",
        "  help: remove the hook before compiling",
    ]
    handle.remove()
    dict(model.named_parameters())["3.bias"].register_hook(lambda gradient: gradient * 2)
    assert message(lambda: capture(model, (torch.randn(2, 8),)))[0] == "parameter '3.bias' has a gradient hook"
