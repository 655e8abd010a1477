"""Ops that write into their operand become ordinary ones, and writes through views become new values of the base.

``x.add_(y)`` is ``x + y`` where nothing else that shares x's memory is read afterwards. Else the write is carried up
the views to the value that owns the memory (a slice that is written is a concatenation of what stands before it, the
new part and what stands after it), and views that are read later are taken again. What writes into an input, a
parameter or a buffer, or through a view that cannot be undone, stays as it is.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from tpcompile.aliasing import aliases, functional_overload, holders, is_inplace, may_share, storages, viewed
from tpcompile.effects import drop_dead
from tpcompile.program import Program, copy_graph
from tpcompile.rules import op_name
from tpcompile.sentence import argument
from tpcompile.site import Site

aten = torch.ops.aten


def functionalize(program: Program) -> Program:
    """Take writes out of the graph wherever that is possible."""
    if not any(n.op == "call_function" and is_inplace(n) for n in program.graph.nodes):
        return program
    module, graph = copy_graph(program.graph_module)
    if any(op_name(n) in _MAY_COPY for n in graph.nodes if n.op == "call_function"):
        _part_copies(program, graph)
    writes = _Writes(program, graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and is_inplace(node):
            writes.take_out(node)
    _drop_copies(graph)
    drop_dead(graph)
    module.recompile()
    return program.with_(graph_module=module)


def _part_copies(program: Program, graph: torch.fx.Graph) -> None:
    """What was copied where the graph was traced, as a reshape may copy, is a copy whatever its operand becomes, if it
    or that is written afterwards: its operand's strides may be others when earlier writes have been taken out."""
    held, written = holders(graph), list[tuple[torch.fx.Node, set[torch.fx.Node]]]()
    for node in graph.nodes:
        if node.op == "call_function" and is_inplace(node):
            written.append((node, aliases(node.args[0], held)))
    candidates = [x for x in graph.nodes if x.op == "call_function" and op_name(x) in _MAY_COPY]
    asked = [x for x in candidates if any(x < node and x in family for node, family in written)]
    for node in filter(_copies, asked):
        with graph.inserting_after(node):
            copied = Site(program, graph, node).emit(aten.clone.default, node)
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)


def _copies(node: torch.fx.Node) -> bool:
    """Whether the op copies its operand as it lies in memory where the graph was traced."""
    target: Any = node.target
    given: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        made: torch.Tensor = target(*given[0], **given[1])
    return made.untyped_storage()._cdata != given[0][0].untyped_storage()._cdata


def _drop_copies(graph: torch.fx.Graph) -> None:
    """Inputs that were copied only to be written to (the keys of a static cache) are read themselves, if nothing is."""
    if any(n.op == "call_function" and is_inplace(n) for n in graph.nodes):
        return
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        source = node.args[0]
        shared = any(user.op == "output" or may_share(user) for user in node.users)
        if source.op == "placeholder" and not node.kwargs and not shared:
            node.replace_all_uses_with(source)


