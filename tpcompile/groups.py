"""Process groups by name, and this rank's seat in each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.errors import TpcompileError

_resolve_process_group: Callable[[str], dist.ProcessGroup] = getattr(c10d, "_resolve_process_group")  # noqa: B009


def resolve_group(group: str | dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group of that name; None is the one of all ranks. Raises TpcompileError if there is none."""
    why = "torch.distributed has no process group yet"
    if isinstance(group, str):  # first: it is asked at every collective
        try:
            return _resolve_process_group(group)
        except (RuntimeError, LookupError, ValueError) as error:
            if dist.is_initialized():
                why = (str(error).splitlines() or ["torch.distributed does not know it"])[0]
    elif group is not None:
        return group
    elif dist.is_initialized():
        return cast("dist.ProcessGroup", dist.group.WORLD)
    raise TpcompileError(
        f"there is no process group {group!r}" if group else "there is no process group",
        why=why,
        help="bind the program to a mesh (tpcompile.compile does), or run it with tpcompile.simulate"
        if dist.is_initialized()
        else 'start the program with torchrun, and call torch.distributed.init_process_group("gloo") first ("nccl" on '
        "GPUs); tpcompile.verify needs neither",
    )


def group_of(mesh: DeviceMesh | None) -> dist.ProcessGroup:
    """The ranks that a model is cut over: those of the mesh, of its dim ``tp``, or all."""
    if mesh is None:
        return resolve_group(None)
    if not isinstance(mesh, DeviceMesh):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TpcompileError(  # pyright: ignore[reportUnreachable]
            f"mesh must be a torch.distributed DeviceMesh or None, not {type(mesh).__name__}",
            help='use init_device_mesh("cpu", (4,)), or one with a dim called "tp"',
        )
    if mesh.ndim == 1:
        return mesh.get_group()
    names = mesh.mesh_dim_names or ()
    if "tp" not in names:
        raise TpcompileError(
            f"the mesh has {mesh.ndim} dims {tuple(names)}, none of them called tp",
            why="tensor parallelism runs over one dim",
            help='pass mesh["NAME"] of the dim to use, or call that dim "tp"',
        )
    return mesh.get_group("tp")


def group_device(group: dist.ProcessGroup) -> torch.device:
    """Where small tensors must be for a collective of ``group``."""
    backend = dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


_seats: dict[str, tuple[int, int]] = {}


@contextlib.contextmanager
def seated(seats: Mapping[str, tuple[int, int]]) -> Generator[None]:
    """Be the rank that has this index and size in each of the named groups: to run its code on fake tensors alone."""
    before = dict(_seats)
    _seats.update(seats)
    try:
        yield
    finally:
        _seats.clear()
        _seats.update(before)


def seat(group: str) -> tuple[int, int]:
    """This rank's index in ``group``, and the group's size; a constant of the program when traced."""
    if group in _seats:
        return _seats[group]
    found = resolve_group(group)
    return found.rank(), found.size()


setattr(seat, "_dynamo_marked_constant", True)  # noqa: B010 - assume_constant_result, without importing Dynamo
