"""What a verb answers: the same facts as a JSON document and as blocks for people, or what went wrong.

``respond`` prints an answer and exits, ``save`` writes a part of one to the file that was asked for. Exit codes: 0 ok,
1 the check failed, 2 the input is wrong, 70 a defect of tpcompile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json as json_module
import math
import os
import sys
import traceback as traceback_module
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import typer
from rich.console import Console

from tpcompile.display import Block, write, write_error
from tpcompile.errors import TpcompileError

REPLACE = "pass --force to replace it, or name another file"
OK, FAILED, USAGE, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130


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
