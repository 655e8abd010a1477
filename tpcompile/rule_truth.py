"""The truth of an op rule: cut the operands of a sample call in every way, run it per rank as emitted, join, compare.

A call becomes a program of one node. For every assignment of placements to its operands, `solve` either refuses or
says what the results are; then the emitted code runs on all ranks in lock step, each operand given in its state (its
part, a partial sum, the same value), and the results must have theirs. Backward likewise: every result receives its
gradient in the state that belongs to it, and every operand's must come out in its own. Knows no op by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor

from tpcompile import kernels
from tpcompile.errors import ShardingError, TpcompileError
from tpcompile.layout import Layout, Leaf, Mesh, Owned, axes_of, concat, positions, product, runs, same, size
from tpcompile.placement import Placement, PlacementError, Solution, cut_as, solve, uncut
from tpcompile.program import Program, Row
from tpcompile.rules import Rule
from tpcompile.sentence import Sentence
from tpcompile.simulate import Simulation

TOLERANCE = 1e-12
EMISSION = importlib.import_module("tpcompile.passes.emit")  # the package gives the function of that name

# ---------------------------------------------------------------------------------------------- a sample call


@dataclass(frozen=True)
class Given:
    """A tensor operand of a sample: drawn uniformly from ``[low, high)``; ``order`` is its dims' order in memory."""

    shape: tuple[int, ...]
    low: float = -1.5
    high: float = 1.5
    dtype: torch.dtype = torch.float64
    order: tuple[int, ...] | None = None
    constant: bool = False
    values: tuple[int, ...] | None = None  # these, instead of drawn ones

    @staticmethod
    def like(x: Tensor) -> Given:
        """Of the shape and kind of ``x``, between its least and its largest value; floats are drawn in float64."""
        values = torch.view_as_real(x) if x.is_complex() else x
        low, high = (float(values.min()), float(values.max())) if x.numel() else (0.0, 1.0)
        if x.is_complex():
            return Given(tuple(x.shape), low, high, torch.complex128)
        if x.is_floating_point():
            return Given(tuple(x.shape), low, high if high > low else low + 1.0, torch.float64)
        return Given(tuple(x.shape), low, high + 1, x.dtype)

    def draw(self, generator: torch.Generator) -> Tensor:
        """The tensor."""
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            x = uniform(self.shape, self.dtype, self.low, self.high, generator)
        else:
            x = torch.randint(int(self.low), int(self.high), self.shape, generator=generator).to(self.dtype)
        return in_memory_order(x, self.order)


def uniform(shape: Sequence[int], dtype: torch.dtype, low: float, high: float, generator: torch.Generator) -> Tensor:
    if dtype.is_complex:
        x = torch.empty((*shape, 2), dtype=torch.float64).uniform_(low, high, generator=generator)
        return torch.view_as_complex(x)
    return torch.empty(tuple(shape), dtype=torch.float64).uniform_(low, high, generator=generator).to(dtype)


@dataclass(frozen=True)
class Number:
    """An integer argument that the graph computes, as a symbolic size is."""

    value: int


