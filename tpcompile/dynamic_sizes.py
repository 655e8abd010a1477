"""Sizes that are symbols in a trace: what each dim of the example inputs is for, and which dims share a symbol."""

from __future__ import annotations

import re
import types
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tpcompile import caches
from tpcompile.source_lines import innermost_line

Role = tuple[str, int]  # what a dim is for; dims of one role and one size share a symbol
_BATCH, _SEQUENCE, _DECODER = ("batch", 0), ("sequence", 0), ("sequence", 1)
ASKED = (_BATCH, _SEQUENCE, _DECODER)  # the sizes that users vary from call to call


def roles_of(examples: list[torch.Tensor], paths: list[str], encoder_decoder: bool) -> list[list[Role]]:
    """What each dim is for, by convention: ids and masks ``[b, s]``, hidden states ``[b, s, d]``, the rest by place.

    An encoder and a decoder have sequences of their own, even where the examples happen to be of one length.
    """
    lengths = {example.shape[1] for example in examples if _sequence(example) == 1}
    roles: list[list[Role]] = []
    for example, path in zip(examples, paths, strict=True):
        if path.endswith(caches.COUNTS):
            roles.append([("count", dim) for dim in range(example.dim())])
            continue
        decoder = path.startswith("decoder_") or (encoder_decoder and path == "labels")
        sequence = _DECODER if decoder else _SEQUENCE
        dims: list[Role] = [(f"{example.dim()}d", dim) for dim in range(example.dim())]
        if dims:
            dims[0] = _BATCH
        if (dim := _sequence(example)) is not None:
            dims[dim] = sequence
        elif example.dim() == 1 and example.shape[0] in lengths and example.shape[0] not in _batches(examples):
            dims[0] = sequence  # such as cache_position [s]
        roles.append(dims)
    return roles


def is_image(example: torch.Tensor, path: str, roles: list[list[Role]]) -> bool:
    """Whether dims 2 and up are height and width, which stay static: symbolic, windows and strides of them explode.

    Masks ``[b, 1, s, s]`` and caches ``[b, h, s, d]`` look alike, but come with an input that has the sequence.
    """
    alone = not any(role in (_SEQUENCE, _DECODER) for dims in roles for role in dims)
    return example.dim() >= 4 and example.dtype.is_floating_point and (alone or "pixel" in path or "image" in path)


def _batches(examples: list[torch.Tensor]) -> set[int]:
    return {example.shape[0] for example in examples if example.dim() >= 2}


def _sequence(example: torch.Tensor) -> int | None:
    whole = not example.dtype.is_floating_point and not example.dtype.is_complex
    return 1 if (whole and example.dim() >= 2) or example.dim() == 3 else None


def resized(examples: list[torch.Tensor], roles: list[list[Role]]) -> list[torch.Tensor]:
    """``examples`` with batch and sequences of at least 2, and a batch unlike the other sizes.

    The tracer takes a size of 1 for a constant, and must not take the batch for something else. A size of 1 is
    stretched only where all dims of its role have it: beside a longer one it is broadcast.
    """
    found = list(examples)
    for role in ASKED:
        dims = [(i, dim) for i, own in enumerate(roles) for dim, r in enumerate(own) if r == role]
        if dims and all(found[i].shape[dim] == 1 for i, dim in dims):
            for i, dim in dims:
                found[i] = stretched(found[i], dim, 2 if role == _BATCH else 3)
    batch = [(i, size) for i, example in enumerate(found) for size in example.shape[:1] if roles[i][0] == _BATCH]
    others = {
        size for i, example in enumerate(found) for size, r in zip(example.shape, roles[i], strict=True) if r != _BATCH
    }
    sizes = {size for _, size in batch}
    if len(sizes) == 1 and (size := sizes.pop()) in others and size > 1:
        larger = next(n for n in range(size + 1, size + 2 + len(others)) if n not in others)
        for i, _ in batch:
            found[i] = stretched(found[i], 0, larger)
    return found


def stretched(example: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """``example`` with ``size`` positions of a dim, repeated as often as need be."""
    if size == example.shape[dim]:
        return example
    index = torch.arange(size, device=example.device) % example.shape[dim]
    return example.detach().index_select(dim, index).requires_grad_(example.requires_grad)


class SizeEnv(ShapeEnv):
    """One symbol per role and size; and a size condition is blamed on the model's line, not on torch code below it."""

    def __init__(self, roles: list[list[Role]]):
        super().__init__(tracked_fakes=[], trace_asserts=True)
        self.places: dict[tuple[int, int], sympy.Symbol] = {}
        self._roles = roles
        self._symbols: dict[Role, dict[Any, sympy.Symbol]] = {}

    def create_symbol(
        self, val: Any, source: Any, dynamic_dim: Any = DimDynamic.DUCK, *args: Any, **kwargs: Any
    ) -> Any:
        """As in torch, with dims that `roles_of` takes for the same thing tied where their sizes are equal."""
        place = re.fullmatch(r"L\['flat'\]\[(\d+)\]\.size\(\)\[(\d+)\]", source.name)
        if place is None or dynamic_dim is not DimDynamic.DYNAMIC:
            return super().create_symbol(val, source, dynamic_dim, *args, **kwargs)
        i, dim = int(place[1]), int(place[2])
        self.val_to_var = self._symbols.setdefault(self._roles[i][dim], {})  # what "duck" sizes share a symbol by
        symbol = super().create_symbol(val, source, DimDynamic.DUCK, *args, **kwargs)
        if isinstance(symbol, sympy.Symbol):
            self.places[i, dim] = symbol
        return symbol

    def _get_user_frame(self) -> types.FrameType | None:
        return innermost_line()


__all__ = ["ASKED", "Role", "SizeEnv", "is_image", "resized", "roles_of", "stretched"]
