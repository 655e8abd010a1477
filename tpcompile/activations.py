"""Memory of one training step, rank by rank: what autograd keeps for backward, and parameters, gradients, AdamW states.

Nothing is predicted. The code of one rank runs on fake tensors (shapes without memory, with torch's own autograd), and
autograd's hooks for saved tensors say what it keeps: the report cannot drift from torch. ``Saved`` does the counting,
and counts a real step alike. Memory is counted by storage: a tensor and its views count once, with all of the memory
that they hold on to; parameters, buffers and inputs do not count. Ranks that hold parts of equal sizes are run once.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from tpcompile import collectives, shards
from tpcompile.errors import TpcompileError
from tpcompile.groups import seated
from tpcompile.layers import repeated_layers
from tpcompile.layout import Layout, Mesh, Owned, axes_of, local_size, runs, size
from tpcompile.placement import Placement
from tpcompile.program import Program, where
from tpcompile.rank_code import bind
from tpcompile.recomputation import Region
from tpcompile.rules import op_name
from tpcompile.simulate import Run, Simulation
from tpcompile.transitions import Transition


@dataclass(frozen=True)
class Kept:
    """One piece of memory that autograd keeps for backward.

    Attributes:
        value: the value of the program that it is; ``""`` for what an op keeps besides its result (a dropout mask).
        bytes: of the whole storage, on this rank.
        shape, dtype: of the value on this rank, or of what the op keeps.
        savers: the values whose ops keep it; ``op`` is the first one's.
        module, layer: dotted paths of the first saver; ``layer`` is ``""`` outside of repeated layers.
    """

    value: str
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    savers: tuple[str, ...]
    op: str
    module: str
    layer: str


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds in a training step; ``adamw`` is of ``torch.optim.AdamW``, once it has made a step."""

    parameters: int
    gradients: int
    adamw: int
    kept: tuple[Kept, ...]

    @property
    def activations(self) -> int:
        """Bytes kept for backward, at the end of forward."""
        return sum(line.bytes for line in self.kept)

    @property
    def layers(self) -> Mapping[str, int]:
        """Bytes kept for backward by layer; what is outside of layers under ``""``."""
        found: dict[str, int] = {}
        for line in self.kept:
            found[line.layer] = found.get(line.layer, 0) + line.bytes
        return found


def memory(program: Program, inputs: Sequence[torch.Tensor] | None = None) -> tuple[RankMemory, ...]:
    """What every rank of an emitted program holds in one training step, in rank order.

    Args:
        inputs: flat inputs (``program.captured.flatten``), of which only the shapes matter; by default of the shapes
            that the program was made with. They require no gradient.

    Raises:
        TpcompileError: what is kept depends on data (rows sorted by expert), or the program is not emitted.
    """
    if not program.emitted:
        raise TpcompileError("the program is not emitted", why="only emitted code knows local sizes")
    shapes = [tuple(x.shape) for x in (resized(program) if inputs is None else inputs)]
    found: dict[object, RankMemory] = {}
    ranks: list[RankMemory] = []
    for rank in range(program.mesh.degree):
        like = _sizes_held(program, rank)
        if like not in found:
            found[like] = RankMemory(*states(program, rank), _kept(program, rank, shapes))
        ranks.append(found[like])
    return tuple(ranks)


def resized(program: Program, batch: int | None = None, length: int | None = None) -> list[torch.Tensor]:
    """Flat inputs (without memory) for :func:`memory`, of another batch size and sequence length than the example's.

    ``batch`` is dim 0 of the inputs, ``length`` dim 1 of those that hold integers, with every size that is tied to one
    of them. Raises TpcompileError where the captured graph has that size fixed, or is not valid for it.
    """
    captured, sizes = program.captured, dict(program.sizes)
    for dim, wanted in ((0, batch), (1, length)):
        if wanted is None:
            continue
        of = [x for x in captured.inputs if dim < x.example.dim() and (dim == 0 or not x.dtype.is_floating_point)]
        symbols = {n.node.expr for x in of if isinstance(n := x.example.shape[dim], torch.SymInt)}
        if not symbols:
            what = "batch size" if dim == 0 else "sequence length"
            raise TpcompileError(f"the {what} cannot be {wanted}", why="it is fixed in the captured graph")
        sizes.update(dict.fromkeys(symbols, wanted))
    shapes = [tuple(_size(n, sizes) for n in x.example.shape) for x in captured.inputs]
    captured.check_shapes(shapes)
    return [torch.empty(shape, device="meta") for shape in shapes]


def savers(program: Program) -> frozenset[str]:
    """Names of the nodes that autograd keeps something for, parameters and inputs included; raises as ``memory``."""
    shapes = [tuple(x.shape) for x in resized(program)]
    saved, _ = run_on_fakes(program, 0, shapes)
    return frozenset(node.name for node in saved.keepers if isinstance(node, torch.fx.Node))


