"""The transitions on real processes: against their meaning, against the simulation, eager, compiled and exported.

Starting processes takes seconds, so that each launch answers many questions; the tests read the answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from distributed import run
from hypothesis import Phase, given, settings
from test_simulate import close, holder, leaf, mlp, program, simulated
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transition_oracle import Case, Outcome, cases, failures

from tpcompile import collectives
from tpcompile.collectives import transition_of
from tpcompile.errors import TpcompileError
from tpcompile.runs import Parts, balanced, check_parts
from tpcompile.simulate import Simulation
from tpcompile.transitions import TRANSITIONS, messages, sent_bytes

# The table and its arithmetic.


def test_the_table_is_closed_under_adjoints() -> None:
    """Backward is what some transition between the gradients' states does forward; only H -> S has none: S -> P."""
    dual = {"R": "R", "S": "S", "H": "P", "P": "H"}
    forward = {(row.source, row.target): row.forward for row in TRANSITIONS.values() if row.name[:5] != "copy_"}
    forward["S", "P"] = "zero_pad"
    for row in TRANSITIONS.values():
        backward = {"all_reduce_runs": "all_reduce", "all_reduce_bucket": "all_reduce"}.get(row.backward, row.backward)
        assert forward[dual[row.target], dual[row.source]] == backward, row.name


def test_a_transition_is_found_by_its_function() -> None:
    for name, row in TRANSITIONS.items():
        assert transition_of(getattr(collectives, name)) is row
    assert transition_of(collectives.apply) is None
    assert transition_of(torch.add) is None
    assert transition_of("copy") is None


def test_generated_code_names_the_transition() -> None:
    assert "tpcompile_collectives_all_reduce(linear_default_1, 'tp')" in program(mlp, holder(up=ONES, down=ONES)).code


ONES = torch.ones(2, 2)


def test_sent_bytes_are_those_of_a_ring() -> None:
    assert sent_bytes("all_reduce", 100, 4, 4) == 2 * 100 * 3 * 4 // 4
    assert sent_bytes("all_gather", 100, 4, 4) == sent_bytes("reduce_scatter", 100, 4, 4) == 100 * 3 * 4 // 4
    assert sent_bytes("all_reduce", 100, 4, 1) == 0
    with pytest.raises(ValueError, match="'broadcast' is not a collective"):
        sent_bytes("broadcast", 1, 1, 2)
    assert messages(TRANSITIONS["copy"], 100, 4, 1) == ()
    assert [(m.kind, m.direction, m.bytes) for m in messages(TRANSITIONS["all_gather"], 100, 4, 2)] == [
        ("all_gather", "forward", 200),
        ("reduce_scatter", "backward", 200),
    ]


@pytest.mark.parametrize(("size", "members"), list(itertools.product(range(8), range(1, 5))))
def test_balanced_parts(size: int, members: int) -> None:
    parts = balanced(size, members)
    check_parts(parts)
    lengths = [length for ((_, length),) in parts]
    assert lengths == [size // members + (member < size % members) for member in range(members)]


def test_without_a_process_group_the_error_says_so() -> None:
    with pytest.raises(TpcompileError, match="there is no process group 'tp'") as caught:
        collectives.all_reduce(torch.ones(1), "tp")
    assert caught.value.why == "torch.distributed has no process group yet"


# On real processes.


@dataclass(frozen=True)
class Answer:
    """What one rank got for one case, and what was changed that must not be."""

    output: Tensor
    gradient: Tensor | None
    changed: tuple[str, ...]


def world() -> str:
    return cast("str", dist.group.WORLD.group_name)  # type: ignore[union-attr]


def answer(case: Case) -> Answer:
    """The case's transition on this rank; all_reduce and copy in place too, for every second seed."""
    rank = dist.get_rank()
    x, cotangent = leaf(case.inputs()[rank]), case.cotangents()[rank]
    kept, kept_cotangent = x.detach().clone(), cotangent.clone()
    operand, options = x, {}
    if case.name == "all_reduce" and case.seed % 2:
        operand, options = x.clone(), {"inplace": True}
    own_gradient = case.name == "copy" and case.seed % 2 == 1
    if own_gradient:
        options = {"inplace_backward": True}
    function: Callable[..., Any] = getattr(collectives, case.name)
    if case.name == "copy_all":
        y = function([operand, x.clone()], world())[0]
    else:
        y = function(operand, *case.arguments(rank), world(), **options)
    output = y.detach().clone()
    if y.requires_grad:
        y.backward(cotangent)
    changed = [] if torch.equal(x.detach(), kept) else ["the input"]
    changed += [] if own_gradient or torch.equal(cotangent, kept_cotangent) else ["the gradient"]
    return Answer(output, x.grad, tuple(changed))


@cache
def examples(ranks: int, count: int) -> list[Case]:
    """About ``count`` cases of each transition, the same in every run."""
    found: list[Case] = []
    for name in TRANSITIONS:

        @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate], deadline=None)
        @given(cases((name,), ranks))
        def collect(case: Case) -> None:
            found.append(case)

        collect()
    return found


