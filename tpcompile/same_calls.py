"""All ranks make the same call: compared before the first collective of it.

gloo adds up tensors of the same number of elements and another shape, and aborts the process where the numbers differ;
NCCL hangs. Which rank has other inputs can only be known if all say what they have: one all-gather of 32 bytes, for
which the CPU waits. It is made in the first call of every graph, and then in every 64th call, so that it costs next to
nothing and ranks that part ways are noticed soon; TPCOMPILE_CHECK=every-call asks for it in every call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, cast
from zlib import crc32

import torch
import torch.distributed as dist

from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.launch import check_same_program

VARIABLE = "TPCOMPILE_CHECK"
CHECKED = 64  # of so many calls one is compared
SAMPLED = 4096  # elements of a tensor that are compared


def setting() -> str:
    """What TPCOMPILE_CHECK asks for. It must be the same on all ranks.

    Raises:
        TpcompileError: it is neither every-call nor first-call.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "every-call", "first-call"):
        raise TpcompileError(f"{VARIABLE}={asked}", help="every-call, first-call, or leave it out")
    return asked


def is_due(calls: int) -> bool:
    """Whether the ranks compare their next call, after ``calls`` others."""
    asked = setting()
    return asked == "every-call" or calls % (CHECKED if asked == "" else 2**63) == 0


def check_same_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, group: dist.ProcessGroup) -> None:
    """All ranks call with the same mode, arguments, shapes, dtypes and (sampled) values. Collective.

    Raises:
        RuntimeMismatchError: they do not.
    """
    if group.size() == 1 or torch.compiler.is_compiling():
        return
    given = [*((f"argument {i}", x) for i, x in enumerate(args)), *sorted(kwargs.items())]
    rows = [f"mode: {'train' if training else 'eval'}", *(row for name, x in given for row in _described(name, x))]
    text = "\n".join(rows)
    try:
        check_same_program(text, group, text)
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(
            "ranks were given different inputs",
            why=(error.why or "").replace("of the program", "of the call"),
            help="every rank of tensor parallelism runs the same batch: do not divide the data over these ranks, and "
            "draw the same tokens on all of them",
        ) from error


def _described(name: str, value: Any) -> Iterator[str]:
    """A line for every tensor and constant; of objects of other kinds, such as caches, only what they are."""
    if isinstance(value, torch.Tensor):
        yield f"{name}: {list(value.shape)} {value.dtype}{_values(value)}"
    elif isinstance(value, Mapping):
        for key in value:
            yield from _described(f"{name}[{key!r}]", value[key])
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _described(f"{name}[{i}]", item)
    elif value is None or isinstance(value, bool | int | float | str):
        yield f"{name}: {value!r}"
    else:
        yield f"{name}: {type(value).__name__}"


def _values(tensor: torch.Tensor) -> str:
    if type(tensor) is not torch.Tensor or not tensor.is_contiguous() or not tensor.numel():
        return ""
    flat = tensor.detach().view(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous().view(torch.uint8)
    return f" {crc32(cast('Any', sample.numpy())):08x}"


__all__ = ["check_same_call", "is_due", "setting"]