# ------------------------------------------------------------------------------------------------ counting
class _Held:
    """A tensor in autograd's hands; gone when nobody may ask for it any more."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@dataclass
class _Storage:
    """Who keeps a storage."""

    tensor: torch.Tensor  # what was kept of it first; keeps the storage alive, so that its key stays its own
    savers: list[torch.fx.Node | str]
    held: list[weakref.ref[_Held]]


@dataclass
class Saved:
    """Counts what autograd keeps while it is entered, by storage.

    ``see`` may be told of the nodes of a program as they are run, with their values, which then name what is kept; it
    holds on to the values.
    ``free`` are tensors that do not count: parameters, buffers, inputs.
    """

    free: Iterable[torch.Tensor] = ()
    keepers: set[torch.fx.Node | str] = field(default_factory=set[torch.fx.Node | str])  # of anything, free or not
    _new: bool = False
    _found: dict[StorageWeakRef, _Storage] = field(default_factory=dict[StorageWeakRef, _Storage])
    _values: dict[StorageWeakRef, tuple[str, torch.Tensor]] = field(
        default_factory=dict[StorageWeakRef, tuple[str, torch.Tensor]]
    )
    _waiting: list[_Storage] = field(default_factory=list[_Storage])

    @contextlib.contextmanager
    def counting(self) -> Generator[Saved]:
        """Count what is kept of the computation inside."""
        free = {_storage(x) for x in self.free}

        def pack(x: torch.Tensor) -> _Held:
            held, key = _Held(x.detach()), _storage(x)  # an op's result would keep the op alive, and itself
            self._new = True
            if key not in free:
                if key not in self._found:
                    self._found[key] = _Storage(held.tensor, [], [])
                self._found[key].held.append(weakref.ref(held))
                self._waiting.append(self._found[key])
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            yield self

    def see(self, node: torch.fx.Node, values: list[Any]) -> None:
        """The node has been run: what was kept since the last one is its doing, and these are its values."""
        self.saved_by(node)
        for x in pytree.tree_leaves(values):
            if isinstance(x, torch.Tensor):
                self._values.setdefault(_storage(x), (node.name, x.detach()))

    def saved_by(self, saver: torch.fx.Node | str) -> None:
        """Name who kept what was kept since this was last asked."""
        if self._new:
            self.keepers.add(saver)
        self._new = False
        for storage in self._waiting:
            if saver not in storage.savers:
                storage.savers.append(saver)
        self._waiting.clear()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, Sequence[torch.fx.Node | str]]]:
        """``(value, tensor, savers)`` of every storage that is still kept: what nobody can ask for any more is gone."""
        for key, storage in self._found.items():
            if any(held() is not None for held in storage.held):
                yield *self._values.get(key, ("", storage.tensor)), storage.savers

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return sum(x.untyped_storage().nbytes() for _, x, _ in self)


def _storage(x: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


# ------------------------------------------------------------------------------------------------ one rank on fakes
@dataclass(frozen=True)
class _OneRank(Run):
    """Runs the functions that a rank calls, transitions included: on fakes they need no process group."""

    saved: Saved = field(default_factory=lambda: Saved())

    def transition(self, row: Transition, node: torch.fx.Node, arguments: Sequence[Any], path: str) -> list[Any]:
        (args, kwargs) = arguments[0]
        function: Callable[..., Any] = getattr(collectives, row.name)
        return [function(*args, **kwargs)]

    def enter(self, region: Region) -> None:
        """What a region is given is kept for running it again."""
        self.saved.saved_by(region.name)


def _kept(program: Program, rank: int, shapes: Sequence[Sequence[int]]) -> tuple[Kept, ...]:
    """What one rank keeps, in the order in which it is first kept."""
    layers = repeated_layers(program.captured.module_classes)
    saved, outputs = run_on_fakes(program, rank, shapes)
    lines = tuple(_line(value, x, savers, layers) for value, x, savers in saved)
    del outputs  # until here they held the graph
    return lines


def run_on_fakes(
    program: Program,
    rank: int,
    shapes: Sequence[Sequence[int]],
    then: Callable[[Saved, Sequence[Any]], None] | None = None,
    watch: contextlib.AbstractContextManager[object] | None = None,
    training: bool = True,
) -> tuple[Saved, object]:
    """What one rank's code keeps on fakes, and its outputs, with which it goes.

    ``then`` is called with both while the rank's seat is still taken, so that backward may run there; ``watch`` is
    entered around all of it. Without ``training`` no gradient is asked for, and nothing is kept.
    """
    reached: list[torch.fx.Node] = []
    with _fake(program, rank) as (graph_module, attributes):
        inputs = [
            torch.empty(shape, dtype=x.example.dtype, device=x.example.device)
            for shape, x in zip(shapes, program.captured.inputs, strict=True)
        ]
        saved = Saved([*attributes.values(), *inputs])

        def see(node: torch.fx.Node, values: list[Any]) -> None:
            reached.append(node)
            saved.see(node, values)

        run = _OneRank(Simulation(graph_module, 1, {}, [attributes]), see, None, saved=saved)
        with watch or contextlib.nullcontext(), torch.set_grad_enabled(training):
            try:
                with saved.counting():
                    (outputs,) = run.graph([graph_module], [inputs], "")
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                node = _after(graph_module.graph, reached)
                raise TpcompileError(
                    f"what {op_name(node)} keeps for backward depends on data",
                    where=where(node),
                    why=f"{error}: the number of rows is known only when the program runs",
                    help="measure a real step: tpcompile.activations.Saved counts it",
                ) from error
            if then is not None:
                then(saved, outputs)
    return saved, outputs


def _after(graph: torch.fx.Graph, reached: Sequence[torch.fx.Node]) -> torch.fx.Node:
    nodes = list(graph.nodes)
    return nodes[nodes.index(reached[-1]) + 1] if reached else nodes[0]


def _line(value: str, x: torch.Tensor, savers: Sequence[torch.fx.Node | str], layers: frozenset[str]) -> Kept:
    first = savers[0]
    names = tuple(s if isinstance(s, str) else s.name for s in savers)
    if isinstance(first, str):
        op, module, paths = "recompute", first.partition(" ")[0], (first,)
    else:
        op, module, paths = op_name(first), first.meta.get("module") or "", first.meta.get("modules") or ()
    layer = next((p for p in layers for path in paths if f"{path}.".startswith(f"{p}.")), "")
    return Kept(value, x.untyped_storage().nbytes(), tuple(x.shape), x.dtype, names, op, module, layer)


@contextlib.contextmanager
def _fake(program: Program, rank: int) -> Generator[tuple[torch.fx.GraphModule, dict[str, torch.Tensor]]]:
    """The program bound to one rank, and fakes of what its graph reads; inside, new tensors are fakes too."""
    groups = program.mesh.all_groups()
    seats = {n: next((g.index(rank), len(g)) for g in found if rank in g) for n, found in groups.items()}
    graph_module = torch.fx.GraphModule(program.graph_module, bind(program, rank, {name: name for name in groups}))
    attributes: dict[str, torch.Tensor] = {}
    with FakeTensorMode(), seated(seats):
        for node in graph_module.graph.find_nodes(op="get_attr"):
            name, value = str(node.target), node.meta["val"]
            parameter = program.captured.parameters.get(name)
            shape = tuple(_size(n, program.sizes) for n in value.shape)
            if name in program.parameters:
                shape = shards.shape(program.parameters[name], program.mesh, rank)
            attributes[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
            attributes[name].requires_grad_(parameter is not None and parameter.requires_grad)
        yield graph_module, attributes


def states(program: Program, rank: int) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, their gradients, and AdamW's two moments and step count of each."""
    parameters = gradients = adamw = 0
    for name, parameter in program.captured.parameters.items():
        own = _numel(program, name, parameter, rank) * parameter.element_size()
        parameters += own
        if parameter.requires_grad:
            gradients += own
            adamw += 2 * own + torch.float32.itemsize
    return parameters, gradients, adamw


