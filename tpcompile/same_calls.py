"""All ranks make the same call: compared before the first collective of it.

gloo adds up tensors of the same number of elements and another shape, and aborts the process where the numbers differ;
NCCL hangs. Which rank has other inputs can only be known if all say what they have, in every call: one all-gather of
32 bytes. On gloo every call does that. On NCCL it would make the CPU wait for the GPU, and is left to the first call of
each kind, unless TPCOMPILE_CHECK=every-call asks for it; TPCOMPILE_CHECK=first-call leaves it out on gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, cast
from zlib import crc32

import torch
import torch.distributed as dist

from tpcompile.collectives import group_device
from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.launch import check_same_program

VARIABLE = "TPCOMPILE_CHECK"
SAMPLED = 4096  # elements of a tensor that are compared


def checks_every_call(group: dist.ProcessGroup) -> bool:
    """Whether the ranks of ``group`` compare every call. It must be the same on all of them.

    Raises:
        TpcompileError: TPCOMPILE_CHECK is neither every-call nor first-call.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "every-call", "first-call"):
        raise TpcompileError(f"{VARIABLE}={asked}", help="every-call, first-call, or leave it out")
    return asked == "every-call" or (asked == "" and group_device(group).type == "cpu")


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


__all__ = ["check_same_call", "checks_every_call"]
