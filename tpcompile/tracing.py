"""Tracing: torch.export run on a model as it is, and everything that is particular about running it.

Parameters are faked, the model is put back as it was, batch and sequence are dynamic, what a trace would lose or get
wrong without a word is refused at the model's own line, and errors are retold in a user's words. With `inlining`,
`captured_json` and `fingerprint` all that touches private parts of torch for capture; tried on torch 2.13.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tpcompile import attention_masks, caches
from tpcompile.autograd_functions import FunctionCall, refuse_functions
from tpcompile.dynamic_sizes import ASKED, Role, SizeEnv, is_image, resized, roles_of
from tpcompile.errors import CaptureError, TpcompileError, Where
from tpcompile.forward_state import generators, refuse_memory, state_of
from tpcompile.size_branches import Guard, branch_guards, calls_of, same_calls
from tpcompile.source_lines import forward_of, location_of, pick, raised_at, source
from tpcompile.untouched import (
    Memos,
    as_buffers,
    example_of,
    fake_tensors,
    home_of,
    identical,
    preserved,
    quiet,
    switch_off_checkpointing,
)
from tpcompile.watched import watched

TRACED = object()  # stands for an output leaf that the graph computes
_Traceable = torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool

Rebuild = Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]  # tensors -> (args, kwargs)


@dataclass
class Trace:
    """One run of torch.export, and what it left behind."""

    env: SizeEnv
    memos: Memos
    examples: list[torch.Tensor]
    asked: list[set[int]]  # per input, the dims that were to be dynamic
    branches: list[tuple[sympy.Basic, bool, Where | None]] = field(default_factory=list)  # of the model's Python code
    outputs: list[Any] = field(default_factory=list)  # per output leaf: `TRACED`, or the constant it is
    masks: list[bool] = field(default_factory=list[bool])  # which attention masks were left out, in order
    functions: list[FunctionCall] = field(default_factory=list)  # calls of torch.autograd.Function classes
    grad_mode: Where | None = None  # where forward asks whether gradients are recorded, and does something else then
    state: set[str] = field(default_factory=lambda: set[str]())  # module attributes that forward sets
    guards: tuple[Guard, ...] = ()
    fallback: Where | None = None  # where dynamic sizes failed, when that is why there are fewer
    program: torch.export.ExportedProgram = field(init=False)
    out_spec: pytree.TreeSpec = field(init=False)

    def inputs(self) -> list[fx.Node]:
        """The placeholders of the exported graph that are the model's inputs."""
        nodes = self.program.graph.find_nodes(op="placeholder")
        specs = self.program.graph_signature.input_specs
        return [node for node, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]

    def dims(self) -> dict[sympy.Symbol, tuple[int, int]]:
        """Which input and dim each symbol was made for."""
        dims: dict[sympy.Symbol, tuple[int, int]] = {}
        for place, symbol in self.env.places.items():
            dims.setdefault(symbol, place)
        return dims

    def ranges(self) -> dict[sympy.Symbol, tuple[int, int]]:
        """Lowest and highest value of the symbols whose range is narrower than the tracer's own assumption (>= 2)."""
        ranges: dict[sympy.Symbol, tuple[int, int]] = {}
        for symbol, limits in self.env.var_to_range.items():
            low = int(limits.lower) if limits.lower.is_Integer and limits.lower > 2 else 0
            high = int(limits.upper) if limits.upper.is_Integer else sys.maxsize
            if (low, high) != (0, sys.maxsize):
                ranges[symbol] = (low, high)
        return ranges

    def conditions(self) -> list[Guard]:
        """What the tracer assumed of sizes of inputs."""
        known = self.dims().keys()
        assumed = [Guard(g.expr, location_of(g.sloc)) for g in self.env.guards]
        return [guard for guard in (*assumed, *self._not_squeezed()) if guard.condition.free_symbols <= known]

    def _not_squeezed(self) -> Iterator[Guard]:
        """``squeeze`` drops a dim of one position, and keeps one of several: then the ops behind it mean other dims."""
        for node in self.program.graph.nodes:
            if node.op != "call_function" or not str(node.target).startswith(("aten.squeeze.", "aten.squeeze_.")):
                continue
            shape = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(shape))
            for dim in (dims if isinstance(dims, Sequence) else [dims]) if shape else []:
                if isinstance(shape[dim], torch.SymInt):
                    yield Guard(sympy.Ne(shape[dim].node.expr, 1), source(node), branch=True)

    def covers(self, examples: Sequence[torch.Tensor]) -> bool:
        """Whether the trace is valid for inputs of these sizes; it may have been made with others."""
        values = {symbol: sympy.Integer(examples[i].shape[dim]) for symbol, (i, dim) in self.dims().items()}
        for node, example in zip(self.inputs(), examples, strict=True):
            for traced, size in zip(node.meta["val"].shape, example.shape, strict=True):
                constant = traced if isinstance(traced, int) else traced.node.expr
                if not isinstance(constant, sympy.Symbol) and constant != size:
                    return False
        return not any(guard.fails(values) for guard in self.guards)

    def fixed_at(self, i: int, dim: int) -> Where | None:
        """The line that made a size constant which was to be dynamic."""
        symbol = self.env.places.get((i, dim))
        return location_of(self.env.replacements_slocs.get(symbol)) if symbol is not None else self.fallback


