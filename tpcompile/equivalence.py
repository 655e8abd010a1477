"""``verify``: the rewritten program against the model, all ranks in lock step in this process.

Two comparisons. In the model's own precision, with the eager, untouched model: it shows that the capture is the model.
In fp64 (the graph's own float32 upcasts widened), with the captured graph: it shows that the rewriting is exact, to
1e-10, outputs and every gradient; and replicas must be bitwise equal among ranks. On failure the first node that
differs is named, forwards by its value, backwards by its gradient.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from tpcompile import caches, collectives, kernels, shards
from tpcompile.capture import outside_autocast
from tpcompile.collectives import transition_of
from tpcompile.compare import backward, gradient_errors, largest, relative_error
from tpcompile.compiler import Inputs, SpecLike, call_arguments, rewrite
from tpcompile.errors import TpcompileError
from tpcompile.layout import Concat, Layout, Leaf, Owned, Product, axes_of, concat, product, runs, size, whole_segments
from tpcompile.localize import per_rank
from tpcompile.placement import Placement, uncut
from tpcompile.program import Asked, Program, copy_graph, where
from tpcompile.report import Collective, held
from tpcompile.rules import op_name
from tpcompile.simulate import Simulation
from tpcompile.tracing import original
from tpcompile.widen import widen_graph

TOLERANCE = 1e-10
NUDGES = 16  # in the model's own precision, errors may be so many times those of a last bit in every parameter,
MOST = 0.05  # and no larger than this


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        ok: every check below holds.
        output_error, gradient_error: worst relative errors in fp64, ranks against the captured graph.
        native_output_error, native_gradient_error: the same in the model's own precision, against the eager model.
        replicas_equal: parameters' gradients that ranks hold in common are bitwise equal among them.
        mismatch: the first difference in words, if there is one.
        collectives: every collective of a step.
        held: share of the parameters' bytes that each rank holds; unlike where a cut is uneven.
        timings: seconds of the capture, of every pass, and of the comparison.
    """

    ok: bool
    output_error: float
    gradient_error: float
    native_output_error: float
    native_gradient_error: float
    replicas_equal: bool
    mismatch: str | None
    collectives: tuple[Collective, ...]
    held: tuple[float, ...]
    timings: Mapping[str, float]


class _Failure(Exception):
    """The rewritten program cannot run to its end; the message says where."""


@dataclass
class Run:
    """Outputs of one run, its gradients by parameter name (those of inputs under ``input NAME``), and its buffers."""

    outputs: list[Any]
    gradients: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    buffers: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])  # as the run left them
    replicas_equal: bool = True


def verify(
    model: nn.Module,
    spec: SpecLike = None,
    *,
    degree: int,
    example_inputs: Inputs = None,
    tolerance: float = TOLERANCE,
    **options: Unpack[Asked],
) -> Report:
    """Prove that ``degree`` ranks compute what ``model`` does, forward and backward. One process, no GPU.

    Args: as for :func:`tpcompile.rewrite`; ``tolerance`` bounds the relative fp64 errors.

    Raises:
        TpcompileError: the model cannot be rewritten (see :func:`tpcompile.rewrite`), or has no weights (meta device).
    """
    if any(p.is_meta for p in model.parameters()):
        raise TpcompileError(
            "verify needs weights: the model's parameters are on the meta device",
            why="it runs the model",
            help="build the model on the CPU (random weights will do)",
        )
    program = rewrite(model, spec, degree=degree, example_inputs=example_inputs, **options)
    return verify_program(program, model, example_inputs, tolerance=tolerance)


