"""torch.compile on a compiled module: one graph, equal results, the same collectives, few recompilations."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from issued import Sent
from test_distributed_models import Widened, longer, said, widened
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils import _pytree as pytree

import tpcompile
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.errors import CaptureError
from tpcompile.layers import Layer
from tpcompile.module import TensorParallel
from tpcompile.spec import Spec
from tpcompile.traced_calls import accepts
from tpcompile.transitions import sent_bytes

# Dynamo looks at the .grad of whatever a region is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

ALLOWED = 1e-12
NAMES = ("gpt2", "llama_gqa", "bert_mlm")


def compiled(name: str, model: nn.Module, inputs: Mapping[str, Any]) -> TensorParallel:
    text = zoo.MODELS[name].spec
    return tpcompile.compile(model, text and Spec.parse(text), example_inputs=inputs)


def graphs() -> int:
    """How many graphs Dynamo has made since it was last reset."""
    return counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------------------------- on two ranks
@dataclass(frozen=True)
class Found:
    output: float
    gradient: float
    names: bool  # the same parameters got a gradient


def compare(one: nn.Module, tp: TensorParallel, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Found:
    """One step of the model and of ``call``, which is ``tp`` behind torch.compile, from one generator state."""
    outputs: list[Any] = []
    for module, forward, mode in ((one, one, Widened()), (tp, call, nullcontext())):
        module.zero_grad()
        torch.manual_seed(7)
        with mode:
            outputs.append(forward(**inputs))
        backward(outputs[-1])
    assert type(outputs[0]) is type(outputs[1])
    wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    got = tpcompile.full_gradients(tp)
    pairs = zip(*map(pytree.tree_leaves, outputs), strict=True)
    return Found(
        output=max(relative_error(a.detach(), b.detach()) for a, b in pairs if isinstance(a, Tensor)),
        gradient=max(gradient_errors(wanted, got).values()),
        names=list(wanted) == list(got),
    )


KINDS = {
    torch.ops._c10d_functional.all_reduce.default: "all_reduce",
    torch.ops._c10d_functional.all_gather_into_tensor.default: "all_gather",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: "reduce_scatter",
}


def is_symbolic(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def counting(into: Sent) -> Callable[..., Any]:
    """A backend that runs what it is given, and counts the collectives in it."""

    def compiler(direction: str) -> Callable[..., Any]:
        def compile_graph(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            for node in graph.graph.nodes:
                if (kind := KINDS.get(node.target)) is not None:
                    values = [n.meta["val"] for n in (node, *node.all_input_nodes)]
                    whole = max(values, key=Tensor.numel)
                    sent = sent_bytes(kind, whole.numel(), whole.element_size(), dist.get_world_size())
                    into[kind, direction, -1 if is_symbolic(sent) else sent] += 1
                else:
                    assert "c10d" not in str(node.target) or "wait_tensor" in str(node.target)
            return make_boxed_func(graph.forward)

        return compile_graph

    return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))


def on_a_rank(names: Sequence[str], backend: str, layers: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    inductor.fallback_random = True  # the masks of eager dropout
    found: dict[str, Any] = {}
    for name in names:
        torch.compiler.reset()
        counters.clear()
        inputs, model = widened(zoo.inputs(name)), zoo.build(name, layers, training=True).double()
        with Widened():
            tp = compiled(name, model, inputs)
        counted: Sent = Counter()
        call = torch.compile(tp, fullgraph=True, backend=counting(counted) if backend == "counting" else backend)
        answers: dict[str, Any] = {"train": compare(model, tp, call, inputs)}
        answers |= {"issued": Counter(counted), "said": said(tp)}
        answers["longer"] = compare(model, tp, call, longer(inputs))
        answers["longest"] = compare(model, tp, call, longer(longer(inputs)))
        answers["graphs"] = graphs()
        model.eval()
        tp.eval()
        with Widened(), torch.no_grad():
            tp(**inputs)
        answers["eval"] = compare(model, tp, call, inputs)
        answers["graphs in the end"] = graphs()
        if dist.get_rank() == 1:
            with torch.no_grad():
                for parameter in tp.parameters():
                    parameter.mul_(1 + 1e-6)
        answers["spoilt"] = compare(model, tp, call, inputs)
        found[name] = answers
    return found


class Dropped(nn.Module):
    """Draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.up(x).relu()))