def outcomes(answers: Sequence[Sequence[Answer]]) -> list[Outcome]:
    """From one list for each rank to one outcome for each case."""
    return [Outcome([a.output for a in each], [a.gradient for a in each]) for each in zip(*answers, strict=True)]


WRONG = {
    "copy": "identity",
    "all_reduce": "all_reduce",
    "gather": "reduce_scatter",
    "leave": "identity",
    "copy_all": "identity",
}


def wrong_answers() -> list[Answer]:
    """Negative control: the same questions with a wrong adjoint in the table."""
    table = cast("dict[str, Any]", TRANSITIONS)
    right = dict(table)
    try:
        table.update({name: replace(row, backward=WRONG.get(name, row.backward)) for name, row in right.items()})
        return [answer(case) for case in wrong_cases()]
    finally:
        table.update(right)


def wrong_cases() -> list[Case]:
    parts: Parts = balanced(4, dist.get_world_size() if dist.is_initialized() else 2)
    runs = (((0, 1),), ((0, 1),))
    return [Case(name, 2, (3, 4), 1, parts, parts, runs, torch.float64, False, 6) for name in sorted(WRONG)]


# Ways to run a function that must all give what eager gives. c10d's group name is baked into each.

PARTS: Parts = (((4, 2), (0, 1)), ((1, 3),))
FUNCTIONS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "copy": lambda x, g: collectives.copy(x * 2, g) * 3,
    "all_reduce": lambda x, g: collectives.all_reduce(x * 2, g, inplace=True) * 3,
    "scatter, gather": lambda x, g: collectives.gather(collectives.scatter(x * 1, 1, PARTS, g) * 2, 1, PARTS, g),
    "cut, all_gather": lambda x, g: collectives.all_gather(collectives.cut(x * 1, 1, PARTS, g) * 2, 1, PARTS, g),
    "balanced": lambda x, g: collectives.gather(collectives.scatter(x * 1, 0, None, g) * 2, 0, x.shape[0], g),
    "reduce_scatter": lambda x, g: collectives.reduce_scatter(x * 2, 1, PARTS, g) * 2,
    "reduce_scatter of rows": lambda x, g: collectives.reduce_scatter(x * 2, 0, None, g) * 2,
    "once": lambda x, g: collectives.once(x * 2, g) * 2,
    "leave": lambda x, g: collectives.leave(x * 2, g) * 2,
    "copy_segments": lambda x, g: collectives.copy_segments(x * 2, 1, ((0, 1), (4, 2)), g) * 2,
    "copy_all": lambda x, g: torch.cat(collectives.copy_all([x * 2, x[:1] * 3], g)),
}


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor, str], Tensor], group: str):
        super().__init__()
        self.function, self.group = function, group

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.group)


def modes(name: str) -> dict[str, Callable[[Calling], Callable[[Tensor], Tensor]]]:
    """``balanced`` is the one whose sizes matter: it is compiled and exported with a dynamic dim as well."""
    found: dict[str, Callable[[Calling], Callable[[Tensor], Tensor]]] = {
        "compiled": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
        "exported": lambda m: torch.export.export(m, (torch.ones(5, 6),)).module(),
        "checkpointed": lambda m: lambda x: cast("Tensor", checkpoint(m, x, use_reentrant=False)),
    }
    if name == "balanced":
        rows = {"x": {0: torch.export.Dim("rows", min=4)}}
        found["compiled, dynamic"] = lambda m: torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=True)
        found["exported, dynamic"] = lambda m: torch.export.export(m, (torch.ones(9, 6),), dynamic_shapes=rows).module()
    return found


def result(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = (torch.arange(30.0).reshape(5, 6) + dist.get_rank()).requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y) * (dist.get_rank() + 1)).sum(), x)
    return [y.detach(), grad]


