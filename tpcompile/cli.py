"""The command ``tpcompile``: one verb for each question about a model, its spec and a degree.

A verb computes an ``Answer`` (the same facts as a JSON document and as blocks for people); ``respond`` prints one of
the two and turns what went wrong into an exit code. Exit codes: 0 ok, 1 the check failed, 2 the input is wrong,
70 a defect of tpcompile. torch is imported by the verbs, not here: ``tpcompile --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib.metadata
import inspect
import json as json_module
import math
import os
import sys
import traceback as traceback_module
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO, Unpack, cast

import typer
from rich.console import Console

from tpcompile.display import (
    Block,
    Table,
    Verdict,
    byte_text,
    collectives_line,
    collectives_table,
    listing,
    memory_table,
    stage_diff,
    time_text,
    write,
    write_error,
)
from tpcompile.errors import SpecError, TpcompileError

if TYPE_CHECKING:
    import torch

    from tpcompile.activations import RankMemory
    from tpcompile.answering import Ranks
    from tpcompile.loading import Watch
    from tpcompile.models import Loaded
    from tpcompile.program import Asked, Line, Program, Recompute

REPLACE = "pass --force to replace it, or name another file"
OK, FAILED, USAGE, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130

ModelText = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="hf:TYPE, hf:DIRECTORY, hf:CONFIG.json, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION; a function returns a "
        "module, or (module, example inputs).",
        show_default=False,
    ),
]
SpecFile = Annotated[
    str | None,
    typer.Option(
        "--spec",
        metavar="FILE",
        help="The .tpspec to use; by default the shipped one for the model's class, or a plan.",
    ),
]
Degree = Annotated[int, typer.Option("--tp", metavar="N", min=1, help="The number of ranks.")]
Again = Annotated[
    str | None,
    typer.Option(
        "--recompute",
        metavar="WHAT",
        help="Run again in backward instead of keeping: `attention` (scores to the product with v) or `layers`.",
    ),
]
SequenceParallel = Annotated[
    bool,
    typer.Option("--sequence-parallel", help="Spread norms, dropout and residuals over the ranks, by positions."),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="The longest answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: the likeliest tokens; above: drawn, more freely.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the tokens that are drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an internal error.")]

app = typer.Typer(
    name="tpcompile",
    help="Cut a PyTorch model across ranks, and prove that nothing else about it has changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Its panels are drawn with box characters; those are for people only.
    rich_markup_mode="rich" if sys.stdout.isatty() and sys.stderr.isatty() else None,
)


def main() -> None:
    """Run the command line and exit."""
    app()


@dataclass(frozen=True)
class Answer:
    """What a verb found: ``document`` for programs, ``blocks`` for people; ``ok`` is False if a check failed."""

    document: Mapping[str, object]
    blocks: tuple[Block, ...]
    ok: bool = True


def respond(work: Callable[[], Answer], json: bool, traceback: bool) -> None:
    """Do the work, print its answer or what went wrong, and exit.

    Standard output carries the answer alone: what the model or a library prints meanwhile goes to standard error.

    Raises:
        typer.Exit: with the exit code, always.
    """
    stderr = Console(stderr=True, highlight=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = work()
        with written():
            if json:
                print_json(answer.document)
            else:
                write(Console(highlight=False), answer.blocks)
            sys.stdout.flush()
        code = OK if answer.ok else FAILED
    except TpcompileError as error:
        if json:
            with contextlib.suppress(OSError):
                print_json(error_document(error))
        write_error(stderr, error)
        if traceback and (notes := getattr(error, "__notes__", [])):  # a rank of `run` tells its own traceback there
            write(stderr, notes)
        code = USAGE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # the reader of a pipe has left: typer ends quietly
        if json:
            print_json({"ok": False, "error": {"kind": "internal", "what": f"{type(error).__name__}: {error}"}})
        write_error(stderr, internal_error(error, traceback))
        code = DEFECT
    raise typer.Exit(code)


@contextlib.contextmanager
def written() -> Generator[None]:
    """Standard output that cannot be written (a full disk) is an error for users; a pipe's reader may leave."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise TpcompileError("cannot write the answer to standard output", why=error.strerror) from error


