"""Estimated against measured: a small Llama on 1 and 2 processes of this CPU, after measuring the machine.

    python benchmarks/scaling.py --write

``--write`` records benchmarks/results/scaling.json. One thread to a process. Seconds are of a forward and backward
pass; the fastest and the median of the passes are given, since a busy machine slows some of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import tpcompile
from tpcompile.calibration import calibrate
from tpcompile.launch import launch
from tpcompile.scaling import scale

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip
BATCH, LENGTH, STEPS = 4, 128, 15
RESULTS = Path(__file__).parent / "results" / "scaling.json"


def llama() -> tuple[nn.Module, dict[str, object]]:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).train()
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def step_seconds() -> list[float]:
    """On one rank: seconds of forward and backward, once warm."""
    torch.set_num_threads(1)
    model, inputs = llama()
    tp = tpcompile.compile(model, example_inputs=inputs)
    found: list[float] = []
    for _ in range(STEPS + 2):
        tp.zero_grad()
        begun = time.perf_counter()
        tp(**inputs).loss.backward()
        found.append(time.perf_counter() - begun)
    return found[2:]


def main() -> None:
    """Measure, estimate, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    on = calibrate(2, threads=1)
    model, inputs = llama()
    points = scale(model, degrees=(1, 2), on=on, example_inputs=inputs).possible
    rows: list[dict[str, float]] = []
    for point in points:
        ranks = launch(step_seconds, point.degree)
        slowest = [max(each) for each in zip(*ranks, strict=True)]
        rows.append(
            {
                "degree": point.degree,
                "estimated": point.seconds,
                "estimated_computing": point.computing,
                "estimated_communicating": point.communicating,
                "measured_fastest": min(slowest),
                "measured_median": statistics.median(slowest),
            }
        )
        print(rows[-1])
    one, two = rows
    estimated = one["estimated"] / two["estimated"]
    speedups = {k: one[f"measured_{k}"] / two[f"measured_{k}"] for k in ("fastest", "median")}
    errors = {k: estimated / measured - 1 for k, measured in speedups.items()}
    print(f"speedup of 2 ranks: estimated {estimated:.2f}, measured {speedups}, error {errors}")
    if options.write:
        document = {
            "command": "python benchmarks/scaling.py " + " ".join(sys.argv[1:]),
            "model": {**SHAPE, "batch": BATCH, "length": LENGTH, "dtype": "float32"},
            "machine": dataclasses.asdict(on),
            "rows": rows,
            "speedup_estimated": estimated,
            "speedup_measured": speedups,
            "speedup_error": errors,
            "load": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        RESULTS.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
