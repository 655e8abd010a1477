"""Tracing: torch.export run on a model as it is, and everything that is particular about running it.

Parameters are faked, the model is put back as it was, batch and sequence are dynamic, what a trace would lose or get
wrong without a word is refused at the model's own line, and errors are retold in a user's words. With `inlining`,
`captured_json` and `fingerprint` all that touches private parts of torch for capture; tried on torch 2.13.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import logging
import math
import os
import random
import re
import site
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.function import _SingleLevelFunction
from torch.export.graph_signature import InputKind
from torch.fx.experimental import sym_node
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.proxy import TracerBase
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from tpcompile import attention_masks, caches
from tpcompile.errors import CaptureError, TpcompileError, Where

PLAIN = bool | int | float | complex | str | torch.dtype | torch.device | torch.memory_format | torch.layout | None
TRACED = object()  # stands for an output leaf that the graph computes
_Traceable = torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool

Rebuild = Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]  # tensors -> (args, kwargs)


@dataclass(frozen=True)
class Guard:
    """A condition on input sizes under which the captured graph is the model."""

    condition: sympy.Basic  # over the symbols of the inputs' dims; a symbol by itself: it is not 0
    where: Where | None  # the model's own line that asked
    branch: bool = False  # the model's Python code takes another branch where it does not hold

    def fails(self, values: Mapping[sympy.Symbol, Any]) -> bool:
        """Whether it does not hold at these sizes; one that divides by zero there does not."""
        try:
            return self.condition.xreplace(dict(values)) in (sympy.false, sympy.Integer(0))
        except ZeroDivisionError:
            return True


@dataclass
class Trace:
    """One run of torch.export, and what it left behind."""

    env: SizeEnv
    examples: list[torch.Tensor]
    asked: list[set[int]]  # per input, the dims that were to be dynamic
    branches: list[tuple[sympy.Basic, bool, Where | None]] = field(default_factory=list)  # of the model's Python code
    outputs: list[Any] = field(default_factory=list)  # per output leaf: `TRACED`, or the constant it is
    masks: list[bool] = field(default_factory=list[bool])  # which attention masks were left out, in order
    functions: list[_FunctionCall] = field(default_factory=list)  # calls of torch.autograd.Function classes
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
        return _location(self.env.replacements_slocs.get(symbol)) if symbol is not None else self.fallback


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
    roles = _roles(examples, paths, bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)))
    resized = _resized(examples, roles)
    every = [
        {d for d in range(example.dim() if not _is_image(example, path, roles) else 2) if (i, d) not in fixed}
        for i, (example, path) in enumerate(zip(examples, paths, strict=True))
    ]
    asked = [{d for d, role in enumerate(r) if role in _ASKED and (i, d) not in fixed} for i, r in enumerate(roles)]
    nothing = [set[int]() for _ in examples]
    static = reason = None
    try:
        found = _traced(model, resized, every, roles, rebuild)
        if found.covers(examples):
            return found
    except CaptureError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever torch or the model raises)
        reason = _raised_at(error)
        static = _traced_or_explained(model, examples, nothing, roles, rebuild)
    for tensors, dims in ((resized, asked), (examples, every)):
        with contextlib.suppress(Exception):
            found = _traced(model, tensors, dims, roles, rebuild)
            if found.covers(examples):
                found.asked, found.fallback = asked, reason
                return found
    found = static or _traced_or_explained(model, examples, nothing, roles, rebuild)
    found.asked, found.fallback = asked, reason
    return found


def _traced_or_explained(
    model: nn.Module, examples: list[torch.Tensor], dynamic: list[set[int]], roles: list[list[_Role]], rebuild: Rebuild
) -> Trace:
    try:
        return _traced(model, examples, dynamic, roles, rebuild)
    except CaptureError:
        raise
    except Exception as error:
        raise _explained(error, model) from error


def _traced(
    model: nn.Module, examples: list[torch.Tensor], dynamic: list[set[int]], roles: list[list[_Role]], rebuild: Rebuild
) -> Trace:
    env = SizeEnv(roles)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    shapes = tuple(dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in dynamic)
    trace = Trace(env, examples, dynamic)
    tensors = tuple(_example(example) for example in examples)
    with _preserved(model), quiet(), _watched(trace), torch.enable_grad(), tracing(TracingContext(mode)):
        _switch_off_checkpointing(model)
        _as_buffers(model)
        _fake(model, mode, lambda tensor: tensor.is_meta or isinstance(tensor, FakeTensor), _home(examples))
        flat, drawn = _Flat(model, rebuild, trace), _drawn()
        with attention_masks.as_in_eager(trace.masks):
            dims = (shapes,) if shapes else None
            trace.program = torch.export.export(flat, tensors, dynamic_shapes=dims, strict=False)
    if drawn != _drawn():
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: its forward draws random numbers that the trace does not see",
            where=_forward_of(model),
            why="what Python's random or numpy gives, and what a seed set inside makes of torch's, would be constants",
            help="draw with torch (torch.rand), set no seed there, and decide by torch.where or by an argument",
        )
    _refuse_functions(trace.functions)
    _refuse_memory(model, trace, rebuild)
    if trace.grad_mode is not None:
        with_gradients, without = (_calls(model, examples, rebuild, trace.masks, grad=g) for g in (True, False))
        if _same_calls(with_gradients, without, 0):
            trace.grad_mode = None
    known = trace.dims().keys()
    sizes = (Guard(guard.expr, _location(guard.sloc)) for guard in env.guards if guard.expr.free_symbols <= known)
    trace.guards = tuple(
        {guard.condition: guard for guard in (*_branch_guards(model, trace, rebuild), *sizes)}.values()
    )
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
        state = _state(self.wrapped)
        leaves, self._trace.out_spec = pytree.tree_flatten(caches.closed(self.wrapped(*args, **kwargs), live))
        for name, held in _state(self.wrapped).items():
            if not _identical(held, state.get(name)):
                self._trace.state.add(name)
        for path, module, before in buffers:
            self._write_back(path, module, before)
        for leaf in leaves:
            if not isinstance(leaf, _Traceable | PLAIN):
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


def flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """``pytree.tree_flatten``, with caches of transformers taken apart."""
    return pytree.tree_flatten(caches.packed(value))


# ---------------------------------------------------------------- example inputs

_Role = tuple[str, int]  # what a dim is for; dims of one role and one size share a symbol
_BATCH, _SEQUENCE, _DECODER = ("batch", 0), ("sequence", 0), ("sequence", 1)
_ASKED = (_BATCH, _SEQUENCE, _DECODER)  # the sizes that users vary from call to call


def _roles(examples: list[torch.Tensor], paths: list[str], encoder_decoder: bool) -> list[list[_Role]]:
    """What each dim is for, by convention: ids and masks ``[b, s]``, hidden states ``[b, s, d]``, the rest by place.

    An encoder and a decoder have sequences of their own, even where the examples happen to be of one length.
    """
    lengths = {example.shape[1] for example in examples if _sequence(example) == 1}
    roles: list[list[_Role]] = []
    for example, path in zip(examples, paths, strict=True):
        if path.endswith(caches.COUNTS):
            roles.append([("count", dim) for dim in range(example.dim())])
            continue
        decoder = path.startswith("decoder_") or (encoder_decoder and path == "labels")
        sequence = _DECODER if decoder else _SEQUENCE
        dims: list[_Role] = [(f"{example.dim()}d", dim) for dim in range(example.dim())]
        if dims:
            dims[0] = _BATCH
        if (dim := _sequence(example)) is not None:
            dims[dim] = sequence
        elif example.dim() == 1 and example.shape[0] in lengths and example.shape[0] not in _batches(examples):
            dims[0] = sequence  # such as cache_position [s]
        roles.append(dims)
    return roles


def _is_image(example: torch.Tensor, path: str, roles: list[list[_Role]]) -> bool:
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


def _resized(examples: list[torch.Tensor], roles: list[list[_Role]]) -> list[torch.Tensor]:
    """``examples`` with batch and sequences of at least 2, and a batch unlike the other sizes.

    The tracer takes a size of 1 for a constant, and must not take the batch for something else. A size of 1 is
    stretched only where all dims of its role have it: beside a longer one it is broadcast.
    """
    resized = list(examples)
    for role in _ASKED:
        dims = [(i, dim) for i, found in enumerate(roles) for dim, r in enumerate(found) if r == role]
        if dims and all(resized[i].shape[dim] == 1 for i, dim in dims):
            for i, dim in dims:
                resized[i] = _stretched(resized[i], dim, 2 if role == _BATCH else 3)
    batch = [(i, size) for i, example in enumerate(resized) for size in example.shape[:1] if roles[i][0] == _BATCH]
    others = {
        size
        for i, example in enumerate(resized)
        for size, r in zip(example.shape, roles[i], strict=True)
        if r != _BATCH
    }
    sizes = {size for _, size in batch}
    if len(sizes) == 1 and (size := sizes.pop()) in others and size > 1:
        larger = next(n for n in range(size + 1, size + 2 + len(others)) if n not in others)
        for i, _ in batch:
            resized[i] = _stretched(resized[i], 0, larger)
    return resized


def _stretched(example: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    index = torch.arange(size, device=example.device) % example.shape[dim]
    return example.detach().index_select(dim, index).requires_grad_(example.requires_grad)


def _example(example: torch.Tensor) -> torch.Tensor:
    """A tensor object of our own (the caller may pass one tensor twice), real, on a real device."""
    if example.is_meta or isinstance(example, FakeTensor):
        device = "cpu" if example.is_meta else example.device
        return torch.zeros(
            tuple(example.shape), dtype=example.dtype, device=device, requires_grad=example.requires_grad
        )
    example = example.clone() if example.is_inference() else example
    return example.detach().requires_grad_(example.requires_grad)


class SizeEnv(ShapeEnv):
    """One symbol per role and size; and a size condition is blamed on the model's line, not on torch code below it."""

    def __init__(self, roles: list[list[_Role]]):
        super().__init__(tracked_fakes=[], trace_asserts=True)
        self.places: dict[tuple[int, int], sympy.Symbol] = {}
        self._roles = roles
        self._symbols: dict[_Role, dict[Any, sympy.Symbol]] = {}

    def create_symbol(
        self, val: Any, source: Any, dynamic_dim: Any = DimDynamic.DUCK, *args: Any, **kwargs: Any
    ) -> Any:
        """As in torch, with dims that `_roles` takes for the same thing tied where their sizes are equal."""
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
        frame: types.FrameType | None = sys._getframe(1)
        fallback = None
        while frame is not None and frame.f_code is not _Flat.forward.__code__:
            file = frame.f_code.co_filename
            if file != _HERE and os.path.isabs(file):
                if not file.startswith(_TORCH):
                    return frame
                if file.startswith(_TORCH_MODULES):
                    fallback = fallback or frame
            frame = frame.f_back
        return fallback


