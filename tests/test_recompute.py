"""Recomputation: the gradients are bitwise those of keeping everything, and what is kept is what was asked for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from issued import Issued, Sent
from test_memory import BUILDERS, TINY, inputs, reconciled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import tpcompile
from tpcompile import cli, simulate
from tpcompile.activations import Saved, memory
from tpcompile.compare import backward
from tpcompile.compiler import rewrite_captured
from tpcompile.equivalence import verify_program
from tpcompile.errors import RuntimeMismatchError, ShardingError, TpcompileError
from tpcompile.layers import Layer
from tpcompile.program import Options, Program, Recompute
from tpcompile.recomputation import Region, regions
from tpcompile.spec import Spec

MODES: tuple[Recompute, ...] = ("attention", "layers")


def program(name: str, degree: int, recompute: Recompute, training: bool = True) -> Program:
    return zoo.program(name, degree, 2, training, Options(recompute=recompute))


def fresh(function: Any, region: Region, *args: Any) -> Any:
    """What `recompute` must not be: other random numbers the second time."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def difference(one: zoo.Step, other: zoo.Step) -> float:
    """The largest difference of two steps, over outputs and gradients of all ranks."""
    pairs = [pair for a, b in zip(one.outputs, other.outputs, strict=True) for pair in zip(a, b, strict=True)]
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert a.keys() == b.keys()
        pairs += [(a[n], b[n]) for n in a]
    return max(float((a - b).detach().abs().max()) for a, b in pairs if isinstance(a, Tensor) and a.numel())


QUICK = ("gpt2", "llama_gqa", "phi")
FUSED = ("falcon_mqa", "falcon_gqa")  # attention without dropout, whatever the config says
CASES = [
    (name, mode) for name in zoo.MODELS for mode in MODES if name != "mlp" and (mode == "layers" or name not in FUSED)
]