def verify_program(
    program: Program, model: nn.Module, example_inputs: Inputs = None, *, tolerance: float = TOLERANCE
) -> Report:
    """Compare an emitted program with the model that it was made from."""
    start = time.perf_counter()
    if any(node.target is kernels.own_dropout for node in program.graph.nodes):
        raise TpcompileError(
            "verify cannot compare independent dropout",
            why="ranks draw other masks than one device",
            help='verify with dropout="exact", or the model in eval mode',
        )
    messages, program = program.collectives, _with_whole_outputs(program)
    args, kwargs = call_arguments(model, example_inputs)
    flat = program.captured.flatten(args, kwargs)
    eager = _run_eager(model, args, kwargs)
    wide = [_widened(x) for x in flat]
    simulate = outside_autocast(_simulate, program.captured.autocast)
    try:
        native = simulate(program, program.graph_module, flat, torch.Tensor.detach)
        widened = _wide(program.graph_module)
        exact = simulate(program, widened, wide, _widened)
    except _Failure as failure:
        timings = {**program.timings, "compare": time.perf_counter() - start}
        infinite = (math.inf, math.inf, math.inf, math.inf)
        return Report(False, *infinite, False, str(failure), messages, held(program), timings)
    native_output, native_gradient = worst_errors(eager, native)
    reference = _run_graph(program, _wide(program.captured.graph_module), wide, _widened)
    output_error, gradient_error = worst_errors(reference, exact)
    allowed = tolerated(program, eager)
    replicas_equal = exact.replicas_equal and native.replicas_equal
    mismatch = None
    if output_error > tolerance or gradient_error > tolerance or not exact.replicas_equal:
        mismatch = _first_difference(program, widened, wide, tolerance, reference, exact)
    elif max(native_output, native_gradient) > max(allowed, _rounding(program, flat, eager, allowed)):
        mismatch = (
            f"in fp64 the ranks equal the captured graph, but in the model's own precision they differ from the eager "
            f"model by {native_output:.1e} (outputs) and {native_gradient:.1e} (gradients)"
        )
    elif not replicas_equal:
        mismatch = "gradients that ranks hold in common are not bitwise equal among them"
    timings = {**program.timings, "compare": time.perf_counter() - start}
    return Report(
        mismatch is None,
        output_error,
        gradient_error,
        native_output,
        native_gradient,
        replicas_equal,
        mismatch,
        messages,
        held(program),
        timings,
    )


def _with_whole_outputs(program: Program) -> Program:
    """The program with outputs gathered that it leaves cut (caches, or by ``gather_logits=False``), to compare them."""
    module, graph = copy_graph(program.graph_module)
    output = next(iter(graph.find_nodes(op="output")))
    mesh = program.mesh

    def whole(x: torch.fx.Node) -> torch.fx.Node:
        placed = x.meta.get("placement")
        if not isinstance(placed, Placement) or not any(map(axes_of, placed.dims)):
            return x
        (dim,) = (d for d, layout in enumerate(placed.dims) if axes_of(layout))
        axes = axes_of(placed.dims[dim])
        parts: list[Any] = []
        for rank in range(mesh.degree):
            group = next(g for g in mesh.groups(axes) if rank in g)
            parts.append(tuple(runs(placed.dims[dim], mesh.sizes, mesh.coordinates(m)) for m in group))
        with graph.inserting_before(output):
            made = graph.call_function(collectives.gather, (x, dim, per_rank(parts), mesh.group_name(axes)))
        made.meta = dict(x.meta)
        made.meta["placement"] = uncut(program.shape(x), mesh)
        return made

    given: Any = output.args[0]
    left = {i for i in range(len(given)) if i in program.resident or not program.options.gather_logits}
    output.args = (tuple(whole(x) if i in left and isinstance(x, torch.fx.Node) else x for i, x in enumerate(given)),)
    module.recompile()
    return program.with_(graph_module=module)


def tolerated(program: Program, eager: Run) -> float:
    """What rounding may do in the model's own precision: sqrt(eps) of its coarsest floating dtype."""
    dtypes = {x.dtype for x in [*eager.outputs, *eager.gradients.values()] if isinstance(x, torch.Tensor)}
    dtypes |= {p.dtype for p in program.captured.parameters.values()} | {d for _, d in program.captured.autocast}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0) ** 0.5


