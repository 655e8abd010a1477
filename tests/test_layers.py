"""From one flat graph to a module per layer: where layers are, that alike ones share code, and that nothing changes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization

from tpcompile import layers as layers_file
from tpcompile.capture import Captured, capture
from tpcompile.errors import TpcompileError
from tpcompile.inner import Inner
from tpcompile.layers import Functions, Layer, call_layer, install, module_at, nest, repeated_layers, tensor_at
from tpcompile.rank_code import bind

# Where the layers are.


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("gpt2", ["transformer.h.{}"]),
        ("llama_gqa", ["model.layers.{}"]),
        ("bert", ["encoder.layer.{}"]),
        ("t5", ["encoder.block.{}", "decoder.block.{}"]),  # the layers inside a block are a part of it
        ("torch_transformer", ["layers.{}"]),
        ("mlp", []),  # Linears are not layers
    ],
)
def test_layers_are_the_numbered_modules_of_one_class(name: str, paths: Sequence[str]) -> None:
    classes = {path: type(module).__name__ for path, module in zoo.build(name, 3).named_modules()}
    assert repeated_layers(classes) == {path.format(i) for path in paths for i in range(3)}


def test_one_block_or_blocks_of_different_classes_are_not_layers() -> None:
    inside = {"h.0.up": "Linear", "h.1.up": "Linear", "h.2.up": "Linear"}
    assert repeated_layers({"h.0": "Block", **inside}) == set()
    assert repeated_layers({"h.0": "Block", "h.1": "Other", **inside}) == set()
    assert repeated_layers({"h.0": "Block", "h.1": "Block", "h.2": "Other", **inside}) == {"h.0", "h.1"}
    assert repeated_layers({"h.0": "Block", "h.1": "Block"}) == set()  # nothing is in them


def test_a_tree_is_made_on_the_way() -> None:
    root = nn.Module()
    made = module_at(root, "a.h.0.up", {"a.h.0"})
    assert isinstance(root.get_submodule("a.h.0"), Layer)
    assert [type(root.get_submodule(path)) for path in ("a", "a.h", "a.h.0.up")] == [Inner] * 3
    assert module_at(root, "a.h.0.up", {"a.h.0"}) is made
    assert module_at(root, "", ()) is root


# Flat and nested.


def tree(captured: Captured, layers: frozenset[str]) -> nn.Module:
    """The model's own tensors, at their own names."""
    root = nn.Module()
    for name, tensor in {**captured.parameters, **captured.buffers, **captured.constants}.items():
        path, _, last = name.rpartition(".")
        where = module_at(root, path, layers)
        if isinstance(tensor, nn.Parameter):
            where.register_parameter(last, tensor)
        else:
            where.register_buffer(last, tensor)
    return root


Result = tuple[list[Tensor], dict[str, Tensor | None]]


def both(captured: Captured, args: tuple[Any, ...] = (), kwargs: Any = None) -> tuple[Result, Result]:
    """Outputs and gradients of the flat graph, then of a module per layer; from the same generator state."""
    layers = repeated_layers(captured.module_classes)
    root = tree(captured, layers)
    nested = install(root, captured.graph_module.graph, layers, Functions())
    flat = captured.flatten(args, kwargs)

    def result(call: Callable[..., Any]) -> Result:
        for p in captured.parameters.values():
            p.grad = None
        torch.manual_seed(3)
        outputs = [x for x in call(*flat) if isinstance(x, Tensor)]
        sum(x.square().sum() for x in outputs if x.requires_grad).backward()  # type: ignore[union-attr]
        return [x.detach() for x in outputs], {n: p.grad for n, p in captured.parameters.items()}

    return result(captured.graph_module), result(lambda *xs: nested(root, *xs))


def same(one: Result, other: Result) -> bool:
    """Bitwise."""
    (outputs, gradients), (others, other_gradients) = one, other
    assert len(outputs) == len(others)
    return all(map(torch.equal, outputs, others)) and all(
        torch.equal(g, other_gradients[n])  # pyright: ignore[reportArgumentType]
        for n, g in gradients.items()
        if g is not None
    )


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "nanogpt", "t5", "torch_transformer", "mlp"])
def test_flat_and_nested_are_bitwise_equal_with_dropout(name: str) -> None:
    case = zoo.case(name, 3, True)
    assert same(*both(case.captured, (), case.inputs))


def calls_of(captured: Captured) -> list[tuple[str, Callable[..., Any]]]:
    """Path and function of every call of a layer, in order."""
    functions = Functions()
    _, inside = nest(captured.graph_module.graph, repeated_layers(captured.module_classes))
    return [(path, functions.of(graph)) for path, graph in inside]


