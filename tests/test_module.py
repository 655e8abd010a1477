"""The compiled module on one rank: it is the model to whoever calls it, saves it or asks for its names."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import tpcompile
from tpcompile import module as module_file
from tpcompile.errors import CaptureError, ShardingError, TpcompileError
from tpcompile.layers import Layer
from tpcompile.module import TensorParallel
from tpcompile.spec import Spec

# First, before any other test here has made a process group.


def test_without_a_process_group_it_says_so() -> None:
    if dist.is_initialized():
        pytest.skip("another test has left a process group")
    with pytest.raises(TpcompileError) as caught:
        tpcompile.compile(zoo.build("mlp"), Spec.parse("up.* column\ndown.* row"), example_inputs=zoo.inputs("mlp"))
    assert caught.value.what == "there is no process group"
    assert caught.value.why == "torch.distributed has no process group yet"
    assert "init_process_group" in str(caught.value.help)


def compiled(name: str, model: nn.Module, inputs: Any = None) -> TensorParallel:
    text = zoo.MODELS[name].spec
    return tpcompile.compile(model, text and Spec.parse(text), example_inputs=inputs or zoo.inputs(name))


@pytest.fixture(scope="module")
def gpt2(group: None) -> tuple[nn.Module, TensorParallel]:
    model = zoo.build("gpt2")
    return model, compiled("gpt2", model)


@pytest.fixture(scope="module")
def nanogpt(group: None) -> tuple[nn.Module, TensorParallel]:
    model = zoo.build("nanogpt", training=True)
    return model, compiled("nanogpt", model)


Pair = tuple[nn.Module, TensorParallel]


def seeded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        return module(*args, **kwargs)


def test_gradients_of_bfloat16_parameters_can_be_accumulated_in_float32(group: None) -> None:
    """``grad_dtype`` is torch's own: what is asked of a parameter holds for this rank's part of it."""
    model = zoo.build("llama").bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    tp = compiled("llama", model)
    tp(**zoo.inputs("llama")).logits.float().sum().backward()
    assert {p.grad.dtype for p in tp.parameters() if p.grad is not None} == {torch.float32}
    assert {p.dtype for p in tp.parameters()} == {torch.bfloat16}


class Traced(nn.Module):
    """Which computes something else while it is traced, as some masks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * (2.0 if torch.compiler.is_exporting() else self.factor)

    factor = 1.0


def test_a_graph_that_is_not_the_model_is_refused(group: None) -> None:
    model, x = Traced(), (torch.randn(2, 8),)
    with pytest.raises(CaptureError, match="the captured graph is not the model"):
        tpcompile.compile(model, Spec.parse(""), example_inputs=x)
    model.factor = 2.0  # the control
    tpcompile.compile(model, Spec.parse(""), example_inputs=x)


class TracedGradient(Traced):
    """Which has the same outputs while it is traced, and other gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y * 2 - y.detach() if torch.compiler.is_exporting() and self.factor == 1.0 else y


def test_a_graph_with_other_gradients_than_the_model_is_refused(group: None) -> None:
    model, x = TracedGradient(), torch.randn(2, 8)
    model.up.weight.grad = torch.ones(8, 8)
    with pytest.raises(CaptureError, match=r"gradients for the example inputs differ by .*, of up\.(weight|bias) most"):
        tpcompile.compile(model, Spec.parse(""), example_inputs=(x,))
    with torch.no_grad():  # nobody asks for gradients
        tpcompile.compile(model, Spec.parse(""), example_inputs=(x,))
    model.factor = 2.0  # the control
    tpcompile.compile(model, Spec.parse(""), example_inputs=(x,))
    assert torch.equal(model.up.weight.grad, torch.ones(8, 8))
    assert model.up.bias.grad is None


class WritesInput(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.add_(1))


def test_example_inputs_are_left_as_they_were(group: None) -> None:
    x = torch.zeros(2, 8)
    tpcompile.compile(WritesInput(), Spec.parse(""), example_inputs=(x,))
    assert torch.equal(x, torch.zeros(2, 8))


class Wide(nn.Module):
    """With a region in which autocast is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        with torch.autocast("cpu", enabled=False):
            return y.float() @ y.float().mT


