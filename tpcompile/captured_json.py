"""A captured graph as JSON, and back: plain data whose ops are looked up by name; nothing in it is ever executed.

What the model and the call themselves say (parameters, signature, classes) is not stored: `decode` is given them again.
Fake values are rebuilt with their symbolic sizes, strides and shared storages. Private parts of torch are used for the
fake tensors and the table of symbols alone; tried on torch 2.13.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import base64
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._guards import SLoc
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
from torch.utils._sympy import functions as torch_sympy
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tpcompile.caches import flattened
from tpcompile.capture import Captured, Input, _Slot, shells_of
from tpcompile.errors import Where
from tpcompile.inlining import Names
from tpcompile.size_branches import Guard
from tpcompile.source_lines import source

FORMAT = 2
NAMESPACES = frozenset({"aten", "prims"})
"""Of ops whose meaning is torch's version; others may be defined anew by whoever registers them."""
MAX_CONSTANT_BYTES = 2**20


class NotStorableError(Exception):
    """A capture that holds what this format has no words for; it says what."""


_PYTHON = {f"operator.{name}": getattr(operator, name) for name in operator.__all__} | {
    f"torch.{name}": getattr(torch, name)
    for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "sym_sqrt")
}
_PYTHON_NAMES = {function: name for name, function in reversed(_PYTHON.items())}
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_TORCH_EXPRESSIONS = ["Max", "Min", *(name for name in torch_sympy.__all__ if name[0].isupper())]
_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    f"sympy.{kind.__name__}": kind
    for kind in (
        sympy.Add, sympy.Mul, sympy.Pow, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And,
        sympy.Or, sympy.Not, sympy.floor, sympy.ceiling, sympy.Abs,
    )
} | {f"torch.{name}": getattr(torch_sympy, name) for name in _TORCH_EXPRESSIONS}  # fmt: skip
_EXPRESSION_NAMES: dict[Any, str] = {kind: name for name, kind in _EXPRESSIONS.items()}
_INFINITE = {"oo": int_oo, "-oo": -int_oo, "real oo": sympy.oo, "-real oo": -sympy.oo}


# ---------------------------------------------------------------- expressions over sizes


def _expression(value: Any, symbols: dict[str, sympy.Symbol]) -> Any:
    """A sympy expression as nested lists; its symbols are added to ``symbols``."""
    for name, infinite in _INFINITE.items():
        if value is infinite or (not isinstance(value, sympy.Symbol) and value == infinite):
            return {"constant": name}
    if isinstance(value, sympy.Symbol):
        symbols[value.name] = value
        return value.name
    if value in (sympy.true, sympy.false):
        return bool(value)
    if isinstance(value, sympy.Integer | int):
        return int(value)
    if isinstance(value, sympy.Rational):
        return {"rational": [int(value.p), int(value.q)]}
    if isinstance(value, sympy.Float):
        return {"float": float(value)}
    if type(value) not in _EXPRESSION_NAMES:
        raise NotStorableError(f"an expression of {type(value).__name__}")
    return [_EXPRESSION_NAMES[type(value)], *(_expression(part, symbols) for part in value.args)]


def _read_expression(stored: Any, symbols: Mapping[str, sympy.Symbol]) -> Any:
    match stored:
        case bool():
            return sympy.true if stored else sympy.false
        case int():
            return sympy.Integer(stored)
        case str():
            return symbols[stored]
        case {"constant": name}:
            return _INFINITE[name]
        case {"rational": [p, q]}:
            return sympy.Rational(p, q)
        case {"float": number}:
            return sympy.Float(number)
        case [str(name), *parts]:
            return _EXPRESSIONS[name](*(_read_expression(part, symbols) for part in parts))
        case _:
            raise ValueError(f"no expression: {stored!r}")


# ---------------------------------------------------------------- writing


