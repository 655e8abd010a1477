"""Canonical form: fewer kinds of ops, so that fewer rules say the same. The graph still computes what it did.

Biases become additions of their own (a row bias is added after the sum), a pick by constant indices becomes a slice,
fused attention with dropout or grouped heads is written out, and ops that do nothing go.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from tpcompile.aliasing import is_inplace
from tpcompile.effects import drop_dead
from tpcompile.program import Program, copy_graph
from tpcompile.rules import op_name
from tpcompile.sentence import argument
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
    """A slice of all is the value itself, one of whole parts of a concatenation these parts."""
    source = site.arg("self")
    if (site.arg("step") or 1) != 1:
        return None
    if site.same_shape(source, site.node):
        return source
    dim = int(site.arg("dim")) % len(site.shape(source))
    if op_name(source) != "aten.cat.default" or int(argument(source, "dim")) % len(site.shape(source)) != dim:
        return None
    if _writes(site.graph):
        return None  # a part is not the memory of the concatenation
    bounds = [0 if site.arg("start") is None else site.arg("start"), site.arg("end")]
    total, rank = source.meta["val"].shape[dim], source.meta["val"].dim()
    parts = [p for p in argument(source, "tensors") if p.meta["val"].dim() == rank]  # (cat leaves out what is [0])
    if not all(isinstance(n, int) for n in (total, bounds[0], *(p.meta["val"].shape[dim] for p in parts))):
        return None
    first = max(bounds[0] + total if bounds[0] < 0 else bounds[0], 0)
    last, taken, at = first + site.shape(site.node)[dim], list[torch.fx.Node](), 0
    for part in parts:
        n = site.shape(part)[dim]
        taken += [part] if first <= at and at + n <= last and n else []
        at += n
    if sum(site.shape(part)[dim] for part in taken) != last - first:
        return None
    return taken[0] if len(taken) == 1 else site.emit(aten.cat.default, taken, dim)


def _broadcast(site: Site) -> torch.fx.Node:
    return site.emit(aten.expand.default, site.arg("self"), site.arg("size"))


def _shaped_like(site: Site) -> torch.fx.Node:
    """``view_as``, ``reshape_as``: the sizes of another tensor, written out."""
    target = aten.view.default if op_name(site.node) == "aten.view_as.default" else aten.reshape.default
    return site.emit(target, site.arg("self"), _sizes(site, site.arg("other")))


def _sizes(site: Site, x: torch.fx.Node) -> list[int | torch.fx.Node]:
    shape = x.meta["val"].shape
    return [n if isinstance(n, int) else site.emit(aten.sym_size.int, x, d) for d, n in enumerate(shape)]


def _same_shape(site: Site) -> torch.fx.Node | None:
    operand = site.node.args[0]
    assert isinstance(operand, torch.fx.Node)
    return operand if site.same_shape(operand, site.node) else None


def _cast(site: Site) -> torch.fx.Node | None:
    before, after = site.node.args[0].meta["val"], site.node.meta["val"]  # type: ignore[union-attr]
    if not op_name(site.node).startswith("aten.type_as") and argument(site.node, "copy"):
        return None
    return site.node.args[0] if (before.dtype, before.device) == (after.dtype, after.device) else None  # type: ignore[return-value]


def _clone(site: Site) -> torch.fx.Node | None:
    """A copy that is only made part of a concatenation, which copies too."""
    if any(op_name(user) != "aten.cat.default" for user in site.node.users) or _writes(site.graph):
        return None
    return site.node.args[0]  # type: ignore[return-value]


def _writes(graph: torch.fx.Graph) -> bool:
    """Whether some op writes into a value, so that it matters which values share memory."""
    return any(n.op == "call_function" and is_inplace(n) for n in graph.nodes)


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
    n = site.arg("self").meta["val"].shape[used[0]]
    if not isinstance(n, int) and int(values.min()) < 0:
        return None  # counted from an end that is known only when the program runs
    picked = [int(v) + n if v < 0 else int(v) for v in values.tolist()]
    if picked != list(range(picked[0], picked[0] + len(picked))):
        return None
    return site.emit(aten.slice.Tensor, site.arg("self"), used[0], picked[0], picked[-1] + 1)


def _convolution(site: Site) -> torch.fx.Node | None:
    """Its bias is an addition; over single positions with groups it is one matrix product per group."""
    x, weight, bias = (site.arg(name) for name in ("input", "weight", "bias"))
    if site.node.target is aten.conv1d.default and (made := _products_of_groups(site)) is not None:
        product = made
    elif bias is None or len(site.shape(x)) != len(site.shape(weight)):  # (without a batch dim it has no rule)
        return None
    else:
        conv: Any = site.node.target
        product = site.emit(conv, x, weight, None, *(site.arg(a.name) for a in conv._schema.arguments[3:]))
    if bias is None:
        return product
    for _ in site.shape(weight)[2:]:
        bias = site.emit(aten.unsqueeze.default, bias, -1)
    return site.emit(aten.add.Tensor, product, bias)


def _products_of_groups(site: Site) -> torch.fx.Node | None:
    x, weight, groups = (site.arg(name) for name in ("input", "weight", "groups"))
    channels, *positions = site.shape(x)[1:]
    outs, ins, *kernel = site.shape(weight)
    plain = all(site.arg(name) in ([n], n) for name, n in (("stride", 1), ("padding", 0)))
    if groups in (1, channels) or len(positions) != 1 or kernel != [1] or not plain:
        return None
    matrices = site.emit(aten.reshape.default, weight, [groups, outs // groups, ins])
    parted = site.emit(aten.unflatten.int, x, 1, [groups, ins])
    return site.emit(aten.flatten.using_ints, site.emit(aten.matmul.default, matrices, parted), 1, 2)


def _embedding(site: Site) -> torch.fx.Node | None:
    """A sparse gradient holds the same numbers as a dense one."""
    if not site.arg("sparse"):
        return None
    how = (site.arg(name) for name in ("weight", "indices", "padding_idx", "scale_grad_by_freq"))
    return site.emit(aten.embedding.default, *how, False)


def _attention(site: Site) -> torch.fx.Node | None:
    """Fused attention with dropout (its mask cannot be cut) or grouped heads, written out as the kernel's math path."""
    q, k, v = (site.arg(x) for x in ("query", "key", "value"))
    heads = [x.meta["val"].shape[-3] if x.meta["val"].dim() > 2 else 1 for x in (q, k)]
    grouped = site.arg("enable_gqa") and heads[0] != heads[1]
    p = site.arg("dropout_p")
    if grouped:
        if not all(isinstance(n, int) for n in heads):
            return None
        k, v = (_repeated(site, x, heads[1], heads[0]) for x in (k, v))
    mask, causal, scale = site.arg("attn_mask"), site.arg("is_causal"), site.arg("scale")
    if p == 0.0:
        if not grouped:
            return None
        return site.emit(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=scale)
    if scale is None:
        width = q.meta["val"].shape[-1]
        if not isinstance(width, int):
            return None  # (the rule refuses a cut of it)
        scale = 1 / math.sqrt(width)
    if causal:
        rows, columns = (site.emit(aten.sym_size.int, x, -2) for x in (q, k))
        mask = site.emit(aten.tril.default, site.emit(aten.new_ones.default, q, [rows, columns], dtype=torch.bool))
    root = math.sqrt(scale)
    q, k = site.emit(aten.mul.Scalar, q, root), site.emit(aten.mul.Scalar, k, root)
    scores = site.emit(aten.matmul.default, q, site.emit(aten.transpose.int, k, -2, -1))
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        away = site.emit(aten.logical_not.default, mask)
        scores = site.emit(aten.masked_fill.Scalar, scores, away, -math.inf)
        mask = None
    if mask is not None:
        scores = site.emit(aten.add.Tensor, scores, mask)
    weights = site.emit(aten.dropout.default, site.emit(aten.softmax.int, scores, -1), p, True)
    return site.emit(aten.matmul.default, weights, v)


