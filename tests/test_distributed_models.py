"""Whole models on real processes: what one device computes, trains and saves, N ranks do; what cannot work is refused.

Two launches, of 2 and of 4 ranks, put every question to every model; the tests read the answers.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from issued import Issued, Sent
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import tpcompile
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.errors import TpcompileError
from tpcompile.layers import Functions
from tpcompile.module import TensorParallel
from tpcompile.rank_code import bind
from tpcompile.spec import Spec

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

TIMEOUT = 540.0
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-10}

ON_2 = ("gpt2", "llama_gqa", "qwen3", "falcon_mqa", "phi", "bert", "t5", "torch_transformer", "mlp")
IN_FLOAT32: Mapping[int, Sequence[str]] = {2: ON_2, 4: ("llama_few_kv",)}  # on a grid of 2 * 2
IN_FLOAT64: Mapping[int, Sequence[str]] = {2: ON_2, 4: ("llama_few_kv", "falcon_mqa", "torch_transformer", "mlp")}

Answers = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- on every rank
@dataclass(frozen=True)
class Errors:
    """One forward and backward pass beside the same one on one device."""

    output: float
    gradient: float
    names: bool  # full_gradients has the names of the parameters that got one
    kinds: bool  # the output is of the same classes, in the same structure
    generator: bool  # as many random numbers were drawn


def step(one: nn.Module, tp: nn.Module, inputs: Mapping[str, Any], seed: int = 7) -> Errors:
    """Run both forwards and backwards from the same generator state."""
    outputs: list[Any] = []
    states: list[Tensor] = []
    for module in (one, tp):
        module.zero_grad()
        torch.manual_seed(seed)
        outputs.append(module(**inputs))
        states.append(torch.get_rng_state())
        backward(outputs[-1])
    wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    got = tpcompile.full_gradients(cast("TensorParallel", tp))
    return Errors(
        output=worst(outputs[0], outputs[1]),
        gradient=max(gradient_errors(wanted, got).values()),
        names=list(wanted) == list(got),
        kinds=type(outputs[0]) is type(outputs[1])
        and pytree.tree_structure(outputs[0]) == pytree.tree_structure(outputs[1]),
        generator=torch.equal(*states),
    )


def worst(expected: Any, got: Any) -> float:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True)
    return max(relative_error(a.detach(), b.detach()) for a, b in pairs if isinstance(a, Tensor))


def forward_only(one: nn.Module, tp: nn.Module, inputs: Mapping[str, Any]) -> float:
    with torch.no_grad():
        return worst(one(**inputs), tp(**inputs))


def compiled(name: str, model: nn.Module, inputs: Mapping[str, Any], mesh: DeviceMesh | None = None) -> TensorParallel:
    text = zoo.MODELS[name].spec
    return tpcompile.compile(model, text and Spec.parse(text), example_inputs=inputs, mesh=mesh)


def longer(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same arguments with another batch and sequence length."""
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            shape = (value.shape[0] + 2, value.shape[1] + 3, *value.shape[2:])
            value = torch.randn(shape, dtype=value.dtype) if value.is_floating_point() else torch.randint(1, 127, shape)
        made[name] = value
    return made


class Widened(TorchFunctionMode):
    """Whatever asks for float32 gets float64: norms, softmax and losses that models compute in float32 whatever
    their dtype; so that float64 can be compared to its own rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = {torch.float32: torch.float64}
        args, kwargs = pytree.tree_map_only(torch.dtype, lambda d: wide.get(d, d), (args, kwargs or {}))
        return func(*args, **kwargs)


def widened(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()
    }  # fmt: skip


def asking(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inputs that ask for a gradient where they can, as the report assumes."""
    floats = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {**inputs, **{n: x.detach().clone().requires_grad_() for n, x in floats.items()}}


def said(tp: TensorParallel) -> Sent:
    found: Sent = Counter()
    for row in tp.program.collectives:
        found[row.kind, row.direction, row.bytes] += row.count
    return found


