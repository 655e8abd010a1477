"""benchmarks/sweep_models.py: small configs, honest records, and a document that only says what the records say."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import sweep_models as sweep
from benchmarks.sweep_models import Case, Record
from tpcompile import compiler, example_inputs, huggingface
from tpcompile.collectives import transition_of
from tpcompile.errors import ShardingError, TpcompileError, Where

transformers: Any = importlib.import_module("transformers")
SMALL = 2_000_000

GOOD = Record(
    type="llama",
    cls="LlamaForCausalLM",
    degree=2,
    mode="eval",
    outcome="ok",
    cut=0.9,
    used=1.0,
    output_error=1e-15,
    gradient_error=1e-15,
)
WHOLE = replace(GOOD, type="bit", cls="BitModel", cut=0.0)
WRONG = replace(GOOD, type="odd", cls="OddModel", outcome="wrong", stage="compare", reason="value `a_3` differs by 0.5")


# ---------------------------------------------------------------- small configs


@pytest.mark.parametrize(
    "kind", ["llama", "bert", "t5", "vit", "deepseek_v3", "qwen2_vl", "gemma3_text", "clip", "jamba"]
)
def test_a_small_config_makes_a_small_model(kind: str) -> None:
    config_class = transformers.CONFIG_MAPPING[kind]
    sizes = {}
    for name, config in (("small", sweep.shrunk(config_class)), ("default", config_class())):
        model = huggingface.build(config, weights=False)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["small"] < SMALL < sizes["default"]


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("chinese_clip", {"input_ids", "pixel_values"}),
        ("bros", {"input_ids", "bbox"}),
        ("videomae", {"pixel_values"}),
        ("wav2vec2-bert", {"input_features"}),
    ],
)
def test_default_inputs_are_what_a_model_runs_on(kind: str, needed: set[str]) -> None:
    model = huggingface.build(sweep.shrunk(transformers.CONFIG_MAPPING[kind]))
    args, kwargs = example_inputs.default_inputs(model)
    tensors = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    assert (args, tensors) == ((), needed)
    model(**kwargs)
    for name in needed:
        with pytest.raises((AttributeError, TypeError, ValueError)):
            model(**{key: value for key, value in kwargs.items() if key != name})


def test_every_kind_of_layer_is_kept() -> None:
    config_class = transformers.CONFIG_MAPPING["gemma3_text"]
    small, default = sweep.shrunk(config_class), config_class()
    assert set(small.layer_types) == set(default.layer_types) == {"sliding_attention", "full_attention"}
    assert small.num_hidden_layers == len(small.layer_types) < default.num_hidden_layers


def test_tokens_stay_distinct_and_within_the_vocabulary() -> None:
    config = sweep.shrunk(transformers.CONFIG_MAPPING["qwen2_vl"])
    text = config.text_config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = [getattr(config, name) for name in names] + [text.bos_token_id, text.eos_token_id]
    assert len(set(tokens)) == len(tokens)
    assert all(0 <= token < text.vocab_size == sweep.VOCABULARY for token in tokens)


# ---------------------------------------------------------------- records


def row_of_an_mlp() -> Record:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    (row,) = sweep.compared(model, ((torch.randn(3, 8),), {}), [Record("mlp", "MLP", 2, "eval", "not built")])
    return row


def test_the_record_of_a_good_model() -> None:
    (two,) = sweep.records("llama", "LlamaForCausalLM", "eval", (2,))
    assert (two.outcome, two.reason, two.degree) == ("ok", None, 2)
    assert two.sharded
    assert two.cut > 0.9
    assert (two.layer_forward, two.layer_backward, two.layers) == (2, 2, 2)
    assert two.output_error is not None
    assert two.output_error < 1e-10


def test_the_record_of_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first all-reduce is left out."""
    rewrite = compiler.rewrite_captured

    def without_the_first(*args: Any, **kwargs: Any) -> Any:
        program = rewrite(*args, **kwargs)
        reduces = (n for n in program.graph.nodes if (t := transition_of(n.target)) and t.name.startswith("all_reduce"))
        node = next(reduces)
        node.replace_all_uses_with(node.args[0])
        program.graph_module.recompile()
        return program

    assert row_of_an_mlp().sharded
    monkeypatch.setattr(compiler, "rewrite_captured", without_the_first)
    row = row_of_an_mlp()
    assert (row.outcome, row.stage, row.sharded) == ("wrong", "compare", False)
    assert row.reason


@pytest.mark.parametrize(
    ("error", "outcome", "reason", "where"),
    [
        (ShardingError("no", where=Where(file="a.py", line=3), why="so"), "refused", "no: so", "a.py:3"),
        (ValueError("oops\nmore"), "crash", "ValueError: oops more", "test_sweep.py"),
    ],
)
def test_a_refusal_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str, reason: str, where: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(compiler, "rewrite_captured", fails)
    row = row_of_an_mlp()
    assert (row.outcome, row.stage, row.reason) == (outcome, "rewrite", reason)
    assert row.where is not None
    assert where in row.where


def test_what_cannot_be_built_is_not_counted_as_tried() -> None:
    (row,) = sweep.records("llama", "NoSuchModel", "eval", (2,))
    assert (row.outcome, row.stage) == ("not built", "class")
    assert "NoSuchModel" in str(row.reason)


def test_a_model_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(kind: str, name: str, mode: str, degrees: tuple[int, ...]) -> Iterator[Record]:
        yield replace(GOOD, degree=2)
        time.sleep(60)

    monkeypatch.setattr(sweep, "RESULTS", tmp_path / "results" / "models.json")
    monkeypatch.setattr(sweep, "records", slow)
    start = time.monotonic()
    sweep.sweep([Case("llama", "LlamaForCausalLM", "eval", (2, 3))], seconds=0.5)
    assert time.monotonic() - start < 30
    assert {row.degree: row.outcome for row in sweep.read().values()} == {2: "ok", 3: "timeout"}
    assert [file.name for file in sweep.RESULTS.parent.iterdir()] == ["models.json"]


# ---------------------------------------------------------------- the document


def results(*rows: Record) -> dict[str, Any]:
    return {"torch": "2.13.0", "transformers": "5.0.0", "rows": list(rows)}


def test_the_document_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = (GOOD, WHOLE, WRONG, replace(GOOD, degree=3), replace(GOOD, mode="train"))
    assert sweep.document(results(*rows)) == sweep.document(results(*reversed(rows)))
    assert sweep.document(results(*rows)) != sweep.document(results(*rows[1:]))


def test_only_what_is_equal_and_cut_counts() -> None:
    assert "**1 classes**" in sweep.document(results(GOOD, WHOLE, WRONG, replace(GOOD, degree=3)))
    assert "**0 classes**" in sweep.document(results(WHOLE, WRONG))


def test_reasons_that_differ_in_names_and_numbers_are_one() -> None:
    another = replace(WRONG, cls="OtherModel", reason="value `mul_7` differs by 2e-07")
    assert "| 2 | wrong | value `...` differs by N | OddModel |" in sweep.document(results(WRONG, another))


def test_an_unknown_class_is_an_error_of_the_library() -> None:
    with pytest.raises(TpcompileError, match="NoSuchModel"):
        huggingface.usual_class(transformers.CONFIG_MAPPING["llama"](), "llama", "NoSuchModel")
