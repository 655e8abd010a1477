"""Models whose graph would lose something without a word are refused, and those that only look like them are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile.capture import capture
from tpcompile.errors import CaptureError
from tpcompile.spec import Spec

X = torch.randn(2, 3, 4)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_parameters_in_the_memory_of_another_are_refused() -> None:
    model = Pair()
    model.b.weight.data = model.a.weight.data
    with pytest.raises(CaptureError, match=r"'b.weight' lies in the memory of 'a.weight'"):
        capture(model, (X,))


def test_a_buffer_in_the_memory_of_a_parameter_is_refused() -> None:
    model = Pair()
    model.register_buffer("copy_of_row", model.a.weight.data[2])
    with pytest.raises(CaptureError, match=r"'copy_of_row' lies in the memory of 'a.weight'"):
        capture(model, (X,))


def test_neighbours_in_one_memory_and_tied_parameters_are_not() -> None:
    model = Pair()
    flat = torch.randn(32)
    model.a.weight.data, model.b.weight.data = flat[:16].view(4, 4), flat[16:].view(4, 4)
    capture(model, (X,))
    model.b.weight = model.a.weight
    assert set(capture(model, (X,)).parameters) == {"a.weight", "a.bias", "b.bias"}


LOST = nn.Parameter(torch.randn(4))


class Holder:
    """No module: what it holds is not the model's."""

    def __init__(self) -> None:
        self.inner = nn.Linear(4, 4)


class Hides(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.where = nn.Linear(4, 4), where
        self.rows, self.holder = [nn.Parameter(torch.randn(4))], Holder()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.where:
            case "list":
                return y * self.rows[0]
            case "global":
                return y * LOST
            case _:
                return self.holder.inner(y)


@pytest.mark.parametrize("where", ["list", "global", "object"])
def test_a_gradient_that_nobody_would_get_is_refused(where: str) -> None:
    model = Hides(where)
    with pytest.raises(
        CaptureError, match="a tensor that requires a gradient, and is no parameter of the model"
    ) as caught:
        capture(model, (X,))
    assert caught.value.where is not None
    for parameter in (*model.rows, LOST, *model.holder.inner.parameters()):
        parameter.requires_grad_(False)
    captured = capture(model, (X,))
    LOST.requires_grad_(True)
    assert torch.equal(captured.graph_module(*captured.flatten((X,)))[0], model(X))


def test_a_generator_inside_of_forward_is_refused() -> None:
    class Draws(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.randn(4, generator=torch.Generator().manual_seed(0))

    with pytest.raises(CaptureError, match=r"draws from a torch.Generator\n *--> .*test_refused_models.py"):
        capture(Draws(), (X,))


@functools.lru_cache(maxsize=8)
def table(n: int) -> Tensor:
    return torch.arange(n) * 2.0


def test_what_a_trace_puts_into_an_lru_cache_goes_again() -> None:
    class Remembers(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + table(4)

    table.cache_clear()
    model = Remembers()
    captured = capture(model, (X,))
    assert type(table(4)) is Tensor
    assert torch.equal(captured.graph_module(*captured.flatten((X,)))[0], model(X))


def test_what_an_lru_cache_held_before_stays() -> None:
    @functools.lru_cache
    def other() -> object:
        return object()

    held = other()
    capture(Pair(), (X,))
    assert other() is held


class Averages(Pair):
    """Whose buffer is updated without gradients, in several ways."""

    def __init__(self, update: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        with torch.no_grad():
            self.update(self, y)
        return y + self.mean


def _assigned(module: Any, y: Tensor) -> None:
    module.mean = 0.9 * module.mean + y.mean((0, 1))


UPDATES: dict[str, Callable[[Any, Tensor], None]] = {
    "in place": lambda m, y: m.mean.mul_(0.9).add_(y.mean((0, 1))),
    "copied": lambda m, y: m.mean.copy_(0.9 * m.mean + y.mean((0, 1))),
    "assigned": _assigned,
}


@pytest.mark.parametrize("how", UPDATES)
def test_a_buffer_that_is_updated_without_gradients_keeps_none(how: str) -> None:
    """Kept, every step would hold the graphs of all steps before it."""
    captured = capture(Averages(UPDATES[how]), (X,))
    (y,) = captured.graph_module(*captured.flatten((X,)))
    assert y.requires_grad
    assert not captured.graph_module.get_buffer("mean").requires_grad
    assert tpcompile.verify(Averages(UPDATES[how]), Spec.parse("a column\nb row\n"), degree=2, example_inputs=(X,)).ok


def test_sparse_gradients_are_the_same_numbers() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.up(self.table(ids))

    ids = torch.randint(0, 8, (2, 5))
    for spec in ("table vocab\n", "up column\n"):
        report = tpcompile.verify(Looks(), Spec.parse(spec), degree=2, example_inputs=(ids,))
        assert report.ok, report.mismatch