def in_float32(name: str) -> Answers:
    """Train with dropout, then eval, in the precision that users have."""
    inputs, model = zoo.inputs(name), zoo.build(name, training=True)
    tp = compiled(name, model, inputs)
    answers: dict[str, Any] = {"train": step(model, tp, inputs)}
    issued: Sent = Counter()
    with Issued(issued, "forward"):
        output = tp(**asking(inputs))
    with Issued(issued, "backward"):
        backward(output)
    answers |= {"issued": issued, "said": said(tp)}
    model.eval()
    tp.eval()
    answers |= {"eval": step(model, tp, inputs), "variants": len(tp._variants)}
    answers["eval, other sizes"] = forward_only(model, tp, longer(inputs))
    answers["variants after other sizes"] = len(tp._variants)
    tp.train()
    model.train()
    answers["train again"] = step(model, tp, inputs)
    answers["variants in the end"] = len(tp._variants)
    return answers


def in_float64(name: str) -> Answers:
    """Train with dropout to rounding, save, load, and follow an optimizer."""
    inputs = widened(zoo.inputs(name))
    model = zoo.build(name, training=True).double()
    tp = compiled(name, model, inputs)
    answers: dict[str, Any] = {"train": step(model, tp, inputs)}
    answers["other sizes"] = step(model, tp, longer(inputs))
    answers["variants"] = len(tp._variants)
    answers["nested"] = nested_is_flat(tp, inputs)
    answers["state"] = state_of(model, tp)
    answers["loaded"] = loaded_again(tp, inputs)
    answers["optimized"] = optimized(model, tp, inputs)
    return answers


def nested_is_flat(tp: TensorParallel, inputs: Mapping[str, Any]) -> bool:
    """Calling a module per layer gives, bit for bit, what the flat graph gives."""
    graph = bind(tp.program, dist.get_rank(tp._group), tp._groups)
    flat = Functions().of(graph)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = flat(tp, *tp.program.captured.flatten((), inputs))
        torch.manual_seed(3)
        got = pytree.tree_leaves(tp(**inputs))
    pairs = [(a, b) for a, b in zip(expected, got, strict=True) if isinstance(a, Tensor)]
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def state_of(model: nn.Module, tp: TensorParallel) -> str:
    """What is wrong with full_state_dict, or nothing."""
    wanted, got = model.state_dict(), tpcompile.full_state_dict(tp)
    if set(wanted) != set(got):
        return f"names: {set(wanted) ^ set(got)}"
    wrong = [n for n in wanted if wanted[n].dtype != got[n].dtype or not torch.equal(wanted[n], got[n])]
    apart = [n for n in wanted for m in wanted if wanted[n].data_ptr() == wanted[m].data_ptr() and got[n] is not got[m]]
    apart = [n for n in apart if wanted[n].numel()]
    return f"values: {wrong}, ties: {apart}" if wrong or apart else ""


def loaded_again(tp: TensorParallel, inputs: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether spoilt weights show in the outputs, and whether a rank's own state dict mends them."""
    outputs: list[list[Tensor]] = []

    def call() -> None:
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append([x for x in pytree.tree_leaves(tp(**inputs)) if isinstance(x, Tensor)])

    saved = copy.deepcopy(tp.state_dict())
    call()
    with torch.no_grad():
        for p in tp.parameters():
            p.mul_(1.5)
    call()
    tp.load_state_dict(saved)
    call()
    same = [all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True)) for other in outputs[1:]]
    return not same[0], same[1]