# ---------------------------------------------------------------- leaving the model as it was


def _home(examples: list[torch.Tensor]) -> torch.device:
    """Where a model without weights would be: where its inputs are."""
    return next((x.device for x in examples if not x.is_meta), torch.device("cpu"))


def _fake(model: nn.Module, mode: FakeTensorMode, which: Callable[[torch.Tensor], bool], home: torch.device) -> None:
    """Give tensors a fake existence, at ``home`` where they are on meta, so that they meet the inputs.

    Undone by `_preserved`.
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


def _as_buffers(model: nn.Module) -> None:
    """Make tensors that modules hold as plain attributes buffers, which are faked: a trace writes to real ones."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, torch.Tensor):
                del module.__dict__[name]
                module._buffers[name] = value


def _switch_off_checkpointing(model: nn.Module) -> None:
    """Turn off Hugging Face's switch; undone by `_preserved`."""
    for module in model.modules():
        if module.__dict__.get("gradient_checkpointing") is True:
            module.__dict__["gradient_checkpointing"] = False


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Generator[None]:
    """Undo whatever tracing leaves on the modules of ``model``: attributes, flags, registered tensors, containers."""
    tables = [module.__dict__ for module in model.modules()]
    containers = [value for table in tables for value in table.values() if isinstance(value, dict | list)]
    before = [(container, container.copy()) for container in (*tables, *containers)]
    try:
        yield
    finally:
        for container, copy in before:
            if not _identical(container, copy):
                container.clear()
                container.extend(copy) if isinstance(container, list) else container.update(copy)


