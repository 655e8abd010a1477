"""What the tests of training share: batches, a loss, and the run on one device that ranks must follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from tpcompile.compare import relative_error

Clip = Callable[[nn.Module, float], Tensor]

WORDS = 127  # the smallest vocabulary of the models used
LEARNING_RATE, LARGEST_NORM = 1e-3, 0.25


def batch(step: int, rows: int = 4) -> Tensor:
    """Token ids [rows, 7]."""
    return torch.randint(1, WORDS, (rows, zoo.LENGTH), generator=torch.Generator().manual_seed(100 + step))


def loss_of(module: nn.Module, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, in the logits' own precision."""
    logits = module(input_ids=ids, use_cache=False).logits
    return next_token_loss(logits, ids)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def decayed_by_name(module: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters, chosen by the original names as users do: no decay for biases and norms."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    spared = [p for n, p in named if n.endswith("bias") or "ln_" in n or "norm" in n]
    ids = {id(p) for p in spared}
    decayed = [p for _, p in named if id(p) not in ids]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decayed_by_name(module), lr=LEARNING_RATE)


def train(
    module: nn.Module, steps: int, clip: Clip, batches: Callable[[int], Sequence[Tensor]] | None = None
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of ``steps`` steps of AdamW, over the micro-batches of each step."""
    optimizer = adamw(module)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        given = batches(step) if batches else [batch(step)]
        total = 0.0
        for ids in given:
            loss = loss_of(module, ids) / len(given)
            loss.backward()
            total += float(loss.detach())
        norms.append(float(clip(module, LARGEST_NORM)))
        optimizer.step()
        losses.append(total)
    return losses, norms


def of_torch(module: nn.Module, max_norm: float) -> Tensor:
    gradients = [x.grad for x in module.parameters() if x.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, total)
    return total


def apart(expected: Sequence[float], got: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(a) for a, b in zip(expected, got, strict=True))


def parameters_apart(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """The largest relative error of any parameter; infinite if names differ."""
    if expected.keys() != got.keys():
        return float("inf")
    return max(relative_error(expected[n].detach(), got[n]) for n in expected)
