"""Scaling by calculation: what one step costs on 1, 2, 4, ... ranks of a machine that need not be there.

The model is captured once and rewritten for every degree. The code of one rank then runs on fake tensors (shapes
without memory), forward and, to train, backward with torch's own autograd; what it calls is counted: FLOPs and bytes of
every op, bytes and members of every collective. ``tpcompile.links`` turns the counts into seconds: every op takes the
longer of computing and moving its bytes (roofline), every collective its latency and bytes, one after another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tpcompile.activations import Saved, resized, run_on_fakes, states
from tpcompile.capture import capture
from tpcompile.compiler import Inputs, SpecLike, call_arguments, check_degree, choose_spec, rewrite_captured
from tpcompile.errors import TpcompileError
from tpcompile.folding import runs, shortened
from tpcompile.links import Machine, machine
from tpcompile.program import Asked, Options, Program


@dataclass(frozen=True)
class Kernel:
    """One op below autograd: its FLOPs (of matrix products, attention, convolutions) and the bytes it reads and writes.

    A multiplication and an addition are two FLOPs. ``dtype`` is that of its first result. ``bucket``: it serves the
    bucket in which gradients of whole parameters are summed.
    """

    op: str
    direction: str  # "forward" or "backward"
    flops: int
    bytes: int
    dtype: str
    bucket: bool = False


@dataclass(frozen=True)
class Exchange:
    """One collective: bytes of the tensor that is reduced, or gathered, and the ranks that take part.

    ``bucket``: it sums a bucket of gradients of whole parameters.
    """

    kind: str  # all_reduce, all_gather or reduce_scatter
    direction: str
    size: int
    ranks: tuple[int, ...]
    bucket: bool = False

    @property
    def sent(self) -> int:
        """Bytes that each member sends, ring."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.size * (len(self.ranks) - 1) // len(self.ranks)


@dataclass(frozen=True)
class Work:
    """What one rank does in one step, each with how many times; and the bytes that it holds.

    ``gradients``, ``adamw`` and ``activations`` (kept for backward) are 0 where nothing is trained.
    """

    kernels: Mapping[Kernel, int]
    exchanges: Mapping[Exchange, int]
    parameters: int
    gradients: int = 0
    adamw: int = 0
    activations: int = 0

    @property
    def memory(self) -> int:
        """Bytes held in all."""
        return self.parameters + self.gradients + self.adamw + self.activations

    def flops(self, direction: str | None = None) -> int:
        """FLOPs in ``direction``, or in both."""
        return sum(k.flops * n for k, n in self.kernels.items() if direction in (None, k.direction))

    def sent(self, direction: str | None = None) -> int:
        """Bytes sent in ``direction``, or in both (ring)."""
        return sum(e.sent * n for e, n in self.exchanges.items() if direction in (None, e.direction))

    def messages(self, direction: str | None = None) -> int:
        """Collectives in ``direction``, or in both."""
        return sum(n for e, n in self.exchanges.items() if direction in (None, e.direction))

    def computing(self, on: Machine) -> float:
        """Seconds of all ops, one after another."""
        return sum(n * on.kernel_seconds(k.flops, k.bytes, k.dtype) for k, n in self.kernels.items())

    def communicating(self, on: Machine) -> float:
        """Seconds of all collectives, one after another."""
        return sum(n * on.collective_seconds(e.kind, e.size, e.ranks) for e, n in self.exchanges.items())


@dataclass(frozen=True)
class Point:
    """One degree: the work of its fullest rank and the seconds of a step; or why it is refused."""

    degree: int
    work: Work | None = None
    computing: float = math.nan
    communicating: float = math.nan
    refused: TpcompileError | None = None

    @property
    def seconds(self) -> float:
        """Of one step: nothing overlaps. NaN where the degree is refused."""
        return self.computing + self.communicating


@dataclass(frozen=True)
class Scaling:
    """What every degree costs, in the order asked for."""

    on: Machine
    training: bool
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs
    points: tuple[Point, ...]

    @property
    def possible(self) -> tuple[Point, ...]:
        """The points that are not refused, by degree."""
        return tuple(sorted((p for p in self.points if p.work is not None), key=lambda p: p.degree))

    @property
    def fastest(self) -> Point | None:
        """The point with the shortest step; of equal ones that with the fewest ranks: more ranks do not help."""
        return min(self.possible, key=lambda p: (p.seconds, p.degree), default=None)

    def speedup(self, point: Point) -> float:
        """How many times faster its step is than that of the smallest possible degree."""
        return self.possible[0].seconds / point.seconds

    def efficiency(self, point: Point) -> float:
        """The speedup as a share of the ranks that were added: 1 if every one of them helps in full."""
        return self.speedup(point) * self.possible[0].degree / point.degree

    def fits(self, point: Point) -> bool:
        """Whether what a rank holds fits its device."""
        return point.work is not None and point.work.memory <= self.on.device.memory


