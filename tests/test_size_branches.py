"""Branches of Python code on sizes: the graph is the model at every size, or the size is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import Spec
from tpcompile.capture import capture
from tpcompile.errors import CaptureError

SHAPES = ((2, 3, 4), (5, 7, 4), (2, 1, 4), (1, 3, 4), (1, 1, 4), (0, 3, 4), (2, 0, 4))


class Asks(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.up(x))


BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "if": lambda x: x * 2 if x.shape[1] == 1 else x,
    "int": lambda x: x * (1 + int(x.shape[1] > 1)),
    "a number plus a condition": lambda x: x * (x.shape[1] + (x.shape[1] > 1)),
    "a sum of conditions": lambda x: x * sum([x.shape[1] > 1, x.shape[0] > 1]),
    "an argument that differs by one": lambda x: x * (3 if x.shape[0] == 1 else 2),
    "hash": lambda x: x * {True: 1.0, False: 2.0}[x.shape[1] > 1],
    "the truth of a size": lambda x: x * 2 if x.shape[0] else x.sum() + torch.zeros(3),
    "not": lambda x: torch.ones(3) if not x.shape[1] else x,
    "nothing": lambda x: torch.ones(3) if x.shape[0] == 0 else x,
    "numel": lambda x: torch.ones(3) if x.numel() == 0 else x,
    "in": lambda x: torch.ones(3) if 0 in x.shape else x,
    "squeeze": lambda x: x.squeeze(1) * 2,
    "squeeze in place": lambda x: (x * 2).squeeze_(1),
    "squeeze of several": lambda x: x.squeeze((0, -1)),
    "squeeze of all": lambda x: torch.squeeze(x[:, :, :1]),
    "squeeze of none, and of a sum of sizes": lambda x: torch.cat([x, x[:, 1:]], 1).squeeze(1).sum().squeeze(0),
    "the layout": lambda x: x * 2 if x.transpose(0, 1).is_contiguous() else x,
}


def covered(function: Callable[[Tensor], Tensor]) -> set[tuple[int, ...]]:
    """The shapes that the graph takes; at all of them it is the model."""
    model = Asks(function)
    captured = capture(model, (torch.randn(2, 3, 4),))
    taken: set[tuple[int, ...]] = set()
    for shape in SHAPES:
        x = torch.randn(shape)
        try:
            flat = captured.flatten((x,))
        except CaptureError as error:
            assert error.where is None or error.where.line  # noqa: PT017
            continue
        (found,) = captured.graph_module(*flat)
        expected = model(x)
        assert found.shape == expected.shape, shape
        assert torch.equal(found, expected), shape
        taken.add(shape)
    return taken


@pytest.mark.parametrize("name", BRANCHES)
def test_a_size_at_which_another_branch_is_taken_is_refused(name: str) -> None:
    taken = covered(BRANCHES[name])
    assert (2, 3, 4) in taken
    assert taken < set(SHAPES)


class Squeezed(nn.Module):
    """Between two products, where ranks hold parts of the last dim."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().squeeze(1))


@pytest.mark.parametrize("length", [1, 3])
def test_ranks_squeeze_what_one_device_does(length: int) -> None:
    """Each graph takes the sizes at which the same dims are squeezed; ranks name these dims."""
    model = Squeezed().double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    assert tpcompile.verify(model, Spec.parse("up column\ndown row"), degree=2, example_inputs=(x,)).ok
    captured = capture(model, (x,))
    assert captured.flatten((torch.randn(5, length, 4, dtype=torch.float64),))
    with pytest.raises(CaptureError, match=r"shape\[1\]|size 3"):
        captured.flatten((torch.randn(2, 4 - length, 4, dtype=torch.float64),))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * max(x.shape[1], 1),
        lambda x: x + 1 if x.shape[1] > 1 else torch.add(x, 1),
        lambda x: x * x.shape[1] if x.shape[0] else x.mul(x.shape[1]),
        lambda x: x.contiguous() if not x.is_contiguous() else x,
    ],
)
def test_a_branch_that_changes_nothing_refuses_nothing(function: Callable[[Tensor], Tensor]) -> None:
    assert covered(function) == set(SHAPES)


def test_the_message_names_the_size_and_the_line() -> None:
    captured = capture(Asks(BRANCHES["nothing"]), (torch.randn(2, 3, 4),))
    with pytest.raises(CaptureError, match=r"does not cover x.shape\[0\] = 0") as caught:
        captured.flatten((torch.randn(0, 3, 4),))
    assert "captured with x.shape[0] != 0, and the model takes another branch there" in str(caught.value)
    assert "torch.ones(3) if x.shape[0] == 0 else x" in str(caught.value)


GRAD_MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "is_grad_enabled": lambda x: x if torch.is_grad_enabled() else x * 2,
    "requires_grad": lambda x: x if x.requires_grad else x * 2,
}


@pytest.mark.parametrize("name", GRAD_MODES)
def test_a_branch_on_the_grad_mode_is_for_that_mode(name: str) -> None:
    model, x = Asks(GRAD_MODES[name]), torch.randn(2, 3, 4)
    captured = capture(model, (x,))
    assert torch.equal(captured.graph_module(*captured.flatten((x,)))[0], model(x))
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"called under torch.no_grad, captured with gradients") as e,
    ):
        captured.flatten((x,))
    assert f"x if {'torch.' if name == 'is_grad_enabled' else 'x.'}{name}" in str(e.value)


def test_a_branch_on_the_grad_mode_that_changes_nothing_is_for_both() -> None:
    model, x = Asks(lambda x: x * 2 if torch.is_grad_enabled() else x.__mul__(2)), torch.randn(2, 3, 4)
    captured = capture(model, (x,))
    with torch.no_grad():
        assert torch.equal(captured.graph_module(*captured.flatten((x,)))[0], model(x))


def test_fast_paths_of_torch_are_no_branches() -> None:
    """``nn.TransformerEncoderLayer`` asks for the grad mode, and computes the same in either."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    captured = capture(layer, (x,))
    with torch.no_grad():
        (found,) = captured.graph_module(*captured.flatten((x,)))
        assert torch.allclose(found, layer(x), atol=1e-5)
