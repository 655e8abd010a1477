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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import Partial as PartialSum

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
        begin = shm._begin

        def flag_first(said: Any, dtype: torch.dtype, shape: torch.Size, write: Any, read: Any) -> None:
            def late(slot: Tensor) -> None:
                turn = shm.begun + 1
                shm._board.text(turn & 1, shm._rank)[:] = shm._text(said)
                shm._board.flags[shm._rank] = turn
                time.sleep(0.002)
                write(slot)

            begin(said, dtype, shape, late, read)

        shm._begin = flag_first
    rank, ranks, wrong = dist.get_rank(), dist.get_world_size(), 0
    for i in range(rounds):
        x = torch.full((1 + 37 * i % 5000,), float(i * (rank + 1)), dtype=torch.float64)
        dist.all_reduce(x, group=shm)
        wrong += not bool((x == i * ranks * (ranks + 1) / 2).all())
    return wrong


def pending() -> list[bool]:
    """Several sums under way at once, waited for in another order, or never."""
    _, shm = groups()
    xs = [drawn(i, 100 + i, torch.float64) for i in range(3)]
    expected = [x.clone() for x in xs]
    for x in expected:
        dist.all_reduce(x)
    works: list[Any] = [dist.all_reduce(x, group=shm, async_op=True) for x in xs]
    works[2].wait(timedelta(seconds=5))
    works[0].wait()
    found = [torch.equal(x, y) for x, y in zip(xs, expected, strict=True)]
    work: Any = dist.barrier(shm, async_op=True)
    while not work.is_completed():
        time.sleep(0.001)
    return [*found, works[1].is_completed(), torch.equal(works[1].get_future().value()[0], expected[1])]


def asked_by_others() -> dict[str, bool]:
    """What asks a process group in other words: functional collectives, DTensor, DDP, inference mode, lists, bools."""
    gloo, shm = groups()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    functional: Any = torch.ops._c10d_functional
    x, found = drawn(3, 4 * ranks, torch.float64), dict[str, bool]()

    def alike(what: str, ask: Callable[[Any], Tensor]) -> None:
        found[what] = torch.equal(ask(gloo), ask(shm))

    def listed(group: Any) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(ranks)]
        dist.all_gather(parts, x, group)
        return torch.stack(parts)

    def frozen(group: Any) -> Tensor:
        with torch.inference_mode():
            y = x + 1
        dist.all_reduce(y, group=group)
        return y.clone()

    def sent(group: Any) -> Tensor:
        y = x.clone()
        dist.broadcast(y, 0, group)
        return y

    def trues(group: Any) -> Tensor:
        y = torch.empty(2 * ranks, dtype=torch.bool)
        all_gather_single(y, torch.tensor([True, rank == 0]), group=group)
        return y

    def redistributed(group: Any) -> Tensor:
        mesh = DeviceMesh.from_group(group, "cpu")
        whole = DTensor.from_local(x, mesh, [PartialSum()]).redistribute(mesh, [Shard(0)])
        return whole.redistribute(mesh, [Replicate()]).to_local()

    def parallel(group: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2).double(), process_group=group)
        model(x.view(-1, 4)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def named(group: Any) -> str:
        return group.group_name

    wait = functional.wait_tensor
    alike("functional all_reduce", lambda g: wait(functional.all_reduce(x, "sum", named(g))))
    alike("functional all_gather", lambda g: wait(functional.all_gather_into_tensor(x, ranks, named(g))))
    alike("functional reduce_scatter", lambda g: wait(functional.reduce_scatter_tensor(x, "sum", ranks, named(g))))
    for ask in (listed, frozen, sent, trues, redistributed, parallel):
        alike(ask.__name__, ask)
    return found


def sizes_that_do_not_fit() -> list[str]:
    _, shm = groups()
    found: list[str] = []
    for gather, x, y in ((True, torch.ones(2), torch.ones(5)), (False, torch.ones(5), torch.ones(2))):
        with pytest.raises(ValueError, match="an output of") as caught:
            (all_gather_single if gather else reduce_scatter_single)(y, x, group=shm)
        found.append(str(caught.value).partition(":")[0])
    return found


def of_a_part() -> float:
    """The sum over the last two of three ranks: their places in the group are other numbers."""
    group = dist.new_group([1, 2], backend="shm")
    x = torch.tensor([float(dist.get_rank())])
    if dist.get_rank() > 0:
        dist.all_reduce(x, group=group)
    return float(x)


def refusals() -> list[str]:
    """What a rank is told whose neighbour asks for another collective."""
    _, shm = groups()
    rank, found = dist.get_rank(), list[str]()
    for x in (torch.ones(2 + rank), torch.ones(4, dtype=(torch.float32, torch.float64)[rank])):
        with pytest.raises(PeerError) as caught:
            PRIMITIVES["all_reduce"](x, 0, (), shm.group_name, False)
        found.append(caught.value.why or "")
        with pytest.raises(RuntimeError, match="the process group has failed before: RuntimeError: rank"):
            dist.barrier(shm)
        _, shm = groups()
    return found


def waits(how: str) -> str:
    """What a rank is told whose neighbour is late, or gone."""
    torch.set_num_threads(1)
    shm: Any = dist.new_group(backend="shm", timeout=timedelta(seconds=1 if how == "late" else 60))
    child = 0
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
    if how == "gone":
        os.waitpid(child, 0)
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
        "others": asked_by_others,
        "sizes": sizes_that_do_not_fit,
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


def of_three() -> tuple[list[str], int, float]:
    return both(), sums(1000, False), of_a_part()


def test_collectives_are_those_of_gloo(two: list[dict[str, Any]]) -> None:
    assert [rank["both"] for rank in two] == [[], []]
    assert [rank["sums"] for rank in two] == [0, 0]
    assert run(of_three, 3) == [([], 0, 0.0), ([], 0, 3.0), ([], 0, 3.0)]


def test_a_flag_that_is_raised_before_writing_is_seen(two: list[dict[str, Any]]) -> None:
    """The control of the sums above."""
    assert sum(rank["too early"] for rank in two) > 0


def test_sums_that_are_waited_for_later(two: list[dict[str, Any]]) -> None:
    assert [rank["pending"] for rank in two] == [[True] * 5] * 2


def test_what_asks_in_other_words_is_answered_as_by_gloo(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert len(rank["others"]) == 9
        assert all(rank["others"].values()), rank["others"]
        assert rank["sizes"] == ["all_gather", "reduce_scatter"]


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
        assert rank["no room"].startswith("there are no 4 MiB of memory for the backend 'shm'")
        assert "No space left on device" in rank["no room"]


def test_machines_that_order_stores_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_memory.obstacle(2) is None
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: "aarch64")
    assert shared_memory.obstacle(2) == "it is for Linux on x86-64, and this is linux on aarch64"
    with pytest.raises(TpcompileError, match="there is no backend 'shm' here"):
        SharedMemory(HashStore(), 0, 1, timedelta(seconds=1))