def trace(
    model: nn.Module,
    examples: list[torch.Tensor],
    paths: list[str],
    rebuild: Rebuild,
    fixed: Collection[tuple[int, int]] = (),
) -> Trace:
    """Export ``model`` with as many dynamic dims as it takes; ``paths`` name the inputs as a caller does.

    Dims (input, dim) that are ``fixed`` stay as in the examples.
    """
    roles = roles_of(examples, paths, bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)))
    stretched = resized(examples, roles)
    every = [
        {d for d in range(example.dim() if not is_image(example, path, roles) else 2) if (i, d) not in fixed}
        for i, (example, path) in enumerate(zip(examples, paths, strict=True))
    ]
    memos = Memos(model)
    asked = [{d for d, role in enumerate(r) if role in ASKED and (i, d) not in fixed} for i, r in enumerate(roles)]
    nothing = [set[int]() for _ in examples]
    static = reason = None
    try:
        found = _traced(model, stretched, every, roles, rebuild, memos)
        if found.covers(examples):
            return found
    except CaptureError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever torch or the model raises)
        reason = raised_at(error)
        with _in_users_words(model):
            static = _traced(model, examples, nothing, roles, rebuild, memos)
    for tensors, dims in ((stretched, asked), (examples, every)):
        with contextlib.suppress(Exception):
            found = _traced(model, tensors, dims, roles, rebuild, memos)
            if found.covers(examples):
                found.asked, found.fallback = asked, reason
                return found
    with _in_users_words(model):
        found = static or _traced(model, examples, nothing, roles, rebuild, memos)
    found.asked, found.fallback = asked, reason
    return found


@contextlib.contextmanager
def _in_users_words(model: nn.Module) -> Generator[None]:
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        raise _explained(error, model) from error


def _traced(
    model: nn.Module,
    examples: list[torch.Tensor],
    dynamic: list[set[int]],
    roles: list[list[Role]],
    rebuild: Rebuild,
    memos: Memos,
) -> Trace:
    env = SizeEnv(roles)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    shapes = tuple(dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in dynamic)
    trace = Trace(env, memos, examples, dynamic)
    tensors = tuple(example_of(example) for example in examples)
    with (
        preserved(model),
        memos.forgotten(),
        quiet(),
        watched(trace),
        torch.enable_grad(),
        tracing(TracingContext(mode)),
    ):
        switch_off_checkpointing(model)
        as_buffers(model)
        fake_tensors(model, mode, lambda tensor: tensor.is_meta or isinstance(tensor, FakeTensor), home_of(examples))
        flat, drawn = _Flat(model, rebuild, trace), generators()
        with attention_masks.as_in_eager(trace.masks):
            dims = (shapes,) if shapes else None
            trace.program = torch.export.export(flat, tensors, dynamic_shapes=dims, strict=False)
    if drawn != generators():
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: its forward draws random numbers that the trace does not see",
            where=forward_of(model),
            why="what Python's random or numpy gives, and what a seed set inside makes of torch's, would be constants",
            help="draw with torch (torch.rand), set no seed there, and decide by torch.where or by an argument",
        )
    refuse_functions(trace.functions)
    refuse_memory(model, trace, rebuild)
    if trace.grad_mode is not None:
        with_gradients, without = (calls_of(model, examples, rebuild, trace, grad=g) for g in (True, False))
        if same_calls(with_gradients, without, 0):
            trace.grad_mode = None
    every = (*branch_guards(model, trace, rebuild), *trace.conditions())
    trace.guards = tuple({guard.condition: guard for guard in every}.values())
    return trace


