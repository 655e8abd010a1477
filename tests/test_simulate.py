"""The simulation against the meaning of every transition, and against dense models."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transition_oracle import Case, Outcome, cases, failures, partitions, take

from tpcompile import collectives
from tpcompile.per_rank import PerRank, resolve
from tpcompile.simulate import PRIMITIVES, Recorder, Simulation
from tpcompile.transitions import TRANSITIONS, messages

aten = torch.ops.aten


def program(build: Callable[[fx.Graph], Any], root: nn.Module | None = None) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(build(graph))
    return fx.GraphModule(root or nn.Module(), graph)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.dtype.is_floating_point)


def simulated(case: Case, recorder: Recorder | None = None) -> Outcome:
    """The case's transition on the simulation; copy_all gets a second tensor, whose gradient nobody asks for."""

    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        first = [x, graph.call_function(aten.clone.default, (x,))] if case.name == "copy_all" else x
        arguments: list[Any] = list(map(PerRank, zip(*map(case.arguments, range(case.ranks)), strict=True)))
        y = graph.call_function(getattr(collectives, case.name), (first, *arguments, "tp"))
        return (graph.call_function(lambda ys: ys[0], (y,)) if case.name == "copy_all" else y,)

    xs = [leaf(x) for x in case.inputs()]
    ranks = [list(range(case.ranks))]
    outputs = Simulation(program(build), case.ranks, {"tp": ranks}).run([[x] for x in xs], recorder=recorder)
    ys = [y for (y,) in outputs]
    if ys[0].requires_grad:
        torch.autograd.backward(ys, case.cotangents())
    return Outcome([y.detach() for y in ys], [x.grad for x in xs])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_a_transition_keeps_the_meaning_forward_and_backward(case: Case) -> None:
    assert failures(case, simulated(case)) == []


ALIKE = {"all_reduce_bucket": "all_reduce"}  # the bucket differs in its messages only


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_the_oracle_finds_every_wrong_primitive(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (((0, 1),), ((2, 1),)) if name == "copy_segments" else ()
    parts = (((0, 2), (3, 1)), ((2, 1), (4, 1)))
    case = Case(name, 2, (3, 5), 1, parts, parts, runs, torch.float64, False, 7)
    assert failures(case, simulated(case)) == []
    row = TRANSITIONS[name]
    right = getattr(row, direction)
    for wrong in PRIMITIVES:
        if wrong == "all_reduce_max":  # on values that ranks hold in common a maximum is the identity
            continue
        if ALIKE.get(wrong, wrong) == ALIKE.get(right, right):
            continue
        monkeypatch.setitem(TRANSITIONS, name, replace(row, **{direction: wrong}))  # type: ignore[arg-type]
        try:
            found = failures(case, simulated(case))
        except (ValueError, RuntimeError, IndexError) as error:
            found = [str(error)]
        assert found, f"{name} with {wrong} {direction} passed"


@settings(max_examples=100, deadline=None)
@given(cases())
def test_what_is_recorded_is_what_the_table_says(case: Case) -> None:
    recorder = Recorder()
    simulated(case, recorder)
    numel = torch.Size(case.shape).numel()
    if case.name == "copy_segments":
        numel = take(torch.empty(case.shape), case.dim, case.runs[0]).numel()
    expected = [
        (message.kind, message.direction, message.bytes)
        for message in messages(TRANSITIONS[case.name], numel, case.dtype.itemsize, case.ranks)
        if numel and (message.direction == "forward" or case.dtype.is_floating_point)
    ]
    assert [(row.kind, row.direction, row.bytes) for row in recorder.rows] == expected
    assert recorder.bytes("forward") + recorder.bytes("backward") == recorder.bytes()


# Programs.


def mlp(graph: fx.Graph) -> Any:
    """Column, then row: x [b, d], up [f, d], down [d, f]."""
    x = graph.placeholder("x")
    inside = graph.call_function(collectives.copy, (x, "tp"))
    up = graph.call_function(aten.linear.default, (inside, graph.get_attr("up")))
    act = graph.call_function(aten.tanh.default, (up,))
    down = graph.call_function(aten.linear.default, (act, graph.get_attr("down")))
    return (graph.call_function(collectives.all_reduce, (down, "tp")),)


def holder(**tensors: Tensor) -> nn.Module:
    root = nn.Module()
    for name, tensor in tensors.items():
        root.register_parameter(name, nn.Parameter(tensor))
    return root


def close(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_cut_mlp_equals_the_dense_one(data: st.DataObject) -> None:
    ranks, hidden = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 7))
    parts = data.draw(partitions(hidden, ranks))
    torch.manual_seed(0)
    root = holder(up=torch.randn(hidden, 3).double(), down=torch.randn(3, hidden).double())
    up, down = root.get_parameter("up"), root.get_parameter("down")
    x = torch.randn(2, 3).double()
    dense_x = leaf(x)
    dense = (dense_x @ up.T).tanh() @ down.T
    dense.square().sum().backward()
    own = [{"up": leaf(take(up, 0, runs)), "down": leaf(take(down, 1, runs))} for runs in parts]
    xs = [leaf(x) for _ in range(ranks)]
    outputs = Simulation(program(mlp, root), ranks, {"tp": [list(range(ranks))]}, own).run([[each] for each in xs])
    torch.stack([y.square().sum() for (y,) in outputs]).sum().backward()
    for rank, runs in enumerate(parts):
        close(outputs[rank][0], dense)
        close(xs[rank].grad, dense_x.grad)
        assert torch.equal(outputs[rank][0], outputs[0][0])
        for name, dim in (("up", 0), ("down", 1)):
            grad = root.get_parameter(name).grad
            assert grad is not None
            close(own[rank][name].grad, take(grad, dim, runs))


