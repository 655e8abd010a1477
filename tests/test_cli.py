"""The command line: what is printed, where, and the exit codes. The compiler behind it is a stand-in here."""

# pyright: reportArgumentType=false
# A stand-in is not the class that it stands for.

import errno
import importlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import tpcompile
from tpcompile import cli, display
from tpcompile.cli.answers import Answer, respond
from tpcompile.cli.arguments import example_inputs
from tpcompile.errors import ShardingError, TpcompileError, Where
from tpcompile.rehearsal import Rehearsed, backward, gradient_errors, rehearse

BOX = set("─│┌┐└┘╭╮╰╯┏┓━┃\x1b")
VERBS = {
    "verify": ("m.py:f",),
    "show": ("m.py:f",),
    "diff": ("m.py:f",),
    "comm": ("m.py:f",),
    "explain": ("m.py:f", "h.0.up.weight"),
}


@dataclass(frozen=True)
class Line:
    name: str
    module: str
    placement: str = "R"
    shape: str = "[b, s, 8]"
    dtype: str = "float32"
    source: str = "model.py:1"


@dataclass(frozen=True)
class Collective:
    module: str
    direction: str = "forward"
    kind: str = "all_reduce"
    bytes: int = 2048
    count: int = 1
    where: str = "model.py:1"
    shape: str = "[b, s, 8]"


@dataclass(frozen=True)
class Report:
    ok: bool = True
    output_error: float = 2e-15
    gradient_error: float = 3e-14
    collectives: tuple[Collective, ...] = tuple(Collective(f"h.{i}.down") for i in range(3))
    mismatch: str | None = None
    held: tuple[float, ...] = (0.55, 0.45)
    timings: dict[str, float] = field(default_factory=lambda: {"capture": 1.25, "place": 0.5})


