"""Branches of a model's Python code on sizes, and the guards on the sizes at which another one would be taken."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tpcompile import attention_masks, caches
from tpcompile.dynamic_sizes import stretched
from tpcompile.errors import Where
from tpcompile.untouched import (
    as_buffers,
    example_of,
    fake_tensors,
    home_of,
    preserved,
    quiet,
    switch_off_checkpointing,
)

if TYPE_CHECKING:
    from tpcompile.tracing import Rebuild, Trace


@dataclass(frozen=True)
class Guard:
    """A condition on input sizes under which the captured graph is the model."""

    condition: sympy.Basic  # over the symbols of the inputs' dims; a symbol by itself: it is not 0
    where: Where | None  # the model's own line that asked
    branch: bool = False  # the model's Python code takes another branch where it does not hold

    def fails(self, values: Mapping[Any, int | sympy.Integer]) -> bool:
        """Whether it does not hold at these sizes; one that divides by zero there does not."""
        try:
            return self.condition.xreplace({s: sympy.Integer(n) for s, n in values.items()}) in (
                sympy.false,
                sympy.Integer(0),
            )
        except ZeroDivisionError:
            return True


EDGES = (1, 0)
"""Sizes that the tracer takes no dynamic dim for."""
TELLING = 13
"""A size whose differences to those are seldom met by chance."""


def branch_guards(model: nn.Module, trace: Trace, rebuild: Rebuild) -> tuple[Guard, ...]:
    """Guards for sizes of 1 and 0: the tracer takes dynamic sizes for at least 2, and decides Python branches by it.

    ``if tokens.shape[1] == 1`` is such a branch. Most are harmless (another branch, the same ops), and refusing size 1
    for all of them would refuse most models, so the model is run on fake tensors, at its example sizes and at size 1:
    where it calls the same functions in the same way, the branch does not matter.
    """
    places: dict[sympy.Basic, list[tuple[int, int]]] = {}
    for place, symbol in trace.env.places.items():
        if isinstance(now := trace.env.replace(symbol), sympy.Symbol):
            places.setdefault(now, []).append(place)
    usual = {symbol: trace.examples[i].shape[dim] for symbol, [(i, dim), *_] in places.items()}

    def called_at(sizes: Mapping[sympy.Basic, int]) -> list[Any] | None:
        resized = list(trace.examples)
        for symbol, size in sizes.items():
            for i, dim in places[symbol]:
                resized[i] = stretched(resized[i], dim, size)
        return calls_of(model, resized, rebuild, trace)

    @functools.cache
    def called(symbols: frozenset[sympy.Basic], size: int) -> list[Any] | None:
        return called_at(usual | dict.fromkeys(symbols, size))

    larger = {symbol: max(size, TELLING) for symbol, size in usual.items()}  # 2 and 1 differ as any numbers do
    if trace.branches and larger != usual and not any(g.fails(larger) for g in trace.conditions()):
        usual, small = larger, usual
        if called(frozenset(), 0) is None:
            usual = small
            called.cache_clear()

    @functools.cache
    def harmless(symbols: frozenset[sympy.Basic], size: int) -> bool:
        step = math.gcd(*(usual[symbol] - size for symbol in symbols))
        return same_calls(called(frozenset(), 0), called(symbols, size), step)

    guards: dict[sympy.Basic, Guard] = {}
    for recorded, taken, where in trace.branches:
        condition = trace.env.replace(recorded)
        symbols = condition.free_symbols
        if not symbols or not symbols <= places.keys():
            continue
        holds = condition if taken else sympy.Not(condition)
        for few in {*(frozenset([symbol]) for symbol in symbols), frozenset(symbols)}:
            for size in EDGES:
                if Guard(holds, where).fails(usual | dict.fromkeys(few, size)) and not harmless(few, size):
                    for kept in [holds] if size else few:
                        guards.setdefault(kept, Guard(kept, where, branch=True))
    return tuple(guards.values())


def same_calls(usual: list[Any] | None, single: list[Any] | None, step: int) -> bool:
    """Whether two runs called the same functions; sizes in their arguments may differ by multiples of ``step``."""
    if usual is None or single is None or len(usual) != len(single):
        return False
    return all(_alike(a, b, step) for a, b in zip(usual, single, strict=True))


def _alike(a: Any, b: Any, step: int) -> bool:
    if a is _EITHER or b is _EITHER:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, slice):
        return all(_alike(x, y, step) for x, y in ((a.start, b.start), (a.stop, b.stop), (a.step, b.step)))
    return a is b or a == b or (type(a) is int and step != 0 and (a - b) % step == 0)


_EITHER = object()  # stands for an argument that changes nothing


class _CallLog(TorchFunctionMode):
    """Every torch function the model calls, with its arguments other than tensors, in one flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(getattr(func, "__name__", func))
        if name not in ("__get__", "size", "dim", "expand", "expand_as"):  # what reads a tensor, or only repeats it
            logged = kwargs or {}
            if name == "scaled_dot_product_attention" and "is_causal" in logged and _one_to_one(*args, **logged):
                logged = {**logged, "is_causal": _EITHER}
            leaves = pytree.tree_leaves((args, logged))
            self.calls += [name, *("tensor" if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)]
        return func(*args, **kwargs or {})


def _one_to_one(query: torch.Tensor, key: torch.Tensor, *_: Any, **kwargs: Any) -> bool:
    """Whether attention is of one query to one key (or of none), which a causal mask leaves as it is."""
    return query.shape[-2] == key.shape[-2] <= 1


def calls_of(
    model: nn.Module, examples: list[torch.Tensor], rebuild: Rebuild, trace: Trace, *, grad: bool = True
) -> list[Any] | None:
    """The calls of one run on fake tensors of exactly these sizes; None where that run fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = _CallLog()
    with preserved(model), trace.memos.forgotten(), quiet(), torch.set_grad_enabled(grad), _compiling_state_context():
        switch_off_checkpointing(model)
        as_buffers(model)
        fake_tensors(model, mode, lambda tensor: True, home_of(examples))
        args, kwargs = rebuild([mode.from_tensor(example_of(example)) for example in examples])
        try:
            with mode, log, attention_masks.as_in_eager(trace.masks, again=True):
                caches.call(model, args, kwargs)
        except Exception:  # noqa: BLE001  (whatever the model raises at a size that it does not take)
            return None
    return log.calls


__all__ = ["EDGES", "Guard", "branch_guards", "calls_of", "same_calls"]
