"""Collectives in shared memory, for ranks on the CPUs of one machine: the process group backend "shm".

    import tpcompile.shared_memory
    torch.distributed.init_process_group("shm")

gloo sends through sockets what ranks of one machine have to tell each other. Here it stands in memory that all of them
have mapped: each writes its tensor there, raises a flag, and adds up what all have written once their flags are up, in
the same order, so that all get the same bits. All-reduces, all-gathers and reduce-scatters of one tensor are done so;
whatever else is asked for goes to gloo. Ranks that were asked for different collectives are told, and nothing is added.

It relies on two things. Stores of one x86-64 core are seen by the others in their order (Intel SDM, volume 3, 10.2.2),
hence no other processor. And a rank writes into a slot again only two exchanges later, when it has seen the flags of
the exchange between: by then all have read the slot.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.futures import Future

from tpcompile.errors import TpcompileError

BACKEND = "shm"
SLOT = 1 << 20  # bytes that a rank writes before the others read: small enough for a core's cache
_HEADER = 4096  # bytes before the slots: flags, then two rows of what each rank was asked for
_SAID = 96  # bytes of such a text
_MOST = (_HEADER - 8 * 16) // (2 * _SAID)  # ranks of a group
_SPINS = 300  # looks at a flag before the core is left to others
_LATE = 0.005  # seconds after which a rank sleeps between looks
_NAP = 0.0002
_ALIVE = 0.5  # seconds between looks at whether the other process is there
_HALVES = frozenset((torch.float16, torch.bfloat16))
_DTYPES = _HALVES | {torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_SHAPES = 256  # of which views of the slots are kept


_Said = tuple[str, str, int, torch.dtype | None, int]  # kind, reduction, elements, dtype, where the piece starts


def obstacle(ranks: int) -> str | None:
    """Why ``ranks`` processes of this machine cannot have such a group; None if they can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"it is for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    if ranks > _MOST:
        return f"it is for up to {_MOST} ranks"
    return None