def _numel(program: Program, name: str, parameter: torch.Tensor, rank: int) -> int:
    dims = program.parameters.get(name)
    return parameter.numel() if dims is None else math.prod(shards.shape(dims, program.mesh, rank))


def _sizes_held(program: Program, rank: int) -> object:
    """What decides how much memory a rank needs: local sizes, in how many pieces they lie, and whether it is first."""
    mesh, hints = program.mesh, program.captured.hints.values()
    layouts = {d for dims in program.parameters.values() for d in dims}
    for node in program.graph.nodes:
        placed = node.meta.get("placement")
        for each in placed if isinstance(placed, tuple) else (placed,):
            layouts |= set(each.dims) if isinstance(each, Placement) else set()
    cut = sorted((d for d in layouts if axes_of(d)), key=str)
    apart = any(getattr(node.target, "__name__", "") == "once" for node in program.graph.nodes)
    apart |= any(size(d) % hint == 0 for d in cut for hint in hints)  # parts of a size that only the call knows
    return tuple(_part(d, mesh, rank) for d in cut), apart and rank


def _part(layout: Layout, mesh: Mesh, rank: int) -> tuple[int, int]:
    pieces = 1 if isinstance(layout, Owned) else len(runs(layout, mesh.sizes, mesh.coordinates(rank)))
    return local_size(layout, mesh, rank), pieces


def _size(n: int | torch.SymInt, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(n.node.expr.xreplace(sizes)) if isinstance(n, torch.SymInt) else n


__all__ = ["Kept", "RankMemory", "Saved", "memory", "resized", "run_on_fakes", "savers", "states"]
