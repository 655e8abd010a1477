"""What cannot be captured is told at its line, and leaves torch as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import capturing
import pytest
import torch
from capturing import (
    difference,
    floats,
    message,
    snapshot,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from tpcompile.capture import capture
from tpcompile.errors import CaptureError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from capturing.one_thread()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 3


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class BranchesOnData(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # HERE
            return self.linear(x)
        return x


class TakesAnItem(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * x.max().item()  # HERE


class SizesByData(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[x[:, 0] > 0]  # HERE


class SlicesByData(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[: int(x.sum())]  # HERE


class CallsFunction(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(self.linear(x))  # HERE


class Reentrant(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.linear, x, use_reentrant=True)  # HERE


class HooksATensor(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y.register_hook(lambda gradient: gradient * 2)  # HERE
        return y


class Infers(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # HERE
            y = self.linear(x)
        return y + x


class WritesUnseen(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        with torch.no_grad():
            y.view(-1).mul_(2)  # HERE
        return y


class UsesData(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + y.data  # HERE


class UsesCond(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (self.linear(x),))  # HERE


class Misspelt(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.liner(x)  # pyright: ignore[reportCallIssue]  # HERE


class UsesNumpy(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.from_numpy(x.numpy())  # HERE


class Asserts(Faulty):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] > 100, "too few rows"  # HERE
        return self.linear(x)


class ReturnsObject(Faulty):
    def forward(self, x: torch.Tensor) -> Any:
        return slice(self.linear(x), None)


HELP_DATA = "use torch.where or a mask in place of if, int() or .item(), or pass the decision in"
HELP_VALUE = "keep the value in a tensor (torch.where, masks), or compute it outside the model and pass it in"
HELP_RUN = (
    "check that the model runs on these example inputs; numpy, .tolist() and other uses of tensor values in forward "
    "cannot be traced"
)
FAULTS: list[tuple[type[Faulty], str, str, str]] = [
    (BranchesOnData, "BranchesOnData cannot be captured: its forward decides by the value of a tensor",
     "a graph holds tensor ops only, no branch, loop or size that the data choose (", HELP_DATA),
    (SlicesByData, "SlicesByData cannot be captured: its forward decides by the value of a tensor",
     "a graph holds tensor ops only, no branch, loop or size that the data choose (", HELP_DATA),
    (TakesAnItem, "TakesAnItem cannot be captured: a size or a number in its forward is the value of a tensor",
     "aten.item.default gives what only the data know", HELP_VALUE),
    (SizesByData, "SizesByData cannot be captured: a size or a number in its forward is the value of a tensor",
     "aten.index.Tensor gives what only the data know", HELP_VALUE),
    (CallsFunction, "torch.autograd.Function 'Doubled' cannot be captured",
     "its forward would be traced and its backward lost, which is not the derivative of its forward",
     "write the operation with ordinary tensor ops and detach(), or as a torch.library.custom_op"),
    (Reentrant, "reentrant activation checkpointing cannot be captured",
     "its backward re-runs Python code, which a graph does not have",
     "pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or switch checkpointing off"),
    (HooksATensor, "a gradient hook on a tensor inside forward cannot be captured",
     "hooks belong to the tensors of one call; a graph would lose them",
     "register the hook on an output after the call, or leave it out"),
    (Infers, "torch.inference_mode inside forward cannot be captured",
     "the trace does not record it, so gradients would flow where the model stops them",
     "use torch.no_grad() there"),
    (WritesUnseen, "WritesUnseen cannot be captured: it writes to a tensor in place under torch.no_grad()",
     "the tensor may carry gradients, which such a write leaves as they were; a graph cannot hide it",
     "compute a new tensor instead"),
    (UsesData, "UsesData cannot be captured: a tensor in its forward escapes the trace",
     "it is made in a way that the tracer does not see, such as x.data", "use x.detach() in place of x.data"),
    (UsesCond, "UsesCond cannot be captured: torch's 'cond' is not supported",
     "its branches or bodies are graphs of their own, which are not rewritten",
     "write it with plain tensor ops, such as torch.where"),
    (Misspelt, "Misspelt cannot be captured: its forward raised AttributeError",
     "'Misspelt' object has no attribute 'liner'", HELP_RUN),
    (UsesNumpy, "UsesNumpy cannot be captured: its forward raised RuntimeError",
     ".numpy() is not supported for tensor subclasses.", HELP_RUN),
    (Asserts, "Asserts cannot be captured: its forward raised AssertionError", "too few rows", HELP_RUN),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "what", "why", "help"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_what_cannot_be_captured_is_told_at_its_line(kind: type[Faulty], what: str, why: str, help: str) -> None:
    model = kind()
    before = snapshot(model)
    said = message(lambda: capture(model, (torch.randn(3, 4),)))
    code = inspect.getsource(kind.forward)
    (number,) = [n for n, line in enumerate(code.splitlines()) if line.endswith("# HERE")]
    first = inspect.getsourcelines(kind.forward)[1]
    assert said[:3] == [
        what,
        f"  --> tests/test_captures_refused.py:{first + number}",
        f"  {first + number:>5} | {code.splitlines()[number].strip()}",
    ]
    assert said[3].startswith(f"  why:  {why}")
    assert said[4:] == [f"  help: {help}"]
    assert "torch.export" not in "\n".join(said)
    assert snapshot(model) == before


class OwnCube(torch.autograd.Function):
    """A backward that is the derivative; forward and context apart, as in newer code."""

    @staticmethod
    def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
        return factor * x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * 3 * ctx.factor * ctx.saved_tensors[0] ** 2, None


def test_a_function_whose_backward_is_the_derivative_is_inlined() -> None:
    class Cubed(Faulty):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return OwnCube.apply(self.linear(x), 0.5)  # pyright: ignore[reportReturnType]

    model = Cubed().double()
    captured = capture(model, *floats(-1, 4)(3, 0))
    assert difference(model, captured, floats(-1, 4)(2, 0)) < 1e-13


class Clipped(torch.autograd.Function):
    """A backward that is the derivative of the forward below ten alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * (ctx.saved_tensors[0].abs() < 10)


