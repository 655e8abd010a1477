"""Where values live: a state per mesh axis, and the typing rule that every op obeys.

R  same value on all ranks, gradient complete on all ranks
H  same value on all ranks, gradient partial (an R that has passed Megatron's f)
S  cut along one dim, gradient cut alike
P  partial sum, gradient a complete copy

The rule: on every axis either all operands of an op are R, then so is the result, or none is. Kept, no gradient can be
dropped, doubled or partial (the invariant/varying types of JAX's shard_map are the same system). :func:`solve` decides
for one op what its operands must become and what its results then are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from tpcompile.layout import (
    Layout,
    LayoutError,
    Leaf,
    Mesh,
    Owned,
    axes_of,
    concat,
    drop,
    product,
    regroup,
    same,
    size,
    split,
    whole_segments,
)  # fmt: skip
from tpcompile.sentence import Label, Sentence


@dataclass(frozen=True)
class Placement:
    """State letter per mesh axis, layout per tensor dim. Axis ``a`` is S exactly when some dim is cut over ``a``."""

    letters: tuple[str, ...]
    dims: tuple[Layout, ...]

    def __str__(self) -> str:
        cuts = [f"{d}:{x}" for d, x in enumerate(self.dims) if axes_of(x)]
        letters = "".join(self.letters)
        return f"{letters}({', '.join(cuts)})" if cuts else letters

    @property
    def replicated(self) -> bool:
        """Whether every axis is R."""
        return all(x == "R" for x in self.letters)

    def with_letters(self, letters: Sequence[str]) -> Placement:
        """The same layouts in other states."""
        return Placement(tuple(letters), self.dims)


def uncut(shape: Sequence[int], mesh: Mesh, letter: str = "R") -> Placement:
    """A value that no axis cuts."""
    return Placement((letter,) * len(mesh.sizes), tuple(Leaf(n) for n in shape))


def cut_as(dims: Sequence[Layout], mesh: Mesh, letter: str = "R") -> Placement:
    """S on the axes that the layouts mention, ``letter`` on the others."""
    held = frozenset[int]().union(*(axes_of(d) for d in dims)) if dims else frozenset[int]()
    return Placement(tuple("S" if a in held else letter for a in mesh.axes), tuple(dims))


@dataclass(frozen=True)
class Solution:
    """What the operands must become (in order), what the results are before any all-reduce, and why."""

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    reason: str


class PlacementError(Exception):
    """An op cannot run on its cut operands; ``label`` is the axis' layout, ``operand`` the index of the cut operand."""

    def __init__(self, message: str, operand: int | None = None):
        super().__init__(message)
        self.operand = operand


def _join(a: Layout, b: Layout, mesh: Mesh, operand: int) -> Layout:
    """The finer of two layouts of one index space; the coarser one can be cut down to it without communication."""
    if same(a, b, mesh):
        return a
    for fine, coarse in ((a, b), (b, a)):
        extra = axes_of(fine) - axes_of(coarse)
        if extra and axes_of(coarse) <= axes_of(fine):
            with contextlib.suppress(LayoutError):  # cut over several axes as one: not a refinement
                if same(drop(fine, extra), coarse, mesh):
                    return fine
    raise PlacementError(f"it is cut as {a} by one operand and as {b} by another", operand)


def _label_layouts(sentence: Sentence, ins: Sequence[Placement], mesh: Mesh) -> dict[str, Layout]:
    """Layout of every label, from the cut operands and through the sentence's equations to the results."""
    found: dict[str, Layout] = {}
    for index, (labels, placed) in enumerate(zip(sentence.operands, ins, strict=True)):
        for label, layout in zip(labels, placed.dims, strict=True):
            if label is None and axes_of(layout):
                raise PlacementError("a dim of one position is cut", index)
            if label is not None and axes_of(layout):
                if sentence.sizes[label] != size(layout):
                    raise PlacementError(f"{layout} meets a dim of {sentence.sizes[label]}", index)
                found[label] = _join(found[label], layout, mesh, index) if label in found else layout
    known = lambda label: found.get(label, Leaf(sentence.sizes[label]))  # noqa: E731
    try:
        for left, right in sentence.products:
            if any(label in found for label in left):
                layouts = regroup([known(x) for x in left], [sentence.sizes[x] for x in right], mesh)
                found |= dict(zip(right, layouts, strict=True))
        operand_labels = {x for labels in sentence.operands for x in labels}
        for whole, parts in sentence.concats:
            if whole in operand_labels:
                if whole in found:
                    pieces = split(found[whole], [sentence.sizes[x] for x in parts])
                    found |= dict(zip(parts, pieces, strict=True))
            elif any(part in found for part in parts):
                found[whole] = concat(known(part) for part in parts)
    except LayoutError as error:
        raise PlacementError(str(error)) from error
    return found


