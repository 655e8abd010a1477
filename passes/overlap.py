"""Communication behind computation: a product whose partial sums are added up over the ranks is made in pieces.

The positions (or the batch) are split in ``options.overlap`` pieces; the sum of one is started when it is made and
travels while the next is multiplied (Wang et al. 2024, Domino, arXiv:2409.15241). The pieces are waited for where the
whole is read first. Every element is the same sum of the same products as without; only the gradient of
the weight is now a sum of one term per piece.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import sympy
import torch
import torch.fx

from tpcompile import collectives, kernels
from tpcompile.errors import ShardingError
from tpcompile.layers import repeated_layers
from tpcompile.layout import axes_of
from tpcompile.program import Program, copy_graph, where
from tpcompile.rules import op_name

PRODUCTS = frozenset({"aten.linear.default", "aten.mm.default", "aten.matmul.default"})
cast = torch.ops.aten.to.dtype


def overlap(program: Program) -> Program:
    """Split every product that one reduction alone reads.

    Raises:
        ShardingError: no dim of a product is whole on every rank and long enough.
    """
    pieces = program.options.overlap
    if pieces < 2:
        return program
    module, graph = copy_graph(program.graph_module)
    layers = repeated_layers(program.captured.module_classes)
    found = 0
    for node in list(graph.nodes):
        chain = _chain(node)
        if chain:
            _split(program, graph, node, chain, pieces, layers)
            found += 1
    if not found and program.degree > 1:
        warnings.warn("overlap has no effect: no sum over the ranks follows a product directly", stacklevel=2)
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


def _chain(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The product, and the cast behind it if there is one, whose results the reduction ``node`` alone reads."""
    if node.target not in (collectives.all_reduce, collectives.reduce_scatter):
        return []
    chain: list[torch.fx.Node] = [node.all_input_nodes[0]]
    if chain[0].target is cast:
        chain.insert(0, chain[0].all_input_nodes[0])
    if any(len(x.users) != 1 or x.op != "call_function" for x in chain) or op_name(chain[0]) not in PRODUCTS:
        return []
    weight: Any = chain[0].args[1]
    return chain if len(chain[0].args) == 2 and weight.meta["val"].dim() == 2 else []


def _split(
    program: Program,
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    chain: list[torch.fx.Node],
    pieces: int,
    layers: frozenset[str],
) -> None:
    given: Any = chain[0].args[0]
    dim = _dim(program, node, given, pieces)
    first = _first_reader(node, layers)
    with graph.inserting_before(node):
        parts = _new(graph, node, kernels.split_evenly, (given, dim, pieces), placed=given)
        begun: list[torch.fx.Node] = []
        for index in range(pieces):
            made = _new(graph, node, operator.getitem, (parts, index), placed=given)
            for step in chain:
                made = _new(graph, step, step.target, (made, *step.args[1:]), step.kwargs)
            kwargs = {**node.kwargs, "pending": True}
            begun.append(_new(graph, node, node.target, (made, *node.args[1:]), kwargs, val=made.meta["val"]))
    with graph.inserting_before(first):
        done = [_new(graph, node, collectives.wait, (x,), val=x.meta["val"]) for x in begun]
        whole = _new(graph, node, torch.ops.aten.cat.default, (done, dim), val=node.meta["val"])
    node.replace_all_uses_with(whole)
    for gone in (node, *reversed(chain)):
        graph.erase_node(gone)


def _dim(program: Program, node: torch.fx.Node, given: torch.fx.Node, pieces: int) -> int:
    """The longest dim of the operand, at the example inputs, that every rank holds whole and the product keeps."""
    value, placed = given.meta["val"], given.meta["placement"]
    scattered = int(node.args[1]) % value.dim() if node.target is collectives.reduce_scatter else -1  # type: ignore[arg-type]
    sizes = [_size(n, program) for n in value.shape]
    free = [d for d in range(value.dim() - 1) if d != scattered and not axes_of(placed.dims[d])]
    free = [d for d in free if sizes[d] >= pieces]
    if not free:
        raise ShardingError(
            f"{op_name(node)} cannot be overlapped: its product of shape {sizes} has no dim to make {pieces} pieces of",
            where=where(node),
            why="a piece is a part of a dim that every rank holds whole, and at least that long"
            + (f"; dim {scattered} is scattered over the ranks" if scattered >= 0 else ""),
            help="compile with a larger batch, fewer pieces, or without overlap",
        )
    return max(free, key=lambda d: (sizes[d], -d))


def _first_reader(node: torch.fx.Node, layers: frozenset[str]) -> torch.fx.Node:
    """The first user of a value, if it is in the same layer; else what follows the value."""
    home = _layer(node, layers)
    following: torch.fx.Node = node.next
    reader = following
    while reader.op != "output" and reader not in node.users:
        reader = reader.next
    return reader if reader in node.users and _layer(reader, layers) == home else following


def _layer(node: torch.fx.Node, layers: frozenset[str]) -> str | None:
    return next((m for m in node.meta.get("modules") or () if m in layers), None)


def _new(
    graph: torch.fx.Graph,
    like: torch.fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Any = None,
    *,
    placed: torch.fx.Node | None = None,
    val: Any = None,
) -> torch.fx.Node:
    """A call at the place in the model of ``like``, with its placement or that of ``placed``."""
    made = graph.call_function(target, args, kwargs or {})
    made.meta = dict(like.meta)
    if val is None:
        with torch.no_grad():
            val = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]), **(kwargs or {}))
    made.meta["val"] = val
    if placed is not None:
        placement = placed.meta["placement"]
        made.meta["placement"] = (placement,) * len(val) if isinstance(val, tuple) else placement
    return made


def _size(n: int | torch.SymInt, program: Program) -> int:
    sizes: dict[sympy.Symbol, int] = dict(program.sizes)
    return int(n.node.expr.xreplace(sizes)) if isinstance(n, torch.SymInt) else n


__all__ = ["overlap"]