class _Writes:
    def __init__(self, program: Program, graph: torch.fx.Graph):
        self.program, self.graph = program, graph
        self.held = holders(graph)
        self.within = {n for n in graph.nodes if may_share(n) and not is_inplace(n) and _lies_in(n, viewed(n))}

    def take_out(self, node: torch.fx.Node) -> None:
        """Make a write an ordinary op, if what shares the memory can be told."""
        base = node.args[0]
        assert isinstance(base, torch.fx.Node)
        family = aliases(base, self.held)
        if any(n.op in ("get_attr", "placeholder") for n in family):
            return
        later = {n: [u for u in n.users if node < u] for n in family if n < node}
        others = [n for n, users in later.items() if n is not base and users]
        site, last = Site(self.program, self.graph, node), node.prev
        with self.graph.inserting_before(node):
            if not others:
                made = _written(site)
                replaced = {} if made is None else {base: made}
            else:
                replaced = self._through_views(site, base, others)
        while (last := last.next) is not node:
            if may_share(last) and _lies_in(last, viewed(last)):
                self.within.add(last)
        if not replaced:
            return
        for old, new in replaced.items():
            for user in later[old]:
                user.replace_input_with(old, new)
        node.replace_all_uses_with(replaced[base])
        self.graph.erase_node(node)
        self.held = {storage: [n for n in nodes if n is not node] for storage, nodes in self.held.items()}

    def _through_views(
        self, site: Site, base: torch.fx.Node, others: list[torch.fx.Node]
    ) -> dict[torch.fx.Node, torch.fx.Node]:
        """New values of ``base`` and of ``others``, which share its memory; empty when that cannot be said."""
        if site.node.meta.get("no_grad"):
            return {}
        chains = {n: _chain(n) for n in (base, *others)}
        if len({chain[0] for chain in chains.values()}) != 1:
            return {}
        if any(view not in self.within for chain in chains.values() for view in chain[1:]):
            return {}  # a reshape that may have been a copy
        written = chains[base]
        if any(op_name(view) not in _UNDONE for view in written[1:]):
            return {}
        made = _written(site)
        if made is None:
            return {}
        for parent, view in zip(reversed(written[:-1]), reversed(written[1:]), strict=True):
            made = _UNDONE[op_name(view)](_Undo(site, view, parent), made)
        new = {written[0]: made}
        for chain in chains.values():  # views of the new value, so that the next write through one of them is seen too
            for parent, view in itertools.pairwise(chain):
                if view not in new:
                    args, kwargs = torch.fx.map_arg(  # type: ignore[misc]
                        (view.args, view.kwargs), lambda n, p=parent: new[p] if n is p else n
                    )
                    new[view] = site.emit(view.target, *args, **kwargs)
        return {n: new[n] for n in chains}


def _lies_in(view: torch.fx.Node, parents: list[torch.fx.Node]) -> bool:
    """Whether a view was really taken, and not a copy, where the graph was traced."""
    if op_name(view) in _ALWAYS_VIEWS:
        return len(parents) == 1
    return len(parents) == 1 and set(storages(view)) <= set(storages(parents[0]))


def _written(site: Site) -> torch.fx.Node | None:
    """What the operand holds afterwards, as a value of its own."""
    base, value = site.node.args[0], site.node.meta["val"]
    assert isinstance(base, torch.fx.Node)
    match op_name(site.node):
        case "aten.copy_.default":
            source = site.arg("src")
            if site.shape(source) != site.shape(base):
                sizes = [site.emit(aten.sym_size.int, base, d) for d in range(value.dim())]
                source = site.emit(aten.expand.default, source, sizes)
            if source.meta["val"].dtype != value.dtype:
                source = site.emit(aten.to.dtype, source, value.dtype)
            # memory of its own: what is written to one of the two later must not reach the other
            return site.emit(aten.clone.default, source, memory_format=torch.contiguous_format)
        case "aten.zero_.default":
            return site.emit(aten.zeros_like.default, base)
        case _:
            functional = functional_overload(site.node)
            return None if functional is None else site.emit(functional, *site.node.args, **site.node.kwargs)


