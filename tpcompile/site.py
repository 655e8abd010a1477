"""A node being rewritten by a pass: reads its arguments, builds what replaces it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from tpcompile.program import Program
from tpcompile.rules import op_name
from tpcompile.sentence import argument


class Site:
    """A node being rewritten: builds its replacement in front of it, with metadata and fake values carried along."""

    def __init__(self, program: Program, graph: torch.fx.Graph, node: torch.fx.Node):
        self.program, self.graph, self.node = program, graph, node

    def arg(self, name: str) -> Any:
        """The argument called ``name`` in the op's schema, or its default."""
        return argument(self.node, name)

    def size(self, value: Any) -> int:
        """A size (int or size node) with symbols at their hints."""
        return self.program.captured.size(value.meta["val"] if isinstance(value, torch.fx.Node) else value)

    def shape(self, node: torch.fx.Node) -> tuple[int, ...]:
        """Shape of a tensor node with symbols at their hints."""
        return self.program.shape(node)

    def same_shape(self, a: torch.fx.Node, b: torch.fx.Node) -> bool:
        """Whether two tensor nodes have one shape at all sizes that the graph is valid for."""
        sizes = [[n.node.expr if isinstance(n, torch.SymInt) else n for n in x.meta["val"].shape] for x in (a, b)]
        return sizes[0] == sizes[1]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A new node before the old one; its value is computed on fake tensors."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k not in ("val", "tensor_meta")}
        value = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad():
            made.meta["val"] = target(*value[0], **value[1])  # pyright: ignore[reportIndexIssue]
        return made

    def constant(self, node: Any) -> torch.Tensor | None:
        """The value of a lifted constant, if the node is one."""
        if isinstance(node, torch.fx.Node) and node.op == "get_attr":
            return self.program.captured.constants.get(str(node.target))
        if isinstance(node, torch.fx.Node) and op_name(node) in (
            "aten.lift_fresh_copy.default",
            "aten.detach_.default",
        ):
            return self.constant(node.args[0])
        return None
