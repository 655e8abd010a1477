"""The statistics of cross-entropy as one node of autograd: what its parts give, twice, and where graphs have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from hypothesis import given
from hypothesis import strategies as st
from test_decompose import Loss, ids
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

import tpcompile
from tpcompile import Spec, collectives, kernels
from tpcompile import cross_entropy_sums as file
from tpcompile.cross_entropy_sums import cross_entropy_sums
from tpcompile.passes.cross_entropy import sum_together
from tpcompile.program import Program
from tpcompile.rank_code import bind
from tpcompile.runs import Runs

aten = torch.ops.aten
TOTAL = 11
Function = Callable[..., tuple[Tensor, ...]]


def parts(
    x: Tensor, largest: Tensor, dim: int, keepdim: bool, index: Tensor, held: Runs, total: int
) -> tuple[Tensor, ...]:
    """What one call stands for."""
    shifted = x - largest
    return shifted.exp().sum([dim], keepdim), kernels.gather_part(shifted, dim, index, held, total)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # of the others than the classes
    dim: int
    keepdim: bool
    held: Runs
    used: tuple[bool, bool] = (True, True)  # which of the two results the loss reads

    def arguments(self) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(len(self.shape))
        classes = sum(length for _, length in self.held)
        shape, one = ([*self.shape[: self.dim], n, *self.shape[self.dim :]] for n in (classes, 1))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        index = torch.randint(0, TOTAL, one, generator=generator)
        largest = x.amax(self.dim, True) + torch.rand(one, generator=generator, dtype=torch.float64)
        return x.requires_grad_(), largest, self.dim, self.keepdim, index, self.held, TOTAL


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    count = draw(st.sampled_from([2, 4]))
    ends = sorted(draw(st.sets(st.integers(0, TOTAL), min_size=count, max_size=count)))
    held = tuple((start, end - start) for start, end in zip(ends[::2], ends[1::2], strict=True))
    used = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return Case(shape, draw(st.integers(0, len(shape))), draw(st.booleans()), held, used)


CASE = Case((2, 3), 1, False, ((1, 2), (6, 3)))


def results(function: Function, case: Case) -> list[Tensor]:
    """Outputs, first and second gradients, first gradients without a graph of their own, and those of two backwards."""
    x, *others = case.arguments()

    def loss() -> tuple[Tensor, list[Tensor]]:
        outputs = [*function(x, *others)[:2]]
        terms = (outputs[0].log().square(), (outputs[1] + 1).pow(3))
        return torch.stack([t.sum() for t, used in zip(terms, case.used, strict=True) if used]).sum(), outputs

    total, outputs = loss()
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x)
    (plain,) = torch.autograd.grad(loss()[0], x)
    total, _ = loss()
    total.backward(retain_graph=True)
    total.backward()
    assert x.grad is not None
    return [*outputs, first, second, plain, x.grad]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    assert len(one) == len(other)
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


# ---------------------------------------------------------------------------------------------- the call
@given(cases())
def test_one_call_is_its_parts_and_so_are_its_gradients(case: Case) -> None:
    got = results(cross_entropy_sums, case)
    assert close(got, results(parts, case))
    assert torch.equal(got[-1], 2 * got[-2])  # nothing that is saved is overwritten


def test_autograd_agrees_that_gradients_are_those_of_the_numbers() -> None:
    x, *others = CASE.arguments()
    call: Any = lambda x: cross_entropy_sums(x, *others)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


Backward = Callable[..., Any]


def doubled(real: Backward, ctx: Any, *grads: Any) -> Any:
    return (real(ctx, *grads)[0] * 2, None, None, None)


def of_one_derivative(real: Backward, ctx: Any, *grads: Any) -> Any:
    return real(ctx, *grads[:2], None)


def picked_elsewhere(real: Backward, ctx: Any, *grads: Any) -> Any:
    exponentials, local, elsewhere = ctx.saved_tensors
    saved = exponentials, local, torch.zeros_like(elsewhere)
    return real(SimpleNamespace(saved_tensors=saved, call=ctx.call), *grads)


def overwriting(real: Backward, ctx: Any, *grads: Any) -> Any:
    result = real(ctx, *grads)
    ctx.saved_tensors[0].data.mul_(2)
    return result


@pytest.mark.parametrize("wrong", [doubled, of_one_derivative, picked_elsewhere, overwriting])
def test_a_wrong_backward_is_noticed(wrong: Backward, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: Any = getattr(file, "_Sums")  # noqa: B009
    expected, real = results(parts, CASE), sums.backward
    assert close(results(cross_entropy_sums, CASE), expected)
    monkeypatch.setattr(sums, "backward", staticmethod(lambda ctx, *grads: wrong(real, ctx, *grads)))
    assert not close(results(cross_entropy_sums, CASE), expected)


def kept(function: Function) -> int:
    """How many tensors as large as the logits are kept for backward."""
    x, *others = CASE.arguments()
    sizes: list[int] = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        function(x, *others)
    return sizes.count(x.numel())


def test_one_tensor_is_kept_for_backward() -> None:
    assert kept(cross_entropy_sums) == 1
    assert kept(parts) > 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_needs_no_gradient_has_none_and_nothing_is_overwritten(mode: Callable[[], Any]) -> None:
    x, *others = CASE.arguments()
    expected = parts(x, *others)
    x = x.detach() if mode is torch.enable_grad else x
    before = x.detach().clone()
    with mode():
        got = cross_entropy_sums(x, *others)
    assert not any(y.requires_grad for y in got)
    assert close([*got[:2]], [*expected])
    assert torch.equal(x, before)
    assert all(y.requires_grad for y in cross_entropy_sums(CASE.arguments()[0], *others))


@pytest.mark.parametrize("function", [cross_entropy_sums, parts])
def test_classes_that_there_are_not_are_refused(function: Function) -> None:
    x, largest, dim, keepdim, index, held, total = CASE.arguments()
    for bad in (-1, total):
        wrong = index.clone()
        wrong.view(-1)[1] = bad
        with pytest.raises(IndexError, match=f"{bad}.*, the dim has {total} positions"):
            function(x, largest, dim, keepdim, wrong, held, total)
    function(x, largest, dim, keepdim, index.fill_(total - 1), held, total)


def test_torch_compile_traces_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[Tensor]:
        x, *others = CASE.arguments()
        compiled = torch.compile(lambda x: cross_entropy_sums(x, *others)[:2], backend="eager", fullgraph=True)
        outputs = compiled(x)
        (gradient,) = torch.autograd.grad(outputs[0].log().square().sum() + (outputs[1] + 1).pow(3).sum(), x)
        return [*outputs, gradient]

    outputs, gradient = results(parts, CASE)[:2], results(parts, CASE)[2]
    assert close(answers(), [*outputs, gradient])
    real = kernels.gather_part
    monkeypatch.setattr(kernels, "gather_part", lambda *args: real(*args).detach())
    assert not close(answers(), [*outputs, gradient])


# ---------------------------------------------------------------------------------------------- finding it
def found_in(program: Program, rank: int) -> list[tuple[Any, ...]]:
    """What the pass has found, of one rank."""
    return described(bind(program, rank, {name: name for name in program.mesh.all_groups()}))


def described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What every call is given behind the tensors."""
    found = [node for node in graph.nodes if node.target is cross_entropy_sums]
    return [(node.args[2], node.args[3], *node.args[5:]) for node in found]


def calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """:func:`described`, after :func:`sum_together`."""
    before = [node.target for node in graph.nodes]
    sum_together(graph)
    graph.lint()
    found, targets = described(graph), [node.target for node in graph.nodes]
    for part in (aten.exp.default, kernels.gather_part):
        assert targets.count(part) == before.count(part) - len(found)
    return found


def test_the_loss_of_a_language_model_is_found_once() -> None:
    model, given = zoo.build("llama_gqa", 1, True), dict(zoo.inputs("llama_gqa"))
    inputs = {**given, "labels": given["input_ids"]}
    program = tpcompile.rewrite(model, degree=2, example_inputs=inputs, gather_logits=False)
    half = zoo.VOCABULARY // 2
    for rank in range(2):
        assert found_in(program, rank) == [(1, False, ((rank * half, half),), zoo.VOCABULARY)]


@pytest.mark.parametrize(("options", "count"), [({}, 1), ({"reduction": "none"}, 1), ({"label_smoothing": 0.1}, 0)])
def test_it_is_not_found_where_all_shifted_logits_are_read(options: dict[str, object], count: int) -> None:
    program = tpcompile.rewrite(
        Loss(**options), Spec.parse("embed head vocab"), degree=2, example_inputs=(ids(0), ids(1))
    )
    assert len(found_in(program, 1)) == count