class _Writer:
    """Tables that nodes refer to by number: fake tensors, the storages they lie in, stack traces, symbols."""

    def __init__(self, env: ShapeEnv | None):
        self.env = env
        self.symbols: dict[str, sympy.Symbol] = {}
        self.nodes: dict[fx.Node, int] = {}
        self.tensors: list[Any] = []
        self.storages: list[Any] = []
        self.texts: dict[str, int] = {}
        self._expressions: dict[Any, Any] = {}
        self._tensor_numbers: dict[int, int] = {}
        self._storage_numbers: dict[int, int] = {}

    def expression(self, value: Any) -> Any:
        """A sympy expression as nested lists, once it is sure that they are read as the same expression."""
        if value not in self._expressions:
            stored = _expression(value, self.symbols)
            if _read_expression(stored, self.symbols) != value:
                raise NotStorableError(f"the expression {value}")
            self._expressions[value] = stored
        return self._expressions[value]

    def size(self, n: Any) -> Any:
        return self.expression(n.node.expr) if isinstance(n, torch.SymInt) else int(n)

    def text(self, value: str) -> int:
        return self.texts.setdefault(value, len(self.texts))

    def value(self, value: Any) -> Any:
        """An argument of a node, or the fake value that it makes."""
        match value:
            case None | bool() | int() | float() | str() if type(value) in (type(None), bool, int, float, str):
                return value
            case fx.Node():
                return {"node": self.nodes[value]}
            case FakeTensor():
                return {"tensor": self.tensor(value)}
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                return {type(value).__name__: self.expression(value.node.expr)}
            case list():
                return [self.value(item) for item in value]
            case tuple() if type(value) is tuple:
                return {"tuple": [self.value(item) for item in value]}
            case dict() if all(type(key) is str for key in value):
                return {"dict": {key: self.value(item) for key, item in value.items()}}
            case slice():
                return {"slice": [self.value(item) for item in (value.start, value.stop, value.step)]}
            case complex():
                return {"complex": [value.real, value.imag]}
            case torch.device():
                return {"device": str(value)}
            case _ if isinstance(value, _TORCH_VALUES):
                return {"torch": str(value).removeprefix("torch.")}
            case _:
                raise NotStorableError(f"a {type(value).__name__}")

    def tensor(self, value: FakeTensor) -> int:
        if id(value) not in self._tensor_numbers:
            if value.layout is not torch.strided or value.is_conj() or value.is_neg():
                raise NotStorableError(f"a tensor of layout {value.layout}, or a lazily conjugated or negated one")
            if type(value) is not FakeTensor or (self.env is not value.fake_mode.shape_env):
                raise NotStorableError("fake values of two traces")
            storage = value.untyped_storage()
            if storage._cdata not in self._storage_numbers:
                self._storage_numbers[storage._cdata] = len(self.storages)
                self.storages.append(self.size(storage.nbytes()))
            self._tensor_numbers[id(value)] = len(self.tensors)
            sizes = [[self.size(n) for n in dims] for dims in (value.shape, value.stride(), [value.storage_offset()])]
            self.tensors.append(
                [
                    self._storage_numbers[storage._cdata],
                    self.value(value.dtype)["torch"],
                    str(value.device),
                    *sizes,
                    value.requires_grad,
                ]
            )
        return self._tensor_numbers[id(value)]

    def node(self, node: fx.Node) -> dict[str, Any]:
        target = node.target
        if node.op == "call_function":
            target = _target_name(target)
        meta = node.meta
        known = {"val", "module", "modules", "source", "stack_trace", "no_grad"}
        if node.op not in ("call_function", "get_attr", "placeholder", "output") or meta.keys() - known:
            raise NotStorableError(f"a {node.op} node with {', '.join(meta)}")
        stored: dict[str, Any] = {
            "op": node.op,
            "name": node.name,
            "target": str(target),
            "args": [self.value(a) for a in node.args],
            "kwargs": {name: self.value(a) for name, a in node.kwargs.items()},
            "val": self.value(meta.get("val")),
            "module": self.text(meta["module"]),
            "modules": [self.text(path) for path in meta["modules"]],
        }
        if "stack_trace" in meta:
            stored["stack_trace"] = self.text(meta["stack_trace"])
        if meta["source"] is not None and "stack_trace" not in meta:
            raise NotStorableError("a source line without a stack trace")
        if "no_grad" in meta:
            stored["no_grad"] = meta["no_grad"]
        self.nodes[node] = len(self.nodes)
        return stored


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in NAMESPACES:
            raise NotStorableError(f"the op {target}, which torch does not define")
        return str(target)
    name = _PYTHON_NAMES.get(target)
    if name is None:
        raise NotStorableError(f"the function {target}")
    return name


