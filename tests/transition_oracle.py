"""What a transition must do, said without saying how.

A state gives the ranks' tensors a meaning: one dense tensor. R and H: the one that all hold; S: the parts put
together; P: the sum. A transition changes the state and keeps the meaning, of values and of gradients, whose states
are R, S, P and H for values in R, S, H and P. That is all that ``failures`` asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tpcompile.runs import Parts, Runs, Where, balanced
from tpcompile.transitions import TRANSITIONS

DUAL = {"R": "R", "S": "S", "H": "P", "P": "H"}
CUTS = ("gather", "all_gather", "scatter", "cut", "reduce_scatter")


@dataclass(frozen=True)
class Case:
    """One use of one transition, and the seed of the tensors to use it on."""

    name: str
    ranks: int
    shape: tuple[int, ...]  # of the dense tensor
    dim: int
    parts: Parts  # of the dense dim
    given: Where | None  # as the transition is told
    runs: tuple[Runs, ...]  # for copy_segments, of each rank
    dtype: torch.dtype
    strided: bool
    seed: int

    def arguments(self, rank: int) -> tuple[Any, ...]:
        """What stands between the tensor and the group."""
        if self.name in CUTS:
            return self.dim, self.given
        return (self.dim, self.runs[rank]) if self.name == "copy_segments" else ()

    def draw(self, state: str, seed: int) -> list[Tensor]:
        """Tensors in ``state``, one for each rank; small integers, so that sums are exact in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        high = 2 if self.dtype == torch.bool else 5
        each = [torch.randint(0, high, self.shape, generator=generator) for _ in range(self.ranks)]
        if state in "RH":
            each = each[:1] * self.ranks
        if state == "S":
            each = [take(each[0], self.dim, runs) for runs in self.parts]
        return [self.lay(x.to(self.dtype)) for x in each]

    def draw_segments(self, seed: int, alike: bool) -> list[Tensor]:
        """Each rank's own tensor, ``alike`` on the ranks' runs."""
        each = self.draw("P", seed)
        if alike:
            first = take(each[0], self.dim, self.runs[0])
            each = [put(x, self.dim, runs, first) for x, runs in zip(each, self.runs, strict=True)]
        return [self.lay(x) for x in each]

    def lay(self, x: Tensor) -> Tensor:
        """x, with strides that are not the contiguous ones if the case asks for it."""
        if not self.strided or x.ndim == 0:
            return x.clone()
        wide = x.new_zeros([*x.shape[:-1], 2 * x.shape[-1]])
        wide[..., ::2] = x
        return wide[..., ::2]

    def inputs(self) -> list[Tensor]:
        if self.name == "copy_segments":
            return self.draw_segments(self.seed, True)
        return self.draw(TRANSITIONS[self.name].source, self.seed)

    def cotangents(self) -> list[Tensor]:
        if self.name == "copy_segments":
            return self.draw_segments(self.seed + 1, False)
        return self.draw(DUAL[TRANSITIONS[self.name].target], self.seed + 1)


