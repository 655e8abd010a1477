"""Collectives in shared memory, for ranks on the CPUs of one machine: the process group backend "shm".

    import tpcompile.shared_memory
    torch.distributed.init_process_group("shm")

gloo sends through sockets what ranks of one machine have to tell each other. Here it stands in memory that all of them
have mapped: each writes its tensor there, raises a flag, and adds up what all have written once their flags are up, in
the same order, so that all get the same bits. All-reduces, all-gathers and reduce-scatters of one tensor are done so,
and barriers; whatever else is asked for goes to gloo. Ranks that were asked for different ones of these are told, and
nothing is added. After a failure the group is of no more use, and says so.

It relies on two things. Stores of one x86-64 core are seen by the others in their order (Intel SDM, volume 3, 10.2.2),
hence no other processor. And a rank writes into a slot again only two exchanges later, when it has seen the flags of
the exchange between: by then all have read the slot.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
_KEPT = 1024  # shapes of slots, and texts

K = TypeVar("K")
V = TypeVar("V")
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

    def __init__(self, store: Store, rank: int, ranks: int):
        size = _HEADER + 2 * ranks * SLOT
        with torch.inference_mode(False), _memory_of_all(store, rank, ranks, size) as (path, self.pids):
            memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        at = memory.data_ptr()
        self.flags = (ctypes.c_int64 * ranks).from_address(at)
        header: Any = (ctypes.c_char * _HEADER).from_address(at)
        self._texts = memoryview(header).cast("B")
        self._slots = [
            [memory[start : start + SLOT] for start in range(_HEADER + turn * ranks * SLOT, size, SLOT)][:ranks]
            for turn in range(2)
        ]
        self._views: dict[tuple[torch.dtype, torch.Size], list[list[Tensor]]] = {}

    def slots(self, turn: int, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """The first bytes of every rank's slot of that turn, as tensors of that dtype and shape."""
        found = self._views.get((dtype, shape))
        if found is None:
            size = shape.numel() * dtype.itemsize
            with torch.inference_mode(False):  # they are kept
                found = [[slot[:size].view(dtype).view(shape) for slot in slots] for slots in self._slots]
            _keep(self._views, (dtype, shape), found)
        return found[turn]

    def text(self, turn: int, rank: int) -> memoryview:
        """What that rank was asked for in that turn."""
        start = _HEADER - (2 * rank + turn + 1) * _SAID
        return self._texts[start : start + _SAID]


@contextlib.contextmanager
def _memory_of_all(store: Store, rank: int, ranks: int, size: int) -> Generator[tuple[str, list[int]]]:
    """Where the memory that rank 0 makes is to be mapped inside of the block, and the processes of the ranks.

    It has no name in a file system, so it ends with the last process that has mapped it. Raises TpcompileError.
    """
    turn = (store.add("made", 1) - 1) // ranks  # a store may outlive a group
    here = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    file, why = -1, ""
    if rank == 0:
        try:
            file = os.memfd_create("tpcompile")
            os.posix_fallocate(file, 0, size)  # room that is missing must not be found out by a signal
        except OSError as error:
            why = str(error)
    try:
        store.set(f"{turn}/{rank}", json.dumps({"here": here, "pid": os.getpid(), "file": file, "why": why}))
        said: list[dict[str, Any]] = [json.loads(store.get(f"{turn}/{other}")) for other in range(ranks)]
        if said[0]["why"]:
            raise TpcompileError(
                f"there are no {size / 2**20:.0f} MiB of memory for the backend {BACKEND!r}",
                why=said[0]["why"],
                help='use the backend "gloo"',
            )
        for other, each in enumerate(said):
            if each["here"] != said[0]["here"]:
                raise TpcompileError(
                    f"the backend {BACKEND!r} is for ranks of one machine, or of one container",
                    why=f"rank {other} runs elsewhere than rank 0",
                    help='use the backend "gloo"',
                )
        yield f"/proc/{said[0]['pid']}/fd/{said[0]['file']}", [each["pid"] for each in said]
        store.set(f"{turn}/{rank} has it", "")
        if rank == 0:
            store.wait([f"{turn}/{other} has it" for other in range(ranks)])
    finally:
        if file >= 0:
            os.close(file)