def optimized(model: nn.Module, tp: TensorParallel, inputs: Mapping[str, Any]) -> float:
    """The worst error of any parameter after three steps of AdamW."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for module in (model, tp):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            backward(module(**inputs), seed=seed)
            optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.grad is not None)
    got = tpcompile.full_state_dict(tp)
    return max(relative_error(p.detach(), got[n]) for n, p in model.named_parameters())


def losses(name: str) -> Answers:
    """``labels=``: cross-entropy on cut logits, some of them left out, as another set of arguments."""
    inputs = dict(zoo.inputs(name))
    labels = inputs["input_ids"].clone()
    labels[0, 2:4] = -100
    model = zoo.build(name, training=True).double()
    tp = compiled(name, model, inputs)
    with_labels = {**inputs, "labels": labels}
    torch.manual_seed(7)
    model.zero_grad()
    expected = model(**with_labels).loss
    expected.backward()
    torch.manual_seed(7)
    got = tp(**with_labels).loss
    got.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": relative_error(expected.detach(), got.detach()),
        "gradient": max(gradient_errors(wanted, tpcompile.full_gradients(tp)).values()),
        "variants": len(tp._variants),
    }


class Attention(nn.Module):
    """Attention that also returns its weights, as dropout left them, and the dropped output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 3 * 24), nn.Linear(24, 24)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (6, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = self.drop((q @ k.transpose(2, 3)).softmax(-1))
        return self.drop(self.out((weights @ v).transpose(1, 2).flatten(2))), weights


def masks() -> Answers:
    """Which entries dropout made zero, on this rank and on one device; and with another seed."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(5, 7, 24)
    tp = tpcompile.compile(model, Spec.parse("qkv column\nout row"), example_inputs=(x,))

    def zeros(module: nn.Module, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [y == 0 for y in module(x)]

    cut = {d for layout in tp.parameter_layouts()["qkv.weight"] for d in [str(layout)] if "tp" in d}
    right, mine, other = zeros(model, 1), zeros(tp, 1), zeros(tp, 2)
    return {
        "cut": bool(cut),
        "equal": [torch.equal(a, b) for a, b in zip(right, mine, strict=True)],
        "another seed": [torch.equal(a, b) for a, b in zip(right, other, strict=True)],
        "some": [bool(a.any()) and not bool(a.all()) for a in right],
    }


def in_meshes() -> Answers:
    """A row of ranks for each batch; and three of the four ranks, on a model that two would cut unevenly."""
    answers: dict[str, Any] = {}
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    inputs = dict(zoo.inputs("gpt2"))
    example = dict(inputs)
    inputs["input_ids"] = (inputs["input_ids"] + grid.get_local_rank("dp")) % 128
    model = zoo.build("gpt2").double()
    for name, mesh in (("2-D", grid), ("1-D", grid["tp"])):
        tp = compiled("gpt2", model, example, mesh)
        answers[name] = step(model, tp, inputs)
        answers[f"{name} degree"] = tp.program.degree
    total = tpcompile.full_gradients(tp)["transformer.ln_f.weight"].sum()  # pyright: ignore[reportPossiblyUnboundVariable]
    every = [torch.zeros_like(total) for _ in range(4)]
    dist.all_gather(every, total)
    answers["each row its own"] = len({float(x) for x in every})
    three = DeviceMesh("cpu", [0, 1, 2])
    if dist.get_rank() < 3:
        inputs = zoo.inputs("llama_uneven")
        model = zoo.build("llama_uneven").double()
        answers["three"] = step(model, compiled("llama_uneven", model, inputs, three), inputs)
    return answers


def controls() -> Answers:
    """The same questions when the answer must be no: one rank's weight is off by a little, one collective too many."""
    inputs = widened(zoo.inputs("mlp"))
    model = zoo.build("mlp", training=True).double()
    tp = compiled("mlp", model, inputs)
    if dist.get_rank() == 1:
        with torch.no_grad():
            tp.get_parameter("down.1.weight").mul_(1 + 1e-6)
    spoilt = step(model, tp, inputs)
    issued: Sent = Counter()
    with Issued(issued, "forward"):
        tp(**inputs)
        dist.all_reduce(torch.ones(8))
    said_forward = Counter({row: n for row, n in said(tp).items() if row[1] == "forward"})
    return {"spoilt": spoilt, "state": state_of(model, tp), "too many": issued - said_forward}


def attempt(work: Callable[..., Answers], *args: Any) -> Answers:
    """The answers, or what happened instead: one model's failure leaves the others their turn."""
    try:
        return work(*args)
    except Exception:  # noqa: BLE001
        return {"failed": traceback.format_exc()}


def of_models() -> dict[str, Answers]:
    ranks = dist.get_world_size()
    found = {f"{name} float32": attempt(in_float32, name) for name in IN_FLOAT32[ranks]}
    with Widened():
        found |= {f"{name} float64": attempt(in_float64, name) for name in IN_FLOAT64[ranks]}
    return found | {"masks": attempt(masks), "controls": attempt(controls)}


def answers_on_2() -> Answers:
    torch.set_num_threads(1)
    found = of_models() | {"refusals": attempt(refusals)}
    with Widened():
        return found | {f"{name} losses": attempt(losses, name) for name in ("gpt2", "llama_gqa")}


def answers_on_4() -> Answers:
    torch.set_num_threads(1)
    found = of_models()
    with Widened():
        return found | {"meshes": attempt(in_meshes)}


# ------------------------------------------------------------------------------------------------ refused on every rank
class Widths(nn.Module):
    """Two Linears of a width that may differ between ranks."""

    def __init__(self, inner: int = 8):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(4, inner), nn.Linear(inner, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.up(x).relu()))


