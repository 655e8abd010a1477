"""What tracing would drop or get wrong without a word: refused at the model's own line, or recorded to be checked."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, cast

import sympy
import torch
import torch.utils._pytree as pytree
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental import sym_node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer
from torch.fx.proxy import TracerBase
from torch.utils.checkpoint import CheckpointFunction

from tpcompile.autograd_functions import FunctionCall, specimen
from tpcompile.errors import CaptureError
from tpcompile.source_lines import TORCH, asked_by_model, current_line, model_frames

if TYPE_CHECKING:
    from tpcompile.tracing import Trace

_SYMBOLS = (str(torch.__file__), str(sym_node.__file__))  # where the methods of SymInt and SymBool are


@contextlib.contextmanager
def watched(trace: Trace) -> Generator[None]:
    """Refuse, at the model's own line, what tracing would drop or get wrong without a word; record its branches."""
    register_hook = torch.Tensor.register_hook
    enter = torch.inference_mode.__enter__
    truth, is_contiguous, is_grad_enabled = torch.SymBool.__bool__, torch.Tensor.is_contiguous, torch.is_grad_enabled
    create_arg = PythonKeyTracer.create_arg
    requires_grad: Any = torch._C.TensorBase.__dict__["requires_grad"]

    def checked_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            raise CaptureError(
                "reentrant activation checkpointing cannot be captured",
                where=current_line(),
                why="its backward re-runs Python code, which a graph does not have",
                help="pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or switch checkpointing off",
            )
        if not cls.__module__.startswith("torch."):
            trace.functions.append(FunctionCall(cls, pytree.tree_map(specimen, args), kwargs, current_line()))
        base: Any = super(_SingleLevelFunction, cast("Any", cls))
        return base.apply(*args, **kwargs)

    def checked_register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        if not sys._getframe(1).f_code.co_filename.startswith(TORCH):
            raise CaptureError(
                "a gradient hook on a tensor inside forward cannot be captured",
                where=current_line(),
                why="hooks belong to the tensors of one call; a graph would lose them",
                help="register the hook on an output after the call, or leave it out",
            )
        return register_hook(tensor, hook)

    def checked_enter(mode: torch.inference_mode) -> Any:
        if mode.mode and (where := current_line()) is not None:
            raise CaptureError(
                "torch.inference_mode inside forward cannot be captured",
                where=where,
                why="the trace does not record it, so gradients would flow where the model stops them",
                help="use torch.no_grad() there",
            )
        return enter(mode)

    def recorded_truth(value: torch.SymBool) -> bool:
        condition, taken = value.node.expr, truth(value)
        if asked_by_model(*_SYMBOLS):
            if condition.free_symbols:
                trace.branches.append((condition, taken, current_line()))
            else:  # sizes are positive, the tracer knows
                unlike(0)
        return taken

    def recorded_layout(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        if asked_by_model(*_SYMBOLS):  # the strides of a dim of one position, or of none, mean nothing
            unlike(0)
            unlike(1)
        return is_contiguous(tensor, *args, **kwargs)

    def unlike(size: int) -> None:
        for symbol in {*trace.env.places.values()}:
            trace.branches.append((sympy.Ne(symbol, size) if size else symbol, True, current_line()))

    def recorded_mode() -> bool:
        if asked_by_model(modules=False):  # (torch's own have fast paths, which compute the same)
            trace.grad_mode = trace.grad_mode or current_line()
        return is_grad_enabled()

    def recorded_requires_grad(tensor: torch.Tensor) -> bool:
        if asked_by_model(modules=False):
            trace.grad_mode = trace.grad_mode or current_line()
        return requires_grad.__get__(tensor)

    def checked_argument(tracer: PythonKeyTracer, value: Any) -> Any:
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        if real and value.requires_grad and not is_functorch_wrapped_tensor(value):
            raise CaptureError(
                "a tensor that requires a gradient, and is no parameter of the model, is used in its forward",
                where=current_line(),
                why="it would be a constant of the graph, and its gradient lost",
                help="make it a parameter of a module (self.w = nn.Parameter(...); nn.ParameterList or nn.ModuleList "
                "in place of a list), or let it require none",
            )
        return create_arg(tracer, value)

    with (
        _patched(PythonKeyTracer, "create_arg", checked_argument),
        _patched(torch.SymBool, "__bool__", recorded_truth),
        _patched(torch.SymBool, "__int__", lambda value: int(bool(value))),
        _patched(torch.SymBool, "__hash__", lambda value: hash(bool(value))),
        _patched(torch.Tensor, "is_contiguous", recorded_layout),
        _patched(torch.Tensor, "requires_grad", property(recorded_requires_grad, requires_grad.__set__)),
        _patched(torch, "is_grad_enabled", recorded_mode),
        _patched(_SingleLevelFunction, "apply", classmethod(checked_apply)),  # (`op = Op.apply` holds that of Function)
        _patched(torch.Tensor, "register_hook", checked_register_hook),
        _patched(torch.inference_mode, "__enter__", checked_enter),
        _patched(TracerBase, "_filter_traceback_frames", model_frames),
    ):
        yield


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Generator[None]:
    inherited = name not in owner.__dict__
    before = getattr(owner, name) if inherited else owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, before)


__all__ = ["watched"]
