"""Tiny real models, end to end: equal to one device, and no more communication than the theory asks for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo

from tpcompile import shards
from tpcompile.compare import backward
from tpcompile.equivalence import verify_program
from tpcompile.errors import CaptureError
from tpcompile.program import Program

TOLERANCE = 1e-10
EVAL, TRAIN = (2, False), (3, True)  # (layers, training): two captures of a model that also differ in their layers

VARIANTS = [
    pytest.param(name, layers, training, degree, id=f"{name}-{'train' if training else 'eval'}-{degree}")
    for name, entry in zoo.MODELS.items()
    for layers, training in (EVAL, TRAIN)
    for degree in entry.degrees
]
every_variant = pytest.mark.parametrize(("name", "layers", "training", "degree"), VARIANTS)
every_degree = pytest.mark.parametrize(
    ("name", "degree"), [(name, degree) for name, entry in zoo.MODELS.items() for degree in entry.degrees]
)


def expected(entry: zoo.Entry, layers: int) -> Counter[tuple[str, str]]:
    """The floor: so many collectives of activations, by kind and direction."""
    kinds = [*entry.layer, *entry.once]
    return Counter({kind: layers * entry.layer.get(kind, 0) + entry.once.get(kind, 0) for kind in kinds})


@every_variant
def test_equal_to_one_device(name: str, layers: int, training: bool, degree: int) -> None:
    case = zoo.case(name, layers, training)
    report = verify_program(zoo.program(name, degree, layers, training), case.model, case.inputs)
    assert report.ok, report.mismatch
    assert report.output_error <= TOLERANCE
    assert report.gradient_error <= TOLERANCE
    assert report.native_output_error <= 1e-5
    assert report.replicas_equal


@every_variant
def test_every_parameter_gets_the_eager_gradient(name: str, layers: int, training: bool, degree: int) -> None:
    """Without `verify`: each rank's own gradient is its part of the gradient that the eager model gets."""
    case, program = zoo.case(name, layers, training), zoo.program(name, degree, layers, training)
    model = case.model
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backward(model(**case.inputs))
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in wanted.values())
    for rank, got in enumerate(zoo.step(program, case.inputs).gradients):
        assert got.keys() == wanted.keys()
        for parameter, gradient in got.items():
            mine = shards.cut(wanted[parameter], program.parameters[parameter], program.mesh, rank)
            error = float((gradient - mine).abs().max())
            assert error <= 1e-4 * float(mine.abs().max()) + 1e-5 * scale, parameter


@every_degree
def test_communication_is_at_the_floor(name: str, degree: int) -> None:
    """Exactly so many collectives per layer, and exactly so many around the layers."""
    entry = zoo.MODELS[name]
    two = zoo.counts(zoo.program(name, degree, *EVAL))
    three = zoo.counts(zoo.program(name, degree, *TRAIN))
    three.subtract(two)
    assert {kind: n for kind, n in three.items() if n} == entry.layer
    assert two == expected(entry, 2)


@every_degree
def test_gradients_of_parameters_are_reduced_only_where_they_are_used_cut(name: str, degree: int) -> None:
    """Loose until they go in one bucket: at most one all-reduce for each parameter that is held whole, in backward."""
    program = zoo.program(name, degree, *TRAIN)
    rows = [row for row in program.collectives if row.of == "parameters"]
    assert {(row.kind, row.direction) for row in rows} <= {("all_reduce", "backward")}
    assert sum(row.count for row in rows) <= len(program.parameters)


@every_variant
def test_the_static_report_is_what_a_step_sends(name: str, layers: int, training: bool, degree: int) -> None:
    """Kind, direction and bytes of every collective, as counted while a step runs."""
    program = zoo.program(name, degree, layers, training)
    sent = Counter((r.kind, r.direction, r.bytes) for r in zoo.step(program, zoo.inputs(name)).recorder.rows)
    said: Counter[tuple[str, str, int]] = Counter()
    for row in program.collectives:
        said[row.kind, row.direction, row.bytes] += row.count
    assert said == sent


@pytest.mark.parametrize("degree", zoo.MODELS["llama"].degrees)
def test_bytes_of_a_megatron_layer(degree: int) -> None:
    """4 all-reduces of b * s * h elements, each of which sends 2 (t - 1) / t of them."""

    def sent(program: Program) -> int:
        return sum(r.bytes * r.count for r in program.collectives if r.of == "activations" and r.kind == "all_reduce")

    layer = sent(zoo.program("llama", degree, *TRAIN)) - sent(zoo.program("llama", degree, *EVAL))
    elements = zoo.BATCH * zoo.LENGTH * zoo.WIDTH
    assert layer == 4 * 2 * elements * (degree - 1) * torch.float32.itemsize // degree


def test_a_nanogpt_keeps_its_assert_on_the_length() -> None:
    case = zoo.case("nanogpt")
    too_long = torch.zeros(1, zoo.GPTSizes(1).context + 1, dtype=torch.long)
    with pytest.raises(CaptureError, match="input_ids"):
        case.captured.flatten((), {"input_ids": too_long})
