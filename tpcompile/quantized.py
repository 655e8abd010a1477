"""Parameters that are made of several tensors, such as torchao's int8 weights, which hold integers and scales.

A graph reads the tensors inside. They are cut like any others, scales with the rows that they are of, once they are
parameters of their own: that is a parametrization, ``NAME.parametrizations.weight.original0``, ``original1``, ...
"""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tpcompile.errors import CaptureError, Where


def refuse_wrapped(model: nn.Module) -> None:
    """Raise CaptureError for a parameter or buffer that holds other tensors."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_traceable_wrapper_subclass(tensor):
            kind = type(tensor)
            help = "compile the model before its parameters are distributed or wrapped"
            if kind.__module__.startswith("torchao"):
                help = "compile torchao.utils.unwrap_tensor_subclass(model): integers and scales are cut alike"
            raise CaptureError(
                f"{name} is a {kind.__name__}, which holds other tensors",
                where=Where(module=name.rpartition(".")[0]),
                why=f"{', '.join(tensor.__tensor_flatten__()[0])} are what is computed with, and would be cut",
                help=help,
            )


__all__ = ["refuse_wrapped"]
