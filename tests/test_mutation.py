"""Ops that write into their operand: made ordinary where no alias can tell, else kept, and never read past."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from tpcompile.aliasing import aliases, holders, is_inplace, may_share
from tpcompile.capture import capture
from tpcompile.layout import Leaf, Mesh
from tpcompile.passes.emit import emit
from tpcompile.passes.functionalize import functionalize
from tpcompile.placement import Placement, cut_as, solve, uncut
from tpcompile.program import Program, Row
from tpcompile.rules import RULES, op_name
from tpcompile.simulate import Simulation

aten = torch.ops.aten

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "narrow": lambda h: h.narrow(1, 0, 2),
    "slice": lambda h: h[:, 1:],
    "select": lambda h: h[0],
    "transpose": lambda h: h.transpose(0, 1),
    "swapaxes": lambda h: h.swapaxes(0, 1),
    "movedim": lambda h: h.movedim(0, 1),
    "T": lambda h: h.T,
    "mT": lambda h: h.mT,
    "reshape": lambda h: h.reshape(-1),
    "flatten": lambda h: h.flatten(),
    "view_as": lambda h: h.view_as(h),
    "expand_as": lambda h: h.expand_as(h),
    "broadcast_to": lambda h: h.broadcast_to(2, 4, 6),
    "broadcast_tensors": lambda h: torch.broadcast_tensors(h, h)[1],
    "atleast_3d": torch.atleast_3d,
    "diagonal": lambda h: h.diagonal(),
    "unfold": lambda h: h.unfold(1, 2, 1),
    "as_strided": lambda h: h.as_strided((2,), (1,)),
    "chunk": lambda h: h.chunk(2, 1)[1],
    "tensor_split": lambda h: h.tensor_split(2)[0],
    "hsplit": lambda h: torch.hsplit(h, 2)[0],
    "unbind": lambda h: h.unbind(0)[2],
    "unsqueeze, squeeze": lambda h: h.unsqueeze(0).squeeze(0),
    "view_as_complex": lambda h: torch.view_as_real(torch.view_as_complex(h.unflatten(1, (3, 2)))),
    "detach": lambda h: h.detach(),
    "contiguous": lambda h: h.contiguous(),
    "to": lambda h: h.to(torch.float32),
    "type_as": lambda h: h.type_as(h),
    "dropout in eval mode": lambda h: torch.dropout(h, 0.5, False),
    "a copy": lambda h: h.clone(),
    "a sum": lambda h: h + 1,
}


class Written(nn.Module):
    """Writes to a value that a view was made of before, and reads the view."""

    def __init__(self, view: Callable[[Tensor], Tensor]):
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        v = self.view(h)
        h.add_(1)
        h.mul_(3)
        return v.sum() * 2 + h.sum()


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_sees_what_is_written_to_its_base(name: str) -> None:
    model, x = Written(VIEWS[name]), torch.randn(4, 6)
    captured = capture(model, (x,))
    program = functionalize(Program(captured, captured.graph_module, 2))
    assert torch.equal(program.graph_module(x)[0], model(x))


def test_without_an_alias_ops_become_ordinary() -> None:
    captured = capture(Written(lambda h: h.exp()), (torch.randn(4, 6),))
    program = functionalize(Program(captured, captured.graph_module, 2))
    assert not any(is_inplace(n) for n in program.graph.nodes)
    assert {"aten.add.Tensor", "aten.mul.Tensor"} <= {op_name(n) for n in program.graph.nodes}


def test_a_written_input_is_left_alone() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1) * 2

    captured = capture(Writes(), (torch.zeros(4),))
    program = functionalize(Program(captured, captured.graph_module, 2))
    x = torch.zeros(4)
    assert program.graph_module(x)[0].tolist() == [2.0] * 4
    assert x.tolist() == [1.0] * 4


def test_ops_that_may_share_memory() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    sharing = [
        graph.call_function(aten.narrow.default, (x, 0, 0, 1)),
        graph.call_function(aten.view.default, (x, [-1])),
        graph.call_function(aten.add_.Tensor, (x, 1)),
        graph.call_function(aten.dropout.default, (x, 0.1, False)),
    ]
    x.meta["val"] = torch.zeros(3)
    fresh = [graph.call_function(aten.exp.default, (x,)), graph.call_function(aten.add.Tensor, (x, 1))]
    assert all(map(may_share, sharing))
    assert not any(map(may_share, [*fresh, x]))
    assert aliases(x, holders(graph)) == {x, *sharing}


def test_a_part_made_before_a_write_is_not_read_after_it() -> None:
    """``x * w``, write to a view of ``x``, ``x * w`` again: the cut of x must be made anew."""
    mesh, graph = Mesh((2,)), torch.fx.Graph()
    value, weight = torch.arange(4.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    table: dict[str, Row] = {}

    def node(made: torch.fx.Node, real: Any, placed: Placement | None = None) -> torch.fx.Node:
        made.meta["val"] = real
        if placed is not None:
            table[made.name] = Row((), (placed,), (placed,), "given")
            return made
        ins = [table[n.name].settled[0] for n in made.all_input_nodes]
        captured: Any = SimpleNamespace(size=int, parameters={}, buffers={}, constants={}, hints={})
        call = Program(captured, torch.fx.GraphModule({}, torch.fx.Graph()), 2).call(made)
        rule = RULES.get(op_name(made), RULES["aten.clone.default"])
        found = solve(rule.sentence(call), ins, mesh)
        table[made.name] = Row(found.operands, found.results, found.results, found.reason)
        return made

    x = node(graph.placeholder("x"), value, uncut((4,), mesh))
    w = node(graph.placeholder("w"), weight, cut_as([Leaf(4, (0,))], mesh))
    before = node(graph.call_function(aten.mul.Tensor, (x, w)), value * weight)
    view = node(graph.call_function(aten.slice.Tensor, (x, 0, 1, 3)), value[1:3])
    node(graph.call_function(aten.add_.Tensor, (view, 10.0)), value[1:3])
    after = node(graph.call_function(aten.mul.Tensor, (x, w)), value * weight)
    graph.output(())
    captured: Any = SimpleNamespace(size=int, parameters={}, buffers={}, constants={}, hints={})
    program = Program(captured, torch.fx.GraphModule({}, graph), 2, mesh=mesh, table=table)
    emitted = emit(program).graph_module
    last = {str(n.meta["origin"]): n for n in emitted.graph.nodes if "origin" in n.meta}
    emitted.graph.output_node().args = ((last[before.name], last[after.name]),)
    inputs = [[value.clone(), weight[:2]], [value.clone(), weight[2:]]]
    with torch.no_grad():
        made = Simulation(emitted, 2, mesh.all_groups()).run(inputs)
    written = value + torch.tensor([0.0, 10.0, 10.0, 0.0])
    assert torch.equal(torch.cat([first for first, _ in made]), value * weight)
    assert torch.equal(torch.cat([second for _, second in made]), written * weight)
