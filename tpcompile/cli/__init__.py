"""The command ``tpcompile``: one verb for each question about a model, its spec and a degree.

A verb is a function whose parameters are its options. It computes an ``Answer`` and hands it to ``respond``, which
prints it and exits (``answers.py``). torch is imported by the verbs, not here: ``tpcompile --help`` answers at once.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from tpcompile.cli.answers import OK
from tpcompile.cli.checkpoints import load
from tpcompile.cli.inspecting import comm, diff, explain, show, verify
from tpcompile.cli.planning import memory, plan, scale
from tpcompile.cli.running import chat, generate, run

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

# In the order of ``tpcompile --help``.
for verb in (verify, show, diff, comm, memory, scale, explain, plan, run, generate, chat, load):
    app.command()(verb)


def main() -> None:
    """Run the command line and exit."""
    app()


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
