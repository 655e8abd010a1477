"""What a rank keeps for backward: the static report is what autograd keeps in a real step, byte for byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import zoo
from distributed import run
from torch import Tensor, nn
from typer.testing import CliRunner

import tpcompile
from tpcompile import cli, shards, simulate
from tpcompile.activations import Kept, Saved, memory, resized
from tpcompile.compiler import rewrite
from tpcompile.errors import TpcompileError
from tpcompile.example_inputs import default_inputs
from tpcompile.program import Program, copy_graph
from tpcompile.simulate import Simulation
from tpcompile.spec import Spec

transformers = zoo._transformers


def gpt2(**config: Any) -> Callable[[int], nn.Module]:
    return transformers("GPT2LMHeadModel", "n_layer", n_embd=64, n_head=4, n_positions=32, **config)


BUILDERS: Mapping[str, Callable[[int], nn.Module]] = {
    "gpt2": gpt2(),
    "gpt2 eager": gpt2(attn_implementation="eager"),
    "llama": zoo.MODELS["llama_gqa"].build,
    "llama eager": zoo._decoder("LlamaForCausalLM", 8, 4, attn_implementation="eager"),
    "bert": zoo.MODELS["bert"].build,
    "gelu eager": gpt2(attn_implementation="eager", activation_function="gelu"),
    "gelu sdpa": gpt2(activation_function="gelu"),
    "llama uneven": zoo.MODELS["llama_uneven"].build,
}


@cache
def program(name: str, degree: int, training: bool, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = BUILDERS[name](2).train(training).to(dtype)
    return rewrite(model, degree=degree, example_inputs=inputs(name))


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 127, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} if name == "bert" else {"input_ids": ids, "labels": ids}


def measured(rewritten: Program, monkeypatch: pytest.MonkeyPatch, given: Mapping[str, Any]) -> list[int]:
    """Bytes that autograd keeps on each rank, all ranks in lock step on real tensors."""
    captured = rewritten.captured
    ranks = shards.attributes(
        captured.parameters, {**captured.buffers, **captured.constants}, rewritten.parameters, rewritten.mesh
    )
    flat = [[x.clone() for x in captured.flatten((), given)] for _ in ranks]
    saved = Saved([*(x for own in ranks for x in own.values()), *(x for own in flat for x in own)])
    in_step = simulate._in_step

    def on(rank: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        saved.saved_by(str(rank))
        return made

    def tracked(functions: Sequence[Callable[..., Any]], arguments: Sequence[Any]) -> list[Any]:
        return in_step([partial(on, rank, f) for rank, f in enumerate(functions)], arguments)

    monkeypatch.setattr(simulate, "_in_step", tracked)
    simulation = Simulation(rewritten.graph_module, len(ranks), rewritten.mesh.all_groups(), ranks)
    with saved.counting():
        outputs = simulation.run(flat)
    found = [0] * len(ranks)
    for _, x, savers in saved:
        (rank,) = savers
        found[int(str(rank))] += x.untyped_storage().nbytes()
    assert sum(found) == saved.bytes
    del outputs
    return found


QUICK = (("gpt2", 2, True), ("gpt2 eager", 4, True), ("llama eager", 2, True), ("llama", 4, False), ("bert", 1, True))
UNEVEN = tuple(("llama uneven", degree, training) for degree in (2, 3, 4) for training in (False, True))
EVERY = tuple(
    (name, degree, training)
    for name in BUILDERS
    if name in ("gpt2", "gpt2 eager", "llama", "llama eager", "bert")
    for degree in (1, 2, 4)
    for training in (False, True)
)


def as_cases(cases: Sequence[tuple[str, int, bool]], quick: Sequence[tuple[str, int, bool]]) -> list[Any]:
    return [
        pytest.param(*case, marks=[] if case in quick else pytest.mark.slow, id="-".join(map(str, case)))
        for case in cases
    ]


@pytest.mark.parametrize(("name", "degree", "training"), as_cases(EVERY + UNEVEN, (*QUICK, UNEVEN[3])))
def test_the_report_is_what_autograd_keeps(
    name: str, degree: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten = program(name, degree, training)
    assert [rank.activations for rank in memory(rewritten)] == measured(rewritten, monkeypatch, inputs(name))


def test_so_it_is_at_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = program("gpt2", 2, True)
    ids = torch.randint(1, 127, (2, 11))
    given = resized(rewritten, batch=2, length=11)
    assert [tuple(x.shape) for x in given] == [(2, 11), (2, 11)]
    found = [rank.activations for rank in memory(rewritten, given)]
    assert found == measured(rewritten, monkeypatch, {"input_ids": ids, "labels": ids})
    assert found != [rank.activations for rank in memory(rewritten)]


def test_the_comparison_notices_what_is_kept_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that keeps its operand too, where the program's does not."""
    rewritten = program("gpt2", 2, True)
    expected = [rank.activations for rank in memory(rewritten)]
    module, graph = copy_graph(rewritten.graph_module)
    node = next(n for n in reversed(graph.nodes) if n.target is torch.ops.aten.add.Tensor)
    with graph.inserting_before(node):
        node.replace_input_with(node.args[1], graph.call_function(torch.square, (node.args[1],)))
    module.recompile()
    found = measured(rewritten.with_(graph_module=module), monkeypatch, inputs("gpt2"))
    assert [b - a for a, b in zip(expected, found, strict=True)] == [3 * 7 * 64 * 4] * 2


