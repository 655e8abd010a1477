"""A compiled module in DistributedDataParallel and under FSDP2: gradients, steps and weights are those of one device.

The model on one device sees the whole batch; each row of ranks sees its part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from distributed import run
from test_distributed_models import Widened
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import LARGEST_NORM, adamw, batch, loss_of, of_torch, parameters_apart

import tpcompile
from tpcompile.compare import gradient_errors
from tpcompile.errors import TpcompileError
from tpcompile.layers import Layer
from tpcompile.module import TensorParallel

pytestmark = pytest.mark.distributed

Answers = Mapping[str, Any]


def shard(tp: TensorParallel, mesh: DeviceMesh) -> None:
    """FSDP2 as its users write it: every layer, then the rest."""
    for module in tp.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh)
    fully_shard(tp, mesh=mesh)


def ddp(tp: TensorParallel, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(tp, process_group=mesh.get_group())


def fsdp(tp: TensorParallel, mesh: DeviceMesh) -> nn.Module:
    shard(tp, mesh)
    return tp


def compiled(name: str, grid: DeviceMesh, per_layer: bool) -> tuple[nn.Module, TensorParallel]:
    model = zoo.build(name).double()
    inputs = {"input_ids": batch(0), "use_cache": False}
    return model, tpcompile.compile(model, example_inputs=inputs, mesh=grid, per_layer=per_layer)


def trained(name: str, grid: DeviceMesh, wrap: Callable[[TensorParallel, DeviceMesh], nn.Module]) -> Answers:
    """Two steps with clipping, on one device and on the grid: the worst errors of what can be seen on the way."""
    model, tp = compiled(name, grid, wrap is fsdp)
    wrapped = wrap(tp, grid["dp"])
    answers: dict[str, Any] = {"weights before": parameters_apart(model.state_dict(), tpcompile.full_state_dict(tp))}
    optimizers = [adamw(model), adamw(wrapped)]
    naive = 0.0
    for step in range(2):
        ids = batch(step)
        loss_of(model, ids).backward()
        mine = loss_of(wrapped, ids.chunk(grid["dp"].size())[grid.get_local_rank("dp")])
        mine.backward()
        wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found = tpcompile.full_gradients(tp)
        answers[f"gradients {step}"] = max(gradient_errors(wanted, found).values())
        naive = max(naive, max(gradient_errors(wanted, {n: g * 2 for n, g in found.items()}).values()))
        norms = of_torch(model, LARGEST_NORM), tpcompile.clip_grad_norm_(wrapped, LARGEST_NORM)
        answers[f"norm {step}"] = abs(float(norms[1] / norms[0]) - 1)
        answers[f"clipped {step}"] = max(gradient_errors(wanted, tpcompile.full_gradients(tp)).values())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    answers["weights"] = parameters_apart(model.state_dict(), tpcompile.full_state_dict(tp))
    return {"apart": answers, "naive": naive, "norm": float(norms[1])}  # pyright: ignore[reportPossiblyUnboundVariable]


def on_a_grid(name: str, tp: int) -> Answers:
    torch.set_num_threads(1)
    grid = init_device_mesh("cpu", (2, tp), mesh_dim_names=("dp", "tp"))
    with Widened():
        found: dict[str, Any] = {"ddp": trained(name, grid, ddp), "fsdp": trained(name, grid, fsdp)}
        return found | ({"refused": refused(name, grid)} if tp > 1 else {})


def refused(name: str, grid: DeviceMesh) -> Sequence[str]:
    """What is said of layers that were not compiled to be divided, and of parameters in another dtype."""
    said: list[str] = []
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        _, tp = compiled(name, grid, per_layer=policy.param_dtype is not None)
        for module in (*(m for m in tp.modules() if isinstance(m, Layer)), tp):
            fully_shard(module, mesh=grid["dp"], mp_policy=policy)
        try:
            loss_of(tp, batch(0))
        except TpcompileError as error:
            said.append(error.what)
    return said


@cache
def answers(name: str, tp: int) -> list[Answers]:
    return run(on_a_grid, 2 * tp, name, tp)


ON_GRIDS = pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("qwen3", 1),
        *(pytest.param(n, 2, marks=pytest.mark.slow) for n in ("qwen3", "falcon_mqa", "gpt_neox", "llama_uneven")),
    ],
)


@ON_GRIDS
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_norm_steps_and_weights_are_those_of_one_device(kind: str, name: str, tp: int) -> None:
    for own in answers(name, tp):
        assert max(own[kind]["apart"].values()) < 1e-9, own[kind]["apart"]
        assert own[kind]["naive"] > 0.5
    assert len({own[kind]["norm"] for own in answers(name, tp)}) == 1


@pytest.mark.slow
def test_what_fully_shard_may_do_and_the_graph_does_not_know_is_refused() -> None:
    for own in answers("qwen3", 2):
        assert own["refused"] == [
            "fully_shard has divided model.layers.0.self_attn.q_norm.weight, which is read outside of its layer",
            "parameter model.embed_tokens.weight is torch.bfloat16, and was compiled as torch.float64",
        ]
