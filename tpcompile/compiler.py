"""From a model and a spec to a rewritten program: capture, then the pipeline of passes."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import nn

from tpcompile.caches import Cut, cut_of
from tpcompile.capture import Captured
from tpcompile.compile_cache import cached_capture
from tpcompile.errors import CaptureError, ShardingError, SpecError
from tpcompile.example_inputs import default_inputs
from tpcompile.first_passes import FIRST, first_passes
from tpcompile.passes import PIPELINE
from tpcompile.program import DEFAULT, Asked, Options, Pass, Program, Stage
from tpcompile.report import sizes_at
from tpcompile.spec import Spec, find_shipped, resolve, shipped

SpecLike = Spec | str | os.PathLike[str] | None
Inputs = Mapping[str, Any] | Sequence[Any] | None


def rewrite(
    model: nn.Module,
    spec: SpecLike = None,
    *,
    degree: int,
    example_inputs: Inputs = None,
    pipeline: Sequence[Pass] = PIPELINE,
    **options: Unpack[Asked],
) -> Program:
    """The program that each of ``degree`` ranks runs in place of ``model``; no process group, no GPU.

    Args:
        model: any module, unmodified; it may live on the meta device.
        spec: a path to a ``.tpspec``, a :class:`Spec`, or None for the shipped spec of the model's class, or else the
            plan that :func:`tpcompile.plan` makes.
        degree: number of ranks.
        example_inputs: keyword arguments as a dict, or positional ones as a tuple; transformers models have
            defaults.
        options: see :class:`tpcompile.program.Options`.

    Raises:
        SpecError: the spec does not parse, or does not fit the model.
        CaptureError: the model cannot be captured as one graph.
        ShardingError: the spec asks for a cut that the graph or the degree does not allow.
    """
    check_degree(degree)
    asked = Options.of(options)
    args, kwargs = call_arguments(model, example_inputs)
    chosen = choose_spec(model, spec)
    start = time.perf_counter()
    with warnings.catch_warnings():
        if asked.recompute is not None:  # asked for here instead
            warnings.filterwarnings("ignore", ".*gradient checkpointing is not part of the captured graph")
        captured = cached_capture(model, args, kwargs)
    seconds = time.perf_counter() - start
    return rewrite_captured(captured, chosen, model, degree, (args, kwargs), pipeline, seconds, asked)


def rewrite_captured(
    captured: Captured,
    spec: Spec | None,
    model: nn.Module,
    degree: int,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    pipeline: Sequence[Pass] = PIPELINE,
    seconds: float = 0.0,
    options: Options = DEFAULT,
) -> Program:
    """The pipeline on a model that is captured already (which took ``seconds``); planned if there is no spec."""
    if spec is None:
        from tpcompile.planner import plan_captured

        spec = plan_captured(captured, degree, inputs)
    claims = resolve(
        spec, captured.module_classes, list(captured.parameters), captured.aliases, getattr(model, "config", None)
    )
    program = Program(captured, captured.graph_module, degree, spec=spec, claims=claims, options=options)
    flat = captured.flatten(*inputs)
    program = program.with_(
        sizes=sizes_at(program, flat), held=held_parts(captured, flat), resident=captured.cache_outputs()
    )
    history = [Stage("capture", seconds, program)]
    shared = first_passes(captured) if tuple(pipeline[: len(FIRST)]) == FIRST else ()
    for made in shared:
        program = program.with_(graph_module=made.graph_module, structure=made.structure)
        history.append(Stage(made.step, made.seconds, program))
    for step in pipeline[len(shared) :]:
        start = time.perf_counter()
        program = step(program)
        history.append(Stage(step.__name__, time.perf_counter() - start, program))
    return program.with_(history=tuple(history))


def held_parts(captured: Captured, tensors: Sequence[torch.Tensor]) -> dict[str, Cut]:
    """The inputs, by placeholder, of which a rank holds a part: tensors of caches that an earlier call left."""
    return {x.name: cut for x, tensor in zip(captured.inputs, tensors, strict=True) if (cut := cut_of(tensor))}


def choose_spec(model: nn.Module, spec: SpecLike) -> Spec | None:
    """The spec itself, the one in a file, or the shipped one for the model's class; None if it must be planned."""
    if isinstance(spec, Spec):
        return spec
    if spec is None:
        inner: Any = model
        while type(inner).__module__.split(".")[0] == "peft" and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        names = [c.__name__ for c in type(inner).__mro__]
        return find_shipped(names) if shipped().keys() & set(names) else None
    if isinstance(spec, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        return Spec.load(spec)
    raise SpecError(  # pyright: ignore[reportUnreachable]
        f"a spec is a path, a tpcompile.Spec or None, not {type(spec).__name__}",
        help="for a text, use tpcompile.Spec.parse(text)",
    )


def call_arguments(model: nn.Module, example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of the example call."""
    if example_inputs is None:
        return default_inputs(model)
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = ((example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)), {}
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__} does not take these example inputs",
            why=str(error),
            help=f"its forward takes {', '.join(map(str, signature.parameters.values())) or 'none'}",
        ) from error
    return args, kwargs


def check_degree(degree: Any) -> None:
    """Refuse what is no number of ranks."""
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
        raise ShardingError(
            f"the degree must be a whole number of at least 1, not {degree!r}",
            why="it is the number of ranks that a model is cut over",
            help="pass degree=2, or --tp 2",
        )
