"""What the verbs take: arguments and options, and what makes models, inputs and programs of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Unpack, cast

import typer

if TYPE_CHECKING:
    from tpcompile.models import Loaded
    from tpcompile.program import Asked, Program, Recompute

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


def nearest(word: str, known: list[str]) -> str:
    """The help line that names the nearest of the known words, or some of them if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"there are, for example: {', '.join(known[:4])}"
