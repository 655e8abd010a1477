"""One rank's share of a model on one device: the overhead over the floor, and the share of the device's roofline.

    python -m benchmarks.one_rank                                  # the small workloads, on this CPU, in float32
    python -m benchmarks.one_rank --workloads llama-8b,llama-70b --tp 1,2,4,8 --device cuda --dtype bfloat16
    python -m benchmarks.compare --write-docs                      # docs/benchmarks.md from what is recorded

A step is a forward pass, in training with loss and backward. Collectives are local copies of the same size
(benchmarks/peers/copies.py): what is left is the rank's own work. The roofline is that of ``tpcompile scale`` (every op
computes or moves its bytes, whichever takes longer) with the speed of this device as ``tpcompile.calibration`` measures
it. Results of a row replace those recorded before.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.compare import ENVIRONMENT, ONE_RANK, machine, recorded, write_json
from benchmarks.peers.contenders import CONTENDERS, Running
from benchmarks.peers.copies import be_one_of
from benchmarks.peers.measure import in_turn, training_step
from benchmarks.peers.workloads import LARGE, MODES, WORKLOADS, Workload
from tpcompile.calibration import device_speed
from tpcompile.links import Device, Level, Machine
from tpcompile.scaling import scale

ALL = {**WORKLOADS, **LARGE}


def rank(work: Workload, degree: int, mode: str, contenders: Sequence[str], rounds: int, dtype: str) -> dict[str, Any]:
    """The first of ``degree`` ranks, alone in this process: per contender, samples of seconds per step.

    ``wall`` is the clock's, ``host`` the processor time until the last kernel was started (on a CPU: has ended).
    """
    torch.set_num_threads(1)
    be_one_of(degree)
    try:
        return _rank(work, degree, mode, contenders, rounds, getattr(torch, dtype))
    finally:
        dist.destroy_process_group()


def _rank(
    work: Workload, degree: int, mode: str, contenders: Sequence[str], rounds: int, dtype: torch.dtype
) -> dict[str, Any]:
    training = mode == "training"
    found: dict[str, Any] = {name: {"wall": [], "host": []} for name in contenders}
    live = {name: CONTENDERS[name].build(work, training, dtype) for name in contenders}
    for i in range(-2, rounds):
        gc.collect()
        for name in in_turn(contenders, i):
            wall, host, peak = _sample(live[name], training, work)
            if i >= 0:
                found[name]["wall"].append(wall)
                found[name]["host"].append(host)
                found[name] |= {"peak": peak} if peak else {}
    return {"contenders": found, "roofline": _roofline(work, degree, training, dtype)}


def _sample(running: Running, training: bool, work: Workload) -> tuple[float, float, int | None]:
    """Seconds of the clock and of the host for a step, and the peak of the GPU's memory above what was held."""
    ids, labels = work.batch_of_tokens()
    gpu = work.device != "cpu"
    held = _start_of_memory() if gpu else 0
    wall, host = time.perf_counter(), time.process_time()
    for _ in range(work.steps):
        if training:
            training_step(running, None, ids, labels)
        else:
            with torch.no_grad():
                running.logits(ids)
    host = time.process_time() - host
    if gpu:
        torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return wall / work.steps, host / work.steps, torch.cuda.max_memory_allocated() - held if gpu else None


def _start_of_memory() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _roofline(work: Workload, degree: int, training: bool, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs of a step of this rank, and the seconds below which this device cannot make it."""
    flops, bandwidth, _ = device_speed(torch.device(work.device))
    device = Device(flops, bandwidth, 0.0, 0.0)
    on = Machine("this device", "measured", device, (Level("none", None, 0.0, 1.0),))
    ids, labels = replace(work, device="cpu").batch_of_tokens()
    model = replace(work, device="meta").model(dtype).train(training)
    example = {"input_ids": ids, "labels": labels} if training else {"input_ids": ids}
    (point,) = scale(model, degrees=(degree,), on=on, example_inputs=example, gather_logits=not training).possible
    assert point.work is not None
    name = str(dtype).removeprefix("torch.")
    return {"flops": point.work.flops(), "seconds": point.computing, "peak": flops[name], "bandwidth": bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=", ".join(ALL))
    parser.add_argument("--contenders", default="floor;tpcompile;tpcompile, inductor", help="separated by semicolons")
    parser.add_argument("--tp", default="2")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    os.environ |= ENVIRONMENT
    on = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    for name in asked.workloads.split(","):
        work = replace(ALL[name], device=asked.device)
        for degree in map(int, asked.tp.split(",")):
            for mode in MODES:
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    arguments = (work, degree, mode, asked.contenders.split(";"), asked.rounds, asked.dtype)
                    found = process.submit(rank, *arguments).result()
                key = f"{name}, {degree} ranks, {mode}, {asked.dtype}, {on}"
                about = {"workload": name, "degree": degree, "mode": mode, "dtype": asked.dtype, "device": on}
                row = {**about, "load": os.getloadavg()[0], **found}
                write_json(ONE_RANK, {"machine": machine(), "rows": recorded(ONE_RANK).get("rows", {}) | {key: row}})
                print(key, flush=True)


if __name__ == "__main__":
    main()