def solve(
    sentence: Sentence, ins: Sequence[Placement], mesh: Mesh, *, early: frozenset[int] = frozenset(), keep: bool = False
) -> Solution:
    """Placement of one op.

    Args:
        ins: what the operands are now.
        early: mesh axes on which a replicated op runs behind f (operands and results H instead of R).
        keep: let partial operands pass where the op is linear; otherwise they are all-reduced first.

    Raises:
        PlacementError: the op would need a cut axis whole, or two axes are cut over one mesh axis.
    """
    layouts = _label_layouts(sentence, ins, mesh)
    tellers = {teller for _, _, teller in sentence.owners}  # whole, although their dim is that of the experts
    operand_labels = [
        [None if index in sentence.references or index in tellers else label for label in labels]
        for index, labels in enumerate(sentence.operands)
    ]
    wants: list[list[str]] = [list(p.letters) for p in ins]
    outs: list[list[str]] = [["R"] * len(mesh.sizes) for _ in sentence.results]
    dims: list[list[Layout]] = [list(p.dims) for p in ins]
    reason: list[str] = []
    joined = {x for left, right in sentence.products for x in (*left, *right)}
    joined |= {x for whole, parts in sentence.concats for x in (whole, *parts)}
    kept = {x for labels in sentence.results for x in labels} | joined
    active = [i for i in range(len(ins)) if i not in sentence.references]

    def held(label: Label) -> frozenset[int]:
        return axes_of(layouts[label]) if label in layouts else frozenset()

    for axis in mesh.axes:
        cut = {x for labels in operand_labels for x in labels if x is not None and axis in held(x)}
        partial = [i for i in active if ins[i].letters[axis] == "P"]
        if cut:
            _check_cut(sentence, cut, axis, layouts, joined, ins)
            for i in active:
                wants[i][axis] = "S" if cut & {x for x in operand_labels[i] if x is not None} else "H"
            for r, labels in enumerate(sentence.results):
                if any(axis in held(x) for x in labels):
                    outs[r][axis] = "S"
                else:
                    outs[r][axis] = "P" if sentence.sums and not sentence.settles and not cut & kept else "H"
            for rows, experts, _ in sentence.owners:
                if experts in cut:
                    for r, labels in enumerate(sentence.results):
                        outs[r][axis] = ("P" if rows in cut else "S") if rows in labels else outs[r][axis]
            reason.append(_explain_cut(cut, layouts, outs, axis))
            continue
        if not active:  # a constant, cut where the value is that its shape is read from
            for r, labels in enumerate(sentence.results):
                outs[r][axis] = "S" if any(axis in held(x) for x in labels) else "R"
            continue
        if partial and keep and sentence.linear == "joint":
            for i in active:
                wants[i][axis] = "P"
            outs = [[*o[:axis], "P", *o[axis + 1 :]] for o in outs]
            reason.append("linear: partial sums pass")
            continue
        if partial and keep and len(partial) == 1 and _linear_in(sentence, partial[0]):
            for i in active:
                wants[i][axis] = "P" if i == partial[0] else "H"
            outs = [[*o[:axis], "P", *o[axis + 1 :]] for o in outs]
            reason.append("linear: a partial sum passes")
            continue
        behind = axis in early or any(ins[i].letters[axis] == "H" for i in active)
        for i in active:
            wants[i][axis] = "H" if behind else "R"
        outs = [[*o[:axis], "H" if behind else "R", *o[axis + 1 :]] for o in outs]
        if partial:
            reason.append("not linear in a partial sum: all-reduced first")
    for i in active:
        for d, label in enumerate(operand_labels[i]):
            if label is not None and label in layouts:
                dims[i][d] = layouts[label]
    for rows, experts, teller in sentence.owners:
        match layouts.get(experts):
            case Leaf() as held_experts if rows not in layouts:
                layouts[rows] = Owned(sentence.sizes[rows], held_experts, sentence.names[teller])
            case None:
                pass
            case _:
                layouts.pop(rows)  # summed over the experts
    results = [
        tuple(layouts.get(x, Leaf(sentence.sizes[x])) if x is not None else Leaf(1) for x in labels)
        for labels in sentence.results
    ]
    return Solution(
        tuple(Placement(tuple(w), tuple(d)) for w, d in zip(wants, dims, strict=True)),
        tuple(Placement(tuple(o), d) for o, d in zip(outs, results, strict=True)),
        "; ".join(dict.fromkeys(reason)) or "replicated",
    )


