"""Optimizers, clipping and loss scaling that take a rank's part for the whole are refused, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed import run
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

import tpcompile
from tpcompile.errors import TpcompileError
from tpcompile.whole_gradients import watch


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


def with_gradient(*shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    return parameter


class Lamb(torch.optim.SGD):
    """Of a library, known by its name."""


OPTIMIZERS = [torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon, Lamb]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_needs_whole_parameters_is_refused_for_parts_alone(kind: Any) -> None:
    part, whole = with_gradient(4, 4), with_gradient(4, 4)
    watch([("up.weight", part)])
    with pytest.raises(TpcompileError, match=rf"{kind.__name__} cannot step up.weight"):
        kind([part], lr=0.1).step(lambda: 0.0)
    assert torch.equal(part, torch.ones(4, 4))
    kind([whole], lr=0.1).step(lambda: torch.tensor(0.0))
    torch.optim.AdamW([part], lr=0.1).step()
    assert not torch.equal(part, torch.ones(4, 4))


def test_clipping_by_the_norm_of_what_is_held_is_refused_for_parts_alone() -> None:
    part, whole = with_gradient(3), with_gradient(4)
    watch([("up.weight", part)])
    with pytest.raises(TpcompileError, match=r"clip_grad_norm_ was given up.weight"):
        clip_grad_norm_([whole, part], 1.0)
    assert part.grad is not None
    assert torch.equal(part.grad, torch.ones(3))
    assert clip_grad_norm_([whole], 1.0) == 2.0
    clip_grads_with_norm_([part], 1.0, torch.tensor(2.0))  # by a norm that is the caller's own
    assert part.grad.max() < 1


def test_loss_scaling_is_refused_for_parts_alone() -> None:
    part, whole = with_gradient(3), with_gradient(4)
    watch([("up.weight", part)])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for refused in (scaler.step, scaler.unscale_):
        with pytest.raises(TpcompileError, match="ShardedGradScaler"):
            refused(torch.optim.SGD([part], lr=0.1))
    scaler.step(torch.optim.SGD([whole], lr=0.1))
    torch.amp.GradScaler("cpu", enabled=False).step(torch.optim.SGD([part], lr=0.1))


def refused_after_compile() -> list[str]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tp = tpcompile.compile(MLP(), tpcompile.Spec.parse("up column\ndown row"), example_inputs=(torch.randn(2, 6),))
    tp(torch.randn(2, 6, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    found: list[str] = []
    lbfgs = torch.optim.LBFGS(tp.parameters())
    calls: list[Callable[[], object]] = [lambda: clip_grad_norm_(tp.parameters(), 1.0), lambda: lbfgs.step(lambda: 0.0)]
    for call in calls:
        try:
            call()
        except TpcompileError as error:
            found.append(error.what)
    tpcompile.clip_grad_norm_(tp, 1.0)
    torch.optim.LBFGS([p for n, p in tp.named_parameters() if n.startswith("norm")]).step(lambda: 0.0)
    sgd, scaler = torch.optim.SGD(tp.parameters(), lr=0.1), ShardedGradScaler("cpu", process_group=tp.group)
    scaler.scale(torch.ones(()))
    scaler.step(sgd)
    return found


@pytest.mark.distributed
def test_what_compile_returns_is_watched() -> None:
    for found in run(refused_after_compile, 2):
        assert found == [
            "torch.nn.utils.clip_grad_norm_ was given up.weight, of which this rank holds a part",
            "LBFGS cannot step up.weight, of which every rank holds a part",
        ]
