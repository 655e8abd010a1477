"""The captured graph beside the model: on the example inputs of ``compile``, outputs, gradients and buffers must agree.

A model can compute something else while it is traced, and no look at its graph would tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tpcompile import caches
from tpcompile.capture import outside_autocast
from tpcompile.compare import backward, gradient_errors
from tpcompile.equivalence import (
    Reference,
    Run,
    buffers_and_constants,
    detached,
    same_random_numbers,
    tolerated,
    worst_errors,
)
from tpcompile.errors import CaptureError
from tpcompile.program import Program
from tpcompile.tracing import original

SAMPLE = 65536
"""Of each parameter's gradient so many numbers are compared: whole gradients would take the memory of the weights."""


def check_capture(program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare the captured graph with the model on the example inputs, once, in the model's own precision.

    Gradients are left out where grad mode is off, and where the model has none.

    Raises:
        CaptureError: they differ by more than rounding.
    """
    captured = program.captured
    trains = torch.is_grad_enabled()
    with _kept_buffers(model):

        def call_model() -> Run:
            copied = pytree.tree_map_only(torch.Tensor, _copy, caches.packed((args, dict(kwargs))))
            with original(model):
                return Run(caches.leaves(caches.call(model, *copied)))

        expected, trains = _run(captured.parameters, call_model, trains)
        expected.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}

    def call_graph() -> Run:
        own = buffers_and_constants(program, torch.Tensor.detach)
        run = outside_autocast(Reference(captured.graph_module, {**captured.parameters, **own}).run, captured.autocast)
        leaves = list(run(*map(_copy, captured.flatten(args, kwargs))))
        written = {n: own[n] for n in captured.buffers if own[n].shape == expected.buffers[n].shape}
        return Run(leaves, buffers=written)

    got, _ = _run(captured.parameters, call_graph, trains)
    output, gradient = worst_errors(expected, got)
    if not max(output, gradient) <= tolerated(program, expected):
        what = f"outputs for the example inputs differ by {output:.1e}"
        if output <= tolerated(program, expected):
            each = gradient_errors(expected.gradients, got.gradients)
            worst = f", of {max(each, key=lambda n: each[n])} most" if each else ""
            what = f"gradients for the example inputs differ by {gradient:.1e}{worst}"
        raise CaptureError(
            f"the captured graph is not the model: {what}",
            why="the model computes something else while it is traced",
            help='for a transformers model try attn_implementation="eager": masks of fused attention are made in '
            "another way while tracing",
        )


def _run(parameters: Mapping[str, torch.Tensor], call: Callable[[], Run], trains: bool) -> tuple[Run, bool]:
    """What ``call`` makes, with samples of the gradients if it ``trains``, and whether it does."""
    with same_random_numbers(), torch.set_grad_enabled(trains), _sampled_gradients(parameters) as gradients:
        run = call()
        if trains and any(isinstance(x, torch.Tensor) and x.requires_grad for x in run.outputs):
            try:
                backward(run.outputs)
            except RuntimeError:  # an op without a derivative, or no memory for one
                gradients.clear()
                trains = False
    run.outputs = [detached(x) for x in run.outputs]
    run.gradients = gradients
    return run, trains


@contextlib.contextmanager
def _sampled_gradients(parameters: Mapping[str, torch.Tensor]) -> Generator[dict[str, torch.Tensor]]:
    """While it is open, backward leaves samples of gradients in what it gives, and none in the parameters."""
    found: dict[str, torch.Tensor] = {}

    def take(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                flat = (gradient.to_dense() if gradient.is_sparse else gradient.detach()).reshape(-1)
                found[name] = flat[:: max(1, flat.numel() // SAMPLE)].clone()
            parameter.grad = None

        return hook

    kept = {name: p.grad for name, p in parameters.items()}
    hooks: list[Any] = []
    try:
        for name, p in parameters.items():
            p.grad = None
            if p.requires_grad:
                hooks.append(p.register_post_accumulate_grad_hook(take(name)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, p in parameters.items():
            p.grad = kept[name]


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Generator[None]:
    """Undo what a call writes to buffers."""
    before = {n: b.detach().clone() for n, b in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(before[n])


def _copy(x: torch.Tensor) -> torch.Tensor:
    """An input of its own: the model may write to it."""
    return x.detach().clone().requires_grad_(x.requires_grad)


__all__ = ["check_capture"]