def _rounding(program: Program, flat: Sequence[torch.Tensor], eager: Run, allowed: float) -> float:
    """What a last bit more or less in every parameter does to the model itself, several times over.

    Only a model that amplifies rounding is asked for more than ``allowed``; 0 where its graph is not the eager model.
    """
    captured = program.captured
    run = outside_autocast(_run_graph, captured.autocast)
    unmoved = run(program, captured.graph_module, flat, torch.Tensor.detach)
    if not max(worst_errors(eager, unmoved)) <= allowed:
        return 0.0
    generator = torch.Generator().manual_seed(0)

    def nudged(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x.detach()
        signs = torch.randint(0, 2, x.shape, generator=generator).mul_(2).sub_(1).to(x)
        return x.detach() * (1 + signs * torch.finfo(x.dtype).eps)

    moved = NUDGES * max(worst_errors(unmoved, run(program, captured.graph_module, flat, nudged)))
    return min(moved, MOST) if math.isfinite(moved) else 0.0


def worst_errors(expected: Run, got: Run) -> tuple[float, float]:
    """Worst errors of outputs and gradients; NaN and missing ones are infinite."""
    output = 0.0
    for a, b in zip(expected.outputs, got.outputs, strict=True):
        if isinstance(a, torch.Tensor):
            output = max(output, relative_error(a, b) if isinstance(b, torch.Tensor) else math.inf)
        elif a != b:
            output = math.inf
    for name, buffer in got.buffers.items():
        output = max(output, relative_error(expected.buffers[name], buffer))
    surplus = {n: g for n, g in got.gradients.items() if n not in expected.gradients}
    if largest(surplus.values()) > 0:
        return output, math.inf
    return output, max(gradient_errors(expected.gradients, got.gradients).values(), default=0.0)


def _wide(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph in fp64, over the same attributes: a run brings its own."""
    return torch.fx.GraphModule(module, widen_graph(module.graph))


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double() if x.is_floating_point() else x.detach()


@contextlib.contextmanager
def same_random_numbers() -> Generator[None]:
    """The same generator state for every run, and the caller's state untouched."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        yield


def _requires_grad(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone()
    return x.requires_grad_() if x.is_floating_point() else x


def _run_eager(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """The untouched model: its outputs' leaves and gradients; its buffers and gradients are left as they were."""
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    kept = {n: p.grad for n, p in model.named_parameters()}
    inputs = pytree.tree_map_only(torch.Tensor, _requires_grad, caches.packed((args, dict(kwargs))))
    try:
        for p in model.parameters():
            p.grad = None
        with same_random_numbers():
            with original(model):
                result = caches.call(model, *inputs)
            leaves = caches.leaves(result)
            backward(leaves)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        gradients |= {f"input {i}": x.grad for i, x in enumerate(tensors) if x.grad is not None}
        return Run([detached(x) for x in leaves], gradients, {n: b.detach().clone() for n, b in model.named_buffers()})
    finally:
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])
        for n, p in model.named_parameters():
            p.grad = kept[n]


def detached(x: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return x.detach() if isinstance(x, torch.Tensor) else x


def buffers_and_constants(program: Program, convert: Any) -> dict[str, torch.Tensor]:
    """Buffers and constants for one run: copies, so that a run that updates them leaves the model alone."""
    found = {**program.captured.buffers, **program.captured.constants}
    return {n: convert(x).clone() for n, x in found.items()}


class Reference(torch.fx.Interpreter):
    """Runs a whole graph with the given parameters, telling ``see`` of every value."""

    def __init__(self, module: torch.fx.GraphModule, attributes: Mapping[str, torch.Tensor], see: Any = None):
        super().__init__(module, garbage_collect_values=see is None)
        self.attributes = attributes
        self.see = see

    def fetch_attr(self, target: str) -> Any:
        """The attribute given, else the module's own."""
        return self.attributes[target] if target in self.attributes else super().fetch_attr(target)

    def run_node(self, n: torch.fx.Node) -> Any:
        """Its value, which is shown to ``see``."""
        value = super().run_node(n)
        if self.see is not None:
            self.see(n, value)
        return value


def _run_graph(
    program: Program, module: torch.fx.GraphModule, flat: Sequence[torch.Tensor], convert: Any, see: Any = None
) -> Run:
    """The captured graph on one device, its parameters and buffers converted."""
    parameters = {n: convert(p).requires_grad_(p.requires_grad) for n, p in program.captured.parameters.items()}
    inputs = [_requires_grad(x) for x in flat]
    with same_random_numbers():
        others = buffers_and_constants(program, convert)
        leaves = Reference(module, {**parameters, **others}, see).run(*inputs)
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves):
            backward(leaves)
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return Run([detached(x) for x in leaves], gradients, {n: others[n] for n in program.captured.buffers})


def _simulate(
    program: Program, module: torch.fx.GraphModule, flat: Sequence[torch.Tensor], convert: Any, see: Any = None
) -> Run:
    """All ranks in lock step: rank 0's outputs, whole gradients, and whether the ranks agree on what they share."""
    mesh = program.mesh
    parameters = {n: convert(p).requires_grad_(p.requires_grad) for n, p in program.captured.parameters.items()}
    ranks = shards.attributes(parameters, {}, program.parameters, mesh)
    for mine in ranks:
        mine |= buffers_and_constants(program, convert)
    inputs = [[_requires_grad(x) for x in flat] for _ in ranks]
    ran: set[torch.fx.Node] = set()

    def watch(node: torch.fx.Node, values: list[Any]) -> None:
        ran.add(node)
        if see is not None:
            see(node, values)

    with same_random_numbers():
        simulation = Simulation(module, ranks=mesh.degree, groups=mesh.all_groups(), attributes=ranks)
        try:
            outputs = simulation.run(inputs, on_node=watch)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # the eager model ran: it is our program
            broken = next(n for n in module.graph.nodes if n not in ran)
            raise _Failure(_said("value", broken, f"cannot be computed: {error}")) from error
        try:
            if any(isinstance(x, torch.Tensor) and x.requires_grad for rank in outputs for x in rank):
                backward(*outputs)
        except (RuntimeError, ValueError) as error:
            raise _Failure(f"the gradients cannot be computed: {error}") from error
    gradients: dict[str, torch.Tensor] = {}
    equal = True
    for name in parameters:
        parts = [mine[name].grad for mine in ranks]
        if any(g is not None for g in parts):
            filled = [torch.zeros_like(m[name]) if g is None else g for g, m in zip(parts, ranks, strict=True)]
            dims = program.parameters[name]
            gradients[name] = whole = shards.join(filled, dims, mesh)
            equal &= all(torch.equal(shards.cut(whole, dims, mesh, r), g) for r, g in enumerate(filled))
    for index, copies in enumerate(zip(*inputs, strict=True)):
        if any(x.grad is not None for x in copies):
            filled = [torch.zeros_like(x) if x.grad is None else x.grad for x in copies]
            gradients[f"input {index}"] = filled[0]
            equal &= all(torch.equal(filled[0], g) for g in filled)
    equal &= all(_identical(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))
    buffers = {n: ranks[0][n] for n in program.captured.buffers}
    equal &= all(_identical(x, mine[n]) for mine in ranks[1:] for n, x in buffers.items())
    return Run([detached(x) for x in outputs[0]], gradients, buffers, equal)


def _identical(a: Any, b: Any) -> bool:
    """Bitwise equal; NaN equals NaN."""
    if not isinstance(a, torch.Tensor):
        return a == b
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))