def _identical(a: dict[Any, Any] | list[Any], b: dict[Any, Any] | list[Any] | None) -> bool:
    if b is None or len(a) != len(b):
        return False
    keys = [list(c) if isinstance(c, dict) else [] for c in (a, b)]
    values = [c.values() if isinstance(c, dict) else c for c in (a, b)]
    return keys[0] == keys[1] and all(x is y for x, y in zip(*values, strict=True))


def _state(model: nn.Module) -> dict[str, list[Any]]:
    """What the modules hold beside parameters and buffers, which forward may set; containers in leaves."""
    return {
        f"{path}.{name}" if path else name: pytree.tree_leaves(value)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name == "training" or name not in _MODULE
    }


_MODULE = frozenset(nn.Module().__dict__)


def _refuse_memory(model: nn.Module, trace: Trace, rebuild: Rebuild) -> None:
    """Refuse a forward that answers otherwise once it has been called: a graph has the first call's answer.

    It is asked only if forward sets attributes. Most do no harm (a loss that is kept to be read, a table that the first
    call makes for later ones), so the answers decide, where there are weights to compute them with.
    """
    if not trace.state or _answers_alike(model, trace.examples, rebuild):
        return
    raise CaptureError(
        f"{type(model).__name__} cannot be captured: its forward depends on what an earlier call left in "
        + ", ".join(f"`{name}`" for name in sorted(trace.state)),
        where=_forward_of(model),
        why="a graph is one call: numbers, lists and tensors that modules keep from call to call are constants of it",
        help="keep it in a buffer (self.register_buffer) that forward writes in place, or make it an argument",
    )


