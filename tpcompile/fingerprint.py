"""What a capture depends on, as lines of facts: code that the forward can reach, globals, attributes, inputs, modes.

Two processes with the same lines make the same graph. Code is followed by name from the ``forward`` of every module,
through globals, closures, defaults, and attributes of that name on every class that was reached, as they are at this
moment: a monkeypatch is another line. It reaches too much rather than too little. What has a state that cannot be read
(generators, large tensors, modules hidden in lists) is refused, and then nothing is cached.

Torch, numpy, sympy and Python's own library count by version; what stands in their places from outside does not. A
function of an installed package that knows nothing of torch counts by its code and file, and is followed no further.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dis
import enum
import functools
import logging
import operator
import os
import random
import re
import sys
import threading
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import sympy
import torch
import torch.nn.functional
import torch.utils._pytree as pytree
from torch import nn
from torch.fx.experimental import _config as symbol_config
from torch.nn.modules import module as nn_module

from tpcompile.caches import PLAIN, flattened, shells
from tpcompile.capture import _autocast_state


class NotCacheableError(Exception):
    """Something that a capture may depend on cannot be read; it says what."""


MAX_CONSTANT_BYTES = 2**20
_IMPLICIT = ("forward", "backward", "setup_context", "jvp", "vmap")
"""Functions that run without being named in the code that makes them run, besides ``__these__``."""
_HASHES = frozenset({"_original_object_hash"})
"""Attributes that hold a `hash()`, another one in every process (of transformers' GenerationConfig)."""
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
_NOT_RUN = frozenset(
    f"__{name}__"
    for name in ("repr", "str", "reduce", "reduce_ex", "getstate", "setstate", "del", "dir", "deepcopy", "copy")
)
_DATA = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice, re.Pattern)
_TORCH_DATA = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Tag)
_SOLID = frozenset({object, dict, list, tuple, set, frozenset, str, int, float, bytes, OrderedDict, defaultdict, deque})
"""Built-in bases whose whole state is their items, their value and their attributes."""
_STATELESS = (
    logging.Logger, logging.Handler, types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
    types.WrapperDescriptorType, types.ClassMethodDescriptorType, types.GenericAlias, types.UnionType, typing.TypeVar,
    typing.ParamSpec, *(type(x) for x in (typing.Optional, typing.List[int], typing.Callable)),  # noqa: UP006
    type(threading.Lock()), type(threading.RLock()), torch._ops.OpOverload, torch._ops.OpOverloadPacket,
    torch._ops._OpNamespace, torch._ops._Ops, operator.attrgetter, operator.itemgetter, weakref.ReferenceType,
)  # fmt: skip
_MODULE_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BY_VERSION = [os, torch, sympy, *(sys.modules[name] for name in ("numpy", "tpcompile") if name in sys.modules)]
_TRUSTED = tuple(os.path.join(os.path.dirname(os.path.abspath(m.__file__ or "")), "") for m in _BY_VERSION)


def is_trusted(file: str) -> bool:
    """Whether a source file counts by the version of what it belongs to."""
    inside = [folder for folder in _TRUSTED if file.startswith(folder)]
    between = [file[len(folder) :] for folder in inside]
    return file.startswith("<frozen ") or any(
        not rest.startswith(("site-packages", "dist-packages")) for rest in between
    )


def is_installed(file: str) -> bool:
    """Whether a source file belongs to an installed package."""
    return f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file or is_trusted(file)