Make = Callable[[fx.Graph, fx.Node, fx.Node], Any]


def made(variant: str = "", group: str = "tp") -> fx.Graph:
    """The ops as a program has them, or with one thing changed."""
    graph = fx.Graph()
    x, labels = graph.placeholder("x"), graph.placeholder("labels")

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    largest = call(aten.amax.default, call(aten.detach.default, x), [1], True)
    if variant != "a maximum with a gradient":
        largest = call(collectives.all_reduce_max, largest, group)
    shifted = call(aten.sub.Tensor, x, largest, **({"alpha": 2} if variant == "alpha" else {}))

    def pick() -> fx.Node:
        source = labels
        if variant == "noise":
            source = call(aten.randint_like.default, labels, TOTAL)
        elif variant == "the sum in the index":
            source = call(aten.remainder.Scalar, call(aten.to.dtype, summed, torch.int64), TOTAL)
        index = call(aten.unsqueeze.default, call(aten.clone.default, source), 1)
        return call(kernels.gather_part, shifted, 1, index, ((2, 5),), TOTAL)

    picked = pick() if variant in ("picked first", "and read at once") else None
    early = [call(aten.neg.default, picked)] if variant == "and read at once" else []
    exponentials = call(aten.exp.default, shifted)
    kwargs = {"dtype": torch.float64} if variant == "dtype" else {}
    dims = [0] if variant == "another dim" else [-1] if variant == "a negative dim" else [1]
    summed = call(aten.sum.dim_IntList, exponentials, dims, *([True] if variant == "keepdim" else []), **kwargs)
    logarithm = call(aten.log.default, summed)
    if variant == "written labels":
        call(aten.add_.Tensor, labels, 1)
    picked = picked or pick()
    outputs = [logarithm, *early, picked]
    if variant == "shifted logits":
        outputs.append(call(aten.mean.default, shifted))
    if variant == "exponentials":
        outputs.append(call(aten.mean.default, exponentials))
    if variant == "no pick":
        graph.erase_node(outputs.pop())
    graph.output(tuple(outputs))
    return graph


@pytest.mark.parametrize("variant", ["", "picked first", "and read at once", "keepdim"])
def test_the_graph_gives_what_it_gave(variant: str, group: None) -> None:
    """Also where the labels are made behind the sum."""
    world: Any = dist.group.WORLD

    def answers(graph: fx.Graph) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        outputs = fx.GraphModule(nn.Module(), graph)(x, torch.tensor([0, 3, 6, 7]))
        return [*outputs, *torch.autograd.grad([y.pow(3).sum() for y in outputs], x)]

    name = world.group_name
    together, apart = made(variant, name), made(variant, name)
    assert calls(together) == [(1, variant == "keepdim", ((2, 5),), TOTAL)]
    assert close(answers(together), answers(apart))
    assert not close(answers(together)[-3:], answers(made("alpha", name))[-3:])  # the control


@pytest.mark.parametrize(
    "variant",
    [
        "shifted logits", "exponentials", "a maximum with a gradient", "alpha", "dtype", "another dim",
        "a negative dim", "the sum in the index", "noise", "written labels", "no pick",
    ],
)  # fmt: skip
def test_whatever_else_is_read_or_asked_for_is_left_alone(variant: str) -> None:
    graph = made(variant)
    before = str(graph)
    assert calls(graph) == []
    assert str(graph) == before
    assert len(calls(made())) == 1  # the control
