"""Local identities of a rewritten graph, each written as two plain functions of the same variables::

    def before(x, y, group):
        return aten.add.Tensor(all_reduce(x, group), all_reduce(y, group))

    def after(x, y, group):
        return all_reduce(aten.add.Tensor(x, y), group)

A variable stands for a node or for a literal argument, everywhere for the same one. Tensors that ``before`` makes on
the way have no other user, and arguments that it does not write have their defaults. ``after`` is called with what the
variables stand for, so it may compute with literals. (fx's SubgraphMatcher captures no literals and gives no reasons.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.fx
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.overrides import TorchFunctionMode

from tpcompile.collectives import transition_of
from tpcompile.per_rank import PerRank
from tpcompile.placement import Placement, PlacementError, solve
from tpcompile.program import Program
from tpcompile.rules import RULES, op_name
from tpcompile.sentence import is_tensor

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits: what its variables stand for, and the nodes that it replaces, the root last."""

    values: Mapping[str, Any]
    nodes: tuple[torch.fx.Node, ...]

    @property
    def root(self) -> torch.fx.Node:
        """The node whose value ``after`` computes."""
        return self.nodes[-1]

    def __getitem__(self, variable: str) -> Any:
        return self.values[variable]


@dataclass(frozen=True)
class Pattern:
    """``before(...)`` is ``after(...)``. ``unless`` gives the reason why it may not be at some place, or None."""

    name: str
    before: Callable[..., Any]
    after: Callable[..., Any]
    unless: Callable[[Match], str | None] | None = None


def leaf(function: Callable[P, T]) -> Callable[P, T]:
    """A Python function as patterns call it: one node of the graph that is being written (ops need no such help)."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return cast("T", proxy.tracer.create_proxy("call_function", function, args, kwargs))

    return call


class _Writer(GraphAppendingTracer):
    """Appends the calls of a pattern's function to a graph, named after their ops."""

    def __init__(self, graph: torch.fx.Graph):
        super().__init__(graph)
        self.made: list[torch.fx.Node] = []

    def create_arg(self, a: Any) -> Any:
        return a if isinstance(a, PerRank) else super().create_arg(a)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> torch.fx.Node:
        defaults = _defaults(target)
        kwargs = {k: v for k, v in kwargs.items() if k not in defaults or not _same(v, defaults[k])}
        node = self.graph.create_node(kind, target, args, kwargs, _short_name(target), type_expr)
        self.made.append(node)
        return node


class _Written(TorchFunctionMode):
    """While it is open, every op that is called is written to the graph, those that take no tensor too."""

    def __init__(self, writer: _Writer):
        super().__init__()
        self.writer = writer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "overloadpacket", None) is None:  # a size is asked for
            return func(*args, **(kwargs or {}))
        return self.writer.create_proxy("call_function", func, args, kwargs or {})


def _short_name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    return str(packet.__name__).strip("_")


@lru_cache(maxsize=1024)
def _defaults(target: Any) -> Mapping[str, Any]:
    """Parameters of a function or an op in order; what has no default has itself (``inspect.Parameter.empty``)."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        empty = inspect.Parameter.empty
        return {a.name: a.default_value if a.has_default_value() else empty for a in schema.arguments}
    try:
        return {name: p.default for name, p in inspect.signature(target).parameters.items()}
    except (TypeError, ValueError):  # a builtin without a signature: positional arguments only
        return {}


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in."""
    found = dict(_defaults(node.target))
    names = list(found)
    for i, value in enumerate(node.args):
        found[names[i] if i < len(names) else str(i)] = value
    return found | node.kwargs


def _same(a: Any, b: Any) -> bool:
    """Equality of literals: lists are tuples, but True is not 1 and 1 is not 1.0."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        left, right = cast("Sequence[Any]", a), cast("Sequence[Any]", b)
        return len(left) == len(right) and all(map(_same, left, right))
    return a is b or (type(a) is type(b) and bool(a == b))


def write(
    graph: torch.fx.Graph, function: Callable[..., Any], values: Mapping[str, Any]
) -> tuple[torch.fx.Node, list[torch.fx.Node]]:
    """Call a pattern's function on nodes of ``graph`` and literals: the node of its result, and all new ones."""
    writer = _Writer(graph)
    proxies = torch.fx.map_arg(dict(values), lambda n: Proxy(n, writer))  # pyright: ignore[reportArgumentType]
    with _Written(writer):
        result = function(**proxies)
    return result.node, writer.made


@lru_cache(maxsize=256)
def _traced(before: Callable[..., Any]) -> torch.fx.Node:
    """The root of ``before`` as a graph, whose placeholders are the variables."""
    graph = torch.fx.Graph()
    root, _ = write(graph, before, {name: graph.placeholder(name) for name in inspect.signature(before).parameters})
    graph.output(root)  # the nodes live as long as their graph
    return root


class _Mismatch(Exception):
    """The pattern does not fit; the message says where and why."""


