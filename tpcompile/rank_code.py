"""The code of one rank: a program with the values of this rank in it, and with groups by their c10d names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.distributed as dist
import torch.fx

from tpcompile.collectives import transition_of
from tpcompile.layout import Mesh
from tpcompile.per_rank import resolve
from tpcompile.program import Program


def bind_groups(mesh: Mesh, group: dist.ProcessGroup) -> dict[str, str]:
    """c10d names of the groups that a program may use; the smaller ones of a factored degree are made here."""
    ranks = dist.get_process_group_ranks(group)
    mine = dist.get_rank(group)
    found: dict[str, str] = {}
    for name, groups in mesh.all_groups().items():
        members = next(g for g in groups if mine in g)
        if len(members) == mesh.degree:
            found[name] = group.group_name
        else:
            made = dist.new_group([ranks[m] for m in members], use_local_synchronization=True)
            found[name] = cast("dist.ProcessGroup", made).group_name
    return found


def bind(
    program: Program, rank: int, groups: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> torch.fx.Graph:
    """The program's graph for one rank: per-rank values picked, groups by their c10d names, attributes by new ones."""
    graph = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in program.graph.nodes:
        made = env[node] = graph.node_copy(node, lambda n: env[n])
        made.args = cast("tuple[Any, ...]", resolve(made.args, rank))
        made.kwargs = cast("dict[str, Any]", resolve(made.kwargs, rank))
        if node.op == "get_attr" and renamed:
            made.target = renamed.get(str(node.target), str(node.target))
        if transition_of(node.target) is not None:
            made.args = tuple(groups[a] if isinstance(a, str) else a for a in made.args)
            made.kwargs = {k: groups[a] if k == "group" else a for k, a in made.kwargs.items()}
    return graph


__all__ = ["bind", "bind_groups"]
