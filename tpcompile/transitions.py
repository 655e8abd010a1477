"""The table of the transitions between placements: what each one does forward and backward, and what it sends.

A value is Replicate (R: same value everywhere, gradient complete everywhere), R whose gradient is partial (H), Shard
(S) or Partial (P). ``TRANSITIONS`` says, as data, what every transition does in terms of a few linear primitives
(:mod:`tpcompile.primitives`); the functions of :mod:`tpcompile.collectives`, the simulation, the reports and the tests
all read this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Transition:
    """One row of the table: from which state to which, and the linear primitives that do it and its adjoint."""

    name: str
    source: str  # state letter of the operand
    target: str  # state letter of the result
    forward: str  # a key of PRIMITIVES
    backward: str  # a key of PRIMITIVES: the adjoint of forward, given what the states mean
    also_known_as: str


TRANSITIONS: Mapping[str, Transition] = {
    row.name: row
    for row in (
        Transition("copy", "R", "H", "identity", "all_reduce", "Megatron f"),
        Transition("all_reduce", "P", "R", "all_reduce", "identity", "Megatron g"),
        Transition("gather", "S", "R", "all_gather", "cut", "gather the output"),
        Transition("all_gather", "S", "H", "all_gather", "reduce_scatter", "sequence-parallel gather"),
        Transition("scatter", "R", "S", "cut", "all_gather", "scatter"),
        Transition("cut", "H", "S", "cut", "zero_pad", "f then cut"),
        Transition("reduce_scatter", "P", "S", "reduce_scatter", "all_gather", "sequence-parallel scatter"),
        Transition("once", "R", "P", "keep_first", "identity", "add a bias once"),
        Transition("leave", "H", "R", "identity", "keep_first", "leaving a partial-gradient region"),
        Transition("copy_segments", "R", "H", "identity", "all_reduce_runs", "f on replicated segments"),
        Transition("copy_all", "R", "H", "identity", "all_reduce_bucket", "f on parameters, in one bucket"),
    )
}

STATISTICS: Mapping[str, Transition] = {
    "all_reduce_max": Transition(
        "all_reduce_max", "P", "R", "all_reduce_max", "identity", "the maximum that softmax subtracts; no gradient"
    )
}
"""Collectives on values without a gradient, which need no adjoint."""

MESSAGES: Mapping[str, str] = {
    "all_reduce_max": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_runs": "all_reduce",
    "all_reduce_bucket": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}
"""The primitives that communicate, and the collective that each one is."""


def sent_bytes(kind: str, numel_full: int, itemsize: int, ranks: int) -> int:
    """Bytes that one of ``ranks`` sends in a ring collective over ``numel_full`` elements, rounded down.

    ``numel_full`` counts the elements of the reduced tensor, or of the gathered one. An all-reduce of n elements sends
    2n(t-1)/t, an all-gather or a reduce-scatter n(t-1)/t (Patarasuk and Yuan 2009).
    """
    match kind:
        case "all_reduce":
            return 2 * numel_full * (ranks - 1) * itemsize // ranks
        case "all_gather" | "reduce_scatter":
            return numel_full * (ranks - 1) * itemsize // ranks
        case _:
            raise ValueError(f"{kind!r} is not a collective: all_reduce, all_gather or reduce_scatter")


@dataclass(frozen=True)
class Message:
    """What one transition sends in one direction: a ring collective over ``numel`` elements."""

    kind: str
    direction: str  # "forward" or "backward"
    numel: int
    bytes: int  # from each rank


def messages(transition: Transition, numel: int, itemsize: int, ranks: int) -> tuple[Message, ...]:
    """The collectives of ``transition`` over ``numel`` elements, forward then backward; none on one rank.

    ``numel`` counts the gathered tensor for gathers, scatters and cuts; the listed runs for ``copy_segments``; the sum
    over the tensors for ``copy_all``.
    """
    found: list[Message] = []
    for direction, primitive in (("forward", transition.forward), ("backward", transition.backward)):
        kind = MESSAGES.get(primitive)
        if kind is not None and ranks > 1:
            found.append(Message(kind, direction, numel, sent_bytes(kind, numel, itemsize, ranks)))
    return tuple(found)
