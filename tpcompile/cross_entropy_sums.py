"""The statistics of cross-entropy on cut logits as one node of autograd, which keeps one tensor of their size.

The shifted logits, their exponentials and the gradients of both are as large as the logits, the largest tensors of many
a training step. Here the exponentials overwrite the shifted logits, and both gradients are one tensor (Megatron-LM's
``_VocabParallelCrossEntropy``). The pass ``passes/cross_entropy.py`` finds where.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tpcompile import kernels
from tpcompile.onlookers import is_autograd_alone
from tpcompile.runs import Runs


def cross_entropy_sums(
    x: Tensor, largest: Tensor, dim: int, keepdim: bool, index: Tensor, held: Runs, total: int
) -> tuple[Tensor, ...]:
    """The sum of ``exp(x - largest)`` along ``dim``, and ``x - largest`` at ``index``; a third is not for callers.

    Args:
        x: this rank's logits ``[..., v, ...]``.
        largest: what is subtracted, with a dim of one in the place of ``dim``; it has no gradient.
        dim: the dim of ``v`` classes, not negative.
        keepdim: whether the sum keeps it.
        index: classes ``[..., 1, ...]`` in ``[0, total)``.
        held: the classes that this rank has, as in :func:`tpcompile.kernels.gather_part`.
        total: how many classes there are.

    Raises:
        IndexError: see :func:`tpcompile.kernels.gather_part`.
    """
    if is_autograd_alone(x, largest, index):
        return cast("tuple[Tensor, ...]", _Sums.apply(x, largest, index, (dim, keepdim, held, total)))
    shifted = x - largest
    return shifted.exp().sum([dim], keepdim), kernels.gather_part(shifted, dim, index, held, total)


class _Sums(torch.autograd.Function):
    """The sum, what was picked, and the exponentials, which a backward of backward asks for."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, largest: Tensor, index: Tensor, call: tuple[int, bool, Runs, int]
    ) -> tuple[Tensor, ...]:
        dim, keepdim, held, total = ctx.call = call
        shifted = x - largest
        kernels.check_indices(index, total)
        elsewhere, local = kernels.locate(index, held)
        picked = shifted.gather(dim, local).masked_fill_(elsewhere, 0)
        exponentials = shifted.exp_()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(exponentials, local, elsewhere)
        return exponentials.sum([dim], keepdim), picked, exponentials

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        exponentials, local, elsewhere = ctx.saved_tensors
        dim, keepdim, _, _ = ctx.call
        of_sum, of_picked, of_exponentials = grads
        if of_sum is not None and not keepdim:
            of_sum = of_sum.unsqueeze(dim)
        factors = [x for x in (of_sum, of_exponentials) if x is not None]
        result = exponentials * (factors[0] if len(factors) == 1 else sum(factors)) if factors else None
        if of_picked is not None:
            result = torch.zeros_like(exponentials) if result is None else result
            of_picked = of_picked.masked_fill(elsewhere, 0)
            again = torch.is_grad_enabled()
            result = (result.scatter_add if again else result.scatter_add_)(dim, local, of_picked)
        return result, None, None, None


__all__ = ["cross_entropy_sums"]
