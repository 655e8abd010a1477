"""``tpcompile load``: whether a checkpoint fits a degree, and what it takes to load it on processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tpcompile import checkpoint_files, cli, huggingface, loading

configs: Any = transformers


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    config = configs.GPT2Config(
        n_layer=1, n_embd=48, n_head=6, vocab_size=131, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model: Any = huggingface.build(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["load", *arguments])


def test_a_check_reads_no_weight(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files.Checkpoint, "read", None)
    said = call(str(gpt2), "--tp", "3", "--check", "--dtype", "bfloat16", "--json")
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    stored = load_file(gpt2 / "model.safetensors")
    assert found["model"] == "GPT2LMHeadModel"
    assert found["tensors"] == len(stored)
    assert found["whole"] == 2 * sum(x.numel() for x in stored.values())
    assert len(found["held"]) == 3
    assert all(0.3 < n / found["whole"] < 0.45 for n in found["held"])
    assert call(f"hf:{gpt2}", "--tp", "3", "--check", "--dtype", "bfloat16", "--json").stdout == said.stdout


def test_what_cannot_be_loaded_is_said_at_once(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "rewrite", None)
    monkeypatch.setattr(loading, "launch", None)
    tensors = load_file(gpt2 / "model.safetensors")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    said = call(str(tmp_path))
    assert said.exit_code == 2
    assert f"{tmp_path / 'model.safetensors'}: tensor transformer.wpe.weight has shape [63, 48]" in said.stderr
    assert "did you mean `bfloat16`?" in call(str(gpt2), "--dtype", "bf16").stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_say_what_they_took(gpt2: Path) -> None:
    seen: list[list[tuple[int, int]]] = []

    def watch(found: Sequence[tuple[int, int]]) -> None:
        seen.append([*found])

    took = loading.load(str(gpt2), None, 2, watch=watch)
    fit = loading.fits(str(gpt2), None, 2)
    for rank, one in enumerate(took):
        assert one.held == fit.held[rank] <= one.read < 1.1 * one.held + 8192
        assert one.peak is None or one.peak > one.held
        assert seen[-1][rank] == (one.held, one.held)
    assert seen[0] == [(0, 0), (0, 0)]
    said = call(str(gpt2))
    assert said.exit_code == 0, said.stderr
    assert said.stdout.startswith("loaded on 2 processes: ")
