"""What a node does besides its result, and dropping what does nothing: only what has no effect is ever dead."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from tpcompile.sentence import argument


def is_random(node: torch.fx.Node) -> bool:
    """Whether the op draws from the generator (fused attention only with dropout, which canonicalize writes out)."""
    if node.op != "call_function":
        return False
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return argument(node, "dropout_p") != 0.0
    drawn = getattr(node.target, "__name__", "") in ("dropout_part", "own_dropout")
    return drawn or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def has_effect(node: torch.fx.Node) -> bool:
    """Whether the node matters even if nobody reads its result.

    It writes into a tensor, updates running statistics (which the schemas of norms do not tell), or draws random
    numbers: those drawn after it would be others.
    """
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    target: Any = node.target
    if target is torch.ops.aten.batch_norm.default:
        return bool(argument(node, "training")) and argument(node, "running_mean") is not None
    if target is torch.ops.aten.instance_norm.default:
        return bool(argument(node, "use_input_stats")) and argument(node, "running_mean") is not None
    return is_random(node) or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)


def drop_dead(graph: torch.fx.Graph) -> None:
    """Erase what nobody reads and what has no effect."""
    for node in reversed(graph.nodes):
        if not node.users and not has_effect(node):
            graph.erase_node(node)


__all__ = ["drop_dead", "has_effect", "is_random"]