@dataclass(frozen=True)
class Sample:
    """One call of an op; ``args`` and ``kwargs`` hold `Given` where a tensor goes and `Number` for a computed size."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    degrees: tuple[int, ...] = (2, 3)
    letters: str = "RHP"  # states of operands that are not cut
    values: bool = True  # False: what the op makes is not defined (empty)

    def __str__(self) -> str:
        def shown(x: Any) -> str:
            match x:
                case Given():
                    kind = "" if x.dtype == torch.float64 else str(x.dtype).removeprefix("torch.")
                    return kind + str(list(x.shape)) + ("" if x.order is None else f" in order {list(x.order)}")
                case Number():
                    return f"n={x.value}"
                case list() | tuple():
                    return "[" + ", ".join(map(shown, x)) + "]"
                case _:
                    return str(x).removeprefix("torch.")

        given = [shown(x) for x in self.args] + [f"{k}={shown(x)}" for k, x in self.kwargs.items()]
        return f"{self.op}({', '.join(given)})"


def in_memory_order(x: Tensor, order: Sequence[int] | None) -> Tensor:
    """``x`` with its dims laid out in ``order``, outermost first."""
    if order is None:
        return x
    return x.permute(*order).contiguous().permute(*(order.index(d) for d in range(x.dim())))


class Case:
    """A sample as a graph of one node, with the dense results and gradients to compare with."""

    def __init__(self, sample: Sample):
        self.sample = sample
        self.graph = torch.fx.Graph()
        self.inputs: list[Any] = []
        self.given: list[Given | Number] = []
        placeholders: list[torch.fx.Node] = []
        generator = torch.Generator().manual_seed(7)

        def place(value: Any) -> Any:
            match value:
                case Given() | Number():
                    node = self.graph.placeholder(f"x{len(placeholders)}")
                    real = value.draw(generator) if isinstance(value, Given) else value.value
                    node.meta["val"] = real
                    placeholders.append(node)
                    self.inputs.append(real)
                    self.given.append(value)
                    return node
                case list() | tuple():
                    return [place(x) for x in value]
                case _:
                    return value

        args = tuple(place(x) for x in sample.args)
        kwargs = {k: place(x) for k, x in sample.kwargs.items()}
        namespace, name, overload = sample.op.split(".")
        target = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        self.node = self.graph.call_function(target, args, kwargs)
        self.differentiable = [
            isinstance(g, Given) and not g.constant and (g.dtype.is_floating_point or g.dtype.is_complex)
            for g in self.given
        ]
        leaves = [x.clone().requires_grad_() if d else x for x, d in zip(self.inputs, self.differentiable, strict=True)]
        given = dict(zip(placeholders, leaves, strict=True))
        torch.default_generator.manual_seed(11)
        made = target(*torch.fx.map_arg(args, given.__getitem__), **torch.fx.map_arg(kwargs, given.__getitem__))
        self.node.meta["val"] = made
        self.several = isinstance(made, (tuple, list))
        self.outputs: list[Tensor] = [x.detach() for x in (made if self.several else [made])]
        self.results = [self.node]
        if self.several:
            self.results = [self.graph.call_function(operator.getitem, (self.node, i)) for i in range(len(made))]
            for node, value in zip(self.results, made, strict=True):
                node.meta["val"] = value
        self.seeds = [
            uniform(y.shape, y.dtype, -1, 1, generator) if y.is_floating_point() or y.is_complex() else None
            for y in self.outputs
        ]
        loss = _loss(made if self.several else [made], self.seeds)
        if loss is not None:
            loss.backward()
        self.grads: list[Tensor | None] = [
            (torch.zeros_like(x) if x.grad is None else x.grad) if d else None
            for x, d in zip(leaves, self.differentiable, strict=True)
        ]
        self.graph.output(())
        self.module = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        self.tensors = [i for i, x in enumerate(self.inputs) if isinstance(x, Tensor)]

    def program(self, mesh: Mesh, table: Mapping[str, Row]) -> Program:
        """The call as a program on a mesh, placed as ``table`` says."""
        captured: Any = SimpleNamespace(size=int, parameters={}, buffers={}, constants={}, hints={})
        return Program(captured, self.module, mesh.degree, mesh=mesh, table=table)

    def sentence(self, rule: Rule) -> Sentence:
        """What ``rule`` says of the call."""
        return rule.sentence(self.program(Mesh((1,)), {}).call(self.node))


def _loss(outputs: Iterable[Tensor], seeds: Iterable[Tensor | None]) -> Tensor | None:
    """A number whose gradient with respect to every output is its seed (of complex outputs, in both parts)."""

    def parts(x: Tensor) -> Tensor:
        return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x

    found = [(y, s) for y, s in zip(outputs, seeds, strict=True) if s is not None and y.requires_grad]
    terms = [(parts(y) * parts(s)).sum() for y, s in found]
    return sum(terms[1:], terms[0]) if terms else None


# ---------------------------------------------------------------------------------------------- all placements


def cut_layouts(n: int, mesh: Mesh, axis: int = 0) -> list[Layout]:
    """The ways to cut ``n`` positions over one mesh axis, no rank left empty-handed: contiguous, as the major, minor
    or middle factor of a product, and as segments that are cut or held whole."""
    degree = mesh.sizes[axis]
    found: list[Layout] = []

    def add(layout: Layout) -> None:
        if not any(same(layout, other, mesh) for other in found):
            found.append(layout)

    def leaf(k: int) -> Leaf:
        return Leaf(k, (axis,))

    if n >= degree:
        add(leaf(n))
    factors = [(a, n // a) for a in range(2, n) if n % a == 0]
    for a, b in factors:
        if a >= degree:
            add(product([leaf(a), Leaf(b)]))
        if b >= degree:
            add(product([Leaf(a), leaf(b)]))
        for c in range(2, b):
            if b % c == 0 and c >= degree:
                add(product([Leaf(a), leaf(c), Leaf(b // c)]))
    if n > degree:
        add(concat([leaf(degree), Leaf(n - degree)]))
        add(concat([Leaf(n - degree), leaf(degree)]))
    if n > 2 * degree:
        add(concat([leaf(degree), leaf(n - degree)]))
        add(concat([leaf(degree), Leaf(n - 2 * degree), leaf(degree)]))
    return found


def placements(x: Tensor, mesh: Mesh, letters: str = "RHP") -> list[Placement]:
    """Every placement of a value on a mesh of one axis: R, H, P, and each way to cut each dim."""
    found = [uncut(x.shape, mesh, letter) for letter in _possible(letters, x)]
    for d, n in enumerate(x.shape):
        for layout in cut_layouts(n, mesh):
            found.append(cut_as([layout if i == d else Leaf(m) for i, m in enumerate(x.shape)], mesh))
    return found


def _possible(letters: str, x: Tensor) -> str:
    """A bool has no partial sums."""
    return letters.replace("P", "") if x.dtype == torch.bool else letters


def grid_placements(x: Tensor, mesh: Mesh, letters: str = "RHP") -> list[Placement]:
    """Placements on a mesh of two axes: for each axis a letter or a dim, and the ways to share a dim."""
    found: list[Placement] = []
    for first, second in itertools.product([*_possible(letters, x), *range(x.dim())], repeat=2):
        layouts: list[list[Layout]] = [[Leaf(n)] for n in x.shape]
        if first == second and isinstance(first, int):
            n, (a, b) = x.shape[first], mesh.sizes
            layouts[first] = [Leaf(n, (0, 1))] if n >= a * b else []
            layouts[first] += [
                product([Leaf(k, (0,)), Leaf(n // k, (1,))]) for k in range(a, n) if n % k == 0 and n // k >= b
            ]
            layouts[first] += [concat([Leaf(k, (0,)), Leaf(n - k, (1,))]) for k in range(a, n - b + 1)][:1]
        else:
            for axis, choice in ((0, first), (1, second)):
                if isinstance(choice, int):
                    n = x.shape[choice]
                    layouts[choice] = [Leaf(n, (axis,))] if n >= mesh.sizes[axis] else []
        letter = {a: c for a, c in enumerate((first, second)) if isinstance(c, str)}
        for dims in itertools.product(*layouts):
            found.append(Placement(tuple(letter.get(a, "S") for a in mesh.axes), dims))
    return found


# ---------------------------------------------------------------------------------------------- values in their states


def _groups(mesh: Mesh, axes: Iterable[int]) -> list[list[int]]:
    chosen = set(axes)
    return mesh.groups(chosen) if chosen else [[r] for r in range(mesh.degree)]


@functools.lru_cache(maxsize=65536)
def _held(layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    return torch.from_numpy(positions(layout, mesh, rank))


def _local(x: Tensor, placed: Placement, mesh: Mesh, rank: int) -> Tensor:
    for d, layout in enumerate(placed.dims):
        if axes_of(layout):
            x = x.index_select(d, _held(layout, mesh, rank))
    return x


def _assembled(parts: Sequence[Tensor], placed: Placement, mesh: Mesh, ranks: Sequence[int]) -> Tensor:
    """The sum of what ``ranks`` hold, each part at its positions."""
    total = parts[0].new_zeros([size(x) for x in placed.dims])
    for part, rank in zip(parts, ranks, strict=True):
        for d, layout in enumerate(placed.dims):
            if axes_of(layout):
                shape = [*part.shape[:d], size(layout), *part.shape[d + 1 :]]
                part = part.new_zeros(shape).index_copy_(d, _held(layout, mesh, rank), part)
        total += part
    return total


def given_values(x: Tensor, placed: Placement, mesh: Mesh, generator: torch.Generator) -> list[Tensor]:
    """``x`` on every rank in the state ``placed``: its part; over P axes terms that add up to it, alike over R, H."""
    found = [_local(x, placed, mesh, r) for r in range(mesh.degree)]
    for group in _groups(mesh, _axes(placed, "P")):
        rest = found[group[0]]
        for rank in group[1:]:
            found[rank] = uniform(rest.shape, x.dtype, -2, 2, generator)
            rest = rest - found[rank]
        found[group[0]] = rest
    return _alike(found, mesh, _axes(placed, "RH"))


def given_gradients(g: Tensor, placed: Placement, mesh: Mesh, generator: torch.Generator) -> list[Tensor]:
    """The gradient of a value in the state ``placed``: over H and S axes terms that add up to ``g`` where they meet,
    alike over R and P."""
    found = [torch.zeros(())] * mesh.degree
    for group in _groups(mesh, _axes(placed, "HS")):
        ones = [torch.ones_like(_local(g, placed, mesh, r)) for r in group]
        noise = [uniform(x.shape, x.dtype, -1, 1, generator) for x in ones]
        count = _assembled(ones, placed, mesh, group)
        missing = (g - _assembled(noise, placed, mesh, group)) / count
        for rank, term in zip(group, noise, strict=True):
            found[rank] = term + _local(missing, placed, mesh, rank)
    return _alike(found, mesh, _axes(placed, "RP"))


def _axes(placed: Placement, letters: str) -> list[int]:
    return [a for a, letter in enumerate(placed.letters) if letter in letters]


def _alike(found: Sequence[Tensor], mesh: Mesh, axes: Iterable[int]) -> list[Tensor]:
    """Copies of the first rank's over ``axes``."""
    first = {rank: group[0] for group in _groups(mesh, axes) for rank in group}
    return [found[first[rank]].clone() for rank in range(mesh.degree)]


