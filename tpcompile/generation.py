"""``generate`` of transformers on a compiled model: greedy, beams, sampling, encoder-decoders; any cache.

transformers' own loop runs unchanged, on a stand-in of the model: the original class without weights, whose forward is
the compiled one. Every call of it gets a graph of its own kind (prompt, single token) the first time; keys and values
stay where they were made, cut by heads.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from tpcompile.errors import TpcompileError
from tpcompile.groups import group_device

if TYPE_CHECKING:
    from tpcompile.module import TensorParallel

ENCODER = "get_encoder"
"""The part of a model that ``generate`` calls by itself: what this method returns."""


def generate(module: TensorParallel, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the compiled model's class, with all of its arguments. Collective.

    Random numbers are those of the first rank of the group: sampled tokens are the same on all ranks, and those of one
    device with its seed.

    Raises:
        TpcompileError: the model's class has no ``generate``, or the model could not be copied when it was compiled.
    """
    standing_in = stand_in(module)
    _share_random_state(module)
    return standing_in.generate(*args, **kwargs)


def stand_in(module: TensorParallel) -> Any:
    """A model of the original class, without weights, that runs ``module``."""
    original: Any = module.original
    if original is None or not callable(getattr(original, "generate", None)):
        raise TpcompileError(
            "this model cannot generate",
            why="it could not be copied when it was compiled"
            if original is None
            else f"{type(original).__name__} has no generate method",
            help="compile a transformers model with a language head, such as AutoModelForCausalLM makes",
        )
    kind = type(original)

    def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
        return module(*args, **{name: _in_order(value) for name, value in kwargs.items()})

    def encoder(_: Any) -> nn.Module:
        return _Encoder(module, getattr(original, ENCODER)())

    own = {
        "__module__": kind.__module__,
        "forward": _with_signature(forward, kind.forward),
        "device": property(lambda _: next(module.parameters()).device),
        ENCODER: encoder,
    }
    made = object.__new__(type(kind.__name__, (kind,), own))
    made.__dict__ = {**original.__dict__, "training": module.training}
    return made


def _in_order(value: Any) -> Any:
    """Masks by kind of attention come in a dict made from a set, whose order differs between processes."""
    return dict(sorted(value.items())) if type(value) is dict else value


def _with_signature(function: Any, like: Any) -> Any:
    function.__signature__ = inspect.signature(like)
    return functools.wraps(like)(function)


class _Encoder(nn.Module):
    """The encoder of a compiled model, called by itself."""

    def __init__(self, module: TensorParallel, original: nn.Module):
        super().__init__()
        run = functools.partial(module.run_part, ENCODER)
        self.forward = _with_signature(lambda *args, **kwargs: run(args, kwargs), original.forward)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]


def part_of(model: nn.Module, method: str) -> nn.Module:
    """``model`` with its own names and parameters, whose forward is that of the module that ``method`` returns."""
    inner = cast("nn.Module", getattr(model, method)())

    def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    signature = inspect.signature(inner.forward)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    setattr(forward, "__signature__", signature.replace(parameters=[this, *signature.parameters.values()]))  # noqa: B010
    made = object.__new__(type(type(model).__name__, (type(model),), {"forward": forward}))
    made.__dict__ = dict(model.__dict__)
    return made


def _share_random_state(module: TensorParallel) -> None:
    """Give every rank the generator states of the group's first one."""
    device = group_device(module.group)
    on_gpu = next(module.parameters()).is_cuda
    for get, put in (
        (torch.get_rng_state, torch.set_rng_state),
        *([(torch.cuda.get_rng_state, torch.cuda.set_rng_state)] if on_gpu else []),
    ):
        state = get().to(device)
        dist.broadcast(state, group=module.group, group_src=0)
        put(state.cpu())


__all__ = ["ENCODER", "generate", "part_of", "stand_in"]