@dataclass(frozen=True)
class Outcome:
    """What came out, one item for each rank; gradients are None for a dtype that has none."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]


def indices(runs: Runs) -> Tensor:
    return torch.tensor([i for start, length in runs for i in range(start, start + length)], dtype=torch.int64)


def take(x: Tensor, dim: int, runs: Runs) -> Tensor:
    return x.index_select(dim, indices(runs))


def put(x: Tensor, dim: int, runs: Runs, value: Tensor) -> Tensor:
    return x.clone().index_copy(dim, indices(runs), value)


def meaning(case: Case, state: str, xs: Sequence[Tensor]) -> Tensor | str:
    """The dense tensor that ``xs`` stand for, or what is wrong with them."""
    dense = xs[0].new_zeros(case.shape)
    for rank, x in enumerate(xs):
        shape = list(case.shape)
        if state == "S":
            shape[case.dim] = sum(length for _, length in case.parts[rank])
        if list(x.shape) != shape:
            return f"shape {tuple(x.shape)} on rank {rank} for {shape} in state {state}"
        if state in "RH" and not torch.equal(x, xs[0]):
            return f"state {state}, but rank {rank} holds another value than rank 0"
        if state == "S":
            dense = put(dense, case.dim, case.parts[rank], x)
        else:
            dense = dense + x if state == "P" else x
    return dense


def failures(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with ``outcome``; nothing if the transition is what the table says."""
    if case.name == "copy_segments":
        return _segment_failures(case, outcome)
    row = TRANSITIONS[case.name]
    found: list[str] = []
    pairs: Mapping[str, tuple[str, list[Tensor], str, Sequence[Tensor | None]]] = {
        "forward": (row.source, case.inputs(), row.target, outcome.outputs),
        "backward": (DUAL[row.target], case.cotangents(), DUAL[row.source], outcome.gradients),
    }
    for direction, (before, xs, after, ys) in pairs.items():
        there = [y for y in ys if y is not None]
        if len(there) != len(ys):
            if direction == "forward" or case.dtype.is_floating_point:
                found.append(f"{direction}: something is missing")
            continue
        expected, got = meaning(case, before, xs), meaning(case, after, there)
        if isinstance(expected, str) or isinstance(got, str):
            found.append(f"{direction}: {expected if isinstance(expected, str) else got}")
        elif got.dtype != case.dtype or not torch.equal(expected, got):
            found.append(f"{direction}: {got} for {expected}")
    return found


def _segment_failures(case: Case, outcome: Outcome) -> list[str]:
    found = [
        f"forward: rank {rank} changed its value"
        for rank, (x, y) in enumerate(zip(case.inputs(), outcome.outputs, strict=True))
        if not torch.equal(x, y)
    ]
    if case.dtype.is_floating_point:
        given = case.cotangents()
        total = sum(take(g, case.dim, runs) for g, runs in zip(given, case.runs, strict=True))
        for rank, (g, got) in enumerate(zip(given, outcome.gradients, strict=True)):
            expected = put(g, case.dim, case.runs[rank], total) if isinstance(total, Tensor) else g
            if got is None or not torch.equal(expected, got):
                found.append(f"backward: rank {rank} got {got} for {expected}")
    return found


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


@st.composite
def cases(draw: st.DrawFn, names: Sequence[str] = tuple(TRANSITIONS), ranks: int | None = None) -> Case:
    """Any use of any transition: even, uneven and empty parts, in several runs, in any order."""
    name = draw(st.sampled_from(tuple(names)))
    members = draw(st.integers(1, 4)) if ranks is None else ranks
    needs_dim = name in CUTS or name == "copy_segments"
    shape = draw(st.lists(st.integers(0, 6), min_size=1 if needs_dim else 0, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
    size = shape[dim] if shape else 0
    given: Where | None = None
    if shape and draw(st.booleans()):
        parts = given = draw(partitions(size, members))
    else:
        parts = balanced(size, members)
        given = draw(st.sampled_from((None, size)))
    total = draw(st.integers(0, size))
    runs = tuple(draw(selections(size, total)) for _ in range(members))
    return Case(
        name,
        members,
        tuple(shape),
        draw(st.sampled_from((dim, dim - len(shape)))) if name in CUTS and shape else dim,
        parts,
        given,
        runs,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


@st.composite
def partitions(draw: st.DrawFn, size: int, members: int) -> Parts:
    """Every index goes to one member; a member lists its runs in any order."""
    owners = draw(st.lists(st.integers(0, members - 1), min_size=size, max_size=size))
    runs: list[list[tuple[int, int]]] = [[] for _ in range(members)]
    for i, owner in enumerate(owners):
        if runs[owner] and sum(runs[owner][-1]) == i:
            start, length = runs[owner][-1]
            runs[owner][-1] = (start, length + 1)
        else:
            runs[owner].append((i, 1))
    return tuple(tuple(draw(st.permutations(found))) for found in runs)


@st.composite
def selections(draw: st.DrawFn, size: int, total: int) -> Runs:
    """Runs that hold ``total`` of ``size`` indices."""
    chosen = sorted(draw(st.permutations(range(size)))[:total])
    return tuple((i, 1) for i in chosen)
