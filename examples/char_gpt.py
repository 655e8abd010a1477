"""A character-level GPT, written in plain PyTorch below, trained on a text by all ranks that torchrun starts.

torchrun --nproc-per-node 2 examples/char_gpt.py --steps 200 --compare
python examples/char_gpt.py --text my.txt

With --compare one device trains the same model afterwards, and the two loss curves are shown side by side.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import tpcompile

WIDTH, LAYERS, HEADS, CONTEXT, BATCH, DROPOUT = 64, 3, 4, 64, 12, 0.1

SPEC = tpcompile.Spec.parse("""
blocks.*.attend.qkv    column
blocks.*.attend.merge  row
blocks.*.up            column
blocks.*.down          row
""")


class Attention(nn.Module):
    """Causal self-attention, ``[b, s, d]`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (y.view(b, s, HEADS, d // HEADS).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(y.transpose(1, 2).reshape(b, s, d))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.drop = Attention(), nn.Dropout(DROPOUT)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm_1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


class CharGPT(nn.Module):
    """Characters ``[b, s]`` to the loss of guessing the next ones, ``targets`` ``[b, s]``."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def python_text() -> str:
    """Prose that is on every disk with Python: the topics of its language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def batches(text: str, characters: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws ``[b, s]`` characters and the ones that follow, the same for whoever starts anew."""
    index = {character: i for i, character in enumerate(characters)}
    data = torch.tensor([index[character] for character in text])
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[i : i + CONTEXT + 1] for i in starts.tolist()])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return draw


def train(
    model: nn.Module,
    clip: Callable[..., Any],
    draw: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    console: Console,
    what: str,
) -> list[float]:
    """The loss of every step; dropout starts from one seed, so that any two runs draw the same masks."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task(what, total=steps, loss=float("nan"))
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(*draw())
            loss.backward()
            clip(model)
            optimizer.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    return losses


def curves(found: dict[str, list[float]]) -> Table:
    """A row for every twentieth part of the run, with a bar as long as the first curve is high."""
    first = next(iter(found.values()))
    table = Table("step", *found, "loss curve", title="loss")
    for step in range(0, len(first), max(1, len(first) // 20)):
        bar = "█" * round(40 * first[step] / max(first))
        table.add_row(str(step), *(f"{losses[step]:.6f}" for losses in found.values()), bar)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a character-level GPT with tensor parallelism.")
    parser.add_argument("--text", type=Path, help="a text file (default: the topics of Python's reference)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compare", action="store_true", help="train on one device too, and show the difference")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, options.dtype))
    ranks, console = dist.get_world_size(), Console(quiet=dist.get_rank() != 0)
    text = options.text.read_text(encoding="utf-8") if options.text else python_text()
    characters = "".join(sorted(set(text)))

    torch.manual_seed(0)
    model = CharGPT(len(characters))
    name = "1 rank" if ranks == 1 else f"{ranks} ranks"
    started = time.perf_counter()
    cut = tpcompile.compile(model, SPEC, example_inputs=batches(text, characters)())
    held = sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - started
    console.print(
        f"{len(text)} characters; compiled for {name} in {seconds:.1f} s; a rank holds {held:.0%} of the parameters"
    )

    def clip_whole(module: nn.Module) -> Tensor:
        return nn.utils.clip_grad_norm_(module.parameters(), 1.0)

    def clip_cut(module: nn.Module) -> Tensor:
        return tpcompile.clip_grad_norm_(module, 1.0)  # the norm of the whole model, not of this rank's parts

    found = {name: train(cut, clip_cut, batches(text, characters), options.steps, console, name)}
    if options.compare and dist.get_rank() == 0:
        one = "one device"
        found[one] = train(model, clip_whole, batches(text, characters), options.steps, console, one)
    console.print(curves(found))
    if options.compare and dist.get_rank() == 0:
        worst = max(abs(a - b) for a, b in zip(*found.values(), strict=True))
        console.print(f"worst difference of any loss: {worst:.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
