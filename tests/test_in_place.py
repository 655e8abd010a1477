"""All-reduces in place: only where nobody else can see the memory, and bit for bit what they give out of place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx
import zoo
from distributed import run
from torch import Tensor

from tpcompile import collectives, kernels, layers
from tpcompile.compiler import rewrite_captured
from tpcompile.module import TensorParallel
from tpcompile.passes import PIPELINE
from tpcompile.passes.in_place import FRESH, OWN_GRADIENT, SAME_MEMORY, in_place
from tpcompile.passes.parameter_copies import parameter_copies
from tpcompile.passes.tidy import tidy
from tpcompile.primitives import PRIMITIVES
from tpcompile.program import Pass, Program

aten = torch.ops.aten
BASE: tuple[Pass, ...] = tuple(PIPELINE[: [p.__name__ for p in PIPELINE].index("emit") + 1])
OUT_OF_PLACE = (*BASE, tidy, parameter_copies)

# ---------------------------------------------------------------------------------------------- what the tables say
Shapes = tuple[tuple[int, ...], ...]
MATRICES: tuple[Shapes, ...] = (((3, 4), (4, 5)), ((1, 1), (1, 1)), ((1, 4), (4, 1)))
ALIKE: tuple[Shapes, ...] = (((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((1,), (1,)), ((), ()), ((3, 4), ()))
ALONE: tuple[Shapes, ...] = (((3, 4),), ((1, 4),), ((1, 1),))
LINEAR: tuple[Shapes, ...] = (
    ((3, 4), (5, 4)), ((2, 3, 4), (5, 4)), ((4,), (5, 4)), ((1, 1), (1, 1)), ((1, 3, 1), (1, 1)),
    ((3, 4), (5, 4), (5,)), ((1, 4), (5, 4), (5,)), ((4,), (5, 4), (5,)),
)  # fmt: skip
MATMUL: tuple[Shapes, ...] = (
    *MATRICES, ((4,), (4,)), ((3, 4), (4,)), ((2, 3, 4), (4,)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)),
    ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (1, 5, 4, 6)), ((1,), (1,)), ((1, 1), (1,)), ((1, 3, 4), (4, 1)),
)  # fmt: skip
SAMPLES: dict[str, tuple[Callable[..., Tensor], tuple[Shapes, ...]]] = {
    "aten.linear.default": (aten.linear.default, LINEAR),
    "aten.mm.default": (aten.mm.default, MATRICES),
    "aten.bmm.default": (aten.bmm.default, (((2, 3, 4), (2, 4, 5)), ((1, 1, 1), (1, 1, 1)))),
    "aten.matmul.default": (aten.matmul.default, MATMUL),
    "aten.mv.default": (aten.mv.default, (((3, 4), (4,)), ((1, 1), (1,)))),
    "aten.mul.Tensor": (aten.mul.Tensor, ALIKE),
    "aten.conv1d.default": (aten.conv1d.default, (((2, 3, 8), (4, 3, 2)), ((1, 1, 1), (1, 1, 1)))),
    "aten.conv2d.default": (aten.conv2d.default, (((2, 3, 6, 6), (4, 3, 2, 2)), ((1, 1, 1, 1), (1, 1, 1, 1)))),
    "aten.addmm.default": (aten.addmm.default, (((5,), (3, 4), (4, 5)), ((3, 5), (3, 4), (4, 5)))),
    "aten.baddbmm.default": (aten.baddbmm.default, (((2, 3, 5), (2, 3, 4), (2, 4, 5)),)),
    "aten.add.Tensor": (aten.add.Tensor, ALIKE),
    "aten.sub.Tensor": (aten.sub.Tensor, ALIKE),
    "aten.div.Tensor": (aten.div.Tensor, ALIKE),
    "aten.sum.default": (aten.sum.default, ALONE),
    "aten.sum.dim_IntList": (lambda x: aten.sum.dim_IntList(x, [0]), ALONE),
    "embedding_rows": (
        lambda w: kernels.embedding_rows(w, torch.tensor([[0, 5], [3, 7]]), ((2, 4),), -1, 8),
        (((4, 3),), ((4, 1),)),
    ),
    "aten.layer_norm.default": (
        lambda x, *wb: aten.layer_norm.default(x, x.shape[-1:], *wb),
        (((3, 4),), ((3, 4), (4,), (4,)), ((1, 4), (4,), (4,)), ((3, 1), (1,), (1,))),
    ),
    "aten.rms_norm.default": (
        lambda x, *w: aten.rms_norm.default(x, x.shape[-1:], *w), (((3, 4),), ((3, 4), (4,)), ((3, 1), (1,))),
    ),
    "aten.pow.Tensor_Scalar": (lambda x: aten.pow.Tensor_Scalar(x, 2), ALONE),
    **{
        f"aten.{name}.default": (getattr(aten, name).default, ALONE)
        for name in ("silu", "gelu", "relu", "tanh", "sigmoid", "rsqrt")
    },
}  # fmt: skip


def drawn(shapes: Shapes) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.rand(shape).add_(0.5).requires_grad_() for shape in shapes]


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def shared_gradients(function: Callable[..., Tensor], shapes: Shapes) -> set[int]:
    """Operands whose gradient lies in memory that something else holds: the incoming gradient, another, an operand."""
    xs = drawn(shapes)
    y = function(*xs)
    incoming = torch.ones_like(y, memory_format=torch.contiguous_format)
    grads = torch.autograd.grad(y, xs, incoming)
    held = [memory(x) for x in (*xs, y, incoming)]
    return {
        i
        for i, g in enumerate(grads)
        if memory(g) in held or any(memory(g) == memory(other) for j, other in enumerate(grads) if j != i)
    }


@pytest.mark.parametrize("op", sorted(OWN_GRADIENT))
def test_gradients_are_written_to_new_memory(op: str) -> None:
    function, samples = SAMPLES[op]
    for shapes in samples:
        assert not shared_gradients(function, shapes) & OWN_GRADIENT[op], shapes


def test_the_check_finds_gradients_that_are_shared() -> None:
    assert shared_gradients(aten.add.Tensor, ((3, 4), (3, 4))) == {0, 1}
    assert shared_gradients(lambda x: aten.view.default(x, [12]), ((3, 4),)) == {0}
    assert shared_gradients(aten.addmm.default, ((3, 5), (3, 4), (4, 5))) == {0}
    assert 2 not in OWN_GRADIENT["aten.linear.default"]
    assert not OWN_GRADIENT.keys() & SAME_MEMORY


class Doubled(torch.autograd.Function):
    """What an all-reduce of two equal ranks does to its operand, in place or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not inplace:
            return x * 2
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


