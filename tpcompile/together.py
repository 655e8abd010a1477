"""What ranks do together on files: every rank arrives within a time, and one rank's failure is everybody's.

It goes over the store that made the process group, not over collectives, so that a call that only some ranks make ends
with an error that names the others, whatever the backend.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.failures import store_key
from tpcompile.groups import resolve_group

_rounds: Counter[str] = Counter()  # how many times each kind of meeting was held


def exchange(what: str, value: str, timeout: float) -> list[str]:
    """What every rank of the default process group brings, by rank; the n-th call of a rank meets the n-th of others.

    Raises:
        RuntimeMismatchError: some ranks did not come within ``timeout`` seconds; it names them.
    """
    resolve_group(None)
    store = distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    mine, count = dist.get_rank(), dist.get_world_size()
    number = _rounds[what]
    keys = [store_key(what, number, rank) for rank in range(count)]
    store.set(keys[mine], value)
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            store.delete_key(keys[mine])
            raise RuntimeMismatchError(
                f"{what}: {_ranks(missing)} did not come within {timeout:g} s",
                why=f"all {count} ranks of the process group call it together; rank {mine} waited",
                help="call it on every rank, not only where the rank is 0; or give a larger timeout",
            ) from error
    found = [store.get(key).decode() for key in keys]
    if number:  # whoever has come to this round has read the one before
        store.delete_key(store_key(what, number - 1, mine))
    _rounds[what] += 1
    return found


def all_do(what: str, action: Callable[[], Any], timeout: float) -> list[Any]:
    """Results of ``action`` (as JSON) of every rank. If it raises on some rank, every rank raises.

    Raises:
        TpcompileError: ``action``'s own on the ranks where it failed, one that repeats it on the others.
        RuntimeMismatchError: see :func:`exchange`.
    """
    failed: Exception | None = None
    try:
        brought = {"result": action()}
    except Exception as error:  # noqa: BLE001  the others must hear of it, whatever it is
        failed = error
        brought = {"error": error.render() if isinstance(error, TpcompileError) else f"{type(error).__name__}: {error}"}
    found = [json.loads(text) for text in exchange(what, json.dumps(brought), timeout)]
    if failed is not None:
        raise failed
    bad = {rank: other["error"] for rank, other in enumerate(found) if "error" in other}
    if bad:
        raise TpcompileError(f"{what}: {_ranks([*bad])} failed", why=next(iter(bad.values())))
    return [other["result"] for other in found]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


__all__ = ["all_do", "exchange"]
