"""Layer granularity: one flat graph becomes a root that calls one module per repeated layer, under the original names.

FSDP, checkpointing, pipelines and per-layer compilation look for their layers; alike layers share one function.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

import torch
import torch.fx
from torch import nn

from tpcompile.bindings import bind_directly
from tpcompile.column_products import call_together
from tpcompile.effects import is_random
from tpcompile.inner import Inner, made_like, not_callable
from tpcompile.recomputation import Region, folded, recompute


class Layer(nn.Module):
    """One repeated layer: its parameters under their original names, and the code of each call of it."""

    def __init__(self, *contents: Any, path: str = "") -> None:
        super().__init__(*contents)
        self._path = path
        self.calls: list[Callable[..., Any]] = []

    def forward(self, call: int, *tensors: torch.Tensor) -> Any:
        """Call number ``call`` (a layer may run several times a step, and in train and eval mode)."""
        if type(call) is not int:  # of a user, who has the arguments of the model's own layer
            raise not_callable(self._path)
        return self.calls[call](self, *tensors)


@dataclass
class Segment:
    """Consecutive nodes of one layer (or of the root, path None)."""

    path: str | None
    nodes: list[torch.fx.Node] = field(default_factory=list[torch.fx.Node])


def repeated_layers(classes: Mapping[str, str]) -> frozenset[str]:
    """Paths of the outermost modules that have numbered siblings of their own class, and modules inside."""
    found: set[str] = set()
    for path, name in classes.items():
        parent, _, last = path.rpartition(".")
        prefix = f"{parent}." if parent else ""
        alike = [p for p in (f"{prefix}{i}" for i in range(2)) if classes.get(p) == name]
        has_inside = any(other.startswith(f"{path}.") for other in classes)
        if last.isdecimal() and len(alike) == 2 and has_inside:
            found.add(path)
    return frozenset(p for p in found if not any(p.startswith(f"{other}.") for other in found))


def nest(graph: torch.fx.Graph, layers: frozenset[str]) -> tuple[torch.fx.Graph, list[tuple[str, torch.fx.Graph]]]:
    """The root graph, and one graph per call of a layer; the root's ``call_module`` nodes pass the call's index in it.

    Attributes are read where they are used; those of another module than the layer's own are passed in.
    """
    root = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    inside: list[tuple[str, torch.fx.Graph]] = []

    def at_root(node: torch.fx.Node) -> torch.fx.Node:
        if node not in env:
            assert node.op == "get_attr", f"{node} is used before it is made"
            env[node] = root.create_node("get_attr", node.target, name=node.name)
        return env[node]

    for segment in segments(graph, layers):
        if segment.path is None:
            for node in segment.nodes:
                if node.op != "get_attr":
                    env[node] = root.node_copy(node, at_root)
            continue
        layer, inputs, outputs = layer_graph(segment)
        call = sum(1 for path, _ in inside if path == segment.path)
        inside.append((segment.path, layer))
        made = root.create_node(
            "call_module", segment.path, (call, *(at_root(x) for x in inputs)), name=segment.path.replace(".", "_")
        )
        if len(outputs) == 1:
            env[outputs[0]] = made
        else:
            for index, node in enumerate(outputs):
                env[node] = root.create_node("call_function", _getitem, (made, index), name=node.name)
    return root, inside


def segments(graph: torch.fx.Graph, layers: frozenset[str]) -> list[Segment]:
    """Runs of nodes of one layer; nodes outside that need nothing of the open layer go in front of it.

    What draws random numbers stays where it is: they are drawn in the order of one device. Sizes are computed outside:
    the trace has each of them once, wherever it is first needed, and alike layers are to stay alike.
    """
    done: list[Segment] = []
    before: list[torch.fx.Node] = []
    current: Segment | None = None
    reached: set[torch.fx.Node] = set()
    moves = not any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in graph.nodes)
    for node in graph.nodes:
        path = next((m for m in node.meta.get("modules") or () if m in layers), None)
        free = not reached & set(node.all_input_nodes)
        if node.op != "call_function" or (free and _is_size(node)):
            path = None
        fixed = node.op == "output" or is_random(node) or not (moves or _is_size(node))
        if current is not None and path is None and free and not fixed:
            before.append(node)
            continue
        if current is None or path != current.path:
            if current is not None:
                done += [Segment(None, before), current]
            current, before, reached = (Segment(path) if path else None), [], set()
            if path is None:
                done.append(Segment(None, [node]))
                continue
        assert current is not None
        current.nodes.append(node)
        reached.add(node)
    return done


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def layer_graph(segment: Segment) -> tuple[torch.fx.Graph, list[torch.fx.Node], list[torch.fx.Node]]:
    """Code of one call, with names that alike layers share; what it is passed; what it gives."""
    own = set(segment.nodes)
    prefix = f"{segment.path}."
    graph = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    inputs = list(dict.fromkeys(x for n in segment.nodes for x in n.all_input_nodes if x not in own))
    passed = [x for x in inputs if not (x.op == "get_attr" and str(x.target).startswith(prefix))]
    for index, node in enumerate(passed):
        env[node] = graph.placeholder(f"input_{index}")
    for node in inputs:
        if node not in env:
            target = str(node.target).removeprefix(prefix)
            env[node] = graph.create_node("get_attr", target, name=target.replace(".", "_"))
    for node in segment.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda x: env[x])
        name = re.sub(r"_\d+$", "", node.name)
        env[node] = graph.create_node(node.op, node.target, args, kwargs, name=name)  # pyright: ignore[reportArgumentType]
        env[node].meta = dict(node.meta)
    outputs = [n for n in segment.nodes if any(u not in own for u in n.users)]
    results = tuple(env[n] for n in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph, passed, outputs


def _getitem(values: Any, index: int) -> Any:
    return values[index]


class Functions:
    """Makes a Python function of a graph; graphs with the same code share one."""

    def __init__(self) -> None:
        self._made: dict[str, Callable[..., Any]] = {}
        self._again: dict[tuple[Callable[..., Any], bool, bool], Callable[..., Any]] = {}

    def of(self, graph: torch.fx.Graph, training: bool = False) -> Callable[..., Any]:
        """``forward(self, ...)`` of the graph, reading parameters from ``self``; regions of it are recomputed.

        In ``training`` products of one activation are made together, at the cost of holding them together.
        """
        graph = folded(graph, partial(self._recomputed, training))
        if training:
            call_together(graph)
        _look_up_directly(graph)
        bind_directly(graph)
        code = graph.python_code("self")
        key = code.src + "".join(f"{k}={id(v)}" for k, v in sorted(code.globals.items()))
        if key not in self._made:
            file = f"<tpcompile {sha256(key.encode()).hexdigest()[:12]}>"
            linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
            space: dict[str, Any] = dict(code.globals)
            exec(compile(code.src, file, "exec"), space)
            self._made[key] = space["forward"]
        return self._made[key]

    def _recomputed(self, training: bool, graph: torch.fx.Graph, region: Region) -> Callable[..., Any]:
        """What runs a region's graph; it reads nothing from ``self``."""
        function = self.of(graph, training)
        key = (function, region.random, region.regathers)
        if key not in self._again:

            def recomputed(*args: Any) -> Any:
                return recompute(function, region, None, *args)

            self._again[key] = recomputed
        return self._again[key]


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer at a dotted name, as it is now."""
    *path, last = name.split(".")
    return tensor_in(module, path, last)


def tensor_in(module: nn.Module, path: Sequence[str], last: str) -> torch.Tensor:
    """:func:`tensor_at`, with a name that is parted already.

    ``nn.Module.__getattr__``, which is asked for every part of the name otherwise, takes as long as a small kernel.
    """
    at: Any = module
    try:
        for part in path:
            at = at._modules[part]
        return at._parameters[last] if last in at._parameters else at._buffers[last]
    except KeyError:  # parametrized, pruned, behind a wrapper: whatever else the attribute may be
        return getattr(module.get_submodule(".".join(path)), last)


def call_layer(module: nn.Module, path: Sequence[str], *args: Any) -> Any:
    """Call the layer at a path, found as :func:`tensor_at` finds tensors."""
    at: Any = module
    try:
        for part in path:
            at = at._modules[part]
    except KeyError:
        at = module.get_submodule(".".join(path))
    return at(*args)


def _look_up_directly(graph: torch.fx.Graph) -> None:
    """Use ``tensor_in`` and ``call_layer`` for what ``graph`` asks of its module, in place."""
    found = [node for node in graph.nodes if node.op in ("get_attr", "call_module")]
    if not found:
        return
    with graph.inserting_before(next(iter(graph.nodes))):
        module = graph.placeholder("self")
    for node in found:
        path = str(node.target).split(".")
        given = ((*path[:-1],), path[-1]) if node.op == "get_attr" else ((*path,), *node.args)
        function = tensor_in if node.op == "get_attr" else call_layer
        node.op, node.target, node.args = "call_function", function, (module, *given)


def read_outside(graph: torch.fx.Graph, layers: frozenset[str]) -> list[str]:
    """Names of layers' tensors that code outside of their layer reads, where :func:`nest` parts ``graph``."""
    root, _ = nest(graph, layers)
    read = [str(node.target) for node in root.nodes if node.op == "get_attr" and node.users]
    return [name for name in read if any(name.startswith(f"{layer}.") for layer in layers)]


