"""Run a test's function on real processes: ``run(function, ranks, *args)`` gives what each rank returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcompile.launch import launch


def run(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """``function(*args)`` on ``ranks`` gloo processes; raises the error of the first rank that failed."""
    return launch(function, ranks, args, timeout)
