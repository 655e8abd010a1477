"""What a forward remembers from call to call beside buffers: a graph is one call, so its answers may not need it."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tpcompile import caches
from tpcompile.errors import CaptureError
from tpcompile.source_lines import forward_of
from tpcompile.untouched import example_of, preserved, quiet

if TYPE_CHECKING:
    from tpcompile.tracing import Rebuild, Trace


def state_of(model: nn.Module) -> dict[str, list[Any]]:
    """What the modules hold beside parameters and buffers, which forward may set; containers in leaves."""
    return {
        f"{path}.{name}" if path else name: pytree.tree_leaves(value)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name == "training" or name not in _MODULE
    }


_MODULE = frozenset(nn.Module().__dict__)


def refuse_memory(model: nn.Module, trace: Trace, rebuild: Rebuild) -> None:
    """Refuse a forward that answers otherwise once it has been called: a graph has the first call's answer.

    It is asked only if forward sets attributes. Most do no harm (a loss that is kept to be read, a table that the first
    call makes for later ones), so the answers decide, where there are weights to compute them with.
    """
    if not trace.state or _answers_alike(model, trace.examples, rebuild):
        return
    raise CaptureError(
        f"{type(model).__name__} cannot be captured: its forward depends on what an earlier call left in "
        + ", ".join(f"`{name}`" for name in sorted(trace.state)),
        where=forward_of(model),
        why="a graph is one call: numbers, lists and tensors that modules keep from call to call are constants of it",
        help="keep it in a buffer (self.register_buffer) that forward writes in place, or make it an argument",
    )


def _answers_alike(model: nn.Module, examples: list[torch.Tensor], rebuild: Rebuild) -> bool:
    """Whether two calls in a row give the same numbers; also if that cannot be told."""
    tensors = [*examples, *model.parameters(), *model.buffers()]
    if any(x.is_meta or isinstance(x, FakeTensor) for x in tensors):
        return True
    answers: list[list[Any]] = []
    with preserved(model), quiet(), torch.no_grad(), torch.random.fork_rng({x.device for x in tensors if x.is_cuda}):
        buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        for module in model.modules():  # a call may write to it
            module.__dict__.update({k: v.clone() for k, v in module.__dict__.items() if isinstance(v, torch.Tensor)})
        for _ in range(2):
            for table, before in buffers:  # writes to buffers are in the graph
                table.update({name: held if held is None else held.clone() for name, held in before.items()})
            torch.manual_seed(0)
            args, kwargs = rebuild([example_of(example).clone() for example in examples])
            try:
                answers.append(pytree.tree_leaves(caches.call(model, args, kwargs)))
            except Exception:  # noqa: BLE001  (whatever the model raises: the trace went well)
                return True
    first, second = answers
    return len(first) == len(second) and all(_same_answer(a, b) for a, b in zip(first, second, strict=True))


def _same_answer(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, equal_nan=True)
    return not isinstance(a, caches.PLAIN) or a == b


def generators() -> list[Any]:
    """Where the random generators stand that a forward may draw from, to choose its layers for example."""
    return [random.getstate(), *map(str, np.random.get_state()), torch.get_rng_state().numpy().tobytes()]


def warn_of_lost_state(model: nn.Module, trace: Trace) -> None:
    """Say, once, what the model does that is not in the graph."""
    name = type(model).__name__
    if any(module.__dict__.get("gradient_checkpointing") is True for module in model.modules()):
        warnings.warn(
            f'{name}: gradient checkpointing is not part of the captured graph; pass recompute="layers" for the same',
            stacklevel=3,
        )
    if lost := sorted(name for name in trace.state if not name.rpartition(".")[2].startswith("_")):
        it = "it" if len(lost) == 1 else "them"
        warnings.warn(
            f"{name}: forward sets {', '.join(lost)}; the captured graph has the same outputs but does not set {it}",
            stacklevel=3,
        )


__all__ = ["generators", "refuse_memory", "state_of", "warn_of_lost_state"]
