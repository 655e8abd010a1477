"""What a compiled module holds in parts, gathered: the original model's state dict and gradients."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from tpcompile import shards
from tpcompile.groups import group_device
from tpcompile.layout import axes_of

if TYPE_CHECKING:
    from tpcompile.module import TensorParallel


def full_state_dict(module: TensorParallel) -> dict[str, torch.Tensor]:
    """The state dict of the original model, on every rank: original names (ties included) and shapes. Collective."""
    found: dict[str, torch.Tensor] = {}
    local = module.state_dict(keep_vars=True)
    done: dict[str, torch.Tensor] = {}
    for name, tensor in local.items():
        canonical = module._names.get(name, name)
        if canonical not in done:
            done[canonical] = gathered(module, canonical, tensor.detach())
        found[name] = done[canonical]
    return found


def full_gradients(module: TensorParallel) -> dict[str, torch.Tensor]:
    """Whole gradients by original name, on every rank; parameters without a gradient are left out. Collective."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in _canonical_parameters(module):
        if parameter.grad is not None:
            found[name] = gathered(module, name, parameter.grad.detach())
    return found


def _canonical_parameters(module: TensorParallel) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[str] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        canonical = module._names.get(name, name)
        if canonical not in seen:
            seen.add(canonical)
            yield canonical, parameter


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is divided by ``fully_shard``; what is not one needs no import of DTensor to tell."""
    return hasattr(tensor, "full_tensor")


def gathered(module: TensorParallel, name: str, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank, of which ``part`` is what this rank holds of that name. Collective."""
    part = cast("Any", part).full_tensor() if is_dtensor(part) else part
    dims = module._layouts.get(name, ())
    mesh, group = module._mesh, module._group
    if not any(axes_of(d) for d in dims):
        return part.clone()
    shapes = [shards.shape(dims, mesh, r) for r in range(mesh.degree)]
    longest = max(torch.Size(s).numel() for s in shapes)
    device = group_device(group)
    mine = torch.zeros(longest, dtype=part.dtype, device=device)
    mine[: part.numel()] = part.reshape(-1).to(device)
    every = [torch.empty_like(mine) for _ in shapes]
    dist.all_gather(every, mine, group=group)
    parts = [x[: torch.Size(s).numel()].view(s) for x, s in zip(every, shapes, strict=True)]
    return shards.join(parts, dims, mesh).to(part.device)


__all__ = ["full_gradients", "full_state_dict", "gathered", "is_dtensor"]