def _repeated(site: Site, x: torch.fx.Node, heads: int, to: int) -> torch.fx.Node:
    """Each of ``heads`` heads as often as ``to`` need, ``[..., to, s, d]``: a view first, cut by heads as they are."""
    *batch, _, length, width = _sizes(site, x)
    each = site.emit(aten.unsqueeze.default, x, len(batch) + 1)
    every = site.emit(aten.expand.default, each, [*batch, heads, to // heads, length, width])
    return site.emit(aten.reshape.default, every, [*batch, to, length, width])


REWRITES: dict[str, Rewrite] = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _baddbmm,
    **{f"aten.conv{n}d.{form}": _convolution for n in (1, 2, 3) for form in ("default", "padding")},
    **{f"aten.conv_transpose{form}": _convolution for form in ("1d.default", "2d.input", "3d.input")},
    "aten.dropout.default": _dropout,
    "aten.embedding.default": _embedding,
    "aten.feature_dropout.default": _dropout,
    "aten.slice.Tensor": _slice,
    "aten.expand.default": _same_shape,
    "aten.broadcast_to.default": _broadcast,
    **{f"aten.{name}.default": _shaped_like for name in ("view_as", "reshape_as")},
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.to.device": _cast,
    "aten.type_as.default": _cast,
    "aten.alias.default": _alias,
    "aten.clone.default": _clone,
    "aten.lift_fresh.default": _alias,
    "aten.index.Tensor": _index,
    "aten.scaled_dot_product_attention.default": _attention,
}


def canonicalize(program: Program) -> Program:
    """Rewrite the captured graph into canonical form."""
    module, graph = copy_graph(program.graph_module)
    for node in list(graph.nodes):
        rewrite = REWRITES.get(op_name(node)) if node.op == "call_function" else None
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            made = rewrite(Site(program, graph, node))
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    drop_dead(graph)
    module.recompile()
    return program.with_(graph_module=module)


__all__ = ["canonicalize"]
