"""Training that survives the death of a rank: torchrun starts all of them again, from the last checkpoint.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/restart.py --folder run --kill 7

At step 7 the last rank kills itself, in the middle of the step, on the first attempt alone. The losses that are printed
at the end are those of a run without ``--kill``, bit by bit: weights, optimizer, step and random numbers come back.

Without the variable torchrun lets all attempts share one store, and gloo finds the addresses of dead processes in it
(https://github.com/pytorch/pytorch/issues/135712).
"""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpcompile

WIDTH, BATCH = 32, 16

SPEC = tpcompile.Spec.parse("""
0  3  column
2  5  row
""")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[b, d]`` of a step, the same whoever asks."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return x, x.roll(1, dims=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, die, and go on from the last checkpoint.")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--kill", type=int, help="the step in which the last rank dies, on the first attempt")
    options = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # after which a rank that hangs ends the others
    torch.set_num_threads(1)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH),
        nn.Linear(WIDTH, 4 * WIDTH), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH),
    )  # fmt: skip
    tp = tpcompile.compile(model, SPEC, example_inputs=(batch(0)[0],))
    optimizer = torch.optim.AdamW(tp.parameters(), lr=1e-3)
    step, losses = 0, list[float]()
    if (options.folder / "tpcompile.json").exists():
        extra = tpcompile.load(options.folder, tp, optimizer)
        step, losses = extra["step"], extra["losses"]
        torch.set_rng_state(extra["random"])
        if rank == 0:
            print(f"attempt {attempt} goes on from step {step}")

    while step < options.steps:
        x, target = batch(step)
        loss = nn.functional.mse_loss(tp(x), target)
        if (attempt, step, rank) == (0, options.kill, last):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, losses = step + 1, [*losses, loss.item()]
        if step % options.every == 0:
            extra = {"step": step, "losses": losses, "random": torch.get_rng_state()}
            tpcompile.save(options.folder, tp, optimizer, extra=extra)
    if rank == 0:
        print("losses", *losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
