"""Twenty steps of AdamW with clipping on 2 and 3 real ranks follow the run on one device, by the same user code."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from issued import Issued, Sent
from test_distributed_models import Widened
from torch import nn
from training import LARGEST_NORM, Clip, apart, batch, decayed_by_name, loss_of, of_torch, parameters_apart, train

import tpcompile
from tpcompile.errors import TpcompileError
from tpcompile.module import TensorParallel

pytestmark = pytest.mark.distributed

STEPS = 20
NAMES = ("gpt2", "llama_uneven")  # 4 heads; 9 heads on 3 kv heads
Answers = Mapping[str, Any]


Pair = tuple[nn.Module, TensorParallel]


def pair(name: str, dtype: torch.dtype) -> Pair:
    """The model, and this rank's module."""
    model = zoo.build(name).to(dtype)
    return model, tpcompile.compile(model, example_inputs={"input_ids": batch(0), "use_cache": False})


def followed(model: nn.Module, tp: TensorParallel, clip: Clip, steps: int) -> Answers:
    """The worst relative differences to one device; both modules start from, and are left with, the same weights."""
    start = [(module, copy.deepcopy(module.state_dict())) for module in (model, tp)]
    losses, norms = train(model, steps, of_torch)
    found, found_norms = train(tp, steps, clip)
    moved = parameters_apart(model.state_dict(), tpcompile.full_state_dict(tp))
    for module, state in start:
        module.load_state_dict(state)
        module.zero_grad()
    apart_by = {"losses": apart(losses, found), "norms": apart(norms, found_norms), "parameters": moved}
    return {"apart": apart_by, "clipped": min(norms) > LARGEST_NORM, "norms": found_norms}


def accumulated(model: nn.Module, tp: TensorParallel) -> Answers:
    """Two micro-batches a step are one batch of both."""
    start = [(module, copy.deepcopy(module.state_dict())) for module in (model, tp)]
    losses, _ = train(model, 3, of_torch)
    found, _ = train(tp, 3, tpcompile.clip_grad_norm_, lambda step: batch(step).split(2))
    moved = parameters_apart(model.state_dict(), tpcompile.full_state_dict(tp))
    for module, state in start:
        module.load_state_dict(state)
        module.zero_grad()
    return {"losses": apart(losses, found), "parameters": moved}


def seen_by_an_optimizer(model: nn.Module, tp: TensorParallel) -> Answers:
    """Kinds of parameters, foreach beside a loop, and groups by name: each rank's have those of the model."""
    names = {id(p): n for n, p in tp.named_parameters()}
    wanted = {id(p): n for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in decayed_by_name(tp)]
    loss_of(tp, batch(0)).backward()
    before = {n: p.detach().clone() for n, p in tp.named_parameters()}
    found: list[Mapping[str, torch.Tensor]] = []
    for foreach in (True, False):
        torch.optim.AdamW(tp.parameters(), foreach=foreach).step()
        found.append({n: p.detach().clone() for n, p in tp.named_parameters()})
        with torch.no_grad():
            for n, p in tp.named_parameters():
                p.copy_(before[n])
    return {
        "types": {type(p) for p in tp.parameters()},
        "gradients": {type(p.grad) for p in tp.parameters()},
        "groups": groups == [[wanted[id(p)] for p in g["params"]] for g in decayed_by_name(model)],
        "foreach": max(float((found[0][n] - found[1][n]).abs().max()) for n in before),
        "moved": all(not torch.equal(found[0][n], before[n]) for n in before),
    }


def norms(model: nn.Module, tp: TensorParallel) -> Answers:
    """All kinds of norms beside those on one device; what one call sends; no gradients; and a norm that is nan."""
    for module in (model, tp):
        module.zero_grad()
    answers: dict[str, Any] = {"none": float(tpcompile.grad_norm(tp))}
    for module in (model, tp):
        loss_of(module, batch(0)).backward()
    given = [p.grad for p in model.parameters() if p.grad is not None]
    for p in (0.5, 1.0, 2.0, 3.0, math.inf):
        wanted, got = torch.nn.utils.get_total_norm(given, p), tpcompile.grad_norm(tp, p)
        answers[str(p)] = abs(float(got / wanted) - 1)
    local = [p.grad for p in tp.parameters() if p.grad is not None]
    answers["naive"] = abs(float(torch.nn.utils.get_total_norm(local) / tpcompile.grad_norm(tp)) - 1)
    sent: Sent = Counter()
    with Issued(sent, "step"):
        total = tpcompile.clip_grad_norm_(tp, 0.1)
    answers |= {"sent": dict(sent), "dtype": total.dtype, "shape": tuple(total.shape)}
    answers["clipped"] = float(tpcompile.grad_norm(tp))
    if dist.get_rank() == 1:
        next(p.grad for p in tp.parameters() if p.grad is not None)[0] = math.nan
    for p in (2.0, math.inf):
        answers[f"nan {p}"] = math.isnan(tpcompile.grad_norm(tp, p))
    try:
        tpcompile.clip_grad_norm_(tp, 1.0, error_if_nonfinite=True)
    except TpcompileError as error:
        answers["refused"] = error.what
    tp.register_parameter("extra", nn.Parameter(torch.ones(2)))
    try:
        tpcompile.grad_norm(tp)
    except TpcompileError as error:
        answers["unknown"] = error.what
    return answers


