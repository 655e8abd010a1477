"""Canonical form: fewer kinds of ops, so that fewer rules say the same. The graph still computes what it did.

Biases become additions of their own (a row bias is added after the sum), in-place ops become ordinary ones where no
alias can tell, a pick by constant indices becomes a slice, fused attention with dropout or grouped heads is written
out, and ops that do nothing go.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from tpcompile.program import Program, copy_graph
from tpcompile.rules import op_name
from tpcompile.sentence import argument, is_tensor
from tpcompile.site import Site

aten = torch.ops.aten
Rewrite = Callable[[Site], torch.fx.Node | None]


def _linear(site: Site) -> torch.fx.Node | None:
    bias = site.arg("bias")
    if bias is None:
        return None
    return site.emit(aten.add.Tensor, site.emit(aten.linear.default, site.arg("input"), site.arg("weight")), bias)


def _addmm(site: Site) -> torch.fx.Node:
    product = site.emit(aten.mm.default, site.arg("mat1"), site.arg("mat2"))
    return _weighted_sum(site, product)


def _baddbmm(site: Site) -> torch.fx.Node:
    return _weighted_sum(site, site.emit(aten.bmm.default, site.arg("batch1"), site.arg("batch2")))


def _weighted_sum(site: Site, product: torch.fx.Node) -> torch.fx.Node:
    alpha, beta, addend = site.arg("alpha"), site.arg("beta"), site.arg("self")
    if alpha != 1:
        product = site.emit(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    if beta != 1:
        addend = site.emit(aten.mul.Tensor, addend, beta)
    return site.emit(aten.add.Tensor, addend, product)


def _dropout(site: Site) -> torch.fx.Node | None:
    return None if site.arg("train") and site.arg("p") != 0.0 else site.arg("input")


def _slice(site: Site) -> torch.fx.Node | None:
    shape = site.shape(site.arg("self"))
    same = shape == site.shape(site.node) and (site.arg("step") or 1) == 1
    return site.arg("self") if same else None


def _broadcast(site: Site) -> torch.fx.Node:
    return site.emit(aten.expand.default, site.arg("self"), site.arg("size"))


def _same_shape(site: Site) -> torch.fx.Node | None:
    operand = site.node.args[0]
    assert isinstance(operand, torch.fx.Node)
    return operand if site.shape(operand) == site.shape(site.node) else None


def _cast(site: Site) -> torch.fx.Node | None:
    before, after = site.node.args[0].meta["val"], site.node.meta["val"]  # type: ignore[union-attr]
    if not op_name(site.node).startswith("aten.type_as") and argument(site.node, "copy"):
        return None
    return site.node.args[0] if (before.dtype, before.device) == (after.dtype, after.device) else None  # type: ignore[return-value]


def _alias(site: Site) -> torch.fx.Node | None:
    return site.node.args[0]  # type: ignore[return-value]


def _index(site: Site) -> torch.fx.Node | None:
    """``x[..., [i, i+1]]`` with constant consecutive indices is a slice."""
    indices = list(site.arg("indices"))
    used = [d for d, x in enumerate(indices) if x is not None]
    if len(used) != 1:
        return None
    values = site.constant(indices[used[0]])
    if values is None or values.dtype == torch.bool or values.dim() != 1 or not values.numel():
        return None
    n = site.shape(site.arg("self"))[used[0]]
    picked = [int(v) % n for v in values.tolist()]
    if picked != list(range(picked[0], picked[0] + len(picked))):
        return None
    return site.emit(aten.slice.Tensor, site.arg("self"), used[0], picked[0], picked[-1] + 1)


def _attention(site: Site) -> torch.fx.Node | None:
    """Fused attention with dropout (its mask cannot be cut) or grouped heads, written out as the kernel's math path."""
    q, k, v = (site.arg(x) for x in ("query", "key", "value"))
    grouped = site.arg("enable_gqa") and site.shape(q)[-3] != site.shape(k)[-3]
    p = site.arg("dropout_p")
    if grouped:
        times = site.shape(q)[-3] // site.shape(k)[-3]
        k, v = (site.emit(aten.repeat_interleave.self_int, x, times, -3) for x in (k, v))
    mask, causal, scale = site.arg("attn_mask"), site.arg("is_causal"), site.arg("scale")
    if p == 0.0:
        if not grouped:
            return None
        return site.emit(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=scale)
    if scale is None:
        scale = 1 / math.sqrt(site.shape(q)[-1])
    root = math.sqrt(scale)
    q, k = site.emit(aten.mul.Scalar, q, root), site.emit(aten.mul.Scalar, k, root)
    scores = site.emit(aten.matmul.default, q, site.emit(aten.transpose.int, k, -2, -1))
    if causal:
        rows, columns = (site.emit(aten.sym_size.int, x, -2) for x in (q, k))
        ones = site.emit(aten.new_ones.default, scores, [rows, columns], dtype=torch.bool)
        mask = site.emit(aten.tril.default, ones)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        away = site.emit(aten.logical_not.default, mask)
        scores = site.emit(aten.masked_fill.Scalar, scores, away, -math.inf)
        mask = None
    if mask is not None:
        scores = site.emit(aten.add.Tensor, scores, mask)
    weights = site.emit(aten.dropout.default, site.emit(aten.softmax.int, scores, -1), p, True)
    return site.emit(aten.matmul.default, weights, v)


