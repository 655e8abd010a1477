"""Capture: an unmodified model becomes one flat ``torch.fx`` graph of aten ops.

``torch.export`` (non-strict, training IR) does the tracing; everything that is particular about it stays in this file.
Parameters are faked, so that capturing costs no parameter memory and a model on the meta device captures as well as a
real one. Batch and sequence are dynamic: what the trace assumed about sizes is kept as guards, which
`Captured.flatten` checks on every call, and a size that the trace fixed is refused by name, never used silently.

The one file that touches private parts of torch for tracing; tried on torch 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import linecache
import logging
import math
import operator
import os
import re
import site
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from torch.export._trace import _compiling_state_context  # pyright: ignore[reportPrivateUsage]
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv, free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from tpcompile.errors import CaptureError, Where

_TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_MODULES = os.path.join(_TORCH, "nn", "modules", "")
_HERE = os.path.abspath(__file__)
_DROPPED = (  # run-time checks and profiler marks; what they check is checked by `Captured.flatten`
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
    "profiler::_record_function_enter",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
)


_TRACED = object()
_Traceable = torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool
_PLAIN = bool | int | float | complex | str | torch.dtype | torch.device | torch.memory_format | torch.layout | None
_Rebuild = Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]


# ---------------------------------------------------------------- what a capture is


@dataclass(frozen=True)
class Input:
    """One tensor the captured graph takes: a placeholder."""

    name: str  # of the placeholder
    path: str  # as the caller says it: ``input_ids``, ``past_key_values.layers[0].keys``
    example: torch.Tensor  # fake: shape (with symbols), dtype, device
    dynamic: tuple[bool, ...]  # per dim
    fixed: Mapping[int, Where]  # dim that was asked to be dynamic and is not -> the line that fixed it

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a call must pass."""
        return self.example.dtype


@dataclass(frozen=True)
class Guard:
    """A condition on input sizes under which the captured graph is the model."""

    condition: sympy.Basic  # over the symbols of the inputs' dims
    where: Where | None  # the model's own line that asked


@dataclass(frozen=True)
class _Slot:
    """One leaf of the flattened ``(args, kwargs)``: a tensor of the graph, or a constant that the trace baked in."""

    path: str
    tensor: bool
    value: Any = None


