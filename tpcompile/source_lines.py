"""The model's own lines: where a traced op was written, where a trace is now, and where an error came through."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import linecache
import os
import re
import site
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TracerBase

from tpcompile.errors import Where

TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_MODULES = os.path.join(TORCH, "nn", "modules", "")
_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_ENTRY = (_OWN + "tracing.py", "forward")  # the function in which a trace calls the model


@functools.cache
def _roots() -> tuple[str, ...]:
    folders = [*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.path.dirname(TORCH))]
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


def short_path(file: str) -> str:
    """``file`` relative to site-packages or to the working directory, where it is below one of them."""
    for folder in (*_roots(), os.path.join(os.getcwd(), "")):
        if file.startswith(folder):
            return file[len(folder) :]
    return file


def line_of(file: str, number: int) -> Where:
    """A line of a file, with its text."""
    return Where(file=short_path(file), line=number, text=linecache.getline(file, number).strip() or None)


def pick(frames: Sequence[tuple[str, int]]) -> Where | None:
    """The line that a reader of the model wants, of ``(file, line)`` outermost first: the innermost outside torch."""
    frames = [frame for frame in frames if os.path.isabs(frame[0]) and not frame[0].startswith(_OWN)]
    best = [frame for frame in frames if not frame[0].startswith(TORCH)]
    best = best or [frame for frame in frames if frame[0].startswith(_TORCH_MODULES)]
    return line_of(*best[-1]) if best else None


def model_frames(_: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
    """What torch keeps as a node's stack trace: the lines below the model's forward, helper functions included."""
    start = next((i + 1 for i, frame in enumerate(stack) if is_entry(frame)), len(stack))
    kept = [f for f in stack[start:] if not f.filename.startswith(TORCH) or f.filename.startswith(_TORCH_MODULES)]
    return traceback.StackSummary.from_list(kept)


def is_entry(frame: traceback.FrameSummary | types.CodeType) -> bool:
    """Whether the frames below are the model's."""
    if isinstance(frame, types.CodeType):
        return (frame.co_filename, frame.co_name) == _ENTRY
    return (frame.filename, frame.name) == _ENTRY


def source(node: fx.Node) -> Where | None:
    """The model's own line that made a traced ``node``."""
    return _of_stack_trace(node.stack_trace) if node.stack_trace else None


@functools.lru_cache(maxsize=65536)
def _of_stack_trace(text: str) -> Where | None:
    return pick([(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)])


def current_line() -> Where | None:
    """The model's line that runs now; None outside its forward."""
    frames: list[tuple[str, int]] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_entry(frame.f_code):
            return pick(frames[::-1])
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return None


def location_of(location: Any) -> Where | None:
    """What `SizeEnv._get_user_frame` found, as torch keeps it."""
    frame = getattr(location, "framework_loc", None)
    return line_of(frame.filename, frame.lineno) if isinstance(frame, traceback.FrameSummary) and frame.lineno else None


def raised_at(error: BaseException | None) -> Where | None:
    """The model's own line that an exception came through."""
    while error is not None:
        frames = list(traceback.extract_tb(error.__traceback__))
        entries = [i for i, frame in enumerate(frames) if is_entry(frame)]
        if entries and (where := pick([(f.filename, f.lineno or 0) for f in frames[entries[-1] + 1 :]])):
            return where
        error = error.__cause__ or error.__context__
    return None


def forward_of(model: nn.Module) -> Where | None:
    """Where the model's forward is written."""
    code = getattr(type(model).forward, "__code__", None)
    return line_of(code.co_filename, code.co_firstlineno) if code is not None else None


def innermost_line() -> types.FrameType | None:
    """The frame of the model's line that runs now, below its forward; else that of a module of torch.nn."""
    frame: types.FrameType | None = sys._getframe(1)
    fallback = None
    while frame is not None and not is_entry(frame.f_code):
        file = frame.f_code.co_filename
        if os.path.isabs(file) and not file.startswith(_OWN):
            if not file.startswith(TORCH):
                return frame
            if file.startswith(_TORCH_MODULES):
                fallback = fallback or frame
        frame = frame.f_back
    return fallback


def asked_by_model(*through: str, modules: bool = True) -> bool:
    """Whether the model's code (or a module of torch.nn) called what calls this, directly or through these files."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename.startswith(_OWN) or frame.f_code.co_filename in through):
        frame = frame.f_back
    caller = frame.f_code.co_filename if frame is not None else TORCH
    return not caller.startswith(TORCH) or (modules and caller.startswith(os.path.join(TORCH, "nn")))


__all__ = [
    "TORCH",
    "asked_by_model",
    "current_line",
    "forward_of",
    "innermost_line",
    "is_entry",
    "line_of",
    "location_of",
    "model_frames",
    "pick",
    "raised_at",
    "short_path",
    "source",
]
