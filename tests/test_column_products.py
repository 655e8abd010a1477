"""f and its products as one node: the same numbers, gradients and second gradients, and the sum travels meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx
import zoo
from distributed import run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpcompile import collectives
from tpcompile.column_products import call_together, column_products
from tpcompile.layers import Functions
from tpcompile.rank_code import bind

aten = torch.ops.aten
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": torch.nn.functional.linear,
    "mm": lambda x, w, _: x @ w,
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
}


@dataclass(frozen=True)
class Case:
    transition: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    biases: tuple[tuple[int, ...] | None, ...]
    where: Any = ()
    frozen: bool = False  # the first weight


CASES = {
    "q, k and v": Case("copy", (2, 3, 4), ("linear", "linear", "linear"), (None, None, None)),
    "one with a bias": Case("copy", (3, 4), ("linear",), ((5,),)),
    "a frozen weight": Case("copy", (3, 4), ("linear", "linear"), ((5,), None), frozen=True),
    "Conv1D": Case("copy", (3, 4), ("addmm", "mm"), ((5,), None)),
    "a bias of each row": Case("copy", (3, 4), ("addmm", "addmm"), ((3, 5), (1, 6))),
    "gathered": Case("all_gather", (2, 3, 4), ("linear", "linear"), ((5,), None), (((0, 3),), ((3, 3),))),
    "gathered in unlike parts": Case("all_gather", (2, 2, 4), ("linear",), (None,), (((0, 2),), ((2, 1),))),
    "nothing": Case("copy", (0, 4), ("linear",), ((5,),)),
}
Function = Callable[..., tuple[Tensor, ...]]


def apart(
    x: Tensor, transition: str, dim: int, where: Any, group: str, kinds: Any, *weights: Any
) -> tuple[Tensor, ...]:
    """What one call stands for."""
    y = collectives.copy(x, group) if transition == "copy" else collectives.all_gather(x, dim, where, group)
    biases = weights[len(kinds) :]
    return tuple(PRODUCTS[kind](y, w, b) for kind, w, b in zip(kinds, weights, biases, strict=False))


def results(function: Function, case: Case) -> list[Tensor | None]:
    """On this rank: the products, their gradients, and gradients of these; the last of several products is unused."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    shape = list(case.shape)
    if case.where:
        shape[1] = case.where[rank][0][1]
    generator = torch.Generator().manual_seed(rank)

    def made(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x = made(*shape).requires_grad_()
    weights = [made(5 + i, 4) if kind == "linear" else made(4, 5 + i) for i, kind in enumerate(case.kinds)]
    biases = [None if sizes is None else made(*sizes) for sizes in case.biases]
    wanted = [x, *(w for w in (*weights, *biases) if w is not None)]
    for w in wanted:
        w.requires_grad_(not (case.frozen and w is weights[0]))
    wanted = [w for w in wanted if w.requires_grad]

    def products() -> tuple[Tensor, ...]:
        call = function(x * 1, case.transition, 1, case.where, group.group_name, case.kinds, *weights, *biases)
        return call[: len(case.kinds)]

    ys = products()
    used = ys[:-1] or ys
    first: Any = torch.autograd.grad([y.square().sum() for y in used], wanted, create_graph=True, allow_unused=True)
    second = torch.autograd.grad([g.square().sum() for g in first if g is not None], wanted, allow_unused=True)
    plain = torch.autograd.grad([y.pow(3).sum() for y in products()], wanted)
    return [*ys, *first, *second, *plain]


class Order(TorchDispatchMode):
    """Names of products and collectives as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "allreduce_"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def order(function: Function) -> list[str]:
    """Products and collectives of a backward."""
    group = dist.group.WORLD
    assert group is not None
    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    ys = function(x * 1, "copy", 0, (), group.group_name, ("linear", "linear"), *weights, None, None)[:2]
    with Order() as seen:
        torch.autograd.backward([y.sum() for y in ys])
    return seen.names


def unsummed(*_: Any) -> Any:
    """Negative control: a backward that forgets the sum over the ranks."""
    return lambda: _[1]


def answers() -> dict[str, Any]:
    found: dict[str, Any] = {
        name: (results(apart, case), results(column_products, case)) for name, case in CASES.items()
    }
    found["order"] = order(apart), order(column_products)
    real, collectives.begun = collectives.begun, unsummed
    found["unsummed"] = results(apart, CASES["q, k and v"]), results(column_products, CASES["q, k and v"])
    collectives.begun = real
    return found


def equal(pair: tuple[list[Tensor | None], list[Tensor | None]]) -> bool:
    expected, got = pair
    assert len(expected) == len(got)
    return all(
        a is b if a is None or b is None else torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(expected, got, strict=True)
    )


@pytest.mark.distributed
def test_on_two_ranks_one_call_is_the_transition_and_its_products() -> None:
    for rank in run(answers, 2):
        for name in CASES:
            assert equal(rank[name]), name
        assert not equal(rank["unsummed"])
        one_by_one, together = rank["order"]
        assert one_by_one[-1] == "allreduce_"
        assert together == ["mm", "allreduce_", "mm", "mm"], "the second product is added up in place, by addmm"


# ------------------------------------------------------------------------------------------------ finding them
def graph_of(*readers: str) -> torch.fx.Graph:
    """f, and what reads it; each weight is read right before its product."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, 4)
    f = graph.call_function(collectives.copy, (x, "tp"))
    f.meta["val"] = x.meta["val"]
    made: list[Any] = []
    for i, reader in enumerate(readers):
        weight = graph.get_attr(f"w{i}")
        if reader == "a computed weight":
            weight = graph.call_function(aten.neg.default, (weight,))
        given = {"twice": (f, f), "as weight": (weight, f)}.get(reader, (f, weight))
        target = aten.mul.Tensor if reader == "mul" else aten.linear.default
        node = graph.call_function(target, given)
        node.meta["val"] = torch.empty(2, 3) if reader == "a vector" else torch.empty(2, 3, 5)
        made.append(node)
    graph.output(tuple(made))
    return graph


def test_products_that_alone_read_f_are_called_together() -> None:
    graph = graph_of("linear", "linear", "linear")
    call_together(graph)
    graph.lint()
    (call,) = graph.find_nodes(op="call_function", target=column_products)
    assert call.args[1:6] == ("copy", 0, (), "tp", ("linear", "linear", "linear"))
    assert [str(w) for w in call.args[6:]] == ["w0", "w1", "w2", "None", "None", "None"]
    assert not graph.find_nodes(op="call_function", target=aten.linear.default)


@pytest.mark.parametrize("other", ["mul", "a computed weight", "twice", "as weight", "a vector"])
def test_they_are_not_where_something_else_reads_it_or_a_weight_comes_later(other: str) -> None:
    graph = graph_of("linear", other)
    before = str(graph)
    call_together(graph)
    assert str(graph) == before


@pytest.mark.parametrize(("name", "count"), [("llama_gqa", 3), ("gpt2", 3)])
def test_the_code_of_a_training_graph_calls_them_and_that_for_inference_does_not(name: str, count: int) -> None:
    """q, k and v; gate and up; the head."""
    for training in (True, False):
        program = zoo.program(name, 2, 1, training)
        bound = bind(program, 0, {group: group for group in program.mesh.all_groups()})
        assert inspect.getsource(Functions().of(bound, training)).count("column_products(") == count * training
