"""A machine file of this machine: what its devices compute and move, and how long an all-reduce takes, as measured.

Every rank is a local process, and all of them measure at the same time, as they will run: processes on one CPU share
its memory. Over gloo on CPUs, over NCCL where there are as many GPUs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from tpcompile.groups import group_device, resolve_group
from tpcompile.launch import launch
from tpcompile.links import Device, Level, Machine

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of the all-reduces that are measured."""


def calibrate(ranks: int = 2, threads: int | None = None) -> Machine:
    """The machine of ``ranks`` local processes, each with so many threads (by default the cores, shared equally).

    Raises TpcompileError if a process fails.
    """
    found = launch(_measure, ranks, (threads or max(1, torch.get_num_threads() // ranks),))
    flops = {dtype: min(each[0][dtype] for each in found) for dtype in found[0][0]}
    bandwidth, start = min(each[1] for each in found), max(each[2] for each in found)
    times = [max(row) for row in zip(*(each[3] for each in found), strict=True)]
    latency, per_second = fit(SIZES, times, ranks)
    level = Level("measured", None, latency, per_second)
    about = f"measured on {ranks} local processes"
    return Machine("calibrated", about, Device(flops, bandwidth, found[0][4], start), (level,))


def fit(sizes: Sequence[int], times: Sequence[float], ranks: int) -> tuple[float, float]:
    """``(latency, bandwidth)`` of a ring all-reduce, 2(p-1) steps and 2n(p-1)/p bytes: least relative squares.

    Two numbers cannot be negative: what fits best on the border is taken.
    """
    steps, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    weights = [1 / t for t in times]
    xx = sum((w * steps) ** 2 for w in weights)
    xy = sum(w * w * steps * share * n for w, n in zip(weights, sizes, strict=True))
    yy = sum((w * share * n) ** 2 for w, n in zip(weights, sizes, strict=True))
    x1 = sum(w * steps for w in weights)
    y1 = sum(w * share * n for w, n in zip(weights, sizes, strict=True))
    determinant = xx * yy - xy * xy
    latency, inverse = (x1 * yy - y1 * xy) / determinant, (xx * y1 - xy * x1) / determinant
    if latency <= 0:
        latency, inverse = 0.0, y1 / yy
    if inverse <= 0:
        latency, inverse = x1 / xx, 1e-15
    return latency, 1 / inverse


def device_speed(device: torch.device) -> tuple[dict[str, float], float, float]:
    """Of one device, alone: FLOPs per second by dtype, bytes per second, seconds that starting a small op takes."""
    flops: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        n = 512 if device.type == "cpu" else 8192
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        flops[str(dtype).removeprefix("torch.")] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device)
    x = torch.randn(1 << (23 if device.type == "cpu" else 28), device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() * x.element_size() / _best(lambda: torch.add(x, 1.5, out=y), device)
    tiny = torch.ones(1, device=device)
    start = _best(lambda: [tiny + 1 for _ in range(200)], device) / 200
    return flops, bandwidth, start


def _measure(threads: int) -> tuple[dict[str, float], float, float, list[float], float]:
    """One rank: its device's speed, seconds of all-reduces, memory."""
    torch.set_num_threads(threads)
    group = resolve_group(None)
    device = group_device(group)
    flops, bandwidth, start = device_speed(device)
    times: list[float] = []
    for size in SIZES:
        buffer = torch.ones(size // 4, device=device)
        dist.barrier(group)
        times.append(_best(lambda buffer=buffer: dist.all_reduce(buffer, group=group), device, statistics.median))
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else _main_memory() / dist.get_world_size(group)
    return flops, bandwidth, start, times, float(memory)


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _best(
    call: Callable[[], object],
    device: torch.device,
    choose: Callable[[Sequence[float]], float] = min,
    repeats: int = 12,
) -> float:
    found: list[float] = []
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - begun)
    return choose(found[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["calibrate", "device_speed", "fit"]