def compiled_answers() -> dict[str, list[list[Tensor]]]:
    """For each function and mode: what eager gave, what the mode gave."""
    found: dict[str, list[list[Tensor]]] = {}
    for name, function in FUNCTIONS.items():
        module = Calling(function, world())
        eager = result(module)
        for mode, make in modes(name).items():
            torch.compiler.reset()
            found[f"{name}, {mode}"] = [eager, result(make(module))]
    return found


def other_answers() -> dict[str, Any]:
    """What needs no list: a whole program, second derivatives, gradients that do not exist, errors."""
    rank, found = dist.get_rank(), dict[str, Any]()
    gm, own, x = real_mlp(rank)
    for node in gm.graph.nodes:
        node.args = tuple(world() if arg == "tp" else arg for arg in node.args)
    gm.recompile()
    (y,) = gm(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    found["program"] = [y.detach(), x.grad, own["up"].grad, own["down"].grad]

    a, b, c = (
        torch.ones(2, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float64, torch.float32)
    )
    ya, yb, _ = collectives.copy_all([a, b, c], world())
    ((ya * (rank + 1)).sum() + (yb * 10).sum()).backward()
    found["bucket"] = [None if t.grad is None else t.grad.tolist() for t in (a, b, c)]

    leaf_sum = torch.ones(2, requires_grad=True)
    base = torch.ones(4) * leaf_sum.repeat(2)
    view = base[:2]
    summed = [collectives.all_reduce(t, world(), inplace=True) for t in (leaf_sum, view)]
    found["not in place"] = [leaf_sum.tolist(), base.tolist(), [t.tolist() for t in summed]]
    with torch.no_grad():
        dead = torch.ones(2)
        found["in place"] = collectives.all_reduce(dead, world(), inplace=True) is dead
        found["complex"] = collectives.all_reduce(torch.tensor([1 + 2j, rank * 1j]), world(), inplace=True).tolist()
        found["strided"] = collectives.all_reduce(torch.ones(3, 8)[:, :4], world(), inplace=True).tolist()
    x = torch.ones(2, requires_grad=True)
    y = collectives.all_reduce(collectives.copy(x, world()) * (rank + 1), world(), inplace=True)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    found["in place, differentiated twice"] = [y.tolist(), grad.tolist(), cast("Tensor", x.grad).tolist()]
    saved = torch.ones(2, requires_grad=True).tanh()  # tanh needs its result for backward
    try:
        collectives.all_reduce(saved, world(), inplace=True).sum().backward()
    except RuntimeError as error:
        found["overwritten"] = str(error)

    wrong: dict[str, Callable[[], object]] = {
        "parts of another size": lambda: collectives.cut(torch.ones(5), 0, (((0, 2),), ((2, 2),)), world()),
        "another part": lambda: collectives.gather(torch.ones(3), 0, (((0, 2),), ((2, 2),)), world()),
        "another balanced part": lambda: collectives.gather(torch.ones(3), 0, 4, world()),
        "parts for three": lambda: collectives.cut(torch.ones(4), 0, (((0, 2),), ((2, 1),), ((3, 1),)), world()),
        "no such dim": lambda: collectives.cut(torch.ones(4), 1, None, world()),
        "no such group": lambda: collectives.all_reduce(torch.ones(4), "tp"),
    }
    for name, call in wrong.items():
        try:
            call()
        except (ValueError, TpcompileError) as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def real_mlp(rank: int) -> tuple[Any, dict[str, nn.Parameter], Tensor]:
    """Rank's half of a small MLP, its parameters and its input."""
    generator = torch.Generator().manual_seed(0)
    up, down, x = (torch.randn(shape, generator=generator).double() for shape in ((4, 3), (3, 4), (2, 3)))
    mine = slice(2 * rank, 2 * rank + 2)
    root = holder(up=up[mine].clone(), down=down[:, mine].clone())
    return program(mlp, root), dict(root.named_parameters()), leaf(x)


def two_ranks(given_cases: list[Case]) -> dict[str, Any]:
    return {
        "cases": [answer(case) for case in given_cases],
        "wrong": wrong_answers(),
        "compiled": compiled_answers(),
        "other": other_answers(),
    }


def three_ranks(given_cases: list[Case]) -> list[Answer]:
    return [answer(case) for case in given_cases]


COUNT = 12


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run(two_ranks, 2, examples(2, COUNT))


@pytest.mark.distributed
def test_on_two_ranks_the_meaning_is_kept_and_the_simulation_agrees(pair: list[dict[str, Any]]) -> None:
    check_real(examples(2, COUNT), [rank["cases"] for rank in pair])


@pytest.mark.distributed
def test_on_three_ranks_the_meaning_is_kept_and_the_simulation_agrees() -> None:
    found = examples(3, COUNT)
    check_real(found, run(three_ranks, 3, found))


def check_real(found: list[Case], answers: list[list[Answer]]) -> None:
    assert {case.name for case in found} == set(TRANSITIONS)
    for i, (case, outcome) in enumerate(zip(found, outcomes(answers), strict=True)):
        assert failures(case, outcome) == [], case
        assert [rank[i].changed for rank in answers] == [()] * case.ranks, case
        simulation = simulated(case)
        for real, expected in zip(outcome.outputs, simulation.outputs, strict=True):
            assert torch.equal(real, expected), case
        for real, expected in zip(outcome.gradients, simulation.gradients, strict=True):
            assert (real is None) == (expected is None), case
            assert real is None or expected is None or torch.equal(real, expected), case


@pytest.mark.distributed
def test_a_wrong_adjoint_is_found_on_real_ranks(pair: list[dict[str, Any]]) -> None:
    for case, outcome in zip(wrong_cases(), outcomes([rank["wrong"] for rank in pair]), strict=True):
        assert failures(case, simulated(case)) == []
        assert failures(case, outcome), case.name


@pytest.mark.distributed
def test_compiled_exported_and_checkpointed_are_eager(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert len(rank["compiled"]) == 3 * len(FUNCTIONS) + 2
        for name, (eager, other) in rank["compiled"].items():
            assert all(torch.equal(a, b) for a, b in zip(eager, other, strict=True)), name


@pytest.mark.distributed
def test_a_program_and_its_second_derivative_agree_with_the_simulation(pair: list[dict[str, Any]]) -> None:
    halves = [real_mlp(rank) for rank in (0, 1)]
    attributes = [cast("dict[str, Tensor]", own) for _, own, _ in halves]
    xs = [x for _, _, x in halves]
    outputs = Simulation(halves[0][0], 2, {"tp": [[0, 1]]}, attributes).run([[x] for x in xs])
    total = torch.stack([y.square().sum() for (y,) in outputs]).sum()
    grads = torch.autograd.grad(total, xs, create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()
    for rank, (real, (y,)) in enumerate(zip(pair, outputs, strict=True)):
        up, down = attributes[rank]["up"], attributes[rank]["down"]
        for a, b in zip(real["other"]["program"], (y.detach(), xs[rank].grad, up.grad, down.grad), strict=True):
            close(a, b)


@pytest.mark.distributed
def test_one_bucket_per_dtype_leaves_what_has_no_gradient_alone(pair: list[dict[str, Any]]) -> None:
    assert [rank["other"]["bucket"] for rank in pair] == [[[3.0, 3.0], [20.0, 20.0], None]] * 2


@pytest.mark.distributed
def test_in_place_only_where_autograd_allows_it(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["other"]["not in place"] == [[1.0, 1.0], [1.0] * 4, [[2.0, 2.0], [2.0, 2.0]]]
        assert rank["other"]["in place"] is True
        assert rank["other"]["complex"] == [2 + 4j, 1j]
        assert rank["other"]["strided"] == [[2.0] * 4] * 3
        assert rank["other"]["in place, differentiated twice"] == [[3.0] * 2, [18.0] * 2, [648.0] * 2]
        assert "modified by an inplace operation" in rank["other"]["overwritten"]


@pytest.mark.distributed
def test_wrong_arguments_are_refused_before_anything_is_sent(pair: list[dict[str, Any]]) -> None:
    expected = {
        "parts of another size": "ValueError: parts (((0, 2),), ((2, 2),)) for dim 0 of shape (5,)",
        "another part": "ValueError: parts (((0, 2),), ((2, 2),)) for dim 0 of shape (3,) on member 0 of ",
        "another balanced part": "ValueError: parts 4 for dim 0 of shape (3,) on member 0 of ",
        "parts for three": "ValueError: parts (((0, 2),), ((2, 1),), ((3, 1),)) for a group of 2",
        "no such dim": "ValueError: dim 1 of a tensor of 1 dims",
        "no such group": "TpcompileError: there is no process group 'tp'",
    }
    for name, message in expected.items():
        assert pair[0]["other"][name].startswith(message), name
