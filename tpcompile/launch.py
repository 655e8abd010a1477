"""Local processes: start them, end them, and make sure that they run the same program.

``launch`` runs one function on N spawned processes that form a process group, for ``tpcompile run`` and for tests.
Whatever happens to a rank (it raises, dies or hangs) all of them are gone when ``launch`` returns, and the error names
the rank where it began. ``check_same_program`` is asked before the first collective: ranks that disagree there abort
or, worse, compute something else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from itertools import zip_longest
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.failures import PeerError, issue
from tpcompile.groups import group_device, resolve_group

_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)  # as faulthandler writes it
_GRACE = 2.0  # seconds that the other ranks get to say what they know, once one has failed


@dataclass(frozen=True)
class _Failure:
    """How one rank ended that did not return."""

    rank: int
    time: float
    echo: bool  # raised inside torch.distributed: most likely another rank's fault
    error: TpcompileError | None
    text: str
    last_line: str


def launch(
    function: Callable[..., Any],
    ranks: int,
    args: Sequence[Any] = (),
    timeout: float = 300.0,
    *,
    gpus: bool = True,
    backend: str = "gloo",
    watch: Callable[[], None] | None = None,
) -> list[Any]:
    """``function(*args)`` on ``ranks`` local processes with a process group of all of them; what each one returned.

    The group is ``backend``, or nccl where there are that many GPUs and ``gpus`` is left on. ``function`` must be
    importable by name (of a module), ``args`` and results picklable. ``watch`` is called ten times a second meanwhile.

    Raises the TpcompileError of the rank that failed first, if it raised one, else a TpcompileError that names the rank
    and the reason; after ``timeout`` seconds one that says where each rank was.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tpcompile-") as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((function, tuple(args))))
        processes = [
            context.Process(target=_rank, args=(name, rank, ranks, timeout, gpus, backend), daemon=True)
            for rank in range(ranks)
        ]
        try:
            with _uninterrupted():
                for process in processes:
                    process.start()
            _wait(processes, folder, timeout, watch)
            return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(ranks)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
                    process.close()


