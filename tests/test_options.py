"""What a compile can be asked for beyond the cuts: cut logits, wide sums, independent dropout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from torch import nn

import tpcompile
from tpcompile import kernels
from tpcompile.equivalence import verify_program
from tpcompile.errors import ShardingError, TpcompileError
from tpcompile.program import Asked, Options, Program
from tpcompile.spec import Spec


def test_every_option_is_a_keyword_argument() -> None:
    assert Asked.__annotations__.keys() == {f.name for f in dataclasses.fields(Options)}


@pytest.mark.parametrize(
    ("options", "what"),
    [({"reduce_dtype": torch.int32}, "reduce_dtype is torch.int32"), ({"dropout": "off"}, "dropout is 'off'")],
)
def test_what_is_no_option_is_refused(options: Any, what: str) -> None:
    with pytest.raises(ShardingError) as caught:
        tpcompile.rewrite(zoo.build("mlp"), degree=2, example_inputs=zoo.inputs("mlp"), **options)
    assert caught.value.what == what
    assert caught.value.help


# ------------------------------------------------------------------------------------------------ cut logits
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_logits_stay_cut(sequence_parallel: bool) -> None:
    """128 words on three ranks; nothing is gathered, and joined they are the model's logits."""
    case = zoo.case("llama_gqa")
    options = Options(gather_logits=False, sequence_parallel=sequence_parallel)
    program = zoo.program("llama_gqa", 3, options=options)
    assert verify_program(program, case.model, case.inputs).ok
    gathered = [row for row in program.collectives if row.module == "lm_head" and row.direction == "forward"]
    assert all(row.shape[-1] == zoo.WIDTH for row in gathered)
    parts = [rank[0].detach() for rank in zoo.step(program, case.inputs).outputs]
    assert [p.shape[-1] for p in parts] == [43, 43, 42]
    logits = case.model(**case.inputs).logits.detach()
    torch.testing.assert_close(torch.cat(parts, -1), logits, rtol=1e-4, atol=1e-5)


def test_a_cache_stays_cut_by_heads() -> None:
    model = zoo.build("llama_gqa")
    inputs = {"input_ids": zoo.inputs("llama_gqa")["input_ids"], "use_cache": True}
    program = tpcompile.rewrite(model, degree=2, example_inputs=inputs, gather_logits=False)
    outputs = zoo.step(program, inputs).outputs[0]
    assert {tuple(x.shape[:2]) for x in outputs if x.ndim == 4} == {(zoo.BATCH, 2)}


# ------------------------------------------------------------------------------------------------ sums in float32
class Sum(nn.Module):
    """Whose partial sums, one per rank, cancel: 256, 1 and -256 in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.up.weight.fill_(1)
            self.down.weight.copy_(torch.tensor([[256.0, 1.0, -256.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize(("dtype", "expected"), [(None, 0.0), (torch.float32, 1.0)])
def test_sums_over_ranks_can_be_made_in_float32(dtype: torch.dtype | None, expected: float) -> None:
    """256 + 1 is 256 in bfloat16: without the option, the control, the 1 is lost."""
    model, x = Sum().bfloat16(), torch.ones(1, 1, dtype=torch.bfloat16)
    spec = Spec.parse("up column\ndown row\n")
    program = tpcompile.rewrite(model, spec, degree=3, example_inputs=(x,), reduce_dtype=dtype)
    step = zoo.step(program, {"x": x})
    assert [rank[0].item() for rank in step.outputs] == [expected] * 3
    assert {rank[0].dtype for rank in step.outputs} == {torch.bfloat16}
    assert {row.dtype for row in step.recorder.rows} == {dtype or torch.bfloat16}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_model_in_bfloat16_with_wide_sums(sequence_parallel: bool) -> None:
    """Qwen3: q_norm's gradients go through the bucket, in float32 too."""
    model, inputs = zoo.build("qwen3").bfloat16(), zoo.inputs("qwen3")
    program = tpcompile.rewrite(
        model, degree=2, example_inputs=inputs, reduce_dtype=torch.float32, sequence_parallel=sequence_parallel
    )
    assert verify_program(program, model, inputs).ok
    step = zoo.step(program, inputs)
    assert {row.dtype for row in step.recorder.rows if row.kind in ("all_reduce", "reduce_scatter")} == {torch.float32}
    assert {g.dtype for g in step.gradients[0].values()} == {torch.bfloat16}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_autocast_is_part_of_the_graph(sequence_parallel: bool) -> None:
    """float32 parameters, products and their sums over ranks in bfloat16; outside of it another call is refused."""
    model, inputs = zoo.build("llama_gqa"), zoo.inputs("llama_gqa")
    with torch.autocast("cpu", torch.bfloat16):
        program = tpcompile.rewrite(model, degree=2, example_inputs=inputs, sequence_parallel=sequence_parallel)
        assert verify_program(program, model, inputs).ok
        step_inputs = program.captured.flatten((), inputs)
    assert len(step_inputs) == 1
    sums = [n for n in program.graph.nodes if "reduce" in n.name and "o_proj" in n.meta.get("module", "")]
    assert sums
    assert {n.args[0].meta["val"].dtype for n in sums} == {torch.bfloat16}
    with pytest.raises(TpcompileError, match="called under no autocast"):
        program.captured.flatten((), inputs)