class Scaled(torch.autograd.Function):
    """A backward that is the derivative of the forward for a factor of 1 alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


doubled = Doubled.apply  # as functions are named once, when a module is imported


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(Clipped.apply, id="wrong where numbers are large"),
        pytest.param(lambda x: Scaled.apply(Scaled.apply(x, 1.0), 2.0), id="wrong in its second call"),
        pytest.param(doubled, id="under another name"),
    ],
)
def test_every_call_of_a_function_is_measured(function: Callable[[torch.Tensor], Any]) -> None:
    class Calls(Faulty):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.linear(x))

    with pytest.raises(CaptureError, match=r"torch.autograd.Function '\w+' cannot be captured"):
        capture(Calls(), *floats(-1, 4)(3, 0))


def test_an_output_that_hides_tensors_is_refused() -> None:
    assert message(lambda: capture(ReturnsObject(), (torch.randn(3, 4),)))[0] == (
        "the model returns a slice, neither a tensor nor a plain value"
    )


def test_a_failed_capture_is_silent_and_leaves_torch_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    patched = [torch.SymBool.__bool__, torch.Tensor.register_hook, torch.inference_mode.__enter__]
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(CaptureError):
        capture(BranchesOnData(), (torch.randn(3, 4),))
    assert capfd.readouterr() == ("", "")
    assert patched == [torch.SymBool.__bool__, torch.Tensor.register_hook, torch.inference_mode.__enter__]
    assert torch.autograd.Function.__dict__["apply"] is apply
    x = torch.randn(2, requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_a_derivative_inside_of_forward_is_refused(transform: str) -> None:
    """Its parts are recorded without their transform: a graph of them has other values."""

    class Differentiates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.up(x)
            if transform == "grad":
                return torch.func.grad(lambda h: h.tanh().square().sum())(y)
            return torch.func.jvp(torch.tanh, (y,), (torch.ones(2, 8),))[1]

    with pytest.raises(CaptureError, match=r"its forward differentiates with torch.func\n *--> tests"):
        capture(Differentiates(), (torch.randn(2, 4),))
