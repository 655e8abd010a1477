"""Caches of keys, values and states: Python objects that a forward changes become tensors that go in and come out.

A cache of transformers (dynamic, static, with sliding windows, of encoder-decoders, of state-space layers) is taken
apart into its tensors and the rest, its shell. A graph has the tensors as inputs and, after the call, as outputs. What
a cache counts as a Python number (tokens seen) goes in as the length of a tensor, so that it may differ from call to
call. Between calls a rank holds its own part of every tensor: heads are cut as the layers that made them are.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree

from tpcompile.layout import Layout, size

COUNTS = ("cumulative_length", "cumulative_length_int")
"""Attributes of cache layers that count tokens in Python."""
_DERIVED = "batch_size"  # of a static layer: that of its keys
_PLAIN = (torch.Tensor, bool, int, float, str)  # what is neither a cache nor holds one
_CUT = "tensor_parallel_cut"  # attribute of a tensor or a layer: which dims are cut, and how

PLAIN = bool | int | float | complex | str | torch.dtype | torch.device | torch.memory_format | torch.layout | None
"""What a call may hold beside tensors: a constant of its graph."""

Path = tuple[str | int, ...]
Cut = Mapping[int, Layout]
"""Of a tensor of which this rank holds a part: the dims that are cut. The layout's size is that of the whole."""


@dataclass(frozen=True, eq=False)
class Shell:
    """A cache without its tensors; equal to another if a graph captured with one is valid for the other."""

    kind: type
    template: Any  # the cache with None in place of every leaf
    leaves: tuple[Path, ...]
    constants: Mapping[Path, Any]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shell) or (self.kind, self.leaves) != (other.kind, other.leaves):
            return False
        return self.constants.keys() == other.constants.keys() and all(
            type(a) is type(b) and a == b for a, b in ((v, other.constants[k]) for k, v in self.constants.items())
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.leaves))

    def __repr__(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True, eq=False)
class Packed:
    """A cache as a node of a pytree: its tensors are the leaves, its shell the context."""

    tensors: tuple[Any, ...]
    shell: Shell


@dataclass(frozen=True, eq=False)
class Changed:
    """What a call returns that was given caches: its result, and the caches as it left them."""

    result: Any
    caches: tuple[Packed, ...]


@dataclass(frozen=True)
class Given:
    """In a result, stands for a cache that the call was given."""

    index: int


def _key(path: Path) -> tuple[Any, ...]:
    return tuple(pytree.SequenceKey(p) if isinstance(p, int) else pytree.GetAttrKey(p) for p in path)


class _LeafKey:
    """The way to one tensor of a cache, as messages say it: ``.layers[0].keys``."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return pytree.keystr(_key(self.path))


pytree.register_pytree_node(
    Packed,
    lambda packed: (list(packed.tensors), packed.shell),
    lambda tensors, shell: Packed(tuple(tensors), cast("Shell", shell)),
    serialized_type_name="tpcompile.Packed",
    to_dumpable_context=repr,
    from_dumpable_context=lambda _: None,
    flatten_with_keys_fn=lambda packed: (
        [(_LeafKey(p), x) for p, x in zip(packed.shell.leaves, packed.tensors, strict=True)],  # pyright: ignore[reportArgumentType]
        packed.shell,
    ),
)
pytree.register_pytree_node(
    Changed,
    lambda changed: ([changed.result, list(changed.caches)], None),
    lambda parts, _: Changed((whole := list(parts))[0], tuple(whole[1])),
    serialized_type_name="tpcompile.Changed",
)
pytree.register_pytree_node(
    Given,
    lambda given: ([], given.index),
    lambda _, index: Given(cast("int", index)),
    serialized_type_name="tpcompile.Given",
)


# ------------------------------------------------------------------------------------------------ whole and local
def cut_of(tensor: Any) -> Cut:
    """The dims of a cache's tensor of which this rank holds a part; empty for whole tensors."""
    return getattr(tensor, _CUT, {})


