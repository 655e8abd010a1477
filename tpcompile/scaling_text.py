"""What ``tpcompile scale`` shows of a scaling: a table, a document for programs, a picture."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import textwrap
from collections.abc import Mapping
from typing import Any

from tpcompile.display import Table, byte_text
from tpcompile.errors import TpcompileError
from tpcompile.scaling import Point, Scaling


def table(scaling: Scaling) -> Table:
    """A row for each degree; refused ones as remarks with the reason."""
    ways = ("forward", "backward") if scaling.training else ("forward",)
    head = (
        "ranks", "FLOPs", *(f"sent {way}" for way in ways), "collectives", "weights",
        *(("in all",) if scaling.training else ()), "computing", "collectives take", "step", "speedup", "efficiency",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for point in scaling.points:
        work = point.work
        if work is None:
            assert point.refused is not None
            rows.append((f"{point.degree:>5}  refused: {point.refused.what}",))
            continue
        rows.append(
            (
                str(point.degree),
                count_text(work.flops()),
                *(byte_text(work.sent(way)) for way in ways),
                str(work.messages()),
                byte_text(work.parameters),
                *((byte_text(work.memory),) if scaling.training else ()),
                seconds_text(point.computing),
                seconds_text(point.communicating),
                seconds_text(point.seconds),
                f"{scaling.speedup(point):.2f}",
                f"{scaling.efficiency(point):.0%}",
            )
        )
    return Table(head, tuple(rows), right=frozenset(range(len(head))))


def conclusion(scaling: Scaling) -> list[str]:
    """What the table comes to, in sentences."""
    fastest = scaling.fastest
    if fastest is None:
        return ["no degree is possible"]
    last = scaling.possible[-1].degree
    more = "the largest asked for" if fastest.degree == last else "more ranks do not help"
    rows = [f"fastest on {_ranks(fastest.degree)} ({more})"]
    if fastest is not scaling.possible[0]:
        rows[0] += f": {scaling.speedup(fastest):.2f} times {_base(scaling)}"
    half = max((p.degree for p in scaling.possible if scaling.efficiency(p) >= 0.5), default=None)
    rows += [f"at least half of every rank is of use up to {_ranks(half)}"] if half is not None else []
    fitting = next((p.degree for p in scaling.possible if scaling.fits(p)), None)
    memory = byte_text(int(scaling.on.device.memory))
    if fitting is None:
        rows.append(f"what a rank holds does not fit {memory} on any of these degrees")
    else:
        rows.append(f"what a rank holds fits {memory} from {_ranks(fitting)} on")
    return rows


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _base(scaling: Scaling) -> str:
    return f"as fast as on {_ranks(scaling.possible[0].degree)}"


def document(scaling: Scaling) -> Mapping[str, object]:
    """The scaling for programs; times in seconds, sizes in bytes, per rank and step."""
    return {
        "machine": dataclasses.asdict(scaling.on),
        "training": scaling.training,
        "inputs": {path: list(shape) for path, shape in scaling.shapes.items()},
        "fastest": scaling.fastest.degree if scaling.fastest is not None else None,
        "degrees": [_point(scaling, point) for point in scaling.points],
    }


def _point(scaling: Scaling, point: Point) -> Mapping[str, object]:
    work = point.work
    if work is None:
        assert point.refused is not None
        return {"degree": point.degree, "refused": point.refused.render()}
    ways = ("forward", "backward")
    return {
        "degree": point.degree,
        "flops": {way: work.flops(way) for way in ways},
        "sent": {way: work.sent(way) for way in ways},
        "collectives": {way: work.messages(way) for way in ways},
        "parameters": work.parameters,
        "gradients": work.gradients,
        "adamw": work.adamw,
        "activations": work.activations,
        "fits": scaling.fits(point),
        "computing": point.computing,
        "communicating": point.communicating,
        "seconds": point.seconds,
        "speedup": scaling.speedup(point),
        "efficiency": scaling.efficiency(point),
    }


def plot(scaling: Scaling, title: str, path: str | os.PathLike[str]) -> None:
    """Draw time per step and speedup over the number of ranks, to a ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        TpcompileError: matplotlib is not installed, no degree is possible, or the file cannot be written.
    """
    if os.path.splitext(path)[1] not in (".png", ".svg", ".pdf"):
        raise TpcompileError(f"cannot draw to `{path}`", help="name a .png, .svg or .pdf")
    points = scaling.possible
    if not points:
        raise TpcompileError("there is nothing to draw", why="every degree is refused")
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise TpcompileError(
            "matplotlib is not installed", why="it draws what --plot asks for", help='pip install "tpcompile[plot]"'
        ) from error
    figure = figures.Figure(figsize=(9, 4.5), layout="constrained")
    figure.suptitle("\n".join([*textwrap.wrap(title, 110, break_on_hyphens=False), scaling.on.about]), fontsize=9)
    steps, gains = figure.subplots(1, 2)
    names = [str(p.degree) for p in points]
    unit, scale = ("ms", 1e3) if max(p.seconds for p in points) < 1 else ("s", 1.0)
    computing = [p.computing * scale for p in points]
    steps.bar(names, computing, label="computing")
    steps.bar(names, [p.communicating * scale for p in points], bottom=computing, label="collectives")
    steps.set(xlabel="ranks", ylabel=f"{unit} per step")
    steps.legend()
    degrees = [p.degree for p in points]
    gains.plot(degrees, [n / degrees[0] for n in degrees], linestyle="--", label="every rank of full use")
    gains.plot(degrees, [scaling.speedup(p) for p in points], marker="o", label="estimated")
    gains.set(xlabel="ranks", ylabel=f"times {_base(scaling)}")
    gains.set_xscale("log", base=2)
    gains.set_yscale("log", base=2)
    gains.set_xticks(degrees, names)
    gains.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise TpcompileError(f"cannot write `{path}`", why=error.strerror) from error


def count_text(count: float) -> str:
    """A count for people, in powers of 1000: ``17.2 T``."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} E"


def seconds_text(seconds: float) -> str:
    """A time for people: ``3.2 ms``."""
    if seconds == 0 or math.isnan(seconds):
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


__all__ = ["conclusion", "count_text", "document", "plot", "seconds_text", "table"]