def test_uneven_parts_need_uneven_memory() -> None:
    first, second, third = memory(program("llama uneven", 3, True))
    assert first.parameters > second.parameters == third.parameters  # 127 rows of the vocabulary on 3 ranks
    two = memory(program("llama uneven", 2, True))
    assert two[0].activations > two[1].activations  # 2 and 1 groups of heads


def test_what_is_dead_or_free_does_not_count() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)
    saved = Saved([weight, x])
    with saved.counting():
        kept = (x @ weight).tanh()
        (x @ weight).exp()
    assert saved.bytes == kept.untyped_storage().nbytes()
    with saved.counting():
        views = (kept.view(-1).sin(), kept[1:].cos())
    assert saved.bytes == kept.untyped_storage().nbytes()
    del views, kept
    assert saved.bytes == 0


def test_what_depends_on_data_is_refused() -> None:
    from test_experts import ALONG, mixture

    model = mixture("mixtral").train()
    given = default_inputs(model)[1]
    memory(tpcompile.rewrite(model, Spec.parse(ALONG["inner"]), degree=2, example_inputs=given))
    cut = tpcompile.rewrite(model, Spec.parse(ALONG["experts"]), degree=2, example_inputs=given)
    with pytest.raises(TpcompileError) as caught:
        memory(cut)
    assert caught.value.what == "what grouped_product keeps for backward depends on data"
    assert caught.value.where is not None
    assert caught.value.where.module == "model.layers.0.mlp.experts"


# ---------------------------------------------------------------------------------------------------- the formula