class Fingerprint:
    """Facts in a fixed order, and the source files of the code that was reached."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.files: set[str] = set()
        self._work: deque[tuple[str, Any, bool]] = deque()
        self._labels: dict[int, str] = {}  # id of a reached object -> where it was reached first
        self._alive: list[Any] = []  # so that ids stay what they are
        self._names: dict[str, None] = dict.fromkeys(_IMPLICIT)  # of attributes that reached code may read
        self._classes: dict[type, set[str]] = {}  # with the attributes that were reached
        self._named: set[type] = set()  # classes of which code may make instances

    def digest(self) -> str:
        """One number for all lines."""
        return sha256("\n".join(self.lines).encode()).hexdigest()

    def say(self, label: str, fact: object) -> None:
        """Add a line."""
        self.lines.append(f"{label} = {fact}")

    def reach(self, label: str, value: Any, lenient: bool = False) -> None:
        """Add what is known of ``value``, and of all that it reaches.

        ``lenient``: an installed package holds it, and an object whose state cannot be read counts as its class.
        """
        self._work.append((label, value, lenient))

    def finish(self) -> None:
        """Follow everything that was reached.

        Raises:
            NotCacheableError: an object's state cannot be read.
        """
        while self._work or self._reach_attributes():
            label, value, lenient = self._work.popleft()
            self._follow(label, value, lenient)

    def _reach_attributes(self) -> bool:
        """Attributes of reached classes that reached code names; whether there are new ones."""
        for owner, done in list(self._classes.items()):
            for name, value in list(vars(owner).items()):
                implicit = name.startswith("__") and name.endswith("__") and name not in _NOT_RUN and _is_code(value)
                run = owner in self._named if name in _CONSTRUCTORS else implicit
                if (run or name in self._names) and name not in done:
                    done.add(name)
                    self.reach(f"{_name(owner)}.{name}", value, _is_installed_class(owner))
        return bool(self._work)

    def _follow(self, label: str, value: Any, lenient: bool) -> None:
        if isinstance(value, enum.Enum):
            self.say(label, f"{_name(type(value))}.{value.name} {value.value!r}")
        elif type(value) in _DATA or isinstance(value, _TORCH_DATA):
            self.say(label, f"{type(value).__name__} {value!r}")
        elif id(value) in self._labels:
            self.say(label, f"as {self._labels[id(value)]}")
        else:
            self._labels[id(value)] = label
            self._alive.append(value)
            self._follow_object(label, value, lenient)

    def _follow_object(self, label: str, value: Any, lenient: bool) -> None:
        match value:
            case types.FunctionType():
                self._function(label, value)
            case types.MethodType():
                self.reach(f"{label}.__func__", value.__func__, lenient)
                self.reach(f"{label}.__self__", value.__self__, lenient)
            case type():
                self._class(label, value)
                self._named |= {*value.__mro__}
            case types.ModuleType():
                self.say(label, f"module {value.__name__}")
            case types.BuiltinFunctionType() | types.MethodWrapperType():
                self.say(label, f"built-in {value.__qualname__}")
                if not isinstance(value.__self__, types.ModuleType | type(None)):
                    self.reach(f"{label}.__self__", value.__self__, lenient)
            case staticmethod() | classmethod():
                self.reach(label + ".__func__", value.__func__, lenient)
            case property():
                for part in ("fget", "fset"):
                    self.reach(f"{label}.{part}", getattr(value, part), lenient)
            case functools.partial():
                for part in ("func", "args", "keywords"):
                    self.reach(f"{label}.{part}", getattr(value, part), lenient)
            case functools._lru_cache_wrapper():  # what it remembers, its arguments and its code say
                self.reach(f"{label}.__wrapped__", value.__wrapped__, lenient)
            case ContextVar():
                self.reach(f"{label}.get()", value.get(None), lenient)
            case torch.Tensor():
                self._tensor(label, value, lenient)
            case nn.Module() if any(True for _ in (*value.parameters(), *value.buffers())):
                self._unreadable(label, "a module outside of the model's tree of modules", lenient)
            case types.MappingProxyType():
                self.reach(f"{label}.copy()", value.copy(), lenient)
            case random.Random() | random.SystemRandom():
                self._unreadable(label, "a random generator", lenient or value is getattr(random, "_inst", None))
            case _ if isinstance(value, _STATELESS):
                self.say(label, f"{_name(type(value))} {getattr(value, '__name__', '')}")
            case _:
                self._instance(label, value, lenient)

    def _instance(self, label: str, value: Any, lenient: bool) -> None:
        kind = type(value)
        solid = next(base for base in kind.__mro__ if not base.__flags__ & (1 << 9))  # the first that C made
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.dtype != object:
            self.say(label, f"{kind} {value.dtype} {value.shape} {sha256(value.tobytes()).hexdigest()}")
            return
        if solid not in _SOLID and not isinstance(value, threading.local | types.SimpleNamespace | BaseException):
            self._unreadable(label, f"a {_name(kind)}, whose state cannot be read", lenient)
            return
        self.say(label, f"a {_name(kind)}")
        if kind.__module__ != "builtins":
            self._class(f"{label}.__class__", kind)
        match value:
            case dict():
                for i, (key, item) in enumerate(list(dict.items(value))):  # not what a subclass makes of it
                    self.reach(f"{label}.keys[{i}]", key, lenient)
                    self.reach(f"{label}[{key!r}]" if type(key) in (str, int) else f"{label}[{i}]", item, lenient)
            case list() | tuple() | deque():
                for i, item in enumerate(_items(value)):
                    self.reach(f"{label}[{i}]", item, lenient)
            case set() | frozenset():
                try:
                    members = sorted(_items(value), key=_member)
                except NotCacheableError as error:
                    self._unreadable(label, f"a set of {error}", lenient)
                    members = []
                for i, item in enumerate(members):
                    self.reach(f"{label}{{{i}}}", item, lenient)
            case str() | int() | float() | bytes():
                self.say(label, repr(value))
            case _:
                pass
        slots = [n for base in kind.__mro__ for n in _slots(base)]
        for name, item in [*getattr(value, "__dict__", {}).items(), *((n, getattr(value, n, None)) for n in slots)]:
            if name not in _HASHES:
                self.reach(f"{label}.{name}", item, lenient)

    def _function(self, label: str, value: types.FunctionType) -> None:
        code, name = value.__code__, f"{value.__module__}.{value.__qualname__}"
        trusted = is_trusted(code.co_filename)
        self.say(label, f"function {name}" if trusted else f"function {name} {_code(code)}")
        installed = trusted or is_installed(code.co_filename)
        for free, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            try:
                self.reach(f"{name}<{free}>", cell.cell_contents, installed)
            except ValueError:  # not set yet
                self.say(f"{name}<{free}>", "empty")
        if trusted:
            return
        self.files.add(code.co_filename)
        if is_installed(code.co_filename) and not _knows_torch(value.__globals__):
            return
        self.reach(f"{name}.__defaults__", value.__defaults__, installed)
        self.reach(f"{name}.__kwdefaults__", value.__kwdefaults__, installed)
        names = _code_names(code)
        self._names |= dict.fromkeys(names.attributes)
        self._globals(name, value.__globals__, names, installed)

    def _globals(self, label: str, table: dict[str, Any], names: _Names, installed: bool) -> None:
        """The globals that code names, attributes of modules among them, and modules that it imports itself."""
        modules: dict[int, types.ModuleType] = {}
        for name in names.globals:
            if name in table:
                self._global(f"{label}:{name}", table[name], modules, installed=installed)
        package = str(table.get("__package__") or "")
        parents = [package.rsplit(".", i)[0] for i in range(package.count(".") + 1)]
        for name in names.imports:
            for imported in (name, *(f"{parent}.{name}" if name else parent for parent in parents)):
                if isinstance(found := sys.modules.get(imported), types.ModuleType):
                    modules.setdefault(id(found), found)
        read = dict.fromkeys((*names.attributes, *names.imports))
        pending, seen = list(modules.values()), set(modules)
        while pending:
            module = pending.pop()
            held = vars(module)
            for name in read:
                if name in held:
                    inner: dict[int, types.ModuleType] = {}
                    package = is_installed(getattr(module, "__file__", None) or "")
                    trusted = _is_trusted_module(module)
                    self._global(f"{module.__name__}:{name}", held[name], inner, trusted=trusted, installed=package)
                    pending += [m for i, m in inner.items() if i not in seen]
                    seen |= inner.keys()

    def _global(
        self, label: str, value: Any, modules: dict[int, types.ModuleType], *, installed: bool, trusted: bool = False
    ) -> None:
        if isinstance(value, types.ModuleType):
            if not trusted or _is_trusted_module(value):
                modules.setdefault(id(value), value)
        elif trusted and not isinstance(value, (types.FunctionType, type, *_DATA, *_TORCH_DATA)):
            self.say(label, _name(type(value)))
        else:
            self.reach(label, value, installed)

    def _class(self, label: str, kind: type) -> None:
        self.say(label, f"class {_name(kind)}")
        for base in kind.__mro__:
            if base not in self._classes and not _is_trusted_class(base):
                self._classes[base] = set()
                self.say(f"{_name(base)}.__mro__", " ".join(map(_name, base.__mro__)))
            elif base not in self._classes and issubclass(base, nn.Module):
                self._classes[base] = {*vars(base)}
                self.patched(_name(base), vars(base))

    def patched(self, label: str, table: Mapping[str, Any]) -> None:
        """Functions in a class or module of torch that are not torch's."""
        for name, value in list(table.items()):
            inner = getattr(value, "__func__", value)
            if isinstance(inner, types.FunctionType) and not is_trusted(inner.__code__.co_filename):
                self.reach(f"{label}.{name}", inner)

    def _tensor(self, label: str, value: torch.Tensor, lenient: bool) -> None:
        plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
        if not plain or value.nbytes > MAX_CONSTANT_BYTES:
            self._unreadable(label, "a large tensor, or one without values", lenient)
            return
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)
        self.say(label, f"{tensor_facts(value)} {sha256(data.numpy().tobytes()).hexdigest()}")

    def _unreadable(self, label: str, what: str, lenient: bool) -> None:
        if not lenient:
            raise NotCacheableError(f"{label} is {what}")
        self.say(label, what)


