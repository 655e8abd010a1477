"""Who looks on while the generated code runs: a tracer, an exporter, a transform of torch.func, or autograd alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

is_transformed: Callable[[], bool] = getattr(getattr(torch, "_C"), "_are_functorch_transforms_active")  # noqa: B009
"""Whether this runs inside of a transform of torch.func."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
_PLAIN_OR_FAKE = _PLAIN | {FakeTensor}


def is_traced(x: Tensor) -> bool:
    """Whether x is compiled, or of a kind that records what is done with it (a fake tensor, a subclass)."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no tracer, no tensor of another kind, no transform of torch.func."""
    return _PLAIN.issuperset(map(type, tensors)) and _is_untransformed()


def is_autograd_alone(*tensors: Tensor | None) -> bool:
    """:func:`is_eager`, or the same on fake tensors: who measures a program there finds what eager keeps."""
    return _PLAIN_OR_FAKE.issuperset(map(type, tensors)) and _is_untransformed()


def _is_untransformed() -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not is_transformed()
    )


def is_whole() -> bool:
    """Whether every transition must be whole: one op, or one Function, that who looks on knows how to differentiate."""
    return torch.compiler.is_exporting() or is_differentiated()


def is_differentiated() -> bool:
    """Whether torch.func, or differentiation in forward mode, looks on (what is compiled is traced with them)."""
    return not torch.compiler.is_compiling() and (
        is_transformed() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    )
