"""Every verb on a small model in a file of the user's, with the whole compiler behind it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tpcompile.cli import app

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for block in self.h:
            x = block(x)
        return x


def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(4, 8),)
"""

SPEC = """
for Net
h.*.up    column
h.*.down  row
"""


@pytest.fixture
def user(tmp_path: Path) -> list[str]:
    """``MODEL --spec FILE``, as a user would type them."""
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "net.tpspec").write_text(SPEC)
    return [f"{tmp_path / 'net.py'}:net", "--spec", str(tmp_path / "net.tpspec")]


def call(verb: str, *arguments: str):
    return CliRunner().invoke(app, [verb, *arguments])


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_verify(user: list[str], degree: int):
    result = call("verify", *user, "--tp", str(degree), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert max(document["output_error"], document["gradient_error"]) <= 1e-10
    count = sum(row["count"] for row in document["collectives"] if row["direction"] == "forward")
    assert count == (3 if degree > 1 else 0)


def test_show_folds_the_layers(user: list[str]):
    result = call("show", *user)
    assert result.exit_code == 0, result.output
    assert "h: 1..2 like 0" in result.stdout
    assert "net.py" in result.stdout


def test_comm_counts_the_collectives(user: list[str]):
    rows = json.loads(call("comm", *user, "--json").stdout)["collectives"]
    forward = [row for row in rows if row["direction"] == "forward"]
    # A ring all-reduce of 4 x 8 float32 sends 2 (t - 1) / t of its bytes.
    assert {(row["kind"], row["bytes"]) for row in forward} == {("all_reduce", 128)}
    assert sum(row["count"] for row in forward) == 3


def test_diff_shows_where_the_collectives_come_from(user: list[str]):
    result = call("diff", *user)
    assert result.exit_code == 0, result.output
    assert any(line.startswith("+") and "all_reduce" in line for line in result.stdout.splitlines())


def test_explain_leads_back_to_the_spec(user: list[str]):
    result = call("explain", user[0], "h.1.up.bias", *user[1:])
    assert result.exit_code == 0, result.output
    assert "net.tpspec" in result.stdout
    near = call("explain", user[0], "h.1.upp.bias", *user[1:])
    assert near.exit_code == 2
    assert "h.1.up.bias" in near.stderr


@pytest.mark.distributed
def test_run_agrees_with_one_device(user: list[str]):
    result = call("run", *user, "--tp", "2", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["ranks"]) == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("h.*.up  column\nh.*.down  rwo\n", "row"),
        ("h.*.up  column\nh.*.dwon  row\n", "h.*.down"),
        ("h.*.up  column\nh.*.up  row\nh.*.down  row\n", "h.0.up"),
        ("h.*.up  colum n\n", "net.tpspec:2"),
    ],
)
def test_a_wrong_spec_is_explained_and_never_a_traceback(user: list[str], spec: str, said: str):
    Path(user[2]).write_text("for Net\n" + spec)
    result = call("verify", *user, "--tp", "2")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("model", ["no_such_file.py:net", "no.such.module:net", "hf:no-such-model-type", "nonsense"])
def test_a_wrong_model_is_explained(model: str):
    result = call("show", model)
    assert result.exit_code == 2
    assert model.split(":")[-1] in result.stderr or model.split(":")[0] in result.stderr
    assert "Traceback" not in result.stderr
