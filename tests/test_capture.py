"""Capture: the captured graph is the model, bit for bit, at any size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import capturing
import pytest
import torch
from capturing import (
    MODELS,
    NanoGPT,
    difference,
    floats,
    gpt2,
    gradients,
    ids,
    llama,
    message,
    mlp,
    snapshot,
    tensors,
    text,
)
from torch import nn

from tpcompile.capture import Captured, capture


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from capturing.one_thread()


# Hugging Face's own attention passes is_causal where its export passes a mask: same sums, another order.
CLOSE = {"phi3": 1e-12}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_model_at_every_size(name: str) -> None:
    build, call = MODELS[name]
    model = build().double().train()  # dropout stays on
    captured = capture(model, *call(2, 7))
    for batch, length in ((2, 7), (3, 5), (1, 9), (4, 1), (1, 1)):
        assert difference(model, captured, call(batch, length)) <= CLOSE.get(name, 0.0)


def test_the_oracle_sees_a_changed_graph() -> None:
    model = mlp().double()
    captured = capture(model, *floats(-1, 8)(2, 7))
    (gelu,) = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    gelu.target = torch.ops.aten.relu.default
    captured.graph_module.recompile()
    assert difference(model, captured, floats(-1, 8)(2, 7)) > 1e-3


def test_dropout_is_a_random_op_in_the_graph() -> None:
    model = mlp().double()
    call = floats(-1, 8)(4, 0)
    captured = capture(model, *call)
    flat = captured.flatten(*call)
    assert not torch.equal(captured.graph_module(*flat)[0], captured.graph_module(*flat)[0])
    evaluated = capture(model.eval(), *call)
    assert not evaluated.training
    assert torch.equal(evaluated.graph_module(*flat)[0], evaluated.graph_module(*flat)[0])


def test_capture_draws_no_random_numbers_and_leaves_grad_mode() -> None:
    model = mlp()
    state = torch.get_rng_state()
    with torch.no_grad():
        captured = capture(model, (torch.randn(2, 8, generator=torch.Generator()),))
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert captured.graph_module(torch.randn(3, 8))[0].requires_grad


# ---------------------------------------------------------------- names and metadata


def test_ties_go_by_the_first_name() -> None:
    model = gpt2(n_layer=1)
    captured = capture(model)
    assert captured.aliases["lm_head.weight"] == captured.aliases["transformer.wte.weight"] == "transformer.wte.weight"
    targets = [node.target for node in captured.graph_module.graph.find_nodes(op="get_attr")]
    assert "lm_head.weight" not in targets
    assert targets.count("transformer.wte.weight") == 1
    assert set(captured.parameters) == {name for name, _ in model.named_parameters()}
    assert set(captured.aliases) >= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        assert captured.parameters[name] is parameter
        if name in targets:
            assert captured.graph_module.get_parameter(name) is parameter


def test_a_shared_module_has_one_set_of_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    captured = capture(model, (torch.randn(2, 4),))
    assert captured.aliases == {"0.weight": "0.weight", "0.bias": "0.bias", "2.weight": "0.weight", "2.bias": "0.bias"}
    assert [node.target for node in captured.graph_module.graph.find_nodes(op="get_attr")] == ["0.weight", "0.bias"]
    assert captured.module_classes == {"": "Sequential", "0": "Linear", "1": "ReLU", "2": "Linear"}


def linears(captured: Captured) -> list[torch.fx.Node]:
    return list(captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))


def test_nodes_say_where_they_come_from() -> None:
    captured = capture(NanoGPT(), (ids(2, 6),))
    nodes = list(captured.graph_module.graph.nodes)
    assert all({"val", "module", "modules", "source"} <= node.meta.keys() for node in nodes)
    code, first = inspect.getsourcelines(capturing.Block.forward)
    wanted = next(i for i, line in enumerate(code) if "self.attention(" in line)
    (linear,) = (node for node in linears(captured) if node.meta["module"] == "blocks.1.attention")
    assert linear.meta["modules"] == ("blocks.1", "blocks.1.attention")
    source = linear.meta["source"]
    assert (source.file, source.line, source.text) == ("tests/capturing.py", first + wanted, code[wanted].strip())
    calls = [node for node in nodes if node.op == "call_function" and node.target is not torch.ops.aten.sym_size.int]
    assert all(node.meta["source"].file == "tests/capturing.py" for node in calls)


@functools.cache
def captured_llama() -> Captured:
    return capture(llama(), *text(2, 5))


def test_the_line_is_the_models_own_in_a_library_too() -> None:
    by_module = {node.meta["module"]: node for node in linears(captured_llama())}
    source = by_module["model.layers.1.self_attn.q_proj"].meta["source"]
    assert source.file == "transformers/models/llama/modeling_llama.py"
    assert "self.q_proj(" in source.text
    (linear,) = linears(capture(nn.Linear(3, 4), (torch.randn(2, 3),)))
    assert linear.meta["source"].file == "torch/nn/modules/linear.py"  # a model that is torch's own


def test_sizes_that_are_constants_are_ints() -> None:
    captured = capture(nn.Linear(8, 4), (torch.randn(3, 8),))
    for node in captured.graph_module.graph.nodes:
        for value in tensors(node.meta["val"]):
            assert [isinstance(size, torch.SymInt) for size in value.shape] in ([True, False], [False, False], [False])


def test_checks_and_dead_code_are_dropped() -> None:
    captured = captured_llama()
    assert not [node for node in captured.graph_module.graph.nodes if "assert" in str(node.target)]
    for node in captured.graph_module.graph.nodes:
        assert node.users or node.op in ("placeholder", "output")


# ---------------------------------------------------------------- meta


def test_a_model_on_meta_gives_the_same_graph() -> None:
    real = captured_llama()
    with torch.device("meta"):
        model = llama()
    captured = capture(model, *text(2, 5))
    assert captured.graph_module.code == real.graph_module.code
    assert all(parameter.is_meta for parameter in captured.parameters.values())
    assert captured.parameters["lm_head.weight"] is model.lm_head.weight
    node = captured.graph_module.graph.find_nodes(op="get_attr")[0]
    assert node.meta["val"].device.type == "cpu"  # as it will be
    assert dict(model.named_parameters()).keys() == captured.parameters.keys()


def test_a_large_model_costs_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**20, 2**20), nn.Linear(2**20, 2**20))  # 8 TiB
    captured = capture(model, (torch.zeros(2, 3, 2**20, device="meta"),))
    (output,) = captured.graph_module.graph.output_node().all_input_nodes
    assert output.meta["val"].shape[2] == 2**20


# ---------------------------------------------------------------- regions


class Stops(nn.Module):
    """Gradients flow through some of it only; nested, decorated and by the old function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.no_grad()
    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frozen(x)
        with torch.no_grad():
            z = self.b(x)
            with torch.enable_grad():
                w = self.c(x)
            v = w * 2
        torch.set_grad_enabled(False)
        u = self.c(y)
        torch.set_grad_enabled(True)
        return y + z + w + v + u + self.b(y)