BOTH = "up column\ndown row"


def widths(seed: int = 0, inner: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return Widths(inner)


def ordinary(model: nn.Module, spec: str = BOTH, mesh: DeviceMesh | None = None) -> TensorParallel:
    return tpcompile.compile(model, Spec.parse(spec), example_inputs=(torch.ones(2, 4),), mesh=mesh)


def other_specs() -> None:
    ordinary(widths(), BOTH if dist.get_rank() == 0 else "up replicate\ndown replicate")


def other_sizes() -> None:
    ordinary(widths(inner=8 if dist.get_rank() == 0 else 12))


def other_weights() -> None:
    ordinary(widths(seed=dist.get_rank()))


def other_buffers() -> None:
    model = widths()
    model.register_buffer("scale", torch.full((3,), float(dist.get_rank())))
    ordinary(model)


def other_seeds() -> None:
    tp = ordinary(widths())
    torch.manual_seed(dist.get_rank())
    tp(torch.ones(2, 4))


def a_mesh_without_tp() -> None:
    ordinary(widths(), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "mp")))


def not_a_mesh() -> None:
    ordinary(widths(), mesh=cast("DeviceMesh", 2))


def meta_parameters() -> None:
    with torch.device("meta"):
        model = Widths()
    ordinary(model)


def moved_to_another_dtype() -> None:
    ordinary(widths()).double()


REFUSED: Mapping[Callable[[], None], tuple[str, str, str]] = {  # -> class, what, a part of the rest
    other_specs: ("RuntimeMismatchError", "rank 1 would run another program than rank 0", "as [8/tp, 4]"),
    other_sizes: ("RuntimeMismatchError", "rank 1 would run another program than rank 0", "up.weight: (12, 4)"),
    other_weights: ("RuntimeMismatchError", "ranks bring different weights", "up.weight"),
    other_buffers: ("RuntimeMismatchError", "ranks bring different weights", "scale"),
    other_seeds: (
        "RuntimeMismatchError",
        "ranks are seeded differently, and the model draws random numbers (dropout)",
        "torch.manual_seed(same)",
    ),
    a_mesh_without_tp: ("TpcompileError", "the mesh has 2 dims ('dp', 'mp'), none of them called tp", 'mesh["NAME"]'),
    not_a_mesh: ("TpcompileError", "mesh must be a torch.distributed DeviceMesh or None, not int", "init_device_mesh"),
    meta_parameters: (
        "TpcompileError",
        "parameter up.weight is on the meta device: it has no value",
        "load the weights first",
    ),
    moved_to_another_dtype: (
        "TpcompileError",
        "a compiled module cannot be moved from torch.float32 on cpu to torch.float64 on cpu",
        "convert the model first",
    ),
}  # fmt: skip


def refusals() -> Answers:
    """What each refusal says on this rank; that none of them spoils the group for what comes after."""
    found: dict[str, Any] = {}
    for work in REFUSED:
        try:
            work()
            found[work.__name__] = ("nothing", "", "")
        except TpcompileError as error:
            found[work.__name__] = (type(error).__name__, error.what, f"{error.why} {error.help}")
    tp = ordinary(widths())
    torch.manual_seed(0)
    found["afterwards"] = tp(torch.ones(2, 4)).shape == (2, 4)
    return found


# ---------------------------------------------------------------------------------------------- what the ranks answered
WORK: Mapping[int, Callable[[], Answers]] = {2: answers_on_2, 4: answers_on_4}


@cache
def launched(ranks: int) -> list[Answers]:
    return run(WORK[ranks], ranks, timeout=TIMEOUT)