# ------------------------------------------------------------------------------------------------ the first difference
def _first_difference(
    program: Program,
    widened: torch.fx.GraphModule,
    flat: Sequence[torch.Tensor],
    tolerance: float,
    reference: Run,
    exact: Run,
) -> str:
    """Where the ranks first leave the reference: by value going forwards, else by gradient going backwards."""
    whole = [stage.program for stage in program.history if not stage.program.emitted][-1]  # what emission was made from
    expected: dict[str, torch.Tensor] = {}

    def remember(node: torch.fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            expected[node.name] = value
            if value.requires_grad and not value.is_leaf:
                value.retain_grad()

    seen: list[tuple[torch.fx.Node, list[torch.Tensor]]] = []

    def see(node: torch.fx.Node, values: list[Any]) -> None:
        if "origin" in node.meta and isinstance(node.meta.get("placement"), Placement):
            seen.append((node, values))
            for value in values:
                if value.requires_grad and not value.is_leaf:
                    value.retain_grad()

    _run_graph(program, _wide(whole.graph_module), flat, _widened, remember)
    _simulate(program, widened, flat, _widened, see)
    blank = {n.name for n in whole.graph.nodes if "empty" in op_name(n)}  # uninitialised memory equals nothing
    seen = [(node, values) for node, values in seen if node.meta["origin"] in expected.keys() - blank]
    for node, values in seen:
        error = _value_error(program, node, values, expected[node.meta["origin"]])
        if error > tolerance:
            return _said("value", node, f"differs by {error:.1e}")
    for index, (want, got) in enumerate(zip(reference.outputs, exact.outputs, strict=True)):
        error = worst_errors(Run([want]), Run([got]))[0]
        if error > tolerance:
            outputs: Any = program.graph.output_node().args[0]
            return _said(f"output {index}, value", outputs[index], f"differs by {error:.1e}")
    for name, buffer in exact.buffers.items():
        if (error := relative_error(reference.buffers[name], buffer)) > tolerance:
            return f"buffer {name} differs by {error:.1e} after the call"
    scale = largest(g for x in expected.values() if (g := x.grad if x.requires_grad else None) is not None)
    for node, values in reversed(seen):
        want = expected[node.meta["origin"]]
        if want.requires_grad and want.grad is not None and transition_of(node.target) is None:
            error = _gradient_error(program, node, values, want.grad, scale)
            if error > tolerance:
                return _said("gradient of", node, f"differs by {error:.1e}")
    errors = gradient_errors(reference.gradients, exact.gradients)
    name = max(errors, key=lambda n: errors[n], default=None)
    if name is not None and errors[name] > tolerance:
        return f"gradient of parameter {name} differs by {errors[name]:.1e}"
    return "ranks disagree on a value that they hold in common"


def _said(what: str, node: torch.fx.Node, how: str) -> str:
    """One line, then the place in the model."""
    return f"{what} {node.name} {how}\n{where(node).render()}"


def _value_error(program: Program, node: torch.fx.Node, values: list[torch.Tensor], want: torch.Tensor) -> float:
    placed: Placement = node.meta["placement"]
    return _worst_part(program, placed, [v.detach() for v in values], want.detach(), "P", 0.0)


def _gradient_error(
    program: Program, node: torch.fx.Node, values: list[torch.Tensor], want: torch.Tensor, scale: float
) -> float:
    placed: Placement = node.meta["placement"]
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in values]
    mixed = any(whole_segments(d, a) for d in placed.dims for a in program.mesh.axes)
    if not mixed or node.op == "get_attr":  # behind a parameter stands an f of its own
        return _worst_part(program, placed, grads, want, "H", scale * 1e-3)
    dims = _dims(program, placed, want)
    return 0.0 if dims is None else relative_error(want, _summed(program, placed, dims, grads), scale * 1e-3)