def test_a_second_derivative_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    up, down, x = torch.randn(4, 3).double(), torch.randn(3, 4).double(), torch.randn(2, 3).double()
    root = holder(up=up, down=down)

    def penalty(y: Tensor, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return grad.square().sum()

    dense = {"x": leaf(x.clone()), "up": leaf(up.clone()), "down": leaf(down.clone())}
    penalty((dense["x"] @ dense["up"].T).tanh() @ dense["down"].T, dense["x"]).backward()
    own = [
        {"up": leaf(up[2 * r : 2 * r + 2].clone()), "down": leaf(down[:, 2 * r : 2 * r + 2].clone())} for r in (0, 1)
    ]
    xs = [leaf(x.clone()) for _ in (0, 1)]
    ys = [y for (y,) in Simulation(program(mlp, root), 2, {"tp": [[0, 1]]}, own).run([[each] for each in xs])]
    grads = torch.autograd.grad(torch.stack([y.square().sum() for y in ys]).sum(), xs, create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()
    for rank in (0, 1):
        close(xs[rank].grad, dense["x"].grad)
        assert dense["up"].grad is not None
        close(own[rank]["up"].grad, dense["up"].grad[2 * rank : 2 * rank + 2])


def test_two_mesh_axes() -> None:
    """4 = 2 * 2: a sum over the minor axis, then over the major one, is the sum over all."""

    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        minor = graph.call_function(collectives.all_reduce, (x, "tp1"))
        return minor, graph.call_function(collectives.all_reduce, (minor, "tp0"))

    groups = {"tp1": [[0, 1], [2, 3]], "tp0": [[0, 2], [1, 3]]}
    recorder = Recorder()
    outputs = Simulation(program(build), 4, groups).run(
        [[torch.tensor(2.0**rank)] for rank in range(4)], recorder=recorder
    )
    assert [tuple(float(y) for y in ys) for ys in outputs] == [(3, 15), (3, 15), (12, 15), (12, 15)]
    assert [(row.group, row.ranks) for row in recorder.rows] == [("tp1", 2), ("tp0", 2)]


def test_every_rank_draws_what_a_single_device_draws() -> None:
    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        dropped = graph.call_function(aten.dropout.default, (x, 0.5, True))
        noise = graph.call_function(torch.rand_like, (dropped,))
        return dropped, noise, graph.call_function(aten.dropout.default, (noise, 0.5, True))

    gm, x = program(build), torch.ones(50)
    torch.manual_seed(3)
    expected, after = gm(x), torch.get_rng_state()
    torch.manual_seed(3)
    outputs = Simulation(gm, 3, {}).run([x])
    assert all(torch.equal(a, b) for ys in outputs for a, b in zip(ys, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(expected[0], expected[2])


def nested() -> fx.GraphModule:
    root = nn.Module()
    for name in ("first", "second"):
        root.add_module(name, program(mlp, holder(up=torch.randn(2, 2), down=torch.randn(2, 2))))

    def build(graph: fx.Graph) -> Any:
        (x,) = (graph.placeholder("x"),)
        for name in ("first", "second"):
            x = graph.call_function(lambda ys: ys[0], (graph.call_module(name, (x,)),))
        return (x,)

    return program(build, root)


def test_nested_graph_modules_take_attributes_by_their_full_name() -> None:
    gm = nested()
    recorder, names = Recorder(), list[str]()
    with torch.no_grad():
        attributes = [{"second.up": gm.get_parameter("second.up") * 0}] * 2
        outputs = Simulation(gm, 2, {"tp": [[0, 1]]}, attributes).run(
            [torch.ones(1, 2)], on_node=lambda node, values: names.append(node.name), recorder=recorder
        )
    assert [row.path for row in recorder.rows] == ["first", "second"]
    assert names.count("all_reduce") == 2
    assert all(float(y.abs().sum()) == 0.0 for (y,) in outputs)


def test_values_are_freed_after_their_last_use() -> None:
    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        for _ in range(5):
            x = graph.call_function(torch.add, (x, 1))
        return (x,)

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(node: fx.Node, values: list[Any]) -> None:
        nonlocal most
        if node.op == "call_function":
            alive.extend(weakref.ref(value) for value in values)
            most = max(most, sum(ref() is not None for ref in alive))

    Simulation(program(build), 2, {}).run([torch.ones(1)], on_node=watch)
    assert most == 4  # operands and results, on two ranks


def test_graphs_of_their_own() -> None:
    def graph_of(rank: int) -> fx.GraphModule:
        return program(lambda graph: (graph.call_function(torch.add, (graph.placeholder("x"), rank)),))

    outputs = Simulation([graph_of(0), graph_of(1)], 2, {}).run([torch.zeros(1)])
    assert [float(y) for (y,) in outputs] == [0.0, 1.0]
    other = program(lambda graph: (graph.call_function(torch.mul, (graph.placeholder("x"), 1)),))
    with pytest.raises(ValueError, match="graphs part at node 1"):
        Simulation([graph_of(0), other], 2, {}).run([torch.zeros(1)])


def test_per_rank_arguments_are_found_in_any_nesting() -> None:
    value = PerRank((1, 2))
    args = ((value, [value]), {"a": (value,)}, slice(0, value), 5)
    assert resolve(args, 0) == ((1, [1]), {"a": (1,)}, slice(0, 1), 5)
    assert resolve(args, 1) == ((2, [2]), {"a": (2,)}, slice(0, 2), 5)
    assert value.at(1) == 2
    assert repr(value) == "PerRank((1, 2))"


def one(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    return program(lambda graph: (graph.call_function(function, (graph.placeholder("x"), *args)),))


Inputs = Sequence[Sequence[Tensor]] | Sequence[Tensor]
REFUSED: dict[str, tuple[fx.GraphModule, Inputs, str]] = {
    "other shapes in a sum": (
        one(collectives.all_reduce, "tp"),
        [[torch.ones(2)], [torch.ones(3)]],
        "different tensors",
    ),
    "other dtypes in a sum": (one(collectives.all_reduce, "tp"), [[torch.ones(2)], [torch.ones(2).int()]], "different"),
    "a gradient on one rank only": (
        one(collectives.copy, "tp"),
        [[torch.ones(2)], [torch.ones(2, requires_grad=True)]],
        "on some ranks and not on others",
    ),
    "a shared leaf": (one(collectives.copy, "tp"), [torch.ones(2, requires_grad=True)], "a leaf of its own"),
    "an unknown group": (one(collectives.copy, "dp"), [torch.ones(2)], "group 'dp' is not one of"),
    "overlapping parts": (
        one(collectives.gather, 0, (((0, 2),), ((1, 2),)), "tp"),
        [torch.ones(2)],
        "overlap at index 1",
    ),
    "a gap": (one(collectives.gather, 0, (((0, 2),), ((3, 2),)), "tp"), [torch.ones(2)], "leave a gap at index 2"),
    "parts of another size": (one(collectives.cut, 0, (((0, 2),), ((2, 2),)), "tp"), [torch.ones(5)], "sizes .5, 5."),
    "parts for another group": (one(collectives.cut, 0, (((0, 5),),), "tp"), [torch.ones(5)], "for a group of 2"),
    "parts that differ": (
        one(collectives.cut, 0, PerRank(((((0, 2),), ((2, 2),)), (((2, 2),), ((0, 2),)))), "tp"),
        [torch.ones(4)],
        "different parts",
    ),
    "inputs for three": (one(collectives.copy, "tp"), [[torch.ones(1)]] * 3, "inputs for 3 ranks of 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_hang_or_be_wrong_on_real_ranks_is_refused(name: str) -> None:
    gm, inputs, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Simulation(gm, 2, {"tp": [[0, 1]]}).run(inputs)


def test_a_parameter_shared_by_ranks_is_refused() -> None:
    gm = program(lambda graph: (graph.get_attr("w"),), holder(w=torch.ones(2)))
    with pytest.raises(ValueError, match="w requires a gradient"):
        Simulation(gm, 2, {}).run([])
    with torch.no_grad():
        assert torch.equal(Simulation(gm, 2, {}).run([])[1][0], torch.ones(2))


def test_groups_hold_every_rank_once() -> None:
    with pytest.raises(ValueError, match="does not hold each of 3 ranks once"):
        Simulation(program(lambda graph: ()), 3, {"tp": [[0, 1]]})
    with pytest.raises(ValueError, match="2 graphs and 3 attributes for 3 ranks"):
        Simulation([program(lambda graph: ())] * 2, 3, {})