def _answers_alike(model: nn.Module, examples: list[torch.Tensor], rebuild: Rebuild) -> bool:
    """Whether two calls in a row give the same numbers; also if that cannot be told."""
    tensors = [*examples, *model.parameters(), *model.buffers()]
    if any(x.is_meta or isinstance(x, FakeTensor) for x in tensors):
        return True
    answers: list[list[Any]] = []
    with _preserved(model), quiet(), torch.no_grad(), torch.random.fork_rng({x.device for x in tensors if x.is_cuda}):
        buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        for module in model.modules():  # a call may write to it
            module.__dict__.update({k: v.clone() for k, v in module.__dict__.items() if isinstance(v, torch.Tensor)})
        for _ in range(2):
            for table, before in buffers:  # writes to buffers are in the graph
                table.update({name: held if held is None else held.clone() for name, held in before.items()})
            torch.manual_seed(0)
            args, kwargs = rebuild([_example(example).clone() for example in examples])
            try:
                answers.append(pytree.tree_leaves(caches.call(model, args, kwargs)))
            except Exception:  # noqa: BLE001  (whatever the model raises: the trace went well)
                return True
    first, second = answers
    return len(first) == len(second) and all(_same_answer(a, b) for a, b in zip(first, second, strict=True))


def _same_answer(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, equal_nan=True)
    return not isinstance(a, PLAIN) or a == b


def _forward_of(model: nn.Module) -> Where | None:
    """Where the model's forward is written."""
    code = getattr(type(model).forward, "__code__", None)
    return _line(code.co_filename, code.co_firstlineno) if code is not None else None


def _drawn() -> list[Any]:
    """Where the random generators stand that a forward may draw from, to choose its layers for example."""
    return [random.getstate(), *map(str, np.random.get_state()), torch.get_rng_state().numpy().tobytes()]


def warn_of_lost_state(model: nn.Module, trace: Trace) -> None:
    """Say, once, what the model does that is not in the graph."""
    name = type(model).__name__
    if any(module.__dict__.get("gradient_checkpointing") is True for module in model.modules()):
        warnings.warn(
            f'{name}: gradient checkpointing is not part of the captured graph; pass recompute="layers" for the same',
            stacklevel=3,
        )
    if lost := sorted(name for name in trace.state if not name.rpartition(".")[2].startswith("_")):
        it = "it" if len(lost) == 1 else "them"
        warnings.warn(
            f"{name}: forward sets {', '.join(lost)}; the captured graph has the same outputs but does not set {it}",
            stacklevel=3,
        )


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


