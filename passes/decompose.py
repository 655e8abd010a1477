"""Ops that need an axis whole, written out where that axis is cut: statistics travel instead of the value.

Softmax, log-softmax, layer and RMS norms and cross-entropy along a cut axis become maxima, sums and elementwise ops.
The sums are partial and all-reduced at the size of the statistics: cross-entropy on cut logits costs three all-reduces
of ``[n]`` and no gather of ``[n, vocabulary]`` (Megatron-LM, Shoeybi et al. 2019, section 3). Elsewhere the fused op
stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx

from tpcompile.program import Program, copy_graph
from tpcompile.rules import RULES, op_name
from tpcompile.site import Site
from tpcompile.structure import atoms

aten = torch.ops.aten


def decompose(program: Program) -> Program:
    """Write out the ops of :data:`DECOMPOSITIONS` whose whole axis is cut."""
    cut = {id(a) for c in program.cuts for a in c.atoms}
    if not cut:
        return program
    module, graph = copy_graph(program.graph_module)
    for node in list(graph.nodes):
        rewrite = DECOMPOSITIONS.get(op_name(node)) if node.op == "call_function" else None
        if rewrite is None or not _whole_axis_is_cut(program, node, cut):
            continue
        with graph.inserting_before(node):
            made = rewrite(Site(program, graph, node))
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    module.recompile()
    return program.with_(graph_module=module)


def _whole_axis_is_cut(program: Program, node: torch.fx.Node, cut: set[int]) -> bool:
    assert program.structure is not None
    values = program.structure.values
    call = program.call(node)
    sentence = RULES[op_name(node)].sentence(call)
    for labels, operand in zip(sentence.operands, call.operands, strict=True):
        for label, term in zip(labels, values.get(operand.name, ((),))[0], strict=False):
            if label in sentence.whole and any(id(a) in cut for a in atoms(term)):
                return True
    return False


def _shifted(site: Site, x: torch.fx.Node, dim: int) -> torch.fx.Node:
    """``x`` minus its maximum, which carries no gradient: the result of what follows does not depend on it."""
    return site.emit(aten.sub.Tensor, x, site.emit(aten.amax.default, site.emit(aten.detach.default, x), [dim], True))


def _float_input(site: Site) -> torch.fx.Node:
    dtype = site.arg("dtype")
    return site.arg("self") if dtype is None else site.emit(aten.to.dtype, site.arg("self"), dtype)


def _softmax(site: Site) -> torch.fx.Node:
    dim = int(site.arg("dim"))
    weights = site.emit(aten.exp.default, _shifted(site, _float_input(site), dim))
    return site.emit(aten.div.Tensor, weights, site.emit(aten.sum.dim_IntList, weights, [dim], True))


def _log_softmax(site: Site) -> torch.fx.Node:
    dim = int(site.arg("dim"))
    shifted = _shifted(site, _float_input(site), dim)
    total = site.emit(aten.sum.dim_IntList, site.emit(aten.exp.default, shifted), [dim], True)
    return site.emit(aten.sub.Tensor, shifted, site.emit(aten.log.default, total))


def _logsumexp(site: Site) -> torch.fx.Node:
    """log(sum(exp(x - max))) + max, where the gradient of the maximum cancels; an infinite maximum is left alone."""
    x, dims, keep = site.arg("self"), list(site.arg("dim")), bool(site.arg("keepdim"))
    largest = site.emit(aten.amax.default, site.emit(aten.detach.default, x), dims, True)
    largest = site.emit(aten.masked_fill.Scalar, largest, site.emit(aten.isinf.default, largest), 0.0)
    weights = site.emit(aten.exp.default, site.emit(aten.sub.Tensor, x, largest))
    total = site.emit(aten.log.default, site.emit(aten.sum.dim_IntList, weights, dims, True))
    result = site.emit(aten.add.Tensor, total, largest)
    return result if keep else site.emit(aten.squeeze.dims, result, dims)


def _layer_norm(site: Site) -> torch.fx.Node:
    x, dims = site.arg("input"), [-1 - i for i in range(len(site.arg("normalized_shape")))]
    centred = site.emit(aten.sub.Tensor, x, site.emit(aten.mean.dim, x, dims, True))
    return _scaled(site, centred, dims, site.arg("eps"))


def _rms_norm(site: Site) -> torch.fx.Node:
    x, dims = site.arg("input"), [-1 - i for i in range(len(site.arg("normalized_shape")))]
    eps = site.arg("eps")
    return _scaled(site, x, dims, torch.finfo(x.meta["val"].dtype).eps if eps is None else eps)


def _scaled(site: Site, x: torch.fx.Node, dims: list[int], eps: float) -> torch.fx.Node:
    square = site.emit(aten.mean.dim, site.emit(aten.mul.Tensor, x, x), dims, True)
    result = site.emit(aten.mul.Tensor, x, site.emit(aten.rsqrt.default, site.emit(aten.add.Tensor, square, eps)))
    if (weight := site.arg("weight")) is not None:
        result = site.emit(aten.mul.Tensor, result, weight)
    if "layer_norm" in op_name(site.node) and (bias := site.arg("bias")) is not None:
        result = site.emit(aten.add.Tensor, result, bias)
    return result


def _cross_entropy(site: Site) -> torch.fx.Node | None:
    """``F.cross_entropy`` with class indices, ``ignore_index`` and label smoothing; class weights are refused later."""
    x, target = site.arg("self"), site.arg("target")
    if site.arg("weight") is not None or target.meta["val"].is_floating_point():
        return None
    dim = 0 if len(site.shape(x)) == 1 else 1
    shifted = _shifted(site, x, dim)
    total = site.emit(aten.sum.dim_IntList, site.emit(aten.exp.default, shifted), [dim], False)
    ignored = site.emit(aten.eq.Scalar, target, site.arg("ignore_index"))
    safe = site.emit(aten.masked_fill.Scalar, target, ignored, 0)
    picked = site.emit(aten.gather.default, shifted, dim, site.emit(aten.unsqueeze.default, safe, dim))
    normalizer = site.emit(aten.log.default, total)
    loss = site.emit(aten.sub.Tensor, normalizer, site.emit(aten.squeeze.dim, picked, dim))
    smoothing = float(site.arg("label_smoothing"))
    if smoothing:
        mean = site.emit(aten.mean.dim, shifted, [dim], False)
        smooth = site.emit(aten.mul.Tensor, site.emit(aten.sub.Tensor, normalizer, mean), smoothing)
        loss = site.emit(aten.add.Tensor, site.emit(aten.mul.Tensor, loss, 1 - smoothing), smooth)
    loss = site.emit(aten.masked_fill.Scalar, loss, ignored, 0.0)
    reduction = int(site.arg("reduction"))
    if reduction == 0:
        return loss
    summed = site.emit(aten.sum.default, loss)
    if reduction == 2:
        return summed
    counted = site.emit(aten.sum.default, site.emit(aten.logical_not.default, ignored))
    return site.emit(aten.div.Tensor, summed, counted)


DECOMPOSITIONS: dict[str, Callable[[Site], torch.fx.Node | None]] = {
    "aten.softmax.int": _softmax,
    "aten.log_softmax.int": _log_softmax,
    "aten.logsumexp.default": _logsumexp,
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.cross_entropy_loss.default": _cross_entropy,
}

__all__ = ["decompose"]
