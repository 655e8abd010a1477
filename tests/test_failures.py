"""A rank that is killed or hangs in the middle of a step: the others end, and say which one it was."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch import nn

import tpcompile
from tpcompile import collectives, failures
from tpcompile.errors import TpcompileError
from tpcompile.spec import Spec

pytestmark = pytest.mark.distributed


def killed_in_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    spec = Spec.parse("0 column\n2 row\n3 column\n5 row")
    tp = tpcompile.compile(model, spec, example_inputs=(torch.ones(2, 4),))
    loss = tp(torch.ones(2, 4)).sum()
    if dist.get_rank() == 1:
        tp.get_parameter("3.weight").register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    loss.backward()
    dist.barrier()


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_step_is_named() -> None:
    with pytest.raises(TpcompileError) as caught:
        run(killed_in_backward, 2)
    assert caught.value.what == "rank 1 of 2 failed"
    assert caught.value.why == "the process was killed by SIGKILL without raising an error"
    assert multiprocessing.active_children() == []


def new_group(ranks: list[int]) -> str:
    return getattr(dist.new_group(ranks, timeout=timedelta(seconds=1)), "group_name", "")  # not of this rank


def said() -> list[tuple[str, str]]:
    """What a rank says whose neighbour hangs, and one that waits in another collective than its neighbour."""
    torch.set_num_threads(1)
    failures.ANSWER = 1.5
    rank, found = dist.get_rank(), list[tuple[str, str]]()
    hanging, apart = (new_group([0, 1, 2]) for _ in range(2))
    if rank == 1:
        time.sleep(3)
    else:
        with pytest.raises(failures.PeerError) as caught:
            collectives.all_reduce(torch.ones(2, 3), hanging)
        found.append((caught.value.what, caught.value.why or ""))
    dist.barrier()
    pair = new_group([0, 1])
    if rank < 2:
        with pytest.raises(failures.PeerError) as caught:
            collectives.all_reduce(torch.ones(2 + rank), (pair, apart)[rank])
        found.append((caught.value.what, caught.value.why or ""))
    dist.barrier()
    return found


def test_the_rank_that_is_missing_is_named() -> None:
    first, second, third = run(said, 3)
    for what, why in (first[0], third[0]):
        assert what == "rank 1 of 3 did not take part in all_reduce of [2, 3] torch.float32"
        assert "imed out" in why
        assert "what waits here said so, and nothing was heard of rank 1 for 1.5 s" in why
    assert first[1][0] == "rank 1 of 2 did not take part in all_reduce of [2] torch.float32"
    assert second[0][0] == "ranks 0, 2 of 3 did not take part in all_reduce of [3] torch.float32"