@pytest.mark.parametrize(
    ("name", "mode"), [c if c[0] in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_gradients_are_bitwise_those_of_keeping_everything(name: str, mode: Recompute) -> None:
    degree = zoo.MODELS[name].degrees[0]
    plain, again = program(name, degree, None), program(name, degree, mode)
    assert not regions(plain.graph)
    found = regions(again.graph)
    assert len(found) >= 2
    given = zoo.inputs(name)
    step = zoo.step(again, given)
    assert difference(zoo.step(plain, given), step) == 0.0
    # what is run again, and sent again, is what the report says
    sent = Counter((row.kind, row.direction, row.bytes) for row in step.recorder.rows)
    assert sent == Counter((c.kind, c.direction, c.bytes) for c in again.collectives)
    forward = zoo.counts(plain)["all_reduce", "forward"]
    assert zoo.counts(again)["all_reduce", "forward"] == forward
    if mode == "attention":
        assert zoo.counts(again) == zoo.counts(plain)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_proved_in_float64(mode: Recompute) -> None:
    report = verify_program(program("gpt2", 2, mode), zoo.case("gpt2", 2, True).model, zoo.inputs("gpt2"))
    assert report.ok, report.mismatch
    assert max(report.output_error, report.gradient_error) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_replayed(mode: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the random numbers of the first time, gradients are others; and so the proof fails."""

    given = zoo.inputs("gpt2")
    plain, again = program("gpt2", 2, None), program("gpt2", 2, mode)
    expected = zoo.step(plain, given)
    monkeypatch.setattr(simulate, "recompute", fresh)
    assert difference(expected, zoo.step(again, given)) > 1e-3
    assert not verify_program(again, zoo.case("gpt2", 2, True).model, given).ok


def test_a_collective_in_a_region_is_repeated_where_something_needs_it() -> None:
    """GPT-2 drops out the sum of the MLP, so it is summed again; Llama adds it, so it is not."""
    counts = {
        name: zoo.counts(program(name, 2, "layers"))["all_reduce", "backward"]
        - zoo.counts(program(name, 2, None))["all_reduce", "backward"]
        for name in ("gpt2", "llama_gqa")
    }
    assert counts == {"gpt2": 2 * 2, "llama_gqa": 2 * 1}


# ---------------------------------------------------------------------------------------------------- what is kept


def total_kept(rewritten: Program, given: Mapping[str, Any]) -> int:
    """Bytes that autograd keeps on all ranks in a real step."""
    from tpcompile import shards

    captured = rewritten.captured
    others = {**captured.buffers, **captured.constants}
    ranks = shards.attributes(captured.parameters, others, rewritten.parameters, rewritten.mesh)
    flat = [[x.clone() for x in captured.flatten((), given)] for _ in ranks]
    saved = Saved([*(x for own in ranks for x in own.values()), *(x for own in flat for x in own)])
    simulation = simulate.Simulation(rewritten.graph_module, len(ranks), rewritten.mesh.all_groups(), ranks)
    with saved.counting():
        outputs = simulation.run(flat)
    found = saved.bytes
    backward(*outputs)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "degree"), [("gpt2", 2), ("llama_uneven", 3), ("bert", 4)])
def test_the_report_is_what_autograd_keeps(name: str, degree: int, mode: Recompute) -> None:
    again = program(name, degree, mode)
    kept = sum(rank.activations for rank in memory(again))
    assert kept == total_kept(again, zoo.inputs(name))
    assert kept < sum(rank.activations for rank in memory(program(name, degree, None)))


@pytest.mark.parametrize("t", [1, 2, 4])
def test_selective_recomputation_keeps_what_the_formula_says(t: int) -> None:
    """sbh(10 + 24/t), with 2-byte activations."""
    b, s, h = 3, 7, 64
    model = BUILDERS["gelu sdpa"](3).train().to(torch.bfloat16)
    given = {**inputs("gpt2"), "use_cache": False}  # a cache copies keys and values
    for rank in memory(tpcompile.rewrite(model, degree=t, example_inputs=given, recompute="attention")):
        for layer in ("transformer.h.1", "transformer.h.2"):  # the mask is shared: the first layer's line
            paper, besides = reconciled(rank.kept, layer)
            assert paper * t == s * b * (10 * h * t + 24 * h)
            assert besides == {
                "dropout masks: not 1 byte but the activations' type": 2 * s * b * h,
                "means and deviations of layer norms": 4 * s * b * 2,
            }


@pytest.mark.parametrize("t", [1, 2, 4])
def test_full_recomputation_keeps_the_inputs_of_layers(t: int) -> None:
    """2sbh a layer, with 2-byte activations."""
    model = BUILDERS["gelu sdpa"](3).train().to(torch.bfloat16)
    for rank in memory(tpcompile.rewrite(model, degree=t, example_inputs=inputs("gpt2"), recompute="layers")):
        assert rank.layers["transformer.h.1"] == rank.layers["transformer.h.2"] == 2 * 3 * 7 * 64


# ---------------------------------------------------------------------------------------------------- the module


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    if dist.is_initialized():
        yield
        return
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def gradients(module: nn.Module, given: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step from a fixed seed, and the bytes that were kept for them."""
    module.zero_grad()
    saved = Saved([*module.parameters(), *module.buffers(), *(x for x in given.values() if isinstance(x, Tensor))])
    torch.manual_seed(5)
    with saved.counting():
        outputs = module(**given)
    kept = saved.bytes
    backward(outputs)
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "nanogpt"])
@pytest.mark.parametrize("mode", MODES)
def test_the_module_does_it(group: None, mode: Recompute, name: str) -> None:
    given = zoo.inputs(name)
    model = zoo.build(name, layers=3, training=True)
    plain = tpcompile.compile(model, example_inputs=given)
    again = tpcompile.compile(model, example_inputs=given, recompute=mode)
    expected, most = gradients(plain, given)
    found, kept = gradients(again, given)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert kept == memory(again.program)[0].activations < most == memory(plain.program)[0].activations
    # alike layers share one function still
    calls = {layer.calls[0] for layer in again.modules() if isinstance(layer, Layer)}
    assert len(calls) == 1


def test_another_variant_recomputes_too(group: None) -> None:
    given = zoo.inputs("nanogpt")
    model = zoo.build("nanogpt", training=True)
    tp = tpcompile.compile(model, example_inputs=given, recompute="attention")
    model.eval()
    tp.eval()
    assert torch.equal(tp(**given), model(**given))
    assert len(tp._variants) == 2
    assert len(regions(tp._variants[1].program.graph)) == 2


def test_fresh_masks_are_noticed_in_the_module(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpcompile import layers

    given = zoo.inputs("nanogpt")
    model = zoo.build("nanogpt", layers=2, training=True)
    expected, _ = gradients(tpcompile.compile(model, example_inputs=given), given)
    monkeypatch.setattr(layers, "recompute", fresh)
    found, _ = gradients(tpcompile.compile(model, example_inputs=given, recompute="layers"), given)
    assert max(float((expected[n] - found[n]).abs().max()) for n in expected) > 1e-3


@pytest.mark.parametrize("mode", [pytest.param("attention", marks=pytest.mark.slow), "layers"])
def test_torch_compile_takes_it(group: None, mode: Recompute) -> None:
    given = zoo.inputs("gpt2")
    model = zoo.build("gpt2")
    tp = tpcompile.compile(model, example_inputs=given, recompute=mode)
    expected, _ = gradients(tp, given)
    found, _ = gradients(cast("nn.Module", torch.compile(tp, backend="aot_eager")), given)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")])


def on_two_ranks() -> list[dict[str, Any]]:
    """On a real rank: gradients, kept bytes and collectives of every way of recomputing."""
    answers: list[dict[str, Any]] = []
    for name in ("gpt2", "llama_gqa"):
        given = zoo.inputs(name)
        model = zoo.build(name, training=True).double()
        plain: dict[str, Tensor] = {}
        for mode in (None, *MODES):
            tp = tpcompile.compile(model, example_inputs=given, recompute=mode)
            found, kept = gradients(tp, given)
            plain = plain or found
            sent: Sent = Counter()
            torch.manual_seed(5)
            with Issued(sent, "forward"):
                outputs = tp(**given)
            with Issued(sent, "backward"):
                backward(outputs)
            expected = Counter[tuple[str, str, int]]()
            for row in tp.program.collectives:
                expected[row.kind, row.direction, row.bytes] += row.count
            answers.append(
                {
                    "equal": all(torch.equal(plain[n], found[n]) for n in plain),
                    "kept": (kept, memory(tp.program)[dist.get_rank()].activations),
                    "sent": (dict(sent), dict(expected)),
                }
            )
    mode: Recompute = "layers" if dist.get_rank() else None
    try:
        tpcompile.compile(zoo.build("nanogpt"), example_inputs=zoo.inputs("nanogpt"), recompute=mode)
    except RuntimeMismatchError as error:
        answers.append({"refused": str(error)})
    return answers


@pytest.mark.distributed
@pytest.mark.slow
def test_so_it_is_on_real_ranks() -> None:
    for answers in run(on_two_ranks, 2):
        *answers, last = answers
        assert len(answers) == 6
        for answer in answers:
            assert answer["equal"]
            assert answer["kept"][0] == answer["kept"][1]
            assert answer["sent"][0] == answer["sent"][1]
        assert "recompute" in last["refused"]


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_way_is_refused() -> None:
    with pytest.raises(TpcompileError) as caught:
        tpcompile.rewrite(zoo.build("gpt2"), degree=2, recompute=cast("Any", "all"))
    assert caught.value.what == 'recompute must be "attention", "layers" or None, not \'all\''


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Normed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_running_statistics_are_not_updated_twice() -> None:
    spec = Spec.parse("blocks.*.linear replicate")
    given = (torch.randn(4, 8),)
    with pytest.raises(ShardingError) as caught:
        tpcompile.rewrite(Stack(), spec, degree=2, example_inputs=given, recompute="layers")
    assert "cannot be run again in backward" in caught.value.what
    assert caught.value.where is not None
    assert caught.value.where.module == "blocks.0.norm"
    tpcompile.rewrite(Stack().eval(), spec, degree=2, example_inputs=given, recompute="layers")


def test_what_has_no_effect_says_so() -> None:
    given = zoo.inputs("mlp")
    spec = Spec.parse("up.* column\ndown.* row")
    with pytest.warns(UserWarning, match="recompute='attention' has no effect: the graph has no softmax between two"):
        tpcompile.rewrite(zoo.build("mlp"), spec, degree=2, example_inputs=given, recompute="attention")
    with pytest.warns(UserWarning, match="recompute='layers' has no effect: the graph has no repeated layers"):
        tpcompile.rewrite(zoo.build("mlp"), spec, degree=2, example_inputs=given, recompute="layers")


def test_fused_attention_keeps_no_scores_anyway() -> None:
    found = zoo.case("gpt2")  # in eval mode: no dropout, so it stays fused
    given = ((), found.inputs)
    again = rewrite_captured(found.captured, found.spec, found.model, 2, given, options=Options(recompute="attention"))
    assert not regions(again.graph)
    assert not [line for rank in memory(again) for line in rank.kept if line.shape[1:] == (2, 7, 7)]


def test_the_models_own_switch_is_answered() -> None:
    """What transformers switches on is not captured; the warning says what to pass, and passing it is all."""
    model = zoo.build("gpt2", training=True)
    cast("Any", model).activation_checkpointing_enable()
    with pytest.warns(UserWarning, match='pass recompute="layers" for the same'):
        tpcompile.rewrite(model, degree=2, example_inputs=zoo.inputs("gpt2"))
    tpcompile.rewrite(model, degree=2, example_inputs=zoo.inputs("gpt2"), recompute="layers")


def test_the_command_takes_it() -> None:
    kept: dict[str, int] = {}
    for how in ("", "attention", "layers"):
        options = ["--recompute", how] if how else []
        result = CliRunner().invoke(cli.app, ["memory", TINY, "--json", *options])
        assert result.exit_code == 0, result.output
        kept[how] = json.loads(result.stdout)["ranks"][0]["activations"]
    assert math.inf > kept[""] > kept["attention"] > kept["layers"]
    result = CliRunner().invoke(cli.app, ["comm", TINY, "--recompute", "layers"])
    assert "(recomputed)" in result.stdout


# ---------------------------------------------------------------------------------------- with sequence parallelism


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox"])
def test_with_sequence_parallelism_gathers_are_made_again(name: str, recompute: Recompute) -> None:
    """Gradients are bitwise those of keeping everything, and the report is what a step sends."""
    case = zoo.case(name, training=True)
    everything = zoo.program(name, 2, training=True, options=Options(sequence_parallel=True))
    again = zoo.program(name, 2, training=True, options=Options(sequence_parallel=True, recompute=recompute))
    step = zoo.step(again, case.inputs)
    assert difference(step, zoo.step(everything, case.inputs)) == 0.0
    ran = Counter((r.kind, r.direction, r.bytes) for r in step.recorder.rows)
    said: Counter[tuple[str, str, int]] = Counter()
    for row in again.collectives:
        said[row.kind, row.direction, row.bytes] += row.count
    assert said == ran
    more = Counter((r.kind, r.direction) for r in again.collectives) - Counter(
        (r.kind, r.direction) for r in everything.collectives
    )
    if recompute == "attention":
        in_layers = 0 if name == "gpt_neox" else 4  # GPT-NeoX gathers in front of the two norms of a layer
        assert more == Counter({("all_gather", "backward"): in_layers + 1})  # the head reads one too


def sequence_parallel_step() -> float:
    """How far gradients with everything run again are from those of one device, on real ranks."""
    torch.set_num_threads(1)
    model, inputs = zoo.build("llama_gqa", training=True).double(), zoo.inputs("llama_gqa")
    torch.manual_seed(0)
    tp = tpcompile.compile(model, example_inputs=inputs, sequence_parallel=True, recompute="attention")
    torch.manual_seed(1)
    tp(**inputs).logits.square().mean().backward()
    torch.manual_seed(1)
    model(**inputs).logits.square().mean().backward()
    found = tpcompile.full_gradients(tp)
    return max(float((found[n] - p.grad).abs().max()) for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.distributed
def test_so_they_are_on_real_ranks() -> None:
    assert max(run(sequence_parallel_step, 2)) < 1e-12