class _Exchange(dist.Work):
    """What torch hands out for a collective: an exchange that was begun."""

    def __init__(self, group: SharedMemory, result: Sequence[Tensor]):
        super().__init__()
        self._group, self._result, self._sequence = group, result, group.begun

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until it is completed; without a timeout, at most for that of the group."""
        self._group.complete(self._sequence, timeout.total_seconds())
        return True

    def synchronize(self) -> None:
        """The same as to wait."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether its result is there; if all ranks have come, it is."""
        if self._group.is_ready(self._sequence):
            self.wait()
        return self._group.completed >= self._sequence

    def get_future(self) -> Future[Any]:
        """A future that has the result."""
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
        self._board = _Board(store, rank, ranks)
        gloo: Any = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, ranks, timeout)
        self._gloo = gloo
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)  # for all other methods
        self._rank, self._ranks, self._timeout = rank, ranks, timeout.total_seconds()
        self.begun = self.completed = 0  # exchanges
        self._pending: tuple[bytes, Callable[[], object]] | None = None
        self._failure = ""
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
        self.complete(self.begun)
        sequence, board, text = self.begun + 1, self._board, self._text(said)
        turn = sequence & 1
        slots = board.slots(turn, dtype, shape)
        write(slots[self._rank])
        board.text(turn, self._rank)[:] = text
        board.flags[self._rank] = sequence  # the other ranks go on from here
        self._pending, self.begun = (text, lambda: read(slots)), sequence

    def complete(self, sequence: int, timeout: float = 0.0) -> None:
        """Wait for the other ranks of that exchange, and read what they have written; there is at most one to do.

        Raises RuntimeError, as torch's own backends do, if one of them is gone, late or was asked for something else,
        and from then on.
        """
        if self._failure:
            raise RuntimeError(f"the process group has failed before: {self._failure}")
        if self.completed >= sequence or self._pending is None:
            return
        mine, read = self._pending
        try:
            for other in range(self._ranks):
                if self._board.flags[other] < self.begun:
                    self._wait_for(other, mine, timeout or self._timeout)
            for other in range(self._ranks):
                if (text := bytes(self._board.text(self.begun & 1, other))) != mine:
                    raise RuntimeError(
                        f"rank {other} of the group was asked for {_words(text)}, rank {self._rank} for {_words(mine)}"
                    )
            read()
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        self._pending, self.completed = None, self.begun

    def is_ready(self, sequence: int) -> bool:
        """Whether completing that exchange waits for nobody."""
        return all(flag >= sequence for flag in self._board.flags)

    def _text(self, said: _Said) -> bytes:
        found = self._texts.get(said)
        if found is None:
            kind, how, numel, dtype, start = said
            text = " ".join((f"{kind} {how} of {numel} {dtype}" + (f" from {start}" if start else "")).split())
            found = _keep(self._texts, said, text.encode()[:_SAID].ljust(_SAID, b"\0"))
        return found

    def _wait_for(self, other: int, text: bytes, timeout: float) -> None:
        flags, sequence = self._board.flags, self.begun
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
            if now - started > timeout:
                raise RuntimeError(f"rank {other} of the group did not come to {_words(text)} within {timeout:g} s")

    # ------------------------------------------------------------------------------------------ collectives
    def allreduce(self, tensors: Tensor | Sequence[Tensor], opts: Any = None, timeout: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What dist.all_reduce asks for, and DistributedDataParallel with a tensor alone."""
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        reduction = _reduction(opts)
        if reduction is None or len(tensors) != 1 or not _is_ours(tensors[0]):
            return self._gloo.allreduce(tensors, *([] if opts is None else [opts]))
        x = tensors[0].detach()
        mine = x.contiguous()
        with self._recorded("all_reduce", mine, 1):
            for start, piece in _pieces(mine, SLOT):
                said = "all_reduce", reduction.name, x.numel(), x.dtype, start
                self._begin(said, x.dtype, piece.shape, partial(_write, piece), partial(reduction.into, piece))
        if mine.data_ptr() != x.data_ptr():
            self.complete(self.begun)
            with _allowed(x):
                x.copy_(mine)
        return _Exchange(self, tensors)

    def all_gather_single(self, output: Tensor, x: Tensor, *opts: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What dist.all_gather_into_tensor asks for."""
        if not _is_ours(x) or output.dtype != x.dtype:
            return self._gloo._allgather_base(output, x, *opts)
        _check_sizes("all_gather", output, x, output.numel(), self._ranks * x.numel())
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
        _check_sizes("reduce_scatter", output, x, self._ranks * output.numel(), x.numel())
        rows, flat = x.detach().contiguous().view(self._ranks, -1), output.detach().view(-1)
        with self._recorded("reduce_scatter", flat, self._ranks):
            for start, piece in _pieces(flat, SLOT // self._ranks):
                part = rows[:, start : start + piece.numel()]
                said = "reduce_scatter", reduction.name, x.numel(), x.dtype, start
                read = partial(reduction.into, piece, row=self._rank)
                self._begin(said, x.dtype, part.shape, partial(_write, part), read)
        return _Exchange(self, [output])

    def all_gather_single_coalesced(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], *opts: Any
    ) -> Any:
        """What functional collectives ask for: several all-gathers."""
        for output, x in zip(outputs, tensors, strict=True):
            self.all_gather_single(output, x, *opts).wait()
        return _Exchange(self, outputs)

    def reduce_scatter_single_coalesced(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """What functional collectives ask for: several reduce-scatters."""
        for output, x in zip(outputs, tensors, strict=True):
            self.reduce_scatter_single(output, x, opts).wait()
        return _Exchange(self, outputs)

    def barrier(self, opts: Any = None, timeout: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
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

    _allgather_base: Any = all_gather_single  # the names until torch 2.13
    _reduce_scatter_base: Any = reduce_scatter_single
    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced


@dataclass(frozen=True)
class _Reduction:
    """How the ranks' values become one."""

    name: str
    combine: Callable[..., Tensor]

    def into(self, result: Tensor, values: Sequence[Tensor], row: int | None = None) -> None:
        """Write into ``result`` what the ranks' values, or a row of each, amount to, in the order of the ranks."""
        with _allowed(result):
            self._into(result, values if row is None else [value[row] for value in values])

    def _into(self, result: Tensor, values: Sequence[Tensor]) -> None:
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


_REDUCTIONS: Sequence[tuple[Any, _Reduction]] = (
    (dist.ReduceOp.SUM, _Reduction("sum", torch.add)),
    (dist.ReduceOp.MAX, _Reduction("max", torch.maximum)),
    (dist.ReduceOp.MIN, _Reduction("min", torch.minimum)),
    (dist.ReduceOp.PRODUCT, _Reduction("product", torch.mul)),
)


def _reduction(opts: Any) -> _Reduction | None:
    """What the options of a collective ask for; None if gloo is to be asked."""
    op = dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)
    return next((found for known, found in _REDUCTIONS if op == known), None)


def _is_ours(x: Tensor) -> bool:
    """Whether a collective of x is done here. All ranks must say the same, so its strides do not count."""
    return x.is_cpu and x.dtype in _DTYPES and x.layout is torch.strided


def _check_sizes(kind: str, output: Tensor, x: Tensor, have: int, need: int) -> None:
    if have != need or not output.is_contiguous():
        raise ValueError(f"{kind}: a tensor of {list(x.shape)}, an output of {list(output.shape)} {output.stride()}")


def _keep(memo: dict[K, V], key: K, value: V) -> V:
    if len(memo) >= _KEPT:
        memo.clear()
    memo[key] = value
    return value


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
    with _allowed(parts[0]):
        for part, slot in zip(parts, slots, strict=True):
            part.copy_(slot)


def _allowed(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where x may be overwritten."""
    needed = x.is_inference() and not torch.is_inference_mode_enabled()
    return torch.inference_mode() if needed else contextlib.nullcontext()


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
