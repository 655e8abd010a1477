"""The verb that loads a checkpoint on N local processes, or only says whether it can be."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tpcompile.cli.answers import Answer, respond
from tpcompile.cli.arguments import Degree, Json, SpecFile, Traceback, nearest
from tpcompile.display import Table, Verdict, byte_text
from tpcompile.errors import TpcompileError

if TYPE_CHECKING:
    import torch

    from tpcompile.loading import Watch


def load(
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