def half_precision() -> Answers:
    """bfloat16 gradients have a norm in float32."""
    _, tp = pair("gpt2", torch.bfloat16)
    loss_of(tp, batch(0)).backward()
    total = tpcompile.clip_grad_norm_(tp, 0.1)
    whole = torch.cat([x.flatten().float() for x in tpcompile.full_gradients(tp).values()]).norm()
    return {"dtype": total.dtype, "apart": abs(float(whole) - 0.1)}


def in_float64(name: str) -> Answers:
    torch.set_num_threads(1)
    with Widened():
        model, tp = pair(name, torch.float64)
        return {
            "right": followed(model, tp, tpcompile.clip_grad_norm_, STEPS),
            "naive": followed(model, tp, of_torch, 3),
            "accumulated": accumulated(model, tp),
            "optimizer": seen_by_an_optimizer(model, tp),
            "norms": norms(model, tp),
        }


def in_less() -> Answers:
    torch.set_num_threads(1)
    found = {name: followed(*pair(name, torch.float32), tpcompile.clip_grad_norm_, STEPS) for name in NAMES}
    return found | {"half": half_precision()}


@cache
def answers(name: str, ranks: int) -> list[Answers]:
    return run(in_float64, ranks, name)


@cache
def answers_in_less() -> list[Answers]:
    return run(in_less, 2)


ON_RANKS = pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama_uneven", 2),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),
        pytest.param("gpt2", 3, marks=pytest.mark.slow),
        pytest.param("llama_uneven", 3, marks=pytest.mark.slow),
    ],
)


@ON_RANKS
def test_twenty_steps_follow_one_device_in_float64(name: str, ranks: int) -> None:
    for own in answers(name, ranks):
        assert own["right"]["clipped"], "a norm that is never clipped tests nothing"
        assert max(own["right"]["apart"].values()) < 1e-9
    assert len({tuple(own["right"]["norms"]) for own in answers(name, ranks)}) == 1, "ranks clip by different norms"


@ON_RANKS
def test_clipping_by_what_each_rank_holds_would_show(name: str, ranks: int) -> None:
    for own in answers(name, ranks):
        found = own["naive"]["apart"]
        assert found["norms"] > 1e-3
        assert found["parameters"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_float32_they_follow_to_its_rounding(name: str) -> None:
    for own in answers_in_less():
        assert own[name]["apart"]["losses"] < 1e-4
        assert own[name]["apart"]["norms"] < 1e-3
    assert len({tuple(own[name]["norms"]) for own in answers_in_less()}) == 1


@ON_RANKS
def test_micro_batches_accumulate(name: str, ranks: int) -> None:
    for own in answers(name, ranks):
        assert max(own["accumulated"].values()) < 1e-9


@ON_RANKS
def test_an_optimizer_sees_ordinary_parameters(name: str, ranks: int) -> None:
    for own in answers(name, ranks):
        found = own["optimizer"]
        assert found["types"] == {nn.Parameter}
        assert found["gradients"] == {torch.Tensor}
        assert found["groups"]
        assert found["moved"]
        assert found["foreach"] < 1e-14


@ON_RANKS
def test_every_norm_is_that_of_one_device_for_one_number_sent(name: str, ranks: int) -> None:
    for own in answers(name, ranks):
        found = own["norms"]
        assert found["none"] == 0.0
        assert max(found[p] for p in ("0.5", "1.0", "2.0", "3.0", "inf")) < 1e-12
        assert found["naive"] > 1e-3
        assert found["sent"] == {("all_gather", "step", 8 * (ranks - 1)): 1}
        assert (found["dtype"], found["shape"]) == (torch.float64, ())
        assert found["clipped"] == pytest.approx(0.1, rel=1e-4)
        assert found["nan 2.0"]
        assert found["nan inf"]
        assert found["refused"] == "the gradient norm is nan, so the gradients cannot be clipped"
        assert found["unknown"] == "parameter extra was not there when the model was compiled"


@pytest.mark.slow
def test_half_precision_is_summed_in_float32() -> None:
    for own in answers_in_less():
        assert own["half"]["dtype"] == torch.float32
        assert own["half"]["apart"] < 1e-3