class _Board:
    """The memory: for each rank a flag, and two slots with a text each, which are used in turn."""

    def __init__(self, store: Store, rank: int, ranks: int, timeout: timedelta):
        self.rank, self.ranks = rank, ranks
        size = _HEADER + 2 * ranks * SLOT
        path = _agreed_path(store, rank, size)
        try:
            self._memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
            store.set(f"pid {rank}", str(os.getpid()))
            self.pids = [int(store.get(f"pid {other}")) for other in range(ranks)]  # waits until all have mapped it
        finally:
            if rank == 0:
                os.unlink(path)
        at = self._memory.data_ptr()
        self.flags = (ctypes.c_int64 * ranks).from_address(at)
        bytes_of: Any = (ctypes.c_char * _HEADER).from_address(at)
        self._texts = memoryview(bytes_of).cast("B")
        self._slots = [
            [self._memory[start : start + SLOT] for start in range(_HEADER + turn * ranks * SLOT, size, SLOT)][:ranks]
            for turn in range(2)
        ]
        self._views: dict[tuple[torch.dtype, torch.Size], list[list[Tensor]]] = {}

    def slots(self, turn: int, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """The first bytes of every rank's slot of that turn, as tensors of that dtype and shape."""
        found = self._views.get((dtype, shape))
        if found is None:
            size = shape.numel() * dtype.itemsize
            found = [[slot[:size].view(dtype).view(shape) for slot in slots] for slots in self._slots]
            if len(self._views) >= _SHAPES:
                self._views.clear()
            self._views[dtype, shape] = found
        return found[turn]

    def text(self, turn: int, rank: int) -> memoryview:
        """What that rank was asked for in that turn."""
        start = _HEADER - (2 * rank + turn + 1) * _SAID
        return self._texts[start : start + _SAID]


def _agreed_path(store: Store, rank: int, size: int) -> str:
    """A file of that size, in memory where there is a file system for it; rank 0 makes it. Raises TpcompileError."""
    if rank == 0:
        found = ""
        try:
            folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
            file, found = tempfile.mkstemp(prefix="tpcompile-", dir=folder)
            try:
                os.posix_fallocate(file, 0, size)  # room that is missing must not be found out by a signal
            finally:
                os.close(file)
            store.set("file", f"{socket.gethostname()}\n{found}")
        except OSError as error:
            if found:
                os.unlink(found)
            store.set("file", f"\n{error}")
    host, path = store.get("file").decode().split("\n", 1)
    if not host:
        raise TpcompileError(
            f"there are no {size / 2**20:.0f} MiB of shared memory for the backend {BACKEND!r}",
            why=path,
            help='give the container more (docker run --shm-size=1g), or use the backend "gloo"',
        )
    if host != socket.gethostname():
        raise TpcompileError(
            f"the backend {BACKEND!r} is for ranks of one machine",
            why=f"rank 0 is on {host}, rank {rank} on {socket.gethostname()}",
            help='use the backend "gloo"',
        )
    return path


class _Exchange(dist.Work):
    """The last exchange that was begun, or an older one: waiting for the last is waiting for all."""

    def __init__(self, group: SharedMemory, result: Sequence[Tensor]):
        super().__init__()
        self._group, self._result = group, result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._group.complete()
        return True

    def is_completed(self) -> bool:
        return False  # nobody looks before somebody waits

    def get_future(self) -> Future[Any]:
        self.wait()
        future: Future[Any] = Future()
        future.set_result(list(self._result))
        return future


class SharedMemory(dist.ProcessGroup):
    """A process group whose ranks are processes of one machine; made by ``init_process_group`` and ``new_group``."""

    def __init__(self, store: Store, rank: int, ranks: int, timeout: timedelta):
        super().__init__(rank, ranks)  # pyright: ignore[reportCallIssue]
        if (why := obstacle(ranks)) is not None:
            raise TpcompileError(f"there is no backend {BACKEND!r} here", why=why, help='use the backend "gloo"')
        self._board = _Board(store, rank, ranks, timeout)
        self._gloo: Any = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, ranks, timeout)
        self._rank, self._ranks, self._timeout = rank, ranks, timeout.total_seconds()
        self._sequence = 0
        self._pending: tuple[bytes, Callable[[], object]] | None = None
        self._texts: dict[_Said, bytes] = {}
        self._named = ""

    # ------------------------------------------------------------------------------------------ one exchange
    def _begin(
        self,
        said: _Said,
        dtype: torch.dtype,
        shape: torch.Size,
        write: Callable[[Tensor], object],
        read: Callable[[Sequence[Tensor]], object],
    ) -> None:
        """``write`` this rank's slot, and let ``read`` have those of all ranks when the exchange is completed.

        A slot is given as a tensor of ``dtype`` and ``shape``.
        """
        self.complete()
        self._sequence += 1
        turn, board = self._sequence & 1, self._board
        slots = board.slots(turn, dtype, shape)
        write(slots[self._rank])
        board.text(turn, self._rank)[:] = text = self._text(said)
        board.flags[self._rank] = self._sequence
        self._pending = text, lambda: read(slots)

    def complete(self) -> None:
        """Wait for the other ranks of the exchange that was begun last, and read what they have written.

        Raises RuntimeError, as torch's own backends do, if one of them is gone, late or was asked for something else.
        """
        if self._pending is None:
            return
        (mine, read), self._pending = self._pending, None
        flags, turn = self._board.flags, self._sequence & 1
        for other in range(self._ranks):
            if flags[other] < self._sequence:
                self._wait_for(other, mine)
        for other in range(self._ranks):
            if (text := bytes(self._board.text(turn, other))) != mine:
                raise RuntimeError(
                    f"rank {other} of the group was asked for {_words(text)}, rank {self._rank} for {_words(mine)}"
                )
        read()

    def _text(self, said: _Said) -> bytes:
        found = self._texts.get(said)
        if found is None:
            kind, how, numel, dtype, start = said
            text = f"{kind} {how} of {numel} {dtype}" + (f" from {start}" if start else "")
            found = self._texts[said] = " ".join(text.split()).encode()[:_SAID].ljust(_SAID, b"\0")
        return found

    def _wait_for(self, other: int, text: bytes) -> None:
        flags, sequence = self._board.flags, self._sequence
        for _ in range(_SPINS):
            if flags[other] >= sequence:
                return
        started = looked = time.monotonic()
        while flags[other] < sequence:
            os.sched_yield()
            now = time.monotonic()
            if now - started > _LATE:
                time.sleep(_NAP)
            if now - looked > _ALIVE:
                looked = now
                if _is_gone(self._board.pids[other]) and flags[other] < sequence:
                    raise RuntimeError(
                        f"the process of rank {other} of the group is gone; this one waits in {_words(text)}"
                    )
            if now - started > self._timeout:
                raise RuntimeError(
                    f"rank {other} of the group did not come to {_words(text)} within {self._timeout:g} s"
                )

    # ------------------------------------------------------------------------------------------ collectives
    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What dist.all_reduce asks for."""
        reduction = _reduction(opts)
        if reduction is None or len(tensors) > 1 or not _is_ours(tensors[0]):
            return self._gloo.allreduce(list(tensors), *([] if opts is None else [opts]))
        x = tensors[0].detach()
        mine = x.contiguous()
        with self._recorded("all_reduce", mine, 1):
            for start, piece in _pieces(mine, SLOT):
                said = "all_reduce", reduction.name, x.numel(), x.dtype, start
                self._begin(said, x.dtype, piece.shape, partial(_write, piece), partial(reduction.into, piece))
        if mine.data_ptr() != x.data_ptr():
            self.complete()
            x.copy_(mine)
        return _Exchange(self, tensors)

    def all_gather_single(self, output: Tensor, x: Tensor, *opts: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What dist.all_gather_into_tensor asks for."""
        if not _is_ours(x) or output.dtype != x.dtype:
            return self._gloo._allgather_base(output, x, *opts)
        flat, rows = x.detach().contiguous().view(-1), output.detach().view(self._ranks, -1)
        with self._recorded("all_gather", flat, self._ranks):
            for start, piece in _pieces(flat, SLOT):
                parts = rows[:, start : start + piece.numel()].unbind()
                said = "all_gather", "", x.numel(), x.dtype, start
                self._begin(said, x.dtype, piece.shape, partial(_write, piece), partial(_copy_all, parts))
        return _Exchange(self, [output])

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What dist.reduce_scatter_tensor asks for."""
        reduction = _reduction(opts)
        if reduction is None or not _is_ours(x) or output.dtype != x.dtype:
            return self._gloo._reduce_scatter_base(output, x, *([] if opts is None else [opts]))
        rows, flat = x.detach().contiguous().view(self._ranks, -1), output.detach().view(-1)
        with self._recorded("reduce_scatter", flat, self._ranks):
            for start, piece in _pieces(flat, SLOT // self._ranks):
                part = rows[:, start : start + piece.numel()]
                said = "reduce_scatter", reduction.name, x.numel(), x.dtype, start
                read = partial(reduction.into, piece, row=self._rank)
                self._begin(said, x.dtype, part.shape, partial(_write, part), read)
        return _Exchange(self, [output])

    def barrier(self, opts: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What dist.barrier asks for."""
        self._begin(("barrier", "", 0, None, 0), torch.uint8, torch.Size([0]), _nothing, _nothing)
        return _Exchange(self, [])

    @staticmethod
    def _recorded(kind: str, x: Tensor, times: int) -> contextlib.AbstractContextManager[Any]:
        """An event in a profile: the collective, and the bytes of the tensor that is reduced or gathered."""
        if not torch.autograd.profiler._is_profiler_enabled:  # pyright: ignore[reportPrivateUsage]
            return contextlib.nullcontext()
        return torch.profiler.record_function(f"{BACKEND}:{kind}:{times * x.numel() * x.element_size()}")

    # ------------------------------------------------------------------------------------------ what torch asks
    def getBackendName(self) -> str:
        """The name it was made by."""
        return BACKEND

    def setGroupName(self, name: str) -> None:
        """The name that torch gives it."""
        self._named = name

    def getGroupName(self) -> str:
        """The name that torch gave it."""
        return self._named

    _allgather_base: Any = all_gather_single  # until torch 2.12
    _reduce_scatter_base: Any = reduce_scatter_single


