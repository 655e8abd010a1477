"""The verbs that look into a rewritten program: is it equal, what is in it, what did each pass do, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tpcompile.cli.answers import Answer, respond
from tpcompile.cli.arguments import (
    Again,
    Degree,
    Json,
    ModelText,
    SequenceParallel,
    SpecFile,
    Traceback,
    asked,
    example_inputs,
    load,
    nearest,
    rewritten,
)
from tpcompile.display import Block, Verdict, collectives_line, collectives_table, listing, stage_diff, time_text
from tpcompile.errors import SpecError, TpcompileError

if TYPE_CHECKING:
    from tpcompile.program import Line


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


def pairs(rows: list[tuple[str, str]]) -> list[str]:
    """Names and what they are, one pair a line, aligned."""
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


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
