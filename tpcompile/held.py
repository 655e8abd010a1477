"""What a compiled module holds when it is called: modes and parameters may be others than its graphs were made for."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from tpcompile.errors import TpcompileError


class _Place(NamedTuple):
    """Where a parameter is looked up, and what is expected there."""

    name: str
    table: dict[str, nn.Parameter | None]
    last: str
    shape: torch.Size
    dtype: torch.dtype


class Held:
    """The modules and parameters of ``root``, found once: all of it is asked in every call.

    Args:
        root: a compiled module.
        names: every name of a parameter -> its canonical name.
        paths: of the modules.
    """

    def __init__(self, root: nn.Module, names: Mapping[str, str], paths: Iterable[str]):
        modules = dict(root.named_modules(remove_duplicate=False))
        self._modules = {path: modules[path] for path in paths}
        self._places: dict[str, _Place] = {}
        for name in names:
            path, _, last = name.rpartition(".")
            table = modules[path]._parameters
            parameter = cast("nn.Parameter", table[last])
            self._places[name] = _Place(name, table, last, parameter.shape, parameter.dtype)
        self._tied = [(self._places[name], self._places[one]) for name, one in names.items() if name != one]

    def modes(self) -> list[bool]:
        """Train or eval, of every module."""
        return [module.training for module in self._modules.values()]

    def modes_of(self, modes: Sequence[bool], paths: Iterable[str]) -> list[bool]:
        """Those of ``paths`` among ``modes`` of all modules."""
        by_path = dict(zip(self._modules, modes, strict=True))
        return [by_path[path] for path in paths]

    def lend_modes(self, model: nn.Module) -> None:
        """Give them to the model that was compiled, and whether parameters are frozen."""
        for path, module in model.named_modules(remove_duplicate=False):
            module.training = self._modules[path].training
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains([name]))

    def take_modes(self, model: nn.Module) -> None:
        """Have those of the model that was compiled."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, module in self._modules.items():
            module.training = modules[path].training

    def trains(self, names: Sequence[str]) -> bool:
        """Whether one of these parameters asks for a gradient now."""
        for name in names:
            place = self._places.get(name)
            now = None if place is None else place.table.get(place.last)
            if now is None or now.requires_grad:  # computed there: it may ask for one
                return True
        return False

    def check(self) -> None:
        """Raise TpcompileError for a parameter of another shape or dtype, or one that is tied no more.

        What is not at its place, as where torch.nn.utils.parametrize computes it, is left to the code that reads it.
        """
        for name, table, last, shape, dtype in self._places.values():
            now = table.get(last)
            if now is None:
                continue
            if now.dtype is not dtype:
                raise TpcompileError(
                    f"parameter {name} is {now.dtype}, and was compiled as {dtype}",
                    why="dtypes are part of the captured graph; a MixedPrecisionPolicy of fully_shard changes them",
                    help="use a policy without param_dtype, and convert the model before it is compiled",
                )
            if now.shape != shape:
                raise TpcompileError(
                    f"parameter {name} has shape {list(now.shape)}, and this rank's part of it has {list(shape)}",
                    why="every rank holds the part of a parameter that its code computes with",
                    help="write the rank's own part into it; for whole weights, load them into the model and compile "
                    "that, or use tpcompile.load or tpcompile.from_pretrained",
                )
        for one, other in self._tied:
            if one.table.get(one.last) is not other.table.get(other.last):
                raise TpcompileError(
                    f"{one.name} and {other.name} were one tied parameter when the model was compiled, and are two now",
                    why="the captured graph reads only one of them",
                    help="assign the same parameter to both names, write into it in place (under torch.no_grad), or "
                    "untie the model before it is compiled",
                )


__all__ = ["Held"]
