"""Writes through views become values: the graph computes what eager does at every size, and no write is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tpcompile.aliasing import is_inplace
from tpcompile.capture import capture
from tpcompile.passes.canonicalize import canonicalize
from tpcompile.passes.functionalize import functionalize
from tpcompile.program import Program

VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda v: v[..., 1:],
    lambda v: v[..., :-1],
    lambda v: v[..., -2:],
    lambda v: v[..., 1:3],
    lambda v: v[..., -1],
    lambda v: v[..., 0],
    lambda v: v[:, 1],
    lambda v: v[-1],
    lambda v: v[-2:-1],
    lambda v: v.transpose(0, -1),
    lambda v: v.permute(*reversed(range(v.dim()))),
    lambda v: v.unsqueeze(1),
    lambda v: v.reshape(-1),
    lambda v: v.flatten(0, 1),
    lambda v: v[..., ::2],
    lambda v: v,
)
WRITES: tuple[Callable[[Tensor], object], ...] = (
    lambda v: v.mul_(2),
    lambda v: v.add_(1),
    lambda v: v.copy_(v.detach().sin()),
    lambda v: v.copy_(torch.ones(())),
    lambda v: v.zero_(),
    lambda v: v.fill_(0.5),
    lambda v: v.tanh_(),
    lambda v: v.masked_fill_(v > 0.2, 0.1),
)


class Writes(nn.Module):
    """Takes views of one value, writes through them, and reads everything that was taken."""

    def __init__(self, steps: tuple[tuple[int, int, int], ...]):
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x * 1.5]
        for source, view, write in self.steps:
            base = values[source % len(values)]
            taken = VIEWS[view](base) if base.dim() > 1 and min(base.shape) > 1 else base
            values.append(taken)
            WRITES[write](taken)
        return values


steps = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, len(VIEWS) - 1), st.integers(0, len(WRITES) - 1)),
    min_size=1,
    max_size=4,
)


def functional(model: nn.Module, x: Tensor) -> Program:
    captured = capture(model, (x,))
    return canonicalize(functionalize(Program(captured, captured.graph_module, 2)))


@settings(max_examples=15)
@given(steps)
@example([(0, 9, 0), (1, 0, 0), (1, 12, 0)])  # a reshape that copied where it was traced, and would not afterwards
def test_what_is_written_is_what_eager_writes(drawn: list[tuple[int, int, int]]) -> None:
    model = Writes(tuple(drawn))
    with torch.no_grad():
        program = functional(model, torch.randn(4, 5, 6))
        for shape in ((4, 5, 6), (7, 5, 6)):
            x = torch.randn(shape)
            if shape[0] != 4 and not program.captured.inputs[0].dynamic[0]:
                continue
            flat = program.captured.flatten((x,))
            for got, wanted in zip(program.graph_module(*flat), model(x), strict=True):
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("view", [v for v in range(len(VIEWS)) if v not in (12, 13, 14)])
def test_no_write_is_left(view: int) -> None:
    program = functional(Writes(((0, view, 0), (1, 15, 1))), torch.randn(4, 5, 6))
    assert not any(n.op == "call_function" and is_inplace(n) for n in program.graph.nodes), program.graph


def test_a_write_that_went_to_a_copy_would_be_seen() -> None:
    """The control of this file: the same graph with the write left out differs."""
    model, x = Writes(((0, 0, 0),)), torch.randn(4, 5, 6)
    program = functional(model, x)
    graph = program.graph
    doubled = next(n for n in graph.nodes if str(n.target) == "aten.mul.Tensor" and n.args[1] == 2)
    doubled.replace_all_uses_with(doubled.args[0])
    program.graph_module.recompile()
    assert not torch.equal(program.graph_module(x)[0], model(x)[0])