def _of_gloo(name: str) -> Callable[..., Any]:
    def method(self: SharedMemory, *args: Any, **options: Any) -> Any:
        return getattr(self._gloo, name)(*args, **options)  # pyright: ignore[reportPrivateUsage]

    return method


for _name in ("allgather", "broadcast", "reduce", "gather", "scatter", "alltoall", "alltoall_base", "send", "recv"):
    setattr(SharedMemory, _name, _of_gloo(_name))


@dataclass(frozen=True)
class _Reduction:
    """How the ranks' values become one."""

    name: str
    combine: Callable[..., Tensor]

    def into(self, result: Tensor, values: Sequence[Tensor], row: int | None = None) -> None:
        """Write into ``result`` what the ranks' values, or a row of each, amount to, in the order of the ranks."""
        if row is not None:
            values = [value[row] for value in values]
        if len(values) == 1:
            result.copy_(values[0])
        elif result.dtype in _HALVES and len(values) > 2:  # rounded once, not after every rank
            total = values[0].float()
            for value in values[1:]:
                self.combine(total, value.float(), out=total)
            result.copy_(total)
        else:
            self.combine(values[0], values[1], out=result)
            for value in values[2:]:
                self.combine(result, value, out=result)
        if self.name == "average":
            result.div_(len(values))