@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", "transformer.h.{}"), ("llama_gqa", "model.layers.{}"), ("torch_transformer", "layers.{}")],
)
def test_alike_layers_share_one_function(name: str, path: str) -> None:
    calls = calls_of(zoo.case(name, 3, True).captured)
    assert [where for where, _ in calls] == [path.format(i) for i in range(3)]
    assert len({id(function) for _, function in calls}) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama_few_kv", "gemma2", "torch_transformer"])
def test_so_do_alike_layers_of_the_rewritten_program(name: str) -> None:
    program = zoo.program(name, 4, 3, True)
    layers = repeated_layers(program.captured.module_classes)
    for rank in (0, 3):
        bound = bind(program, rank, {group: group for group in program.mesh.all_groups()})
        functions = Functions()
        _, inside = nest(bound, layers)
        assert [path for path, _ in inside] == sorted(layers)
        assert len({id(functions.of(code)) for _, code in inside}) == 1


def test_layers_that_differ_do_not_share() -> None:
    """T5's first blocks make the position bias for those that follow."""
    calls = calls_of(zoo.case("t5", 3, True).captured)
    for side in ("encoder", "decoder"):
        first, *others = (function for path, function in calls if path.startswith(side))
        assert len(others) == 2
        assert others[0] is others[1]
        assert first is not others[0]


def test_the_code_of_a_layer_can_be_read() -> None:
    """In tracebacks and debuggers, too; it reads its own parameters by their own names."""
    (_, function), *_ = calls_of(zoo.case("gpt2", 3, True).captured)
    source = inspect.getsource(function)
    assert source.lstrip().startswith("def forward(self, input_0")
    assert "(self, ('attn', 'c_attn'), 'weight')" in source
    assert "transformer" not in source


# Models in which layers are used in another way.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.down(self.up(x).relu()))
        return x if scale is None else x * scale


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Twice(Stack):
    """Every layer is used twice."""

    def run(self, x: Tensor) -> Tensor:
        for block in (*self.h, *self.h):
            x = block(x)
        return x


class Given(Stack):
    """Layers are given a parameter that is not theirs."""

    def run(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x, self.scale)
        return x


class Noisy(Stack):
    """Random numbers are drawn between the layers, of nothing that the layers make."""

    def run(self, x: Tensor) -> Tensor:
        start = x
        for block in self.h:
            x = block(x) + torch.rand_like(start)
        return x


def captured(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Captured, Tensor]:
    torch.manual_seed(0)
    model, x = kind().train(), torch.randn(5, 4)
    return model, capture(model, (x,)), x


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        (Twice, ["h.0", "h.1", "h.0", "h.1"]),
        (Given, ["h.0", "h.1"]),
        (Noisy, ["h.0", "h.1"]),
    ],
)
def test_however_layers_are_used_they_share_and_compute_the_same(kind: type[Stack], paths: Sequence[str]) -> None:
    model, found, x = captured(kind)
    calls = calls_of(found)
    assert [path for path, _ in calls] == paths
    assert len({id(function) for _, function in calls}) == 1
    flat, nested = both(found, (x,))
    assert same(flat, nested)
    torch.manual_seed(3)
    assert torch.equal(model(x), nested[0][0])


def test_drawing_random_numbers_in_another_order_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: moved in front of the layer, the noise takes the numbers of its dropout."""

    def nothing_is(node: fx.Node) -> bool:
        return False

    _, found, x = captured(Noisy)
    monkeypatch.setattr(layers_file, "is_random", nothing_is)
    assert not same(*both(found, (x,)))


# What may move in front of a layer, on graphs made by hand: h.0 is `relu` twice, with something else between.

INSIDE, OUTSIDE = ("h.0",), ()
aten = torch.ops.aten


def graph(between: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> fx.Graph:
    made = fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    first = made.call_function(aten.relu.default, (x,))
    other = between(made, first, y)
    second = made.call_function(aten.relu.default, (first,))
    last = made.call_function(aten.add.Tensor, (second, other))
    made.output((last,))
    for node in made.nodes:
        node.meta["modules"] = INSIDE if node in (first, second) else OUTSIDE
    return made


def shape(made: fx.Graph) -> list[str]:
    """The root's calls, in order."""
    root, _ = nest(made, frozenset({"h.0"}))
    return [str(n.target).removeprefix("aten.") for n in root.nodes if n.op in ("call_function", "call_module")]


