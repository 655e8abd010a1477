"""autograd Functions in a model: a trace keeps their forward alone, so their backward must be its derivative."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from tpcompile.errors import CaptureError, Where


@dataclass(frozen=True)
class FunctionCall:
    """One call of a torch.autograd.Function; its tensors are on meta."""

    kind: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: Where | None

    @property
    def key(self) -> Any:
        """The same for calls that do the same: of one Function, with the same shapes and plain arguments."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        described = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
        return self.kind, str(spec), str(described)


def specimen(value: Any) -> Any:
    """A tensor of the same sizes and dtype on meta, sizes as they were in the trace."""
    if isinstance(value, torch.Tensor):
        sizes = [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta")
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def refuse_functions(calls: Sequence[FunctionCall]) -> None:
    """Refuse autograd Functions whose backward is not the derivative of their forward.

    torch.export traces the forward and forgets the backward. For a Function that is only a faster or leaner way to
    write its own derivative that is right, for a straight-through estimator it is silently wrong: so it is measured.
    """
    for call in {call.key: call for call in calls}.values():
        if not all(_backward_is_the_derivative(call, scale) for scale in _SCALES):
            raise CaptureError(
                f"torch.autograd.Function {call.kind.__name__!r} cannot be captured",
                where=call.where,
                why="its forward would be traced and its backward lost, which is not the derivative of its forward",
                help="write the operation with ordinary tensor ops and detach(), or as a torch.library.custom_op",
            )


_SCALES = (1e-2, 1.0, 1e2)  # of the numbers at which a backward is measured: some clip what is large


def _backward_is_the_derivative(call: FunctionCall, scale: float) -> bool:
    """Whether gradients by ``backward`` and through ``forward`` are alike, at a random point in fp64."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        args = pytree.tree_map(functools.partial(_random, scale), call.args)
        floats = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        separate = call.kind.setup_context is not torch.autograd.Function.setup_context
        try:
            inline = call.kind.forward(*(() if separate else (_NoContext(),)), *args, **call.kwargs)
            applied = call.kind.apply(*args, **call.kwargs)
            gradients = [_gradients(outputs, floats) for outputs in (inline, applied)]
        except Exception:  # noqa: BLE001  (it does not run in fp64 on cpu: nothing can be said of it)
            return False
    return all(_same_gradient(a, b) for a, b in zip(*gradients, strict=True))


def _random(scale: float, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return (torch.randn(value.shape, dtype=torch.float64) * scale).requires_grad_()
    if value.dtype == torch.bool:
        return torch.rand(value.shape) < 0.5
    return torch.zeros(value.shape, dtype=value.dtype)


def _same_gradient(through_forward: torch.Tensor, by_backward: torch.Tensor) -> bool:
    """Whether they are alike where that through forward is a number: there exp may overflow, say."""
    known = through_forward.isfinite()
    a, b = through_forward[known], by_backward[known]
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7 * max(1.0, float(a.abs().max()) if len(a) else 0.0))


def _gradients(outputs: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    outputs = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    seeds = [torch.randn(output.shape, dtype=output.dtype) for output in outputs]
    if not outputs:
        return [torch.zeros_like(value) for value in inputs]
    found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    pairs: list[tuple[Any, torch.Tensor]] = list(zip(found, inputs, strict=True))
    return [torch.zeros_like(value) if gradient is None else gradient for gradient, value in pairs]


class _NoContext:
    """Takes whatever a forward saves for its backward, and forgets it."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None  # pyright: ignore[reportUnknownVariableType]


__all__ = ["FunctionCall", "refuse_functions", "specimen"]