def scale(
    model: nn.Module,
    spec: SpecLike = None,
    *,
    degrees: Sequence[int] = (1, 2, 4, 8),
    on: Machine | str = "nvlink",
    example_inputs: Inputs = None,
    batch: int | None = None,
    length: int | None = None,
    **options: Unpack[Asked],
) -> Scaling:
    """What a step of ``model`` costs at every degree: forward, and backward if it is in train mode.

    Args:
        model, spec, example_inputs, options: see :func:`tpcompile.rewrite`; the model may live on the meta device.
        degrees: numbers of ranks. Where one is refused, its point says why.
        on: a machine, or what :func:`tpcompile.links.machine` reads.
        batch, length: other sizes than the example inputs' (see :func:`tpcompile.activations.resized`).

    Raises:
        TpcompileError: the model cannot be captured, nothing in it requires a gradient, the machine lacks a number,
            or a size cannot be had.
    """
    chosen = on if isinstance(on, Machine) else machine(on)
    for degree in degrees:
        check_degree(degree)
    asked, inputs = Options.of(options), call_arguments(model, example_inputs)
    chosen_spec = choose_spec(model, spec)
    captured = capture(model, *inputs)
    points: list[Point] = []
    shapes: Mapping[str, tuple[int, ...]] = {}
    for degree in dict.fromkeys(degrees):
        try:
            program = rewrite_captured(captured, chosen_spec, model, degree, inputs, options=asked)
        except TpcompileError as error:
            points.append(Point(degree, refused=error))
            continue
        given = resized(program, batch, length)
        shapes = {x.path: tuple(made.shape) for x, made in zip(captured.inputs, given, strict=True)}
        done = work(program, given, model.training)
        points.append(Point(degree, done, done.computing(chosen), done.communicating(chosen)))
    return Scaling(chosen, model.training, shapes, tuple(points))


def work(program: Program, inputs: Sequence[Tensor] | None = None, training: bool = True) -> Work:
    """What the fullest rank of an emitted program does in one step; the others wait for it.

    Args:
        inputs: flat inputs, of which only the shapes matter; by default of the shapes that the program was made with.
        training: backward too: from the outputs that are a single number (losses), or else from all of them.

    Raises:
        TpcompileError: sizes depend on data (rows sorted by expert), or there is nothing to train.
    """
    shapes = [tuple(x.shape) for x in (resized(program) if inputs is None else inputs)]
    found = runs(program)
    least = shortened(program, [(run, 1) for run in found]) or program
    rank = max(range(program.mesh.degree), key=lambda rank: states(program, rank)[0])
    base = total = _counted(least, rank, shapes, training)
    for run in found:
        more = shortened(program, [(other, 1 + (other is run)) for other in found])
        assert more is not None, "runs can be shortened"
        total = total and total.grown(base, _counted(more, rank, shapes, training), run.times - 1)
    total = total or _counted(program, rank, shapes, training)
    parameters, gradients, adamw = states(program, rank)
    if not training:
        return Work(total.kernels, total.exchanges, parameters)
    return Work(total.kernels, total.exchanges, parameters, gradients, adamw, total.kept)


@dataclass(frozen=True)
class _Counts:
    """What was called while one rank's code ran, and the bytes that were kept for backward."""

    kernels: Counter[Kernel]
    exchanges: Counter[Exchange]
    kept: int

    def grown(self, base: _Counts, more: _Counts, times: int) -> _Counts | None:
        """``self`` and ``times`` what ``more`` has more than ``base``; None where that is not plain."""
        kernels = _grown(self.kernels, base.kernels, more.kernels, times)
        exchanges = _grown(self.exchanges, base.exchanges, more.exchanges, times)
        if kernels is None or exchanges is None:
            return None
        return _Counts(kernels, exchanges, self.kept + times * (more.kept - base.kept))


def _grown(total: Counter[Any], base: Counter[Any], more: Counter[Any], times: int) -> Counter[Any] | None:
    """What is new in ``more`` comes ``times`` times; a bucket of the whole step grows as often."""
    found, new = Counter(total), more - base
    for gone in (base - more).elements():
        kind = _sized(gone, 0)
        old, larger = ([x for x in counts if x.bucket and _sized(x, 0) == kind] for counts in (+found, +new))
        if len(old) != 1 or len(larger) != 1 or found[old[0]] != 1 or new[larger[0]] != 1:
            return None
        del found[old[0]], new[larger[0]]
        found[_sized(old[0], _size(old[0]) + times * (_size(larger[0]) - _size(gone)))] += 1
    for key, count in new.items():
        found[key] += count * times
    return found


def _size(x: Kernel | Exchange) -> int:
    return x.bytes if isinstance(x, Kernel) else x.size