def _unlike(found: Sequence[Tensor], mesh: Mesh, axes: Iterable[int]) -> str | None:
    for group in _groups(mesh, axes):
        for rank in group[1:]:
            if error := _differs(found[rank], found[group[0]]):
                return f"ranks {group[0]} and {rank} differ: {error}"
    return None


def wrong_value(parts: Sequence[Tensor], placed: Placement, mesh: Mesh, whole: Tensor) -> str | None:
    """What is wrong with a value that claims to be ``whole`` in the state ``placed``."""
    for group in _groups(mesh, _axes(placed, "P")):
        total = parts[group[0]]
        for rank in group[1:]:
            total = total + parts[rank]
        if error := _differs(total, _local(whole, placed, mesh, group[0])):
            return f"ranks {group}: {error}"
    return _unlike(parts, mesh, _axes(placed, "RH"))


def wrong_gradient(parts: Sequence[Tensor | None], placed: Placement, mesh: Mesh, whole: Tensor) -> str | None:
    """What is wrong with the gradients of an operand in the state ``placed``; a missing one is zero."""
    filled = [torch.zeros_like(_local(whole, placed, mesh, r)) if g is None else g for r, g in enumerate(parts)]
    for group in _groups(mesh, _axes(placed, "HS")):
        if error := _differs(_assembled([filled[r] for r in group], placed, mesh, group), whole):
            return f"ranks {group}: {error}"
    return _unlike(filled, mesh, _axes(placed, "RP"))


