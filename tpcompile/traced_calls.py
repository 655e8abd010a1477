"""Calls of a compiled module that torch.compile traces.

Before its graph runs, an eager call is checked with sympy, signatures and caches, which no tracer should see. Here is
the same check as plain Python: every comparison of a size is one that Dynamo understands, and becomes a guard of its
own. It may say no where the eager check says yes, never the other way round.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._sympy.printers import PythonPrinter

from tpcompile.caches import flattened, whole_shape
from tpcompile.capture import Captured, _autocast_state, _same_constant

Accepts = Callable[[tuple[Any, ...], Mapping[str, Any]], "list[torch.Tensor] | None"]
"""The tensors of a call, in placeholder order; None if the graph is not known to be valid for it."""


def accepts(captured: Captured) -> Accepts:
    """`Captured.flatten` for tracers: None where that raises. Nested arguments must be passed as they were captured."""
    holds = sizes_hold(captured)
    slots, in_spec, autocast = captured._slots, captured.in_spec, captured.autocast
    with_gradients = captured.grad_mode is not None
    kinds = [(x.dtype, x.example.device.type, x.example.dim()) for x in captured.inputs]
    tensor_slots = tuple(zip([i for i, slot in enumerate(slots) if slot.tensor], kinds, strict=True))
    constant_slots = tuple((i, slot.value) for i, slot in enumerate(slots) if not slot.tensor)
    signature = captured._signature.parameters.values()
    positional = tuple(p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    flat = all(slot.path.isidentifier() for slot in slots)
    defaults = {p.name: None if p.default is inspect.Parameter.empty else p.default for p in signature}
    known = frozenset(slot.path for slot in slots)
    wanted = tuple((slot.path, defaults.get(slot.path)) for slot in slots)

    def leaves_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        if not flat:
            leaves, spec = flattened((args, dict(kwargs)))
            return leaves if spec == in_spec else None
        if len(args) > len(positional):
            return None
        given = {**dict(zip(positional, args, strict=False)), **kwargs} if args else kwargs
        for name in given:
            if name not in known and not _same_constant(defaults.get(name), given[name]):
                return None
        return [given.get(path, default) for path, default in wanted]

    def check(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
        if _autocast_state() != autocast or (with_gradients and not torch.is_grad_enabled()):
            return None
        leaves = leaves_of(args, kwargs)
        if leaves is None:
            return None
        for i, value in constant_slots:
            if not _same_constant(value, leaves[i]):
                return None
        tensors: list[torch.Tensor] = []
        for i, (dtype, device, dims) in tensor_slots:
            leaf = leaves[i]
            if not isinstance(leaf, torch.Tensor):
                return None
            if leaf.dtype is not dtype or leaf.device.type != device or leaf.dim() != dims:
                return None
            tensors.append(leaf)
        return tensors if holds([tensor.shape if flat else whole_shape(tensor) for tensor in tensors]) else None

    return check


def sizes_hold(captured: Captured) -> Callable[[Sequence[Sequence[int]]], bool]:
    """Whether the graph covers inputs of these shapes, as a Python function of plain comparisons."""
    printer = PythonPrinter()
    names = {symbol: f"size_{i}_{dim}" for symbol, (i, dim) in captured._dims.items()}
    conditions: list[str] = []

    def text(expression: Any) -> str:
        if unknown := expression.free_symbols - names.keys():
            raise ValueError(f"{expression} has {unknown}, which no input gives")
        return printer.doprint(
            expression.xreplace({s: type(s)(names[s], integer=True) for s in expression.free_symbols})
        )

    for i, wanted in enumerate(captured.inputs):
        for dim, size in enumerate(wanted.example.shape):
            expected = text(size.node.expr) if isinstance(size, torch.SymInt) else str(size)
            if expected != f"size_{i}_{dim}":
                conditions.append(f"shapes[{i}][{dim}] == {expected}")
    conditions += [text(guard.condition) for guard in captured.guards]
    for symbol, (low, high) in captured._ranges.items():
        if symbol in names:
            conditions += [f"{low} <= {names[symbol]}"] * (low > 0) + [f"{names[symbol]} <= {high}"] * (high < 2**62)
    lines = [f"    {names[s]} = shapes[{i}][{dim}]" for s, (i, dim) in captured._dims.items()]
    source = "\n".join(
        ["def holds(shapes):", *lines, f"    return {' and '.join(f'({c})' for c in conditions) or True}"]
    )
    space: dict[str, Any] = {"math": math}
    exec(compile(source, "<tpcompile sizes>", "exec"), space)
    return space["holds"]


__all__ = ["Accepts", "accepts", "sizes_hold"]
