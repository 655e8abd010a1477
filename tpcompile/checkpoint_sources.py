"""Which tensors of a checkpoint's files are which parameter of a model: what transformers' own mapping says.

Names are changed as transformers changes them. Where it stacks or concatenates several tensors into one parameter
(experts that are stored one by one), that is a ``Merged`` tensor, read in parts like the others; where it does anything
else to them, the model is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcompile.checkpoint_files import Files, Merged, Stored
from tpcompile.errors import TpcompileError
from tpcompile.inlining import Names

Sources = Mapping[str, tuple[Stored, ...]]
"""From the canonical name of a parameter or buffer to the tensors in the files that hold it (one, or tied copies)."""
Blocks = list[tuple[tuple[int, ...], Stored]]


def sources_of(model: nn.Module, files: Files, directory: Path) -> Sources:
    """Where every parameter and persistent buffer of ``model`` is in the files.

    Raises:
        TpcompileError: see :func:`tpcompile.from_pretrained`.
    """
    state = {n: x for n, x in model.state_dict(keep_vars=True).items() if isinstance(x, torch.Tensor)}
    aliases = Names.of(model).aliases
    renamed, order = _renaming(model, state)
    found: dict[str, dict[str, Stored]] = {}
    parts: dict[str, tuple[Any, dict[str, list[Stored]]]] = {}

    def add(name: str, stored: Stored) -> None:
        copies = found.setdefault(aliases[name], {})
        if name in copies:
            raise TpcompileError(f"{stored} is {name}", why=f"so is tensor {copies[name].name}")
        copies[name] = stored
        _check_kind(stored, name, state[name])

    for key, stored in sorted(files.tensors.items(), key=lambda item: order(item[0])):
        name, converter, pattern = renamed(key)
        if name not in state:
            continue
        if converter is None:
            add(name, stored)
        else:
            _check_dtype(stored, name, state[name])
            parts.setdefault(name, (converter, {}))[1].setdefault(pattern, []).append(stored)
    for name, (converter, collected) in parts.items():
        add(name, merged(name, converter, collected))
    ignored = keys_pattern(model, "_keys_to_ignore_on_load_missing")
    for name, tensor in state.items():
        optional = not isinstance(tensor, nn.Parameter) and ignored is not None and ignored.search(name)
        if aliases[name] not in found and not optional:
            raise TpcompileError(
                f"{directory}: tensor {name} is missing",
                why=f"{type(model).__name__} has this {'parameter' if isinstance(tensor, nn.Parameter) else 'buffer'}, "
                f"and the files ({', '.join(sorted({s.path.name for s in files.tensors.values()}))}) have it under no "
                "name that transformers knows",
                help='save the class that is to be loaded, or name the class of the files in "architectures" of '
                "config.json",
            )
    return {name: tuple(copies.values()) for name, copies in found.items()}


Renamed = Callable[[str], tuple[str, Any, str]]


def _renaming(model: Any, state: Mapping[str, Any]) -> tuple[Renamed, Callable[[str], Any]]:
    """From a tensor's name in the files to its name in the model, as transformers has it, and the WeightConverter that
    does more than rename it, or None, with the pattern that the name fits; and the order in which it collects them."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    conversions: Any = importlib.import_module("transformers.conversion_mapping")
    steps = conversions.get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def renamed(key: str) -> tuple[str, Any, str]:
        name, pattern = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = loading.rename_source_key(key, [], [], model.base_model_prefix, state)
        return name, by_pattern.get(pattern), pattern or ""

    return renamed, loading.dot_natural_key


def merged(name: str, converter: Any, collected: Mapping[str, Sequence[Stored]]) -> Merged:
    """The tensor that transformers stacks and concatenates of those that it has collected, by pattern.

    Raises:
        TpcompileError: it does something else to them, or their shapes do not fit together.
    """
    first = next(iter(collected.values()))[0]
    blocks: dict[str, list[Blocks]] = {p: [[((0,) * len(x.shape), x)] for x in xs] for p, xs in collected.items()}
    kinds = [type(step).__name__ for step in converter.operations]
    if set(kinds) - {"MergeModulelist", "Concatenate"} or len(converter.target_patterns) > 1:
        raise TpcompileError(
            f"{first} is only a part of {name}, or is computed with others",
            why=f"transformers does this to such tensors when it loads them: {', '.join(kinds)}",
            help="load the model with transformers and pass it to tpcompile.compile",
        )
    for kind, step in zip(kinds, converter.operations, strict=True):
        if kind == "MergeModulelist":
            blocks = {p: [_joined(name, [_unsqueezed(b, step.dim) for b in xs], step.dim)] for p, xs in blocks.items()}
        else:
            listed = [b for pattern in converter.source_patterns for b in blocks.get(pattern, [])]
            blocks = {"": [_joined(name, listed, step.dim)]}
    (found,) = (whole for (whole,) in blocks.values())
    return Merged(first.name, first.path, first.dtype, _shape(found), first.offset, tuple(found))


def _shape(blocks: Blocks) -> tuple[int, ...]:
    return tuple(max(b[d] + x.shape[d] for b, x in blocks) for d in range(len(blocks[0][0])))


def _unsqueezed(blocks: Blocks, dim: int) -> Blocks:
    """With a dim of one more: the same bytes."""
    return [
        ((*begin[:dim], 0, *begin[dim:]), replace(x, shape=(*x.shape[:dim], 1, *x.shape[dim:]))) for begin, x in blocks
    ]


def _joined(name: str, parts: Sequence[Blocks], dim: int) -> Blocks:
    """One after the other along a dim."""
    found: Blocks = []
    at = 0
    for part in parts:
        shape, first = _shape(part), _shape(parts[0])
        if (*shape[:dim], *shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]):
            raise TpcompileError(
                f"{part[0][1]} has shape {list(part[0][1].shape)}, and {parts[0][0][1].name} has another",
                why=f"{name} is made of both",
                help="download or save the whole directory again",
            )
        found += [((*begin[:dim], begin[dim] + at, *begin[dim + 1 :]), x) for begin, x in part]
        at += shape[dim]
    return found


def _check_kind(stored: Stored, name: str, wanted: torch.Tensor) -> None:
    if stored.shape != tuple(wanted.shape):
        raise TpcompileError(
            f"{stored} has shape {list(stored.shape)}, and {name} {list(wanted.shape)}",
            why="config.json and the files do not belong together",
            help="download or save the whole directory again",
        )
    _check_dtype(stored, name, wanted)


def _check_dtype(stored: Stored, name: str, wanted: torch.Tensor) -> None:
    if stored.dtype != wanted.dtype and not (stored.dtype.is_floating_point and wanted.dtype.is_floating_point):
        raise TpcompileError(
            f"{stored} is {stored.dtype}, and {name} {wanted.dtype}",
            why="only floating-point numbers are converted to other ones",
            help="quantized weights must be dequantized and saved again",
        )


def keys_pattern(model: nn.Module, attribute: str, *others: str) -> re.Pattern[str] | None:
    """The patterns that an attribute of the model's class lists, or None if it lists none."""
    patterns = [*(getattr(model, attribute, None) or ()), *others]
    return re.compile("|".join(f"(?:{p})" for p in patterns)) if patterns else None


__all__ = ["Sources", "keys_pattern", "merged", "sources_of"]
