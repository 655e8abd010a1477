"""Parameters in parts: cut a tensor as its layouts say, and put the parts together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tpcompile.layout import Layout, Mesh, axes_of, runs, size
from tpcompile.layout import local_size as layout_size


def cut(tensor: torch.Tensor, dims: Sequence[Layout], mesh: Mesh, rank: int) -> torch.Tensor:
    """The part of ``tensor`` that ``rank`` holds: a new tensor, or ``tensor`` itself where nothing is cut."""
    part = tensor
    for dim, layout in enumerate(dims):
        if axes_of(layout):
            pieces = [part.narrow(dim, s, n) for s, n in runs(layout, mesh.sizes, mesh.coordinates(rank))]
            part = torch.cat(pieces, dim)
    return part


def shape(dims: Sequence[Layout], mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Shape of the part that ``rank`` holds."""
    return tuple(layout_size(d, mesh, rank) for d in dims)


def join(parts: Sequence[torch.Tensor], dims: Sequence[Layout], mesh: Mesh) -> torch.Tensor:
    """The whole tensor of which ``parts[rank]`` are the parts; what several ranks hold is taken from the first."""
    if not any(axes_of(d) for d in dims):
        return parts[0]
    whole = parts[0].new_empty([size(d) for d in dims])
    for rank in reversed(range(mesh.degree)):
        assign(whole, parts[rank], dims, mesh, rank)
    return whole


def assign(whole: torch.Tensor, part: torch.Tensor, dims: Sequence[Layout], mesh: Mesh, rank: int) -> None:
    """Write ``rank``'s part into its places of the whole tensor."""
    index = [
        torch.cat([torch.arange(s, s + n, device=whole.device) for s, n in runs(d, mesh.sizes, mesh.coordinates(rank))])
        for d in dims
    ]
    whole[torch.meshgrid(*index, indexing="ij") if index else ()] = part


def attributes(
    captured_parameters: Mapping[str, torch.Tensor],
    others: Mapping[str, torch.Tensor],
    layouts: Mapping[str, tuple[Layout, ...]],
    mesh: Mesh,
) -> list[dict[str, torch.Tensor]]:
    """Per rank: its part of every parameter, as a leaf of its own, and the other tensors as they are."""
    ranks: list[dict[str, torch.Tensor]] = []
    for rank in range(mesh.degree):
        mine = dict(others)
        for name, parameter in captured_parameters.items():
            part = cut(parameter.detach(), layouts[name], mesh, rank) if name in layouts else parameter.detach()
            part = part.clone() if part.data_ptr() == parameter.data_ptr() else part
            mine[name] = part.requires_grad_(parameter.requires_grad)
        ranks.append(mine)
    return ranks
