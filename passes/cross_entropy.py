"""Cross-entropy on cut logits keeps one tensor of their size: its statistics are one node of autograd.

What that node is stands in ``tpcompile/cross_entropy_sums.py``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from tpcompile import collectives, kernels
from tpcompile.cross_entropy_sums import cross_entropy_sums
from tpcompile.effects import has_effect
from tpcompile.program import Program, copy_graph

aten = torch.ops.aten


def cross_entropy(program: Program) -> Program:
    """Make one call of the ops that :func:`cross_entropy_sums` is, wherever they stand."""
    module, graph = copy_graph(program.graph_module)
    sum_together(graph)
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


def sum_together(graph: torch.fx.Graph) -> None:
    """:func:`cross_entropy`, of a graph and in place."""
    for node in list(graph.nodes):
        found = _parts(node)
        if found is None:
            continue
        exponentials, summed, picked, before = found
        first = min(summed, picked)
        for other in before:
            first.prepend(other)
        _, dim, *index = picked.args
        with graph.inserting_before(first):
            made = graph.call_function(cross_entropy_sums, (*node.args, dim, _keepdim(summed), *index))
            made.meta = {**summed.meta, **_of_both(summed, picked)}
            for number, part in enumerate((summed, picked)):
                item = graph.call_function(operator.getitem, (made, number))
                item.meta = dict(part.meta)
                part.replace_all_uses_with(item)
        for part in (picked, summed, exponentials, node):
            graph.erase_node(part)


def _of_both(summed: torch.fx.Node, picked: torch.fx.Node) -> dict[str, tuple[Any, Any]]:
    """What is known of the values, as it is of ops with several results."""
    return {key: (summed.meta[key], picked.meta[key]) for key in ("val", "placement") if key in summed.meta}


def _parts(
    shifted: torch.fx.Node,
) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node, list[torch.fx.Node]] | None:
    """exp, sum and pick of shifted logits that nothing else reads, and what must be there before the sum."""
    if shifted.target is not aten.sub.Tensor or shifted.kwargs or len(shifted.users) != 2:
        return None
    by_target = {user.target: user for user in shifted.users}
    exponentials, picked = by_target.get(aten.exp.default), by_target.get(kernels.gather_part)
    if exponentials is None or picked is None or len(exponentials.users) != 1:
        return None
    (summed,) = exponentials.users
    largest: Any = shifted.args[1]
    if not isinstance(largest, torch.fx.Node) or largest.target is not collectives.all_reduce_max:
        return None  # it might have a gradient
    if summed.target is not aten.sum.dim_IntList or summed.kwargs or summed.args[1] != [picked.args[1]]:
        return None
    first, between = min(summed, picked), max(summed, picked)
    while (between := between.prev) is not first:
        if has_effect(between):  # what is read before it must not be read behind it, or the other way round
            return None
    before = _ancestors(picked, behind=shifted)
    if exponentials in before or summed in before:
        return None
    return exponentials, summed, picked, [x for x in before if first < x]


def _keepdim(summed: torch.fx.Node) -> bool:
    return len(summed.args) > 2 and bool(summed.args[2])


def _ancestors(node: torch.fx.Node, behind: torch.fx.Node) -> list[torch.fx.Node]:
    """What a node is made of that stands behind another one, in order."""
    found, pending = set[torch.fx.Node](), [node]
    while pending:
        for x in pending.pop().all_input_nodes:
            if behind < x and x not in found:
                found.add(x)
                pending.append(x)
    return sorted(found)


__all__ = ["cross_entropy", "sum_together"]
