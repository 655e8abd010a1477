"""Sequence parallelism: equal to one device, at the bytes of tensor parallelism alone, whatever the length."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mutants
import pytest
import torch
import zoo
from distributed import run
from torch import nn

import tpcompile
from tpcompile.compare import backward, relative_error
from tpcompile.compiler import rewrite_captured
from tpcompile.equivalence import verify_program
from tpcompile.errors import ShardingError
from tpcompile.layout import Spread
from tpcompile.placement import Placement
from tpcompile.program import Options, Program
from tpcompile.spec import Spec

ON = Options(sequence_parallel=True)
MODELS = [name for name in zoo.MODELS if name != "llama_mqa"]
every_model = pytest.mark.parametrize("name", MODELS)

FLATTENED = {"opt"}
"""Whose MLP runs on ``[b * s, h]``, residual included: positions that are merged with the batch stay whole."""

AROUND = {"t5", "bert", "vit", "torch_transformer", "mlp", "opt"}
"""Whose outputs are spread values: they are gathered once more than an all-reduce would have."""


def degree_of(name: str, training: bool) -> int:
    return zoo.MODELS[name].degrees[-1 if training else 0]


def sent(program: Program) -> Counter[str]:
    """Bytes of activations by direction."""
    found: Counter[str] = Counter()
    for row in program.collectives:
        if row.of == "activations":
            found[row.direction] += row.bytes * row.count
    return found


def spread(program: Program) -> list[torch.fx.Node]:
    """Nodes whose value is spread along its positions."""
    placed = [(node, node.meta.get("placement")) for node in program.graph.nodes]
    return [n for n, p in placed if isinstance(p, Placement) and any(isinstance(d, Spread) for d in p.dims)]


@pytest.mark.parametrize(
    ("name", "training"), [(name, False) for name in MODELS] + [(name, True) for name in ("gpt2", "t5", "llama_few_kv")]
)
def test_equal_to_one_device(name: str, training: bool) -> None:
    """With seven positions on two ranks or more; dropout masks are those of one device in spread regions too."""
    case = zoo.case(name, training=training)
    program = zoo.program(name, degree_of(name, training), training=training, options=ON)
    assert spread(program)
    report = verify_program(program, case.model, case.inputs)
    assert report.ok, report.mismatch
    assert report.output_error <= 1e-12
    assert report.gradient_error <= 1e-12


@every_model
def test_it_sends_the_bytes_of_tensor_parallelism_alone(name: str) -> None:
    """All-reduces become reduce-scatters and all-gathers: twice as many, the same bytes (Korthikanti et al. 2022)."""
    degree = degree_of(name, training=False)
    plain, program = zoo.program(name, degree), zoo.program(name, degree, options=ON)
    before, after = zoo.counts(plain), zoo.counts(program)
    if name not in FLATTENED | AROUND:
        assert sent(program) == sent(plain)
        assert after["reduce_scatter", "forward"] == after["all_gather", "backward"] == before["all_reduce", "forward"]
        assert after["reduce_scatter", "backward"] == before["all_reduce", "backward"]
        assert after["all_gather", "forward"] == before["all_gather", "forward"] + before["all_reduce", "backward"]
        assert after.total() == 2 * (before.total() - before["all_gather", "forward"]) + before["all_gather", "forward"]
    else:
        assert sent(program)["forward"] <= sent(plain)["forward"] * 1.05
        assert sent(program)["backward"] <= sent(plain)["backward"] * (1.05 if name == "t5" else 1.26)
    ran = Counter((r.kind, r.direction, r.bytes) for r in zoo.step(program, zoo.inputs(name)).recorder.rows)
    said: Counter[tuple[str, str, int]] = Counter()
    for row in program.collectives:
        said[row.kind, row.direction, row.bytes] += row.count
    assert said == ran


def test_gradients_of_norms_are_summed_in_one_bucket() -> None:
    rows = [row for row in zoo.program("llama", 2, options=ON).collectives if row.of == "parameters"]
    assert [(row.kind, row.direction) for row in rows] == [("all_reduce", "backward")]


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_other_lengths_than_that_of_the_example(length: int) -> None:
    """One position on three ranks too: two of them have none, and still draw the masks of all."""
    case = zoo.case("gpt2", training=True)
    program = zoo.program("gpt2", 3, training=True, options=ON)
    inputs = {"input_ids": torch.randint(0, zoo.VOCABULARY, (2, length)), "use_cache": False}
    found = zoo.step(program, inputs, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = case.model(**inputs).logits
    assert relative_error(expected.detach(), found.outputs[1][0].detach()) < 1e-5
    total = sum(float(g.norm() ** 2) for g in found.gradients[0].values())
    assert total > 0


def test_wrong_programs_are_caught() -> None:
    """Every transition and local constant of a spread region, made wrong."""
    case, program = zoo.case("llama_gqa", layers=1), zoo.program("llama_gqa", 2, layers=1, options=ON)
    mine = {node.name for node in spread(program)} | {n.name for n in program.graph.nodes if "gather" in n.name}
    found = [m for m in mutants.mutants(program) if m.node in mine]
    assert len({m.node for m in found}) >= 7
    for mutant in found[:: max(1, len(found) // 10)]:
        assert not verify_program(mutant.program(program), case.model, case.inputs).ok, str(mutant)


class Pooled(nn.Module):
    """Blocks on a residual, and then what needs all positions: a mean, a slice, and logits of a head that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for _ in range(2):
            x = self.norm(x + self.down(torch.relu(self.up(x))))
        return x.mean(1), x[:, -1], torch.log_softmax(self.head(x)[:, 1:], -1), x.cumsum(1), x.flip(1)


