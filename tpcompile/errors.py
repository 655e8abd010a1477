"""The one family of exceptions a user of tpcompile meets, and what their texts are made with.

Every error says what is wrong, where (``file:line:col``, or module and source line), why, and what to type
instead. ``ValueError`` and ``AssertionError`` raised inside tpcompile mean a defect of tpcompile, never of its input.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Generator, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """A place: in a file the user wrote, or in the model (module path and the model's own source line)."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    width: int = 1
    text: str | None = None  # the source line itself
    module: str | None = None  # dotted path in the model
    op: str | None = None  # e.g. "aten.softmax.int"

    def render(self) -> str:
        """``file:line:col`` with the line and carets below it, or ``module (op) at file:line``."""
        rows: list[str] = []
        if self.module is not None or self.op is not None:
            head = f"in {self.module or 'the model'}"
            rows.append(head + (f", at {self.op}" if self.op else ""))
        if self.file is not None:
            spot = self.file + (f":{self.line}" if self.line is not None else "")
            spot += f":{self.column}" if self.column is not None else ""
            rows.append(f"--> {spot}")
        if self.text is not None:
            number = str(self.line) if self.line is not None else ""
            rows.append(f"{number:>5} | {self.text}")
            if self.column is not None:
                rows.append(f"{'':>5} | " + " " * (self.column - 1) + "^" * max(1, self.width))
        return "\n".join("  " + row for row in rows)


class TpcompileError(Exception):
    """Base of all errors for users. ``what`` is the headline; ``where``, ``why`` and ``help`` may be None."""

    def __init__(self, what: str, *, where: Where | None = None, why: str | None = None, help: str | None = None):
        self.what = what
        self.where = where
        self.why = why
        self.help = help
        super().__init__(self.render())

    def render(self) -> str:
        """The whole message: what, where, why, and what to do."""
        rows = [self.what]
        if self.where is not None and (place := self.where.render()):
            rows.append(place)
        if self.why:
            rows.append(f"  why:  {self.why}")
        if self.help:
            rows.append(f"  help: {self.help}")
        return "\n".join(rows)


class SpecError(TpcompileError):
    """A ``.tpspec`` text that does not parse, or does not fit the model it is applied to."""


class CaptureError(TpcompileError):
    """The model could not be turned into one graph, or was called outside what was captured."""


class ShardingError(TpcompileError):
    """The requested cut is impossible: an axis meets an op that needs it whole, or a size does not allow the degree."""


class RuntimeMismatchError(TpcompileError):
    """Ranks that should run the same program do not: different models, specs, inputs or seeds."""


@contextlib.contextmanager
def reported(what: str) -> Generator[None]:
    """Whatever a library raises, as one TpcompileError that says ``what``, and why in the library's words."""
    try:
        yield
    except TpcompileError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise TpcompileError(what, why=f"{type(error).__name__}: {said[:300]}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The question for the up to three known words nearest to ``word``; None if none is near."""
    close = difflib.get_close_matches(word, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else None
