"""Kept values: made once and again when something changes, never what the program or its caller writes into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from test_layers import tree
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from tpcompile import kept_values
from tpcompile.capture import capture
from tpcompile.kept_values import keep
from tpcompile.layers import Functions
from tpcompile.program import copy_graph


class Model(nn.Module):
    """A table of angles, of a buffer and of a size, as rotary embeddings have it."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.register_buffer("inv_freq", torch.rand(4))

    def angles(self, x: Tensor) -> Tensor:
        return torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq)


class Rotary(Model):
    def forward(self, x: Tensor) -> Tensor:
        a = self.angles(x)
        return x * (a.cos() * self.weight) + x.flip(-1) * a.sin() + a.cos()


@dataclass
class Made:
    """A model whose graph keeps values."""

    model: nn.Module
    root: nn.Module
    function: Callable[..., Any]
    runs: list[int]  # one for each time that the kept ops ran
    text: str
    inside: list[str]  # ops that are kept
    results: int  # values that are

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.function(self.root, x)


def made(
    kind: Callable[[], nn.Module], parameters: frozenset[str] | None = None, keeps: bool = True, recomputed: str = ""
) -> Made:
    torch.manual_seed(0)
    model = kind().train()
    captured = capture(model, (torch.randn(2, 5, 4),))
    _, graph = copy_graph(captured.graph_module)
    functions, runs, inside, results = Functions(), list[int](), list[str](), list[Any]()

    def counted(part: fx.Graph) -> Callable[..., Any]:
        inside.extend(str(node.target).removeprefix("aten.") for node in part.nodes if node.op == "call_function")
        results.extend(part.output_node().all_input_nodes)
        function = functions.of(part)

        def counting(*args: Any) -> Any:
            runs.append(1)
            return function(*args)

        return counting

    for node in graph.nodes:
        if str(node.target).removeprefix("aten.") == recomputed:
            node.meta["recompute"] = "a region"
    if keeps:
        keep(graph, frozenset(captured.parameters) if parameters is None else parameters, counted)
    graph.lint()
    text = str(graph)
    root = tree(captured, frozenset())
    return Made(model, root, functions.of(graph), runs, text, inside, len(results))


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


Kept = Callable[..., Any]


def careless(state: Callable[[Sequence[Tensor], Sequence[int]], Any]) -> Callable[[Kept, int], Kept]:
    """Negative control: what keeps its results for each ``state``, whatever else has changed."""

    def made(function: Kept, buffers: int) -> Kept:
        last: dict[Any, Any] = {}

        def kept(*operands: Any) -> Any:
            now = state(operands[:buffers], operands[buffers:])
            if now not in last:
                last[now] = function(None, *operands)
            return last[now]

        return kept

    return made


# ---------------------------------------------------------------------------------------------- what is made again
SIZES = ((2, 5), (3, 1), (2, 5), (2, 5), (1, 7), (3, 7), (2, 5))


def is_right_at_all_sizes() -> bool:
    """Results and gradients, bit for bit."""
    found = made(Rotary)
    for shape in SIZES:
        x, w = data(*shape), found.model.weight
        pairs: list[Sequence[Any]] = []
        for y in (found.model(x), found(x)[0]):
            pairs.append([y, *torch.autograd.grad(y.square().sum(), [x, w])])  # type: ignore[list-item]
        if not all(map(torch.equal, *pairs)):
            return False
    return True


def test_results_and_gradients_are_those_of_the_model_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right_at_all_sizes()
    monkeypatch.setattr(kept_values, "_kept", careless(lambda tensors, sizes: 0))
    assert not is_right_at_all_sizes()


def test_the_ops_run_once_until_a_size_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(most: int = kept_values.MOST) -> list[int]:
        found = made(Rotary)
        monkeypatch.setattr(kept_values, "MOST", most)
        counts: list[int] = []
        for shape in SIZES:
            found(data(*shape))
            counts.append(len(found.runs))
        return counts

    assert runs() == [1, 2, 3, 3, 4, 4, 5]  # a batch of another size has the same table; the last one is kept
    assert runs(2 * 5 * 4 * 4 + 16) == [1, 2, 3, 3, 4, 5, 5]  # those of five positions are small enough, and stay
    monkeypatch.undo()
    assert runs(0) == [1, 2, 3, 4, 5, 6, 7]


def replace(root: nn.Module) -> None:
    root.inv_freq = torch.rand(4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda root: root.inv_freq.copy_(torch.rand(4)),
    "mul_": lambda root: root.inv_freq.mul_(2),
    "an item": lambda root: root.inv_freq.__setitem__(1, 3.0),
    "through a view": lambda root: root.inv_freq[:2].zero_(),
    "load_state_dict": lambda root: root.load_state_dict({"inv_freq": torch.rand(4)}, strict=False),
    "another tensor": replace,
    "data": lambda root: setattr(root.inv_freq, "data", torch.rand(4)),
    "data.copy_": lambda root: root.inv_freq.data.copy_(torch.rand(4)),  # no version counts it
    "numpy": lambda root: root.inv_freq.numpy().fill(3.0),
    "to": lambda root: root.to(torch.float64),
}


