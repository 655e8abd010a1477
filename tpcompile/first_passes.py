"""Passes that ask for no spec, degree or option: what they make of a captured model is made once."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import torch.fx

from tpcompile.capture import Captured
from tpcompile.passes.canonicalize import canonicalize
from tpcompile.passes.functionalize import functionalize
from tpcompile.passes.structure import structure
from tpcompile.program import Pass, Program, Structure

FIRST: tuple[Pass, ...] = (functionalize, canonicalize, structure)


@dataclass(frozen=True)
class Made:
    """What a pass left behind, and the seconds that it took."""

    step: str
    seconds: float
    graph_module: torch.fx.GraphModule
    structure: Structure | None


_made: weakref.WeakKeyDictionary[Captured, tuple[Made, ...]] = weakref.WeakKeyDictionary()


def first_passes(captured: Captured) -> tuple[Made, ...]:
    """What the passes of ``FIRST`` make, one after the other."""
    if captured not in _made:
        program, stages = Program(captured, captured.graph_module, 1), list[Made]()
        for step in FIRST:
            start = time.perf_counter()
            program = step(program)
            stages.append(Made(step.__name__, time.perf_counter() - start, program.graph_module, program.structure))
        _made[captured] = tuple(stages)
    return _made[captured]


__all__ = ["FIRST", "Made", "first_passes"]