def _chain(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The value that owns the memory, and the views that lead from it to ``node``."""
    chain = [node]
    while may_share(chain[0]):
        chain.insert(0, viewed(chain[0])[0])
    return chain


class _Undo:
    """A view of ``parent``, to be put back."""

    def __init__(self, site: Site, view: torch.fx.Node, parent: torch.fx.Node):
        self.site, self.view, self.parent = site, view, parent

    def arg(self, name: str) -> Any:
        return argument(self.view, name)

    def dim(self, name: str = "dim") -> int:
        return int(self.arg(name)) % self.parent.meta["val"].dim()

    def emit(self, target: Any, *args: Any) -> torch.fx.Node:
        return self.site.emit(target, *args)


def _reshaped(undo: _Undo, new: torch.fx.Node) -> torch.fx.Node:
    value = undo.parent.meta["val"]
    sizes = [
        n if isinstance(n, int) else undo.emit(aten.sym_size.int, undo.parent, d) for d, n in enumerate(value.shape)
    ]
    return undo.emit(aten.reshape.default, new, sizes)


def _transposed(undo: _Undo, new: torch.fx.Node) -> torch.fx.Node:
    return undo.emit(aten.transpose.int, new, undo.arg("dim0"), undo.arg("dim1"))


def _permuted(undo: _Undo, new: torch.fx.Node) -> torch.fx.Node:
    dims = [int(d) % len(undo.arg("dims")) for d in undo.arg("dims")]
    return undo.emit(aten.permute.default, new, [dims.index(d) for d in range(len(dims))])


def _selected(undo: _Undo, new: torch.fx.Node) -> torch.fx.Node:
    dim, at = undo.dim(), undo.arg("index")
    new = undo.emit(aten.unsqueeze.default, new, dim)
    if not isinstance(at, int):
        return undo.emit(aten.slice_scatter.default, undo.parent, new, dim, at, undo.emit(operator.add, at, 1))
    return _spliced(undo, new, dim, at, at + 1 if at != -1 else None)


def _sliced(undo: _Undo, new: torch.fx.Node) -> torch.fx.Node:
    dim = undo.dim()
    low, high, step = undo.arg("start"), undo.arg("end"), undo.arg("step")
    if isinstance(high, int) and high >= sys.maxsize:
        high = None
    ordered = high is None or low in (None, 0) or (_known(low, high) and (low < 0) == (high < 0) and low <= high)
    if step not in (None, 1) or not _known(low, high) or not ordered:
        return undo.emit(aten.slice_scatter.default, undo.parent, new, dim, low, high, step or 1)
    return _spliced(undo, new, dim, low or 0, high)


def _known(*bounds: Any) -> bool:
    return all(bound is None or isinstance(bound, int) for bound in bounds)


def _spliced(undo: _Undo, new: torch.fx.Node, dim: int, low: int, high: int | None) -> torch.fx.Node:
    """``parent`` with its positions ``low`` to ``high`` (Python's bounds, in order) replaced."""
    n = undo.parent.meta["val"].shape[dim]
    if isinstance(n, int):
        low, high = min(max(low + n if low < 0 else low, 0), n), n if high is None else high
        high = max(min(high + n if high < 0 else high, n), low)
        high = None if high == n else high
    parts = [undo.emit(aten.slice.Tensor, undo.parent, dim, 0, low)] if low else []
    parts.append(new)
    if high is not None:
        parts.append(undo.emit(aten.slice.Tensor, undo.parent, dim, high, sys.maxsize))
    return undo.emit(aten.cat.default, parts, dim) if len(parts) > 1 else new


_ALWAYS_VIEWS = frozenset(
    {
        "aten.alias.default",
        "aten.permute.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.transpose.int",
        "aten.unsqueeze.default",
        "aten.view.default",
    }
)
"""Ops that never copy, whatever the strides (reshape and flatten may)."""
_MAY_COPY = frozenset({"aten.reshape.default", "aten.flatten.using_ints", "aten.contiguous.default"})
"""Ops that view or copy, as the strides of their operand ask for."""
_UNDONE: dict[str, Callable[[_Undo, torch.fx.Node], torch.fx.Node]] = {
    **dict.fromkeys(
        (
            "aten.view.default",
            "aten.reshape.default",
            "aten.flatten.using_ints",
            "aten.unflatten.int",
            "aten.unsqueeze.default",
            "aten.squeeze.dim",
            "aten.squeeze.dims",
            "aten.squeeze.default",
        ),
        _reshaped,
    ),
    "aten.transpose.int": _transposed,
    "aten.permute.default": _permuted,
    "aten.select.int": _selected,
    "aten.slice.Tensor": _sliced,
    "aten.alias.default": lambda _, new: new,
}
"""How a new value of a view becomes a new value of what it views."""

__all__ = ["functionalize"]
