"""Local kernels that replace an op where a cut asks for it; each is the op on one rank's part."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tpcompile.onlookers import is_eager
from tpcompile.runs import Runs, balanced


def embedding_rows(weight: torch.Tensor, ids: torch.Tensor, held: Runs, padding_idx: int, total: int) -> torch.Tensor:
    """The rows ``held`` of a table of ``total`` rows, looked up: zero for ids held elsewhere.

    The sum over ranks is the whole lookup (Megatron-LM, Shoeybi et al. 2019, section 3).

    Args:
        weight: ``[rows, d]``, this rank's rows.
        ids: ``[...]`` integers in ``[0, total)``.
        held: ``(start, length)`` of the rows in the whole table, in the order of ``weight``.
        padding_idx: row that receives no gradient, or -1.

    Raises:
        IndexError: an id lies outside the table (checked on the CPU, as ``aten.embedding`` does).
    """
    check_indices(ids, total, "the embedding has {} rows")
    elsewhere, local = locate(ids, held)
    padding, first = None, 0
    for start, length in held:
        if start <= padding_idx < start + length:
            padding = padding_idx - start + first
        first += length
    return F.embedding(local, weight, padding_idx=padding).masked_fill(elsewhere.unsqueeze(-1), 0)


def gather_part(x: torch.Tensor, dim: int, index: torch.Tensor, held: Runs, total: int) -> torch.Tensor:
    """``torch.gather`` along a dim of ``total`` positions of which ``x`` has those in ``held``; zero for the others.

    The sum over ranks is the whole pick (Megatron-LM, Shoeybi et al. 2019, section 3: cross-entropy on cut logits).

    Raises:
        IndexError: an index lies outside the dim (checked on the CPU, as ``aten.gather`` does).
    """
    check_indices(index, total)
    elsewhere, local = locate(index, held)
    return x.gather(dim, local).masked_fill(elsewhere, 0)


def grouped_product(
    x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, held: Runs | None = None
) -> torch.Tensor:
    """``aten._grouped_mm`` in any precision, of all experts or of those ``held`` here; zero for the rows of the others.

    Args:
        x: rows ``[r, k]``, sorted by expert.
        weights: ``[e, k, n]``, the matrices of the experts held here.
        offs: where the rows of every expert end, non-decreasing integers.
        held: ``(start, length)`` of the experts held here, in the order of ``weights``; None for all.
    """
    ends = [0, *offs.tolist()]
    parts, done, at = list[torch.Tensor](), 0, 0
    for start, length in held if held is not None else ((0, len(weights)),):
        for expert in range(start, start + length):
            low, high = ends[expert], ends[expert + 1]
            parts += [x.new_zeros(low - done, weights.shape[-1]), x[low:high] @ weights[at]]
            done, at = high, at + 1
    return torch.cat([*parts, x.new_zeros(x.shape[0] - done, weights.shape[-1])])


def keep_rows(x: torch.Tensor, dim: int, offs: torch.Tensor, held: Runs) -> torch.Tensor:
    """``x`` with the rows of other experts than those ``held`` here set to zero; so are the rows of its gradient."""
    ends = torch.cat([offs.new_zeros(1), offs])
    at = torch.arange(x.shape[dim], device=x.device)
    mine = torch.zeros_like(at, dtype=torch.bool)
    for start, length in held:
        mine = mine | ((at >= ends[start]) & (at < ends[start + length]))
    return x.masked_fill(~mine.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]), 0)


def check_indices(index: torch.Tensor, total: int, has: str = "the dim has {} positions") -> None:
    """Raise IndexError if an index lies outside ``[0, total)``, where that costs nothing: on the CPU, in eager."""
    if index.device.type == "cpu" and is_eager(index):
        if index.numel() == 0:
            return
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= total:
            raise IndexError(f"index out of range: it runs from {low} to {high}, {has.format(total)}")


def locate(index: torch.Tensor, held: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions are held elsewhere, and where the others are among those held here (0 for what is elsewhere)."""
    if len(held) == 1:
        ((start, length),) = held
        local = index - start
        elsewhere = (local < 0) | (local >= length)
        return elsewhere, local.masked_fill(elsewhere, 0)
    inside, local, first = torch.zeros_like(index, dtype=torch.bool), torch.zeros_like(index), 0
    for start, length in held:
        here = (index >= start) & (index < start + length)
        inside, local = inside | here, torch.where(here, index - start + first, local)
        first += length
    return ~inside, local


def take(x: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    """The listed runs of ``dim``, one after the other (a view when there is one run)."""
    if len(runs) == 1:
        return x.narrow(dim, *runs[0])
    return torch.cat([x.narrow(dim, start, length) for start, length in runs or ((0, 0),)], dim)


def balanced_part(length: int, member: int, members: int) -> Runs:
    """What ``member`` of ``members`` holds of a balanced cut of ``length`` positions, as one run."""
    return balanced(length, members)[member]


def dropout_part(x: torch.Tensor, p: float, cuts: tuple[tuple[int, int, Runs], ...], order: list[int]) -> torch.Tensor:
    """Dropout of one rank's part of a tensor, with the mask that one device would draw for the whole of it.

    The full mask is drawn, so the generator stays in step with the single device (CPU: bitwise the same mask,
    because ``aten.dropout`` fills an ``empty_like`` with ``bernoulli_`` in memory order).

    Args:
        x: this rank's part ``[...]``.
        p: probability of dropping.
        cuts: ``(dim, period, runs held here)`` per cut dim: of every ``period`` positions of the whole, these.
        order: dims of the whole tensor as one device has them in memory, outermost first.
    """
    if p == 0.0:
        return x
    shape = list(x.shape)
    for dim, period, runs in cuts:
        held = sum(n for _, n in runs)
        shape[dim] = shape[dim] // held * period if held else period
    mask = torch.empty([shape[d] for d in order], dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    mask = mask.permute([order.index(d) for d in range(x.dim())])
    for dim, period, runs in cuts:
        mask = take(mask.unflatten(dim, (-1, period)), dim + 1, runs).flatten(dim, dim + 1)
    return x * mask.div(1 - p) if p < 1.0 else x * mask


def own_dropout(x: torch.Tensor, p: float, stream: int) -> torch.Tensor:
    """Dropout of one rank's part, with random numbers of ``stream`` alone.

    One number is drawn from the default generator, the same on every rank, and seeds a generator of the stream: ranks
    stay in step, and a recomputation that restores the generator draws the same mask again.

    Args:
        x: this rank's part ``[...]``.
        p: probability of dropping.
        stream: index of the part; ranks that hold the same part pass the same.
    """
    if p == 0.0:
        return x
    seed = int(torch.randint(2**62, ())) + 2718 * (stream + 1)
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * mask.div_(1 - p) if p < 1.0 else x * mask


def split_evenly(x: torch.Tensor, dim: int, count: int) -> tuple[torch.Tensor, ...]:
    """``count`` views of x along ``dim``, of sizes that differ by one at most, whatever the size is."""
    ends = [x.shape[dim] * i // count for i in range(1, count)]
    starts, ends = [0, *ends], [*ends, x.shape[dim]]
    return x.split([end - start for start, end in zip(starts, ends, strict=True)], dim)