def _linear_in(sentence: Sentence, operand: int) -> bool:
    if isinstance(sentence.linear, frozenset):
        return operand in sentence.linear
    return sentence.linear == "each" or (sentence.linear == "joint" and len(sentence.operands) == 1)


def _check_cut(
    sentence: Sentence, cut: set[str], axis: int, layouts: dict[str, Layout], joined: set[str], ins: Sequence[Placement]
) -> None:
    def operand_of(label: str) -> int | None:
        having = [i for i, labels in enumerate(sentence.operands) if label in labels]
        cutting = [i for i in having if axis in axes_of(ins[i].dims[sentence.operands[i].index(label)])]
        return next(iter(cutting or having), None)

    here = {x for x, layout in layouts.items() if axis in axes_of(layout)}
    for rows, experts, teller in sentence.owners:
        if any(axes_of(d) for d in ins[teller].dims):
            raise PlacementError("where the rows of each expert end must be known on every rank", teller)
        _check_owners(sentence, layouts.get(rows), layouts.get(experts), axis, teller)
        cut = cut - {rows} if experts in cut else cut
    for label in sorted(here & set(sentence.whole)):
        raise PlacementError(f"{sentence.whole[label]}, but it is cut as {layouts[label]}", operand_of(label))
    results = {x for labels in sentence.results for x in labels}
    together = {x for _, parts in sentence.concats for x in parts}
    if len(cut) > 1 and not cut <= together:
        shown = ", ".join(str(layouts[x]) for x in sorted(cut))
        raise PlacementError(f"two of its axes ({shown}) are cut over the same ranks", operand_of(sorted(cut)[-1]))
    regrouped = {x for _, right in sentence.products for x in right}
    for label in sorted((cut - results - joined) | ((here & regrouped) - results)):
        if not sentence.sums:
            raise PlacementError(f"the axis cut as {layouts[label]} does not reach its result", operand_of(label))
        if whole_segments(layouts[label], axis):
            why = f"a sum over {layouts[label]} would add the segments that every rank holds once per rank"
            raise PlacementError(why, operand_of(label))


def _check_owners(sentence: Sentence, rows: Layout | None, experts: Layout | None, axis: int, teller: int) -> None:
    """Rows are divided as their experts are, and in no other way."""
    if experts is not None and axis in axes_of(experts) and not isinstance(experts, Leaf):
        raise PlacementError(f"experts cut as {experts} are not neighbours")
    if rows is not None and axis in axes_of(rows):
        if not isinstance(rows, Owned):
            raise PlacementError(f"rows belong to experts by where they stand, but they are cut as {rows}", 0)
        if rows.experts != experts or rows.ends != sentence.names[teller]:
            raise PlacementError(f"the {rows} meet experts cut as {experts or 'a whole'}", 0)


def _explain_cut(cut: set[str], layouts: dict[str, Layout], outs: list[list[str]], axis: int) -> str:
    shown = "/".join(sorted({str(layouts[x]) for x in cut}))
    kinds = {o[axis] for o in outs}
    if "P" in kinds:
        return f"sums over the cut axis {shown}: a partial sum"
    return f"cut along {shown}" if "S" in kinds else f"the cut part of {shown} is not in the result"


__all__ = ["Placement", "PlacementError", "Solution", "cut_as", "product", "solve", "uncut"]