def _read_target(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    namespace, packet, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise ValueError(f"no op of torch: {name}")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"no op: {name}")
    return found


def encode(captured: Captured) -> dict[str, Any]:
    """``captured`` as a document of plain values.

    Raises:
        NotStorableError: it holds something that has no place in the format.
    """
    graph = captured.graph_module.graph
    modes = {leaf.fake_mode for n in graph.nodes for leaf in pytree.tree_leaves(n.meta.get("val")) if _is_fake(leaf)}
    if len(modes) > 1:
        raise NotStorableError("fake values of two traces")
    env = next(iter(modes)).shape_env if modes else None
    write = _Writer(env)
    nodes = [write.node(node) for node in graph.nodes]
    document: dict[str, Any] = {
        "format": FORMAT,
        "class": type(captured.graph_module).__name__,
        "training": captured.training,
        "nodes": nodes,
        "texts": list(write.texts),
        "attributes": [name for name in captured.constants if not name.startswith("_lifted.")],
        "lifted": {n: _constant(x) for n, x in captured.constants.items() if n.startswith("_lifted.")},
        "out_spec": _tree(captured.out_spec),
        "slots": [[slot.path, slot.tensor, write.value(slot.value)] for slot in captured._slots],
        "inputs": [
            [x.name, x.path, write.tensor(_fake_tensor(x.example)), list(x.dynamic), _places(x.fixed)]
            for x in captured.inputs
        ],
        "guards": [[write.expression(g.condition), _place(g.where), g.branch] for g in captured.guards],
        "hints": [[write.expression(symbol), int(n)] for symbol, n in captured.hints.items()],
        "dims": [[write.expression(symbol), list(place)] for symbol, place in captured._dims.items()],
        "ranges": [[write.expression(symbol), list(limits)] for symbol, limits in captured._ranges.items()],
        "autocast": [[kind, write.value(dtype)] for kind, dtype in captured.autocast],
        "grad_mode": _place(captured.grad_mode),
        "env": None if env is None else _stored_env(env, write),
    }
    document["storages"], document["tensors"] = write.storages, write.tensors
    document["symbols"] = {name: _assumptions(symbol) for name, symbol in sorted(write.symbols.items())}
    return document


def _is_fake(leaf: Any) -> bool:
    return isinstance(leaf, FakeTensor)


def _fake_tensor(value: torch.Tensor) -> FakeTensor:
    assert isinstance(value, FakeTensor), "inputs of a captured graph are fake"
    return value


def _stored_env(env: ShapeEnv, write: _Writer) -> dict[str, Any]:
    """What the tracer knows of sizes."""
    pair = write.expression
    return {
        "values": [[pair(symbol), pair(value)] for symbol, value in env.backed_var_to_val.items()],
        "ranges": [[pair(symbol), pair(r.lower), pair(r.upper)] for symbol, r in env.var_to_range.items()],
        "replacements": [[pair(symbol), pair(value)] for symbol, value in env.replacements.items()],
        "divisible": sorted([pair(value) for value in env.divisible], key=str),
        "axioms": [[pair(a), pair(b)] for a, b in env.axioms.items()],
    }


def _assumptions(symbol: sympy.Symbol) -> dict[str, bool]:
    return dict(sorted(getattr(symbol, "_assumptions_orig", symbol.assumptions0).items()))


def _constant(tensor: torch.Tensor) -> list[Any]:
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided
    if not plain or tensor.requires_grad or not tensor.is_contiguous() or tensor.nbytes > MAX_CONSTANT_BYTES:
        raise NotStorableError(f"a constant tensor {list(tensor.shape)} that is large, or no plain one")
    data = bytes(tensor.detach().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), base64.b64encode(data).decode()]


def _read_constant(stored: Sequence[Any]) -> torch.Tensor:
    dtype, shape, data = stored
    flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8) if data else torch.empty(0)
    return (flat.view(_dtype(dtype)) if data else flat.to(_dtype(dtype))).reshape(shape)