def mark_cut(tensor: torch.Tensor, cut: Cut) -> None:
    """Say that ``tensor`` is one rank's part."""
    if cut:
        setattr(tensor, _CUT, cut)


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape on one device."""
    if not (cut := cut_of(tensor)):
        return tensor.shape
    return torch.Size(size(cut[d]) if d in cut else n for d, n in enumerate(tensor.shape))


def whole_example(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like the whole one, without its values or its memory."""
    return tensor.detach().new_empty(()).expand(whole_shape(tensor)) if cut_of(tensor) else tensor


# ------------------------------------------------------------------------------------------------ apart and together
def _is(value: Any, *names: str) -> bool:
    module = sys.modules.get("transformers.cache_utils")
    kinds = tuple(kind for name in names if (kind := getattr(module, name, None)) is not None)
    return isinstance(value, kinds)


def is_cache(value: Any) -> bool:
    """Whether it is a cache that can be taken apart."""
    return _is(value, "Cache")


def _is_layer(value: Any) -> bool:
    return _is(value, "CacheLayerMixin", "LinearAttentionCacheLayerMixin")


def _is_leaf(path: Path, value: Any) -> bool:
    counted = path[-1] in COUNTS and isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, torch.Tensor | torch.SymInt) or counted


def _rebuilt(value: Any, path: Path, leaf: Callable[[Path, Any], Any]) -> Any:
    """A copy of a cache, or of what is in it, with ``leaf(path, x)`` in place of everything that holds nothing more."""
    if is_cache(value) or _is_layer(value):
        made = object.__new__(type(value))
        made.__dict__ = {
            name: _rebuilt(x, (*path, name), leaf) for name, x in vars(value).items() if name not in (_CUT, _DERIVED)
        }
        return made
    if isinstance(value, list):
        return [_rebuilt(x, (*path, i), leaf) for i, x in enumerate(cast("list[Any]", value))]
    if isinstance(value, dict):
        return {k: _rebuilt(x, (*path, k), leaf) for k, x in cast("dict[Any, Any]", value).items()}
    return leaf(path, value)


def pack(cache: Any) -> Packed:
    """A cache's tensors and its shell. Counts that are numbers become tensors of that length."""
    found: dict[Path, Any] = {}
    constants: dict[Path, Any] = {}

    def take(path: Path, value: Any) -> Any:
        if not _is_leaf(path, value):
            constants[path] = value
            return value
        found[path] = torch.zeros(()).expand(value) if isinstance(value, int) else value
        return None

    template = _rebuilt(cache, (), take)
    for path, tensor in found.items():
        if isinstance(tensor, torch.Tensor) and (cut := _marks(cache, path)):
            mark_cut(tensor, cut)
    return Packed(tuple(found.values()), Shell(type(cache), template, tuple(found), constants))


def _marks(cache: Any, path: Path) -> Cut:
    """What the layer that holds a tensor says of how it is cut."""
    holder, found = cache, {}
    for depth, step in enumerate(path):
        if _is_layer(holder):
            found = vars(holder).get(_CUT, {}).get(path[depth:], {})
        holder = vars(holder)[step] if is_cache(holder) or _is_layer(holder) else holder[step]
    return found


def open_cache(packed: Packed) -> Any:
    """The cache of its parts. Counts are the lengths of their tensors, or the numbers that a graph returned."""
    values = dict(zip(packed.shell.leaves, packed.tensors, strict=True))

    def put(path: Path, value: Any) -> Any:
        if path not in values:
            return value
        found = values[path]
        counted = path[-1] in COUNTS and isinstance(found, torch.Tensor) and found.dim() == 1
        return found.shape[0] if counted else found

    made = _rebuilt(packed.shell.template, (), put)
    for layer in _layers(made):
        keys = vars(layer).get("keys")
        if "num_heads" in vars(layer) and isinstance(keys, torch.Tensor):
            setattr(layer, _DERIVED, keys.shape[0])
    for path, tensor in values.items():
        if cut := cut_of(tensor):
            holder, depth = made, 0
            while not _is_layer(holder):
                step = path[depth]
                holder, depth = (vars(holder)[step] if is_cache(holder) else holder[step]), depth + 1
            vars(holder).setdefault(_CUT, {})[path[depth:]] = cut
    return made