def _sized(x: Kernel | Exchange, size: int) -> Kernel | Exchange:
    return replace(x, bytes=size) if isinstance(x, Kernel) else replace(x, size=size)


def _counted(program: Program, rank: int, shapes: Sequence[Sequence[int]], training: bool) -> _Counts:
    members = {
        name: next(tuple(found) for found in groups if rank in found)
        for name, groups in program.mesh.all_groups().items()
    }
    counting = _Counting(members)
    kept: list[int] = []

    def then(saved: Saved, outputs: Sequence[Any]) -> None:
        kept.append(saved.bytes)
        if training:
            counting.direction = "backward"
            _backward(outputs)

    run_on_fakes(program, rank, shapes, then, counting, training)
    return _Counts(counting.kernels, counting.exchanges, kept[0])


def _backward(outputs: Sequence[Any]) -> None:
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    leaves = [x for x in leaves if x.dim() == 0] or leaves
    if not leaves:
        what = "no output of the model depends on a parameter that requires a gradient"
        raise TpcompileError(what, why="there is no backward to count", help="set requires_grad, or do not train")
    torch.autograd.backward(leaves, [torch.ones_like(x) for x in leaves])


# ------------------------------------------------------------------------------------------------ counting
_current_node: Callable[[], object] = getattr(getattr(torch, "_C"), "_current_autograd_node")  # noqa: B009
aten = torch.ops.aten
collective = torch.ops._c10d_functional

COLLECTIVES: Mapping[object, str] = {
    collective.all_reduce: "all_reduce",
    collective.all_gather_into_tensor: "all_gather",
    collective.reduce_scatter_tensor: "reduce_scatter",
}
FREE = frozenset(
    {collective.wait_tensor, aten._unsafe_view, aten.empty, aten.new_empty, aten.empty_like, aten.lift_fresh}
)
"""Ops that neither read nor write elements (views are told by their schema)."""

ROWS = frozenset({aten.embedding, aten.index, aten.index_select, aten.gather})
"""Ops that read of their first operand only what they return."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, products: int = 2) -> int:
    """Two products forward; five backward, since flash attention makes the scores again (Dao et al. 2022)."""
    *batch, rows, depth = query.shape
    pairs = math.prod(batch) * rows * key.shape[-2]
    if products == 2:
        return 2 * pairs * (depth + value.shape[-1])
    return 2 * pairs * (3 * depth + 2 * value.shape[-1])


FLOPS: Mapping[object, Callable[..., int]] = {
    aten.mv: lambda matrix, vector: 2 * matrix.numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_: _attention(
        q, k, v, products=5
    ),
    aten._grouped_mm: lambda rows, matrices, *_: 2 * rows.numel() * matrices.shape[-1],
}
"""Of ops that ``torch.utils.flop_counter`` does not know, from their positional arguments."""


class _Counting(TorchDispatchMode):
    """Counts what is dispatched below autograd, while it is entered."""

    def __init__(self, members: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.members = members
        self.direction = "forward"
        self.kernels: Counter[Kernel] = Counter()
        self.exchanges: Counter[Exchange] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in COLLECTIVES:
            kind, group = COLLECTIVES[packet], next(a for a in reversed(args) if isinstance(a, str))
            x = made if kind == "all_gather" else args[0]
            size = x.numel() * x.element_size()
            self.exchanges[Exchange(kind, self.direction, size, self.members[group], _in_bucket())] += 1
        elif packet not in FREE and not _is_view(func):
            outputs = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
            if outputs:
                self.kernels[self._kernel(func, packet, args, kwargs, made, outputs)] += 1
        return made

    def _kernel(self, func: Any, packet: Any, args: Any, kwargs: Any, made: Any, outputs: Sequence[Tensor]) -> Kernel:
        flops = 0
        if packet in FLOPS:
            flops = FLOPS[packet](*args)
        elif packet in flop_registry:
            flops = cast("Callable[..., int]", flop_registry[packet])(*args, **kwargs, out_val=made)
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in ROWS:
            inputs = [*outputs, *inputs[1:]]
        moved = sum(map(_bytes, {id(x): x for x in inputs}.values())) + sum(map(_bytes, outputs))
        dtype = str(outputs[0].dtype).removeprefix("torch.")
        return Kernel(str(func), self.direction, flops, moved, dtype, _in_bucket())


def _in_bucket() -> bool:
    """Whether the backward of ``copy_all`` is running."""
    return getattr(_current_node(), "primitives", ("",))[0] == "all_reduce_bucket"


def _is_view(func: Any) -> bool:
    """Whether a result is an operand, only looked at in another way."""
    returned = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return bool(returned) and not any(alias.is_write for alias in returned)


def _bytes(x: Tensor) -> int:
    """Of the elements; of an expanded tensor those that are there."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


__all__ = ["Exchange", "Kernel", "Point", "Scaling", "Work", "scale", "work"]