def test_the_graph_has_the_casts_of_autocast_and_gets_no_others(group: None) -> None:
    model, x = Wide(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tp = tpcompile.compile(model, Spec.parse(""), example_inputs=(x,))
        expected, found = model(x), tp(x)
        assert tpcompile.verify(model, Spec.parse("up replicate"), degree=2, example_inputs=(x,)).ok
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


def test_one_rank_communicates_nothing_and_computes_the_same(nanogpt: Pair) -> None:
    model, tp = nanogpt
    inputs = zoo.inputs("nanogpt")
    assert tp.program.degree == 1
    assert tp.program.collectives == ()
    assert "collectives" not in str(tp.program)
    torch.testing.assert_close(seeded(tp, **inputs), seeded(model, **inputs))
    for module in (model, tp):
        module.zero_grad()
        torch.manual_seed(5)
        module(**inputs).square().mean().backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    got = tpcompile.full_gradients(tp)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        assert gradient is not None
        torch.testing.assert_close(got[name], gradient)


def test_names_are_those_of_the_model(gpt2: Pair, nanogpt: Pair) -> None:
    for model, tp in (gpt2, nanogpt):
        assert {n for n, _ in tp.named_parameters()} == {n for n, _ in model.named_parameters()}
        assert {n for n, _ in tp.named_buffers()} >= {n for n, _ in model.named_buffers()}
        assert tp.state_dict().keys() == model.state_dict().keys()
        assert tpcompile.full_state_dict(tp).keys() == model.state_dict().keys()
    _, tp = nanogpt
    assert tp.get_parameter("lm_head.weight") is tp.get_parameter("transformer.wte.weight")
    assert "transformer.h.0.attn.allowed" not in tp.state_dict()  # a buffer that is not persistent
    assert isinstance(tp.get_submodule("transformer.h.1"), Layer)
    assert set(tp.parameter_layouts()) == {n for n, _ in tp.named_parameters(remove_duplicate=False)}


def test_the_call_is_the_models_own(gpt2: Pair) -> None:
    """By position or by name, with defaults spelled out or not; the output is of the model's class."""
    model, tp = gpt2
    ids = zoo.inputs("gpt2")["input_ids"]
    expected = model(ids, use_cache=False)
    for output in (tp(ids, use_cache=False), tp(input_ids=ids, use_cache=False, attention_mask=None)):
        assert type(output) is type(expected)
        assert output.keys() == expected.keys()
        assert pytree.tree_structure(output) == pytree.tree_structure(expected)
        torch.testing.assert_close(output.logits, expected.logits)
    assert tp.config is model.config
    assert len(tp._variants) == 1


def test_another_set_of_arguments_is_compiled_once(gpt2: Pair) -> None:
    model, tp = gpt2
    inputs = dict(zoo.inputs("gpt2"))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -2:] = 0
    before = len(tp._variants)
    for _ in range(2):
        torch.testing.assert_close(tp(**inputs).logits, model(**inputs).logits)
        assert len(tp._variants) == before + 1
    assert not torch.equal(tp(**zoo.inputs("gpt2")).logits, tp(**inputs).logits)


def test_constants_of_a_later_call(group: None, gpt2: Pair) -> None:
    """A graph numbers its nameless constants from 0: those of another one are held too, by another name."""
    model, tp = gpt2
    ids = zoo.inputs("gpt2")["input_ids"]
    assert not tp.program.captured.constants
    torch.testing.assert_close(tp(ids).logits, model(ids).logits)  # makes empty caches
    assert tp._variants[-1].program.captured.constants

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x)) * torch.tensor([2.0, 3.0, 5.0, 7.0 if self.training else 11.0])

    x = torch.randn(3, 4)
    plain = Scaled()
    scaled = tpcompile.compile(plain, Spec.parse("up column\ndown row"), example_inputs=(x,))
    for training in (True, False, True):
        torch.testing.assert_close(scaled.train(training)(x), plain.train(training)(x))
    assert {n for n, _ in scaled.named_buffers()} == {"_lifted.0", "_lifted.0_1"}


