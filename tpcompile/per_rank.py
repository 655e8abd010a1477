"""A value that differs between ranks, written once.

The rewritten graph is one program for all ranks. Where uneven cuts make an argument differ (a local size, the runs
of a segment), the argument is a ``PerRank`` of one value per mesh rank; binding the program to a rank, or simulating
it, picks that rank's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True, repr=False)
class PerRank:
    """One value for each rank of the mesh, in rank order."""

    values: tuple[object, ...]

    def at(self, rank: int) -> object:
        """The value of ``rank``."""
        return self.values[rank]

    def __repr__(self) -> str:
        return f"PerRank({self.values!r})"


def resolve(args: object, rank: int) -> object:
    """``args`` with every ``PerRank`` replaced by its value at ``rank``, in nested tuples, lists, dicts and slices."""
    match args:
        case PerRank():
            return args.at(rank)
        case tuple():
            return tuple(resolve(item, rank) for item in cast("tuple[object, ...]", args))
        case list():
            return [resolve(item, rank) for item in cast("list[object]", args)]
        case Mapping():
            return {key: resolve(item, rank) for key, item in cast("Mapping[object, object]", args).items()}
        case slice():
            return slice(resolve(args.start, rank), resolve(args.stop, rank), resolve(args.step, rank))
        case _:
            return args