@contextlib.contextmanager
def _uninterrupted() -> Generator[None]:
    """What is started here never sees Ctrl-C, which a terminal sends to all: the parent is to end them, in silence."""
    multiprocessing.resource_tracker.ensure_running()  # before Python 3.12 its start would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(
    processes: Sequence[SpawnProcess], folder: Path, timeout: float, watch: Callable[[], None] | None = None
) -> None:
    """Return when all have ended well; raise for the first one that has not."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    failures: list[_Failure] = []
    while running:
        left = deadline - time.monotonic()
        sentinels = [process.sentinel for process in running.values()]
        ended = multiprocessing.connection.wait(sentinels, max(0.0, left if watch is None else min(left, 0.1)))
        if watch is not None:
            watch()
        if not ended:
            if time.monotonic() >= deadline:
                break
            continue
        for rank, process in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            del running[rank]
            if process.exitcode != 0:
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE)
                failures.append(_failure(rank, process.exitcode, folder))
    if failures:
        _raise(min(failures, key=lambda failure: (failure.echo, failure.time)), len(processes))
    if running:
        _raise_hung(running, folder, timeout, len(processes))


def _failure(rank: int, exitcode: int | None, folder: Path) -> _Failure:
    found = folder / f"error{rank}"
    if found.exists():
        return cast("_Failure", pickle.loads(found.read_bytes()))
    if exitcode is not None and exitcode < 0:
        how = f"was killed by {signal.Signals(-exitcode).name}"
    else:
        how = f"exited with status {exitcode}"
    return _Failure(rank, time.time(), False, None, how, f"the process {how} without raising an error")


def _raise(failure: _Failure, ranks: int) -> None:
    if failure.error is not None:
        raise failure.error
    error = TpcompileError(f"rank {failure.rank} of {ranks} failed", why=failure.last_line)
    error.add_note(f"on rank {failure.rank}:\n{failure.text}")
    raise error


def _raise_hung(running: dict[int, SpawnProcess], folder: Path, timeout: float, ranks: int) -> None:
    if hasattr(signal, "SIGUSR1"):
        for process in running.values():
            os.kill(cast("int", process.pid), signal.SIGUSR1)  # _rank has faulthandler answer with a traceback
        time.sleep(0.5)
    places: list[tuple[bool, str]] = []
    for rank in running:
        stack = (folder / f"stack{rank}").read_text() if (folder / f"stack{rank}").exists() else ""
        frames = [f"{file}:{line} in {function}" for file, line, function in _FRAME.findall(stack)]
        waits = any("torch/distributed" in frame for frame in frames)
        own = next((frame for frame in frames if "torch/distributed" not in frame), "an unknown place")
        places.append((waits, f"rank {rank} {'waits for the others' if waits else 'is'} at {own}"))
    places.sort()
    raise TpcompileError(
        f"{len(running)} of {ranks} ranks did not finish within {timeout:g} s",
        why="; ".join(place for _, place in places),
        help="give a larger timeout, or look at the first rank named: the others may only be waiting for it",
    )


def _rank(folder: str, rank: int, ranks: int, timeout: float, gpus: bool, backend: str) -> None:
    """The life of one process: everything that it has to say goes into files in ``folder``."""
    stack = (Path(folder) / f"stack{rank}").open("w")
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    gpus = gpus and torch.cuda.device_count() >= ranks
    if gpus:
        torch.cuda.set_device(rank)
    try:
        function, args = pickle.loads((Path(folder) / "task").read_bytes())
        if backend == "shm":
            importlib.import_module("tpcompile.shared_memory")
        dist.init_process_group(
            "nccl" if gpus else backend,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout + 60),  # the parent is the one to give up
        )
        result = pickle.dumps(function(*args))
        dist.barrier()  # nobody leaves while another one still reads
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        failed_at = time.time()
        frames = traceback.extract_tb(error.__traceback__)
        text = "".join(traceback.format_exception(error))
        failure = _Failure(
            rank,
            failed_at,
            isinstance(error, PeerError)
            or (not isinstance(error, TpcompileError) and any("torch/distributed" in f.filename for f in frames)),
            error if isinstance(error, TpcompileError) else None,
            text,
            traceback.format_exception_only(error)[-1].strip(),
        )
        _write(Path(folder) / f"error{rank}", pickle.dumps(failure))
        os._exit(1)  # without waiting for the group's other members
    _write(Path(folder) / f"result{rank}", result)
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._run_finalizers()  # pyright: ignore[reportAttributeAccessIssue]  # locks of progress bars
    os._exit(0)  # threads of the backend may still run: an interpreter that is taken down under them can abort


def _write(path: Path, content: bytes) -> None:
    path.with_suffix(".part").write_bytes(content)
    path.with_suffix(".part").rename(path)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def check_same_program(digest: str, group: str | dist.ProcessGroup | None, describe: str) -> None:
    """Raise RuntimeMismatchError, on every rank of ``group``, unless all of them bring the same ``digest``.

    ``describe`` is a short text of the program, sent only if they differ, to say in which line. Both must be free of
    what differs between ranks by right: rank numbers, uneven local sizes.
    """
    found = resolve_group(group)
    device = group_device(found)
    mine = torch.tensor(list(sha256(digest.encode()).digest()), dtype=torch.uint8, device=device)
    every = [torch.empty_like(mine) for _ in range(found.size())]
    issue(dist.all_gather, every, mine, group=found)
    kinds: dict[bytes, list[int]] = {}
    for member, other in enumerate(every):
        kinds.setdefault(bytes(other.tolist()), []).append(dist.get_global_rank(found, member))
    if len(kinds) == 1:
        return
    texts: list[str | None] = [None] * found.size()
    dist.all_gather_object(texts, describe, group=found)
    by_rank = {dist.get_global_rank(found, member): text or "" for member, text in enumerate(texts)}
    (first, *others) = sorted(kinds.values(), key=lambda ranks: (-len(ranks), ranks))
    rows = [_difference(first, ranks, by_rank[first[0]], by_rank[ranks[0]]) for ranks in others]
    raise RuntimeMismatchError(
        f"{', '.join(_ranks(ranks) for ranks in others)} would run another program than {_ranks(first)}",
        why="; ".join(rows),
        help="give every rank the same model, spec, degree and example inputs (and the same versions of all of them)",
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _difference(first: Sequence[int], other: Sequence[int], text: str, other_text: str) -> str:
    for number, pair in enumerate(zip_longest(text.splitlines(), other_text.splitlines()), start=1):
        if pair[0] != pair[1]:
            have = [
                f"{_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'} {repr(line) if line else 'no such line'}"
                for ranks, line in zip((first, other), pair, strict=True)
            ]
            return f"line {number} of the program: {have[0]}, {have[1]}"
    return f"the short texts of {_ranks(first)} and {_ranks(other)} agree, the programs do not"