REWRITES: dict[str, Rewrite] = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _baddbmm,
    "aten.dropout.default": _dropout,
    "aten.feature_dropout.default": _dropout,
    "aten.slice.Tensor": _slice,
    "aten.expand.default": _same_shape,
    "aten.broadcast_to.default": _broadcast,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.to.device": _cast,
    "aten.type_as.default": _cast,
    "aten.alias.default": _alias,
    "aten.lift_fresh.default": _alias,
    "aten.index.Tensor": _index,
    "aten.scaled_dot_product_attention.default": _attention,
}

VIEWS = frozenset(
    [
        "aten.view.default",
        "aten.reshape.default",
        "aten.transpose.int",
        "aten.permute.default",
        "aten.t.default",
        "aten.slice.Tensor",
        "aten.select.int",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.squeeze.default",
        "aten.expand.default",
        "aten.split.Tensor",
        "aten.split_with_sizes.default",
        "aten.chunk.default",
        "aten.unbind.int",
        "aten.detach.default",
        "aten.alias.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.contiguous.default",
        "aten.to.dtype",
        "aten.to.dtype_layout",
        "aten.to.device",
        "aten.type_as.default",
        "aten.dropout.default",
        "aten.feature_dropout.default",
        "aten.alpha_dropout.default",
        "getitem",
    ]
)
"""Ops that may hand on the memory of their first operand (more are known by their schemas)."""


def canonicalize(program: Program) -> Program:
    """Rewrite the captured graph into canonical form."""
    module, graph = copy_graph(program.graph_module)
    _drop_mutation(program, graph)
    for node in list(graph.nodes):
        rewrite = REWRITES.get(op_name(node)) if node.op == "call_function" else None
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            made = rewrite(Site(program, graph, node))
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return program.with_(graph_module=module)


def _drop_mutation(program: Program, graph: torch.fx.Graph) -> None:
    """``x.add_(y)`` becomes ``x + y`` where nothing that shares x's memory is read afterwards."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    held = holders(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_inplace(node):
            continue
        base = node.args[0]
        functional = functional_overload(node)
        family = aliases(base, held) if isinstance(base, torch.fx.Node) else set[torch.fx.Node]()
        outside = any(n.op in ("get_attr", "placeholder") for n in family)
        earlier = [n for n in family if order[n] < order[node]]
        later = [u for n in earlier for u in n.users if order[u] > order[node]]
        ours = {u for u in later if all(a is base for a in u.all_input_nodes if a in earlier)}
        if functional is None or outside or set(later) - ours:
            continue
        assert isinstance(base, torch.fx.Node)
        with graph.inserting_before(node):
            made = Site(program, graph, node).emit(functional, *node.args, **node.kwargs)
        order[made] = order[node]
        for user in ours:
            user.replace_input_with(base, made)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def is_inplace(node: torch.fx.Node) -> bool:
    """Whether the op writes into its first tensor operand."""
    target: Any = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and is_tensor(node.args[0] if node.args else None)
    )


def functional_overload(node: torch.fx.Node) -> Any:
    """``aten.add_.Tensor`` -> ``aten.add.Tensor``; None when there is no such op or results may change type."""
    target: Any = node.target
    name = target._schema.name.split("::")[-1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[:-1], None)
    found = getattr(packet, target._overloadname, None) if packet is not None else None
    first = node.args[0]
    assert isinstance(first, torch.fx.Node)
    if found is None or first.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return found


def may_share(node: torch.fx.Node) -> bool:
    """Whether a result of the op may share memory with its first operand (or, of a list, with its items)."""
    target: Any = node.target
    if node.op != "call_function" or op_name(node) in VIEWS or is_inplace(node):
        return node.op == "call_function"
    return isinstance(target, torch._ops.OpOverload) and any(a.alias_info for a in target._schema.arguments)


Holders = Mapping[int, Sequence[torch.fx.Node]]


def holders(graph: torch.fx.Graph) -> Holders:
    """The nodes whose fake values lie in one storage, by storage."""
    held: dict[int, list[torch.fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for storage in _storages(node):
            held[storage].append(node)
    return held


def aliases(node: torch.fx.Node, held: Holders) -> set[torch.fx.Node]:
    """Nodes that may share memory with ``node``: through ops that may view, and by the storage of their fake values."""
    family = {node}
    pending = [node]
    while pending:
        found = pending.pop()
        near = [user for user in found.users if may_share(user) and found in _viewed(user)]
        near += _viewed(found) if may_share(found) else []
        near += [other for storage in _storages(found) for other in held.get(storage, ())]
        for other in near:
            if other not in family:
                family.add(other)
                pending.append(other)
    return family


def _viewed(node: torch.fx.Node) -> list[torch.fx.Node]:
    first = node.args[0] if node.args else None
    items = first if isinstance(first, (list, tuple)) else [first]
    return [x for x in items if isinstance(x, torch.fx.Node)]


def _storages(node: torch.fx.Node) -> list[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)]


__all__ = ["aliases", "canonicalize", "holders", "is_inplace", "may_share"]
