"""LoRA adapters of peft: compiled like any other model, cut with what they adapt, with exact gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import zoo
from distributed import run
from peft import LoraConfig, get_peft_model
from torch import nn

import tpcompile
from tpcompile import collectives
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.compiler import choose_spec
from tpcompile.equivalence import Report, verify, verify_program
from tpcompile.layout import axes_of
from tpcompile.program import copy_graph
from tpcompile.report import Collective
from tpcompile.spec import Spec

# transformers says so to whoever looks at an attribute of its models by name, as peft does.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QV = ("q_proj", "v_proj")
ALL = "all-linear"


def adapted(
    name: str = "llama_gqa", targets: Sequence[str] | str = ALL, dropout: float = 0.0, training: bool = False
) -> nn.Module:
    """A model of the catalogue with adapters of rank 3, none of them zero (a fresh B of zeros would hide errors)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = LoraConfig(
            r=3, lora_alpha=6, target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=dropout, init_lora_weights=False, fan_in_fan_out=name == "gpt2",
        )  # fmt: skip
        return get_peft_model(zoo.build(name, 1), config).train(training)  # pyright: ignore[reportArgumentType]


def counted(rows: Sequence[Collective]) -> Counter[tuple[str, str, str]]:
    found: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        found[row.of, row.kind, row.direction] += row.count
    return found


def check(report: Report) -> None:
    assert report.ok, report
    assert report.output_error <= 1e-12
    assert report.gradient_error <= 1e-12
    assert report.replicas_equal


@pytest.mark.parametrize(("targets", "dropout", "degree"), [(QV, 0.0, 3), (QV, 0.2, 2), (ALL, 0.2, 2), (ALL, 0.0, 3)])
def test_adapters_compile_with_no_more_collectives_than_the_model(
    targets: Sequence[str] | str, dropout: float, degree: int
) -> None:
    """The shipped spec of the model inside finds its layers; adapters are cut with them, and add one bucket."""
    inputs = zoo.inputs("llama_gqa")
    report = verify(
        adapted(targets=targets, dropout=dropout, training=dropout > 0), degree=degree, example_inputs=inputs
    )
    check(report)
    base = counted(zoo.program("llama_gqa", degree, 1).collectives)
    more = counted(report.collectives) - base
    assert more <= Counter({("parameters", "all_reduce", "backward"): 1})
    assert max(report.held) < 0.6


def test_a_plan_cuts_adapters_too() -> None:
    """Without a spec for the class; and a LoRA's A is cut where its input is, its B where its output is."""
    model, inputs = adapted(), zoo.inputs("llama_gqa")
    spec = tpcompile.plan(model, degree=2, example_inputs=inputs)
    program = tpcompile.rewrite(model, spec, degree=2, example_inputs=inputs)
    check(verify_program(program, model, inputs))
    cut = {n.split("layers.0.")[-1] for n, dims in program.parameters.items() if any(map(axes_of, dims))}
    for module, part in (("q_proj", "B"), ("o_proj", "A"), ("gate_proj", "B"), ("down_proj", "A")):
        block = "self_attn" if module[1] == "_" else "mlp"
        other = {"A": "B", "B": "A"}[part]
        assert f"{block}.{module}.base_layer.weight" in cut
        assert f"{block}.{module}.lora_{part}.default.weight" in cut
        assert f"{block}.{module}.lora_{other}.default.weight" not in cut


def test_gpt2_has_adapters_on_its_packed_weight() -> None:
    check(verify(adapted("gpt2", ["c_attn"], 0.1, True), degree=2, example_inputs=zoo.inputs("gpt2")))


def test_merged_adapters_are_the_model_again() -> None:
    inputs = zoo.inputs("llama_gqa")
    model: Any = adapted()
    merged = model.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_()
    report = verify(merged, degree=2, example_inputs=inputs)
    check(report)
    assert counted(report.collectives) == counted(zoo.program("llama_gqa", 2, 1).collectives)


def test_a_spec_for_the_model_inside_fits_the_wrapped_one() -> None:
    """Its names are those from before the wrapping; the names as they are now do as well."""
    model, inputs = adapted(), zoo.inputs("llama_gqa")
    shipped = choose_spec(model, None)
    assert shipped is not None
    assert "LlamaForCausalLM" in shipped.classes
    before = "model.layers.*.self_attn.{q,k,v}_proj column\nmodel.layers.*.self_attn.o_proj row"
    now = before.replace("model.layers", "base_model.model.model.layers").replace("_proj ", "_proj.base_layer ")
    one, other = (
        tpcompile.rewrite(model, Spec.parse(text), degree=2, example_inputs=inputs).parameters for text in (before, now)
    )
    assert one == other
    assert any("self_attn.q_proj.lora_B" in name for name in one)


def test_without_the_sum_of_their_gradients_adapters_would_be_wrong() -> None:
    """The control: A is whole, and its gradient is a partial sum on every rank."""
    model, inputs = adapted(targets=QV), zoo.inputs("llama_gqa")
    program = tpcompile.rewrite(model, degree=2, example_inputs=inputs)
    module, graph = copy_graph(program.graph_module)
    (bucket,) = (node for node in graph.nodes if node.target is collectives.copy_all)
    for picked in list(bucket.users):
        picked.replace_all_uses_with(bucket.args[0][picked.args[1]])
    graph.eliminate_dead_code()
    module.recompile()
    report = verify_program(program.with_(graph_module=module), model, inputs)
    assert not report.ok
    assert report.gradient_error > 1e-3
    assert report.output_error <= 1e-12


def on_a_rank() -> Mapping[str, Any]:
    torch.set_num_threads(1)
    model, inputs = adapted("gpt2", ["c_attn"], 0.1, True).double(), zoo.inputs("gpt2")
    tp = tpcompile.compile(model, example_inputs=inputs)
    for module in (model, tp):
        torch.manual_seed(6)
        backward(module(**inputs).logits)
    state, whole = model.state_dict(), tpcompile.full_state_dict(tp)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    got = tpcompile.full_gradients(tp)
    return {
        "names": list(state) == list(whole),
        "weights": max(relative_error(state[n], whole[n]) for n in state),
        "trained": sorted(got) == sorted(wanted) and all("lora" in n for n in got),
        "gradients": max(gradient_errors(wanted, got).values()),
        "frozen": [n for n, p in tp.named_parameters() if p.requires_grad and "lora" not in n],
    }


@pytest.mark.distributed
def test_on_real_ranks_only_adapters_train_and_the_state_dict_is_pefts_own() -> None:
    for answers in run(on_a_rank, 2):
        assert answers["names"]
        assert answers["weights"] == 0.0
        assert answers["trained"]
        assert answers["gradients"] <= 1e-12
        assert answers["frozen"] == []