def module_at(root: nn.Module, path: str, layers: Iterable[str], model: nn.Module | None = None) -> nn.Module:
    """The module at a dotted path, made on the way: a :class:`Layer` where a layer belongs, else an :class:`Inner`.

    What is a container (a ModuleList) in ``model`` is made as one.
    """
    module: Any = root
    original: Any = model
    walked = ""
    for part in path.split(".") if path else ():
        walked = f"{walked}.{part}" if walked else part
        original = None if original is None else original._modules.get(part)
        if part not in module._modules:  # written there: a part may have the name of a method of the compiled module
            kind = Layer if walked in layers else Inner
            module._modules[part] = made_like(kind, walked, original).train(module.training)
        module = module._modules[part]
    return module


def install(
    module: nn.Module, graph: torch.fx.Graph, layers: frozenset[str], functions: Functions, training: bool = False
) -> Callable[..., Any]:
    """Give layers the code of their calls in ``graph``; returns the function of the rest, which takes ``module``."""
    root, inside = nest(graph, layers)
    first: dict[str, int] = {}
    for path, code in inside:
        layer = module_at(module, path, layers)
        assert isinstance(layer, Layer)
        first.setdefault(path, len(layer.calls))
        layer.calls.append(functions.of(code, training))
    for node in root.nodes:
        if node.op == "call_module":
            call, *tensors = node.args
            node.args = (call + first[str(node.target)], *tensors)  # type: ignore[operator]
    return functions.of(root, training)


__all__ = [
    "Functions",
    "Layer",
    "call_layer",
    "install",
    "layer_graph",
    "module_at",
    "nest",
    "read_outside",
    "repeated_layers",
    "segments",
    "tensor_at",
]