def is_seen(change: Callable[[Any], Any], x: Tensor) -> bool:
    found, plain = made(Rotary), made(Rotary, keeps=False)
    if not torch.equal(found(x)[0], plain(x)[0]):
        return False
    for one in (found, plain):
        torch.manual_seed(1)
        change(one.root)
    return torch.equal(found(x)[0], plain(x)[0])


@pytest.mark.parametrize("change", CHANGES)
def test_a_buffer_that_was_written_or_replaced_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert is_seen(CHANGES[change], data(2, 5))
        monkeypatch.setattr(kept_values, "_kept", careless(lambda tensors, sizes: sizes))
        assert not is_seen(CHANGES[change], data(2, 5))


def test_a_buffer_may_have_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it had none before."""

    def has_one() -> bool:
        found, x = made(Rotary), data(2, 5)
        with torch.no_grad():
            found(x)
        buffer = cast("Tensor", found.root.inv_freq).requires_grad_()
        found(x)[0].sum().backward()
        return buffer.grad is not None

    assert has_one()
    monkeypatch.setattr(kept_values, "_kept", careless(lambda tensors, sizes: sizes))
    assert not has_one()


def test_what_nobody_reads_is_left_alone() -> None:
    graph = fx.Graph()
    x, buffer = graph.placeholder("x"), graph.get_attr("b")
    for _ in range(kept_values.WORTH):
        graph.call_function(torch.ops.aten.cos.default, (buffer,)).meta["val"] = torch.ones(2)
    graph.output((x,))
    before = str(graph)
    keep(graph, frozenset(), Functions().of)
    assert str(graph) == before


def test_inference_may_come_first_and_training_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def trains() -> bool:
        found, x = made(Rotary), data(2, 5)
        with torch.inference_mode():
            first = found(x)[0].clone()
            found(x)
        assert len(found.runs) == 1
        try:
            y = found(x)[0]
            y.sum().backward()
        except RuntimeError:  # inference tensors cannot be saved for backward
            return False
        return torch.equal(first, y) and x.grad is not None

    assert trains()
    monkeypatch.setattr(kept_values, "_kept", careless(lambda tensors, sizes: (sizes, tensors[0]._version)))
    assert not trains()


# ---------------------------------------------------------------------------------------------- what is kept at all
class WithTangents(Model):
    def forward(self, x: Tensor) -> Tensor:
        a = self.angles(x)
        return x * a.cos() + x.flip(-1) * a.sin() + a.tan()


def test_equal_ops_are_made_once() -> None:
    once, control = made(Rotary), made(WithTangents)
    assert sorted(once.inside) == ["arange.default", "cos.default", "outer.default", "sin.default", "to.dtype"]
    assert once.results == 2
    assert "tan.default" in control.inside
    assert control.results == 3


class Masked(Model):
    """With a mask of positions by positions, and a table that is large at any size."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.angles(x)
        mask = torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None]
        large = torch.arange(2.0**23).exp2() + x.shape[1]
        return mask.to(x.dtype) @ (x * a.cos() + x.flip(-1) * a.sin()) + large[-1]


def test_large_values_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = made(Masked).inside
    assert {"cos.default", "sin.default"} <= {*inside}
    assert not {"le.Tensor", "exp2.default"} & {*inside}
    monkeypatch.setattr(kept_values, "_is_thin", lambda value: True)
    assert {"le.Tensor", "exp2.default"} <= {*made(Masked).inside}


def test_what_is_recomputed_in_backward_is_not_kept() -> None:
    assert "sin.default" in made(Rotary).inside  # the control
    found, x = made(Rotary, recomputed="sin.default"), data(2, 5)
    assert "cos.default" in found.inside
    assert "sin.default" not in found.inside
    assert torch.equal(found(x)[0], found.model(x))


class Drawn(Model):
    """Random numbers, of sizes and of the table alone; what is left of the table is worth keeping."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[1]).cos().sin().exp()
        return x * F.dropout(self.angles(x).cos(), 0.5) + noise[:, None] + self.angles(x).sin()


class FromInputs(Model):
    """Three ops of the input, and one with a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cos().sin().exp() + self.angles(x).cos() * self.weight


def draws_again() -> bool:
    """The numbers of one device, and others every time."""
    found, x = made(Drawn), data(2, 5)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = found.model(x)
        torch.manual_seed(seed)
        if not torch.equal(found(x)[0], expected):
            return False
    return True


def test_random_numbers_are_drawn_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draws_again()
    found = made(Drawn)
    assert "outer.default" in found.inside
    assert not {"rand.default", "exp.default", "dropout.default"} & {*found.inside}
    monkeypatch.setattr(kept_values, "has_effect", lambda node: False)
    assert not draws_again()
    assert {"rand.default", "exp.default", "dropout.default"} <= {*made(Drawn).inside}