def test_autocast_is_compiled_too(group: None) -> None:
    model = zoo.build("mlp")
    tp = compiled("mlp", model)
    inputs = zoo.inputs("mlp")
    plain = seeded(tp, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = seeded(model, **inputs), seeded(tp, **inputs)
    assert len(tp._variants) == 2
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, plain)


def test_compiled_and_called_in_inference_mode_it_trains_afterwards(group: None) -> None:
    model, inputs = zoo.build("gpt2"), zoo.inputs("gpt2")
    with torch.inference_mode():
        tp = compiled("gpt2", model, {**inputs, "use_cache": False})
        same = torch.ones_like(inputs["input_ids"])
        torch.testing.assert_close(tp(same).logits, model(same).logits)  # another graph, of an inference tensor
    for each in (tp, model):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(tpcompile.full_gradients(tp), expected)
    with torch.inference_mode():
        model = copy.deepcopy(model)
    with pytest.raises(TpcompileError, match="was made in torch"):
        compiled("gpt2", model)


def test_a_first_call_may_be_checkpointed(group: None) -> None:
    model = zoo.build("mlp")
    tp = compiled("mlp", model)
    for each in (tp.train(), model.train()):
        torch.manual_seed(5)
        cast("Tensor", checkpoint(each, use_reentrant=False, **zoo.inputs("mlp"))).sum().backward()
    torch.testing.assert_close(tpcompile.full_gradients(tp), {n: p.grad for n, p in model.named_parameters()})


def test_more_variants_than_anyone_needs_are_refused(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_file, "MAX_VARIANTS", 1)
    tp = compiled("mlp", zoo.build("mlp"))
    with pytest.raises(CaptureError, match="argument `src` is missing"):
        tp()
    tp.train()
    with pytest.raises(CaptureError, match="the model was compiled for eval mode"):
        tp(**zoo.inputs("mlp"))


def test_the_models_own_assert_is_kept_with_its_line(nanogpt: Pair) -> None:
    _, tp = nanogpt
    length = zoo.GPTSizes(1).context
    assert tp(torch.zeros(1, length, dtype=torch.long)).shape == (1, length, zoo.VOCABULARY)
    with pytest.raises(CaptureError) as caught:
        tp(torch.zeros(1, length + 1, dtype=torch.long))
    said = str(caught.value)
    assert "assert length <= self.context" in said
    assert "zoo.py:" in said
    assert str(length + 1) in said


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def wrong() -> TensorParallel:
    return tpcompile.compile(Wrong(), Spec.parse("up column\ndown row"), example_inputs=(torch.ones(2, 4),))


def test_a_wrong_input_is_refused_with_the_models_line(group: None) -> None:
    """What the model says to it, and behind that how it differs from what was compiled."""
    tp = wrong()
    with pytest.raises(CaptureError) as caught:
        tp(torch.ones(2, 5))
    assert "return self.down(self.up(x).relu())" in str(caught.value)
    assert "test_module.py:" in str(caught.value)
    assert "input `x` has size 5 in dim 1, captured with 4" in str(caught.value.__cause__)
    assert tp(torch.ones(2, 4)).shape == (2, 4)