def reconciled(kept: Sequence[Kept], layer: str) -> tuple[int, dict[str, int]]:
    """Bytes of a layer as Korthikanti et al. (2022), section 4, count them, and what is kept besides, by its name."""
    paper, besides = 0, dict[str, int]()

    def count(line: Kept, theirs: int, why: str) -> None:
        nonlocal paper
        paper += theirs
        if line.bytes != theirs:
            besides[why] = besides.get(why, 0) + line.bytes - theirs

    for line in kept:
        if line.layer != layer:
            continue
        if not line.value and "dropout" in line.op:
            count(line, math.prod(line.shape), "dropout masks: not 1 byte but the activations' type")
        elif not line.value and line.op == "aten.layer_norm.default":
            count(line, 0, "means and deviations of layer norms")
        elif line.op == "aten.masked_fill.Scalar":
            count(line, 0, "the causal mask")
        elif line.value.startswith("addmm") and line.op == "aten.matmul.default":
            count(line, line.bytes // 3, "the packed [q|k|v], of which q is a view")  # one head needs no copy
        else:
            count(line, line.bytes, "")
    return paper, besides


@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # with dropout, sdpa is written out as its own math
@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_layer_of_gpt2_keeps_what_the_formula_says(attention: str, t: int) -> None:
    """sbh(10 + 24/t + 5as/(ht)) with 2-byte activations; at t = 1 it is sbh(34 + 5as/h)."""
    b, s, h, a = 3, 7, 64, 4
    name = f"gelu {attention}"
    for rank in memory(program(name, t, True, torch.bfloat16)):
        paper, besides = reconciled(rank.kept, "transformer.h.1")
        assert paper * t == s * b * (10 * h * t + 24 * h + 5 * a * s)
        expected = {
            "dropout masks: not 1 byte but the activations' type": 2 * s * b * h + a * s * s * b // t,
            "means and deviations of layer norms": 4 * s * b * 2,
        }
        if attention == "sdpa":
            expected["the causal mask"] = s * s
        elif t == a:
            expected["the packed [q|k|v], of which q is a view"] = 2 * 2 * s * b * h // t
        assert besides == expected
        assert paper + sum(besides.values()) == rank.layers["transformer.h.1"]


@pytest.mark.parametrize("t", [2, 4])
def test_sequence_parallelism_keeps_a_part_of_everything(t: int) -> None:
    """(sbh/t)(34 + 5as/h), and what the two gathers of a layer make; with those and attention run again 34sbh/t."""
    b, s, h, a = 3, 8, 64, 4
    config: Any = zoo.build("gpt2").config
    config.activation_function = "gelu"
    kind: Any = type(zoo.build("gpt2"))
    model = kind(config).train().bfloat16()
    for recompute in (None, "attention"):
        program = tpcompile.rewrite(
            model, degree=t, example_inputs=zoo.inputs("gpt2"), sequence_parallel=True, recompute=recompute
        )
        for rank in memory(program, resized(program, b, s)):
            paper, besides = reconciled(rank.kept, "transformer.h.1")
            if recompute is None:
                assert paper * t == s * b * (34 * h + 5 * a * s) + 2 * 2 * s * b * h * (t - 1)
            else:
                assert paper * t == s * b * 34 * h
            assert besides["means and deviations of layer norms"] == 4 * s * b * 2 // t
            assert paper + sum(besides.values()) == rank.layers["transformer.h.1"]


def test_states_are_those_of_adamw() -> None:
    """One device: parameters, gradients and the optimizer's state after a step, byte for byte."""
    model = BUILDERS["gpt2"](2)
    (rank,) = memory(program("gpt2", 1, True))
    optimizer = torch.optim.AdamW(model.parameters())
    model(**inputs("gpt2")).loss.backward()
    optimizer.step()

    def of(tensors: Iterable[Tensor | None]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    assert rank.parameters == of(model.parameters())
    assert rank.gradients == of(p.grad for p in model.parameters())
    assert rank.adamw == of(x for state in optimizer.state.values() for x in state.values())


# ---------------------------------------------------------------------------------------------------- elsewhere

TINY = "hf:gpt2?n_layer=2,n_embd=64,n_head=4,vocab_size=100"


def test_the_command_says_it() -> None:
    result = CliRunner().invoke(cli.app, ["memory", TINY, "--batch", "3", "--length", "9", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["inputs"] == {"input_ids": [3, 9]}
    assert len(document["ranks"]) == document["degree"] == 2
    for rank in document["ranks"]:
        assert rank["activations"] == sum(line["bytes"] for line in rank["kept"]) == sum(rank["layers"].values())
    said = CliRunner().invoke(cli.app, ["memory", TINY, "--batch", "3", "--length", "9"]).stdout
    assert f"one training step of {TINY} with input_ids [3, 9]" in said
    assert "transformer.h.{0..1}.mlp.c_fc" in said


def test_sizes_that_the_graph_does_not_take_are_refused() -> None:
    result = CliRunner().invoke(cli.app, ["memory", "hf:vit?num_hidden_layers=1,hidden_size=48,num_attention_heads=4,"
                                          "intermediate_size=64", "--length", "9"])  # fmt: skip
    assert result.exit_code == 2
    assert "the sequence length cannot be 9" in result.stderr


def kept_here(name: str) -> tuple[int, int]:
    """On a real rank: what the report says, and what one step of the compiled module keeps."""
    torch.manual_seed(0)
    given = inputs(name)
    tp = tpcompile.compile(BUILDERS[name](2).train(), example_inputs=given)
    saved = Saved([*tp.parameters(), *tp.buffers(), *given.values()])
    torch.manual_seed(1)
    with saved.counting():
        outputs = tp(**given)
    found = saved.bytes
    outputs.loss.backward()
    return memory(tp.program)[torch.distributed.get_rank()].activations, found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_so_it_is_on_real_ranks(name: str) -> None:
    for said, found in run(kept_here, 2, name):
        assert said == found > 100_000