def _layers(cache: Any) -> list[Any]:
    inside = [vars(cache).get(name) for name in ("self_attention_cache", "cross_attention_cache")]
    return [*vars(cache).get("layers", ()), *(x for c in inside if c is not None for x in _layers(c))]


def _write(live: Any, new: Any) -> None:
    """Give a cache the contents of another, in place: whoever holds it, or one of its layers, sees the change."""
    old = dict(vars(live))
    vars(live).clear()
    vars(live).update(vars(new))
    for name, value in vars(new).items():
        before = old.get(name)
        if is_cache(value) and is_cache(before):
            _write(before, value)
            setattr(live, name, before)
        elif isinstance(value, list) and isinstance(before, list):
            for i, (a, b) in enumerate(zip(cast("list[Any]", before), cast("list[Any]", value), strict=False)):
                if _is_layer(a) and type(a) is type(b):
                    _write(a, b)
                    value[i] = a
            before[:] = value
            setattr(live, name, before)


# ------------------------------------------------------------------------------------------------ calls
def packed(value: Any) -> Any:
    """Any nested value with its caches taken apart."""
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_cache)
    if not any(map(is_cache, leaves)):
        return value
    return pytree.tree_unflatten([pack(x) if is_cache(x) else x for x in leaves], spec)


def flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """``pytree.tree_flatten``, with caches of transformers taken apart."""
    return pytree.tree_flatten(packed(value))


def taken_apart(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any], list[Any]]:
    """The arguments of a call with its caches taken apart; and these caches, in order."""
    if all(value is None or isinstance(value, _PLAIN) for value in (*args, *kwargs.values())):
        return args, kwargs, []
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
    live = [x for x in leaves if is_cache(x)]
    if not live:
        return args, kwargs, []
    return *pytree.tree_unflatten([pack(x) if is_cache(x) else x for x in leaves], spec), live


def _is_packed(value: Any) -> bool:
    return isinstance(value, Packed)


def opened(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
    """The arguments with copies of their caches, put together if they are apart; and these copies."""
    leaves, spec = pytree.tree_flatten(packed((tuple(args), dict(kwargs))), is_leaf=_is_packed)
    leaves = [open_cache(_own_memory(x)) if _is_packed(x) else x for x in leaves]
    return *pytree.tree_unflatten(leaves, spec), [x for x in leaves if is_cache(x)]


def closed(result: Any, live: Sequence[Any]) -> Any:
    """The result of a call with caches taken apart; with those that it was given, ``live``, as it left them."""
    index = {id(x): i for i, x in enumerate(live)}
    leaves, spec = pytree.tree_flatten(result, is_leaf=is_cache)
    leaves = [x if not is_cache(x) else Given(index[id(x)]) if id(x) in index else pack(x) for x in leaves]
    result = pytree.tree_unflatten(leaves, spec)
    return Changed(result, tuple(map(pack, live))) if live else result


def call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``function``'s result as a pytree of plain values; caches that it is given stay as they are."""
    args, kwargs, live = opened(args, kwargs)
    return closed(function(*args, **kwargs), live)


def leaves(result: Any) -> list[Any]:
    """What :func:`call` returned, flat, as a graph returns it: counts are numbers."""
    found: list[Any] = []
    for x in pytree.tree_leaves(result, is_leaf=_is_packed):
        if not _is_packed(x):
            found.append(x)
            continue
        for path, tensor in zip(x.shell.leaves, x.tensors, strict=True):
            counted = path[-1] in COUNTS and isinstance(tensor, torch.Tensor) and tensor.dim() == 1
            found.append(tensor.shape[0] if counted else tensor)
    return found


def _own_memory(cache: Packed) -> Packed:
    """Copies of the tensors that layers write into; growing ones only concatenate."""
    grows = all(_is(x, "DynamicLayer") and not _is(x, "LinearAttentionLayer") for x in _layers(cache.shell.template))
    counts = [path[-1] in COUNTS and x.dim() == 1 for path, x in zip(cache.shell.leaves, cache.tensors, strict=True)]
    copied = [x if grows or n else x.clone() for x, n in zip(cache.tensors, counts, strict=True)]
    return Packed(tuple(copied), cache.shell)


def returned(value: Any, live: Sequence[Any] = ()) -> Any:
    """The result of a call with caches as objects; those in ``live``, that it was given, take what became of them."""
    if isinstance(value, Changed):
        states = [open_cache(x) for x in value.caches]
        for cache, state in zip(live, states, strict=False):
            _write(cache, state)
        value, live = value.result, live or states
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda x: isinstance(x, Packed | Given))
    if not any(isinstance(x, Packed | Given) for x in leaves):
        return value
    opened = [open_cache(x) if _is_packed(x) else live[x.index] if isinstance(x, Given) else x for x in leaves]
    return pytree.tree_unflatten(opened, spec)