class Contained(nn.Module):
    """With every kind of container, one of them as a repeated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.heads: Any = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.scales = nn.ParameterList([torch.ones(4), torch.full((4,), 2.0)])
        self.shifts = nn.ParameterDict({"one": torch.ones(4), "two": torch.zeros(4)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.heads["down"](self.heads["up"](x))
        return self.tail(x) * self.scales[1] * self.scales[0] + self.shifts["one"] + self.shifts["two"]


def test_containers_are_accessed_as_those_of_the_model(group: None) -> None:
    model, x = Contained(), torch.randn(2, 4)
    tp: Any = tpcompile.compile(model, Spec.parse(""), example_inputs=(x,))
    for each in (tp, copy.deepcopy(tp)):
        assert isinstance(each.get_submodule("blocks"), nn.ModuleList)
        assert len(each.blocks) == 3
        assert [*each.blocks] == [each.get_submodule(f"blocks.{i}") for i in range(3)]
        assert all(isinstance(block, Layer) for block in each.blocks)
        assert each.blocks[-1] is each.blocks[2]
        assert [*each.blocks[1:]] == [each.blocks[1], each.blocks[2]]
        assert each.blocks[0][0] is each.get_submodule("blocks.0.0")
        assert len(each.blocks[0][:1]) == 1
        assert [*each.heads.keys()] == ["up", "down"]
        assert each.heads["up"] is each.get_submodule("heads.up")
        assert [*each.tail] == [each.tail[0], each.tail[1]]
        assert [torch.equal(p, q) for p, q in zip(each.scales, model.scales, strict=True)] == [True, True]
        assert {n: p is each.get_parameter(f"shifts.{n}") for n, p in each.shifts.items()} == {"one": True, "two": True}
        torch.testing.assert_close(each(x), model(x))
    assert [*tp.state_dict()] == [*model.state_dict()]
    with pytest.raises(TpcompileError, match="tail cannot be called by itself"):
        tp.tail(x)


def test_train_and_eval_reach_every_module(nanogpt: Pair, gpt2: Pair) -> None:
    assert all(module.training for module in nanogpt[1].modules())
    assert not any(module.training for module in gpt2[1].modules())
    model, tp = nanogpt
    inputs = zoo.inputs("nanogpt")
    before = len(tp._variants)
    tp.eval()
    model.eval()
    torch.testing.assert_close(seeded(tp, **inputs), seeded(model, **inputs))
    tp.train()
    model.train()
    torch.testing.assert_close(seeded(tp, **inputs), seeded(model, **inputs))
    assert len(tp._variants) == before + 1
    assert not torch.equal(seeded(tp, **inputs), seeded(tp.eval(), **inputs))
    tp.train()


def test_the_model_may_be_deleted_and_its_memory_is_free(group: None) -> None:
    model = zoo.build("mlp", training=True)
    inputs = zoo.inputs("mlp")
    expected = seeded(model, **inputs)
    tp = compiled("mlp", model)
    weights = [weakref.ref(p) for p in model.parameters()]
    assert all(ref() is not None for ref in weights)
    del model
    gc.collect()
    assert [ref() for ref in weights] == [None] * len(weights)
    torch.testing.assert_close(seeded(tp, **inputs), expected)
    assert seeded(tp.eval(), **inputs).shape == expected.shape  # captured again, without the model
    assert str(tp.program)
    assert tp.program.explain("up.0.weight")


def test_the_model_is_left_alone(group: None) -> None:
    model = zoo.build("mlp", training=True)
    before = copy.deepcopy(model.state_dict())
    tp = compiled("mlp", model)
    tp(**zoo.inputs("mlp")).sum().backward()
    with torch.no_grad():
        for p in tp.parameters():
            p.zero_()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_frozen_parameters_stay_frozen(group: None) -> None:
    model = zoo.build("mlp")
    model.get_parameter("up.1.weight").requires_grad_(False)
    tp = compiled("mlp", model)
    tp(**zoo.inputs("mlp")).sum().backward()
    assert "up.1.weight" not in tpcompile.full_gradients(tp)
    assert len(tpcompile.full_gradients(tp)) == len(list(model.parameters())) - 1


@pytest.mark.distributed
def test_modes_and_frozen_parameters_may_change_part_by_part() -> None:
    for rank in run(_changed_in_parts, 2):
        for what, (found, expected) in rank.items():
            torch.testing.assert_close(found, expected, msg=lambda text, what=what: f"{what}: {text}")


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)
        self.group = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))  # a name that the compiled module has too

    def forward(self, x: Tensor) -> Tensor:
        return self.group(self.down(self.drop(self.up(self.norm(x)).relu())))


DROPPED = Spec.parse("up column\ndown row\n")


def _changed_in_parts() -> dict[str, tuple[object, object]]:
    torch.manual_seed(0)
    model = Dropped().double().requires_grad_(False)
    model.drop.eval()
    x = torch.randn(3, 5, 4).double()
    tp = tpcompile.compile(model, DROPPED, example_inputs=(x,))
    found: dict[str, tuple[object, object]] = {"compiled in parts": (seeded(tp, x=x), seeded(model, x=x))}
    for each in (model, tp):
        parts = dict(each.named_modules())
        parts["drop"].train()
        parts["group"].eval()
    found["other parts"] = seeded(tp, x=x), seeded(model, x=x)
    for each in (model, tp):
        each.train().requires_grad_(True)
        torch.manual_seed(5)
        each(x).square().sum().backward()
    found["trained"] = tpcompile.full_gradients(tp), {n: p.grad for n, p in model.named_parameters()}
    return found


def test_a_parameter_that_is_no_longer_the_compiled_one_is_refused(group: None) -> None:
    inputs, name, tied = zoo.inputs("gpt2"), "transformer.ln_f.weight", "lm_head.weight"
    cases: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
        (name, Tensor.double, "ln_f.weight is torch.float64, and was compiled as torch.float32"),
        (name, lambda p: p[:1], r"ln_f.weight has shape \[1\], and this rank's part of it has"),
        (tied, torch.clone, "were one tied parameter when the model was compiled, and are two now"),
    ]
    for name, change, message in cases:
        tp = compiled("gpt2", zoo.build("gpt2"))
        path, _, last = name.rpartition(".")
        setattr(tp.get_submodule(path), last, nn.Parameter(change(tp.get_parameter(name).detach())))
        with pytest.raises(TpcompileError, match=message):
            tp(**inputs)


@pytest.mark.distributed
def test_a_rank_refuses_the_state_of_another_one() -> None:
    first, second = run(_loaded_from_rank_0, 2)
    assert first == "<All keys matched successfully>"
    assert second.splitlines()[0] == "this is the state dict of rank 0 of 2, and this is rank 1 of 2"


def _loaded_from_rank_0() -> str:
    x = torch.ones(3, 5, 4).double()
    torch.manual_seed(0)
    tp = tpcompile.compile(Dropped().double(), DROPPED, example_inputs=(x,))
    file = io.BytesIO()
    torch.save(tp.state_dict(), file)
    sent = [file.getvalue()]
    dist.broadcast_object_list(sent, 0)
    try:
        return str(tp.load_state_dict(torch.load(io.BytesIO(sent[0]), weights_only=True)))
    except TpcompileError as error:
        return str(error)


def test_a_copy_has_weights_of_its_own_and_lives_on(group: None) -> None:
    model, inputs = zoo.build("mlp", training=True), zoo.inputs("mlp")
    tp = compiled("mlp", model)
    average = AveragedModel(tp)
    again = copy.deepcopy(tp)
    with torch.no_grad():
        for p in tp.parameters():
            p.zero_()
    model.eval()
    for each in (average.eval(), again.eval()):  # another graph
        torch.testing.assert_close(seeded(each, **inputs), seeded(model, **inputs))
        each(**inputs).sum().backward()
    assert tpcompile.full_gradients(again).keys() == dict(model.named_parameters()).keys()
    assert all(p.grad is None for p in tp.parameters())
    assert len(tp._variants) == 1
    again.get_submodule("up.0").weight = nn.Parameter(torch.ones(1))
    with pytest.raises(TpcompileError, match=r"up.0.weight has shape \[1\]"):
        again(**inputs)
    with pytest.raises(TpcompileError, match="a compiled module cannot be pickled"):
        torch.save({"model": tp}, io.BytesIO())


def test_saved_and_loaded(group: None) -> None:
    """Through ``torch.save``, into a module made of other weights; and back into the model itself."""
    model = zoo.build("mlp", training=True)
    tp = compiled("mlp", model)
    other = compiled("mlp", nn.Module.train(_drawn_again(model)))
    inputs = zoo.inputs("mlp")
    assert not torch.equal(seeded(other, **inputs), seeded(tp, **inputs))
    file = io.BytesIO()
    torch.save({"local": tp.state_dict(), "full": tpcompile.full_state_dict(tp)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["local"])
    assert torch.equal(seeded(other, **inputs), seeded(tp, **inputs))
    again = zoo.build("mlp", training=True)
    again.load_state_dict(saved["full"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def _drawn_again(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    return other


def test_outputs_are_ordinary_values(gpt2: Pair) -> None:
    _, tp = gpt2
    with torch.inference_mode():
        inferred = tp(**zoo.inputs("gpt2"))
    output = seeded(tp, **zoo.inputs("gpt2"))
    copied = copy.deepcopy(output)
    assert type(copied) is type(output)
    assert torch.equal(copied.logits, output.logits)
    assert torch.equal(inferred.logits, output.logits)
    assert type(output.logits) is Tensor


class Scaled(nn.Module):
    """Its first parameter has no dims."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down(self.up(x).relu())


