"""Recomputation: which nodes are run again in backward, so that autograd keeps their inputs instead of what they make.

``layers`` is full recomputation: every call of a repeated layer. ``attention`` is the selective recomputation of
Korthikanti et al. (2022), section 5: from the product of q and k to the product with v, found from the softmax between
them; fused attention keeps no scores, so nothing of it is run again. A region ends with the last node that autograd
keeps something for: what follows is not needed again, and neither is its collective. This pass only puts the nodes of
a region next to each other and marks them (``tpcompile/recomputation.py``).
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Sequence

import torch
import torch.fx

from tpcompile import collectives
from tpcompile.collectives import transition_of
from tpcompile.effects import has_effect, is_random
from tpcompile.errors import ShardingError, TpcompileError
from tpcompile.layers import repeated_layers, segments
from tpcompile.program import Program, copy_graph, where
from tpcompile.recomputation import GATHER, MARK
from tpcompile.rules import op_name
from tpcompile.sentence import tensor_operands


def _ops(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in names.split())


SOFTMAX = _ops("softmax.int _softmax _safe_softmax")
PRODUCTS = _ops("matmul bmm mm mv baddbmm addmm linear einsum scaled_dot_product_attention conv1d conv2d _grouped_mm")
CHEAP = _ops(
    "view reshape transpose.int permute unsqueeze squeeze.dim expand contiguous clone slice.Tensor select.int "
    "mul.Scalar div.Scalar to.dtype _to_copy repeat_interleave.self_int logical_not bitwise_not new_ones tril"
)
"""Ops in front of the products that are run again too: what they are given is no larger than what they make."""


def recompute(program: Program) -> Program:
    """Mark what ``options.recompute`` asks for; raises ShardingError for what cannot be run twice."""
    if program.options.recompute is None:
        return program
    module, graph = copy_graph(program.graph_module)
    mutable = any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in graph.nodes)
    found = (
        _layers(program, graph)
        if program.options.recompute == "layers"
        else _cores(graph, mutable) + _gathers(graph, mutable)
    )
    if not found and not (program.options.recompute == "attention" and _is_fused(graph)):
        what = "no repeated layers" if program.options.recompute == "layers" else "no softmax between two products"
        warnings.warn(f"recompute={program.options.recompute!r} has no effect: the graph has {what}", stacklevel=2)
    savers = _savers(program)
    for name, nodes in [(name, _without_items(nodes)) for name, nodes in found]:
        for node in nodes:
            if has_effect(node) and not is_random(node):
                raise ShardingError(
                    f"{op_name(node)} cannot be run again in backward: it changes a tensor that outlives the step",
                    where=where(node),
                    why=f"recompute={program.options.recompute!r} runs {name} twice, so it would be changed twice",
                    help='recompute="attention" leaves it alone; or keep these statistics fixed (eval mode)',
                )
        kept = [index for index, node in enumerate(nodes) if savers is None or node.name in savers]
        for node in nodes[: max(kept, default=-1) + 1]:
            node.meta[MARK] = name
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


def _without_items(nodes: list[torch.fx.Node]) -> list[torch.fx.Node]:
    """The nodes but for those that take one tensor out of several made outside: these move to where they are made.

    What a region is given is tensors: those inside of a tuple would be kept without autograd's knowledge.
    """
    own = set(nodes)
    items = {n for n in nodes if n.target is operator.getitem and n.args[0] not in own}
    for node in items:
        (made,) = node.all_input_nodes
        made.append(node)
        node.meta |= {key: made.meta[key] for key in ("module", "modules") if key in made.meta}
    return [node for node in nodes if node not in items]


def _savers(program: Program) -> frozenset[str] | None:
    """Nodes that autograd keeps something for, parameters included; None where that depends on data."""
    from tpcompile.activations import savers  # it runs programs, which is more than passes know

    try:
        return savers(program)
    except TpcompileError:
        return None


def _layers(program: Program, graph: torch.fx.Graph) -> list[tuple[str, list[torch.fx.Node]]]:
    """Every call of a repeated layer, its nodes moved together."""
    runs = segments(graph, repeated_layers(program.captured.module_classes))
    _reorder(graph, [node for run in runs for node in run.nodes])
    calls: dict[str, int] = {}
    found: list[tuple[str, list[torch.fx.Node]]] = []
    for run in runs:
        if run.path is not None:
            calls[run.path] = calls.get(run.path, 0) + 1
            again = calls[run.path]
            found.append((run.path if again == 1 else f"{run.path} (call {again})", run.nodes))
    return found


def _cores(graph: torch.fx.Graph, mutable: bool) -> list[tuple[str, list[torch.fx.Node]]]:
    """The attention cores that can be run as one, their nodes moved together."""
    found: list[tuple[str, list[torch.fx.Node]]] = []
    taken: set[torch.fx.Node] = set()
    for softmax in [n for n in graph.nodes if n.op == "call_function" and op_name(n) in SOFTMAX]:
        core = _core(graph, softmax)
        if not core or core & taken or any(transition_of(node.target) is not None for node in core):
            continue
        if nodes := _together(graph, core, mutable):
            found.append((str(softmax.meta.get("module") or softmax.name), nodes))
            taken |= core
    return found


def _gathers(graph: torch.fx.Graph, mutable: bool) -> list[tuple[str, list[torch.fx.Node]]]:
    """Gathers of spread positions with the products of weights that read them: a rank keeps its own part alone
    (Korthikanti et al. 2022, section 4.2.2)."""
    found: list[tuple[str, list[torch.fx.Node]]] = []
    for gather in list(graph.find_nodes(op="call_function", target=collectives.all_gather)):
        region, pending, only_products = {gather}, list(gather.users), True
        while pending:
            node = pending.pop()
            if op_name(node) in CHEAP and node not in region:
                pending += node.users
            elif not (op_name(node) in PRODUCTS and any(map(_is_weight, tensor_operands(node)))):
                only_products = False
            region.add(node)
        if only_products and (nodes := _together(graph, region, mutable)):
            found.append((f"{gather.meta.get('module')} {GATHER}", nodes))
    return found


def _core(graph: torch.fx.Graph, softmax: torch.fx.Node) -> set[torch.fx.Node]:
    """Everything between the product that makes the scores and the one that takes the weights; empty if not both."""
    before, first = _reach(softmax, up=True)
    after, last = _reach(softmax, up=False)
    if not first or not last:
        return set()
    core = first | last | {softmax}
    for node in graph.nodes:
        if node in before and any(x in core for x in node.all_input_nodes):
            core.add(node)
    for node in reversed(graph.nodes):
        if node in after and any(user in core for user in node.users):
            core.add(node)
    pending = [x for node in core for x in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in core and node.op == "call_function" and op_name(node) in CHEAP and set(node.users) <= core:
            core.add(node)
            pending += node.all_input_nodes
    return core


def _reach(start: torch.fx.Node, up: bool) -> tuple[set[torch.fx.Node], set[torch.fx.Node]]:
    """Nodes from ``start`` up to the products of two activations, and those products; other products stop it too."""
    seen: set[torch.fx.Node] = set()
    products: set[torch.fx.Node] = set()
    pending = list(start.all_input_nodes if up else start.users)
    while pending:
        node = pending.pop()
        if node in seen or node in products or node.op != "call_function":
            continue
        if op_name(node) in PRODUCTS:
            if not any(map(_is_weight, tensor_operands(node))):
                products.add(node)
            continue
        seen.add(node)
        pending += node.all_input_nodes if up else node.users
    return seen, products


def _is_weight(node: torch.fx.Node) -> bool:
    """Whether the operand is a parameter or a buffer, possibly looked at in another way."""
    while node.op == "call_function" and len(operands := tensor_operands(node)) == 1:
        (node,) = operands
    return node.op == "get_attr"


def _together(graph: torch.fx.Graph, core: set[torch.fx.Node], mutable: bool) -> list[torch.fx.Node]:
    """Move what stands between the nodes of ``core`` before or behind them; empty, and nothing moved, if it cannot be.

    Random numbers keep their order, and so does everything where the graph writes into tensors.
    """
    nodes = list(graph.nodes)
    own = [node for node in nodes if node in core]
    between = [node for node in nodes[nodes.index(own[0]) : nodes.index(own[-1])] if node not in core]
    behind: set[torch.fx.Node] = set()
    for node in between:
        if any(x in core or x in behind for x in node.all_input_nodes):
            behind.add(node)
    drawn = any(map(is_random, between)) and any(map(is_random, core))
    if drawn or (mutable and between) or any(x in behind for node in core for x in node.all_input_nodes):
        return []
    anchor = own[-1]
    for node in between:
        if node in behind:
            anchor.append(node)
            anchor = node
        else:
            own[0].prepend(node)
    return own


def _reorder(graph: torch.fx.Graph, order: Sequence[torch.fx.Node]) -> None:
    assert len(order) == len(graph.nodes)
    for node, following in itertools.pairwise(order):
        node.append(following)


def _is_fused(graph: torch.fx.Graph) -> bool:
    return any(node.target is torch.ops.aten.scaled_dot_product_attention.default for node in graph.nodes)


__all__ = ["recompute"]
