"""All ranks of a rewritten program in lock step, in one process and one autograd graph: no group, no threads.

The graph is interpreted node by node over N environments. A transition is one autograd function from the N tensors of
its group to N tensors, whose forward and backward are the primitives that the table in ``tpcompile.transitions``
names, here in their version for lists. This is what ``verify`` and the property tests trust, so that it is kept
plain. A random op draws the same numbers on every rank: those that a single device would draw.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from tpcompile import collectives
from tpcompile.collectives import transition_of
from tpcompile.per_rank import resolve
from tpcompile.recomputation import Region, recompute, regions
from tpcompile.runs import (
    Parts,
    Where,
    check_parts,
    full_size,
    join,
    parts_of,
    pick,
    pick_copy,
    place,
    run_length,
    zero_pad,
)
from tpcompile.transitions import MESSAGES, Transition, sent_bytes

OnNode = Callable[[fx.Node, list[Any]], None]


@dataclass(frozen=True)
class Row:
    """One collective that was run: what it is, what rank 0 sent in it, and the node that it belongs to."""

    kind: str  # all_reduce, all_gather or reduce_scatter
    direction: str  # forward or backward
    bytes: int  # sent per rank, ring
    shape: tuple[int, ...]  # of the reduced tensor, or of the gathered one
    dtype: torch.dtype
    ranks: int
    group: str
    node: fx.Node
    path: str  # of the GraphModule that holds the node; "" is the root


@dataclass
class Recorder:
    """Collects a ``Row`` for every collective that rank 0 takes part in; the backward ones as backward runs."""

    rows: list[Row] = field(default_factory=list[Row])

    def bytes(self, direction: str | None = None) -> int:
        """Bytes that rank 0 sent, in ``direction`` or in both."""
        return sum(row.bytes for row in self.rows if direction in (None, row.direction))


# The primitives on the list of a group's tensors, in group order; each result is a new tensor or a view of its own
# operand. ``where`` is as in tpcompile.primitives; for all_reduce_runs, one Runs for each member.


def _total(xs: Sequence[Tensor]) -> Tensor:
    shapes = {(tuple(x.shape), x.dtype) for x in xs}
    if len(shapes) > 1:
        raise ValueError(f"ranks bring different tensors to one sum: {[(tuple(x.shape), x.dtype) for x in xs]}")
    total = xs[0].clone(memory_format=torch.contiguous_format)
    for x in xs[1:]:
        total.add_(x)
    return total


def _identity(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    return list(xs)


def _keep_first(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    return [xs[0], *(torch.zeros_like(x) for x in xs[1:])]


def _all_reduce(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    total = _total(xs)
    return [total, *(total.clone() for _ in xs[1:])]


def _all_reduce_max(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    largest = torch.stack(list(xs)).amax(0)
    return [largest, *(largest.clone() for _ in xs[1:])]


def _all_reduce_runs(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    total = _total([pick(x, dim, runs) for x, runs in zip(xs, where, strict=True)])
    return [
        place(total, dim, runs, x.clone(memory_format=torch.contiguous_format))
        for x, runs in zip(xs, where, strict=True)
    ]


def _all_gather(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    return [join(xs, dim, where) for _ in xs]


def _cut(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    return [pick_copy(x, dim, runs) for x, runs in zip(xs, where, strict=True)]


def _reduce_scatter(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    return _cut([_total(xs)] * len(xs), dim, where)


def _zero_pad(xs: Sequence[Tensor], dim: int, where: Parts) -> list[Tensor]:
    size = full_size(where)
    return [zero_pad(x, dim, runs, size) for x, runs in zip(xs, where, strict=True)]


PRIMITIVES: Mapping[str, Callable[[Sequence[Tensor], int, Parts], list[Tensor]]] = {
    "identity": _identity,
    "all_reduce": _all_reduce,
    "all_reduce_max": _all_reduce_max,
    "all_reduce_runs": _all_reduce_runs,
    "all_reduce_bucket": _all_reduce,  # the bucket only makes one message of many
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "cut": _cut,
    "zero_pad": _zero_pad,
    "keep_first": _keep_first,
}
"""What each primitive does on the tensors of a group."""


@dataclass(frozen=True)
class _Call:
    """One direction of one transition in one group: everything but the tensors."""

    primitive: str
    adjoint: str
    direction: str
    dim: int
    where: Parts
    members: int
    record: Callable[[str, str, tuple[int, ...], torch.dtype], None] | None

    def backward(self) -> _Call:
        return replace(self, primitive=self.adjoint, adjoint=self.primitive, direction="backward")

    def run(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """``xs`` holds all the tensors of one member, then those of the next, as does the result."""
        tensors = len(xs) // self.members
        ys = list(xs)
        bucket: dict[torch.dtype, int] = {}
        for i in range(tensors):
            given = xs[i::tensors]
            made = PRIMITIVES[self.primitive](given, self.dim, self.where)
            ys[i::tensors] = made
            shape = list((made if self.primitive == "all_gather" else given)[0].shape)
            if self.primitive == "all_reduce_bucket":
                bucket[given[0].dtype] = bucket.get(given[0].dtype, 0) + given[0].numel()
                continue
            if self.primitive == "all_reduce_runs":
                shape[self.dim] = run_length(self.where[0])
            self.note(tuple(shape), given[0].dtype)
        for dtype, numel in bucket.items():
            self.note((numel,), dtype)
        return ys

    def note(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if self.record is not None and self.members > 1 and self.primitive in MESSAGES and 0 not in shape:
            self.record(MESSAGES[self.primitive], self.direction, shape, dtype)


class _Joint(torch.autograd.Function):
    """A transition of all the members of a group at once; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *xs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(y.view_as(y) if y is x else y for x, y in zip(xs, call.run(xs), strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_apply(ctx.call.backward(), grads)


def _apply(call: _Call, xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``call`` on ``xs``; what is None for some members is zeros, what is None for all stays None."""
    tensors = len(xs) // call.members
    filled = list(xs)
    for i in range(tensors):
        like = next((x for x in xs[i::tensors] if x is not None), None)
        if like is not None:
            filled[i::tensors] = [torch.zeros_like(like) if x is None else x for x in xs[i::tensors]]
    present = [i for i, x in enumerate(filled) if x is not None]
    given = [x for x in filled if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        made = cast("Sequence[Tensor]", _Joint.apply(call, *given))
    else:
        made = call.run(given)
    for i, y in zip(present, made, strict=True):
        filled[i] = y
    return filled


class Simulation:
    """A rewritten program on ``ranks`` simulated ranks.

    ``graphs`` is one GraphModule, whose arguments may be ``PerRank``, or one for each rank, alike but for constants
    in arguments. ``groups`` lists for each group name the groups of ranks, each in group order; every rank is in
    exactly one of them. ``attributes`` holds for each rank the tensors that get_attr finds under their full dotted
    name (the path of the GraphModule included); what it lacks is fetched from the GraphModule.
    """

    def __init__(
        self,
        graphs: fx.GraphModule | Sequence[fx.GraphModule],
        ranks: int,
        groups: Mapping[str, Sequence[Sequence[int]]],
        attributes: Sequence[Mapping[str, Tensor]] | None = None,
    ):
        self.graphs = [graphs] * ranks if isinstance(graphs, fx.GraphModule) else list(graphs)
        self.ranks = ranks
        self.groups = {name: [list(members) for members in found] for name, found in groups.items()}
        self.attributes = list(attributes) if attributes is not None else [{}] * ranks
        if len(self.graphs) != ranks or len(self.attributes) != ranks:
            raise ValueError(f"{len(self.graphs)} graphs and {len(self.attributes)} attributes for {ranks} ranks")
        for name, found in self.groups.items():
            if sorted(rank for members in found for rank in members) != list(range(ranks)):
                raise ValueError(f"group {name!r}: {found} does not hold each of {ranks} ranks once")

    def run(
        self,
        inputs: Sequence[Sequence[Any]] | Sequence[Tensor],
        *,
        on_node: OnNode | None = None,
        recorder: Recorder | None = None,
    ) -> list[Any]:
        """The output of each rank: for a flat program, a tuple.

        ``inputs`` are the flat inputs of each rank, or one flat list for all of them, which then may not require
        gradients (each rank would add its own complete one). ``on_node`` is called with every node that has been run,
        in nested GraphModules too, and the list of its values, one for each rank.
        """
        if all(isinstance(x, Tensor) for x in inputs):
            if any(cast("Tensor", x).requires_grad for x in inputs):
                raise ValueError("an input that requires a gradient must be given for each rank, as a leaf of its own")
            per_rank = [list(inputs)] * self.ranks
        else:
            per_rank = [list(cast("Sequence[Any]", x)) for x in inputs]
        if len(per_rank) != self.ranks:
            raise ValueError(f"inputs for {len(per_rank)} ranks of {self.ranks}")
        return Run(self, on_node, recorder).graph(self.graphs, per_rank, "")


@dataclass(frozen=True)
class Run:
    """One run of a simulation: the interpreter."""

    simulation: Simulation
    on_node: OnNode | None
    recorder: Recorder | None
    direction: str = "forward"  # or backward, when forward nodes are run again there

    def graph(self, graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[Any]], path: str) -> list[Any]:
        """The outputs of one GraphModule on each rank; ``path`` is its dotted name."""
        programs = [list(graph.graph.nodes) for graph in graphs]
        if len({len(program) for program in programs}) > 1:
            raise ValueError(f"graphs of different lengths: {[len(program) for program in programs]}")
        waiting = [iter(given) for given in inputs]
        envs: list[dict[fx.Node, Any]] = [{} for _ in programs]
        dying = _last_uses(programs[0])
        again = {region.nodes[0]: region for region in regions(graphs[0].graph)}
        inside = {node for region in again.values() for node in region.nodes}
        for i, nodes in enumerate(zip(*programs, strict=True)):
            if nodes[0].op == "output":
                return [args[0] for args, _ in _arguments(nodes, envs)]
            if nodes[0] in again:
                self.region(graphs, programs, again[nodes[0]], envs, path)
            elif nodes[0].op == "placeholder":
                self.keep(nodes, [next(given) for given in waiting], envs)
            elif nodes[0] not in inside:
                self.node(graphs, i, nodes, envs, path)
            for j in dying[i]:
                for env, program in zip(envs, programs, strict=True):
                    env.pop(program[j], None)
        raise ValueError("a graph without an output node")

    def node(
        self,
        graphs: Sequence[fx.GraphModule],
        index: int,
        nodes: Sequence[fx.Node],
        envs: Sequence[dict[fx.Node, Any]],
        path: str,
    ) -> None:
        """Run one node on each rank; its values go to ``envs``."""
        node = nodes[0]
        if any((each.op, each.target) != (node.op, node.target) for each in nodes):
            raise ValueError(f"graphs part at node {index}: {[each.format_node() for each in nodes]}")
        arguments = _arguments(nodes, envs)
        match node.op:
            case "get_attr":
                values = self.attribute(graphs, str(node.target), path)
            case "call_module":
                inner = [graph.get_submodule(str(node.target)) for graph in graphs]
                values = self.module(inner, arguments, _dotted(path, str(node.target)))
            case "call_method":
                methods = [getattr(args[0], str(node.target)) for args, _ in arguments]
                values = _in_step(methods, [(args[1:], kwargs) for args, kwargs in arguments])
            case _:
                row = transition_of(node.target)
                if row is not None:
                    values = self.transition(row, node, arguments, path)
                else:
                    values = _in_step([cast("Callable[..., Any]", node.target)] * len(envs), arguments)
        self.keep(nodes, values, envs)

    def keep(self, nodes: Sequence[fx.Node], values: list[Any], envs: Sequence[dict[fx.Node, Any]]) -> None:
        """The values of a node on each rank are known."""
        if self.on_node is not None:
            self.on_node(nodes[0], values)
        for env, each, value in zip(envs, nodes, values, strict=True):
            env[each] = value

    def region(
        self,
        graphs: Sequence[fx.GraphModule],
        programs: Sequence[Sequence[fx.Node]],
        region: Region,
        envs: Sequence[dict[fx.Node, Any]],
        path: str,
    ) -> None:
        """Run nodes that are run again in backward, where the ranks are in step too; ``on_node`` hears of them once."""
        position = {node: i for i, node in enumerate(programs[0])}
        indices, inputs, outputs = (
            [position[node] for node in nodes] for nodes in (region.nodes, region.inputs, region.outputs)
        )
        runs: list[Run] = [self]

        def body(*flat: Any) -> tuple[Any, ...]:
            run = runs.pop() if runs else replace(self, on_node=None, direction="backward")
            run.enter(region)
            own: list[dict[fx.Node, Any]] = []
            for rank, program in enumerate(programs):
                mine = flat[rank * len(inputs) : (rank + 1) * len(inputs)]
                own.append({program[i]: x for i, x in zip(inputs, mine, strict=True)})
            for i in indices:
                run.node(graphs, i, [program[i] for program in programs], own, path)
            return tuple(env[program[i]] for env, program in zip(own, programs, strict=True) for i in outputs)

        flat = [env[program[i]] for env, program in zip(envs, programs, strict=True) for i in inputs]
        made = recompute(body, region, *flat)
        for rank, (env, program) in enumerate(zip(envs, programs, strict=True)):
            mine = made[rank * len(outputs) : (rank + 1) * len(outputs)]
            env.update({program[i]: x for i, x in zip(outputs, mine, strict=True)})

    def enter(self, region: Region) -> None:
        """Called before the first node of a region is run, when what it is given has been kept."""

    def attribute(self, graphs: Sequence[fx.GraphModule], target: str, path: str) -> list[Any]:
        """The tensors of one get_attr."""
        name = _dotted(path, target)
        found: list[Any] = [
            own[name] if name in own else operator.attrgetter(target)(graph)
            for own, graph in zip(self.simulation.attributes, graphs, strict=True)
        ]
        leaves = [id(x) for x in found if isinstance(x, Tensor) and x.requires_grad]
        if torch.is_grad_enabled() and len(set(leaves)) < len(leaves):
            raise ValueError(f"{name} requires a gradient: every rank must have a leaf of its own in attributes")
        return found

    def module(self, modules: Sequence[object], arguments: Sequence[Any], path: str) -> list[Any]:
        """The outputs of a nested GraphModule."""
        graphs = [module for module in modules if isinstance(module, fx.GraphModule)]
        if len(graphs) != len(modules) or any(kwargs for _, kwargs in arguments):
            raise ValueError(f"{path} is not a GraphModule called with positional arguments")
        return self.graph(graphs, [args for args, _ in arguments], path)

    def transition(self, row: Transition, node: fx.Node, arguments: Sequence[Any], path: str) -> list[Any]:
        """The values on each rank of one transition node."""
        signature = inspect.signature(getattr(collectives, row.name))
        bound = [signature.bind(*args, **kwargs).arguments for args, kwargs in arguments]
        name = bound[0]["group"]
        if name not in self.simulation.groups or any(each["group"] != name for each in bound):
            raise ValueError(f"{node.format_node()}: group {name!r} is not one of {sorted(self.simulation.groups)}")
        many = "xs" in bound[0]
        values: list[Any] = [None] * len(bound)
        for members in self.simulation.groups[name]:
            own = [bound[rank] for rank in members]
            xs: list[list[Tensor]] = [list(each["xs"]) if many else [each["x"]] for each in own]
            dim, where = _where(row, own, node)
            record = partial(self.record, node, path, name, len(members)) if 0 in members else None
            call = _Call(row.forward, row.backward, self.direction, dim, where, len(members), record)
            _check_gradients(row, xs, node)
            flat = _apply(call, [x for mine in xs for x in mine])
            for i, rank in enumerate(members):
                ys = flat[i * len(xs[0]) : (i + 1) * len(xs[0])]
                values[rank] = tuple(ys) if many else ys[0]
        return values

    def record(
        self,
        node: fx.Node,
        path: str,
        group: str,
        ranks: int,
        kind: str,
        direction: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Note one collective, if somebody asked for them."""
        if self.recorder is not None:
            sent = sent_bytes(kind, math.prod(shape), dtype.itemsize, ranks)
            self.recorder.rows.append(Row(kind, direction, sent, shape, dtype, ranks, group, node, path))


def _arguments(
    nodes: Sequence[fx.Node], envs: Sequence[dict[fx.Node, Any]]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a node on each rank."""
    return [
        cast(
            "tuple[tuple[Any, ...], dict[str, Any]]",
            fx.map_arg(cast("Any", resolve((each.args, each.kwargs), rank)), env.__getitem__),
        )
        for rank, (each, env) in enumerate(zip(nodes, envs, strict=True))
    ]


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _last_uses(nodes: Sequence[fx.Node]) -> list[list[int]]:
    """For each node the positions of the values that nothing needs after it."""
    position = {node: i for i, node in enumerate(nodes)}
    dying: list[list[int]] = [[] for _ in nodes]
    for node, i in position.items():
        dying[max([i, *(position[user] for user in node.users)])].append(i)
    return dying


def _in_step(functions: Sequence[Callable[..., Any]], arguments: Sequence[Any]) -> list[Any]:
    """Call on each rank; what draws random numbers draws them from the same generator state on each."""
    (args, kwargs), *others = arguments
    if not others:
        return [functions[0](*args, **kwargs)]
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    before = [generator.get_state() for generator in generators]
    values = [functions[0](*args, **kwargs)]
    drawn = [g for g, state in zip(generators, before, strict=True) if not torch.equal(g.get_state(), state)]
    states = [state for g, state in zip(generators, before, strict=True) if g in drawn]
    for function, (args, kwargs) in zip(functions[1:], others, strict=True):
        for generator, state in zip(drawn, states, strict=True):
            generator.set_state(state)
        values.append(function(*args, **kwargs))
    return values


def _where(row: Transition, own: Sequence[Mapping[str, Any]], node: fx.Node) -> tuple[int, Parts]:
    """The dim that the transition works on, and the parts (or the runs) of the members of one group."""
    if "dim" not in own[0]:
        return 0, ()
    ndim = own[0]["x"].ndim
    dims = {each["dim"] % ndim for each in own}
    if "runs" in own[0]:
        return dims.pop(), tuple(each["runs"] for each in own)
    cuts: list[Where | None] = [each["parts"] for each in own]
    if len(dims) != 1 or any(each != cuts[0] for each in cuts):
        raise ValueError(f"{node.format_node()}: members of one group were given different parts")
    (dim,) = dims
    sizes: list[int] = [each["x"].shape[dim] for each in own]
    whole = row.forward in ("cut", "reduce_scatter")
    parts = cuts[0]
    if parts is None:
        parts = sizes[0] if whole else sum(sizes)
    parts = parts_of(parts, len(own))
    expected = [full_size(parts)] * len(own) if whole else [run_length(runs) for runs in parts]
    if sizes != expected:
        raise ValueError(f"{node.format_node()}: sizes {sizes} of dim {dim} where the parts say {expected}")
    check_parts(parts)
    return dim, parts


def _check_gradients(row: Transition, xs: Sequence[Sequence[Tensor]], node: fx.Node) -> None:
    """Real ranks would wait for each other in backward if only some of them had one."""
    asking = {tuple(x.requires_grad for x in mine) for mine in xs}
    if torch.is_grad_enabled() and row.backward in MESSAGES and len(asking) > 1:
        raise ValueError(f"{node.format_node()}: a gradient is required on some ranks and not on others")