def _differs(got: Tensor, expected: Tensor) -> str | None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{list(got.shape)} {got.dtype}, expected {list(expected.shape)} {expected.dtype}"
    if not (expected.is_floating_point() or expected.is_complex()):
        return None if torch.equal(got, expected) else "other values"
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    if torch.allclose(got, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
        return None
    return f"off by {float((got - expected).abs().max()):.1e}"


# ---------------------------------------------------------------------------------------------- the test itself


@dataclass
class Report:
    """Assignments tried, refused (by reason), accepted (of which with something cut or partial) and run; failures."""

    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])
    accepted: int = 0
    cut: int = 0
    ran: int = 0
    failures: list[str] = field(default_factory=list[str])

    def __add__(self, other: Report) -> Report:
        return Report(
            self.tried + other.tried,
            self.refused + other.refused,
            self.accepted + other.accepted,
            self.cut + other.cut,
            self.ran + other.ran,
            self.failures + other.failures,
        )


def typing_errors(sentence: Sentence, solution: Solution, case: Case, mesh: Mesh) -> Iterator[str]:
    """Breaches of the typing rule: on every axis all differentiable operands are R, and the results, or none is."""
    for placed, value in [
        *zip(solution.operands, (case.inputs[i] for i in case.tensors), strict=True),
        *zip(solution.results, case.outputs, strict=True),
    ]:
        if tuple(size(x) for x in placed.dims) != tuple(value.shape):
            yield f"{placed} is not of shape {list(value.shape)}"
        for axis in mesh.axes:
            if (placed.letters[axis] == "S") != any(axis in axes_of(x) for x in placed.dims):
                yield f"the letters of {placed} disagree with its dims"
    for axis in mesh.axes:
        read = [
            solution.operands[i].letters[axis]
            for i, at in enumerate(case.tensors)
            if i not in sentence.references and case.differentiable[at]
        ]
        made = [
            p.letters[axis]
            for p, y in zip(solution.results, case.outputs, strict=True)
            if y.is_floating_point() or y.is_complex()
        ]
        if not read or not made:
            continue
        if any(x == "R" for x in read) and any(x != "R" for x in [*read, *made]):
            yield f"operands {read} make results {made} on axis {axis}"
        if all(x != "R" for x in read) and any(x == "R" for x in made):
            yield f"operands {read} make results {made} on axis {axis}"