# ---------------------------------------------------------------- what a trace would get wrong


@contextlib.contextmanager
def _watched(trace: Trace) -> Generator[None]:
    """Refuse, at the model's own line, what tracing would drop or get wrong without a word; record its branches."""
    register_hook = torch.Tensor.register_hook
    enter = torch.inference_mode.__enter__
    truth, is_contiguous, is_grad_enabled = torch.SymBool.__bool__, torch.Tensor.is_contiguous, torch.is_grad_enabled
    requires_grad: Any = torch._C.TensorBase.__dict__["requires_grad"]

    def checked_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            raise CaptureError(
                "reentrant activation checkpointing cannot be captured",
                where=_current_line(),
                why="its backward re-runs Python code, which a graph does not have",
                help="pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or switch checkpointing off",
            )
        if not cls.__module__.startswith("torch."):
            trace.functions.append(_FunctionCall(cls, pytree.tree_map(_specimen, args), kwargs, _current_line()))
        base: Any = super(_SingleLevelFunction, cast("Any", cls))
        return base.apply(*args, **kwargs)

    def checked_register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        if not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            raise CaptureError(
                "a gradient hook on a tensor inside forward cannot be captured",
                where=_current_line(),
                why="hooks belong to the tensors of one call; a graph would lose them",
                help="register the hook on an output after the call, or leave it out",
            )
        return register_hook(tensor, hook)

    def checked_enter(mode: torch.inference_mode) -> Any:
        if mode.mode and (where := _current_line()) is not None:
            raise CaptureError(
                "torch.inference_mode inside forward cannot be captured",
                where=where,
                why="the trace does not record it, so gradients would flow where the model stops them",
                help="use torch.no_grad() there",
            )
        return enter(mode)

    def recorded_truth(value: torch.SymBool) -> bool:
        condition, taken = value.node.expr, truth(value)
        if _asked_by_model():
            if condition.free_symbols:
                trace.branches.append((condition, taken, _current_line()))
            else:  # sizes are positive, the tracer knows
                unlike(0)
        return taken

    def recorded_layout(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        if _asked_by_model():  # the strides of a dim of one position, or of none, mean nothing
            unlike(0)
            unlike(1)
        return is_contiguous(tensor, *args, **kwargs)

    def unlike(size: int) -> None:
        for symbol in {*trace.env.places.values()}:
            trace.branches.append((sympy.Ne(symbol, size) if size else symbol, True, _current_line()))

    def recorded_mode() -> bool:
        if _asked_by_model():
            trace.grad_mode = trace.grad_mode or _current_line()
        return is_grad_enabled()

    def recorded_requires_grad(tensor: torch.Tensor) -> bool:
        if _asked_by_model():
            trace.grad_mode = trace.grad_mode or _current_line()
        return requires_grad.__get__(tensor)

    with (
        _patched(torch.SymBool, "__bool__", recorded_truth),
        _patched(torch.SymBool, "__int__", lambda value: int(bool(value))),
        _patched(torch.SymBool, "__hash__", lambda value: hash(bool(value))),
        _patched(torch.Tensor, "is_contiguous", recorded_layout),
        _patched(torch.Tensor, "requires_grad", property(recorded_requires_grad, requires_grad.__set__)),
        _patched(torch, "is_grad_enabled", recorded_mode),
        _patched(_SingleLevelFunction, "apply", classmethod(checked_apply)),  # (`op = Op.apply` holds that of Function)
        _patched(torch.Tensor, "register_hook", checked_register_hook),
        _patched(torch.inference_mode, "__enter__", checked_enter),
        _patched(TracerBase, "_filter_traceback_frames", _model_frames),
    ):
        yield


def _asked_by_model() -> bool:
    """Whether the model's own code, or a module of torch.nn, is what called the caller of this function."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _SYMBOLS:
        frame = frame.f_back
    caller = frame.f_code.co_filename if frame is not None else _TORCH
    return not caller.startswith(_TORCH) or caller.startswith(os.path.join(_TORCH, "nn"))


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Generator[None]:
    inherited = name not in owner.__dict__
    before = getattr(owner, name) if inherited else owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, before)


@dataclass(frozen=True)
class _FunctionCall:
    """One call of a torch.autograd.Function; its tensors are on meta."""

    kind: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: Where | None

    @property
    def key(self) -> Any:
        """The same for calls that do the same: of one Function, with the same shapes and plain arguments."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        described = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
        return self.kind, str(spec), str(described)


def _specimen(value: Any) -> Any:
    """A tensor of the same sizes and dtype on meta, sizes as they were in the trace."""
    if isinstance(value, torch.Tensor):
        sizes = [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta")
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def _refuse_functions(calls: Sequence[_FunctionCall]) -> None:
    """Refuse autograd Functions whose backward is not the derivative of their forward.

    torch.export traces the forward and forgets the backward. For a Function that is only a faster or leaner way to
    write its own derivative that is right, for a straight-through estimator it is silently wrong: so it is measured.
    """
    for call in {call.key: call for call in calls}.values():
        if not all(_backward_is_the_derivative(call, scale) for scale in _SCALES):
            raise CaptureError(
                f"torch.autograd.Function {call.kind.__name__!r} cannot be captured",
                where=call.where,
                why="its forward would be traced and its backward lost, which is not the derivative of its forward",
                help="write the operation with ordinary tensor ops and detach(), or as a torch.library.custom_op",
            )


_SCALES = (1e-2, 1.0, 1e2)  # of the numbers at which a backward is measured: some clip what is large


def _backward_is_the_derivative(call: _FunctionCall, scale: float) -> bool:
    """Whether gradients by ``backward`` and through ``forward`` are alike, at a random point in fp64."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        args = pytree.tree_map(functools.partial(_random, scale), call.args)
        floats = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        separate = call.kind.setup_context is not torch.autograd.Function.setup_context
        try:
            inline = call.kind.forward(*(() if separate else (_NoContext(),)), *args, **call.kwargs)
            applied = call.kind.apply(*args, **call.kwargs)
            gradients = [_gradients(outputs, floats) for outputs in (inline, applied)]
        except Exception:  # noqa: BLE001  (it does not run in fp64 on cpu: nothing can be said of it)
            return False
    return all(_same_gradient(a, b) for a, b in zip(*gradients, strict=True))


def _random(scale: float, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return (torch.randn(value.shape, dtype=torch.float64) * scale).requires_grad_()
    if value.dtype == torch.bool:
        return torch.rand(value.shape) < 0.5
    return torch.zeros(value.shape, dtype=value.dtype)


def _same_gradient(through_forward: torch.Tensor, by_backward: torch.Tensor) -> bool:
    """Whether they are alike where that through forward is a number: there exp may overflow, say."""
    known = through_forward.isfinite()
    a, b = through_forward[known], by_backward[known]
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7 * max(1.0, float(a.abs().max()) if len(a) else 0.0))


def _gradients(outputs: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    outputs = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    seeds = [torch.randn(output.shape, dtype=output.dtype) for output in outputs]
    if not outputs:
        return [torch.zeros_like(value) for value in inputs]
    found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    pairs: list[tuple[Any, torch.Tensor]] = list(zip(found, inputs, strict=True))
    return [torch.zeros_like(value) if gradient is None else gradient for gradient, value in pairs]


class _NoContext:
    """Takes whatever a forward saves for its backward, and forgets it."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None  # pyright: ignore[reportUnknownVariableType]


# ---------------------------------------------------------------- branches on sizes


EDGES = (1, 0)
"""Sizes that the tracer takes no dynamic dim for."""


def _branch_guards(model: nn.Module, trace: Trace, rebuild: Rebuild) -> tuple[Guard, ...]:
    """Guards for sizes of 1 and 0: the tracer takes dynamic sizes for at least 2, and decides Python branches by it.

    ``if tokens.shape[1] == 1`` is such a branch. Most are harmless (another branch, the same ops), and refusing size 1
    for all of them would refuse most models, so the model is run on fake tensors, at its example sizes and at size 1:
    where it calls the same functions in the same way, the branch does not matter.
    """
    places: dict[sympy.Basic, list[tuple[int, int]]] = {}
    for place, symbol in trace.env.places.items():
        if isinstance(now := trace.env.replace(symbol), sympy.Symbol):
            places.setdefault(now, []).append(place)
    usual = {symbol: sympy.Integer(trace.examples[i].shape[dim]) for symbol, [(i, dim), *_] in places.items()}

    @functools.cache
    def called(symbols: frozenset[sympy.Basic], size: int) -> list[Any] | None:
        small = list(trace.examples)
        for i, dim in (place for symbol in symbols for place in places[symbol]):
            small[i] = small[i].narrow(dim, 0, size)
        return _calls(model, small, rebuild, trace.masks)

    @functools.cache
    def harmless(symbols: frozenset[sympy.Basic], size: int) -> bool:
        step = math.gcd(*(int(usual[symbol]) - size for symbol in symbols))
        return _same_calls(called(frozenset(), 0), called(symbols, size), step)

    guards: dict[sympy.Basic, Guard] = {}
    for recorded, taken, where in trace.branches:
        condition = trace.env.replace(recorded)
        symbols = condition.free_symbols
        if not symbols or not symbols <= places.keys():
            continue
        holds = condition if taken else sympy.Not(condition)
        for few in {*(frozenset([symbol]) for symbol in symbols), frozenset(symbols)}:
            for size in EDGES:
                at: Any = usual | dict.fromkeys(few, sympy.Integer(size))
                if Guard(holds, where).fails(at) and not harmless(few, size):
                    for kept in [holds] if size else few:
                        guards.setdefault(kept, Guard(kept, where, branch=True))
    return tuple(guards.values())


def _same_calls(usual: list[Any] | None, single: list[Any] | None, step: int) -> bool:
    """Whether two runs called the same functions; sizes in their arguments may differ by multiples of ``step``."""
    if usual is None or single is None or len(usual) != len(single):
        return False
    return all(_alike(a, b, step) for a, b in zip(usual, single, strict=True))


def _alike(a: Any, b: Any, step: int) -> bool:
    if a is _EITHER or b is _EITHER:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, slice):
        return all(_alike(x, y, step) for x, y in ((a.start, b.start), (a.stop, b.stop), (a.step, b.step)))
    return a is b or a == b or (type(a) is int and step != 0 and (a - b) % step == 0)


_EITHER = object()  # stands for an argument that changes nothing


class _CallLog(TorchFunctionMode):
    """Every torch function the model calls, with its arguments other than tensors, in one flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(getattr(func, "__name__", func))
        if name not in ("__get__", "size", "dim", "expand", "expand_as"):  # what reads a tensor, or only repeats it
            logged = kwargs or {}
            if name == "scaled_dot_product_attention" and "is_causal" in logged and _one_to_one(*args, **logged):
                logged = {**logged, "is_causal": _EITHER}
            leaves = pytree.tree_leaves((args, logged))
            self.calls += [name, *("tensor" if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)]
        return func(*args, **kwargs or {})


def _one_to_one(query: torch.Tensor, key: torch.Tensor, *_: Any, **kwargs: Any) -> bool:
    """Whether attention is of one query to one key (or of none), which a causal mask leaves as it is."""
    return query.shape[-2] == key.shape[-2] <= 1


def _calls(
    model: nn.Module, examples: list[torch.Tensor], rebuild: Rebuild, masks: list[bool], *, grad: bool = True
) -> list[Any] | None:
    """The calls of one run on fake tensors of exactly these sizes; None where that run fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = _CallLog()
    with _preserved(model), quiet(), torch.set_grad_enabled(grad), _compiling_state_context():
        _switch_off_checkpointing(model)
        _as_buffers(model)
        _fake(model, mode, lambda tensor: True, _home(examples))
        args, kwargs = rebuild([mode.from_tensor(_example(example)) for example in examples])
        try:
            with mode, log, attention_masks.as_in_eager(masks, again=True):
                caches.call(model, args, kwargs)
        except Exception:  # noqa: BLE001  (whatever the model raises at a size that it does not take)
            return None
    return log.calls


# ---------------------------------------------------------------- source lines

_TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_MODULES = os.path.join(_TORCH, "nn", "modules", "")
_HERE = os.path.abspath(__file__)
_SYMBOLS = (_HERE, str(torch.__file__), str(sym_node.__file__))  # where the methods of SymInt and SymBool are


@functools.cache
def _roots() -> tuple[str, ...]:
    folders = [*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.path.dirname(_TORCH))]
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


