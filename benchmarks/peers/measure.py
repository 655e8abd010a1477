"""Counts, errors, times and memory of contenders on this rank, measured and never claimed.

Collectives are read off torch's profiler: their kind as torch.distributed was asked for it, their size as the backend
was given it. Times are taken in rounds: every contender runs once in each, in turn, so that what else the machine does
falls on all of them, and only ratios within a round are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.peers.contenders import CONTENDERS, Running
from benchmarks.peers.workloads import Workload
from tpcompile.transitions import sent_bytes

LEARNING_RATE = 1e-5
ITEM_BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}
KINDS = (("reduce_scatter", "reduce_scatter"), ("gather", "all_gather"), ("reduce", "all_reduce"))
Counts = dict[str, list[int]]  # kind -> [how many, bytes that a rank sends]


# ------------------------------------------------------------------------------------------------ collectives
@contextlib.contextmanager
def profiled(**options: bool) -> Any:
    """Profile what runs inside; yields a list that holds the events afterwards."""
    events: list[Any] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profile:
        yield events
    found: Any = profile.profiler
    events += found.kineto_results.events()


def collectives(events: Sequence[Any], ranks: int) -> Counts:
    """The collectives among a profile's events.

    The i-th request to torch.distributed is the i-th call of the backend, which alone is told sizes: gloo does a
    reduce-scatter as an all-reduce, and it is counted as what was asked for. The backend "shm" says both itself. Raises
    ValueError if they do not pair up.
    """
    in_order = sorted(events, key=lambda event: event.start_ns())
    names = [event.name().removeprefix("c10d::") for event in in_order if event.name().startswith("c10d::")]
    asked = [name for name in names if "barrier" not in name]
    given = [e for e in in_order if e.name().startswith("gloo:") and "barrier" not in e.name()]
    if len(asked) != len(given):
        raise ValueError(f"{len(asked)} requests and {len(given)} calls of gloo: {asked}, {[e.name() for e in given]}")
    own = [e for e in in_order if e.name() == "deepspeed::inference_all_reduce_"]  # in shared memory, past torch
    sizes: list[tuple[str, int]] = []  # bytes of what is reduced or gathered
    for name, event in (*zip(asked, given, strict=True), *(("allreduce_", e) for e in own)):
        kind = next((kind for part, kind in KINDS if part in name), name)
        size = torch.Size(event.shapes()[0]).numel() * ITEM_BYTES[event.dtypes()[0]]
        sizes.append((kind, size * ranks if kind == "all_gather" else size))
    for event in in_order:
        if event.name().startswith("shm:"):
            _, kind, size = event.name().split(":")
            sizes.append((kind, int(size)))
    found: Counts = {}
    for kind, size in sizes:
        count = found.setdefault(kind, [0, 0])
        count[0] += 1
        count[1] += sent_bytes(kind, size, 1, ranks) if kind in dict(KINDS).values() else size
    return found


# ------------------------------------------------------------------------------------------------ steps
def training_step(running: Running, optimizer: torch.optim.Optimizer | None, ids: Tensor, labels: Tensor) -> Tensor:
    """Loss, backward and, if there is one, a step of the optimizer."""
    for parameter in running.parameters:
        parameter.grad = None
    with running.around():
        loss = running.loss(ids, labels)
        loss.backward()
    running.after_backward()
    if optimizer is not None:
        optimizer.step()
    return loss.detach()


def optimizer_of(running: Running) -> torch.optim.Optimizer:
    """AdamW as torch makes it."""
    return torch.optim.AdamW([p for p in running.parameters if p.requires_grad], lr=LEARNING_RATE)


def counted(running: Running, mode: str, ids: Tensor, labels: Tensor) -> dict[str, Counts]:
    """Collectives of a step by phase, after one that is not counted."""
    ranks = dist.get_world_size()
    if mode == "inference":
        with torch.no_grad():
            running.logits(ids)
            with profiled(record_shapes=True) as forward:
                running.logits(ids)
        return {"forward": collectives(forward, ranks)}
    optimizer = optimizer_of(running)
    training_step(running, optimizer, ids, labels)
    for parameter in running.parameters:
        parameter.grad = None
    with running.around():
        with profiled(record_shapes=True) as forward:
            loss = running.loss(ids, labels)
        with profiled(record_shapes=True) as backward:
            loss.backward()
            running.after_backward()
    with profiled(record_shapes=True) as step:
        optimizer.step()
    phases = {"forward": forward, "backward": backward, "optimizer": step}
    return {phase: collectives(events, ranks) for phase, events in phases.items()}


# ------------------------------------------------------------------------------------------------ errors
Reference = tuple[Tensor, Mapping[str, Tensor]]  # logits, or the loss; gradients by name


def reference(work: Workload, mode: str, dtype: torch.dtype) -> Reference:
    """What one device computes."""
    running = CONTENDERS["one device"].build(work, mode == "training", dtype)
    return _outcome(running, mode, *work.batch_of_tokens())


def _outcome(running: Running, mode: str, ids: Tensor, labels: Tensor) -> Reference:
    if mode == "inference":
        with torch.no_grad():
            return _plain(running.logits(ids)), {}
    loss = training_step(running, None, ids, labels)
    return _plain(loss), running.gradients()


def _plain(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def errors(running: Running, mode: str, ids: Tensor, labels: Tensor, expected: Reference) -> dict[str, Any]:
    """Worst differences from one device: of the output, and of gradients, each relative to its own largest value.

    A gradient whose largest value is below a thousandth of the model's largest is taken relative to that: some are
    zero but for rounding.
    """
    output, gradients = _outcome(running, mode, ids, labels)
    if output.shape != expected[0].shape:
        return {"wrong": f"the output is {list(output.shape)}, on one device {list(expected[0].shape)}"}
    found: dict[str, Any] = {"output": _relative(output, expected[0], 0.0)}
    if mode == "training" and running.parameters:
        least = 1e-3 * max(float(g.abs().max()) for g in expected[1].values())
        shared = expected[1].keys() & gradients.keys()
        apart = {n: _relative(gradients[n], expected[1][n], least) for n in shared}
        worst = max(apart, key=lambda n: apart[n])
        held = {id(expected[1][n]) for n in shared}
        missing = [n for n, g in expected[1].items() if id(g) not in held]
        found |= {"gradient": apart[worst], "of": worst}
        if missing:
            found["wrong"] = f"no gradient of {', '.join(missing)}"
    return found


def _relative(x: Tensor, expected: Tensor, least: float) -> float:
    if x.shape != expected.shape:
        return float("inf")
    return float((x.double() - expected.double()).abs().max()) / max(float(expected.abs().max()), least)


# ------------------------------------------------------------------------------------------------ memory
def allocated(running: Running, mode: str, ids: Tensor, labels: Tensor) -> dict[str, int]:
    """Bytes of tensors: ``held`` between steps (weights, AdamW's states), and the ``peak`` within a step, with them.

    The least of a few steps: gloo's threads let go of what they sent somewhat later, which is chance.
    """
    if mode == "inference":
        held = _bytes(running.parameters)
        with torch.no_grad():
            return {"held": held, "peak": held + _peak(lambda: running.logits(ids))}
    optimizer = optimizer_of(running)
    training_step(running, optimizer, ids, labels)
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    held = _bytes([*running.parameters, *states])
    return {"held": held, "peak": held + _peak(lambda: training_step(running, optimizer, ids, labels), optimizer)}


def _peak(step: Callable[[], object], optimizer: torch.optim.Optimizer | None = None, times: int = 3) -> int:
    """The most that ``step`` holds above what is held when it begins, without gradients."""
    found: list[int] = []
    for _ in range(times):
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        with profiled(profile_memory=True) as events:
            step()
        now = most = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        found.append(most)
    return min(found)


def _bytes(tensors: Sequence[Tensor]) -> int:
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in local}.values())


def resident(name: str, work: Workload, mode: str) -> dict[str, int]:
    """Peak resident memory of a few steps, above what this process had with everything imported; Linux only."""
    _quiet()
    contender, (ids, labels) = CONTENDERS[name], work.batch_of_tokens()
    base = _reset_peak()
    if not (contender.alone and dist.get_rank()):
        running = contender.build(work, mode == "training", torch.float32)
        gc.collect()
        _reset_peak()
        optimizer = optimizer_of(running) if mode == "training" else None
        for _ in range(3):
            if mode == "training":
                training_step(running, optimizer, ids, labels)
            else:
                with torch.no_grad():
                    running.logits(ids)
    return {"peak": _status("VmHWM") - base}


def _reset_peak() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


# ------------------------------------------------------------------------------------------------ time
Samples = dict[str, list[float]]


def timed(running: Running, optimizer: torch.optim.Optimizer | None, work: Workload) -> tuple[float, float]:
    """Seconds of the clock and of this process's CPU, per step."""
    ids, labels = work.batch_of_tokens()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(work.steps):
        if optimizer is None:
            with torch.no_grad():
                running.logits(ids)
        else:
            training_step(running, optimizer, ids, labels)
    return (time.perf_counter() - wall) / work.steps, (time.process_time() - cpu) / work.steps


def in_turn(names: Sequence[str], i: int) -> list[str]:
    """The order of round ``i``, the same on every rank; by chance, so that nobody always follows the same one."""
    return random.Random(i).sample(names, len(names))


def rounds(
    live: Mapping[str, Running | None], work: Workload, mode: str, count: int
) -> dict[str, dict[str, list[float]]]:
    """``count`` interleaved samples of each contender, in milliseconds: the slowest rank's clock, the mean CPU time."""
    optimizers = {n: optimizer_of(r) if r is not None and mode == "training" else None for n, r in live.items()}
    names = list(live)
    samples: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in names}
    gc.collect()
    gc.disable()
    for i in range(-2, count):  # two that are not counted
        for name in in_turn(names, i):
            running = live[name]
            dist.barrier()
            mine = None if running is None else timed(running, optimizers[name], work)
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            ran = [x for x in every if x is not None]
            if i >= 0:
                samples[name]["wall"].append(round(max(wall for wall, _ in ran) * 1e3, 4))
                samples[name]["cpu"].append(round(sum(cpu for _, cpu in ran) / len(ran) * 1e3, 4))
        gc.collect()
    gc.enable()
    return samples


