"""Widening: the graph in fp64, for verification.

A model in double precision still rounds to float32 wherever its code says so: norms and rotary tables upcast "to
float32", masks and tables are made in float32. Here every such dtype becomes float64, so that two ways of computing the
model can be compared to 1e-12 instead of 1e-6.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.node import map_aggregate

from tpcompile import kernels
from tpcompile.sentence import argument

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


WITHOUT_FLOAT64: dict[Any, Any] = {torch.ops.aten._grouped_mm.default: kernels.grouped_product}
"""Kernels that take no float64, and what computes the same."""


def widen(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph_module`` that computes in float64: its dtypes, parameters, buffers and constants.

    Integers and booleans stay as they are. The tensors of the copy are its own; parameters keep ``requires_grad``.
    """
    graph = widen_graph(graph_module.graph)
    tensors: dict[str, torch.Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        owner, _, attribute = name.rpartition(".")
        tensors[name] = widen_tensor(getattr(graph_module.get_submodule(owner), attribute))
    wide = fx.GraphModule(tensors, graph, class_name=type(graph_module).__name__)
    wide.training = graph_module.training
    return wide


def widen_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float64 if it is real or complex floating point, else a copy; a parameter stays one."""
    data = tensor.detach().clone().to(WIDE.get(tensor.dtype, tensor.dtype))
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def widen_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` in which no op makes or asks for a float narrower than 64 bits, given wide tensors."""
    wide = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = wide.node_copy(node, nodes.__getitem__)
        copied.meta = copy.copy(node.meta)
        nodes[node] = copied
        if node.op == "call_function":
            copied.args = map_aggregate(copied.args, _wide_dtype)
            copied.kwargs = map_aggregate(copied.kwargs, _wide_dtype)
            copied.target = WITHOUT_FLOAT64.get(copied.target, copied.target)
            if copied.target is torch.ops.aten.rms_norm.default and argument(node, "eps") is None:
                # its default follows the dtype: keep that of the narrow one
                copied.kwargs = {**copied.kwargs, "eps": torch.finfo(node.meta["val"].dtype).eps}
                copied.args = copied.args[:3]
            if _is_narrow(node.meta.get("val")) and not any(
                _is_floating(n.meta.get("val")) for n in node.all_input_nodes
            ):
                _widen_default(copied)
        if "val" in node.meta:
            copied.meta["val"] = pytree.tree_map(_wide_value, node.meta["val"])
    wide.lint()
    return wide


def _wide_dtype(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _wide_value(value: Any) -> Any:
    return value.to(WIDE[value.dtype]) if isinstance(value, torch.Tensor) and value.dtype in WIDE else value


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in WIDE


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def _widen_default(node: fx.Node) -> None:
    """Where the float comes from torch's default dtype (``arange(0.0, 8.0)``, int / int), ask for float64."""
    target = node.target
    arguments = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else []
    names = [argument.name for argument in arguments]
    if "dtype" in names:
        if node.kwargs.get("dtype") is None and len(node.args) <= names.index("dtype"):
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
        return
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if isinstance(value, torch.Tensor):
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(torch.ops.aten.to.dtype, (operand, torch.float64))
            cast.meta = {**operand.meta, "val": value.to(torch.float64)}
            node.replace_input_with(operand, cast)