def test_moving_to_where_it_is_does_nothing_and_elsewhere_is_refused(group: None) -> None:
    tp = tpcompile.compile(Scaled(), Spec.parse("up column\ndown row"), example_inputs=(torch.ones(2, 4),))
    assert tp.float().cpu().to(torch.float32) is tp
    for move in (tp.double, tp.half, lambda: tp.to("meta")):
        with pytest.raises(TpcompileError, match=r"cannot be moved from torch\.float32 on cpu to"):
            move()
    assert tp(torch.ones(2, 4)).dtype == torch.float32


def test_a_graph_that_needs_other_cuts_is_refused(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters are held as the first graph needs them; another one must not read them otherwise."""
    tp = compiled("mlp", zoo.build("mlp"))
    held = zoo.program("mlp", 2)
    monkeypatch.setattr(tp, "_layouts", dict(held.parameters))
    monkeypatch.setattr(tp, "_mesh", held.mesh)
    with pytest.raises(ShardingError) as caught:
        tp.train()(**zoo.inputs("mlp"))
    assert caught.value.what == "this call needs up.0.weight cut in another way than it is held"
    assert caught.value.why is not None
    assert "held as [96/tp, 64], needed as [96, 64]" in caught.value.why


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(10, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.down(self.up(x + self.table(ids)).tanh())


def _transformed() -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """What transforms make of the compiled module, and of the model; what is refused."""
    torch.manual_seed(0)
    model, ids, x = Looked().double(), torch.randint(10, (2,)), torch.randn(2, 4).double()
    tp = tpcompile.compile(model, Spec.parse("table vocab\nup column\ndown row"), example_inputs=(ids, x))
    several = torch.stack([x, 2 * x]), ids.expand(2, 2).clone()

    def dual(module: nn.Module) -> Tensor:
        with forward_ad.dual_level(), torch.no_grad():
            return cast("Any", forward_ad.unpack_dual(module(ids, forward_ad.make_dual(x, x.cos())))).tangent

    def of_bias(module: nn.Module) -> Any:
        given = {"down.bias": module.get_parameter("down.bias").detach()}
        return torch.func.grad(lambda p: functional_call(module, p, (ids, x)).square().sum())(given)

    functions: dict[str, Callable[[nn.Module], Any]] = {
        "grad": of_bias,
        "vmap of grad": lambda m: torch.func.vmap(torch.func.grad(lambda y, i: m(i, y).square().sum()))(*several),
        "jacrev": lambda m: torch.func.jacrev(lambda y: m(ids, y))(x),
        "jvp": lambda m: torch.func.jvp(lambda y: m(ids, y), (x,), (x.cos(),)),
        "hessian": lambda m: torch.func.hessian(lambda y: m(ids, y).square().sum())(x),
        "forward mode": dual,
    }
    found = {
        name: pytree.tree_map(Tensor.detach, (function(tp), function(model))) for name, function in functions.items()
    }
    refused: list[str] = []
    try:
        torch.func.grad(lambda y: tp(ids.expand(3, 2), y).sum())(x)
    except CaptureError as error:
        refused.append(error.what)
    leaf = x.clone().requires_grad_()
    try:
        torch.autograd.grad(tp(ids, leaf), leaf, torch.eye(8).double().view(8, 2, 4), is_grads_batched=True)
    except TpcompileError as error:
        refused.append(error.what)
    return found, refused


@pytest.mark.distributed
def test_transforms_of_torch_func_and_forward_mode_are_those_of_the_model() -> None:
    for found, refused in run(_transformed, 2):
        for name, (of_ranks, of_model) in found.items():
            torch.testing.assert_close(of_ranks, of_model, msg=lambda text, name=name: f"{name}: {text}")
        assert refused == [
            "there is no graph yet for this call inside of a transform of torch.func",
            "is_grads_batched cannot be used where ranks communicate",
        ]
