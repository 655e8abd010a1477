"""The verbs that look ahead: what a step takes in memory and time on any machine, and a spec for any model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from tpcompile.cli.answers import Answer, refuse_to_replace, respond, save
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
from tpcompile.display import Table, byte_text, memory_table
from tpcompile.errors import TpcompileError

if TYPE_CHECKING:
    from tpcompile.activations import RankMemory
    from tpcompile.models import Loaded
    from tpcompile.program import Asked


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
