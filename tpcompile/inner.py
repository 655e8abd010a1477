"""The modules inside of a compiled one: they hold what the model's own hold, but their code is in the graph."""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any, NoReturn, cast

from torch import nn

from tpcompile.errors import TpcompileError


class Inner(nn.Module):
    """A module of the model, under its original name. It never runs, so it can neither be called nor hooked."""

    def __init__(self, *contents: Any, path: str = "") -> None:
        super().__init__(*contents)  # which a container has that is a slice of another one
        self._path = path

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise not_callable(self._path)

    def _refuse_hook(self, *_: Any, **__: Any) -> NoReturn:
        raise TpcompileError(
            f"a hook on {self._path or 'this part of a compiled module'} would never run",
            why="its code is part of the graph of the whole, which does not call it",
            help="register the hook on the module that compile returned, or on one of its repeated layers "
            "(tpcompile.layers.Layer); a forward hook that the model has before it is compiled is captured",
        )

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_backward_hook = register_full_backward_hook = register_full_backward_pre_hook = _refuse_hook


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def made_like(kind: type[nn.Module], path: str, original: nn.Module | None) -> nn.Module:
    """An empty ``kind`` for ``path``; a container too where the model's own module is one, with its length and keys."""
    container = next((c for c in CONTAINERS if isinstance(original, c)), None)
    made = cast("Any", kind if container is None else _contained(kind, container))(path=path)
    for name in ("_size", "_keys"):  # of lists and dicts of parameters; those of modules ask their modules
        if container is not None and name in vars(original):
            made.__dict__[name] = copy(vars(original)[name])
    return made


@cache
def _contained(kind: type[nn.Module], container: type[nn.Module]) -> type[nn.Module]:
    return type(container.__name__, (kind, container), {"__module__": kind.__module__})


def not_callable(path: str) -> TpcompileError:
    """What is said to a call of the module at ``path`` by itself."""
    return TpcompileError(
        f"{path or 'a part of a compiled module'} cannot be called by itself",
        why="its code is part of the graph of the whole, and what it computes may be this rank's part",
        help="call the module that compile returned; for a part alone, compile that part of the model",
    )


__all__ = ["Inner", "made_like", "not_callable"]
