"""The rehearsal of ``tpcompile run``: every process runs the model whole, then its shard for real, and compares.

Unlike ``verify`` it goes through process groups, kernels and the model's own precision, so its bound is half of the
digits of that precision; the proof to rounding is ``verify``'s.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree

import tpcompile
from tpcompile.cli.arguments import example_inputs, load
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.groups import group_device, resolve_group
from tpcompile.program import Asked
from tpcompile.tracing import original


@dataclass(frozen=True)
class Rehearsed:
    """What one rank measured: worst errors relative to the largest value of each tensor, and seconds of its shard."""

    device: str
    output_error: float
    gradient_error: float
    worst_parameter: str
    allowed: float
    seconds: float

    @property
    def excess(self) -> float:
        """The larger error over what is allowed; at most 1 if the rank agrees with one device."""
        return max(self.output_error, self.gradient_error) / self.allowed


def rehearse(model: str, spec: str | None, options: Asked) -> Rehearsed:
    """Run ``model`` whole and cut, forward and backward, in this process of an initialised process group.

    Raises:
        TpcompileError: the model does not load or compile, or has no output to compare.
    """
    with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the command's answer
        return _rehearse(model, spec, options)


def _rehearse(model: str, spec: str | None, options: Asked) -> Rehearsed:
    loaded = load(model, weights=True)
    inputs = example_inputs(loaded)
    device = group_device(resolve_group(None))
    whole = loaded.model.to(device)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (loaded.args, loaded.kwargs))

    with original(whole):
        result = whole(*args, **kwargs)
    expected = backward(result)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    whole.zero_grad(set_to_none=True)

    shard = tpcompile.compile(whole, spec, example_inputs=inputs, **options)
    start = time.perf_counter()
    outputs = backward(shard(*args, **kwargs))
    seconds = time.perf_counter() - start

    errors = gradient_errors(gradients, tpcompile.full_gradients(shard))
    worst = max(errors, key=lambda name: errors[name], default="")
    return Rehearsed(
        device=str(device),
        output_error=max(relative_error(one, other) for one, other in zip(expected, outputs, strict=True)),
        gradient_error=errors.get(worst, 0.0),
        worst_parameter=worst,
        allowed=max(torch.finfo(tensor.dtype).eps for tensor in expected) ** 0.5,
        seconds=seconds,
    )