@contextlib.contextmanager
def emission_with(rule: Rule) -> Generator[None]:
    """Emission knows ``rule`` alone, and gives its graphs no Python code: the simulation interprets them.

    On one thread: with more, tiny convolutions mostly wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        mock.patch.object(EMISSION, "RULES", {rule.op: rule}),
        mock.patch.object(torch.fx.GraphModule, "recompile", return_value=None),
    ):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def execute(case: Case, ins: Sequence[Placement], mesh: Mesh, solution: Solution) -> str | None:
    """Emit the call for operands placed as ``ins``, run it on all ranks, and say what is wrong.

    Raises:
        ShardingError: emission refuses.
    """
    operands = [n for n in case.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]
    table = {n.name: Row((), (p,), (p,), "given") for n, p in zip(operands, ins, strict=True)}
    table[case.node.name] = Row(solution.operands, solution.results, solution.results, solution.reason)
    if case.several:
        table |= {n.name: Row((), (p,), (p,), "") for n, p in zip(case.results, solution.results, strict=True)}
    emitted = EMISSION.emit(case.program(mesh, table)).graph_module
    last = {str(n.meta["origin"]): n for n in emitted.graph.nodes if "origin" in n.meta}
    emitted.graph.output_node().args = (tuple(last[n.name] for n in case.results),)
    generator = torch.Generator().manual_seed(13)
    inputs: list[list[Any]] = [[] for _ in range(mesh.degree)]
    placed = dict(zip(case.tensors, ins, strict=True))
    for i, x in enumerate(case.inputs):
        values = given_values(x, placed[i], mesh, generator) if i in placed else [x] * mesh.degree
        given = case.given[i]
        for mine, value in zip(inputs, values, strict=True):
            if isinstance(given, Given):
                value = in_memory_order(value, given.order).requires_grad_(case.differentiable[i])
            mine.append(value)
    torch.default_generator.manual_seed(11)
    made = Simulation(emitted, mesh.degree, mesh.all_groups()).run(inputs)
    for i, (whole, p) in enumerate(zip(case.outputs, solution.results, strict=True)):
        parts = [_own_rows(case, mine[i].detach(), p, mesh, rank) for rank, mine in enumerate(made)]
        if case.sample.values and (error := wrong_value(parts, _summed(p), mesh, whole)):
            return f"result {i} as {p}, {error}"
    seeds: list[list[Tensor | None]] = []
    for g, p in zip(case.seeds, solution.results, strict=True):
        if g is None:
            seeds.append([None] * mesh.degree)
            continue
        given_to = given_gradients(g, _summed(p), mesh, generator)
        if p != _summed(p):  # of the rows of other ranks a gradient may be anything
            noise = [uniform(g.shape, g.dtype, -1, 1, generator) for _ in given_to]
            mine = [_own_rows(case, x, p, mesh, r) for r, x in enumerate(given_to)]
            given_to = [
                x + n - _own_rows(case, n, p, mesh, r) for r, (x, n) in enumerate(zip(mine, noise, strict=True))
            ]
        seeds.append([*given_to])
    losses = [_loss(mine, [s[rank] for s in seeds]) for rank, mine in enumerate(made)]
    present = [x for x in losses if x is not None]
    if present:
        sum(present[1:], present[0]).backward()
    for i, p in placed.items():
        whole = case.grads[i]
        if whole is not None and (error := wrong_gradient([mine[i].grad for mine in inputs], p, mesh, whole)):
            return f"gradient of operand {case.tensors.index(i)} as {p}, {error}"
    return None


def _summed(placed: Placement) -> Placement:
    """Rows of which only the data know who holds them, as the partial sum that they are without the other rows."""
    divided = {a for d in placed.dims if isinstance(d, Owned) for a in axes_of(d)}
    dims = tuple(Leaf(d.total) if isinstance(d, Owned) else d for d in placed.dims)
    return Placement(tuple("P" if a in divided else x for a, x in enumerate(placed.letters)), dims)


def _own_rows(case: Case, x: Tensor, placed: Placement, mesh: Mesh, rank: int) -> Tensor:
    """``x`` without the rows that are other ranks'."""
    for dim, layout in enumerate(placed.dims):
        if isinstance(layout, Owned):
            ends = next(n.meta["val"] for n in case.graph.nodes if n.name == layout.ends)
            x = kernels.keep_rows(x, dim, ends, runs(layout.experts, mesh.sizes, mesh.coordinates(rank)))
    return x


