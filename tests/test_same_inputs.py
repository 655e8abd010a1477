"""Ranks that were given different inputs, or are wrapped as if they were replicas, are stopped before they compute."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch import Tensor, nn

import tpcompile
from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.module import TensorParallel
from tpcompile.same_calls import CHECKED
from tpcompile.spec import Spec


def compiled() -> TensorParallel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return tpcompile.compile(model, Spec.parse("0 column\n2 row"), example_inputs=(torch.ones(2, 4),))


def refusal(call: Any, *args: Tensor) -> tuple[str, str]:
    try:
        call(*args)
    except TpcompileError as error:
        return type(error).__name__, f"{error.what}: {error.why}"
    return "", ""


def on_a_rank() -> dict[str, Any]:
    torch.set_num_threads(1)
    rank, x = dist.get_rank(), torch.ones(2, 4)
    found: dict[str, Any] = {
        "values": refusal(compiled(), x + rank),
        "a last digit": refusal(compiled(), x + rank * 2**-22),
        "sizes": refusal(compiled(), torch.ones(2 + rank, 4)),
        "the same": refusal(compiled(), x),
    }
    later = compiled()
    found["in a while"] = [refusal(later, x + rank * (i == CHECKED)) for i in range(CHECKED + 1)]
    os.environ["TPCOMPILE_CHECK"] = "every-call"
    later = compiled()
    for shape in ((2, 4), (3, 4)):
        found[f"before {shape}"] = refusal(later, torch.ones(shape))
    found["later sizes"] = refusal(later, torch.ones(3 - rank, 4))
    found["later values"] = refusal(later, x + rank)
    found["later modes"] = refusal(later.train(rank == 0), x)
    found["afterwards"] = refusal(later.train(), x)
    os.environ["TPCOMPILE_CHECK"] = "first-call"
    found["unchecked"] = float(later(x + rank).sum()) != float(later(x).sum())
    os.environ["TPCOMPILE_CHECK"] = "no"
    found["misspelt"] = refusal(later, x)
    del os.environ["TPCOMPILE_CHECK"]
    wrapped: Any = nn.parallel.DistributedDataParallel(compiled())
    found["replicas"] = refusal(wrapped, x)
    alone: Any = nn.parallel.DistributedDataParallel(
        compiled(), process_group=dist.new_group([rank], use_local_synchronization=True)
    )
    found["alone"] = refusal(alone, x)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[str, str]]]:
    return run(on_a_rank, 2)


@pytest.mark.distributed
def test_different_inputs_are_refused_on_every_rank(ranks: list[dict[str, tuple[str, str]]]) -> None:
    for found in ranks:
        for question in ("values", "a last digit", "sizes"):
            kind, said = found[question]
            assert kind == RuntimeMismatchError.__name__
            assert said.startswith("ranks were given different inputs")
        assert "rank 0 has 'argument 0: [2, 4] torch.float32" in found["sizes"][1]
        assert found["the same"] == ("", "")


@pytest.mark.distributed
def test_later_calls_are_compared_too(ranks: list[dict[str, tuple[str, str]]]) -> None:
    """gloo would add up [2, 4] and [4, 2], and abort for [3, 4] and [2, 4]; unchecked, it is silently wrong."""
    for found in ranks:
        *good, last = found["in a while"]
        assert set(good) == {("", "")}
        assert last[1].startswith("ranks were given different inputs")
        for question in ("later values", "later sizes", "later modes"):
            kind, said = found[question]
            assert kind == RuntimeMismatchError.__name__
            assert said.startswith("ranks were given different inputs")
        assert "rank 0 has 'argument 0: [3, 4] torch.float32" in found["later sizes"][1]
        assert "rank 0 has 'mode: train', rank 1 has 'mode: eval'" in found["later modes"][1]
        assert all(found[f] == ("", "") for f in ("before (2, 4)", "before (3, 4)", "afterwards"))
        assert found["unchecked"] is True
        assert found["misspelt"][1] == "TPCOMPILE_CHECK=no: None"


@pytest.mark.distributed
def test_replicas_are_wrapped_over_other_ranks_only(ranks: list[dict[str, tuple[str, str]]]) -> None:
    for found in ranks:
        assert found["replicas"][0] == TpcompileError.__name__
        assert "DistributedDataParallel over the ranks [0, 1]" in found["replicas"][1]
        assert found["alone"] == ("", "")
