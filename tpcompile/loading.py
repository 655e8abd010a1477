"""``tpcompile load``: whether a checkpoint can be loaded on N ranks, and what it takes to load it on N local processes.

``fits`` reads headers alone. ``load`` starts the processes; each reports how far it is through a file that the parent
looks at, and what it took when it is done.
"""

from __future__ import annotations

import contextlib
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tpcompile.compiler import rewrite
from tpcompile.huggingface import config_and_class
from tpcompile.launch import launch
from tpcompile.module import call_arguments_as_inputs
from tpcompile.pretrained import held_bytes, open_checkpoint, place_of, warn_of_unused
from tpcompile.pretrained import load as load_part

_DONE = struct.Struct("<qq")
Watch = Callable[[Sequence[tuple[int, int]]], None]
"""Told, for every rank, the bytes of its parameters that are loaded, and of all of them."""


@dataclass(frozen=True)
class Fit:
    """A checkpoint that can be loaded: the model's class, and bytes."""

    model: str
    tensors: int  # in the files
    whole: int  # bytes of all parameters
    held: tuple[int, ...]  # bytes of every rank's parameters

    @property
    def shares(self) -> tuple[float, ...]:
        """What part of the parameters' bytes every rank holds."""
        return tuple(n / max(1, self.whole) for n in self.held)


@dataclass(frozen=True)
class Took:
    """What loading took on one rank: bytes, and seconds. ``peak`` is resident memory over that after the imports."""

    read: int
    held: int
    peak: int | None  # None where the system does not tell
    seconds: float


def fits(directory: str, spec: str | None, degree: int, dtype: torch.dtype | None = None) -> Fit:
    """Check names, shapes, dtypes and the cut, without reading a weight.

    Raises:
        TpcompileError: the checkpoint cannot be loaded on ``degree`` ranks.
    """
    with open_checkpoint(directory, dtype=dtype) as opened:
        warn_of_unused(opened)
        given = call_arguments_as_inputs(opened.model, None)
        program = rewrite(opened.model, spec, degree=degree, example_inputs=given)
        whole = sum(p.numel() * p.element_size() for p in program.captured.parameters.values())
        held = tuple(held_bytes(program, rank) for rank in range(degree))
        return Fit(type(opened.model).__name__, len(opened.files.tensors), whole, held)


def load(
    directory: str,
    spec: str | None,
    degree: int,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    timeout: float = 3600.0,
) -> list[Took]:
    """Load the checkpoint on ``degree`` local processes, over gloo, and say what it took on each.

    Raises:
        TpcompileError: as ``tpcompile.from_pretrained``; or a process died, or took longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="tpcompile-") as folder:

        def look() -> None:
            if watch is not None:
                watch([_done(Path(folder) / str(rank)) for rank in range(degree)])

        args = (directory, spec, dtype, folder)
        return launch(load_on_rank, degree, args, timeout, gpus=False, watch=look)


def load_on_rank(directory: str, spec: str | None, dtype: torch.dtype | None, folder: str) -> Took:
    """Load this rank's part; ``folder`` gets a file that tells how far it is."""
    with (Path(folder) / str(dist.get_rank())).open("wb", buffering=0) as file:

        def progress(done: int, total: int) -> None:
            file.seek(0)
            file.write(_DONE.pack(done, total))

        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the command's answer
            config_and_class(place_of(directory))  # imports it
            before = _memory("VmRSS")
            start = time.perf_counter()
            module, read = load_part(directory, spec, dtype=dtype, progress=progress)
            seconds = time.perf_counter() - start
    most = _memory("VmHWM")
    held = sum(parameter.nbytes for parameter in module.parameters())
    return Took(read, held, None if most is None or before is None else most - before, seconds)


def _done(file: Path) -> tuple[int, int]:
    try:
        written = file.read_bytes()
    except OSError:
        return 0, 0
    return _DONE.unpack(written) if len(written) == _DONE.size else (0, 0)


def _memory(what: str) -> int | None:
    """Bytes of this process that are resident: VmRSS now, or VmHWM, the most since it began."""
    try:
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