def assignments(case: Case, mesh: Mesh) -> Iterator[tuple[Placement, ...]]:
    """All placements of all operands."""
    every = grid_placements if len(mesh.sizes) > 1 else placements
    return itertools.product(*(every(case.inputs[i], mesh, case.sample.letters) for i in case.tensors))


def check(
    rule: Rule,
    samples: Iterable[Sample],
    *,
    meshes: Callable[[Sample], Iterable[Mesh]] = lambda s: [Mesh((d,)) for d in s.degrees],
    first_only: bool = False,
) -> Report:
    """Try every layout of every sample on every mesh."""
    with emission_with(rule):
        return _check(rule, samples, meshes, first_only)


def _check(
    rule: Rule, samples: Iterable[Sample], meshes: Callable[[Sample], Iterable[Mesh]], first_only: bool
) -> Report:
    report = Report()
    for sample in samples:
        case = Case(sample)
        try:
            sentence = case.sentence(rule)
        except ValueError as error:
            report.tried += 1
            report.refused[str(error)] += 1
            continue
        for mesh in meshes(sample):
            seen = set[Hashable]()
            for ins in assignments(case, mesh):
                for options in _options(ins, mesh):
                    error = _try(case, sentence, ins, mesh, options, seen, report)
                    if error is not None:
                        report.failures.append(_told(sample, ins, mesh, options, error))
                        if first_only:
                            return report
    return report


