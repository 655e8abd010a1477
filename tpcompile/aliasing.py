"""Which values of a graph may share memory, and which ops write into it: what in-place ops are judged by."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx

from tpcompile.rules import op_name
from tpcompile.sentence import is_tensor

aten = torch.ops.aten

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

Holders = Mapping[int, Sequence[torch.fx.Node]]


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
    if node.op != "call_function" or is_inplace(node):
        return node.op == "call_function"
    name = op_name(node)
    if name == "getitem":  # of the new tensors that topk or sort return, none shares another one's memory
        source = node.args[0]
        return isinstance(source, torch.fx.Node) and may_share(source)
    return name in VIEWS or (
        isinstance(target, torch._ops.OpOverload) and any(a.alias_info for a in target._schema.arguments)
    )


def holders(graph: torch.fx.Graph) -> Holders:
    """The nodes whose fake values lie in one storage, by storage."""
    held: dict[int, list[torch.fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for storage in storages(node):
            held[storage].append(node)
    return held


def aliases(node: torch.fx.Node, held: Holders) -> set[torch.fx.Node]:
    """Nodes that may share memory with ``node``: through ops that may view, and by the storage of their fake values."""
    family, pending, asked = {node}, [node], set[int]()
    while pending:
        found = pending.pop()
        near = [user for user in found.users if may_share(user) and found in viewed(user)]
        near += viewed(found) if may_share(found) else []
        for storage in {*storages(found)} - asked:
            asked.add(storage)
            near += filter(_one_value, held.get(storage, ()))
        for other in near:
            if other not in family:
                family.add(other)
                pending.append(other)
    return family


def viewed(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operands whose memory an op that may share hands on."""
    first = node.args[0] if node.args else None
    items = first if isinstance(first, (list, tuple)) else [first]
    return [x for x in items if isinstance(x, torch.fx.Node)]


def storages(node: torch.fx.Node) -> list[int]:
    """Identities of the storages of a node's fake values."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)]


def _one_value(node: torch.fx.Node) -> bool:
    """A tensor, or the list of views that split or chunk return: what topk returns is reached by its own getitems."""
    return isinstance(node.meta.get("val"), torch.Tensor) or may_share(node)


__all__ = [
    "VIEWS",
    "Holders",
    "aliases",
    "functional_overload",
    "holders",
    "is_inplace",
    "may_share",
    "storages",
    "viewed",
]
