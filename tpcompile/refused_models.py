"""What a model may not have, because a graph would lose it without a word: asked before anything is traced."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch
from torch import nn

from tpcompile.errors import CaptureError, Where


def refuse_hooks(model: nn.Module) -> None:
    """Refuse hooks that would be lost: backward hooks on modules, and hooks on parameters."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"module {name or type(model).__name__!r} has a backward hook",
                where=Where(module=name),
                why="a graph keeps what forward hooks compute, but has no modules on which backward hooks could run",
                help="remove the hook before compiling",
            )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise CaptureError(
                f"parameter {name!r} has a gradient hook",
                why="the compiled model has parameters of its own, each a shard, on which the hook would not run",
                help="remove the hook before compiling, and register it on the compiled model's parameters",
            )


def refuse_shared_memory(model: nn.Module) -> None:
    """Refuse parameters that lie in the memory of another one: each would get a part of its own.

    One parameter under two names is not meant, but what ``a.data = b.data`` makes: two, each with its own gradient.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    plain = [(name, x) for name, x in tensors if type(x.data) is torch.Tensor and not x.is_meta and x.numel()]
    spans = [(*_span(x), name, isinstance(x, nn.Parameter)) for name, x in plain]
    last: tuple[int, int, str, bool] | None = None
    for span in sorted(spans):
        if last is not None and span[0] < last[1] and (span[3] or last[3]):
            raise CaptureError(
                f"{span[2]!r} lies in the memory of {last[2]!r}",
                where=Where(module=span[2].rpartition(".")[0]),
                why="every rank gets its own part of each, so that what is written to one would not change the other",
                help="tie them by name (b.weight = a.weight) in place of a.data, or give one a copy",
            )
        if last is None or span[1] > last[1]:
            last = span


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in memory."""
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


__all__ = ["refuse_hooks", "refuse_shared_memory"]
