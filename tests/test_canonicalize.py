"""Ops that are written out as others: what stands there instead, and that specs cut it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import Spec
from tpcompile.errors import TpcompileError

SPEC = Spec.parse("up column\ndown row")


class Between(nn.Module):
    """Something done to the hidden values of an MLP, whose last dim is cut."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 8), nn.Linear(8, 4), between

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.between(h.flatten(0, 1).relu(), h))


@pytest.mark.parametrize("name", ["view_as", "reshape_as"])
def test_the_shape_of_another_tensor_is_written_out(name: str) -> None:
    model = Between(lambda flat, h: getattr(flat, name)(h)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    program = tpcompile.rewrite(model, SPEC, degree=2, example_inputs=(x,))
    assert name not in program.text()
    for shape in ((2, 3, 4), (5, 1, 4)):
        again = (torch.randn(shape, dtype=torch.float64),)
        assert tpcompile.verify(model, SPEC, degree=2, example_inputs=again).ok
    mixed = Between(lambda flat, h: getattr(flat, name)(h.transpose(1, 2)).transpose(1, 2)).double()
    with pytest.raises(TpcompileError):  # the control: the cut dim goes into others
        tpcompile.rewrite(mixed, SPEC, degree=2, example_inputs=(x,))