def tensor_facts(tensor: torch.Tensor) -> str:
    """All of a tensor but its values."""
    if tensor.layout is not torch.strided:
        raise NotCacheableError(f"a tensor of layout {tensor.layout}")
    kind, shape = type(tensor).__name__, [tuple(map(int, dims)) for dims in (tensor.shape, tensor.stride())]
    return f"{kind} {tensor.dtype} {tensor.device.type} {shape} {tensor.requires_grad}"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, classmethod, staticmethod, property))


def _knows_torch(table: dict[str, Any]) -> bool:
    """Whether a module names anything of torch; what an installed one without it calls (downloads, locks) is no part
    of a forward, and its state is another one in every process."""
    return any(_from_torch(value) for value in list(table.values()))


def _from_torch(value: Any) -> bool:
    home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] == "torch"


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [n for n in slots if n not in ("__dict__", "__weakref__")]


def _items(value: Any) -> list[Any]:
    """The items of a container, whatever a subclass makes of iterating."""
    kinds: tuple[Any, ...] = (list, tuple, deque, set, frozenset)
    return list(next(kind for kind in kinds if isinstance(value, kind)).__iter__(value))


def _member(value: Any) -> str:
    """What members of a set are sorted by."""
    if isinstance(value, tuple):
        return str([_member(item) for item in cast("tuple[Any, ...]", value)])
    if type(value) in _DATA or isinstance(value, (*_TORCH_DATA, enum.Enum)):
        return f"{type(value)} {value!r}"
    if isinstance(value, type | types.FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(value)
    raise NotCacheableError(f"{_name(type(value))}, which have no order")


def _is_trusted_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return module is not None and _is_trusted_module(module)


def _is_installed_class(kind: type) -> bool:
    return is_installed(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")


def _is_trusted_module(module: types.ModuleType) -> bool:
    if module.__name__ in sys.builtin_module_names:
        return True
    file = getattr(module, "__file__", None)
    return file is not None and is_trusted(os.path.abspath(file))


@functools.lru_cache(maxsize=16384)
def _code(code: types.CodeType) -> str:
    """A digest of what code does, without its line numbers."""
    parts: list[object] = [code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    parts += [code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount]
    parts += [getattr(code, "co_exceptiontable", b""), [_code_constant(value) for value in code.co_consts]]
    return sha256(repr(parts).encode()).hexdigest()[:32]


def _code_constant(value: Any) -> str:
    match value:
        case types.CodeType():
            return _code(value)
        case tuple():
            return str([_code_constant(item) for item in value])
        case frozenset():
            return str(sorted(_code_constant(item) for item in value))
        case _:
            return f"{type(value).__name__} {value!r}"


@dataclass(frozen=True)
class _Names:
    """Names that code reads, inner functions included."""

    globals: tuple[str, ...]
    attributes: tuple[str, ...]  # and texts that may be one, where there is a getattr
    imports: tuple[str, ...]


@functools.lru_cache(maxsize=16384)
def _code_names(code: types.CodeType) -> _Names:
    found: dict[str, dict[str, None]] = {"GLOBAL": {}, "NAME": {}, "ATTR": {}, "METHOD": {}, "IMPORT": {}}
    for instruction in dis.get_instructions(code):
        if instruction.opcode in dis.hasname and isinstance(name := instruction.argval, str):
            kind = next((kind for kind in ("IMPORT", "ATTR", "METHOD", "GLOBAL") if kind in instruction.opname), "NAME")
            found[kind][name] = None
    names = {kind: tuple(known) for kind, known in found.items()}
    read, attributes = (*names["GLOBAL"], *names["NAME"]), (*names["ATTR"], *names["METHOD"])
    imports = names["IMPORT"]
    inner = [_code_names(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    if {"getattr", "attrgetter", "methodcaller", "hasattr", "__getattribute__"} & {*read, *attributes}:
        attributes += tuple(text for text in _texts(code.co_consts) if text.isidentifier())
    return _Names(
        _once(read, *(n.globals for n in inner)),
        _once(attributes, *(n.attributes for n in inner)),
        _once(imports, *(n.imports for n in inner)),
    )


def _texts(constants: Sequence[Any]) -> Iterator[str]:
    for value in constants:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from _texts(cast("tuple[Any, ...]", value))


def _once(*names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in names for name in some))


def fingerprint(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Fingerprint:
    """What a capture of ``model`` with these example inputs depends on.

    Raises:
        NotCacheableError: it depends on something that cannot be read, or has hooks.
    """
    made = Fingerprint()
    for line in _modes():
        made.say(*line)
    for label, place in (
        ("torch", torch), ("torch.Tensor", torch.Tensor), ("torch.nn.functional", torch.nn.functional)
    ):  # fmt: skip
        made.patched(label, vars(place))
    for line in _example(args, kwargs):
        made.say(*line)
    for line in _tensors(model):
        made.say(*line)
    for path, module in model.named_modules():
        made._labels[id(module)] = f"module {path}"
    for path, module in model.named_modules(remove_duplicate=False):
        made.say(f"path {path}", made._labels[id(module)])
    for path, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise NotCacheableError(f"module {path} has hooks")
        made._class(f"{path}.__class__", type(module))
        for name, value in list(module.__dict__.items()):
            if isinstance(value, torch.Tensor):  # becomes a buffer while it is traced
                made.say(f"{path}.{name}", tensor_facts(value))
            elif name not in _MODULE_TABLES:
                made.reach(f"{path}.{name}", value)
    made.finish()
    return made


def _modes() -> Iterator[tuple[str, object]]:
    """The state of torch that decides what is traced, and versions."""
    hooks = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks)
    if any(hooks) or nn_module._global_backward_pre_hooks:
        raise NotCacheableError("there are hooks on all modules")
    of_default_device = torch.get_default_device().type != "cpu"  # a mode of torch functions, too
    if torch._C._len_torch_function_stack() > of_default_device or torch._C._len_torch_dispatch_stack():
        raise NotCacheableError("a torch function mode or dispatch mode is on")
    yield "versions", [sys.implementation.name, sys.version, torch.__version__, torch.version.git_version]
    yield "packages", {n: getattr(sys.modules.get(n), "__version__", None) for n in ("numpy", "sympy", "transformers")}
    yield "optimized", (sys.flags.optimize, __debug__)
    yield "default dtype", torch.get_default_dtype()
    yield "default device", torch.get_default_device()
    yield "autocast", (_autocast_state(), torch.is_autocast_cache_enabled())
    yield "inference mode", torch.is_inference_mode_enabled()
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    yield "devices", (torch.cuda.is_available(), torch.cuda.device_count() if torch.cuda.is_available() else 0)
    yield "attention", [
        flag()
        for flag in (
            torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled,
            torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled,
            torch.backends.mha.get_fastpath_enabled,
        )
    ]  # fmt: skip
    yield "mkldnn", torch.backends.mkldnn.enabled
    yield "cudnn", torch.backends.cudnn.enabled
    yield "sizes", cast("Any", symbol_config).get_hash()


def _example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    leaves, spec = flattened((args, dict(kwargs)))
    if shells({"call": (args, dict(kwargs))}):
        raise NotCacheableError("an argument is a cache of keys and values")
    yield "call", spec
    for path, leaf in pytree.tree_leaves_with_path((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor):
            yield f"input {pytree.keystr(path)}", tensor_facts(leaf)
        elif isinstance(leaf, PLAIN):
            yield f"input {pytree.keystr(path)}", f"{type(leaf).__name__} {leaf!r}"
        else:
            raise NotCacheableError(f"an argument is a {_name(type(leaf))}")
    yield "inputs", len(leaves)


def _tensors(model: nn.Module) -> Iterator[tuple[str, object]]:
    first: dict[int, str] = {}
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
                raise NotCacheableError(f"{name} is a {_name(type(tensor))}")
            yield f"{kind} {name}", f"{first.setdefault(id(tensor), name)} {tensor_facts(tensor)}"


__all__ = ["Fingerprint", "NotCacheableError", "fingerprint", "is_trusted", "tensor_facts"]