def seeded_differently() -> str:
    torch.manual_seed(0)
    tp = tpcompile.compile(Dropped(), Spec.parse("up column\ndown row"), example_inputs=(torch.ones(2, 4),))
    torch.manual_seed(dist.get_rank())
    try:
        torch.compile(tp, fullgraph=True, backend="eager")(torch.ones(2, 4))
    except Exception as error:  # noqa: BLE001 - Dynamo wraps what is raised while it traces
        return str(error)
    return ""


@pytest.mark.distributed
def test_other_seeds_are_refused_while_tracing() -> None:
    for message in run(seeded_differently, 2):
        assert "ranks are seeded differently, and the model draws random numbers (dropout)" in message


@cache
def launched(names: Sequence[str], backend: str, layers: int) -> list[dict[str, Any]]:
    return run(on_a_rank, 2, names, backend, layers, timeout=540.0)


def check(names: Sequence[str], backend: str, layers: int = 2) -> None:
    for answers in launched(names, backend, layers):
        for name in names:
            for question in ("train", "longer", "longest", "eval"):
                found = answers[name][question]
                assert found.output <= ALLOWED, (name, question, found)
                assert found.gradient <= ALLOWED, (name, question, found)
                assert found.names
            assert answers[name]["graphs"] == 2, "one for the first sizes, one for all others"
            assert answers[name]["graphs in the end"] == 3
            assert answers[name]["spoilt"].output > ALLOWED
            assert answers[name]["spoilt"].gradient > ALLOWED