def answers(ranks: int, question: str) -> list[Answers]:
    """What each rank answered."""
    found = [rank[question] for rank in launched(ranks)]
    for rank, answer in enumerate(found):
        assert "failed" not in answer, f"on rank {rank}:\n{answer['failed']}"
    return found


def each(models: Mapping[int, Sequence[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in models for name in models[ranks]])


def check(found: Errors, dtype: torch.dtype) -> None:
    assert found.output <= ALLOWED[dtype]
    assert found.gradient <= ALLOWED[dtype]
    assert found.names
    assert found.kinds
    assert found.generator


@each(IN_FLOAT32)
def test_float32_equals_one_device_in_train_and_eval(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float32"):
        for mode in ("train", "eval", "train again"):
            check(answer[mode], torch.float32)


@each(IN_FLOAT32)
def test_another_mode_is_compiled_once_and_other_sizes_never(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float32"):
        assert answer["eval, other sizes"] <= ALLOWED[torch.float32]
        assert answer["variants"] == answer["variants after other sizes"] == answer["variants in the end"] == 2


@each(IN_FLOAT64)
def test_float64_equals_one_device_with_dropout(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float64"):
        check(answer["train"], torch.float64)
        check(answer["other sizes"], torch.float64)
        assert answer["variants"] == 1


@each(IN_FLOAT64)
def test_a_module_per_layer_computes_what_the_flat_graph_does(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float64"):
        assert answer["nested"]


@each(IN_FLOAT64)
def test_full_state_dict_is_the_models_own(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float64"):
        assert answer["state"] == ""


@each(IN_FLOAT64)
def test_a_ranks_state_dict_can_be_loaded_again(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float64"):
        assert answer["loaded"] == (True, True)


@each(IN_FLOAT64)
def test_three_steps_of_adamw_follow_one_device(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float64"):
        assert answer["optimized"] <= 1e-9


@each(IN_FLOAT32)
def test_the_collectives_issued_are_those_of_the_report(ranks: int, name: str) -> None:
    for answer in answers(ranks, f"{name} float32"):
        assert answer["issued"] == answer["said"]
        assert {direction for _, direction, _ in answer["issued"]} == {"forward", "backward"}


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_the_loss_of_cut_logits(name: str) -> None:
    for answer in answers(2, f"{name} losses"):
        assert answer["loss"] <= ALLOWED[torch.float64]
        assert answer["gradient"] <= ALLOWED[torch.float64]
        assert answer["variants"] == 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_dropout_masks_are_bitwise_those_of_one_device(ranks: int) -> None:
    for answer in answers(ranks, "masks"):
        assert answer["cut"]
        assert answer["some"] == [True, True]
        assert answer["equal"] == [True, True]
        assert answer["another seed"] == [False, False]


def test_a_mesh_of_one_dim_or_its_tp_dim() -> None:
    for answer in answers(4, "meshes"):
        for mesh in ("1-D", "2-D"):
            check(answer[mesh], torch.float64)
            assert answer[f"{mesh} degree"] == 2
        assert answer["each row its own"] == 2
    three = [answer["three"] for answer in answers(4, "meshes") if "three" in answer]
    assert len(three) == 3
    for found in three:
        check(found, torch.float64)


@pytest.mark.parametrize("work", REFUSED, ids=lambda work: work.__name__)
def test_what_cannot_work_is_refused_on_every_rank(work: Callable[[], None]) -> None:
    kind, what, rest = REFUSED[work]
    for answer in answers(2, "refusals"):
        found = answer[work.__name__]
        assert found[:2] == (kind, what)
        assert rest in found[2]


def test_a_refusal_leaves_the_group_in_order() -> None:
    assert all(answer["afterwards"] for answer in answers(2, "refusals"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_asked_of_models_can_be_answered_with_no(ranks: int) -> None:
    for answer in answers(ranks, "controls"):
        assert answer["spoilt"].output > ALLOWED[torch.float64]
        assert answer["spoilt"].gradient > ALLOWED[torch.float64]
        assert answer["state"] == "values: ['down.1.weight'], ties: []"
        ones = 2 * 8 * torch.float32.itemsize * (ranks - 1) // ranks
        assert answer["too many"] == {("all_reduce", "forward", ones): 1}