def of_input(made: fx.Graph, inside: fx.Node, y: fx.Node) -> fx.Node:
    return made.call_function(aten.exp.default, (y,))


def of_layer(made: fx.Graph, inside: fx.Node, y: fx.Node) -> fx.Node:
    return made.call_function(aten.exp.default, (inside,))


def noise(made: fx.Graph, inside: fx.Node, y: fx.Node) -> fx.Node:
    return made.call_function(aten.rand_like.default, (y,))


def in_place(made: fx.Graph, inside: fx.Node, y: fx.Node) -> fx.Node:
    return made.call_function(aten.exp_.default, (y,))


@pytest.mark.parametrize(
    ("between", "calls"),
    [
        (of_input, ["exp.default", "h.0", "add.Tensor"]),
        (of_layer, ["h.0", "exp.default", "h.0", "add.Tensor"]),
        (noise, ["h.0", "rand_like.default", "h.0", "add.Tensor"]),
        (in_place, ["h.0", "exp_.default", "h.0", "add.Tensor"]),
    ],
)
def test_what_lies_inside_a_layer_moves_in_front_of_it_only_if_that_changes_nothing(
    between: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node], calls: Sequence[str]
) -> None:
    assert shape(graph(between)) == calls


# How the code finds tensors.


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_tensors_are_those_that_the_module_has_now() -> None:
    root = nn.Module()
    at = module_at(root, "a.h.0", ())
    at.register_parameter("weight", nn.Parameter(torch.ones(2)))
    at.register_buffer("bias", torch.zeros(2))
    assert tensor_at(root, "a.h.0.weight") is at.weight
    assert tensor_at(root, "a.h.0.bias") is at.bias

    before, at.weight = at.weight, nn.Parameter(torch.full((2,), 3.0))
    assert tensor_at(root, "a.h.0.weight") is at.weight
    assert at.weight is not before
    given = torch.full((2,), 4.0)
    swapped = functional_call(Reads(root), {"root.a.h.0.weight": given}, ("a.h.0.weight",))
    assert swapped is given
    assert tensor_at(copy.deepcopy(root), "a.h.0.weight") is not at.weight

    register_parametrization(at, "weight", Doubled())
    assert torch.equal(tensor_at(root, "a.h.0.weight"), torch.full((2,), 6.0))
    del at.bias
    at.bias = given  # a plain attribute
    assert tensor_at(root, "a.h.0.bias") is given
    with pytest.raises(AttributeError, match="scale"):
        tensor_at(root, "a.h.0.scale")


class Reads(nn.Module):
    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def forward(self, name: str) -> Tensor:
        return tensor_at(self.root, name)


class Transparent(nn.Module):
    """A wrapper that has what it wraps only as attributes, as those of checkpointing do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, *args: Any) -> Any:
        return self.inside(*args)


def test_what_is_behind_wrappers_is_found_and_hooks_of_layers_run() -> None:
    root = nn.Module()
    layer = module_at(root, "a.h", {"a.h"})
    assert isinstance(layer, Layer)
    layer.register_parameter("weight", nn.Parameter(torch.ones(2)))
    layer.calls.append(lambda module, x: x * tensor_at(module, "weight"))
    calls: list[Any] = []
    layer.register_forward_hook(lambda module, args, output: calls.append(args))
    for wrapped in (False, True):
        if wrapped:
            root.a = Transparent(root.get_submodule("a"))
        assert torch.equal(call_layer(root, ("a", "h"), 0, torch.full((2,), 5.0)), torch.full((2,), 5.0))
        assert tensor_at(root, "a.h.weight") is layer.weight
        assert len(calls) == 1 + wrapped


def test_what_never_runs_is_neither_hooked_nor_called() -> None:
    root = nn.Module()
    norm, layer = module_at(root, "h.norm", {"h.0"}), module_at(root, "h.0", {"h.0"})
    for register in (
        norm.register_forward_hook,
        norm.register_forward_pre_hook,
        norm.register_full_backward_hook,
        norm.register_full_backward_pre_hook,
        norm.register_backward_hook,
        copy.deepcopy(norm).register_forward_hook,
    ):
        with pytest.raises(TpcompileError, match=r"^a hook on h\.norm would never run") as caught:
            register(print)
        assert "repeated layers" in str(caught.value.help)
    for module, path in ((norm, r"h\.norm"), (layer, r"h\.0")):
        with pytest.raises(TpcompileError, match=f"^{path} cannot be called by itself"):
            module(torch.ones(2))
    assert {*norm.state_dict()} == set()