# ------------------------------------------------------------------------------------------------ all of it
def compare(names: Sequence[str], work: Workload, mode: str, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every contender on this rank: checked and counted, and timed in ``count`` rounds if there are any. Collective."""
    _quiet()
    ids, labels = work.batch_of_tokens()
    expected = reference(work, mode, dtype)
    found: dict[str, Any] = {}
    live: dict[str, Running | None] = {}
    for name in names:
        contender = CONTENDERS[name]
        if contender.alone and dist.get_rank():
            live[name], found[name], failed = None, {}, None
        else:
            row: dict[str, Any] = {}
            failed = _attempt(lambda: _first(name, work, mode, dtype, ids, labels, expected, row, live, count > 0))  # noqa: B023
            found[name] = row
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failed)
        if any(failures):
            found[name] = {"failed": next(f for f in failures if f)}
            live.pop(name, None)
    if count:
        for name, samples in rounds(live, work, mode, count).items():
            found[name] |= samples
    return found


def _first(
    name: str, work: Workload, mode: str, dtype: torch.dtype, ids: Tensor, labels: Tensor, expected: Reference,
    row: dict[str, Any], live: dict[str, Running | None], memory: bool,
) -> None:  # fmt: skip
    """Build one contender; its errors, counts and, if asked for, memory go to ``row``."""
    running = CONTENDERS[name].build(work, mode == "training", dtype)
    row["errors"] = errors(running, mode, ids, labels, expected)
    row["collectives"] = counted(running, mode, ids, labels)
    if memory:
        row["memory"] = allocated(running, mode, ids, labels)
    live[name] = running


def _attempt(function: Callable[[], None]) -> str | None:
    """What went wrong, in one line: a peer's failure is a result."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return None


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