@pytest.mark.distributed
def test_one_graph_computes_what_one_device_does_and_sends_what_the_report_says() -> None:
    check(("gpt2",), "counting", 1)
    for answers in launched(("gpt2",), "counting", 1):
        assert answers["gpt2"]["issued"] == answers["gpt2"]["said"]
        assert {direction for _, direction, _ in answers["gpt2"]["issued"]} == {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.distributed
def test_other_models_too() -> None:
    check(NAMES[1:], "counting")
    for answers in launched(NAMES[1:], "counting", 2):
        for name in NAMES[1:]:
            assert answers[name]["issued"] == answers[name]["said"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", NAMES)
def test_inductor(name: str) -> None:
    check((name,), "inductor")


# ------------------------------------------------------------------------------------------------- in one process
@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "bert_mlm", "t5", "vit", "torch_transformer"])
def test_a_traced_call_accepts_only_what_an_eager_one_does(name: str) -> None:
    case = zoo.case(name)
    asked = accepts(case.captured)
    draw = random.Random(name)

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return draw.choice([value, value, value, None, 3])
        sizes = [draw.choice([n, n, n, n, 1, n + 1, 16, 17, 40]) for n in value.shape]
        return torch.ones(sizes, dtype=draw.choice([value.dtype] * 7 + [torch.float64]))

    answers: Counter[tuple[bool, bool]] = Counter()
    for _ in range(400):
        call = {n: changed(x) for n, x in case.inputs.items() if draw.random() < 0.97}
        traced = asked((), call)
        try:
            eager = case.captured.flatten((), call)
        except CaptureError:
            eager = None
        answers[traced is not None, eager is not None] += 1
        if traced is not None and eager is not None:
            assert all(a is b for a, b in zip(traced, eager, strict=True))
    assert asked((), case.inputs) is not None
    assert answers[True, False] == 0
    assert answers[False, True] == 0, "the same, where arguments are not nested"
    assert answers[True, True] > 10
    assert answers[False, False] > 10


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def seeded(call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    torch.manual_seed(3)
    return call(**inputs)


def test_a_call_without_a_graph_is_refused_with_fullgraph(group: None) -> None:
    inputs = zoo.inputs("nanogpt")
    tp = compiled("nanogpt", zoo.build("nanogpt"), inputs)
    call = torch.compile(tp, fullgraph=True, backend="aot_eager")
    call(**inputs)
    tp.train()
    with pytest.raises(Unsupported, match="tpcompile has no graph yet for this call"):
        call(**inputs)
    expected, before = seeded(tp, inputs), graphs()
    assert torch.equal(seeded(call, inputs), expected)
    assert graphs() == before + 1


def test_without_fullgraph_it_is_captured_and_then_compiled(group: None) -> None:
    inputs = zoo.inputs("nanogpt")
    tp = compiled("nanogpt", zoo.build("nanogpt"), inputs)
    tp.train()
    call = torch.compile(tp, backend="aot_eager")
    first = seeded(call, inputs)
    assert (len(tp._variants), graphs()) == (2, 0)
    assert torch.equal(seeded(call, inputs), first)
    assert (len(tp._variants), graphs()) == (2, 1)


def test_the_models_own_limits_hold_behind_torch_compile(group: None) -> None:
    """A length that the model refuses is not run through the graph."""
    inputs, context = zoo.inputs("nanogpt"), zoo.GPTSizes(1).context
    tp = compiled("nanogpt", zoo.build("nanogpt"), inputs)
    call = torch.compile(tp, backend="aot_eager")
    for length in (context - 3, context - 2, context - 1):
        ids = torch.ones(2, length, dtype=torch.long)
        assert torch.equal(call(ids), tp(ids))
    assert graphs() == 2
    for length in (context + 1, context + 2):
        with pytest.raises(CaptureError, match=r"assert length <= self\.context"):
            call(torch.ones(2, length, dtype=torch.long))
    assert len(tp._variants) == 1


def test_another_autocast_is_not_run_through_this_graph(group: None) -> None:
    inputs = zoo.inputs("mlp")
    tp = compiled("mlp", zoo.build("mlp"), inputs)
    call = torch.compile(tp, backend="aot_eager")
    plain = call(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        first, second, eager = call(**inputs), call(**inputs), tp(**inputs)
    assert torch.equal(first, eager)
    assert torch.equal(second, eager)
    assert not torch.equal(first, plain)
    assert torch.equal(call(**inputs), plain)


def test_static_sizes_are_compiled_one_by_one(group: None) -> None:
    """The control of the counts: without dynamic sizes every length is a graph of its own."""
    tp = compiled("mlp", zoo.build("mlp"), zoo.inputs("mlp"))
    call = torch.compile(tp, fullgraph=True, backend="aot_eager", dynamic=False)
    for length in (4, 5, 6, 7):
        call(torch.ones(2, length, zoo.WIDTH))
    assert graphs() == 4


def layers_compiled(name: str, layers: int) -> tuple[int, int]:
    """Layers, and the graphs of torch.compile on each of them."""
    torch.compiler.reset()
    counters.clear()
    model, inputs = zoo.build(name, layers, training=True), zoo.inputs(name)
    tp = compiled(name, model, inputs)
    parts = [module for module in tp.modules() if isinstance(module, Layer)]
    for layer in parts:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    got = tp(**inputs)
    backward(got)
    torch.manual_seed(3)
    torch.testing.assert_close(pytree.tree_leaves(got)[0], pytree.tree_leaves(model(**inputs))[0])
    return len(parts), graphs()


@pytest.mark.parametrize("name", ["gpt2", "nanogpt"])
def test_alike_layers_share_one_compiled_graph(group: None, name: str) -> None:
    assert layers_compiled(name, 2) == (2, 1)
    assert layers_compiled(name, 9) == (9, 1)  # more than the 8 graphs that Dynamo makes of one function


class Pyramid(nn.Module):
    """Layers of one class, and of two widths by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in (16, 24) * 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_differ_do_not_share_one(group: None) -> None:
    x = torch.ones(2, 8)
    tp = tpcompile.compile(Pyramid(), Spec.parse("layers.*.0 column\nlayers.*.2 row"), example_inputs=(x,))
    layers = [module for module in tp.modules() if isinstance(module, Layer)]
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    tp(x.requires_grad_())  # as what comes out of a layer does
    assert (len(layers), graphs()) == (4, 2)


def spread_step() -> tuple[float, float, float]:
    """How far a compiled step with sequence parallelism and recomputation is from the eager one: logits, gradients, and
    logits at another length."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = zoo.build("llama_gqa").double(), zoo.inputs("llama_gqa")
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"]] * 2, 1)[:, :11]}
    tp = tpcompile.compile(model, example_inputs=inputs, sequence_parallel=True, recompute="attention")
    logits = tp(**inputs).logits
    logits.square().mean().backward()
    eager = {n: p.grad.clone() for n, p in tp.named_parameters() if p.grad is not None}
    tp.zero_grad()
    whole = torch.compile(tp, fullgraph=True, backend="aot_eager")
    again = whole(**inputs).logits
    again.square().mean().backward()
    gradients = max(float((p.grad - eager[n]).abs().max()) for n, p in tp.named_parameters() if p.grad is not None)
    other = float((whole(**longer).logits - tp(**longer).logits).abs().max())
    return float((again - logits).abs().max()), gradients, other


@pytest.mark.slow
def test_one_graph_with_sequence_parallelism_and_recomputation() -> None:
    for found in run(spread_step, 2):
        assert max(found) < 1e-12
