"""Values that depend on sizes and buffers alone, such as rotary tables, are made once and kept for the next calls.

As a hand-written model keeps them (Megatron-LM caches its rotary embedding per length). They are made again when a
size changes, or a number in a buffer that they are made of. That is compared, since ``.data`` and collectives write
unseen by autograd; so only on the CPU, where it costs nothing. Masks of positions by positions, and what is recomputed
in backward, stay where they are. Programs keep the ops; only the code that is made of a graph calls them together.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from tpcompile.aliasing import aliases, holders, is_inplace
from tpcompile.effects import has_effect
from tpcompile.onlookers import is_eager
from tpcompile.recomputation import MARK

MOST = 2**24  # bytes of the values of one graph, and their buffers; what is larger is not kept
WORTH = 3  # ops; fewer cost no more than looking whether they are still valid
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack")  # noqa: B009


def keep(
    graph: torch.fx.Graph, parameters: frozenset[str], function_of: Callable[[torch.fx.Graph], Callable[..., Any]]
) -> None:
    """Put one call in the place of all ops that depend on sizes of inputs and on buffers alone, in place.

    Args:
        graph: of one rank, flat.
        parameters: names of the attributes that are no buffers.
        function_of: makes a function of a graph without attributes.
    """
    written = _written(graph)
    sizes, buffers, made = set[torch.fx.Node](), set[torch.fx.Node](), dict[torch.fx.Node, None]()
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "get_attr" and str(node.target) not in parameters and node not in written:
            buffers.add(node)
        elif node.op != "call_function":
            continue
        elif isinstance(node.meta.get("val"), int | torch.SymInt):
            if all(x.op == "placeholder" or x in sizes for x in operands):
                sizes.add(node)
        elif all(x in made or x in sizes or x in buffers for x in operands) and node not in written and _is_kept(node):
            made[node] = None
    results = [node for node in made if any(user not in made for user in node.users)]
    placeholders = graph.find_nodes(op="placeholder")
    if (
        len(made) < WORTH
        or not results
        or not placeholders
        or not all(isinstance(x.meta.get("val"), Tensor) for x in results)
    ):
        return
    read = {x for node in made for x in node.all_input_nodes if x not in made}
    given = [x for x in graph.nodes if x in read and x in buffers]
    count = len(given)
    given += [x for x in graph.nodes if x in read and x in sizes]
    inner, places = _graph_of(given, list(made), results)
    last = placeholders[-1]
    for node in [x for x in graph.nodes if x in sizes or (x in read and x in buffers)]:
        last.append(node)
        last = node
    with graph.inserting_after(last):
        call = last = graph.call_function(_kept(function_of(inner), count), tuple(given))
    items = list[torch.fx.Node]()
    for index in range(max(places) + 1):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, index))
            items.append(last)
    for node, index in zip(results, places, strict=True):
        items[index].meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(items[index], delete_user_cb=lambda user: user not in made)
    for node in reversed(made):
        graph.erase_node(node)


def _written(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Values in whose memory an op, or a caller who is given them, may write."""
    held = holders(graph)
    found = set[torch.fx.Node]()
    for node in graph.nodes:
        if node.op == "output":
            given = node.all_input_nodes
        elif node.op == "call_function" and (has_effect(node) or node.kwargs.get("inplace")):
            given = node.all_input_nodes[:1] if is_inplace(node) else node.all_input_nodes
        else:
            continue
        for x in given:
            if x not in found:
                found |= aliases(x, held)
    return found


def _is_kept(node: torch.fx.Node) -> bool:
    """Whether the op makes the same of the same operands, every time, on this rank alone, and little enough of it."""
    target: Any = node.target
    if MARK in node.meta or not _is_thin(node.meta.get("val")):
        return False
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or has_effect(node):
        return False
    return not target._schema.name.removeprefix("aten::").startswith(("empty", "new_empty"))


def _is_thin(value: Any) -> bool:
    """Whether all tensors of a value grow with a size no faster than it does, as masks of positions by positions do."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_thin, value))
    if not isinstance(value, Tensor):
        return False
    symbols = [s for n in value.shape if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols]
    fixed = [n for n in value.shape if not isinstance(n, torch.SymInt)]
    return len(symbols) == len(set(symbols)) and math.prod(fixed) * value.element_size() <= MOST


def _graph_of(
    given: list[torch.fx.Node], nodes: list[torch.fx.Node], results: list[torch.fx.Node]
) -> tuple[torch.fx.Graph, list[int]]:
    """The nodes as a graph of their own, equal ones once; and which of its outputs each of ``results`` is."""
    graph = torch.fx.Graph()
    env = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(given)}
    known: dict[str, torch.fx.Node] = {}
    for node in nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda x: env[x])
        key = f"{node.target} {args} {kwargs}"
        if key not in known:
            known[key] = graph.node_copy(node, lambda x: env[x])
        env[node] = known[key]
    outputs = list(dict.fromkeys(env[node] for node in results))
    graph.output(tuple(outputs))
    return graph, [outputs.index(env[node]) for node in results]


def _kept(function: Callable[..., tuple[Tensor, ...]], buffers: int) -> Callable[..., tuple[Tensor, ...]]:
    """``function(None, *buffers, *sizes)``, of as many buffers, with its last result kept."""
    last: tuple[Any, list[Tensor], tuple[Tensor, ...]] | None = None

    def kept(*operands: Any) -> tuple[Tensor, ...]:
        nonlocal last
        tensors = operands[:buffers]
        if not is_eager(*tensors) or _modes() or any(x.requires_grad for x in tensors):
            return function(None, *operands)
        state = (operands[buffers:], torch.is_inference_mode_enabled(), torch.get_default_dtype())
        if last is not None and last[0] == state and all(map(_same, last[1], tensors)):
            return last[2]
        made = function(None, *operands)
        small = sum(x.numel() * x.element_size() for x in (*made, *tensors)) <= MOST
        if small and all(x.device.type == "cpu" for x in (*made, *tensors)):
            last = state, [x.clone() for x in tensors], made
        return made

    return kept


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


__all__ = ["keep"]