@dataclass(frozen=True)
class Captured:
    """A model as one graph, with everything needed to call it in the model's place.

    ``graph_module(*captured.flatten(args, kwargs))`` returns the flat tuple of the model's output leaves, bit for bit,
    with gradients to the model's own parameters; ``unflatten`` restores the structure.
    """

    graph_module: fx.GraphModule
    parameters: dict[str, nn.Parameter | torch.Tensor]  # canonical name -> the model's own object
    buffers: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]  # tensors the forward made from Python values, or plain attributes
    aliases: dict[str, str]  # every name of a parameter or buffer -> its canonical name
    module_classes: dict[str, str]  # dotted path ("" = root) -> class name
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[Input, ...]
    guards: tuple[Guard, ...]
    hints: dict[sympy.Symbol, int]
    training: bool
    autocast: tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) of the autocast modes that were on
    _slots: tuple[_Slot, ...]
    _signature: inspect.Signature
    _dims: dict[sympy.Symbol, tuple[int, int]]  # symbol -> (input, dim) that defines it
    _ranges: dict[sympy.Symbol, tuple[int, int]]
    _accepted: set[tuple[torch.Size, ...]] = field(default_factory=lambda: set[tuple[torch.Size, ...]]())

    def size(self, n: int | torch.SymInt | sympy.Expr) -> int:
        """``n`` with every symbol at its own large prime: equality and divisibility of sizes become integer tests."""
        if isinstance(n, int):
            return n
        expression = n.node.expr if isinstance(n, torch.SymInt) else n
        return int(expression.xreplace(self.hints))

    def flatten(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
        """The graph's tensors, in placeholder order, from a call as the model takes it.

        Raises `CaptureError`, naming the input, for a call that the captured graph is not valid for: another set of
        arguments, another constant, dtype, device, a size in a dim that is fixed, or a guard of the model's own.
        """
        if (now := _autocast_state()) != self.autocast:
            raise CaptureError(
                f"called under {_autocast_text(now)}, captured under {_autocast_text(self.autocast)}",
                why="autocast decides dtypes while the graph is made",
                help="call and compile under the same torch.autocast, or compile a second time under this one",
            )
        leaves, spec = _flattened((tuple(args), dict(kwargs or {})))
        if spec != self.in_spec:
            leaves = self._rearranged(args, kwargs or {})
        tensors: list[torch.Tensor] = []
        for slot, leaf in zip(self._slots, leaves, strict=True):
            if slot.tensor:
                if not isinstance(leaf, torch.Tensor):
                    raise _other_argument(slot.path, "a tensor", leaf)
                tensors.append(leaf)
            elif not _same_constant(slot.value, leaf):
                raise _other_argument(slot.path, repr(slot.value), leaf)
        sizes = tuple(tensor.shape for tensor in tensors)
        for given, wanted in zip(tensors, self.inputs, strict=True):
            self._check_kind(given, wanted)
        if sizes not in self._accepted:
            self._check_sizes(sizes)
            if len(self._accepted) < 4096:
                self._accepted.add(sizes)
        return tensors

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's own output structure from the graph's flat tuple."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def _rearranged(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Leaves in captured order, from a call that passes the same arguments in another way."""
        given = dict(_leaf_paths(self._signature, args, kwargs))
        leaves: list[Any] = []
        for slot in self._slots:
            if slot.path in given:
                leaves.append(given.pop(slot.path))
            elif not slot.tensor and self._is_default(slot.path, slot.value):
                leaves.append(slot.value)
            else:
                raise CaptureError(
                    f"argument {slot.path!r} is missing",
                    why="the model was captured with it",
                    help=f"pass {slot.path!r}, or compile with example_inputs that leave it out",
                )
        for path, leaf in given.items():
            if not self._is_default(path, leaf):
                raise CaptureError(
                    f"argument {path!r} was not there when the model was captured",
                    why=f"captured arguments: {', '.join(slot.path for slot in self._slots if slot.tensor)}",
                    help=f"leave {path!r} out, or compile with example_inputs that contain it",
                )
        return leaves

    def _is_default(self, path: str, value: Any) -> bool:
        parameter = self._signature.parameters.get(path)
        if parameter is None or parameter.default is parameter.empty:
            return value is None
        return _same_constant(parameter.default, value)

    def _check_kind(self, given: torch.Tensor, wanted: Input) -> None:
        example = wanted.example
        if given.dtype is not example.dtype:
            raise CaptureError(
                f"input {wanted.path!r} has dtype {given.dtype}, captured with {example.dtype}",
                help=f"pass {wanted.path}.to({example.dtype}), or compile with example_inputs of dtype {given.dtype}",
            )
        if given.device.type != example.device.type:
            raise CaptureError(
                f"input {wanted.path!r} is on {given.device}, captured on {example.device}",
                help=f"move it to {example.device.type!r}, or compile with model and example_inputs on {given.device}",
            )
        if given.dim() != example.dim():
            raise CaptureError(
                f"input {wanted.path!r} has {given.dim()} dims {list(given.shape)}, captured with {example.dim()}",
                help="compile with example_inputs of that rank",
            )

    def _check_sizes(self, sizes: tuple[torch.Size, ...]) -> None:
        for wanted, size in zip(self.inputs, sizes, strict=True):
            for dim, (expected, got) in enumerate(zip(wanted.example.shape, size, strict=True)):
                if isinstance(expected, int) and expected != got:
                    raise CaptureError(
                        f"input {wanted.path!r} has size {got} in dim {dim}, captured with {expected}",
                        where=wanted.fixed.get(dim),
                        why="this size is fixed in the captured graph",
                        help=f"pass size {expected}, or compile with example_inputs of size {got} in that dim",
                    )
        values = {symbol: sympy.Integer(sizes[i][dim]) for symbol, (i, dim) in self._dims.items()}
        for guard in self.guards:
            if guard.condition.xreplace(values) == sympy.false:
                raise CaptureError(
                    f"the model's own condition on sizes does not hold: {self._text(guard.condition, sizes)}",
                    where=guard.where,
                    why=f"called with {self._sizes_text(guard.condition.free_symbols, sizes)}",
                    help="call within the condition, or compile with example_inputs of these sizes",
                )
        for wanted, size in zip(self.inputs, sizes, strict=True):
            for dim, (expected, got) in enumerate(zip(wanted.example.shape, size, strict=True)):
                if isinstance(expected, torch.SymInt):
                    value = expected.node.expr.xreplace(values)
                    if value.is_Integer and int(value) != got:
                        others = self._sizes_text(expected.node.expr.free_symbols, sizes)
                        raise CaptureError(
                            f"input {wanted.path!r} has size {got} in dim {dim}, expected {value}",
                            why=f"the captured graph ties it to {others}",
                            help="pass inputs whose sizes agree, or compile with example_inputs of these sizes",
                        )
        for symbol, (low, high) in self._ranges.items():
            if symbol in values and not low <= int(values[symbol]) <= high:
                raise CaptureError(
                    f"{self._name(symbol)} is {values[symbol]}, outside the range {low}..{high} the model allows",
                    help="call within the range",
                )

    def _name(self, symbol: sympy.Basic) -> str:
        i, dim = self._dims[symbol]  # pyright: ignore[reportArgumentType]
        return f"{self.inputs[i].path}.shape[{dim}]"

    def _text(self, condition: sympy.Basic, sizes: tuple[torch.Size, ...]) -> str:
        text = str(condition)
        for symbol in sorted(condition.free_symbols, key=lambda symbol: -len(str(symbol))):
            text = re.sub(rf"\b{symbol}\b", self._name(symbol), text)
        return text

    def _sizes_text(self, symbols: set[sympy.Basic], sizes: tuple[torch.Size, ...]) -> str:
        dims = sorted(self._dims[symbol] for symbol in symbols)  # pyright: ignore[reportArgumentType]
        return ", ".join(f"{self.inputs[i].path}.shape[{dim}] = {sizes[i][dim]}" for i, dim in dims)


def _flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """``pytree.tree_flatten``, for transformers' DynamicCache as well, which registers itself only on request."""
    leaves, spec = pytree.tree_flatten(value)
    if any(
        type(leaf).__name__ == "DynamicCache" and type(leaf).__module__ == "transformers.cache_utils" for leaf in leaves
    ):
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()
        leaves, spec = pytree.tree_flatten(value)
    return leaves, spec


def _other_argument(path: str, expected: str, got: Any) -> CaptureError:
    shown = f"a tensor {list(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
    return CaptureError(
        f"argument {path!r} is {shown}, captured with {expected}",
        why="everything but tensors is a constant of the captured graph",
        help=f"pass {expected}, or compile with example_inputs in which {path!r} is {shown}",
    )


def _same_constant(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return False
    try:
        return bool(a == b)
    except Exception:  # noqa: BLE001  (an argument's own __eq__ may do anything)
        return False


def _leaf_paths(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf of ``(args, kwargs)``, in pytree order; positional arguments go by their own names."""
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), "args")
    named = [(names[i] if i < len(names) else f"{rest}[{i - len(names)}]", value) for i, value in enumerate(args)]
    named += list(kwargs.items())
    found: list[tuple[str, Any]] = []
    for name, value in named:
        try:
            keyed = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_leaves_with_path(value)]
        except ValueError:  # a container registered without key paths
            keyed = [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(value))]
        found += [(name + key, leaf) for key, leaf in keyed]
    return found


# ---------------------------------------------------------------- autocast


def _autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    kinds = ("cpu", "cuda")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def _autocast_text(state: tuple[tuple[str, torch.dtype], ...]) -> str:
    return " and ".join(f"autocast({kind!r}, {dtype})" for kind, dtype in state) or "no autocast"


# ---------------------------------------------------------------- source lines


@functools.cache
def _site_packages() -> tuple[str, ...]:
    folders = [*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.path.dirname(_TORCH))]
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


def _short(file: str) -> str:
    """``file`` relative to site-packages or to the working directory, where it is below one of them."""
    for folder in (*_site_packages(), os.path.join(os.getcwd(), "")):
        if file.startswith(folder):
            return file[len(folder) :]
    return file


def _pick(frames: Sequence[tuple[str, int]]) -> Where | None:
    """The line that a reader of the model wants, of ``(file, line)`` outermost first: the innermost outside torch."""
    ours = [i for i, (file, _) in enumerate(frames) if file == _HERE]
    inside = frames[ours[-1] + 1 :] if ours else frames
    best = [frame for frame in inside if not frame[0].startswith(_TORCH) and os.path.isabs(frame[0])]
    best = best or [frame for frame in inside if frame[0].startswith(_TORCH_MODULES)]
    if not best:
        return None
    file, line = best[-1]
    return Where(file=_short(file), line=line, text=linecache.getline(file, line).strip() or None)


@functools.lru_cache(maxsize=65536)
def _traced_line(stack_trace: str) -> Where | None:
    return _pick([(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', stack_trace)])


def _current_line() -> Where | None:
    frames: list[tuple[str, int]] = []
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code is _Flat.forward.__code__:
            return _pick(frames[::-1])
        if frame.f_code.co_filename != _HERE:
            frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return None


# ---------------------------------------------------------------- tracing


class _Flat(nn.Module):
    """The model behind a flat signature: tensors in, tensors out; what else it returns is left in ``trace``."""

    def __init__(self, model: nn.Module, rebuild: _Rebuild, trace: _Trace):
        super().__init__()
        self.wrapped = model
        self.__dict__.update(rebuild=rebuild, trace=trace)

    def forward(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        args, kwargs = self.rebuild(flat)
        leaves, self.trace.out_spec = _flattened(self.wrapped(*args, **kwargs))
        for leaf in leaves:
            if not isinstance(leaf, _Traceable | _PLAIN):
                raise CaptureError(
                    f"the model returns a {type(leaf).__name__}, neither a tensor nor a plain value",
                    why="tensors inside it would be lost",
                    help="return tensors in tuples, lists and dicts, or register the class with "
                    "torch.export.register_dataclass; for a cache, pass use_cache=False",
                )
        self.trace.outputs = [_TRACED if isinstance(leaf, _Traceable) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, _Traceable))


class _ShapeEnv(ShapeEnv):
    """Blames a size condition on the model's own line instead of the torch code that met it."""

    def _get_user_frame(self) -> types.FrameType | None:
        frame: types.FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
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


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Captured:
    """``model`` as one graph, traced with the example inputs ``args`` and ``kwargs`` (only their shapes are used).

    The graph has the training or eval behaviour, dtypes and autocast state of this moment. Without example inputs,
    those of `tpcompile.models.default_inputs` are used. The model is left exactly as it was. Raises `CaptureError`,
    with the model's own source line where there is one.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if not args and not kwargs and _needs_inputs(model):
        from tpcompile.models import default_inputs  # models.py imports nothing heavy, but capture must not need it

        args, kwargs = default_inputs(model)
    _refuse_hooks(model)
    signature = inspect.signature(model.forward)
    leaves, in_spec = _flattened((args, kwargs))
    paths = _leaf_paths(signature, args, kwargs)
    for path, leaf in paths:
        if not isinstance(leaf, torch.Tensor | _PLAIN):
            raise CaptureError(
                f"argument {path!r} is a {type(leaf).__name__}, neither a tensor nor a plain value",
                why="tensors inside it would become constants of the graph",
                help="pass its tensors themselves, or register the class with torch.export.register_dataclass",
            )
    slots = tuple(
        _Slot(path, True) if isinstance(leaf, torch.Tensor) else _Slot(path, False, leaf)
        for (path, _), leaf in zip(paths, leaves, strict=True)
    )

    def rebuild(flat: Sequence[Any]) -> tuple[Any, Any]:
        tensors = iter(flat)
        return pytree.tree_unflatten([next(tensors) if slot.tensor else slot.value for slot in slots], in_spec)

    examples = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensor_paths = [slot.path for slot in slots if slot.tensor]
    autocast = _autocast_state()
    trace = _trace(model, examples, rebuild)
    names = _Names.of(model)
    copier = _Copier(model, trace, names, tensor_paths, dict(autocast))
    graph_module = copier.graph_module()
    inputs = _inputs(copier.placeholders, tensor_paths, trace)
    dims = _symbol_dims(trace.env)
    _refuse_data_dependence(graph_module, type(model).__name__)
    _warn_of_lost_state(model, trace)
    guards = tuple(Guard(g.expr, _where(g.sloc)) for g in trace.env.guards if g.expr.free_symbols <= dims.keys())
    return Captured(
        graph_module=graph_module,
        parameters=names.parameters,
        buffers=names.buffers,
        constants=copier.constants,
        aliases=names.aliases,
        module_classes={n: type(m).__name__ for n, m in model.named_modules(remove_duplicate=False)},
        in_spec=in_spec,
        out_spec=trace.out_spec,
        inputs=inputs,
        guards=guards + _branch_guards(model, trace, rebuild, inputs),
        hints=_hints(graph_module),
        training=model.training,
        autocast=autocast,
        _slots=slots,
        _signature=signature,
        _dims=dims,
        _ranges=_ranges(trace.env),
    )


def _needs_inputs(model: nn.Module) -> bool:
    """Whether ``model()`` alone is not a call of the model."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind not in variadic]
    return bool(parameters)


@dataclass(frozen=True)
class _Names:
    """Canonical names: the first one that ``named_parameters()`` gives; ties are found by identity."""

    parameters: dict[str, nn.Parameter | torch.Tensor]
    buffers: dict[str, torch.Tensor]
    aliases: dict[str, str]

    @staticmethod
    def of(model: nn.Module) -> _Names:
        canonical: dict[int, str] = {}
        aliases: dict[str, str] = {}
        parameters: dict[str, nn.Parameter | torch.Tensor] = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        for name, value in (*parameters.items(), *buffers.items()):
            canonical.setdefault(id(value), name)
        every = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, value in (pair for pairs in every for pair in pairs):
            aliases[name] = canonical[id(value)]
        return _Names(parameters, buffers, aliases)


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            raise CaptureError(
                f"module {name or type(model).__name__!r} has a backward hook",
                where=Where(module=name),
                why="a graph keeps what forward hooks compute, but has no modules on which backward hooks could run",
                help="remove the hook before compiling",
            )


@dataclass
class _Trace:
    """One run of torch.export, and what it left behind."""

    env: _ShapeEnv
    examples: list[torch.Tensor]
    asked: list[set[int]]  # per input, the dims that were to be dynamic
    branches: list[tuple[sympy.Basic, bool, Where | None]] = field(default_factory=list)  # of the model's Python code
    outputs: list[Any] = field(default_factory=list)  # per output leaf: `_TRACED`, or the constant it is
    state: set[str] = field(default_factory=lambda: set[str]())  # module attributes that forward set
    fallback: Where | None = None  # where dynamic sizes failed, when that is why there are fewer
    program: torch.export.ExportedProgram = field(init=False)
    out_spec: pytree.TreeSpec = field(init=False)


def _trace(model: nn.Module, examples: list[torch.Tensor], rebuild: _Rebuild) -> _Trace:
    """Export with as many dynamic dims as the model takes."""
    resized = _resized(examples)
    everything = [set(range(example.dim())) for example in examples]
    roles = [
        {dim for dim in dims if dim in (_batch(e), _sequence(e))} for e, dims in zip(examples, everything, strict=True)
    ]
    try:
        return _traced(model, resized, everything, rebuild)
    except CaptureError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever torch or the model raises)
        reason = _raised_at(error)
    try:
        static = _traced(model, examples, [set[int]() for _ in examples], rebuild)
    except CaptureError:
        raise
    except Exception as error:
        raise _explained(error, model) from error
    for tensors, dims in ((resized, roles), (examples, everything)):
        with contextlib.suppress(Exception):
            trace = _traced(model, tensors, dims, rebuild)
            trace.fallback = reason
            return trace
    static.asked, static.fallback = roles, reason
    return static


def _traced(model: nn.Module, examples: list[torch.Tensor], dynamic: list[set[int]], rebuild: _Rebuild) -> _Trace:
    env = _ShapeEnv(tracked_fakes=[], trace_asserts=True)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    shapes = tuple(dict.fromkeys(dims, torch.export.Dim.AUTO) for dims in dynamic)
    trace = _Trace(env, examples, dynamic)
    tensors = tuple(_example(example) for example in examples)
    with _preserved(model), _quiet(), _watched(trace), torch.enable_grad(), tracing(TracingContext(mode)):
        _switch_off_checkpointing(model)
        _fake(model, mode, lambda tensor: tensor.is_meta or isinstance(tensor, FakeTensor))
        before = _public_state(model)
        flat = _Flat(model, rebuild, trace)
        trace.program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)
        after = _public_state(model)
        trace.state = {name for name, held in after.items() if not _identical(held, before.get(name))}
    return trace


def _switch_off_checkpointing(model: nn.Module) -> None:
    """Hugging Face's switch; undone by `_preserved`, and `_warn_of_lost_state` says so."""
    for module in model.modules():
        if module.__dict__.get("gradient_checkpointing") is True:
            module.__dict__["gradient_checkpointing"] = False


def _warn_of_lost_state(model: nn.Module, trace: _Trace) -> None:
    """Say, once, what of the model is not in the graph."""
    name = type(model).__name__
    if any(module.__dict__.get("gradient_checkpointing") is True for module in model.modules()):
        warnings.warn(f"{name}: gradient checkpointing is not part of the captured graph", stacklevel=3)
    if lost := sorted(trace.state):
        warnings.warn(
            f"{name}: forward sets {', '.join(lost)}; the captured graph returns the same outputs but does not set "
            f"{'it' if len(lost) == 1 else 'them'}",
            stacklevel=3,
        )


def _raised_at(error: BaseException) -> Where | None:
    """The model's own line that an exception came through."""
    while error is not None:
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        inside = [i for i, frame in enumerate(traceback.extract_tb(error.__traceback__)) if _is_entry(frame)]
        if inside and (where := _pick(frames[inside[-1] + 1 :])):
            return where
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    return None


def _is_entry(frame: traceback.FrameSummary) -> bool:
    return frame.filename == _HERE and frame.name == "forward"


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


# ---------------------------------------------------------------- branches on sizes


def _branch_guards(model: nn.Module, trace: _Trace, rebuild: _Rebuild, inputs: Sequence[Input]) -> tuple[Guard, ...]:
    """Guards for sizes of 1: the tracer takes every dynamic size for at least 2, and decides Python branches by it.

    ``if tokens.shape[1] == 1`` is such a branch. Most are harmless (another branch, the same ops), and refusing size 1
    for all of them would refuse most models, so the model is run on fake tensors, at its example sizes and at size 1:
    where it calls the same functions in the same way, the branch does not matter.
    """
    places: dict[sympy.Basic, list[tuple[int, int]]] = {}
    for i, wanted in enumerate(inputs):
        for dim, size in enumerate(wanted.example.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                places.setdefault(size.node.expr, []).append((i, dim))
    usual = {symbol: sympy.Integer(trace.examples[i].shape[dim]) for symbol, [(i, dim), *_] in places.items()}
    calls: dict[frozenset[sympy.Basic], list[Any] | None] = {}

    def called(ones: frozenset[sympy.Basic]) -> list[Any] | None:
        if ones not in calls:
            small = list(trace.examples)
            for i, dim in (place for symbol in ones for place in places[symbol]):
                small[i] = small[i].narrow(dim, 0, 1)
            calls[ones] = _calls(model, small, rebuild)
        return calls[ones]

    guards: dict[sympy.Basic, Guard] = {}
    for condition, taken, where in trace.branches:
        condition = trace.env.replace(condition)
        symbols = condition.free_symbols
        for ones in (*map(frozenset, ([symbol] for symbol in symbols)), frozenset(symbols)):
            at_one = usual | dict.fromkeys(ones, sympy.Integer(1))
            if symbols <= places.keys() and condition.xreplace(at_one) != sympy.sympify(taken):
                step = math.gcd(*(int(usual[symbol]) - 1 for symbol in ones))
                if not _same_calls(called(frozenset()), called(ones), step):
                    holds = condition if taken else sympy.Not(condition)
                    guards.setdefault(holds, Guard(holds, where))
    return tuple(guards.values())


def _same_calls(usual: list[Any] | None, single: list[Any] | None, step: int) -> bool:
    """Whether two runs called the same functions; sizes in their arguments may differ by multiples of ``step``."""
    if usual is None or single is None or len(usual) != len(single):
        return False
    return all(_alike(a, b, step) for a, b in zip(usual, single, strict=True))


def _alike(a: Any, b: Any, step: int) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, slice):
        return all(_alike(x, y, step) for x, y in ((a.start, b.start), (a.stop, b.stop), (a.step, b.step)))
    return a is b or a == b or (type(a) is int and (a - b) % step == 0)


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
            leaves = pytree.tree_leaves((args, kwargs))
            self.calls += [name, *("tensor" if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)]
        return func(*args, **kwargs or {})


def _calls(model: nn.Module, examples: list[torch.Tensor], rebuild: _Rebuild) -> list[Any] | None:
    """The calls of one run on fake tensors of exactly these sizes; None where that run fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = _CallLog()
    with _preserved(model), _quiet(), torch.enable_grad(), _compiling_state_context():
        _switch_off_checkpointing(model)
        _fake(model, mode, lambda tensor: True)
        args, kwargs = rebuild([mode.from_tensor(_example(example)) for example in examples])
        try:
            with mode, log:
                model(*args, **kwargs)
        except Exception:  # noqa: BLE001  (whatever the model raises at a size that it does not take)
            return None
    return log.calls


def _batch(example: torch.Tensor) -> int | None:
    return 0 if example.dim() > 0 else None


def _sequence(example: torch.Tensor) -> int | None:
    """The dim that is a sequence by convention: ids and masks ``[b, s]``, hidden states ``[b, s, d]``."""
    whole = not example.dtype.is_floating_point and not example.dtype.is_complex
    return 1 if (whole and example.dim() >= 2) or example.dim() == 3 else None


def _resized(examples: list[torch.Tensor]) -> list[torch.Tensor]:
    """``examples`` with batch and sequence of at least 2, and different, so that no size is taken for another.

    A batch (or sequence) of 1 is repeated only where every input has 1 there: beside a longer one it is broadcast.
    """
    resized = list(examples)
    for role in (_sequence, _batch):
        dims = [(i, dim) for i, example in enumerate(resized) if (dim := role(example)) is not None]
        if dims and all(resized[i].shape[dim] == 1 for i, dim in dims):
            for i, dim in dims:
                resized[i] = _stretch(resized[i], dim, 2 if role is _batch else 3)
    batches = {example.shape[0] for example in resized if example.dim() > 0}
    sequences = {example.shape[dim] for example in resized if (dim := _sequence(example)) is not None}
    if len(batches) == 1 and (size := batches.pop()) in sequences and size > 1:
        resized = [_stretch(example, 0, size + 1) if example.dim() > 0 else example for example in resized]
    return resized


def _stretch(example: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    index = torch.arange(size, device=example.device) % example.shape[dim]
    return example.detach().index_select(dim, index).requires_grad_(example.requires_grad)


def _example(example: torch.Tensor) -> torch.Tensor:
    """A tensor object of our own (the caller may pass one tensor twice), real, on a real device."""
    if example.is_meta or isinstance(example, FakeTensor):
        device = "cpu" if example.is_meta else example.device
        fresh = torch.zeros(tuple(example.shape), dtype=example.dtype, device=device)
    else:
        fresh = example.detach()
    return fresh.requires_grad_(example.requires_grad)


def _fake(model: nn.Module, mode: FakeTensorMode, which: Callable[[torch.Tensor], bool]) -> None:
    """Give tensors a fake existence, on cpu where they are on meta, so that they meet the inputs; see `_preserved`."""
    memo: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
            with mode:
                fresh = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fresh
        return memo[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):  # pyright: ignore[reportPrivateUsage]
            for name, value in list(tensors.items()):
                if isinstance(value, torch.Tensor) and which(value):
                    tensors[name] = fake(value)


def _public_state(model: nn.Module) -> dict[str, Any]:
    """Attributes of the modules that forward may set: tensors, numbers, and the contents of lists and dicts."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if not name.startswith("_") and isinstance(value, torch.Tensor | int | float | torch.SymInt | list | dict):
                held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
                state[f"{path}.{name}" if path else name] = list(held)
    return state


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
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
    if b is None:
        return False
    values = [c.values() if isinstance(c, dict) else c for c in (a, b)]
    keys = [list(c) if isinstance(c, dict) else [] for c in (a, b)]
    return len(a) == len(b) and keys[0] == keys[1] and all(x is y for x, y in zip(*values, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor log lines of torch.export reach the user; what matters becomes a `CaptureError`."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _watched(trace: _Trace) -> Iterator[None]:
    """Refuse, at the model's own line, what tracing would drop or get wrong without a word; record its branches."""
    truth = torch.SymBool.__bool__
    apply = torch.autograd.Function.__dict__["apply"].__func__
    register_hook = torch.Tensor.register_hook
    enter = torch.inference_mode.__enter__

    def checked_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            raise CaptureError(
                "reentrant activation checkpointing cannot be captured",
                where=_current_line(),
                why="its backward re-runs Python code, which a graph does not have",
                help="pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or switch checkpointing off",
            )
        if not cls.__module__.startswith("torch."):
            raise CaptureError(
                f"torch.autograd.Function {cls.__name__!r} cannot be captured",
                where=_current_line(),
                why="its forward would be traced and its own backward lost, so gradients would be wrong",
                help="write the operation with ordinary tensor ops, or as a torch.library.custom_op",
            )
        return apply(cls, *args, **kwargs)

    def checked_register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        if not sys._getframe(1).f_code.co_filename.startswith(_TORCH):  # pyright: ignore[reportPrivateUsage]
            raise CaptureError(
                "a gradient hook on a tensor inside forward cannot be captured",
                where=_current_line(),
                why="hooks belong to the tensors of one call; a graph would lose them",
                help="register the hook on an output after the call, or leave it out",
            )
        return register_hook(tensor, hook)

    def checked_enter(mode: torch.inference_mode) -> Any:
        if mode.mode and _current_line() is not None:
            raise CaptureError(
                "torch.inference_mode inside forward cannot be captured",
                where=_current_line(),
                why="the trace does not record it, so gradients would flow where the model stops them",
                help="use torch.no_grad() there",
            )
        return enter(mode)

    def recorded_truth(value: torch.SymBool) -> bool:
        condition, taken = value.node.expr, truth(value)
        caller = sys._getframe(1).f_code.co_filename  # pyright: ignore[reportPrivateUsage]
        if condition.free_symbols and (not caller.startswith(_TORCH) or caller.startswith(os.path.join(_TORCH, "nn"))):
            trace.branches.append((condition, taken, _current_line()))
        return taken

    with (
        _patched(torch.SymBool, "__bool__", recorded_truth),
        _patched(torch.autograd.Function, "apply", classmethod(checked_apply)),
        _patched(torch.Tensor, "register_hook", checked_register_hook),
        _patched(torch.inference_mode, "__enter__", checked_enter),
        _patched(fx.proxy.TracerBase, "_filter_traceback_frames", _model_frames),
    ):
        yield


@contextlib.contextmanager
def _patched(owner: type, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _model_frames(_: fx.proxy.TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
    """What torch keeps as a node's stack trace: the lines below the model's forward, helper functions included."""
    start = next((i + 1 for i, f in enumerate(stack) if f.filename == _HERE and f.name == "forward"), len(stack))
    kept = [f for f in stack[start:] if not f.filename.startswith(_TORCH) or f.filename.startswith(_TORCH_MODULES)]
    return traceback.StackSummary.from_list(kept)


# ---------------------------------------------------------------- the graph


@dataclass(frozen=True)
class _Regime:
    """The modes under which a piece of the model's code runs; in the flat graph they are written out."""

    grad: bool
    autocast: Mapping[str, torch.dtype]  # device type -> dtype


class _Copier:
    """Copies an exported graph into a flat graph of our own: regions inlined, names canonical, dead code left out."""

    def __init__(
        self, model: nn.Module, trace: _Trace, names: _Names, paths: list[str], autocast: dict[str, torch.dtype]
    ):
        self.model = model
        self.trace = trace
        self.names = names
        self.paths = paths
        self.regime = _Regime(True, autocast)
        self.graph = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}  # get_attr target -> tensor
        self.constants: dict[str, torch.Tensor] = {}
        self.placeholders: list[fx.Node] = []
        self.attributes: dict[str, fx.Node] = {}
        self.detached: dict[fx.Node, fx.Node] = {}
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def graph_module(self) -> fx.GraphModule:
        """The flat graph; its output has one element per output leaf of the model."""
        program = self.trace.program
        inputs = program.graph.find_nodes(op="placeholder")
        specs = program.graph_signature.input_specs
        env: dict[fx.Node, Any] = {}
        names = _identifiers(self.paths)
        for node, spec in zip(inputs, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                placeholder = self.graph.placeholder(names[len(self.placeholders)])
                placeholder.meta.update(val=_settled(node.meta["val"]), module="", modules=(), source=None)
                self.placeholders.append(placeholder)
                env[node] = placeholder
        for node, spec in zip(inputs, specs, strict=True):
            if spec.kind is InputKind.CUSTOM_OBJ:
                raise CaptureError(
                    f"{spec.target} is not a tensor, and a graph can hold nothing else",
                    why="script objects and custom classes cannot be traced",
                )
            if spec.kind is not InputKind.USER_INPUT:
                env[node] = self.attribute(str(spec.target), node)
        outputs = iter(self.copy(program.graph_module, env, self.regime))
        leaves = [next(outputs) if leaf is _TRACED else leaf for leaf in self.trace.outputs]
        self.graph.output(tuple(leaves)).meta.update(val=None, module="", modules=(), source=None)
        self.drop_dead()
        used = {str(node.target): self.tensors[str(node.target)] for node in self.graph.find_nodes(op="get_attr")}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in used}
        graph_module = fx.GraphModule(used, self.graph, class_name=type(self.model).__name__)
        graph_module.training = self.model.training
        self.graph.lint()
        return graph_module

    def attribute(self, target: str, source: fx.Node) -> fx.Node:
        """The get_attr node of a parameter, buffer or constant, under its canonical name."""
        name = target.removeprefix("wrapped.")
        name = self.names.aliases.get(name, name)
        if name in self.attributes:
            return self.attributes[name]
        tensor = self.names.parameters.get(name, self.names.buffers.get(name))
        if tensor is None:
            tensor = _own_attribute(self.model, name)
            if tensor is None:
                name, tensor = f"_lifted.{len(self.constants)}", self.trace.program.constants[target]
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: a tensor in its forward escapes the trace",
                    where=next((where for user in source.users if (where := _source(user))), None),
                    why="it is made in a way that the tracer does not see, such as x.data",
                    help="use x.detach() in place of x.data",
                )
            self.constants[name] = tensor
        self.tensors[name] = tensor
        with self.graph.inserting_after(
            next(reversed(self.attributes.values()), self.placeholders[-1] if self.placeholders else None)
        ):
            node = self.graph.create_node("get_attr", name, name=re.sub(r"\W", "_", name))
        node.meta.update(val=_settled(source.meta["val"]), module=name.rpartition(".")[0], modules=(), source=None)
        self.attributes[name] = node
        return node

    def copy(self, source: fx.GraphModule, env: dict[fx.Node, Any], regime: _Regime) -> tuple[Any, ...]:
        """Copy the body of ``source``; ``env`` holds its placeholders; returns its outputs."""
        for node in source.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                returned = node.args[0]
                return fx.node.map_arg(
                    (returned,) if isinstance(returned, fx.Node) else tuple(returned), env.__getitem__
                )
            if node.op == "get_attr":
                env[node] = getattr(source, node.target)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = self.region(node, env, regime)
            elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
                env[node] = env[node.args[0]][node.args[1]]
            elif not (isinstance(node.target, torch._ops.OpOverload) and _name(node.target) in _DROPPED):
                env[node] = self.call(node, env, regime)
        raise AssertionError("a graph without output")

    def region(self, node: fx.Node, env: dict[fx.Node, Any], regime: _Regime) -> tuple[Any, ...]:
        """Inline a grad-mode or autocast region."""
        outer = regime
        match str(node.target), node.args:
            case "wrap_with_set_grad_enabled", (enabled, body, *operands):
                regime = replace(regime, grad=bool(enabled))
            case "wrap_with_autocast", (str(kind), dtype, enabled, _, body, *operands):
                others = {other: dtype for other, dtype in regime.autocast.items() if other != kind}
                now = {kind: dtype or torch.get_autocast_dtype(kind)} if enabled else {}
                regime = replace(regime, autocast=others | now)
            case name, _:
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: torch's {name!r} is not supported",
                    where=_source(node),
                    why="its branches or bodies are graphs of their own, which are not rewritten",
                    help="write it with plain tensor ops, such as torch.where",
                )
        inner = env[body]
        formals = inner.graph.find_nodes(op="placeholder")
        values = [env[operand] if isinstance(operand, fx.Node) else operand for operand in operands]
        outputs = self.copy(inner, dict(zip(formals, values, strict=True)), regime)
        if not outer.autocast:
            self.casts.clear()
        return outputs

    def call(self, node: fx.Node, env: dict[fx.Node, Any], regime: _Regime) -> fx.Node:
        if not regime.grad:
            self.refuse_hidden_write(node, env)

        def operand(value: fx.Node) -> Any:
            return self.detach(env[value]) if regime.grad else env[value]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        if regime.autocast and isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = self.cast(node, args, kwargs, regime)
        return self.emit(node.target, args, kwargs, node, regime)

    def emit(self, target: Any, args: Any, kwargs: Any, source: fx.Node, regime: _Regime, val: Any = None) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=source.name if val is None else None)
        modules = _modules(source)
        node.meta.update(
            val=_settled(source.meta.get("val")) if val is None else val,
            module=modules[-1] if modules else "",
            modules=modules,
            source=_source(source),
        )
        if trace := source.stack_trace:
            node.meta["stack_trace"] = trace
        if not regime.grad:
            node.meta["no_grad"] = True
        return node

    def detach(self, value: Any) -> Any:
        """``value`` as code that records gradients sees it: what was computed without them has none."""
        if not isinstance(value, fx.Node) or not value.meta.get("no_grad") or not _is_float(value.meta.get("val")):
            return value
        if value not in self.detached:
            with self.graph.inserting_after(value):
                node = self.graph.call_function(torch.ops.aten.detach.default, (value,))
            node.meta.update({key: entry for key, entry in value.meta.items() if key != "no_grad"})
            self.detached[value] = node
        return self.detached[value]

    def refuse_hidden_write(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """In-place under no_grad on a value with gradients: autograd must not see it, and in a graph it would."""
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.args):
            return
        base = env.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        while isinstance(base, fx.Node) and base.op == "call_function" and _is_view(base):
            base = base.args[0]
        owned = isinstance(base, fx.Node) and (base.meta.get("no_grad") or str(base.target) in self.names.buffers)
        if isinstance(base, fx.Node) and not owned and _is_float(base.meta["val"]):
            raise CaptureError(
                f"{type(self.model).__name__} cannot be captured: it writes to a tensor in place under torch.no_grad()",
                where=_source(node),
                why="the tensor may carry gradients, which such a write leaves as they were; a graph cannot hide it",
                help="compute a new tensor instead, or write to x.detach()",
            )

    def cast(self, node: fx.Node, args: Any, kwargs: Any, regime: _Regime) -> tuple[Any, Any]:
        """``args`` and ``kwargs`` with the casts that autocast would do for this op written out."""
        wanted = _autocasts(node, regime.autocast)

        def operand(value: fx.Node, original: fx.Node) -> fx.Node:
            dtype = wanted.get(original)
            if dtype is None:
                return value
            if (value, dtype) in self.casts:
                return self.casts[value, dtype]
            fake = value.meta["val"].to(dtype)
            cast = self.emit(torch.ops.aten.to.dtype, (value, dtype), {}, node, regime, fake)
            if value.op == "get_attr":  # autocast converts a parameter once, anything else at every use
                self.casts[value, dtype] = cast
            return cast

        old, spec = pytree.tree_flatten((node.args, node.kwargs))
        new = pytree.tree_leaves((args, kwargs))
        pairs = zip(old, new, strict=True)
        cast = [operand(b, a) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else b for a, b in pairs]
        return pytree.tree_unflatten(cast, spec)

    def drop_dead(self) -> None:
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output") and not _has_effect(node):
                self.graph.erase_node(node)


class _CastLog(TorchDispatchMode):
    """The dtype conversions that a call begins with: (tensor, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: list[tuple[torch.Tensor, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and (dtype := (kwargs or {}).get("dtype")) is not None:
            self.casts.append((args[0], dtype))
        return func(*args, **kwargs or {})


def _autocasts(node: fx.Node, autocast: Mapping[str, torch.dtype]) -> dict[fx.Node, torch.dtype]:
    """Which operands of ``node`` autocast converts, and to what: measured by running the op on fake tensors."""
    operands = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
    floats = {operand: operand.meta["val"] for operand in operands if _is_float(operand.meta.get("val"))}
    if not floats:
        return {}
    mode = next(iter(floats.values())).fake_mode

    Casts = list[tuple[torch.Tensor, torch.dtype]]

    def run(values: Mapping[fx.Node, torch.Tensor], enabled: bool) -> tuple[Casts, list[torch.dtype]]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta["val"]))
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, autocast.get(kind), enabled and kind in autocast, False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(mode)
            log = stack.enter_context(_CastLog())
            try:
                result = node.target(*args, **kwargs)
            except RuntimeError:  # operands of different dtypes, which autocast would have made equal
                result = None
            return log.casts, [leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    def converted(dtypes: Mapping[fx.Node, torch.dtype]) -> dict[fx.Node, torch.Tensor]:
        with mode:
            return {operand: value.to(dtypes.get(operand, value.dtype)) for operand, value in fresh.items()}

    with mode:
        fresh = {operand: torch.empty_like(value) for operand, value in floats.items()}  # one object per operand
    (casts, dtypes), (plain, _) = run(fresh, True), run(fresh, False)
    usual = {(id(tensor), dtype) for tensor, dtype in plain}  # the op's own conversions, such as those of `to`
    seen = [(tensor, dtype) for tensor, dtype in casts if (id(tensor), dtype) not in usual]
    wanted = {operand: dtype for operand, value in fresh.items() for tensor, dtype in seen if tensor is value}
    if run(converted(wanted), False)[1] == dtypes:
        return wanted
    # It converts inside, as einsum does: to convert the operands first is the same.
    wanted = {operand: autocast[value.device.type] for operand, value in fresh.items() if value.device.type in autocast}
    if run(converted(wanted), False)[1] == dtypes:
        return wanted
    raise CaptureError(
        f"{node.target} under autocast cannot be captured",
        where=_source(node),
        why="the conversions that autocast does inside this op cannot be written out before it",
        help="convert its operands by hand, or run it under torch.autocast(..., enabled=False)",
    )


def _own_attribute(model: nn.Module, name: str) -> torch.Tensor | None:
    """A tensor that a module of ``model`` holds as a plain attribute."""
    path, _, attribute = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(path), attribute)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.arguments:
        return False
    return target._schema.arguments[0].alias_info is not None


def _name(target: torch._ops.OpOverload) -> str:
    return target._schema.name  # pyright: ignore[reportPrivateUsage]


def _has_effect(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _settled(value: Any) -> Any:
    """``value`` with the sizes that turned out to be constants as plain ints."""
    return pytree.tree_map(_settled_leaf, value)


def _settled_leaf(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value.node.expr) if value.node.expr.is_Integer else value
    if isinstance(value, FakeTensor) and value.layout is torch.strided:
        dims = (*value.shape, *value.stride())
        settled = [_settled_leaf(size) for size in dims]
        if any(a is not b for a, b in zip(dims, settled, strict=True)):
            n = value.dim()
            with value.fake_mode:
                return torch.empty_strided(settled[:n], settled[n:], dtype=value.dtype, device=value.device)
    return value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _identifiers(paths: list[str]) -> list[str]:
    names: list[str] = []
    for path in paths:
        name = re.sub(r"\W+", "_", path).strip("_")
        while name in names or not name.isidentifier():
            name = f"{name}_" if name.isidentifier() else f"input_{name}"
        names.append(name)
    return names


def _modules(node: fx.Node) -> tuple[str, ...]:
    """Dotted paths of the modules around ``node``, outermost first, the root left out."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).partition("@")[0] for path, _ in stack.values()]
    inside = [path.removeprefix("wrapped").removeprefix(".") for path in paths if path.split(".")[0] == "wrapped"]
    return tuple(path for path in inside if path)


def _source(node: fx.Node) -> Where | None:
    return _traced_line(node.stack_trace) if node.stack_trace else None


# ---------------------------------------------------------------- sizes


def _symbol_dims(env: _ShapeEnv) -> dict[sympy.Symbol, tuple[int, int]]:
    """Which input and dim each symbol was made for."""
    dims: dict[sympy.Symbol, tuple[int, int]] = {}
    for source, symbol in env.source_to_var.items():
        if found := re.fullmatch(r"L\['flat'\]\[(\d+)\]\.size\(\)\[(\d+)\]", source):
            dims[symbol] = (int(found[1]), int(found[2]))
    return dims


def _inputs(placeholders: list[fx.Node], paths: list[str], trace: _Trace) -> tuple[Input, ...]:
    symbols = {place: symbol for symbol, place in _symbol_dims(trace.env).items()}
    inputs: list[Input] = []
    for i, (node, path) in enumerate(zip(placeholders, paths, strict=True)):
        example = node.meta["val"]
        dynamic = tuple(isinstance(size, torch.SymInt) for size in example.shape)
        fixed: dict[int, Where] = {}
        for dim in trace.asked[i]:
            symbol = symbols.get((i, dim))
            where = _where(trace.env.replacements_slocs.get(symbol)) if symbol is not None else trace.fallback
            if not dynamic[dim] and where is not None:
                fixed[dim] = where
        inputs.append(Input(node.name, path, example, dynamic, fixed))
    return tuple(inputs)


def _where(location: Any) -> Where | None:
    frame = getattr(location, "framework_loc", None)
    if frame is None or isinstance(frame, str):
        return None
    return Where(file=_short(frame.filename), line=frame.lineno, text=(frame.line or "").strip() or None)


def _ranges(env: _ShapeEnv) -> dict[sympy.Symbol, tuple[int, int]]:
    """Ranges narrower than the tracer's own: it assumes at least 2, which calls need not obey."""
    ranges: dict[sympy.Symbol, tuple[int, int]] = {}
    for symbol, limits in env.var_to_range.items():
        low = int(limits.lower) if limits.lower.is_Integer and limits.lower > 2 else 0
        high = int(limits.upper) if limits.upper.is_Integer else sys.maxsize
        if (low, high) != (0, sys.maxsize):
            ranges[symbol] = (low, high)
    return ranges


def _hints(graph_module: fx.GraphModule) -> dict[sympy.Symbol, int]:
    symbols: set[sympy.Symbol] = set()
    for node in graph_module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                    symbols |= size.node.expr.free_symbols
    hints: dict[sympy.Symbol, int] = {}
    prime = 1_000_000  # beyond the sizes of models, so that no hint divides one
    for symbol in sorted(symbols, key=str):
        prime = int(sympy.nextprime(prime))
        hints[symbol] = prime
    return hints


def _refuse_data_dependence(graph_module: fx.GraphModule, class_name: str) -> None:
    for node in graph_module.graph.nodes:
        values = [value for value in pytree.tree_leaves(node.meta.get("val")) if value is not None]
        if any(free_unbacked_symbols(value) for value in values):
            raise CaptureError(
                f"{class_name} cannot be captured: a size or a number in its forward is the value of a tensor",
                where=node.meta["source"],
                why=f"{node.target} gives what only the data know",
                help="keep the value in a tensor (torch.where, masks), or compute it outside the model and pass it in",
            )