def print_json(document: Mapping[str, object]) -> None:
    """Print one JSON document to standard output; JSON has no infinity and no NaN, they become strings."""
    sys.stdout.write(json_module.dumps(finite(document), indent=2, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """``value`` with every number that JSON does not have as its name: ``"inf"``, ``"nan"``."""
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {key: finite(item) for key, item in cast("Mapping[str, object]", value).items()}
        case list() | tuple():
            return [finite(item) for item in cast("Sequence[object]", value)]
        case _:
            return value


def error_document(error: TpcompileError) -> Mapping[str, object]:
    """An error for users as a JSON document."""
    where = dataclasses.asdict(error.where) if error.where is not None else None
    parts = {"what": error.what, "where": where, "why": error.why, "help": error.help}
    return {"ok": False, "error": {"kind": type(error).__name__, **parts}}


def internal_error(error: Exception, traceback: bool) -> TpcompileError:
    """A defect of tpcompile, in the words of an error for users."""
    trace = "".join(traceback_module.format_exception(error)).rstrip() if traceback else None
    what = f"internal error: {type(error).__name__}: {error}".splitlines()[0]
    ask = "please report it, with the command and its output under --traceback"
    return TpcompileError(what, why=trace or "this is a defect of tpcompile, not of its input", help=ask)


def load(model: str, weights: bool) -> Loaded:
    """The model that MODEL names, with example inputs; on the meta device unless ``weights``."""
    from tpcompile import models

    return models.load(model, weights=weights)


def example_inputs(loaded: Loaded) -> Mapping[str, object] | tuple[object, ...]:
    """The example inputs in the form that the Python API takes: all by position, or all by name."""
    if not loaded.kwargs:
        return tuple(loaded.args)
    bound = inspect.signature(loaded.model.forward).bind_partial(*loaded.args)
    return {**bound.arguments, **loaded.kwargs}


def asked(sequence_parallel: bool, recompute: str | None) -> Asked:
    """The options of a compile; what ``recompute`` may be is checked there."""
    return {"sequence_parallel": sequence_parallel, "recompute": cast("Recompute", recompute)}


def rewritten(
    model: str, spec: str | None, degree: int, training: bool = False, **options: Unpack[Asked]
) -> tuple[Loaded, Program]:
    """The model that MODEL names, and its program for ``degree`` ranks; in train mode if ``training``."""
    import tpcompile

    loaded = load(model, weights=False)
    if training:
        loaded.model.train()
    inputs = example_inputs(loaded)
    return loaded, tpcompile.rewrite(loaded.model, spec, degree=degree, example_inputs=inputs, **options)


@app.command()
def verify(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    sequence_parallel: SequenceParallel = False,
    recompute: Again = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Prove that N ranks equal one device.

    Outputs and every gradient are compared, in one process; on failure the first node that differs is named.
    """

    def work() -> Answer:
        import tpcompile
        from tpcompile.report import held_text

        loaded = load(model, weights=True)
        inputs = example_inputs(loaded)
        options = asked(sequence_parallel, recompute)
        report = tpcompile.verify(loaded.model, spec, degree=tp, example_inputs=inputs, **options)
        document = {
            "ok": report.ok,
            "model": loaded.label,
            "degree": tp,
            "output_error": report.output_error,
            "gradient_error": report.gradient_error,
            "mismatch": report.mismatch,
            "collectives": [dataclasses.asdict(collective) for collective in report.collectives],
            "held": list(report.held),
            "seconds": dict(report.timings),
        }
        whole = tp > 1 and min(report.held) == 1
        nothing_is_cut = ": nothing is cut, and `tpcompile plan` says why" if whole else ""
        rows = [
            ("outputs", f"{report.output_error:.1e} worst relative error in float64"),
            ("gradients", f"{report.gradient_error:.1e} worst relative error in float64"),
            ("parameters", held_text(report.held) + nothing_is_cut),
            ("collectives", collectives_line(report.collectives)),
            ("time", time_text(report.timings)),
        ]
        if report.mismatch is not None:
            rows.insert(0, ("first difference", str(report.mismatch)))
        said = "equal" if report.ok else "NOT equal"
        verdict = Verdict(report.ok, f"{said}: {loaded.label} on {tp} ranks and on one device")
        return Answer(document, (verdict, *pairs(rows)), report.ok)

    respond(work, json, traceback)


@app.command()
def show(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    sequence_parallel: SequenceParallel = False,
    module: Annotated[
        str | None, typer.Option("--module", metavar="GLOB", help="Only values of these modules and of what they hold.")
    ] = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Print the rewritten graph, one value a line.

    With shape, dtype, placement, module and source line; alike layers are folded.
    """

    def work() -> Answer:
        loaded, program = rewritten(model, spec, tp, sequence_parallel=sequence_parallel)
        lines = program.lines() if module is None else lines_in(program.lines(), module)
        document = {
            "ok": True,
            "model": loaded.label,
            "degree": tp,
            "lines": [dataclasses.asdict(line) for line in lines],
            "seconds": dict(program.timings),
        }
        legend = (
            "placement: R whole on every rank, H whole and its gradient a partial sum, "
            "S(dim:how) cut along dim, P a partial sum"
        )
        return Answer(document, (listing(lines), "", legend, time_text(program.timings)))

    respond(work, json, traceback)


@app.command()
def diff(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    sequence_parallel: SequenceParallel = False,
    only: Annotated[str | None, typer.Option("--pass", metavar="NAME", help="Only what this pass changed.")] = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Print what each pass changed, as a text diff."""

    def work() -> Answer:
        loaded, program = rewritten(model, spec, tp, sequence_parallel=sequence_parallel)
        names = [name for name, _, _ in program.stages]
        if only is not None and only not in names:
            why = f"the passes are: {', '.join(names)}"
            raise TpcompileError(f"no pass is named `{only}`", why=why, help=nearest(only, names))
        blocks: list[Block] = []
        passes: list[Mapping[str, object]] = []
        for name, before, after in program.stages:
            if only not in (None, name):
                continue
            changed = stage_diff(name, before, after)
            blocks.append(changed or f"{name}: nothing changed")
            passes.append({"name": name, "diff": list(changed.lines) if changed else []})
        return Answer({"ok": True, "model": loaded.label, "degree": tp, "passes": passes}, tuple(blocks))

    respond(work, json, traceback)


@app.command()
def comm(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    sequence_parallel: SequenceParallel = False,
    recompute: Again = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """List every collective and its bytes.

    Where, kind, direction, shape, bytes sent per rank and how many times; and the totals.
    """

    def work() -> Answer:
        loaded, program = rewritten(model, spec, tp, **asked(sequence_parallel, recompute))
        collectives = program.collectives
        document = {
            "ok": True,
            "model": loaded.label,
            "degree": tp,
            "collectives": [dataclasses.asdict(collective) for collective in collectives],
            "count": sum(collective.count for collective in collectives),
            "bytes": sum(collective.bytes * collective.count for collective in collectives),
        }
        return Answer(document, (collectives_table(collectives), "", "bytes: sent per rank"))

    respond(work, json, traceback)


@app.command()
def memory(
    model: ModelText,
    spec: SpecFile = None,
    tp: Degree = 2,
    batch: Annotated[int | None, typer.Option("--batch", metavar="B", min=1, help="Batch size.")] = None,
    length: Annotated[int | None, typer.Option("--length", metavar="S", min=1, help="Sequence length.")] = None,
    sequence_parallel: SequenceParallel = False,
    recompute: Again = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """List what every rank holds in a training step.

    Parameters, gradients, AdamW states, and each value that autograd keeps for backward: of which op, shape and bytes.
    """

    def work() -> Answer:
        from tpcompile.activations import memory as memory_of
        from tpcompile.activations import resized

        loaded, program = rewritten(model, spec, tp, training=True, **asked(sequence_parallel, recompute))
        inputs = resized(program, batch, length)
        ranks = memory_of(program, inputs)
        given = {x.path: list(made.shape) for x, made in zip(program.captured.inputs, inputs, strict=True)}
        document = {
            "ok": True,
            "model": loaded.label,
            "degree": tp,
            "recompute": recompute,
            "inputs": given,
            "ranks": [memory_document(rank) for rank in ranks],
        }
        shapes = ", ".join(f"{path} {shape}" for path, shape in given.items())
        head = ("rank", "parameters", "gradients", "AdamW", "activations", "in all")
        states = [(rank.parameters, rank.gradients, rank.adamw, rank.activations) for rank in ranks]
        rows = tuple((str(n), *map(byte_text, (*each, sum(each)))) for n, each in enumerate(states))
        fullest = max(range(tp), key=lambda rank: ranks[rank].activations)
        return Answer(
            document,
            (
                f"one training step of {loaded.label} with {shapes}",
                "",
                Table(head, rows, right=frozenset(range(1, 6))),
                "",
                f"kept for backward on rank {fullest}:",
                memory_table(ranks[fullest].kept),
            ),
        )

    respond(work, json, traceback)


def memory_document(rank: RankMemory) -> Mapping[str, object]:
    """One rank's memory for programs."""
    return {
        "parameters": rank.parameters,
        "gradients": rank.gradients,
        "adamw": rank.adamw,
        "activations": rank.activations,
        "layers": dict(rank.layers),
        "kept": [{**dataclasses.asdict(line), "dtype": str(line.dtype)} for line in rank.kept],
    }


@app.command()
def scale(
    model: ModelText,
    spec: SpecFile = None,
    tp: Annotated[str, typer.Option("--tp", metavar="N,N,...", help="The numbers of ranks.")] = "1,2,4,8",
    link: Annotated[
        str, typer.Option("--link", metavar="MACHINE", help="nvlink, pcie, ethernet or a TOML file.")
    ] = "nvlink",
    train: Annotated[bool, typer.Option("--train", help="Backward too, and the memory of a training step.")] = False,
    batch: Annotated[int | None, typer.Option("--batch", metavar="B", min=1, help="Batch size.")] = None,
    length: Annotated[int | None, typer.Option("--length", "--seq", metavar="S", min=1, help="Positions.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="Convert to bfloat16, ...")] = None,
    sequence_parallel: SequenceParallel = False,
    recompute: Again = None,
    cut_logits: Annotated[
        bool, typer.Option("--cut-logits", help="Leave cut outputs as parts (gather_logits).")
    ] = False,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Draw to a .png, .svg or .pdf.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option("--calibrate", metavar="FILE", help="Measure two local processes first, and write their machine."),
    ] = None,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Estimate a step on more and more ranks of a machine.

    FLOPs, bytes, memory and time per rank, from the rewritten program of each degree; no such machine is needed.
    """

    def work() -> Answer:
        from tpcompile import links, scaling_text
        from tpcompile.scaling import scale as scaling_of

        if calibrate is not None:
            from tpcompile.calibration import calibrate as measured

            refuse_to_replace(calibrate, help=f"use what it measured with --link {calibrate}, or name another file")
            save(calibrate, measured().toml(), force=False)
        on = links.machine(calibrate or link)
        loaded = load(model, weights=False)
        inputs = converted(loaded, dtype, train)
        options: Asked = {**asked(sequence_parallel, recompute), "gather_logits": not cut_logits}
        found = scaling_of(
            loaded.model, spec, degrees=degrees(tp), on=on, example_inputs=inputs, batch=batch, length=length, **options
        )
        shapes = ", ".join(f"{path} {list(shape)}" for path, shape in found.shapes.items())
        step = "training step (forward and backward)" if train else "forward pass"
        said = [f"one {step} of {loaded.label} with {shapes}", f"per rank, on {on.name}: {on.about}", ""]
        if plot is not None:
            scaling_text.plot(found, loaded.label, plot)
        document = {"ok": True, "model": loaded.label, **scaling_text.document(found)}
        return Answer(document, (*said, scaling_text.table(found), "", *scaling_text.conclusion(found)))

    respond(work, json, traceback)


def degrees(text: str) -> list[int]:
    """The numbers in ``1,2,4``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise TpcompileError(f"--tp {text} is no list of numbers of ranks", help="write --tp 1,2,4,8")
    return [int(word) for word in words]


def converted(loaded: Loaded, dtype: str | None, train: bool) -> Mapping[str, object] | tuple[object, ...]:
    """Example inputs of the model, which is put into train or eval mode, and into ``dtype`` if one is named.

    To train, a model that takes ``labels`` beside ``input_ids`` is given them: its loss is what backward starts from.
    """
    import torch

    loaded.model.train(train)
    inputs = example_inputs(loaded)
    if dtype is not None:
        known = {
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float32": torch.float32,
            "float64": torch.float64,
        }
        if dtype not in known:
            raise TpcompileError(f"--dtype {dtype} is no floating point type", help=nearest(dtype, list(known)))
        wanted = known[dtype]
        loaded.model.to(wanted)

        def convert(x: object) -> object:
            return x.to(wanted) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        inputs = (
            {k: convert(x) for k, x in inputs.items()} if isinstance(inputs, Mapping) else tuple(map(convert, inputs))
        )
    takes = inspect.signature(loaded.model.forward).parameters
    if train and isinstance(inputs, Mapping) and "labels" in takes and "input_ids" in inputs and "labels" not in inputs:
        inputs = {**inputs, "labels": inputs["input_ids"]}
    return inputs


@app.command()
def explain(
    model: ModelText,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A parameter or a module, as the model names it: h.0.attn.c_attn",
            show_default=False,
        ),
    ],
    spec: SpecFile = None,
    tp: Degree = 2,
    sequence_parallel: SequenceParallel = False,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Say why a parameter is cut as it is.

    Or why it cannot be: the path of ops that ties it to a line of the spec.
    """

    def work() -> Answer:
        loaded, program = rewritten(model, spec, tp, sequence_parallel=sequence_parallel)
        text = program.explain(name)
        return Answer({"ok": True, "model": loaded.label, "degree": tp, "name": name, "text": text}, (text,))

    respond(work, json, traceback)


@app.command()
def plan(
    model: ModelText,
    tp: Degree = 2,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the .tpspec there instead of printing it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write a .tpspec for any model.

    What is cut is found in the graph alone; what stays whole is listed in comments, with the reason.
    """

    def work() -> Answer:
        import tpcompile

        if output is not None:
            refuse_to_replace(output, force)
        loaded = load(model, weights=False)
        spec = tpcompile.plan(loaded.model, tp, example_inputs(loaded))
        text = spec.text()
        document = {
            "ok": True,
            "model": loaded.label,
            "degree": tp,
            "lines": [{"patterns": list(map(str, line.patterns)), "word": line.word} for line in spec.lines],
            "spec": text,
            "output": output,
        }
        if output is None:
            return Answer(document, (text.rstrip("\n"),))
        save(output, text, force)
        return Answer(document, (f"wrote {output}: {len(spec.lines)} lines for {loaded.label} on {tp} ranks",))

    respond(work, json, traceback)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command("load")
def load_checkpoint(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A directory that save_pretrained has written, or a GGUF file.", show_default=False
        ),
    ],
    spec: SpecFile = None,
    tp: Degree = 2,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="Of the parameters: bfloat16, float16, float32, ...")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only whether it can be loaded; no weight is read.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", min=1, help="Give up after S seconds.")] = 3600,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Load a checkpoint on N local processes.

    First whether names, shapes and the cut fit, from headers alone; then bytes read, memory and seconds of each rank.
    """

    def work() -> Answer:
        from tpcompile import loading

        wanted, place = float_dtype(dtype), directory.removeprefix("hf:")
        fit = loading.fits(place, spec, tp, wanted)
        document: dict[str, object] = {"ok": True, "directory": place, "degree": tp, **dataclasses.asdict(fit)}
        shares = [f"{share:.0%}" for share in fit.shares]
        said = f"{place}: {fit.model}, {fit.tensors} tensors that fit"
        if check:
            rows = tuple(
                (str(n), byte_text(held), share) for n, (held, share) in enumerate(zip(fit.held, shares, strict=True))
            )
            verdict = Verdict(True, f"can be loaded on {tp} ranks: {said}; nothing was read but headers")
            return Answer(document, (verdict, Table(("rank", "parameters", "of the whole"), rows, frozenset({1, 2}))))
        with loading_bars(tp) as watch:
            ranks = loading.load(place, spec, tp, wanted, watch, timeout)
        document["ranks"] = [dataclasses.asdict(took) for took in ranks]
        rows = tuple(
            (
                str(n),
                byte_text(took.held),
                share,
                byte_text(took.read),
                "unknown" if took.peak is None else byte_text(took.peak),
                f"{took.seconds:.1f} s",
            )
            for n, (took, share) in enumerate(zip(ranks, shares, strict=True))
        )
        head = ("rank", "parameters", "of the whole", "read", "peak over the imports", "in all")
        verdict = Verdict(True, f"loaded on {tp} processes: {said}")
        return Answer(document, (verdict, Table(head, rows, frozenset(range(1, 6)))))

    respond(work, json, traceback)


def float_dtype(name: str | None) -> torch.dtype | None:
    """The floating-point dtype of that name; None for None.

    Raises:
        TpcompileError: there is none.
    """
    import torch

    known = {str(x).removeprefix("torch."): x for x in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
    if name is not None and name not in known:
        raise TpcompileError(f"--dtype {name} is no dtype of parameters", help=nearest(name, list(known)))
    return None if name is None else known[name]


@contextlib.contextmanager
def loading_bars(ranks: int) -> Generator[Watch | None]:
    """A progress bar for every rank, on a terminal; the function to tell how far they are."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bars:
        tasks = [bars.add_task(f"rank {rank}", total=None) for rank in range(ranks)]

        def watch(found: Sequence[tuple[int, int]]) -> None:
            for task, (done, total) in zip(tasks, found, strict=True):
                bars.update(task, completed=done, total=total or None)

        yield watch


def show_version(asked: bool) -> None:
    """Print the version and exit, if asked to."""
    if not asked:
        return
    try:
        version = importlib.metadata.version("tpcompile")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    sys.stdout.write(f"tpcompile {version}\n")
    raise typer.Exit(OK)


@app.callback()
def command(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before the verb; ``version`` is answered by its callback."""


def pairs(rows: list[tuple[str, str]]) -> list[str]:
    """Names and what they are, one pair a line, aligned."""
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def nearest(word: str, known: list[str]) -> str:
    """The help line that names the nearest of the known words, or some of them if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"there are, for example: {', '.join(known[:4])}"


def refuse_to_replace(path: str, force: bool = False, help: str = REPLACE) -> None:
    """Raise TpcompileError if no file can be at ``path``, or one that must not be lost is."""
    if os.path.isdir(path):
        raise TpcompileError(f"`{path}` is a directory", help=f"name a file in it: {os.path.join(path, 'my.tpspec')}")
    if not os.path.isdir(parent := os.path.dirname(path) or "."):
        raise TpcompileError(f"cannot write `{path}`", why=f"there is no directory `{parent}`")
    if os.path.lexists(path) and not force:
        raise TpcompileError(f"`{path}` exists", help=help)


def save(path: str, text: str, force: bool) -> None:
    """Write a file under a temporary name beside it, then give it its name: it is whole, or it is not there."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        refuse_to_replace(path, force)
        os.replace(temporary, path)
    except OSError as error:
        raise TpcompileError(f"cannot write `{path}`", why=error.strerror) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def lines_in(lines: Sequence[Line], glob: str) -> Sequence[Line]:
    """The lines of modules that fit the glob, and of modules below those.

    Raises:
        SpecError: the glob does not parse, or no line fits.
    """
    from tpcompile.spec import Spec

    pattern = Spec.parse(f"{glob} replicate", "--module").lines[0].patterns[0]

    def fits(module: str) -> bool:
        parts = module.split(".")
        return any(pattern.matches(".".join(parts[:end])) for end in range(1, len(parts) + 1))

    found = [line for line in lines if fits(line.module)]
    if not found:
        modules = sorted({line.module for line in lines if line.module})
        raise SpecError(f"--module {glob} fits no module with a value in the graph", help=nearest(glob, modules))
    return found
