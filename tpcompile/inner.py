"""The modules inside of a compiled one: they hold what the model's own hold, but their code is in the graph."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from tpcompile.errors import TpcompileError


class Inner(nn.Module):
    """A module of the model, under its original name. It never runs, so it can neither be called nor hooked."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
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


def not_callable(path: str) -> TpcompileError:
    """What is said to a call of the module at ``path`` by itself."""
    return TpcompileError(
        f"{path or 'a part of a compiled module'} cannot be called by itself",
        why="its code is part of the graph of the whole, and what it computes may be this rank's part",
        help="call the module that compile returned; for a part alone, compile that part of the model",
    )


__all__ = ["Inner", "not_callable"]