# ------------------------------------------------------------------------------------------------ dropout
INDEPENDENT = Options(dropout="independent")


def masks(program: Program, seed: int) -> dict[str, list[torch.Tensor]]:
    """What is kept by every dropout of a cut value, by node and rank; and the numbers drawn next are the same."""
    from tpcompile import shards
    from tpcompile.simulate import Simulation

    found: dict[str, list[torch.Tensor]] = {}

    def see(node: torch.fx.Node, values: list[Any]) -> None:
        if node.target is kernels.own_dropout:
            found[node.name] = [v.detach() != 0 for v in values]

    captured = program.captured
    ranks = shards.attributes(
        captured.parameters, {**captured.buffers, **captured.constants}, program.parameters, program.mesh
    )
    simulation = Simulation(program.graph_module, len(ranks), program.mesh.all_groups(), ranks)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        simulation.run(captured.flatten((), zoo.inputs("gpt2")), on_node=see)
    return found


def test_independent_masks_differ_between_ranks_and_between_steps() -> None:
    program = zoo.program("gpt2", 2, training=True, options=INDEPENDENT)
    first, again, other = masks(program, 1), masks(program, 1), masks(program, 2)
    assert len(first) == 2, "one in each layer's attention"
    for name, (a, b) in first.items():
        assert a.shape == b.shape
        assert not torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(again[name], (a, b), strict=True))
        assert not torch.equal(other[name][0], a)
    one, two = first.values()
    assert not torch.equal(one[0], two[0])


def test_independent_masks_drop_as_often_as_asked() -> None:
    torch.manual_seed(0)
    kept = kernels.own_dropout(torch.ones(100_000), 0.3, 1)
    assert abs(float((kept == 0).double().mean()) - 0.3) < 0.01
    torch.testing.assert_close(kept.max(), torch.tensor(1 / 0.7))
    assert torch.equal(kernels.own_dropout(kept, 0.0, 1), kept)
    assert not kernels.own_dropout(kept, 1.0, 1).any()


def test_what_ranks_hold_in_common_they_still_agree_on() -> None:
    """Gradients of replicated parameters, and the outputs, are the same on all ranks."""
    step = zoo.step(zoo.program("gpt2", 2, training=True, options=INDEPENDENT), zoo.inputs("gpt2"))
    assert torch.equal(step.outputs[0][0], step.outputs[1][0])
    norms = [n for n in step.gradients[0] if "ln_" in n]
    assert norms
    assert all(torch.equal(step.gradients[0][n], step.gradients[1][n]) for n in norms)


def test_without_dropout_independent_is_exact() -> None:
    case = zoo.case("gpt2")
    assert verify_program(zoo.program("gpt2", 2, options=INDEPENDENT), case.model, case.inputs).ok


def test_verify_says_what_it_cannot_compare() -> None:
    case = zoo.case("gpt2", training=True)
    with pytest.raises(TpcompileError, match="verify cannot compare independent dropout"):
        verify_program(zoo.program("gpt2", 2, training=True, options=INDEPENDENT), case.model, case.inputs)


# ------------------------------------------------------------------------------------------------ on real processes
def on_this_rank() -> tuple[list[int], float, float, float]:
    """Shape of a cut output, how far its values are from the model's, a wide sum, and an output under own masks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, model, inputs = dist.get_rank(), zoo.build("llama_gqa"), zoo.inputs("llama_gqa")
    part = tpcompile.compile(model, example_inputs=inputs, gather_logits=False)(**inputs).logits
    apart = float((part - model(**inputs).logits[..., 64 * rank : 64 * (rank + 1)]).abs().max())
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    spec = Spec.parse("up column\ndown row\n")
    total = tpcompile.compile(Sum().bfloat16(), spec, example_inputs=(x,), reduce_dtype=torch.float32)(x)
    dropping, given = zoo.build("gpt2", training=True), zoo.inputs("gpt2")
    own = tpcompile.compile(dropping, example_inputs=given, dropout="independent")(**given).logits
    return list(part.shape), apart, float(total), float(own.sum())


@pytest.mark.distributed
def test_options_on_real_processes() -> None:
    first, second = run(on_this_rank, 2)
    assert first[0] == second[0] == [zoo.BATCH, zoo.LENGTH, 64]
    assert max(first[1], second[1]) < 1e-5
    assert first[2] == second[2]
    assert first[3] == second[3], "what ranks hold in common they agree on"