LINES = [
    Line("embed", "embed"),
    *[Line(f"{op}_{i}", f"h.{i}.{op}", p) for i in range(3) for op, p in (("up", "S(2)"), ("down", "P"))],
]
STAGES = [("structure", "a\nb", "a\nb"), ("place", "a\nb", "a\nall_reduce\nb")]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the verbs call, replaced; a test changes an attribute to change an answer."""
    answers = SimpleNamespace(report=Report(), lines=LINES, error=None, calls=[])

    def load(text: str, weights: bool) -> SimpleNamespace:
        print("a chatty model")
        if answers.error is not None:
            raise answers.error
        answers.calls.append(("load", text, weights))
        return SimpleNamespace(model=torch.nn.Linear(8, 8), args=(torch.zeros(2, 8),), kwargs={}, label="Tiny")

    def rewrite(
        model: object, spec: object, *, degree: int, example_inputs: object, **options: object
    ) -> SimpleNamespace:
        answers.calls.append(("rewrite", spec, degree))
        return SimpleNamespace(
            lines=lambda: answers.lines,
            timings=answers.report.timings,
            stages=STAGES,
            collectives=answers.report.collectives,
            explain=lambda name: f"{name} is cut because of line 3",
        )

    def verify(model: object, spec: object, *, degree: int, example_inputs: object, **options: object) -> Report:
        answers.calls.append(("verify", spec, degree))
        return answers.report

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    importlib.import_module("tpcompile.models")  # importing it later would undo the next line
    monkeypatch.setattr(tpcompile, "models", SimpleNamespace(load=load), raising=False)
    monkeypatch.setattr(tpcompile, "rewrite", rewrite, raising=False)
    monkeypatch.setattr(tpcompile, "verify", verify, raising=False)
    return answers


def call(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_answers_in_plain_text_when_piped(verb: str):
    result = call(verb, *VERBS[verb])
    assert result.exit_code == 0, result.output
    assert result.stdout
    assert not BOX & set(result.stdout)
    assert "a chatty model" not in result.stdout
    assert "a chatty model" in result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_one_json_document_and_nothing_else(verb: str):
    result = call(verb, *VERBS[verb], "--tp", "4", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["model"] == "Tiny"
    assert document["degree"] == 4


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_is_wrong_with_its_input_and_exits_2(verb: str, stand_in: SimpleNamespace):
    stand_in.error = ShardingError("4 does not divide 9", where=Where("x.tpspec", 3, 1, 2, "up  column"), help="use 3")
    result = call(verb, *VERBS[verb])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "a chatty model\n"
        "error: 4 does not divide 9\n"
        "  --> x.tpspec:3:1\n"
        "      3 | up  column\n"
        "        | ^^\n"
        "  help: use 3\n"
    )


def test_an_error_is_a_json_document_too(stand_in: SimpleNamespace):
    stand_in.error = ShardingError("4 does not divide 9", where=Where("x.tpspec", 3), help="use 3")
    result = call("comm", "m.py:f", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert (error["kind"], error["what"], error["where"]["line"]) == ("ShardingError", "4 does not divide 9", 3)


def test_a_defect_is_one_line_and_a_traceback_only_on_demand(stand_in: SimpleNamespace):
    stand_in.error = KeyError("gone")
    result = call("show", "m.py:f")
    assert result.exit_code == 70
    assert "internal error: KeyError: 'gone'" in result.stderr
    assert "report" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in call("show", "m.py:f", "--traceback").stderr
    assert json.loads(call("show", "m.py:f", "--json").stdout)["error"]["kind"] == "internal"


def test_wrong_usage_exits_2_without_boxes():
    for arguments in (("verfy", "m.py:f"), ("verify",), ("verify", "m.py:f", "--tp", "0"), ("show", "m.py:f", "--no")):
        result = call(*arguments)
        assert result.exit_code == 2, arguments
        assert not BOX & set(result.output)


def test_a_failed_check_exits_1_and_names_the_first_difference(stand_in: SimpleNamespace):
    stand_in.report = Report(ok=False, output_error=0.5, mismatch="all_reduce_3 in h.1.down")
    result = call("verify", "m.py:f")
    assert result.exit_code == 1
    assert result.stdout.startswith("NOT equal: Tiny on 2 ranks")
    assert "all_reduce_3 in h.1.down" in result.stdout
    failed = call("verify", "m.py:f", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["ok"] is False


def test_infinity_does_not_spoil_the_json(stand_in: SimpleNamespace):
    stand_in.report = Report(ok=False, output_error=float("inf"), gradient_error=float("nan"))

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(call("verify", "m.py:f", "--json").stdout, parse_constant=refused)
    assert (document["output_error"], document["gradient_error"]) == ("inf", "nan")


def test_verify_says_how_equal_at_what_cost():
    assert call("verify", "m.py:f").stdout.splitlines() == [
        "equal: Tiny on 2 ranks and on one device",
        "  outputs      2.0e-15 worst relative error in float64",
        "  gradients    3.0e-14 worst relative error in float64",
        "  parameters   55% of the bytes on the fullest rank, 45% on the emptiest",
        "  collectives  3 all_reduce forward, 6.0 KiB sent per rank",
        "  time         capture 1.25 s, then 0.50 s (place 0.50)",
    ]


def test_options_reach_the_compiler(stand_in: SimpleNamespace):
    call("verify", "m.py:f", "--spec", "a.tpspec", "--tp", "8")
    call("comm", "m.py:f", "--spec", "b.tpspec", "--tp", "3")
    assert stand_in.calls == [
        ("load", "m.py:f", True),
        ("verify", "a.tpspec", 8),
        ("load", "m.py:f", False),
        ("rewrite", "b.tpspec", 3),
    ]


def test_show_folds_alike_layers_and_prints_the_times():
    assert call("show", "m.py:f").stdout.splitlines() == [
        "value   shape      dtype    placement  module    source",
        "embed   [b, s, 8]  float32  R          embed     model.py:1",
        "up_0    [b, s, 8]  float32  S(2)       h.0.up    model.py:1",
        "down_0  [b, s, 8]  float32  P          h.0.down  model.py:1",
        "    h: 1..2 like 0",
        "",
        "placement: R whole on every rank, H whole and its gradient a partial sum, "
        "S(dim:how) cut along dim, P a partial sum",
        "capture 1.25 s, then 0.50 s (place 0.50)",
    ]


def test_a_layer_that_differs_is_not_folded(stand_in: SimpleNamespace):
    stand_in.lines = [replace(line, placement="R") if line.name == "down_1" else line for line in LINES]
    shown = call("show", "m.py:f").stdout
    assert "h.1.down" in shown
    assert "h: 2 like 0" in shown


def test_alternating_layers_fold_onto_two():
    lines = [Line(f"up_{i}", f"h.{i}.up", "R" if i % 2 else "S(2)") for i in range(6)]
    assert [str(entry) for entry in display.fold(lines) if isinstance(entry, display.Alike)] == [
        "h: 2, 4 like 0",
        "h: 3, 5 like 1",
    ]


def test_show_can_be_limited_to_modules():
    shown = json.loads(call("show", "m.py:f", "--module", "h.{0,2}", "--json").stdout)
    assert [line["name"] for line in shown["lines"]] == ["up_0", "down_0", "up_2", "down_2"]
    wrong = call("show", "m.py:f", "--module", "h.0.upp")
    assert wrong.exit_code == 2
    assert "did you mean `h.0.up`?" in wrong.stderr


def test_diff_shows_what_each_pass_changed():
    assert call("diff", "m.py:f").stdout.splitlines() == [
        "structure: nothing changed",
        "--- before place",
        "+++ after place",
        "@@ -1,2 +1,3 @@",
        " a",
        "+all_reduce",
        " b",
    ]
    assert call("diff", "m.py:f", "--pass", "structure").stdout == "structure: nothing changed\n"
    wrong = call("diff", "m.py:f", "--pass", "plase")
    assert wrong.exit_code == 2
    assert "did you mean `place`?" in wrong.stderr


def test_comm_joins_alike_layers_and_adds_up():
    lines = call("comm", "m.py:f").stdout.splitlines()
    row = ("h.{0..2}.down", "all_reduce", "forward", "[b, s, 8]", "2.0 KiB", "3", "6.0 KiB", "model.py:1")
    assert tuple(re.split(r"\s{2,}", lines[1])) == row
    assert lines[2].split() == ["total", "3", "6.0", "KiB"]
    document = json.loads(call("comm", "m.py:f", "--json").stdout)
    assert (document["count"], document["bytes"], len(document["collectives"])) == (3, 6144, 3)


def test_one_layer_is_named_and_several_are_a_range(stand_in: SimpleNamespace):
    stand_in.report = Report(collectives=(Collective("h.0.up"), Collective("h.0.down"), Collective("h.1.down")))
    lines = call("comm", "m.py:f").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["h.0.up", "h.{0..1}.down"]


def test_verify_says_that_nothing_is_cut(stand_in: SimpleNamespace):
    said = ": nothing is cut, and `tpcompile plan` says why"
    assert said not in call("verify", "m.py:f").stdout
    stand_in.report = Report(held=(1.0, 1.0))
    assert f"100% of the bytes on each rank{said}" in call("verify", "m.py:f").stdout
    stand_in.report = Report(held=(1.0,))
    assert said not in call("verify", "m.py:f", "--tp", "1").stdout


def test_people_get_colours_and_programs_do_not():
    def written(terminal: bool) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
        display.write(console, [display.Verdict(False, "NOT equal"), display.Diff(("+new",)), display.listing(LINES)])
        display.write_error(console, ShardingError("wrong"))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert BOX & set(written(True))
    assert not BOX & set(written(False))


def test_a_terminal_that_is_too_narrow_for_numbers_gets_whole_lines():
    table = display.Table(("ranks", "bytes in all"), (("1", "12.0 KiB"), ("2", "6.0 KiB")), frozenset({0, 1}))

    def lines(width: int) -> list[str]:
        console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
        display.write(console, [table])
        assert isinstance(console.file, io.StringIO)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    assert lines(80) == lines(15) == ["ranks  bytes in all", "    1      12.0 KiB", "    2       6.0 KiB"]


@pytest.mark.parametrize("json_asked", [True, False])
def test_an_answer_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, json_asked: bool):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tpcompile.cli.answers.print_json", full)
    monkeypatch.setattr("tpcompile.cli.answers.write", full)
    result = call("verify", "m.py:f", *(["--json"] if json_asked else []))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-2:] == [
        "error: cannot write the answer to standard output",
        "  why:  No space left on device",
    ]


def test_a_calibration_is_not_lost(tmp_path: Path):
    (tmp_path / "ours.toml").write_text("measured")
    result = call("scale", "m.py:f", "--calibrate", str(tmp_path / "ours.toml"))
    assert result.exit_code == 2
    assert f"--link {tmp_path / 'ours.toml'}" in result.stderr
    assert "--force" not in result.stderr  # scale has no such option


def test_no_line_of_a_pipe_is_wrapped():
    console = Console(file=io.StringIO(), width=20)
    display.write(console, ["x" * 50, display.listing([Line("v" * 50, "m")])])
    assert isinstance(console.file, io.StringIO)
    assert [len(line) > 40 for line in console.file.getvalue().splitlines()] == [True, True, True]


def test_run_starts_the_processes_and_reports_each(monkeypatch: pytest.MonkeyPatch):
    started: list[object] = []

    def launch(function: object, ranks: int, args: object) -> list[Rehearsed]:
        started.append((function, ranks, args))
        return [Rehearsed("cpu", 1e-7, 2e-6, "h.0.up.weight", 3e-4, 0.25), replace(bad, gradient_error=gradient_error)]

    bad, gradient_error = Rehearsed("cpu", 1e-7, 0.0, "h.1.up.weight", 3e-4, 0.5), 2e-6
    monkeypatch.setattr("tpcompile.launch.launch", launch)
    result = call("run", "m.py:f", "--tp", "2", "--spec", "a.tpspec")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "equal: m.py:f on 2 processes and on one device (allowed: 3.0e-04)",
        "rank  device  outputs  gradients  worst parameter  forward and backward",
        "0     cpu     1.0e-07  2.0e-06    h.0.up.weight    0.25 s",
        "1     cpu     1.0e-07  2.0e-06    h.1.up.weight    0.50 s",
    ]
    assert started == [(rehearse, 2, ("m.py:f", "a.tpspec", {"sequence_parallel": False, "recompute": None}))]
    gradient_error = 1e-2
    result = call("run", "m.py:f", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert document["ranks"][1]["gradient_error"] == 1e-2


def test_a_rehearsal_sees_every_kind_of_wrong_gradient():
    right = {"w": torch.ones(3), "zero": torch.full((3,), 1e-9)}
    assert max(gradient_errors(right, right).values()) == 0
    # The gradient that is rounding alone may come out otherwise; the one that is not may not.
    assert gradient_errors(right, {"w": right["w"], "zero": -right["zero"]})["zero"] < 1e-5
    assert gradient_errors(right, {"w": 2 * right["w"], "zero": right["zero"]})["w"] == 1
    assert gradient_errors(right, {"w": right["w"]})["zero"] == float("inf")
    assert gradient_errors(right, right | {"w": torch.ones(2)})["w"] == float("inf")
    assert gradient_errors(right, right | {"w": torch.full((3,), float("nan"))})["w"] == float("inf")


def test_a_rehearsal_needs_something_to_compare():
    with pytest.raises(TpcompileError, match="no output of the model depends on a parameter"):
        backward({"tokens": torch.zeros(2, dtype=torch.long)})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (8192, "8.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5.0 TiB")]
)
def test_bytes_are_for_people(count: int, text: str):
    assert display.byte_text(count) == text


def test_inputs_are_all_by_position_or_all_by_name():
    class Model(torch.nn.Module):
        def forward(self, x, mask=None, *, scale=1.0): ...

    loaded = SimpleNamespace(model=Model(), args=(1, 2), kwargs={})
    assert example_inputs(loaded) == (1, 2)
    loaded = SimpleNamespace(model=Model(), args=(1,), kwargs={"scale": 2.0})
    assert example_inputs(loaded) == {"x": 1, "scale": 2.0}


def test_an_interrupt_is_not_a_failed_check():
    def interrupted() -> Answer:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as stopped:
        respond(interrupted, json=False, traceback=False)
    assert stopped.value.exit_code == 130


def test_help_does_not_wait_for_torch():
    check = "import sys, tpcompile.cli; sys.exit(sorted({'torch', 'transformers', 'sympy'} & set(sys.modules)) or 0)"
    root = Path(tpcompile.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
