"""Tracing a model and leaving it as it was: its tensors are faked for the time, and whatever a trace does is undone."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def home_of(examples: list[torch.Tensor]) -> torch.device:
    """Where a model without weights would be: where its inputs are."""
    return next((x.device for x in examples if not x.is_meta), torch.device("cpu"))


def example_of(example: torch.Tensor) -> torch.Tensor:
    """A tensor object of our own (the caller may pass one tensor twice), real, on a real device."""
    if example.is_meta or isinstance(example, FakeTensor):
        device = "cpu" if example.is_meta else example.device
        return torch.zeros(
            tuple(example.shape), dtype=example.dtype, device=device, requires_grad=example.requires_grad
        )
    example = example.clone() if example.is_inference() else example
    return example.detach().requires_grad_(example.requires_grad)


def fake_tensors(
    model: nn.Module, mode: FakeTensorMode, which: Callable[[torch.Tensor], bool], home: torch.device
) -> None:
    """Give tensors a fake existence, at ``home`` where they are on meta, so that they meet the inputs.

    Undone by `preserved`.
    """
    memo: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            device = home if tensor.is_meta else tensor.device
            with mode:
                fresh = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fresh
        return memo[id(tensor)]

    for module in model.modules():
        tables: list[Any] = [module._parameters, module._buffers]
        for tensors in tables:
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor) and which(value):
                    tensors[name] = fake(value)


def as_buffers(model: nn.Module) -> None:
    """Make tensors that modules hold as plain attributes buffers, which are faked: a trace writes to real ones."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, torch.Tensor):
                del module.__dict__[name]
                module._buffers[name] = value


def switch_off_checkpointing(model: nn.Module) -> None:
    """Turn off Hugging Face's switch; undone by `preserved`."""
    for module in model.modules():
        if module.__dict__.get("gradient_checkpointing") is True:
            module.__dict__["gradient_checkpointing"] = False


@contextlib.contextmanager
def preserved(model: nn.Module) -> Generator[None]:
    """Undo whatever tracing leaves on the modules of ``model``: attributes, flags, registered tensors, containers."""
    tables = [module.__dict__ for module in model.modules()]
    containers = [value for table in tables for value in table.values() if isinstance(value, dict | list)]
    before = [(container, container.copy()) for container in (*tables, *containers)]
    try:
        yield
    finally:
        for container, copy in before:
            if not identical(container, copy):
                container.clear()
                container.extend(copy) if isinstance(container, list) else container.update(copy)


def identical(a: dict[Any, Any] | list[Any], b: dict[Any, Any] | list[Any] | None) -> bool:
    """Whether two containers hold the same objects."""
    if b is None or len(a) != len(b):
        return False
    keys = [list(c) if isinstance(c, dict) else [] for c in (a, b)]
    values = [c.values() if isinstance(c, dict) else c for c in (a, b)]
    return keys[0] == keys[1] and all(x is y for x, y in zip(*values, strict=True))


class Memos:
    """Functions of the model's code under functools.lru_cache: what a trace puts there is fake, and must go again.

    Those in the namespaces of its classes and of their modules, and of what these import as a module.
    """

    def __init__(self, model: nn.Module):
        classes = {cls for module in model.modules() for cls in type(module).__mro__}
        spaces: list[Any] = [vars(cls) for cls in classes] + [vars(module) for module in model.modules()]
        files = {cls.__module__ for cls in classes} & sys.modules.keys()
        modules = {name: sys.modules[name] for name in files}
        for module in list(modules.values()):
            modules |= {x.__name__: x for x in vars(module).values() if isinstance(x, types.ModuleType)}
        spaces += [vars(m) for name, m in modules.items() if name.partition(".")[0] not in _PURE]
        found = {id(x): x for space in spaces for x in space.values() if type(x) is functools._lru_cache_wrapper}
        self._functions = [*found.values()]

    @contextlib.contextmanager
    def forgotten(self) -> Generator[None]:
        """Empty those that were filled while it was open."""
        before = [f.cache_info().misses for f in self._functions]
        try:
            yield
        finally:
            for function, misses in zip(self._functions, before, strict=True):
                if function.cache_info().misses != misses:
                    function.cache_clear()


_PURE = frozenset({"torch", "sympy", "numpy", "math", "functools"})  # whose functions keep no tensors of a model


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Neither warnings nor log lines of torch.export reach the user; what matters becomes a `CaptureError`."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


__all__ = [
    "Memos",
    "as_buffers",
    "example_of",
    "fake_tensors",
    "home_of",
    "identical",
    "preserved",
    "quiet",
    "switch_off_checkpointing",
]