def _worst_part(
    program: Program, placed: Placement, parts: list[torch.Tensor], want: torch.Tensor, partial: str, floor: float
) -> float:
    """The worst error of the ranks' parts of ``want``; what is partial (that letter) is summed first."""
    mesh, dims = program.mesh, _dims(program, placed, want)
    if dims is None:
        return 0.0
    if summed := [a for a, letter in enumerate(placed.letters) if letter == partial]:
        groups = mesh.groups(summed)
        together = [next(g for g in groups if rank in g) for rank in range(mesh.degree)]
        if len({x.shape for x in parts}) > 1:
            return math.inf
        parts = [torch.stack([parts[m] for m in g]).sum(0) for g in together]
    floor = max(floor, largest([want])) if want.is_floating_point() else floor
    return max(relative_error(shards.cut(want, dims, mesh, r), x, floor) for r, x in enumerate(parts))


def _summed(program: Program, placed: Placement, dims: list[Layout], grads: list[torch.Tensor]) -> torch.Tensor:
    """The whole gradient where some segments are held by several ranks: a sum, in which complete copies count once."""
    mesh = program.mesh
    total = grads[0].new_zeros([size(d) for d in dims])
    for rank in range(mesh.degree):
        copy = any(c > 0 and x in "RP" for c, x in zip(mesh.coordinates(rank), placed.letters, strict=True))
        if not copy and grads[rank].shape == shards.shape(dims, mesh, rank):
            mine = torch.zeros_like(total)
            shards.assign(mine, grads[rank], dims, mesh, rank)
            total += mine
    return total


def _dims(program: Program, placed: Placement, whole: torch.Tensor) -> list[Layout] | None:
    """The layouts at the sizes of this run, or None where they do not follow from the placement's sizes (the hints)."""

    def at(layout: Layout) -> Layout:
        match layout:
            case Leaf(n, axes):
                for symbol, hint in program.captured.hints.items():
                    while n and n % hint == 0:
                        n = n // hint * program.sizes[symbol]
                return Leaf(n, axes)
            case Product(inner):
                return product(at(x) for x in inner)
            case Concat(inner):
                return concat(at(x) for x in inner)
            case Owned():
                return layout

    if any(isinstance(d, Owned) for d in placed.dims):
        return None
    dims = [at(d) if axes_of(d) else Leaf(n) for d, n in zip(placed.dims, whole.shape, strict=True)]
    return dims if tuple(map(size, dims)) == tuple(whole.shape) else None


__all__ = [
    "Reference",
    "Report",
    "Run",
    "buffers_and_constants",
    "detached",
    "same_random_numbers",
    "tolerated",
    "verify",
    "verify_program",
    "worst_errors",
]
