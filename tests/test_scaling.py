"""Scaling by calculation: FLOPs, bytes and seconds equal what a hand computes, folded layers what all of them cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn
from typer.testing import CliRunner

from tpcompile import calibration, folding, scaling, scaling_text
from tpcompile.activations import memory, resized
from tpcompile.cli import app
from tpcompile.errors import TpcompileError
from tpcompile.links import SHIPPED, Device, Level, Machine, machine
from tpcompile.program import DEFAULT, Options
from tpcompile.scaling import Point, Scaling, scale, work

TOKENS = zoo.BATCH * zoo.LENGTH
HIDDEN, INNER, HEADS, DEPTH = zoo.WIDTH, 96, 8, 8


# ------------------------------------------------------------------------------------------------ counts
def llama_layer_flops(degree: int, tokens: int = TOKENS) -> int:
    """Of one rank: q, k, v and o, three products of the MLP, two products of attention for every pair of positions."""
    weights = 4 * HIDDEN * HEADS * DEPTH + 3 * HIDDEN * INNER
    attention = 2 * 2 * tokens * zoo.LENGTH * HEADS * DEPTH
    return (2 * tokens * weights + attention) // degree


def head_flops(degree: int) -> int:
    return 2 * TOKENS * HIDDEN * zoo.VOCABULARY // degree


@pytest.mark.parametrize("degree", [1, 4])
def test_flops_of_a_llama_are_those_of_a_hand(degree: int) -> None:
    found = work(zoo.program("llama", degree))
    assert found.flops("forward") == 2 * llama_layer_flops(degree) + head_flops(degree)
    # a product has two in backward; flash attention has five for two
    attention = 2 * 2 * TOKENS * zoo.LENGTH * HEADS * DEPTH // degree
    products = 2 * llama_layer_flops(degree) + head_flops(degree) - 2 * attention
    assert found.flops("backward") == 2 * products + 2 * attention * 5 // 2


@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_of_a_llama_are_those_of_a_hand(degree: int) -> None:
    found = work(zoo.program("llama", degree))
    ring = 2 * TOKENS * HIDDEN * 4 * (degree - 1) // degree
    logits = TOKENS * zoo.VOCABULARY * 4 * (degree - 1) // degree
    # two all-reduces a layer each way; the embedding's forward and the head's backward; the logits' all-gather
    assert found.sent("forward") == (2 * 2 + 1) * ring + logits
    assert found.sent("backward") == (2 * 2 + 1) * ring
    assert (found.messages("forward"), found.messages("backward")) == (6, 5)


@pytest.mark.parametrize("name", ["gpt2", "phi"])
@pytest.mark.parametrize("options", [DEFAULT, Options(sequence_parallel=True)], ids=["plain", "spread"])
def test_counted_collectives_are_those_of_the_static_report(name: str, options: Options) -> None:
    program = zoo.program(name, 2, options=options)
    found = work(program)
    for way in ("forward", "backward"):
        listed = [row for row in program.collectives if row.direction == way]
        assert found.messages(way) == sum(row.count for row in listed)
        if not options.sequence_parallel:  # 7 positions on 2 ranks: what is sent is padded, what is listed is not
            assert found.sent(way) == sum(row.bytes * row.count for row in listed)


def test_a_pass_that_adds_a_collective_is_noticed() -> None:
    found, more = work(zoo.program("llama", 2)), work(zoo.program("llama", 2, layers=3))
    assert more.messages() == found.messages() + 4
    assert more.flops("forward") - found.flops("forward") == llama_layer_flops(2)


def test_memory_is_that_of_the_memory_report() -> None:
    program = zoo.program("gpt2", 2, training=True)
    found, rank = work(program), memory(program)[0]
    assert (found.parameters, found.gradients, found.adamw) == (rank.parameters, rank.gradients, rank.adamw)
    assert found.activations == rank.activations
    forward = work(program, training=False)
    assert forward.memory == forward.parameters == rank.parameters
    assert forward.flops() == found.flops("forward")


def test_what_is_moved_by_an_elementwise_op_and_a_lookup() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids).exp()

    from tpcompile.compiler import rewrite

    program = rewrite(Small(), degree=1, example_inputs=(torch.zeros(3, 5, dtype=torch.long),))
    found = {k.op: k.bytes for k in work(program, training=False).kernels}
    rows = 15 * 8 * 4
    assert found["aten.exp.default"] == 2 * rows
    assert found["aten.embedding.default"] == 2 * rows + 15 * 8  # the rows, not the table; the ids


# ------------------------------------------------------------------------------------------------ alike layers
FOLDED = [
    ("llama", 2, DEFAULT),
    ("gemma3", 2, Options(sequence_parallel=True)),
    ("llama_few_kv", 4, Options(sequence_parallel=True, recompute="layers")),
]


SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in FOLDED[1:]]


@pytest.mark.parametrize(("name", "degree", "options"), [FOLDED[0], *SLOW], ids=[f"{n}-{d}" for n, d, _ in FOLDED])
def test_alike_layers_cost_what_all_of_them_cost(
    name: str, degree: int, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = zoo.program(name, degree, layers=5, training=True, options=options)
    assert any(run.times >= 3 for run in folding.runs(program))
    folded = work(program)
    monkeypatch.setattr(scaling, "runs", lambda program: ())
    assert work(program) == folded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degree"), [(name, d) for name in sorted(zoo.MODELS) for d in (2, 4) if d in zoo.MODELS[name].degrees]
)
def test_alike_layers_of_every_model(name: str, degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (DEFAULT, Options(sequence_parallel=True, recompute="layers")):
        program = zoo.program(name, degree, layers=6, training=True, options=options)
        folded = work(program)
        with monkeypatch.context() as patch:
            patch.setattr(scaling, "runs", lambda program: ())
            assert work(program) == folded


def test_layers_that_are_unlike_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tapering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [8, 12, 16, 20, 24]
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    from tpcompile.compiler import rewrite

    program = rewrite(Tapering(), degree=2, example_inputs=(torch.randn(2, 8),))
    assert not folding.runs(program)
    found = work(program)
    assert found.flops("forward") == sum(2 * 2 * 2 * 8 * n for n in (8, 12, 16, 20, 24)) // 2


# ------------------------------------------------------------------------------------------------ seconds
def a_machine(*levels: Level, start: float = 0.0) -> Machine:
    return Machine("here", "a test", Device({"float32": 1e9}, 1e8, 1e9, 1e-6), levels, start)


NODE = Level("node", 4, 1e-6, 1e9)
BETWEEN = Level("between", None, 1e-5, 1e8)


def test_an_op_takes_the_longer_of_computing_and_moving() -> None:
    here = a_machine(NODE)
    assert here.kernel_seconds(2_000_000, 100, "float32") == pytest.approx(1e-6 + 2e-3)
    assert here.kernel_seconds(2_000, 100_000, "float32") == pytest.approx(1e-6 + 1e-3)
    with pytest.raises(TpcompileError, match="no FLOPs per second in float64"):
        here.kernel_seconds(1, 1, "float64")


def test_a_ring_in_a_node() -> None:
    here, n, p = a_machine(NODE, start=2e-6), 4_000_000, 4
    gather = 2e-6 + (p - 1) * 1e-6 + n * (p - 1) / p / 1e9
    assert here.collective_seconds("all_gather", n, range(p)) == pytest.approx(gather)
    assert here.collective_seconds("reduce_scatter", n, range(p)) == pytest.approx(gather)
    assert here.collective_seconds("all_reduce", n, range(p)) == pytest.approx(2 * gather - 2e-6)
    assert here.collective_seconds("all_reduce", n, [2]) == 0


def test_a_tree_where_latency_counts() -> None:
    here = a_machine(Level("flat", None, 1e-3, 1e9))
    assert here.collective_seconds("all_reduce", 1000, range(64)) == pytest.approx(2 * 6 * 1e-3 + 2 * 1000 / 1e9)
    assert here.collective_seconds("all_gather", 1000, range(64)) == pytest.approx(63e-3 + 1000 * 63 / 64 / 1e9)


def test_level_by_level_between_nodes() -> None:
    here, n = a_machine(NODE, BETWEEN), 8_000_000
    inside = 3 * 1e-6 + n * 3 / 4 / 1e9
    outside = min(2 * (1e-5 + n / 4 / 2 / 1e8), 2 * 1e-5 + 2 * n / 4 / 1e8)
    assert here.collective_seconds("all_reduce", n, range(8)) == pytest.approx(2 * inside + outside)
    assert here.collective_seconds("all_gather", n, range(8)) == pytest.approx(inside + 1e-5 + n / 4 / 2 / 1e8)
    # one rank of each node: nothing is inside
    assert here.collective_seconds("all_gather", n, (0, 4)) == pytest.approx(1e-5 + n / 2 / 1e8)
    # 4 and 2 ranks: a ring of six, of which one step is between the nodes
    uneven = 4 * 1e-6 + 1e-5 + n * 5 / 6 / 1e8
    assert here.collective_seconds("all_gather", n, range(6)) == pytest.approx(uneven)


def test_a_port_that_a_node_shares() -> None:
    shared = a_machine(NODE, Level("port", None, 0.0, 1e8, shared=True))
    n = 8_000_000
    level_by_level = 3e-6 + n * 3 / 4 / 1e9 + n / 4 / 2 / (1e8 / 4)
    ring = 6e-6 + n * 7 / 8 / 1e8
    assert shared.collective_seconds("all_gather", n, range(8)) == pytest.approx(min(level_by_level, ring))


def test_more_ranks_than_the_machine_has() -> None:
    with pytest.raises(TpcompileError, match="has 4 ranks, and 6 are asked for"):
        a_machine(NODE).collective_seconds("all_reduce", 8, range(6))


# ------------------------------------------------------------------------------------------------ machines
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_machines(name: str, tmp_path: Path) -> None:
    found = machine(name)
    assert found.levels[-1].ranks is None
    assert found.device.flops["bfloat16"] > found.device.flops["float32"] > 0
    (tmp_path / f"{name}.toml").write_text(found.toml())
    assert machine(tmp_path / f"{name}.toml") == found


GOOD = machine("nvlink").toml()
BAD: list[tuple[str, Callable[[str], str], str, str]] = [
    ("syntax", lambda t: t.replace("[device]", "[device"), "is not TOML", "[device"),
    ("missing", lambda t: t.replace("memory = 80000000000.0\n", ""), "[device] lacks `memory`", "[device]"),
    ("misspelt", lambda t: t.replace("latency = 2.7e-06", "latncy = 1"), "`latncy` means nothing", "latncy = 1"),
    ("negative", lambda t: t.replace("latency = 2.7e-06", "latency = -1"), "at least zero, not -1", "latency = -1"),
    ("zero", lambda t: t.replace("bandwidth = 50000000000.0", "bandwidth = 0"), "above zero, not 0", "bandwidth = 0"),
    ("text", lambda t: t.replace("ranks = 8", 'ranks = "8"'), "`ranks` must be a whole number", 'ranks = "8"'),
    ("unbounded", lambda t: t.replace("ranks = 8\n", ""), "must say how many `ranks`", "[[level]]"),
    ("no levels", lambda t: t.partition("[[level]]")[0], "no [[level]]", ""),
]


@pytest.mark.parametrize(("change", "says", "line"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_machine_is_refused_with_its_line(
    change: Callable[[str], str], says: str, line: str, tmp_path: Path
) -> None:
    text = change(GOOD)
    assert text != GOOD
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(TpcompileError) as caught:
        machine(file)
    error = caught.value
    assert says in error.what
    assert error.where is not None
    assert error.where.file == str(file)
    if line:
        assert error.where.text == line
        assert error.where.line is not None
        assert text.splitlines()[error.where.line - 1] == line


def test_a_machine_that_is_not_there() -> None:
    with pytest.raises(TpcompileError, match="cannot read the machine `nowhere"):
        machine("nowhere.toml")


def test_a_fit_finds_latency_and_bandwidth() -> None:
    sizes = [1 << n for n in range(10, 25, 2)]
    times = [2 * 3 * 5e-6 + 2 * n * 3 / 4 / 2e9 for n in sizes]
    latency, bandwidth = calibration.fit(sizes, times, 4)
    assert latency == pytest.approx(5e-6)
    assert bandwidth == pytest.approx(2e9)
    assert calibration.fit(sizes, [n / 1e9 for n in sizes], 2)[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.distributed
def test_calibration_of_this_machine(tmp_path: Path) -> None:
    found = calibration.calibrate(2, threads=1)
    (tmp_path / "here.toml").write_text(found.toml())
    again = machine(tmp_path / "here.toml")
    assert (again.device, again.levels) == (found.device, found.levels)
    assert 1e8 < found.device.flops["float32"] < 1e16


# ------------------------------------------------------------------------------------------------ scaling
@cache
def the_scaling() -> Scaling:
    case = zoo.case("llama_few_kv")
    here = a_machine(NODE, BETWEEN)
    return scale(case.model, case.spec, example_inputs=case.inputs, degrees=(1, 2, 4, 64), on=here)


def on(other: Machine) -> Scaling:
    """The same work on another machine."""
    points = [(p.degree, p.work) for p in the_scaling().possible if p.work is not None]
    made = tuple(Point(n, w, w.computing(other), w.communicating(other)) for n, w in points)
    return Scaling(other, False, {}, made)


def test_scaling_of_a_llama() -> None:
    found = the_scaling()
    assert [p.degree for p in found.possible] == [1, 2, 4]
    refused = found.points[-1].refused
    assert refused is not None
    assert "64" in refused.what
    one, two, four = found.possible
    assert math.isclose(found.efficiency(one), 1)
    assert found.efficiency(two) == pytest.approx(one.seconds / two.seconds / 2)
    assert found.efficiency(four) < found.efficiency(two) < 1
    assert one.communicating == 0
    assert two.work is not None
    assert two.seconds == two.work.computing(found.on) + two.work.communicating(found.on)
    fastest = found.fastest
    assert fastest is not None
    assert fastest.seconds == min(p.seconds for p in found.possible)
    assert not found.training


def test_slow_links_make_one_rank_the_fastest() -> None:
    slow = on(a_machine(Level("slow", None, 1.0, 1.0)))
    assert slow.fastest is slow.possible[0]
    assert "more ranks do not help" in scaling_text.conclusion(slow)[0]
    free = on(a_machine(Level("free", None, 0.0, 1e15)))
    assert free.fastest is free.possible[-1]


def test_other_sizes_than_the_example() -> None:
    program = zoo.program("llama", 2)
    small, large = work(program, training=False), work(program, resized(program, 4, 14), training=False)
    assert large.sent() * TOKENS == small.sent() * 4 * 14


def test_text_and_document() -> None:
    found = the_scaling()
    rows = scaling_text.table(found).rows
    assert len(rows) == 4
    assert "refused" in rows[-1][0]
    document = scaling_text.document(found)
    assert document["fastest"] == (found.fastest and found.fastest.degree)
    assert scaling_text.count_text(17_180_000_000) == "17.2 G"
    assert scaling_text.seconds_text(0.00032) == "320 us"


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = the_scaling()
    with pytest.raises(TpcompileError, match="cannot draw"):
        scaling_text.plot(found, "title", tmp_path / "a.txt")

    def missing(name: str) -> object:
        raise ImportError(name)

    with monkeypatch.context() as patch:
        patch.setattr(scaling_text.importlib, "import_module", missing)
        with pytest.raises(TpcompileError, match="matplotlib is not installed"):
            scaling_text.plot(found, "title", tmp_path / "a.svg")
    pytest.importorskip("matplotlib")
    scaling_text.plot(found, "title", tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


MODEL = (
    "hf:llama?hidden_size=64,num_hidden_layers=1,num_attention_heads=8,num_key_value_heads=8,intermediate_size=96,"
    "vocab_size=128"
)


def test_the_command() -> None:
    arguments = ["scale", MODEL, "--tp", "1,2,16", "--link", "pcie", "--train", "--dtype", "bfloat16", "--seq", "32"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "input_ids [2, 32], labels [2, 32]" in told.output
    assert "16  refused: " in told.output
    assert CliRunner().invoke(app, ["scale", MODEL, "--tp", "1;2"]).exit_code == 2
    assert CliRunner().invoke(app, ["scale", MODEL, "--dtype", "int7"]).exit_code == 2
