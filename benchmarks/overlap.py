"""Forward and backward of a small Llama on 2 gloo processes, with overlap and without, in turns.

    python benchmarks/overlap.py

One thread to a process. The ratio is of the fastest passes, since a busy machine slows some of them.
"""

from __future__ import annotations

import time

import torch
from scaling import llama

import tpcompile
from tpcompile.launch import launch

STEPS = 12


def seconds() -> dict[int, list[float]]:
    """On one rank: seconds of every pass, by the number of pieces."""
    torch.set_num_threads(1)
    model, inputs = llama()
    modules = {pieces: tpcompile.compile(model, example_inputs=inputs, overlap=pieces) for pieces in (1, 2, 4)}
    found: dict[int, list[float]] = {pieces: [] for pieces in modules}
    for _ in range(STEPS):
        for pieces, tp in modules.items():
            tp.zero_grad()
            begun = time.perf_counter()
            tp(**inputs).loss.backward()
            found[pieces].append(time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    ranks = launch(seconds, 2)
    best = {n: min(map(max, zip(*(rank[n][2:] for rank in ranks), strict=True))) for n in ranks[0]}
    for pieces, value in best.items():
        print(f"overlap={pieces}: {value:.3f} s, {value / best[1]:.2f} of the time without")