def overwritten(function: Callable[..., Tensor], shapes: Shapes) -> str | None:
    """What goes wrong when the result is overwritten, or None."""
    xs = drawn(shapes)
    kept = [x.detach().clone() for x in xs]
    with torch.no_grad():
        y = function(*xs)
        if memory(y) in [memory(x) for x in xs]:
            return "the result is an operand"
    expected, got = [], []
    for inplace, grads in ((False, expected), (True, got)):
        y = function(*xs)
        if inplace and y._is_view():  # the transition then works out of place
            return None
        try:
            grads += torch.autograd.grad(Doubled.apply(y, inplace).sum(), xs)
        except RuntimeError as error:
            return str(error).split(":")[0]
    if not all(torch.equal(x, k) for x, k in zip(xs, kept, strict=True)):
        return "an operand changed"
    return None if all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)) else "a gradient changed"


@pytest.mark.parametrize("op", sorted(FRESH))
def test_results_may_be_overwritten(op: str) -> None:
    function, samples = SAMPLES[op]
    for shapes in samples:
        assert overwritten(function, shapes) is None, shapes


def test_the_check_finds_results_that_are_needed() -> None:
    assert overwritten(lambda x: aten.view.default(x, [12]), ((3, 4),)) == "the result is an operand"
    assert overwritten(aten.sigmoid.default, ((3, 4),)) is not None
    assert overwritten(lambda x: aten.permute.default(x, [1, 0]), ((3, 4),)) == "the result is an operand"


# ---------------------------------------------------------------------------------------------- where it is marked
def program_of(graph: torch.fx.Graph) -> Program:
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    return Program(zoo.case("mlp").captured, module, 2)