@pytest.mark.parametrize("length", [3, 8])
def test_what_needs_all_positions_gathers_the_smallest_value(length: int) -> None:
    model, x = Pooled().double(), torch.randn(2, length, 8, dtype=torch.float64)
    spec = Spec.parse("up column\ndown row\n")
    report = tpcompile.verify(model, spec, degree=3, example_inputs=(x,), sequence_parallel=True)
    assert report.ok, report.mismatch
    gathered = {row.shape for row in report.collectives if row.kind == "all_gather" and row.direction == "forward"}
    assert gathered == {(2, length, 8)}, "not the 40 logits of the whole head"


def test_lines_of_the_spec_say_which_streams() -> None:
    case = zoo.case("t5")
    text = "".join(f"{line}\n" for line in case.spec.text().splitlines() if "sequence" not in line)

    def streams(extra: str) -> int:
        spec = Spec.parse(text + extra)
        return len(rewrite_captured(case.captured, spec, case.model, 2, ((), case.inputs), options=ON).streams)

    assert streams("") == 2
    assert streams("decoder.block.*.layer.*.layer_norm  sequence\n") == 1


def test_a_model_without_positions_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    model = Flat()
    spec, x = Spec.parse("up column\ndown row\n"), (torch.zeros(4, 8),)
    tpcompile.rewrite(model, spec, degree=2, example_inputs=x)
    with pytest.raises(ShardingError) as caught:
        tpcompile.rewrite(model, spec, degree=2, example_inputs=x, sequence_parallel=True)
    assert caught.value.what == "there is no sequence to spread over the ranks"
    assert caught.value.help == "compile without sequence_parallel"


def test_one_rank_spreads_nothing() -> None:
    assert zoo.program("gpt2", 1, options=ON).collectives == ()


# ------------------------------------------------------------------------------------------------ on real processes
def trained(sequence_parallel: bool) -> dict[str, Any]:
    """Logits and whole gradients of a GPT-2 in train mode, on this rank."""
    torch.set_num_threads(1)
    model, inputs = zoo.build("gpt2", training=True).double(), zoo.inputs("gpt2")
    tp = tpcompile.compile(model, example_inputs=inputs, sequence_parallel=sequence_parallel)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"]] * 2, 1)[:, :11]}
    torch.manual_seed(7)
    outputs = backward(tp(**inputs)) + backward(tp(**longer))
    torch.manual_seed(7)
    expected = backward(model(**inputs)) + backward(model(**longer))
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    got = tpcompile.full_gradients(tp)
    scale = max(float(g.abs().max()) for g in wanted.values())
    return {
        "outputs": max(relative_error(a, b) for a, b in zip(expected, outputs, strict=True)),
        "gradients": max(float((got[name] - wanted[name]).abs().max()) / scale for name in wanted),
        "spread": len(spread(tp.program)),
    }


@pytest.mark.distributed
def test_real_processes_equal_one_device() -> None:
    """Two lengths with one program, dropout on."""
    for found in run(trained, 3, True):
        assert found["spread"] > 0
        assert found["outputs"] < 1e-12
        assert found["gradients"] < 1e-12