_REDUCTIONS: Sequence[tuple[Any, _Reduction]] = (
    (dist.ReduceOp.SUM, _Reduction("sum", torch.add)),
    (dist.ReduceOp.MAX, _Reduction("max", torch.maximum)),
    (dist.ReduceOp.MIN, _Reduction("min", torch.minimum)),
    (dist.ReduceOp.PRODUCT, _Reduction("product", torch.mul)),
)


def _reduction(opts: Any) -> _Reduction | None:
    """What the options of a collective ask for; None if gloo is to be asked."""
    op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    return next((found for known, found in _REDUCTIONS if op == known), None)


def _is_ours(x: Tensor) -> bool:
    """Whether a collective of x is done here. All ranks must say the same, so its layout does not count."""
    return x.is_cpu and x.dtype in _DTYPES


def _pieces(x: Tensor, room: int) -> Iterator[tuple[int, Tensor]]:
    """A contiguous x itself, or else flat pieces of it, of at most ``room`` bytes, and where they start."""
    step, numel = room // x.element_size(), x.numel()
    if 0 < numel <= step:
        yield 0, x
    else:
        flat = x.view(-1)
        yield from ((start, flat[start : start + step]) for start in range(0, numel, step))


def _write(x: Tensor, slot: Tensor) -> None:
    slot.copy_(x)


def _copy_all(parts: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
    for part, slot in zip(parts, slots, strict=True):
        part.copy_(slot)


def _nothing(_: object) -> None:
    pass


def _words(text: bytes) -> str:
    return text.rstrip(b"\0").decode(errors="replace")


def _is_gone(pid: int) -> bool:
    """Whether that process of this machine has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _made(store: Store, rank: int, ranks: int, timeout: timedelta) -> SharedMemory:
    return SharedMemory(store, rank, ranks, timeout)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _made, devices=["cpu"])