def test_what_depends_on_inputs_or_parameters_is_not_kept() -> None:
    found = made(FromInputs)
    assert sorted(found.inside) == ["arange.default", "cos.default", "outer.default", "to.dtype"]
    assert "mul.Tensor" in made(FromInputs, parameters=frozenset()).inside  # the control
    x = data(2, 5)
    for each in (x, x + 1):
        assert torch.equal(found(each)[0], found.model(each))


class Empty(Model):
    def forward(self, x: Tensor) -> Tensor:
        a = self.angles(x)
        return x * a.sin() + torch.empty_like(a).cos().sin() * 0


def test_memory_without_values_is_not_kept() -> None:
    found = made(Empty)
    assert not [op for op in found.inside if "empty" in op]
    assert "empty_like" in found.text


class Few(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(4).add(x.shape[1]).cos()


def test_fewer_ops_than_are_worth_it_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made(Few, keeps=False)
    monkeypatch.setattr(kept_values, "WORTH", 4)
    assert "kept" not in plain.text
    assert made(Few).text == plain.text
    monkeypatch.setattr(kept_values, "WORTH", 3)
    assert "kept" in made(Few).text


# ---------------------------------------------------------------------------------------------- who else writes
class Returns(Model):
    """The caller is given the table itself, a view of it, and one that is a part of a view."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.angles(x)
        return x * a.cos(), a.sin(), a.cos()[None], a.exp().t()[1:].unbind()[0]


class Counts(Model):
    """A count of the calls, read through a view that is older than what was added."""

    def forward(self, x: Tensor) -> Tensor:
        view = self.inv_freq.view(2, 2)
        self.inv_freq.add_(1)
        return x * view.cos().sin().exp().flatten()


class Shares(Model):
    """The buffer that is written to shares its memory with the one that is read."""

    other: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", self.inv_freq.view(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        before = self.other.cos().sin().exp()
        self.inv_freq.add_(1)
        return x.sum() * before + self.other.cos().sin().exp()


class Fills(Model):
    """A table is written in place, by what depends on the input; through a view, too."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.angles(x).cos(), self.angles(x).sin()
        a.add_(x.detach().sum())
        b[:, 1:].mul_(x.detach().sum())
        return x * a + b


class Norm(Model):
    """Running statistics, which no schema tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(0, 1))
        mean: Any = self.norm.running_mean
        return y + mean.cos().sin().exp()


def is_right_again(kind: type[Model]) -> bool:
    """For a caller who writes into whatever was returned."""
    found, x = made(kind), data(2, 5)
    model = copy.deepcopy(found.model)
    for _ in range(3):
        expected: Any = model(x)
        expected, got = [expected] if isinstance(expected, Tensor) else expected, found(x)
        if not all(map(torch.equal, expected, got)):
            return False
        with torch.no_grad():
            for y in got:
                y.add_(1)
    return True


@pytest.mark.parametrize("kind", [Returns, Counts, Shares, Fills, Norm])
def test_what_is_written_to_is_not_kept(kind: type[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right_again(kind)
    monkeypatch.setattr(kept_values, "_written", lambda graph: set())
    assert not is_right_again(kind)


# ---------------------------------------------------------------------------------------------- who looks on
class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def is_bypassed() -> bool:
    """By a mode that counts ops, and by one whose tensors hold nothing."""
    found, x = made(Rotary), data(2, 5).detach()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        found(fake.from_tensor(x))
    try:
        if type(found(x)[0]) is not Tensor:
            return False
    except DataDependentOutputException:  # a fake has no numbers to compare
        return False
    with Ops() as ops:
        found(x)
    return "cos" in ops.names and len(found.runs) == 3


def test_modes_see_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_bypassed()
    monkeypatch.setattr(kept_values, "_modes", lambda: 0)
    assert not is_bypassed()


def is_traced() -> bool:
    """By torch.compile, at every size, with eager calls in between."""
    found, graphs = made(Rotary), list[str]()

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(lambda x: found(x)[0], backend=backend, fullgraph=True, dynamic=True)
    try:
        for shape in SIZES:
            found(data(*shape))
            if not torch.equal(compiled(data(*shape)), found.model(data(*shape))):
                return False
    except Unsupported:
        return False
    return all("cos" in code for code in graphs)


def is_transformed() -> bool:
    """By torch.func, between eager calls."""
    found, x = made(Rotary), data(2, 5)
    for _ in range(2):
        for y in (found(x)[0], torch.func.vmap(lambda x: found(x)[0])(x[None])[0]):
            if not torch.equal(y, found.model(x)):
                return False
    return len(found.runs) == 3


@pytest.mark.parametrize("check", [is_traced, is_transformed])
def test_tracers_and_transforms_see_every_op(check: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check()
    monkeypatch.setattr(kept_values, "is_eager", lambda *tensors: True)
    assert not check()