def _tree(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
        same = pytree.treespec_loads(text) == spec
    except Exception as error:  # whatever the class of a container raises
        raise NotStorableError(f"outputs in a container that cannot be written down ({error})") from error
    if not same:
        raise NotStorableError("outputs in a container that is not read back as it was")
    return text


def _place(where: Where | None) -> Any:
    return None if where is None else list(astuple(where))


def _places(fixed: Mapping[int, Where]) -> list[Any]:
    return [[dim, _place(where)] for dim, where in fixed.items()]


# ---------------------------------------------------------------- reading


class _Reader:
    """The tables of a document as objects."""

    def __init__(self, document: Mapping[str, Any]):
        self.symbols = {n: sympy.Symbol(n, **assumed) for n, assumed in document["symbols"].items()}
        self.texts: list[str] = document["texts"]
        self.nodes: list[fx.Node] = []
        self.env = _read_env(document["env"], self.symbols) if document["env"] is not None else ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True, export=True)
        self._storages: list[Any] = document["storages"]
        self._made: dict[int, torch.UntypedStorage] = {}
        self._sizes: dict[str, int | torch.SymInt] = {}
        with in_kernel_invocation_manager(self.mode), self.env.suppress_guards():
            metas = [self._meta(*stored) for stored in document["tensors"]]
        self.tensors = [FakeTensor(self.mode, meta, device) for meta, device in metas]

    def size(self, stored: Any) -> Any:
        if isinstance(stored, int):
            return stored
        key = str(stored)
        if key not in self._sizes:
            self._sizes[key] = self.env.create_symintnode(self.expression(stored), hint=self._hint(stored))
        return self._sizes[key]

    def expression(self, stored: Any) -> Any:
        return _read_expression(stored, self.symbols)

    def _hint(self, stored: Any) -> int | None:
        value = self.expression(stored).xreplace(self.env.backed_var_to_val)
        return int(value) if value.is_Integer else None

    def _meta(
        self, storage: int, dtype: str, device: str, shape: Any, stride: Any, offset: Any, requires_grad: bool
    ) -> tuple[torch.Tensor, torch.device]:
        """A tensor on meta, which becomes a fake one; those of one storage share it, as views do."""
        sizes, strides = tuple(map(self.size, shape)), tuple(map(self.size, stride))
        start = self.size(offset[0])
        if storage not in self._made:
            made = torch.empty(self.size(self._storages[storage]), dtype=torch.uint8, device="meta")
            self._made[storage] = made.untyped_storage()
        first: Any = torch.empty(0, dtype=_dtype(dtype), device="meta")
        meta = first.set_(self._made[storage], 0, (0,), (1,)).as_strided(sizes, strides, start)
        return meta.requires_grad_(requires_grad), torch.device(device)

    def value(self, stored: Any) -> Any:
        match stored:
            case None | bool() | int() | float() | str():
                return stored
            case list():
                return [self.value(item) for item in stored]
            case {"node": number}:
                return self.nodes[number]
            case {"tensor": number}:
                return self.tensors[number]
            case {"SymInt": expression}:
                return self.size(expression)
            case {"SymFloat": expression}:
                return self.env.create_symfloatnode(self.expression(expression), hint=None)
            case {"SymBool": expression}:
                return self.env.create_symboolnode(self.expression(expression))
            case {"tuple": items}:
                return tuple(self.value(item) for item in items)
            case {"dict": items}:
                return {key: self.value(item) for key, item in items.items()}
            case {"slice": [start, stop, step]}:
                return slice(self.value(start), self.value(stop), self.value(step))
            case {"complex": [real, imag]}:
                return complex(real, imag)
            case {"device": name}:
                return torch.device(name)
            case {"torch": name} if isinstance(getattr(torch, name), _TORCH_VALUES):
                return getattr(torch, name)
            case _:
                raise ValueError(f"no value: {stored!r}")

    def node(self, graph: fx.Graph, stored: Mapping[str, Any]) -> fx.Node:
        op, target = stored["op"], stored["target"]
        args = tuple(self.value(a) for a in stored["args"])
        kwargs = {name: self.value(a) for name, a in stored["kwargs"].items()}
        made = graph.create_node(
            op, _read_target(target) if op == "call_function" else target, args, kwargs, name=stored["name"]
        )
        made.meta.update(
            val=self.value(stored["val"]),
            module=self.texts[stored["module"]],
            modules=tuple(self.texts[path] for path in stored["modules"]),
        )
        if "stack_trace" in stored:
            made.meta["stack_trace"] = self.texts[stored["stack_trace"]]
        made.meta["source"] = source(made)
        if "no_grad" in stored:
            made.meta["no_grad"] = stored["no_grad"]
        if made.name != stored["name"]:
            raise ValueError(f"a name twice: {made.name}")
        self.nodes.append(made)
        return made


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype: {name}")
    return found


