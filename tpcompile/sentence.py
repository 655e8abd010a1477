"""What an op means for index spaces: one sentence per call, written like einsum.

``"... k, n k -> ... n"`` labels every dim of every tensor operand and result. From the sentence follow the structure
(dims with one label are one index space), the placement (a cut label that is missing from the results was summed, so
the result is a partial sum), and which size arguments become local. ``d!`` marks a label the op needs whole.
Reshapes and concatenations add equations between labels: row-major products and segment lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx

Label = str | None  # None: a dim of size 1 that broadcasts against longer ones; not an index space of its own
Labels = tuple[Label, ...]
Linear = Literal["each", "joint"] | frozenset[int] | None


@dataclass(frozen=True)
class Sentence:
    """Labels per tensor operand and result of one call, and the facts placement may rely on.

    Attributes:
        linear: ``"each"``: linear in every operand taken alone (matmul); ``"joint"``: linear in all together (add);
            a set: linear in these operands alone (division's numerator); None: in none.
        sums: a label that appears in no result was summed over, so cutting it leaves a partial sum.
        settles: the kernel reduces a summed label over the ranks itself, so the result is the same on all of them
            (a maximum; only for values without a gradient).
        whole: labels that must not be cut, with the reason shown to the user.
        products: ``(left, right)`` label tuples with equal row-major products.
        concats: ``(label, parts)``: the label is its parts one after the other.
        references: operands read for shape and dtype only; their values do not matter.
        owners: ``(rows, experts, i)``: every row belongs to one expert, and operand ``i``, which must be whole, says to
            which. Where the experts are cut, a rank makes the rows of its own; rows that are divided so already are
            summed over the experts.
    """

    operands: tuple[Labels, ...]
    results: tuple[Labels, ...]
    sizes: Mapping[str, int]
    linear: Linear = None
    sums: bool = False
    settles: bool = False
    whole: Mapping[str, str] = field(default_factory=dict[str, str])
    products: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    concats: tuple[tuple[str, tuple[str, ...]], ...] = ()
    references: frozenset[int] = frozenset()
    owners: tuple[tuple[str, str, int], ...] = ()
    names: tuple[str, ...] = ()  # of the operands, where owners are told by name


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call_function node seen by a rule: tensor operands in argument order, shapes with symbols at their hints."""

    node: torch.fx.Node
    operands: tuple[torch.fx.Node, ...]
    shapes: tuple[Shape, ...]
    results: tuple[Shape, ...]
    size: Callable[[Any], int]

    def argument(self, name: str) -> Any:
        """The argument called ``name`` in the op's schema, or its default."""
        return argument(self.node, name)

    def dim(self, name: str = "dim", operand: int = 0) -> int:
        """Argument ``name`` as a non-negative dim of an operand."""
        n = len(self.shapes[operand])
        value = self.argument(name)
        return int(value) % n if n else 0

    def integer(self, value: Any) -> int:
        """A size argument (int, SymInt node) at its hint."""
        if isinstance(value, torch.fx.Node):
            value = value.meta["val"]
        return self.size(value)


def argument(node: torch.fx.Node, name: str) -> Any:
    """The argument of ``node`` called ``name`` in the op's schema, or the schema's default."""
    if name in node.kwargs:
        return node.kwargs[name]
    target: Any = node.target
    for index, schema in enumerate(target._schema.arguments):
        if schema.name == name:
            return node.args[index] if index < len(node.args) else schema.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def is_tensor(node: Any) -> bool:
    """Whether an fx argument is a node with a tensor value."""
    return isinstance(node, torch.fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def tensor_operands(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """Tensor arguments of a call in argument order; one used twice is listed twice."""
    found: list[torch.fx.Node] = []

    def visit(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:  # pyright: ignore[reportUnknownVariableType]
                visit(item)
        elif is_tensor(value):
            found.append(value)

    for value in (*node.args, *node.kwargs.values()):
        visit(value)
    return tuple(found)


def parse_row(text: str, shapes: Sequence[Shape], results: Sequence[Shape], op: str) -> Sentence:
    """The sentence of a call whose row is the einsum-like ``text``.

    ``...`` stands for broadcast dims, aligned from the right. Operands beyond those given are dropped, so an optional
    bias may be written. ``d!`` must be whole.
    """
    left, right = text.split("->")
    whole: dict[str, str] = {}
    sizes: dict[str, int] = {}

    def expand(part: str, shape: Shape) -> list[str]:
        labels: list[str] = []
        names = part.split()
        extra = len(shape) - sum(1 for n in names if n != "...")
        if extra < 0 or (extra and "..." not in names):
            raise ValueError(f"row {text!r} of {op} does not fit a tensor of {len(shape)} dims")
        for name in names:
            if name == "...":
                labels += [f".{i}" for i in range(extra - 1, -1, -1)]
                continue
            if name.endswith("!"):
                name = name[:-1]
                whole[name] = f"{op} reads the whole axis"
            labels.append(name)
        return labels

    raw_operands = [expand(part, shape) for part, shape in zip(left.split(","), shapes, strict=False)]
    if len(raw_operands) != len(shapes):
        raise ValueError(f"row {text!r} of {op} is for fewer than {len(shapes)} tensors")
    raw_results = [expand(part, shape) for part, shape in zip(right.split(","), results, strict=False)]
    for labels, shape in [*zip(raw_operands, shapes, strict=True), *zip(raw_results, results, strict=True)]:
        for label, n in zip(labels, shape, strict=True):
            sizes[label] = n if n != 1 else sizes.get(label, 1)

    def broadcast(labels: list[str], shape: Shape) -> Labels:
        return tuple(None if n == 1 and sizes[x] != 1 else x for x, n in zip(labels, shape, strict=True))

    return Sentence(
        tuple(broadcast(x, s) for x, s in zip(raw_operands, shapes, strict=True)),
        tuple(broadcast(x, s) for x, s in zip(raw_results, results, strict=True)),
        sizes,
        whole=whole,
    )


def reshape_sentence(before: Shape, after: Shape) -> Sentence:
    """Row-major regrouping of ``before`` into ``after``: dims kept, or groups of dims with equal products."""
    sizes: dict[str, int] = {}
    left: list[Label] = [None] * len(before)
    right: list[Label] = [None] * len(after)
    products: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    i = j = group = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        a = b = 1
        if i < len(before):
            a, i = a * before[i], i + 1
        if j < len(after):
            b, j = b * after[j], j + 1
        while a != b:
            if (a < b or j >= len(after)) and i < len(before):
                a, i = a * before[i], i + 1
            elif j < len(after):
                b, j = b * after[j], j + 1
            else:
                break
        ins = [d for d in range(first_i, i) if before[d] != 1]
        outs = [d for d in range(first_j, j) if after[d] != 1]
        if len(ins) == 1 and len(outs) == 1:
            left[ins[0]] = right[outs[0]] = f"d{group}"
            sizes[f"d{group}"] = before[ins[0]]
        else:
            for d in ins:
                left[d] = f"i{d}"
                sizes[f"i{d}"] = before[d]
            for d in outs:
                right[d] = f"o{d}"
                sizes[f"o{d}"] = after[d]
            if ins or outs:
                products.append((tuple(f"i{d}" for d in ins), tuple(f"o{d}" for d in outs)))
        group += 1
    return Sentence((tuple(left),), (tuple(right),), sizes, linear="each", products=tuple(products))