def short_path(file: str) -> str:
    """``file`` relative to site-packages or to the working directory, where it is below one of them."""
    for folder in (*_roots(), os.path.join(os.getcwd(), "")):
        if file.startswith(folder):
            return file[len(folder) :]
    return file


def _line(file: str, number: int) -> Where:
    return Where(file=short_path(file), line=number, text=linecache.getline(file, number).strip() or None)


def _pick(frames: Sequence[tuple[str, int]]) -> Where | None:
    """The line that a reader of the model wants, of ``(file, line)`` outermost first: the innermost outside torch."""
    frames = [frame for frame in frames if frame[0] != _HERE and os.path.isabs(frame[0])]
    best = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    best = best or [frame for frame in frames if frame[0].startswith(_TORCH_MODULES)]
    return _line(*best[-1]) if best else None


def _model_frames(_: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
    """What torch keeps as a node's stack trace: the lines below the model's forward, helper functions included."""
    start = next((i + 1 for i, frame in enumerate(stack) if _is_entry(frame)), len(stack))
    kept = [f for f in stack[start:] if not f.filename.startswith(_TORCH) or f.filename.startswith(_TORCH_MODULES)]
    return traceback.StackSummary.from_list(kept)


def _is_entry(frame: traceback.FrameSummary) -> bool:
    return frame.filename == _HERE and frame.name == "forward"


def source(node: fx.Node) -> Where | None:
    """The model's own line that made a traced ``node``."""
    return _of_stack_trace(node.stack_trace) if node.stack_trace else None


@functools.lru_cache(maxsize=65536)
def _of_stack_trace(text: str) -> Where | None:
    return _pick([(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)])


def _current_line() -> Where | None:
    """The model's line that runs now; None outside its forward."""
    frames: list[tuple[str, int]] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _Flat.forward.__code__:
            return _pick(frames[::-1])
        if frame.f_code.co_filename != _HERE:
            frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return None


def _location(location: Any) -> Where | None:
    """What `SizeEnv._get_user_frame` found, as torch keeps it."""
    frame = getattr(location, "framework_loc", None)
    return _line(frame.filename, frame.lineno) if isinstance(frame, traceback.FrameSummary) and frame.lineno else None


def _raised_at(error: BaseException | None) -> Where | None:
    """The model's own line that an exception came through."""
    while error is not None:
        frames = list(traceback.extract_tb(error.__traceback__))
        entries = [i for i, frame in enumerate(frames) if _is_entry(frame)]
        if entries and (where := _pick([(f.filename, f.lineno or 0) for f in frames[entries[-1] + 1 :]])):
            return where
        error = error.__cause__ or error.__context__
    return None


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def original(model: nn.Module) -> Generator[None]:
    """What the model itself raises, outside of a trace, as an error for users: values alone can make it fail there."""
    try:
        yield
    except TpcompileError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        below = max(i for i, frame in enumerate(frames) if os.path.dirname(frame.filename) == os.path.dirname(_HERE))
        raise CaptureError(
            f"{type(model).__name__} itself raised {type(error).__name__} for the example inputs",
            where=_pick([(f.filename, f.lineno or 0) for f in frames[below + 1 :]]),
            why=next(iter(str(error).splitlines()), None),
            help="give example inputs that the model takes as it is: token ids below its vocabulary, for instance",
        ) from error


def _explained(error: Exception, model: nn.Module) -> CaptureError:
    """What went wrong while tracing, in a user's words."""
    name, where = type(model).__name__, _raised_at(error)
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
