"""The examples run as their first lines say, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def ran(*command: str) -> str:
    """What a command printed on a terminal 120 wide; a failure shows all of it."""
    environment = {
        **os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(*command: str) -> str:
    return ran("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)


@pytest.mark.distributed
def test_char_gpt_on_two_ranks_is_the_one_on_one_device() -> None:
    shown = torchrun("examples/char_gpt.py", "--steps", "12", "--compare", "--dtype", "float64")
    assert "compiled for 2 ranks" in shown
    assert "a rank holds 56% of the parameters" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in shown.splitlines() if line.startswith("│")]
    assert [step for step, _, _ in rows] == [str(n) for n in range(12)]
    assert all(mine == other for _, mine, other in rows)
    assert float(rows[-1][1]) < 0.8 * float(rows[0][1]), "it learns"
    worst = re.search(r"worst difference of any loss: (\S+)", shown)
    assert worst is not None
    assert float(worst[1]) <= 1e-12


def test_char_gpt_without_torchrun_on_a_text_of_ones_own(tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("To be, or not to be, that is the question: " * 20, encoding="utf-8")
    shown = ran("examples/char_gpt.py", "--steps", "3", "--text", str(text))
    assert "860 characters" in shown
    assert "compiled for 1 rank in" in shown
    assert "a rank holds 100% of the parameters" in shown


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks() -> None:
    shown = torchrun("examples/two_ranks.py")
    rows = re.findall(r"^step \d  one device (\S+)  2 ranks (\S+)$", shown, re.MULTILINE)
    assert len(rows) == 5
    assert all(abs(float(one) - float(two)) < 1e-4 for one, two in rows)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    def losses(shown: str) -> str:
        (line,) = re.findall(r"^losses (.+)$", shown, re.MULTILINE)
        assert len(line.split()) == 12
        return line

    undisturbed = losses(torchrun("examples/restart.py", "--folder", str(tmp_path / "whole")))
    shown = torchrun("--max-restarts", "1", "examples/restart.py", "--folder", str(tmp_path / "killed"), "--kill", "7")
    assert "attempt 1 goes on from step 6" in shown
    assert losses(shown) == undisturbed
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in content(path)]
    assert left == [], "processes are left"


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
