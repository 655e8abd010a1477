"""Code of torch that takes the part of a gradient that a rank holds for all of it: refused, since it raises nothing.

``torch.nn.utils.clip_grad_norm_`` would clip by another norm on every rank, ``torch.amp.GradScaler`` would skip a step
on the rank alone that found an infinity, and optimizers that look at more than one element at a time would see a part.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from tpcompile.errors import TpcompileError

WHOLE = {
    "Adafactor": "it factors the mean square of each matrix into rows and columns, and clips by its root mean square",
    "LARS": "it scales each parameter's step by the norm of the parameter",
    "LBFGS": "it adds products of all gradients",
    "Lamb": "it scales each parameter's step by the norm of the parameter",
    "Muon": "it orthogonalizes each matrix",
    "SOAP": "it rotates each matrix into the eigenvectors of its gradients",
    "Shampoo": "it preconditions each matrix by products of its gradients",
}
"""Optimizers, by the name of their class or of one that it inherits from, and what they need a whole parameter for."""

_cut: Any = WeakIdKeyDictionary()  # parameters of which a rank holds a part -> their names


def watch(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse such code for these parameters, of which this rank holds a part."""
    if not _cut:
        _install()
    for name, parameter in parameters:
        _cut[parameter] = name


def _first_cut(tensors: Iterable[Any]) -> str | None:
    return next((_cut[x] for x in tensors if isinstance(x, Tensor) and x in _cut), None)


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterable[Any]:
    return (x for group in optimizer.param_groups for x in group["params"])


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_check_optimizer)
    total: Any = getattr(clip_grad, "_get_total_norm")  # noqa: B009 - the norm that clip_grad_norm_ asks for

    @functools.wraps(total)
    def total_norm(gradients: Any, *args: Any, **kwargs: Any) -> Any:
        _check_gradients(gradients)
        return total(gradients, *args, **kwargs)

    setattr(clip_grad, "_get_total_norm", total_norm)  # noqa: B010
    for name in ("unscale_", "step"):
        _refuse_in(name)


def _refuse_in(name: str) -> None:
    original: Any = getattr(torch.amp.GradScaler, name)

    @functools.wraps(original)
    def checked(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        alone = self.is_enabled() and not hasattr(self, "process_group")  # which a ShardedGradScaler asks
        if alone and (found := _first_cut(_parameters_of(optimizer))) is not None:
            raise TpcompileError(
                f"GradScaler would decide alone whether {found} is stepped, of which every rank holds a part",
                why="a rank that finds an infinity skips the step, and the others do not",
                help="use bfloat16, which needs no scaling, or torch.distributed.fsdp.sharded_grad_scaler."
                "ShardedGradScaler(device, process_group=tp.group)",
            )
        return original(self, optimizer, *args, **kwargs)

    setattr(torch.amp.GradScaler, name, checked)


def _check_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    kind = next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in WHOLE), None)
    if kind is not None and (found := _first_cut(_parameters_of(optimizer))) is not None:
        raise TpcompileError(
            f"{kind} cannot step {found}, of which every rank holds a part",
            why=WHOLE[kind],
            help="use an optimizer that treats every element alone (SGD, Adam, AdamW and their kin) for the parameters "
            "that are cut; tp.parameter_layouts says which are",
        )


def _check_gradients(gradients: Iterable[Any]) -> None:
    given = {id(x) for x in gradients}
    for parameter, name in _cut.items():
        if parameter.grad is not None and id(parameter.grad) in given:
            raise TpcompileError(
                f"torch.nn.utils.clip_grad_norm_ was given {name}, of which this rank holds a part",
                why="every rank would clip by the norm of what it holds, each by another one",
                help="call tpcompile.clip_grad_norm_(tp, max_norm)",
            )


__all__ = ["WHOLE", "watch"]
