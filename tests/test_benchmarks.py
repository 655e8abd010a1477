"""benchmarks/compare.py: a floor that is right, counts that are at most its own, a document of what was recorded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from distributed import run
from torch import Tensor

import tpcompile
from benchmarks import compare, one_rank
from benchmarks.peers import measure
from benchmarks.peers.contenders import CONTENDERS, Running
from benchmarks.peers.document import document, ratios
from benchmarks.peers.floor import Floor
from benchmarks.peers.workloads import MODES, WORKLOADS, Widened, Workload, tiny

QUICK = ("gpt2", "qwen3")
FAMILIES = ("llama", "gpt-neox", "phi", "bert")


# ---------------------------------------------------------------- on real processes
@dataclass(frozen=True)
class Found:
    """What a rank found: worst relative errors of floors, and collectives of a step as (how many, bytes)."""

    errors: Mapping[str, float]
    sent: Mapping[tuple[str, str], tuple[int, int]]  # contender, mode


def one_device(work: Workload) -> tuple[torch.nn.Module, Mapping[str, Tensor]]:
    """The model in float64; its logits and its gradients by name."""
    ids, labels = work.batch_of_tokens()
    model = work.model(torch.float64)
    with Widened():
        outputs: Any = model(input_ids=ids, labels=labels)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return model, {"the logits": outputs.logits.detach(), **gradients}


def error(floor: Floor, model: torch.nn.Module, work: Workload, expected: Mapping[str, Tensor]) -> float:
    """The worst difference of the floor's logits and gradients, each relative to its own largest value.

    A gradient that is zero but for rounding (of a key's bias) is taken relative to the largest of all.
    """
    ids, labels = work.batch_of_tokens()
    with torch.no_grad():
        got = {"the logits": floor.logits(ids)}
    floor.loss(ids, labels).backward()
    floor.after_backward()
    got |= floor.gradients({name: p.shape for name, p in model.named_parameters()})
    assert got.keys() == expected.keys()
    least = 1e-6 * max(float(x.abs().max()) for x in expected.values())
    return max(
        float((got[name] - x).abs().max()) / max(float(x.abs().max()), least)
        for name, x in expected.items()
        if "key.bias" not in name and "k_proj.bias" not in name
    )


def with_whole_logits(work: Workload) -> Running:
    """tpcompile as it is called for its logits too."""
    ids, labels = work.batch_of_tokens()
    tp = tpcompile.compile(work.model().train(), example_inputs={"input_ids": ids, "labels": labels})
    return Running(
        list(tp.parameters()),
        lambda ids: tp(input_ids=ids).logits,
        lambda ids, labels: tp(input_ids=ids, labels=labels).loss,
        dict,
    )


def found_on_rank(names: tuple[str, ...]) -> dict[str, Found]:
    torch.set_num_threads(1)
    every: dict[str, Found] = {}
    for name in names:
        work = tiny(name)
        model, expected = one_device(work)
        floors = {kind: Floor(work, model, kind == "sequence") for kind in ("plain", "sequence", "broken")}
        floors["broken"].leave = lambda x: x
        errors = {kind: error(floor, model, work, expected) for kind, floor in floors.items()}
        running = {
            (contender, mode): CONTENDERS[contender].build(work, mode == "training", torch.float32)
            for contender in ("floor", "tpcompile")
            for mode in MODES
        }
        if name == QUICK[0]:
            running["whole logits", "training"] = with_whole_logits(work)
        sent = {key: total(measure.counted(made, key[1], *work.batch_of_tokens())) for key, made in running.items()}
        every[name] = Found(errors, sent)
    return every


def total(phases: Mapping[str, measure.Counts]) -> tuple[int, int]:
    counts = [count for phase in phases.values() for count in phase.values()]
    return sum(n for n, _ in counts), sum(size for _, size in counts)


def is_more(sent: tuple[int, int], than: tuple[int, int]) -> bool:
    """Whether there are more collectives, or more bytes."""
    return sent[0] > than[0] or sent[1] > than[1]


@cache
def found(names: tuple[str, ...]) -> dict[str, Found]:
    return run(found_on_rank, 2, names)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", QUICK)
def test_floor_is_one_device_and_tpcompile_sends_no_more(name: str) -> None:
    check(found(QUICK)[name])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FAMILIES)
def test_other_floors_are_one_device_and_tpcompile_sends_no_more(name: str) -> None:
    check(found(FAMILIES)[name])


def check(on_rank: Found) -> None:
    assert on_rank.errors["plain"] < 1e-11
    assert on_rank.errors["sequence"] < 1e-11
    assert on_rank.errors["broken"] > 1e-3
    for mode in MODES:
        floor, own = on_rank.sent["floor", mode], on_rank.sent["tpcompile", mode]
        assert floor[0] > 0
        assert not is_more(own, floor), f"{mode}: {own} for {floor}"


@pytest.mark.distributed
def test_a_gather_that_nobody_needs_is_counted() -> None:
    sent = found(QUICK)[QUICK[0]].sent
    assert is_more(sent["whole logits", "training"], sent["floor", "training"])


def test_every_family_is_tested() -> None:
    assert {*QUICK, *FAMILIES} | {"llama-small"} == WORKLOADS.keys()


# ---------------------------------------------------------------- the document
def test_document_is_what_was_recorded() -> None:
    assert compare.DOCUMENT.read_text() == document(compare.recorded(), compare.recorded(compare.ONE_RANK))


def test_another_sample_makes_another_document() -> None:
    results = copy.deepcopy(compare.recorded())
    other = compare.recorded(compare.ONE_RANK)
    work = next(iter(results["workloads"].values()))
    samples = work["training"]["contenders"]["tpcompile"]["wall"]
    samples[:] = [3 * x for x in samples]
    assert document(results, other) != compare.DOCUMENT.read_text()


def test_recorded_contenders_are_right() -> None:
    """Errors are those of float32; who is wrong or has failed says so in the document."""
    for work in compare.recorded()["workloads"].values():
        for mode in MODES:
            for name, row in work[mode]["contenders"].items():
                errors = row.get("errors", {})
                if "failed" in row or "wrong" in errors or not errors:
                    assert name not in ("floor", "tpcompile")
                    continue
                if name.startswith(("floor", "tpcompile")):
                    assert max(errors["output"], errors.get("gradient", 0.0)) < 1e-4, (name, mode)


def test_a_ratio_is_taken_within_each_round() -> None:
    rows = {"a": {"wall": [1.0, 20.0, 3.0]}, "b": {"wall": [2.0, 40.0, 6.0]}, "c": {}}
    assert ratios(rows, "a", "b", "wall") == (0.5, 0.5, 0.5)
    assert ratios(rows, "a", "c", "wall") is None


# ---------------------------------------------------------------- one rank alone
def alone(degree: int, mode: str) -> Mapping[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        contenders = ("floor", "tpcompile", "tpcompile, sequence")
        return process.submit(one_rank.rank, tiny("llama"), degree, mode, contenders, 2, "float32").result()


@pytest.mark.slow
def test_one_rank_alone_is_timed_beside_its_roofline() -> None:
    two, one = alone(2, "training"), alone(1, "inference")
    for found in (two, one):
        for row in found["contenders"].values():
            assert len(row["wall"]) == len(row["host"]) == 2
            assert 0 < found["roofline"]["seconds"] < min(row["wall"])
    assert one["roofline"]["flops"] < two["roofline"]["flops"] < 3 * one["roofline"]["flops"]  # of half, 3 times