def _try(
    case: Case,
    sentence: Sentence,
    ins: Sequence[Placement],
    mesh: Mesh,
    options: Mapping[str, Any],
    seen: set[Hashable],
    report: Report,
) -> str | None:
    """One assignment. What is wrong with it, if it is not refused.

    Two assignments with one solution differ only in how each operand gets to where it is wanted. So an assignment is
    run if its solution is new, or one of these ways.
    """
    report.tried += 1
    try:
        solution = solve(sentence, ins, mesh, **options)
        report.accepted += 1
        report.cut += any(set(p.letters) & {"S", "P"} for p in solution.operands)
        for error in typing_errors(sentence, solution, case, mesh):
            return error
        ways: set[Hashable] = {solution, *((i, *way) for i, way in enumerate(zip(ins, solution.operands, strict=True)))}
        if ways <= seen:
            return None
        seen |= ways
        report.ran += 1
        return execute(case, ins, mesh, solution)
    except (PlacementError, ShardingError) as refusal:
        report.refused[str(refusal)] += 1
        return None
    except Exception as error:  # noqa: BLE001  whatever the emitted code raises is a failure of the rule
        return f"{type(error).__name__}: {error}"


def _options(ins: Sequence[Placement], mesh: Mesh) -> Iterator[dict[str, Any]]:
    yield {}
    letters = {x for p in ins for x in p.letters}
    if "P" in letters:
        yield {"keep": True}
    if letters == {"R"}:
        yield {"early": frozenset(mesh.axes)}


def _told(sample: Sample, ins: Sequence[Placement], mesh: Mesh, options: Mapping[str, Any], error: str) -> str:
    given = ", ".join(map(str, ins))
    return f"{sample}: operands {given} on mesh {mesh.sizes} {dict(options) or ''}: {error}"


def admit(rule: Rule, calls: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> Report:
    """What the truth test says of a rule for a custom op, given example calls ``(args, kwargs)`` of real tensors.

    Raises:
        TpcompileError: the op is not registered, a call fails, the row is wrong, or no call lets anything be cut.
    """
    namespace, _, rest = rule.op.partition(".")
    name, _, overload = rest.partition(".")
    try:
        getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError:
        raise TpcompileError(
            f"there is no op {rule.op}",
            why="a rule names an overload as NAMESPACE.NAME.OVERLOAD, e.g. mylib.scale.default",
            help="register the op with torch.library.custom_op before its rule",
        ) from None
    samples = [
        Sample(rule.op, tuple(pytree.tree_map_only(Tensor, Given.like, x) for x in args), {
            k: pytree.tree_map_only(Tensor, Given.like, x) for k, x in kwargs.items()
        })
        for args, kwargs in calls
    ]  # fmt: skip
    try:
        report = check(rule, samples)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise TpcompileError(
            f"the rule for {rule.op} cannot be tested: {error}",
            why="every call is run in float64 on the CPU, forward and backward",
            help="give calls that the op takes, and a row whose labels fit them",
        ) from error
    if report.failures:
        raise TpcompileError(
            f"the rule for {rule.op} is wrong: {len(report.failures)} of {report.ran} ways to cut its operands differ",
            why="; ".join(report.failures[:3]),
            help="mark a label that the op needs whole with `!`, and leave `linear` and `sums` out unless they hold",
        )
    if not report.cut:
        refused = "; ".join(reason for reason, _ in report.refused.most_common(2))
        raise TpcompileError(
            f"the rule for {rule.op} lets nothing be cut in the calls given, so nothing was tested",
            why=refused or "no dim of an operand has more than one position",
            help="give calls with dims of several positions (4 or 6), or leave the rule out",
        )
    return report


__all__ = ["Case", "Given", "Number", "Report", "Sample", "admit", "check"]