def test_gradients_stop_where_the_model_stops_them() -> None:
    model = Stops().double()
    captured = capture(model, *floats(-1, 4)(3, 0))
    assert difference(model, captured, floats(-1, 4)(2, 0)) == 0.0
    frozen = [node for node in captured.graph_module.graph.nodes if node.meta.get("no_grad")]
    assert [str(node.target) for node in frozen] == ["aten.linear.default", "aten.linear.default", "aten.mul.Tensor",
                                                     "aten.linear.default"]  # fmt: skip
    assert gradients(model, [model(torch.randn(2, 4, dtype=torch.float64))])["a.weight"] is None


class Peeks(nn.Module):
    """Under no_grad, ops that return their operand itself: the same tensor is used with gradients behind the region."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        with torch.no_grad():
            same = nn.functional.dropout(y.to(y.dtype).contiguous(), training=False)
            copied = y.to(y.dtype, copy=True)
            best = self.b(same).argmax(-1, keepdim=True)
        return self.b(y) + best + copied


def test_what_returns_its_operand_under_no_grad_keeps_its_gradients() -> None:
    model = Peeks().double()
    captured = capture(model, *floats(-1, 4)(3, 0))
    assert difference(model, captured, floats(-1, 4)(2, 0)) == 0.0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.norm(self.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.b(y)
            w = torch.einsum("bi,ij->bj", y, self.b.weight) + torch.cat([z, y])[: y.shape[0]]
            with torch.autocast("cpu", enabled=False):
                v = z.float() @ self.a.weight
            u = nn.functional.cross_entropy(z, torch.zeros(z.shape[0], dtype=torch.long))
        return z, w, v, u


@pytest.mark.parametrize("ambient", [False, True])
def test_autocast_is_written_out(ambient: bool) -> None:
    model, x = Mixed(), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        captured = capture(model, (torch.randn(3, 8),))
        wanted = model(x)
        flat = captured.flatten((x,))
    got = captured.graph_module(*flat)  # outside of autocast: its casts are in the graph
    assert [a.dtype for a in got] == [a.dtype for a in wanted]
    assert torch.bfloat16 in [a.dtype for a in got]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    mine, theirs = gradients(model, list(got)), gradients(model, list(wanted))
    for name, gradient in mine.items():
        other = theirs[name]
        assert gradient is not None
        assert other is not None
        assert (gradient - other).abs().max() <= 2**-7 * other.abs().max()


def test_another_autocast_state_is_refused() -> None:
    model, x = mlp().eval(), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(model, (x,))
    assert message(lambda: captured.flatten((x,))) == [
        "called under no autocast, captured under autocast('cpu', torch.bfloat16)",
        "  why:  autocast decides dtypes while the graph is made",
        "  help: call and compile under the same torch.autocast, or compile a second time under this one",
    ]


# ---------------------------------------------------------------- the model stays as it was


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_model_is_left_as_it_was(device: str) -> None:
    with torch.device(device):
        model = gpt2(n_layer=1).train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    before = snapshot(model)
    capture(model)
    assert snapshot(model) == before


def test_input_tensors_are_left_as_they_were() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    x = torch.zeros(3, 4)
    captured = capture(InPlace(), (x,))
    assert torch.equal(x, torch.zeros(3, 4))
    captured.graph_module(*captured.flatten((x,)))
    assert torch.equal(x, torch.ones(3, 4))  # as the model itself does
    assert not [name for name in vars(x) if "dynamo" in name]