class _Flat(nn.Module):
    """The model behind a flat signature: tensors in, tensors out; what else it returns is left in ``trace``."""

    def __init__(self, model: nn.Module, rebuild: Rebuild, trace: Trace):
        super().__init__()
        self.wrapped = model
        self._rebuild: Callable[..., Any] = rebuild
        self._trace: Any = trace  # Any: nn.Module says that an attribute is a tensor or a module

    def forward(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        args, kwargs, live = caches.opened(*self._rebuild(flat))
        buffers = [(path, module, dict(module._buffers)) for path, module in self.wrapped.named_modules()]
        state = state_of(self.wrapped)
        leaves, self._trace.out_spec = pytree.tree_flatten(caches.closed(self.wrapped(*args, **kwargs), live))
        for name, held in state_of(self.wrapped).items():
            if not identical(held, state.get(name)):
                self._trace.state.add(name)
        for path, module, before in buffers:
            self._write_back(path, module, before)
        for leaf in leaves:
            if not isinstance(leaf, _Traceable | caches.PLAIN):
                raise CaptureError(
                    f"the model returns a {type(leaf).__name__}, neither a tensor nor a plain value",
                    why="tensors inside it would be lost",
                    help="return tensors in tuples, lists and dicts, or register the class with "
                    "torch.export.register_dataclass",
                )
        self._trace.outputs = [TRACED if isinstance(leaf, _Traceable) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, _Traceable))

    def _write_back(self, path: str, module: nn.Module, before: dict[str, torch.Tensor | None]) -> None:
        """Turn ``self.buffer = value``, which torch.export forgets, into a write to the buffer."""
        for name, now in list(module._buffers.items()):
            own = before.get(name)
            if own is now:
                continue
            if own is None or now is None or own.shape != now.shape or own.dtype != now.dtype:
                self._trace.state.add(f"{path}.{name}" if path else name)
                continue
            with torch.no_grad():
                own.copy_(now)
            module._buffers[name] = own


@contextlib.contextmanager
def original(model: nn.Module) -> Generator[None]:
    """What the model itself raises, outside of a trace, as an error for users: values alone can make it fail there."""
    try:
        yield
    except TpcompileError:
        raise
    except Exception as error:
        frames, here = traceback.extract_tb(error.__traceback__), os.path.dirname(os.path.abspath(__file__))
        below = max(i for i, frame in enumerate(frames) if os.path.dirname(frame.filename) == here)
        raise CaptureError(
            f"{type(model).__name__} itself raised {type(error).__name__} for the example inputs",
            where=pick([(f.filename, f.lineno or 0) for f in frames[below + 1 :]]),
            why=next(iter(str(error).splitlines()), None),
            help="give example inputs that the model takes as it is: token ids below its vocabulary, for instance",
        ) from error


def _explained(error: Exception, model: nn.Module) -> CaptureError:
    """What went wrong while tracing, in a user's words."""
    name, where = type(model).__name__, raised_at(error)
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    match error:
        case GuardOnDataDependentSymNode() | DataDependentOutputException() | DynamicOutputShapeException():
            return CaptureError(
                f"{name} cannot be captured: its forward decides by the value of a tensor",
                where=where,
                why=f"a graph holds tensor ops only, no branch, loop or size that the data choose ({said})",
                help="use torch.where or a mask in place of if, int() or .item(), or pass the decision in",
            )
        case UnsupportedOperatorException():
            return CaptureError(
                f"{name} cannot be captured: an op has no shape function",
                where=where,
                why=said,
                help="register one with torch.library.register_fake",
            )
        case _:
            return CaptureError(
                f"{name} cannot be captured: its forward raised {type(error).__name__}",
                where=where,
                why=said or None,
                help="check that the model runs on these example inputs; numpy, .tolist() and other uses of tensor "
                "values in forward cannot be traced",
            )
