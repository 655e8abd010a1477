"""The process group backend "shm": the sums of gloo, bit for bit, and refusals where gloo adds or hangs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh

import tpcompile
from tpcompile import shared_memory
from tpcompile.errors import TpcompileError
from tpcompile.failures import PeerError
from tpcompile.primitives import PRIMITIVES, all_gather_single, reduce_scatter_single
from tpcompile.shared_memory import SLOT, SharedMemory
from tpcompile.spec import Spec

pytestmark = pytest.mark.distributed

SIZES = (1, 7, 4096, SLOT // 8 + 3, SLOT // 2)  # of float64: up to four slots
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
OPS = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT)


def groups() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return dist.new_group(backend="gloo"), dist.new_group(backend="shm")


def drawn(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Another tensor on every rank."""
    made = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return (4 * torch.randn(size, generator=made, dtype=torch.float64)).to(dtype)


def both() -> list[str]:
    """Where a collective of the two groups differs; on two ranks no order of additions can excuse it."""
    gloo, shm = groups()
    ranks, wrong = dist.get_world_size(), list[str]()

    def same(what: str, x: Tensor, y: Tensor) -> None:
        exact = ranks == 2 or not x.is_floating_point()
        eps = 0.0 if exact else torch.finfo(x.dtype).eps
        if not torch.allclose(x.double(), y.double(), rtol=4 * eps, atol=64 * eps):
            wrong.append(what)

    for case, size in enumerate(SIZES):
        for dtype in DTYPES:
            x = drawn(case, size * ranks, dtype)
            for op in OPS:
                totals = [x.clone(), x.clone()]
                for total, group in zip(totals, (gloo, shm), strict=True):
                    dist.all_reduce(total, op, group)
                same(f"all_reduce {op} {size} {dtype}", *totals)
            gathered = [x.new_empty(ranks * x.numel()) for _ in range(2)]
            parts = [x.new_empty(size) for _ in range(2)]
            for group, whole, part in zip((gloo, shm), gathered, parts, strict=True):
                all_gather_single(whole, x, group=group)
                reduce_scatter_single(part, x, group=group)
            same(f"all_gather {size} {dtype}", *gathered)
            same(f"reduce_scatter {size} {dtype}", *parts)
    strided = drawn(9, 12, torch.float64).view(3, 4).t()
    expected = strided.contiguous()
    dist.all_reduce(expected, group=gloo)
    dist.all_reduce(strided, group=shm)
    same("all_reduce of a strided tensor", expected, strided)
    dist.all_reduce(torch.empty(0), group=shm)
    dist.barrier(shm)
    words: list[Any] = [None] * ranks
    dist.all_gather_object(words, dist.get_rank(), shm)
    if words != list(range(ranks)):
        wrong.append("all_gather_object")
    return wrong


def sums(rounds: int, early: bool) -> int:
    """How many of many sums, one right after the other, are wrong; ``early``: the flag is raised before writing."""
    _, shm = groups()
    if early:
        begin = SharedMemory._begin

        def flag_first(
            self: SharedMemory, said: Any, dtype: torch.dtype, shape: torch.Size, write: Any, read: Any
        ) -> None:
            def late(slot: Tensor) -> None:
                board, turn = self._board, self._sequence & 1
                board.text(turn, self._rank)[:] = self._text(said)
                board.flags[self._rank] = self._sequence
                time.sleep(0.002)
                write(slot)

            begin(self, said, dtype, shape, late, read)

        SharedMemory._begin = flag_first
    rank, ranks, wrong = dist.get_rank(), dist.get_world_size(), 0
    for i in range(rounds):
        x = torch.full((1 + 37 * i % 5000,), float(i * (rank + 1)), dtype=torch.float64)
        dist.all_reduce(x, group=shm)
        wrong += not bool((x == i * ranks * (ranks + 1) / 2).all())
    return wrong


def pending() -> list[bool]:
    """Several sums under way at once, waited for in another order, or never; and the functional ones."""
    _, shm = groups()
    name: str = shm.group_name
    xs = [drawn(i, 100 + i, torch.float64) for i in range(4)]
    expected = [x.clone() for x in xs]
    for x in expected:
        dist.all_reduce(x)
    works = [dist.all_reduce(x, group=shm, async_op=True) for x in xs[:3]]
    assert works[2] is not None
    assert works[0] is not None
    works[2].wait()
    works[0].wait()
    found = [torch.equal(x, y) for x, y in zip(xs[:3], expected, strict=False)]
    functional: Any = torch.ops._c10d_functional
    y = functional.wait_tensor(functional.all_reduce(xs[3], "sum", name))
    return [*found, torch.equal(y, expected[3])]