def restores(spec: pytree.TreeSpec) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """From the flat outputs of a call to its result, as :func:`returned` gives it; ``spec`` is looked through once."""
    parts = (Packed, Given, Changed)
    sample = pytree.tree_unflatten(range(spec.num_leaves), spec)
    if any(isinstance(x, parts) for x in pytree.tree_leaves(sample, is_leaf=lambda x: isinstance(x, parts))):
        return lambda outputs, live: returned(pytree.tree_unflatten(list(outputs), spec), live)
    if (filled := _filled(sample)) is not None:
        return lambda outputs, live: filled(outputs)
    return lambda outputs, live: pytree.tree_unflatten(list(outputs), spec)


def _filled(sample: Any) -> Callable[[Sequence[Any]], Any] | None:
    """What makes an output like ``sample``, which holds 0, 1, ... at its top level, without its class's checks.

    Transformers' outputs are dicts whose items are attributes, too, and look at themselves for as long as three
    kernels take, whenever one is made. None if the class does more than that.
    """
    kind: Any = type(sample)
    if not isinstance(sample, OrderedDict) or [*sample.values()] != [*range(len(sample))]:
        return None
    names, attributes = [*sample], dict(vars(sample))

    def filled(outputs: Sequence[Any]) -> Any:
        made = kind.__new__(kind)
        found = vars(made)
        found.update(attributes)
        for name, value in zip(names, outputs, strict=False):
            OrderedDict.__setitem__(made, name, value)
            if name in attributes:
                found[name] = value
        return made

    try:
        made = filled(range(len(sample)))
        return filled if (list(made.items()), vars(made)) == (list(sample.items()), vars(sample)) else None
    except Exception:  # noqa: BLE001  whatever a class of its own does
        return None


def shells(arguments: Mapping[str, Any]) -> dict[str, Shell]:
    """The shells of the caches among a call's arguments, by where they are."""
    found: dict[str, Shell] = {}
    for name, value in arguments.items():
        inside = pytree.tree_leaves(packed(value), is_leaf=_is_packed)
        found |= {f"{name}[{i}]" if i else name: x.shell for i, x in enumerate(inside) if _is_packed(x)}
    return found


def resident(value: Any) -> frozenset[Any]:
    """The leaves of a call's result (:func:`call`) that belong to caches."""
    found = pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, Packed))
    return frozenset(x for cache in found if isinstance(cache, Packed) for x in cache.tensors)


__all__ = [
    "COUNTS",
    "PLAIN",
    "Changed",
    "Cut",
    "Packed",
    "call",
    "closed",
    "cut_of",
    "flattened",
    "is_cache",
    "leaves",
    "mark_cut",
    "opened",
    "packed",
    "resident",
    "restores",
    "returned",
    "shells",
    "taken_apart",
    "whole_example",
    "whole_shape",
]
