"""Python's functions in place of ops: same values, same gradients, and no op without a sample that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_samples import SAMPLES, call, real
from torch import Tensor
from torch.utils import _pytree as pytree

from tpcompile.bindings import BINDINGS, bind_directly
from tpcompile.layout import Leaf
from tpcompile.placement import Placement
from tpcompile.rule_truth import Given, Number, Sample

MADE = (  # what needs no rule
    call("addmm.default", real(5), real(3, 4), real(4, 5)),
    call("arange.default", 5, device=torch.device("cpu"), pin_memory=False),
    call("sym_size.int", real(3, 4), -1),
)
BOUND = [sample for sample in (*SAMPLES, *MADE) if sample.op in {str(op) for op in BINDINGS}]


def drawn(sample: Sample) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for one call; float tensors require a gradient."""
    generator = torch.Generator().manual_seed(0)

    def value(x: Any) -> Any:
        if isinstance(x, Number):
            return x.value
        if not isinstance(x, Given):
            return x
        tensor = x.draw(generator)
        return tensor.requires_grad_(tensor.is_floating_point() and not x.constant)

    leaves, spec = pytree.tree_flatten((list(sample.args), dict(sample.kwargs)))
    return pytree.tree_unflatten([value(x) for x in leaves], spec)


def outcome(function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """What ``function`` returns, and the gradients of its operands."""
    args, kwargs = drawn(sample)
    torch.manual_seed(0)
    result = function(*args, **kwargs)
    operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    results = [torch.tensor(x) if isinstance(x, int) else x for x in pytree.tree_leaves(result)]
    if not results[0].requires_grad:
        return results
    weighted = [(x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in results]
    return [*results, *torch.autograd.grad(torch.stack(weighted).sum(), operands, materialize_grads=True)]


def same(function: Callable[..., Any], op: Callable[..., Any], sample: Sample) -> bool:
    got, expected = outcome(function, sample), outcome(op, sample)
    return len(got) == len(expected) and all(
        x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)
        for x, y in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("sample", BOUND, ids=str)
def test_function_is_the_op(sample: Sample) -> None:
    op, function = next((op, function) for op, function in BINDINGS.items() if str(op) == sample.op)
    assert callable(op)
    assert same(function, op, sample)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((1, 2, 5), (1, 2, 3)),
        ((-1, 0, 3), (1, 0, 3)),
        ((1, 4, 2**63 - 1), (1, 4, 2)),
        ((1, None, 3), (1, 0, 3)),
        ((1, 6, 9), (1, 6, 0)),
        ((0, 0, 1), None),  # of a cut dim, a rank holds other positions
        ((1, -2, 6), None),
        ((1, 4, 2), None),
        ((1, 0, 6, 2), None),
        ((), None),
    ],
)
def test_a_slice_of_known_positions_is_a_narrow(args: tuple[Any, ...], expected: tuple[int, ...] | None) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    whole = torch.arange(24.0).view(4, 6)
    x.meta |= {"val": whole, "placement": Placement(("S",), (Leaf(8, (0,)), Leaf(6)))}
    graph.output(graph.call_function(torch.ops.aten.slice.Tensor, (x, *args)))
    bind_directly(graph)
    (node,) = graph.find_nodes(op="call_function", target=torch.narrow) or [None]
    assert (None if node is None else node.args[1:]) == expected
    found = torch.fx.GraphModule(torch.nn.Module(), graph)(whole)
    assert torch.equal(found, torch.ops.aten.slice.Tensor(whole, *args))


def test_every_binding_has_a_sample() -> None:
    assert {str(op) for op in BINDINGS} == {sample.op for sample in BOUND}


def test_another_function_is_noticed() -> None:
    sample = next(s for s in BOUND if s.op == "aten.gelu.default")
    assert not same(torch.relu, torch.ops.aten.gelu.default, sample)
    sample = next(s for s in BOUND if s.op == "aten.sub.Tensor")
    assert not same(lambda x, y, **kwargs: torch.sub(x.detach(), y, **kwargs), torch.ops.aten.sub.Tensor, sample)


def test_code_calls_the_functions() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.add.Tensor, (graph.call_function(torch.ops.aten.abs.default, (x,)), 1))
    graph.output(y)
    bind_directly(graph)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.abs.default,
        torch.add,
    ]
    found = torch.fx.GraphModule(torch.nn.Module(), graph)(torch.tensor([-2.0]))
    assert torch.equal(found, torch.tensor([3.0]))
