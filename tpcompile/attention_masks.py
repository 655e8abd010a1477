"""Attention masks while tracing: transformers decides as in eager wherever the values of tensors do not matter.

While traced, `transformers.masking_utils` looks at no value, and so keeps masks that it leaves out otherwise: a dense
causal one in place of ``is_causal=True`` (and with it copies of keys and values in place of ``enable_gqa``), and one
that tells packed sequences apart. Here it may leave them out again, where sizes alone decide, which become guards, and
where the model itself has made position ids as an arange, or a padding mask as ones. Those that are inputs stay in the
graph. Reversible; without these functions in transformers nothing is done. Tried on transformers 5.23 and torch 2.13.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

aten = torch.ops.aten
_SKIPS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")  # (padding mask, sizes...) -> no mask needed
_PACKED = "find_packed_sequence_indices"  # position ids [b, s] -> None where every row is one sequence
_ASKED_IF_TRACING = ("is_torchdynamo_exporting", "is_torchdynamo_compiling", "is_tracing")
_ARANGES = frozenset({aten.arange.default, aten.arange.start})
_VIEWS = frozenset({aten.unsqueeze.default, aten.expand.default, aten.view.default, aten.reshape.default})
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten._to_copy.default})
_ONES = frozenset({aten.ones.default, aten.new_ones.default, aten.ones_like.default})
_PARTS = frozenset({aten.select.int, aten.slice.Tensor})


@contextlib.contextmanager
def as_in_eager(decisions: list[bool], *, again: bool = False) -> Generator[None]:
    """Within it, masks of transformers are left out where eager would, for reasons other than values of inputs.

    Args:
        decisions: per question whether the mask is left out, in the order of the forward; filled.
        again: answer as ``decisions`` say, in a second run of the same forward, at other sizes perhaps. A mask that is
            kept is right at every size, one that is left out at those that the guards allow.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    before = {name: getattr(masks, name) for name in (*_SKIPS, _PACKED) if hasattr(masks, name)}
    earlier = iter(decisions) if again else None

    def skip(original: Callable[..., Any]) -> Callable[..., bool]:
        def decided(*args: Any, **kwargs: Any) -> bool:
            return _decide(decisions, earlier, lambda: _by_sizes(masks, original, args, kwargs))

        return decided

    def packed(position_ids: torch.Tensor) -> torch.Tensor | None:
        one = _decide(decisions, earlier, lambda: _counts_up(position_ids))
        return None if one else before[_PACKED](position_ids)

    try:
        for name, original in before.items():
            setattr(masks, name, packed if name == _PACKED else skip(original))
        yield
    finally:
        for name, original in before.items():
            setattr(masks, name, original)


def _decide(decisions: list[bool], earlier: Iterator[bool] | None, decide: Callable[[], bool]) -> bool:
    if earlier is not None:
        return next(earlier, False)
    decisions.append(decide())
    return decisions[-1]


def _by_sizes(masks: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What ``original`` says of sizes outside a trace; False if it was asked about values.

    A mask that eager makes at these sizes is right at all: only leaving it out is a branch, with guards.
    """
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    padding = given.get("padding_mask")
    if isinstance(padding, torch.Tensor) and _all_true(padding):  # of the model's own making
        given["padding_mask"] = None
        lengths = {_hint(given[name]) for name in ("q_length", "kv_length") if name in given}
        if len(lengths) > 1:  # (with no padding at all, such a mask may be left out)
            return False
    if any(isinstance(value, torch.Tensor) for value in given.values()):
        return False
    with _not_tracing(masks):
        at_sizes = original(**{name: _hint(value) for name, value in given.items()})
        return bool(at_sizes) and bool(original(**given))


@contextlib.contextmanager
def _not_tracing(masks: Any) -> Generator[None]:
    before = {name: getattr(masks, name) for name in _ASKED_IF_TRACING if hasattr(masks, name)}
    try:
        for name in before:
            setattr(masks, name, lambda *_: False)
        yield
    finally:
        for name, original in before.items():
            setattr(masks, name, original)


def _hint(value: Any) -> Any:
    """The size that a symbol had in the example inputs."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def _made_by(tensor: torch.Tensor) -> Any:
    """The node of a traced tensor; None if it was written to, or looks at what was."""
    mode = get_proxy_mode()
    slot: Any = get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    return None if slot is None or tensor._version else slot.proxy.node


def _all_true(mask: torch.Tensor) -> bool:
    """Whether the traced ``mask`` is ones that the model made itself, at all sizes."""
    node = _made_by(mask)
    while isinstance(node, fx.Node) and node.target in _VIEWS | _CASTS:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    return node.target in _ONES or (node.target is aten.full.default and node.args[1] in (1, True))


def _counts_up(positions: torch.Tensor) -> bool:
    """Whether the traced ``positions`` [b, s] are, in every row and at all sizes, an arange of step 1."""
    node = _made_by(positions)
    while isinstance(node, fx.Node) and node.target not in _ARANGES:
        if not _keeps_counting(node):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and not _value(node).dtype.is_floating_point


def _keeps_counting(node: fx.Node) -> bool:
    """Whether rows of a node that count up, count up after it: in its last dim it is what its first argument is."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    given, made = _value(node.args[0]), _value(node)
    if not isinstance(given, torch.Tensor) or not given.dim() or given.dtype is not made.dtype:
        return False
    if node.target is aten.add.Tensor:
        return not node.kwargs and isinstance(_value(node.args[1]), int | torch.SymInt)
    if node.target in _PARTS:
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        return dim % given.dim() != given.dim() - 1 or (node.target is aten.slice.Tensor and _unsliced(given, made))
    return node.target in _VIEWS and _unsliced(given, made)


def _unsliced(given: torch.Tensor, made: torch.Tensor) -> bool:
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in (given.shape[-1], made.shape[-1])]
    return bool(sizes[0] == sizes[1])


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument
