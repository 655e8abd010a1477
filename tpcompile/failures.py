"""A collective that fails: which rank is missing, where the backend only says that a connection is gone.

Nothing is done until a collective raises. Then every rank that is still there says so in the store of the process
group, and who says nothing is named: it has died, hangs, or runs something else.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tpcompile.errors import TpcompileError

ANSWER = 5.0  # seconds within which a rank that waits in a collective, too, says so
_default_store: Callable[[], Any] = getattr(c10d, "_get_default_store")  # noqa: B009
_is_batched: Callable[[Any], bool] = getattr(getattr(torch, "_C"), "_functorch").is_legacy_batchedtensor  # noqa: B009


class PeerError(TpcompileError):
    """Another rank did not take part in a collective."""


def issue(collective: Callable[..., Any], *args: Any, group: dist.ProcessGroup, **options: Any) -> None:
    """``collective(*args, group=group, **options)``; the last of ``args`` is the tensor that is sent.

    Raises:
        PeerError: it failed, with the ranks that are missing.
    """
    try:
        collective(*args, group=group, **options)
    except RuntimeError as error:
        raise _refused(error, args) or explained(error, _called(collective, args), group) from error


T = TypeVar("T")


def begin(result: T, collective: Callable[..., Any], *args: Any, group: dist.ProcessGroup) -> Callable[[], T]:
    """Only start what :func:`issue` runs; the returned function waits for it, and gives ``result`` then."""

    def waited() -> T:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise _refused(error, args) or explained(error, _called(collective, args), group) from error
        return result

    try:
        work = collective(*args, group=group, async_op=True)
    except RuntimeError as error:
        raise _refused(error, args) or explained(error, _called(collective, args), group) from error
    return waited


def _called(collective: Callable[..., Any], args: Sequence[Any]) -> str:
    return f"{collective.__name__} of {list(args[-1].shape)} {args[-1].dtype}"


def _refused(error: RuntimeError, args: Sequence[Any]) -> TpcompileError | None:
    """The error for a collective of many gradients at once, which is no other rank's fault."""
    if not any(map(_is_batched, args)):
        return None
    return TpcompileError(
        "is_grads_batched cannot be used where ranks communicate",
        why=(str(error).splitlines() or ["no reason given"])[0],
        help="use torch.func.jacrev, or torch.func.vmap of what torch.func.vjp returns",
    )


def explained(error: RuntimeError, called: str, group: dist.ProcessGroup) -> PeerError:
    """The error for users of a collective that failed on this rank; takes at most ``ANSWER`` seconds."""
    ranks = dist.get_process_group_ranks(group)
    said = _heard(called, group)
    missing = [rank for rank in ranks if rank not in said]
    reason = (str(error).splitlines() or ["no reason given"])[0]
    if missing:
        names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        return PeerError(
            f"{names} of {len(ranks)} did not take part in {called}",
            why=f"{reason}; what waits here said so, and nothing was heard of {names} for {ANSWER:g} s",
            help=f"look at what {names} printed last: it died, hangs, or runs something else. A rank that hangs is "
            "noticed after the timeout of the process group: init_process_group(timeout=...)",
        )
    rows = [f"rank {rank} waits in {said[rank]}" for rank in ranks]
    return PeerError(
        f"{called} failed on all of its ranks",
        why=f"{reason}; {'; '.join(rows)}",
        help="every rank must make the same calls in the same order: forward, backward, clip_grad_norm_, save",
    )


def store_key(*parts: object) -> str:
    """A key of the store of the process group, of this attempt alone: torchrun may keep one store over restarts."""
    return "/".join(map(str, ("tpcompile", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), *parts)))


def _heard(called: str, group: dist.ProcessGroup) -> dict[int, str]:
    """What every rank of the group says that it waits in; those that do not answer are left out."""
    mine, found = dist.get_rank(), {dist.get_rank(): called}
    deadline = time.monotonic() + ANSWER
    with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it
        store = _default_store()
        store.set(store_key("waits", group.group_name, mine), called)
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != mine]
        while len(found) <= len(others) and time.monotonic() < deadline:
            for rank in others:
                key = store_key("waits", group.group_name, rank)
                if rank not in found and store.check([key]):
                    found[rank] = store.get(key).decode()
            time.sleep(0.05)
    return found


__all__ = ["PeerError", "begin", "issue", "store_key"]
