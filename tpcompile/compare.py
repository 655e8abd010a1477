"""How equal two runs are: relative errors with one rule for every check (verify, run, tests)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.utils import _pytree as pytree

from tpcompile.errors import TpcompileError

GRADIENT_FLOOR = 1e-3
"""A gradient that is zero but for rounding (the bias of attention's keys) has no digits of its own: errors are
measured against at least this share of the largest gradient of the model."""


def relative_error(expected: torch.Tensor, got: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest expected value, or over ``floor`` if that is larger; NaN is infinite."""
    if expected.shape != got.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, got) else float("inf")
    matching = (expected == got) | (expected.isnan() & got.isnan())  # masks hold -inf, and inf - inf is NaN
    if bool(matching.all()):
        return 0.0
    difference = torch.where(matching, torch.zeros_like(expected), expected - got).abs().max().item()
    scale = max(largest([expected]), floor, torch.finfo(expected.dtype).tiny)
    error = difference / scale
    return error if error == error else float("inf")


def gradient_errors(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
    """The relative error of each gradient; one that is missing is infinitely wrong, unless zero was expected."""
    expected, got = ({n: g.to_dense() if g.is_sparse else g for n, g in x.items()} for x in (expected, got))
    floor = largest(expected.values()) * GRADIENT_FLOOR
    missing = {name: float("inf") if gradient.any() else 0.0 for name, gradient in expected.items() if name not in got}
    return missing | {name: relative_error(expected[name], got[name], floor) for name in expected if name in got}


def largest(tensors: Iterable[torch.Tensor]) -> float:
    """The largest finite absolute value in the tensors; 0 if there are none."""
    found = 0.0
    for tensor in tensors:
        if tensor.numel():
            found = max(found, float(torch.nan_to_num(tensor.detach().abs(), nan=0.0, posinf=0.0).max()))
    return found


def backward(*outputs: object, seed: int = 0) -> list[torch.Tensor]:
    """Backward from all outputs (one of a device, or one of each rank) with the same fixed random gradients.

    A leaf's gradient depends on its place in the output alone, so that runs in which another set of leaves requires a
    gradient are comparable. Returns the leaves that received one.

    Raises:
        TpcompileError: there is none, so a comparison of gradients would compare nothing.
    """
    reached: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    for output in outputs:
        generator = torch.Generator().manual_seed(seed)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
                reached += [leaf] if leaf.requires_grad else []
                given += [drawn] if leaf.requires_grad else []
    if not reached:
        what = "no output of the model depends on a parameter that requires a gradient"
        raise TpcompileError(what, why="there would be nothing to compare", help="set requires_grad on a parameter")
    torch.autograd.backward(reached, given)
    return reached
