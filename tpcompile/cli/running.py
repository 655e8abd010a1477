"""The verbs that run a model on N local processes: to compare it with one device, or to have it answer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from tpcompile.cli.answers import Answer, respond
from tpcompile.cli.arguments import (
    Again,
    Degree,
    Json,
    ModelText,
    NewTokens,
    Seed,
    SequenceParallel,
    SpecFile,
    Temperature,
    Traceback,
    asked,
)
from tpcompile.display import Table, Verdict

if TYPE_CHECKING:
    from tpcompile.answering import Ranks


def run(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    sequence_parallel: SequenceParallel = False,
    recompute: Again = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Run on N local processes and compare.

    Forward and backward, over gloo on CPUs and NCCL on GPUs, against the same model on one device.
    """

    def work() -> Answer:
        from tpcompile.launch import launch
        from tpcompile.rehearsal import rehearse

        results = launch(rehearse, tp, (model, spec, asked(sequence_parallel, recompute)))
        worst = max(results, key=lambda result: result.excess)
        ok = worst.excess <= 1
        document = {"ok": ok, "model": model, "degree": tp, "ranks": [dataclasses.asdict(result) for result in results]}
        rows = tuple(
            (
                str(rank),
                result.device,
                f"{result.output_error:.1e}",
                f"{result.gradient_error:.1e}",
                result.worst_parameter,
                f"{result.seconds:.2f} s",
            )
            for rank, result in enumerate(results)
        )
        said = "equal" if ok else "NOT equal"
        verdict = Verdict(ok, f"{said}: {model} on {tp} processes and on one device (allowed: {worst.allowed:.1e})")
        head = ("rank", "device", "outputs", "gradients", "worst parameter", "forward and backward")
        return Answer(document, (verdict, Table(head, rows)), ok)

    respond(work, json, traceback)


def generate(
    model: ModelText,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the model is to continue.")],
    spec: SpecFile = None,
    tp: Degree = 2,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Continue a text on N local processes, token by token."""
    out = sys.stdout

    def work() -> Answer:
        from tpcompile.answering import Settings, answering

        settings = Settings(max_new_tokens, temperature, seed)
        with answering(model, spec, tp) as ranks:
            seconds = ready(ranks, tp)
            text = spoken(ranks.ask(prompt, settings), None if json else out)
        document = {"ok": True, "model": model, "degree": tp, "prompt": prompt, "text": text, "load_seconds": seconds}
        return Answer(document, ())

    respond(work, json, traceback)


def chat(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    traceback: Traceback = False,
) -> None:
    """Talk to a model on N local processes.

    One line is one message; /new starts over, the end of the input (Ctrl-D) ends it.
    """
    out = sys.stdout

    def work() -> Answer:
        from tpcompile.answering import Message, Settings, answering

        settings = Settings(max_new_tokens, temperature, seed)
        said: list[Message] = []
        with answering(model, spec, tp) as ranks:
            ready(ranks, tp)
            while (line := next_line("> ")) is not None:
                if line == "/new":
                    said = []
                elif line:
                    said.append({"role": "user", "content": line})
                    said.append({"role": "assistant", "content": spoken(ranks.ask(said, settings), out)})
        return Answer({"ok": True}, ())

    respond(work, False, traceback)


def ready(ranks: Ranks, degree: int) -> float:
    """Wait for the ranks, telling a terminal meanwhile; the seconds that it took."""
    with Console(stderr=True).status(f"loading and compiling on {degree} ranks ..."):
        return ranks.ready()


def spoken(pieces: Iterable[str], out: TextIO | None) -> str:
    """The whole answer, printed as it comes."""
    said: list[str] = []
    for piece in pieces:
        said.append(piece)
        if out is not None:
            out.write(piece)
            out.flush()
    if out is not None:
        out.write("\n")
        out.flush()
    return "".join(said)


def next_line(prompt: str) -> str | None:
    """The next line that is typed, or piped in; None at the end."""
    if sys.stdin.isatty():
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None