class _Matcher:
    """One attempt to lay a pattern over the calls that end in a node."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.nodes: dict[torch.fx.Node, torch.fx.Node] = {}  # the pattern's node -> the graph's, operands first

    def node(self, want: torch.fx.Node, have: Any, place: str) -> None:
        if want.op == "placeholder":
            variable = str(want.target)
            if not _same(self.values.setdefault(variable, have), have):
                raise _Mismatch(f"{variable} is {_shown(self.values[variable])}, but {place} is {_shown(have)}")
            return
        if not isinstance(have, torch.fx.Node) or have.op != "call_function" or have.target != want.target:
            raise _Mismatch(f"{place} is {_shown(have)}, not a call of {op_name(want)}")
        if want in self.nodes:
            if self.nodes[want] is not have:
                raise _Mismatch(f"{place} is {_shown(have)}, not {_shown(self.nodes[want])}")
            return
        wanted, given = _arguments(want), _arguments(have)
        for name in dict.fromkeys([*wanted, *given]):
            self.argument(wanted.get(name), given.get(name), f"{name} of {have.name}")
        self.nodes[want] = have

    def argument(self, want: Any, have: Any, place: str) -> None:
        if isinstance(want, torch.fx.Node):
            self.node(want, have, place)
        elif isinstance(want, (list, tuple)) and isinstance(have, (list, tuple)):
            wanted, given = cast("Sequence[Any]", want), cast("Sequence[Any]", have)
            if len(wanted) != len(given):
                raise _Mismatch(f"{place} has {len(given)} items, not {len(wanted)}")
            for i, (a, b) in enumerate(zip(wanted, given, strict=True)):
                self.argument(a, b, f"item {i} of {place}")
        elif not _same(want, have):
            raise _Mismatch(f"{place} is {_shown(have)}, not {_shown(want)}")


def _shown(value: Any) -> str:
    if isinstance(value, torch.fx.Node):
        return f"{value.name} = {op_name(value)}" if value.op == "call_function" else f"{value.name} ({value.op})"
    return "not given" if value is inspect.Parameter.empty else repr(value)


def _attempt(pattern: Pattern, node: torch.fx.Node) -> Match:
    matcher = _Matcher()
    matcher.node(_traced(pattern.before), node, "the last call")
    match = Match(matcher.values, tuple(matcher.nodes.values()))
    for inside in match.nodes[:-1]:
        other = next((u for u in inside.users if u not in match.nodes), None)
        if other is not None and is_tensor(inside):
            raise _Mismatch(f"{inside.name} has another user, {other.name}")
    reason = pattern.unless(match) if pattern.unless is not None else None
    if reason is not None:
        raise _Mismatch(reason)
    return match


def match(pattern: Pattern, node: torch.fx.Node) -> Match | None:
    """Where ``pattern`` fits with ``node`` as its last call, or None."""
    try:
        return _attempt(pattern, node)
    except _Mismatch:
        return None


def explain(pattern: Pattern, node: torch.fx.Node) -> str:
    """Why ``pattern`` does not fit ``node``, or that it does."""
    try:
        return f"{pattern.name!r} fits {node.name}: it takes {', '.join(n.name for n in _attempt(pattern, node).nodes)}"
    except _Mismatch as mismatch:
        return f"{pattern.name!r} does not fit {node.name}: {mismatch}"


def rewrite(
    graph: torch.fx.Graph,
    patterns: Iterable[Pattern],
    program: Program,
    untouched: frozenset[torch.fx.Node] = frozenset(),
) -> None:
    """Apply ``patterns`` to ``graph`` until none fits; ``program`` is what the graph is of.

    Nodes in ``untouched`` are neither replaced nor read.
    """
    by_target: dict[Any, list[Pattern]] = {}
    for pattern in patterns:
        by_target.setdefault(_traced(pattern.before).target, []).append(pattern)
    gone: set[torch.fx.Node] = set()
    count, sweeps = -1, len(graph.nodes)
    while count != len(gone):
        count, sweeps = len(gone), sweeps - 1
        assert sweeps >= 0, "what a pattern writes is matched again, without end"
        for node in list(graph.nodes):
            for pattern in by_target.get(node.target, ()) if node.op == "call_function" and node not in gone else ():
                found = match(pattern, node)
                if found is not None and not untouched & {*found.nodes, *_nodes_in(found.values)}:
                    gone.update(_apply(graph, pattern, found, program))
                    break


def _nodes_in(values: Mapping[str, Any]) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.map_arg(dict(values), found.append)  # pyright: ignore[reportArgumentType]
    return found


def _apply(graph: torch.fx.Graph, pattern: Pattern, found: Match, program: Program) -> list[torch.fx.Node]:
    """Write ``after`` in front of the root, and return the nodes that are erased for it."""
    root = found.root
    with graph.inserting_before(root):
        result, new = write(graph, pattern.after, found.values)
    for made in new:
        _describe(made, root, made is result, program)
    root.replace_all_uses_with(result)
    erased: list[torch.fx.Node] = []
    for node in reversed(found.nodes):
        if not node.users:
            graph.erase_node(node)
            erased.append(node)
    return erased


def _describe(made: torch.fx.Node, root: torch.fx.Node, last: bool, program: Program) -> None:
    """Metadata of a new node: the last one has the root's value; what leads to it is typed by the op's own rule."""
    made.meta = dict(root.meta)
    if last:
        return
    made.meta.pop("placement", None)
    if transition_of(made.target) is not None:  # the whole value stays what it is
        made.meta["val"] = made.all_input_nodes[0].meta["val"]
        return
    args, kwargs = torch.fx.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        made.meta["val"] = cast("Callable[..., Any]", made.target)(*args, **cast("dict[str, Any]", kwargs))
    rule = RULES.get(op_name(made))
    if is_tensor(made) and rule is not None:
        call = program.call(made)
        placed = [x.meta.get("placement") for x in call.operands]
        ins = [p for p in placed if isinstance(p, Placement)]
        if len(ins) == len(placed):
            with suppress(ValueError, PlacementError):  # the rule has no sentence for this form of the op
                made.meta["placement"] = solve(rule.sentence(call), ins, program.mesh, keep=True).results[0]


__all__ = ["Match", "Pattern", "explain", "leaf", "match", "rewrite", "write"]