def _read_env(stored: Mapping[str, Any], symbols: Mapping[str, sympy.Symbol]) -> ShapeEnv:
    env = ShapeEnv(tracked_fakes=[], trace_asserts=True)
    unknown = SLoc(None, None)

    def read(expression: Any) -> Any:
        return _read_expression(expression, symbols)

    for symbol, value in stored["values"]:
        env.backed_var_to_val[read(symbol)] = read(value)
    for symbol, lower, upper in stored["ranges"]:
        env.var_to_range[read(symbol)] = ValueRanges(read(lower), read(upper))
        env.var_to_range_sloc[read(symbol)] = ValueRangesSLoc(unknown, unknown)  # replaced where a pass narrows a range
    env.replacements.update((read(symbol), read(value)) for symbol, value in stored["replacements"])
    env.divisible.update(map(read, stored["divisible"]))
    env.axioms.update((read(a), read(b)) for a, b in stored["axioms"])
    return env


def decode(document: Mapping[str, Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """The captured graph of ``document``, of this model and for this call.

    Raises any exception for a document that is damaged, of another format, or does not fit the model.
    """
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}")
    names = Names.of(model)
    read = _Reader(document)
    graph = fx.Graph()
    for stored in document["nodes"]:
        read.node(graph, stored)
    constants: dict[str, torch.Tensor] = {}
    for name in document["attributes"]:
        path, _, last = name.rpartition(".")
        constants[name] = getattr(model.get_submodule(path), last)
    constants |= {name: _read_constant(stored) for name, stored in document["lifted"].items()}
    held = {**constants, **names.buffers, **names.parameters}
    used = {str(node.target): held[str(node.target)] for node in graph.find_nodes(op="get_attr")}
    graph_module = fx.GraphModule(used, graph, class_name=document["class"])
    graph_module.training = bool(document["training"])
    graph.lint()
    return Captured(
        graph_module=graph_module,
        parameters=names.parameters,
        buffers=names.buffers,
        constants=constants,
        aliases=names.aliases,
        module_classes={n: type(m).__name__ for n, m in model.named_modules(remove_duplicate=False)},
        in_spec=flattened((args, dict(kwargs)))[1],
        out_spec=pytree.treespec_loads(document["out_spec"]),
        inputs=tuple(
            Input(name, path, read.tensors[example], tuple(dynamic), {d: Where(*where) for d, where in fixed})
            for name, path, example, dynamic, fixed in document["inputs"]
        ),
        guards=tuple(
            Guard(read.expression(condition), None if where is None else Where(*where), branch)
            for condition, where, branch in document["guards"]
        ),
        hints={read.expression(symbol): n for symbol, n in document["hints"]},
        training=bool(document["training"]),
        autocast=tuple((kind, read.value(dtype)) for kind, dtype in document["autocast"]),
        grad_mode=None if document["grad_mode"] is None else Where(*document["grad_mode"]),
        _slots=tuple(_Slot(path, tensor, read.value(value)) for path, tensor, value in document["slots"]),
        _signature=inspect.signature(model.forward),
        _dims={read.expression(symbol): (i, dim) for symbol, (i, dim) in document["dims"]},
        _ranges={read.expression(symbol): (low, high) for symbol, (low, high) in document["ranges"]},
        _shells=shells_of(model, args, kwargs),
    )


def files_of(captured: Captured) -> set[str]:
    """The source files in the stack traces of the graph's nodes."""
    import re

    texts = {node.meta.get("stack_trace") or "" for node in captured.graph_module.graph.nodes}
    return {file for text in texts for file in re.findall(r'File "([^"]+)", line \d+', text)}


__all__ = ["NotStorableError", "decode", "encode", "files_of"]