def refusals() -> list[str]:
    """What a rank is told whose neighbour asks for another collective."""
    _, shm = groups()
    rank, found = dist.get_rank(), list[str]()
    for x in (torch.ones(2 + rank), torch.ones(4, dtype=(torch.float32, torch.float64)[rank])):
        with pytest.raises(PeerError) as caught:
            PRIMITIVES["all_reduce"](x, 0, (), shm.group_name, False)
        found.append(caught.value.why or "")
    return found


def waits(how: str) -> str:
    """What a rank is told whose neighbour is late, or gone."""
    torch.set_num_threads(1)
    shm: Any = dist.new_group(backend="shm", timeout=timedelta(seconds=1 if how == "late" else 60))
    if dist.get_rank() == 1:
        time.sleep(3)
        return ""
    if how == "gone":  # of a rank that ends, the launcher would tell: this one only seems to
        child = os.fork()
        if child == 0:
            os._exit(0)
        shm._board.pids[1] = child  # not waited for: a zombie
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(2), group=shm)
    assert time.monotonic() - started < 2.5
    return str(caught.value)


def trained() -> Sequence[tuple[str, bool]]:
    """Losses and gradients over both backends, to the bit."""
    found: dict[str, dict[str, Tensor]] = {}
    for group in groups():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 12)).double()
        x = torch.randn(2, 4, 8, dtype=torch.float64)
        mesh = DeviceMesh.from_group(group, "cpu")
        spec = Spec.parse("0 column\n2 row\n4 column")
        tp: Any = tpcompile.compile(model, spec, example_inputs=(x,), mesh=mesh, sequence_parallel=True)
        loss = tp(x).square().sum()
        loss.backward()
        found[dist.get_backend(group)] = {"loss": loss.detach(), **tpcompile.full_gradients(tp)}
    return [(name, torch.equal(x, found["shm"][name])) for name, x in found["gloo"].items()]


def no_room() -> str:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TpcompileError) as caught:
            dist.new_group(backend="shm")
    return caught.value.render()


def everything() -> dict[str, Any]:
    """All of the above: starting processes takes longer than what they do."""
    asked: dict[str, Callable[[], Any]] = {
        "both": both,
        "sums": partial(sums, 1000, False),
        "pending": pending,
        "refusals": refusals,
        "late": partial(waits, "late"),
        "gone": partial(waits, "gone"),
        "trained": trained,
        "no room": no_room,
        "too early": partial(sums, 20, True),
    }
    found: dict[str, Any] = {}
    for name, function in asked.items():
        found[name] = function()
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run(everything, 2)


def of_three() -> tuple[list[str], int]:
    return both(), sums(1000, False)


def test_collectives_are_those_of_gloo(two: list[dict[str, Any]]) -> None:
    assert [rank["both"] for rank in two] == [[], []]
    assert [rank["sums"] for rank in two] == [0, 0]
    assert run(of_three, 3) == [([], 0)] * 3


def test_a_flag_that_is_raised_before_writing_is_seen(two: list[dict[str, Any]]) -> None:
    """The control of the sums above."""
    assert sum(rank["too early"] for rank in two) > 0


def test_sums_that_are_waited_for_later(two: list[dict[str, Any]]) -> None:
    assert [rank["pending"] for rank in two] == [[True] * 4] * 2


def test_ranks_that_ask_for_different_sums_are_told(two: list[dict[str, Any]]) -> None:
    first, second = (rank["refusals"] for rank in two)
    asked = [f"all_reduce sum of {size} torch.float32" for size in (2, 3)]
    assert f"rank 1 of the group was asked for {asked[1]}, rank 0 for {asked[0]}" in first[0]
    assert f"rank 0 of the group was asked for {asked[0]}, rank 1 for {asked[1]}" in second[0]
    assert "asked for all_reduce sum of 4 torch.float64" in first[1]


def test_a_rank_that_does_not_come_is_told(two: list[dict[str, Any]]) -> None:
    said = "all_reduce sum of 2 torch.float32"
    assert two[0]["late"] == f"rank 1 of the group did not come to {said} within 1 s"
    assert two[0]["gone"] == f"the process of rank 1 of the group is gone; this one waits in {said}"


def test_a_compiled_model_trains_alike(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert len(rank["trained"]) == 9
        assert all(same for _, same in rank["trained"]), rank["trained"]


def test_memory_that_is_missing_is_told_to_all_ranks(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["no room"].startswith("there are no 4 MiB of shared memory for the backend 'shm'")
        assert "No space left on device" in rank["no room"]
        assert "docker run --shm-size" in rank["no room"]


def test_machines_that_order_stores_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_memory.obstacle(2) is None
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: "aarch64")
    assert shared_memory.obstacle(2) == "it is for Linux on x86-64, and this is linux on aarch64"
    with pytest.raises(TpcompileError, match="there is no backend 'shm' here"):
        SharedMemory(HashStore(), 0, 1, timedelta(seconds=1))