def marked(build: Callable[[torch.fx.Graph, torch.fx.Node], Iterator[Any]]) -> dict[str, Any]:
    """Keyword arguments of the only transition of a small graph."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(tuple(build(graph, x)))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(4, 4)
    done = in_place(program_of(graph))
    assert not any(node.kwargs for node in graph.nodes)
    (found,) = (n.kwargs for n in done.graph.nodes if n.target in (collectives.copy, collectives.all_reduce))
    return dict(found)


def call(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    return graph.call_function(target, args)


def copied(*uses: Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node]) -> dict[str, Any]:
    def build(graph: torch.fx.Graph, x: torch.fx.Node) -> Iterator[torch.fx.Node]:
        f = call(graph, collectives.copy, x, "tp")
        yield from (use(graph, f) for use in uses)

    return marked(build)


def product(graph: torch.fx.Graph, x: torch.fx.Node) -> torch.fx.Node:
    return call(graph, aten.mm.default, x, graph.find_nodes(op="placeholder")[0])


YES = {"inplace_backward": True}


def test_f_is_marked_where_only_products_use_it() -> None:
    assert copied(product) == YES
    assert copied(product, product, lambda g, f: call(g, aten.mul.Tensor, f, f)) == YES
    assert copied(lambda g, f: product(g, call(g, aten.view.default, f, [4, 4]))) == YES
    assert copied(lambda g, f: call(g, aten.layer_norm.default, f, [4], None, None)) == YES


def test_f_is_not_marked_where_its_gradient_may_be_shared() -> None:
    assert copied() == {}
    assert copied(lambda g, f: f) == {}  # the program's output
    assert copied(lambda g, f: call(g, aten.add.Tensor, f, g.find_nodes(op="placeholder")[0])) == {}
    assert copied(product, lambda g, f: call(g, aten.neg.default, f)) == {}
    assert copied(lambda g, f: call(g, aten.view.default, f, [4, 4])) == {}
    assert copied(lambda g, f: call(g, aten.addmm.default, f, f, f)) == {}  # the addend's gradient is the result's
    assert copied(lambda g, f: call(g, aten.layer_norm.default, g.find_nodes(op="placeholder")[0], [4], f, f)) == {}


def reduced(make: Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node], *others: Any) -> dict[str, Any]:
    def build(graph: torch.fx.Graph, x: torch.fx.Node) -> Iterator[torch.fx.Node]:
        partial = make(graph, x)
        yield call(graph, collectives.all_reduce, partial, "tp")
        yield from (call(graph, target, partial) for target in others)

    return marked(build)


def test_g_is_marked_on_fresh_memory_alone() -> None:
    assert reduced(product) == {"inplace": True}
    assert reduced(product, aten.relu.default) == {}
    assert reduced(lambda g, x: call(g, aten.view.default, product(g, x), [4, 4])) == {}
    assert reduced(lambda g, x: call(g, aten.exp.default, x)) == {}
    assert reduced(lambda g, x: x) == {}


# ---------------------------------------------------------------------------------------------- on real processes
# with torch_transformer the gradient of the first f arrives transposed, and is copied
MODELS = [("mlp", False, 0), ("nanogpt", True, 0), ("torch_transformer", False, 1)]


def programs(name: str, training: bool) -> tuple[zoo.Case, list[Program]]:
    """One layer of a model for two ranks, out of place and in place."""
    case = zoo.case(name, 1, training)
    pipelines = (OUT_OF_PLACE, (*OUT_OF_PLACE, in_place))
    return case, [
        rewrite_captured(case.captured, case.spec, case.model, 2, ((), case.inputs), steps) for steps in pipelines
    ]


def step(case: zoo.Case, program: Program) -> tuple[list[Tensor | None], int]:
    """Outputs, and sums of gradients, of two steps on this rank, and how many all-reduces were in place."""
    count = 0
    real = PRIMITIVES["all_reduce"]

    def counting(x: Tensor, *args: Any) -> Tensor:
        nonlocal count
        y = real(x, *args)
        count += y is x
        return y

    table: Any = PRIMITIVES
    table["all_reduce"] = counting
    together, layers.call_together = layers.call_together, lambda graph: None  # which owns its gradient
    try:
        assert dist.group.WORLD is not None
        module = TensorParallel(case.model, program, case.spec, dist.group.WORLD)
        torch.manual_seed(0)
        found: list[Tensor | None] = []
        inputs = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in case.inputs.items()}
        for _ in range(2):
            output = module(**inputs)
            output = output if isinstance(output, Tensor) else output.logits
            output.square().sum().backward()
            found.append(output.detach().clone())
        return found + [x.grad for x in (*inputs.values(), *module.parameters())], count
    finally:
        table["all_reduce"], layers.call_together = real, together


def shared(inplace: bool) -> list[Tensor | None]:
    """Negative control: an addition hands its gradient to f and to its other operand."""
    p, x = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    other = p * 2
    assert dist.group.WORLD is not None
    f = collectives.copy(x * 3, dist.group.WORLD.group_name, inplace_backward=inplace)
    (f + other).mul(5).sum().backward()
    return [p.grad, x.grad]


def answers() -> dict[str, Any]:
    found: dict[str, Any] = {"shared": [shared(inplace) for inplace in (False, True)]}
    for name, training, _ in MODELS:
        case, both = programs(name, training)
        found[name] = [step(case, program) for program in both]
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_on_two_ranks_in_place_is_bit_for_bit_out_of_place() -> None:
    for rank in run(answers, 2):
        for name, training, strided in MODELS:
            (expected, none), (got, count) = rank[name]
            marks = [n.kwargs for n in programs(name, training)[1][1].graph.nodes]
            marked = sum(("inplace" in k) + ("inplace_backward" in k) for k in marks)
            assert none == 0
            assert count == 2 * (marked - strided) > 0
            assert len(got) == len(expected) > 2
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True) if a is not None), name
            assert [a is None for a in expected] == [b is None for b in got]
        right, wrong = rank["shared"]
        assert torch.equal(right[1], wrong[1])
        assert not torch.equal(right[0], wrong[0]), "marking f where its gradient is shared must be seen"
