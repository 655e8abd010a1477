"""The gradient norm of the original model, from the parts that ranks hold, and clipping by it.

A position of a parameter that several ranks hold (a replicated norm weight, a kv head that two ranks share, the whole
segment of a packed weight) counts once, on the first of them. Which positions these are is read off the layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcompile.errors import TpcompileError
from tpcompile.groups import group_device
from tpcompile.layout import Layout, Leaf, Mesh, Runs, axes_of, local_size, positions
from tpcompile.module import TensorParallel
from tpcompile.primitives import PRIMITIVES
from tpcompile.runs import pick, run_length
from tpcompile.whole_state import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Box = tuple[Runs, ...]
"""For every dim of a rank's part of a parameter, the runs of it, in local positions."""


def clip_grad_norm_(
    module: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradients in place so that the norm of the original model's gradient is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_`` on one device. Collective, see :func:`grad_norm`.

    Args:
        module: what :func:`tpcompile.compile` or :func:`tpcompile.pipeline_stage` returned, also after
            ``fully_shard`` or in DistributedDataParallel.
        max_norm: the largest norm that is left as it is.
        norm_type: the p of the p-norm, positive; ``inf`` for the largest absolute value.
        error_if_nonfinite: refuse a norm that is nan or infinite, before any gradient is scaled.

    Returns:
        The norm before clipping, a tensor without dims, the same on every rank.

    Raises:
        TpcompileError: see :func:`grad_norm`; and a norm that is not finite, if asked.
    """
    total = grad_norm(module, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise TpcompileError(
            f"the gradient norm is {total.item()}, so the gradients cannot be clipped",
            why="some gradient is nan or infinite, on this rank or on another one",
            help="look for the loss that is not finite, or pass error_if_nonfinite=False to scale by it anyway",
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for (device, dtype), gradients in _alike(_local(p.grad) for p in module.parameters() if p.grad is not None):
        torch._foreach_mul_(gradients, factor.to(device, dtype))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return total


def grad_norm(module: nn.Module, norm_type: float = 2.0) -> Tensor:
    """The p-norm of the gradient of the original model, without dims, the same number on every rank.

    Collective: one all-gather of one number over the ranks of tensor parallelism, and one more over each further group
    that parameters are divided over (by ``fully_shard``, or into the stages of a pipeline). Gradients must be complete:
    those of data parallelism averaged already, as DistributedDataParallel and ``fully_shard`` leave them.

    The result has the gradients' own dtype, at least float32; zero if there is no gradient.

    Raises:
        TpcompileError: ``norm_type`` is not positive; ``module`` is not a compiled one; it has a parameter that was not
            compiled, or one that is divided in a way that is not known here.
    """
    if not norm_type > 0:
        raise TpcompileError(
            f"norm_type must be positive, not {norm_type!r}",
            why="only p-norms add up over the parts that ranks hold",
            help="pass norm_type=2.0, 1.0 or math.inf",
        )
    compiled = _compiled(module)
    parts = list(_parts(compiled))
    tp, *shared = groups = _groups(compiled, parts)
    stages = compiled._stage_group  # pyright: ignore[reportPrivateUsage]
    groups += [] if stages is None else [stages]
    mesh, rank = compiled.program.mesh, dist.get_rank(tp)
    pieces = [piece for part in parts for piece in _counted(part, shared, mesh, rank)]
    norms = [
        norm.double().to(group_device(groups[0]))
        for (_, dtype), alike in _alike(pieces)
        for norm in torch._foreach_norm(alike, norm_type, _wide(dtype))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    ]
    total = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64, device=group_device(groups[0]))
    for group in groups:
        mine = torch.linalg.vector_norm(total, norm_type).to(group_device(group)).reshape(1)
        total = PRIMITIVES["all_gather"](mine, 0, group.size(), group.group_name, False)
    device, dtype = next(((p.device, _wide(p.dtype)) for p in compiled.parameters()), (total.device, torch.float32))
    return torch.linalg.vector_norm(total, norm_type).to(device, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _alike(tensors: Iterator[Tensor] | Sequence[Tensor]) -> list[tuple[tuple[torch.device, torch.dtype], list[Tensor]]]:
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.items())


def _compiled(module: nn.Module) -> TensorParallel:
    inside: Any = module
    while not isinstance(inside, TensorParallel):
        inside = getattr(inside, "_orig_mod", None) or getattr(inside, "module", None)
        if not isinstance(inside, nn.Module):
            raise TpcompileError(
                f"{type(module).__name__} is not a compiled module",
                why="the norm counts what several ranks hold once, which only the layouts of parameters tell",
                help="pass what tpcompile.compile returned; for other modules use torch.nn.utils.clip_grad_norm_",
            )
    return inside


# ------------------------------------------------------------------------------------------------ who counts what
@dataclass(frozen=True)
class _Part:
    """A parameter as this rank of tensor parallelism holds it, and how that part is divided further."""

    name: str
    gradient: Tensor | None  # what is really here
    dims: tuple[Layout, ...]
    shard: tuple[int, int, int] | None  # dim that fully_shard divides, first position here, positions here
    group: dist.ProcessGroup | None  # over which


def _parts(module: TensorParallel) -> Iterator[_Part]:
    names = module._names  # pyright: ignore[reportPrivateUsage]
    layouts = module.parameter_layouts()
    for name, parameter in module.named_parameters():
        if name not in names:
            raise TpcompileError(
                f"parameter {name} was not there when the model was compiled",
                why="nothing says whether the ranks hold parts of it or copies",
                help="add parameters to the model before tpcompile.compile, and wrap no module inside the compiled one",
            )
        dims = layouts.get(name) or tuple(Leaf(n) for n in parameter.shape)
        gradient = None if parameter.grad is None else _local(parameter.grad)
        yield _Part(name, gradient, dims, *_shard(name, parameter))


def _shard(name: str, parameter: Tensor) -> tuple[tuple[int, int, int] | None, dist.ProcessGroup | None]:
    """How ``fully_shard`` divides a parameter: the same number of positions for each rank, but for the last ones."""
    if not is_dtensor(parameter):
        return None, None
    from torch.distributed.tensor import Replicate, Shard

    spread = cast("DTensor", parameter)
    cut = [(i, p) for i, p in enumerate(spread.placements) if not isinstance(p, Replicate)]
    if not cut:
        return None, None
    if len(cut) > 1 or type(cut[0][1]) is not Shard:
        raise TpcompileError(
            f"parameter {name} is a DTensor placed as {tuple(spread.placements)}",
            why="its gradient norm is known for what fully_shard makes: divided along one dim over one mesh dim",
            help="apply torch.distributed.fsdp.fully_shard to the compiled module over a data-parallel mesh dim",
        )
    ((mesh_dim, placement),) = cast("Any", cut)
    mesh, dim = spread.device_mesh, int(placement.dim)
    size, members = spread.shape[dim], mesh.size(mesh_dim)
    longest = -(-size // members)
    start = min(size, mesh.get_local_rank(mesh_dim) * longest)
    length = min(size - start, longest)
    assert _local(spread).shape[dim] == length, f"{name}: {tuple(_local(spread).shape)} of {tuple(spread.shape)}"
    return (dim, start, length), mesh.get_group(mesh_dim)


def _local(tensor: Tensor) -> Tensor:
    return cast("DTensor", tensor).to_local() if is_dtensor(tensor) else tensor


def _groups(module: TensorParallel, parts: Sequence[_Part]) -> list[dist.ProcessGroup]:
    """The ranks of tensor parallelism, then the groups over which ``fully_shard`` divides parameters further."""
    found = [module._group, *(p.group for p in parts if p.group is not None)]  # pyright: ignore[reportPrivateUsage]
    return list({group.group_name: group for group in found}.values())


def _counted(part: _Part, shared: Sequence[dist.ProcessGroup], mesh: Mesh, rank: int) -> Iterator[Tensor]:
    """What this rank counts of a gradient: nothing that a rank before it has too, in ``mesh`` or a ``shared`` group."""
    if part.gradient is None or any(dist.get_rank(g) for g in shared if g is not part.group):
        return
    for box in counted(part.dims, mesh, rank):
        piece = part.gradient
        for dim, runs in enumerate(box):
            if part.shard is not None and part.shard[0] == dim:
                runs = _within(runs, *part.shard[1:])
            if run_length(runs) < piece.shape[dim]:
                piece = pick(piece, dim, runs)
        if piece.numel():
            yield piece


def _within(runs: Runs, start: int, length: int) -> Runs:
    """The part of ``runs`` that lies in ``length`` positions from ``start`` on, counted from there."""
    cut = ((max(s, start), min(s + n, start + length)) for s, n in runs)
    return tuple((low - start, high - low) for low, high in cut if low < high)


@lru_cache(maxsize=4096)
def counted(dims: tuple[Layout, ...], mesh: Mesh, rank: int) -> tuple[Box, ...]:
    """Boxes of what ``rank`` holds of a parameter and no rank before it does, in local positions.

    Together the boxes of all ranks are the whole parameter, each position once.
    """
    if not any(axes_of(d) for d in dims):
        return () if rank else (tuple(((0, local_size(d, mesh, rank)),) for d in dims),)
    sides = [_by_holders(d, mesh, rank) for d in dims]
    return tuple(
        tuple(runs for _, runs in sides_of_box)
        for sides_of_box in product(*sides)
        if not any(all(holders[r] for holders, _ in sides_of_box) for r in range(rank))
    )


def _by_holders(layout: Layout, mesh: Mesh, rank: int) -> list[tuple[tuple[bool, ...], Runs]]:
    """Local positions of a dim, grouped by which of the ranks before ``rank`` hold them too."""
    mine = positions(layout, mesh, rank)
    if not axes_of(layout):
        return [((True,) * rank, ((0, len(mine)),))]
    held = np.stack([np.ones(len(mine), bool), *(np.isin(mine, positions(layout, mesh, r)) for r in range(rank))])
    kinds, kind_of = np.unique(held, axis=1, return_inverse=True)
    return [(tuple(map(bool, kind[1:])), _runs(np.flatnonzero(kind_of == i))) for i, kind in enumerate(kinds.T)]


def _runs(ascending: np.ndarray[Any, Any]) -> Runs:
    pieces = np.split(ascending, np.flatnonzero(np.diff(ascending) != 1) + 1)
    return tuple((int(piece[0]), len(piece)) for piece in pieces if len(piece))


__all__ = ["clip_grad_norm_", "counted", "grad_norm"]
