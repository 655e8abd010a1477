"""Inlining: the graph that torch.export leaves becomes one flat graph of our own.

Regions under torch.no_grad and torch.autocast are inlined and what they meant is written out (detach, casts), names are
canonical, run-time checks and dead code are dropped, and every node carries its module path and the model's own line.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from tpcompile.effects import drop_dead
from tpcompile.errors import CaptureError, Where
from tpcompile.sentence import argument
from tpcompile.source_lines import source
from tpcompile.tracing import TRACED, Trace
from tpcompile.untouched import quiet

_DROPPED = (  # run-time checks and profiler marks; what the checks say of sizes is checked by `Captured.flatten`
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
    "profiler::_record_function_enter",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
)

_MAY_RETURN_OPERAND = frozenset(
    (
        torch.ops.aten.to.dtype,
        torch.ops.aten.to.dtype_layout,
        torch.ops.aten.to.device,
        torch.ops.aten.to.other,
        torch.ops.aten.type_as.default,
        torch.ops.aten.contiguous.default,
        torch.ops.aten.dropout.default,
        torch.ops.aten.feature_dropout.default,
        torch.ops.aten.alpha_dropout.default,
    )
)


_GRAPH_MODULE = frozenset({*dir(fx.GraphModule(nn.Module(), fx.Graph())), "_code", "_tracer_cls"})


@dataclass(frozen=True)
class Names:
    """Canonical names: the first one that ``named_parameters()`` gives; ties are found by identity."""

    parameters: dict[str, nn.Parameter | torch.Tensor]
    buffers: dict[str, torch.Tensor]
    aliases: dict[str, str]  # every name -> canonical name

    @staticmethod
    def of(model: nn.Module) -> Names:
        """The names in ``model``, as it is now."""
        canonical: dict[int, str] = {}
        aliases: dict[str, str] = {}
        parameters: dict[str, nn.Parameter | torch.Tensor] = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        for name, value in (*parameters.items(), *buffers.items()):
            canonical.setdefault(id(value), name)
        every = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, value in (pair for pairs in every for pair in pairs):
            aliases[name] = canonical[id(value)]
        return Names(parameters, buffers, aliases)


@dataclass(frozen=True)
class _Regime:
    """The modes under which a piece of the model's code runs; in the flat graph they are written out."""

    grad: bool
    autocast: Mapping[str, torch.dtype]  # device type -> dtype


class Inliner:
    """Copies one exported graph into a flat graph: placeholders, then parameters and constants, then calls."""

    def __init__(
        self, model: nn.Module, trace: Trace, names: Names, paths: list[str], autocast: Mapping[str, torch.dtype]
    ):
        self.model = model
        self.trace = trace
        self.names = names
        self.paths = paths
        self.regime = _Regime(True, autocast)
        self.graph = fx.Graph()
        self.placeholders: list[fx.Node] = []
        self.constants: dict[str, torch.Tensor] = {}
        self._tensors: dict[str, torch.Tensor] = {}  # get_attr target -> tensor
        self._attributes: dict[str, fx.Node] = {}
        self._detached: dict[fx.Node, fx.Node] = {}
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def graph_module(self) -> fx.GraphModule:
        """The flat graph; its output has one element per output leaf of the model."""
        program = self.trace.program
        env: dict[fx.Node, Any] = {}
        inputs = self.trace.inputs()
        for node, name in zip(inputs, _identifiers(self.paths), strict=True):
            placeholder = self.graph.placeholder(name)
            placeholder.meta.update(val=_settled(node.meta["val"]), module="", modules=(), source=None)
            self.placeholders.append(placeholder)
            env[node] = placeholder
        nodes = program.graph.find_nodes(op="placeholder")
        for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.CUSTOM_OBJ:
                if getattr(spec.arg, "class_fqn", "") == "torch._C.Generator":
                    raise CaptureError(
                        f"{type(self.model).__name__} cannot be captured: its forward draws from a torch.Generator",
                        where=next((where for user in node.users if (where := source(user))), None),
                        why="every call would start it from the same state, or the ranks would not share it",
                        help="draw from torch's default generator (torch.manual_seed), or draw outside of the model",
                    )
                raise CaptureError(
                    f"{spec.target} is not a tensor, and a graph can hold nothing else",
                    why="script objects and custom classes cannot be traced",
                )
            if spec.kind is not InputKind.USER_INPUT:
                env[node] = self._attribute(str(spec.target), node)
        outputs = iter(self._copy(program.graph_module, env, self.regime))
        leaves = [self._with_gradients(next(outputs)) if leaf is TRACED else leaf for leaf in self.trace.outputs]
        self.graph.output(tuple(leaves)).meta.update(val=None, module="", modules=(), source=None)
        drop_dead(self.graph)
        self._refuse_data_dependence()
        used = {str(node.target): self._tensors[str(node.target)] for node in self.graph.find_nodes(op="get_attr")}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in used}
        self._refuse_names(used)
        graph_module = fx.GraphModule(used, self.graph, class_name=type(self.model).__name__)
        graph_module.training = self.model.training
        self.graph.lint()
        return graph_module

    def _refuse_names(self, names: Collection[str]) -> None:
        """Refuse what the graph's module would have under a name that is its own."""
        for name in names:
            if (taken := name.partition(".")[0]) in _GRAPH_MODULE:
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: it has an attribute `{taken}`",
                    where=Where(module=name),
                    why="a graph keeps tensors under the model's names, and torch has its own use for this one",
                    help=f"give it another name, such as `{taken}_`",
                )

    def _attribute(self, target: str, placeholder: fx.Node) -> fx.Node:
        """The get_attr node of a parameter, buffer or constant, under its canonical name."""
        name = target.removeprefix("wrapped.")
        name = self.names.aliases.get(name, name)
        if name in self._attributes:
            return self._attributes[name]
        tensor = self.names.parameters.get(name, self.names.buffers.get(name))
        if tensor is None:
            tensor = _own_attribute(self.model, name)
            if tensor is None:
                count = sum(known.startswith("_lifted.") for known in self.constants)
                name, tensor = f"_lifted.{count}", self.trace.program.constants[target]
            if not isinstance(tensor, torch.Tensor) or (isinstance(tensor, FakeTensor) and name.startswith("_lifted.")):
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: a tensor in its forward escapes the trace",
                    where=next((where for user in placeholder.users if (where := source(user))), None),
                    why="it is made in a way that the tracer does not see, such as x.data",
                    help="use x.detach() in place of x.data",
                )
            self.constants[name] = tensor
        self._tensors[name] = tensor
        node = self.graph.create_node("get_attr", name, name=re.sub(r"\W", "_", name))
        node.meta.update(val=_settled(placeholder.meta["val"]), module=name.rpartition(".")[0], modules=(), source=None)
        self._attributes[name] = node
        return node

    def _copy(self, body: fx.GraphModule, env: dict[fx.Node, Any], regime: _Regime) -> tuple[Any, ...]:
        """Copy ``body``, whose placeholders are in ``env``; returns its outputs."""
        for node in body.graph.nodes:
            match node.op:
                case "placeholder":
                    pass
                case "get_attr":
                    env[node] = getattr(body, node.target)
                case "output":
                    returned: Any = node.args[0]
                    returned = (returned,) if isinstance(returned, fx.Node) else tuple(returned)
                    return map_arg(returned, env.__getitem__)
                case _ if isinstance(node.target, torch._ops.HigherOrderOperator):
                    env[node] = self._region(node, env, regime)
                case _ if node.target is operator.getitem and isinstance(env.get(node.all_input_nodes[0]), tuple):
                    env[node] = env[node.all_input_nodes[0]][node.args[1]]
                case _ if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _DROPPED:
                    pass
                case _ if node.target is torch.ops.aten.detach_.default and _is_fresh(node.all_input_nodes[0]):
                    env[node] = env[node.all_input_nodes[0]]
                case _:
                    env[node] = self._call(node, env, regime)
        raise AssertionError("a graph without output")

    def _region(self, node: fx.Node, env: dict[fx.Node, Any], outer: _Regime) -> tuple[Any, ...]:
        """Inline a grad-mode or autocast region."""
        arguments: tuple[Any, ...] = node.args
        match str(node.target), arguments:
            case "wrap_with_set_grad_enabled", (enabled, body, *operands):
                regime = replace(outer, grad=bool(enabled))
            case "wrap_with_autocast", (str(kind), dtype, enabled, _, body, *operands):
                others = {other: dtype for other, dtype in outer.autocast.items() if other != kind}
                now = {kind: dtype or torch.get_autocast_dtype(kind)} if enabled else {}
                regime = replace(outer, autocast=others | now)
            case name, _:
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: torch's {name!r} is not supported",
                    where=source(node),
                    why="its branches or bodies are graphs of their own, which are not rewritten",
                    help="write it with plain tensor ops, such as torch.where",
                )
        inner = env[body]
        formals = inner.graph.find_nodes(op="placeholder")
        values = [env[operand] if isinstance(operand, fx.Node) else operand for operand in operands]
        outputs = self._copy(inner, dict(zip(formals, values, strict=True)), regime)
        if not outer.autocast:
            self._casts.clear()
        return outputs

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], regime: _Regime) -> fx.Node:
        if not regime.grad:
            self._refuse_hidden_write(node, env)

        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

        def operand(value: fx.Node) -> Any:
            if regime.grad:
                return self._with_gradients(env[value])
            if writes and value is not written:  # or what is written to would keep how it was computed
                return self._detach(env[value])
            return env[value]

        written = node.kwargs.get("out", node.args[0] if node.args else None)
        args, kwargs = map_arg((node.args, node.kwargs), operand)
        if isinstance(node.kwargs.get("out"), fx.Node) and isinstance(node.target, torch._ops.OpOverload):
            return self._written(node, args, kwargs, regime)
        if regime.autocast and isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = self._cast(node, args, kwargs, regime)
        return self._emit(node.target, args, kwargs, node, regime)

    def _written(self, node: fx.Node, args: Any, kwargs: Any, regime: _Regime) -> fx.Node:
        """``torch.div(a, b, out=c)`` as what it computes, and a copy of it into ``c``."""
        target = cast("torch._ops.OpOverload", node.target)
        wanted = [(x.name, str(x.type)) for x in target._schema.arguments if not x.is_out]
        packet = target.overloadpacket
        overloads: list[torch._ops.OpOverload] = [getattr(packet, name) for name in packet.overloads()]
        same = next(x for x in overloads if [(a.name, str(a.type)) for a in x._schema.arguments] == wanted)
        others = {name: value for name, value in kwargs.items() if name != "out"}
        made = self._emit(same, args, others, node, regime, node.meta["val"])
        return self._emit(torch.ops.aten.copy_.default, (kwargs["out"], made), {}, node, regime)

    def _emit(self, target: Any, args: Any, kwargs: Any, origin: fx.Node, regime: _Regime, val: Any = None) -> fx.Node:
        """A call in the flat graph, with the metadata of the traced node ``origin`` it comes from."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=origin.name if val is None else None)
        modules = _modules(origin)
        node.meta.update(
            val=_settled(origin.meta.get("val")) if val is None else val,
            module=modules[-1] if modules else "",
            modules=modules,
            source=source(origin),
        )
        if origin.stack_trace:
            node.meta["stack_trace"] = origin.stack_trace
        if not regime.grad and ((same := _operand_itself(node)) is None or same.meta.get("no_grad")):
            node.meta["no_grad"] = True
        return node

    def _with_gradients(self, value: Any) -> Any:
        """``value`` as code that records gradients sees it: what was computed without them has none."""
        return self._detach(value) if isinstance(value, fx.Node) and value.meta.get("no_grad") else value

    def _detach(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or not _is_float(value.meta.get("val")):
            return value
        if value not in self._detached:
            with self.graph.inserting_after(value):
                node = self.graph.call_function(torch.ops.aten.detach.default, (value,))
            node.meta.update({key: entry for key, entry in value.meta.items() if key != "no_grad"})
            self._detached[value] = node
        return self._detached[value]

    def _refuse_hidden_write(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """In-place under no_grad on a value with gradients: autograd must not see it, and in a graph it would."""
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.args):
            return
        written = node.kwargs.get("out", node.args[0])
        base = env.get(written) if isinstance(written, fx.Node) else None
        while isinstance(base, fx.Node) and _is_view(base) and isinstance(base.args[0], fx.Node):
            base = base.args[0]
        if not isinstance(base, fx.Node) or not _is_float(base.meta["val"]):
            return
        stored = self._tensors[str(base.target)] if base.op == "get_attr" else None
        if not (base.meta.get("no_grad") or (stored is not None and not stored.requires_grad)):
            raise CaptureError(
                f"{type(self.model).__name__} cannot be captured: it writes to a tensor in place under torch.no_grad()",
                where=source(node),
                why="the tensor may carry gradients, which such a write leaves as they were; a graph cannot hide it",
                help="compute a new tensor instead",
            )

    def _cast(self, node: fx.Node, args: Any, kwargs: Any, regime: _Regime) -> tuple[Any, Any]:
        """``args`` and ``kwargs`` with the casts that autocast would do for this op written out."""
        wanted = _autocasts(node, regime.autocast)

        def operand(value: fx.Node, original: fx.Node) -> fx.Node:
            dtype = wanted.get(original)
            if dtype is None:
                return value
            if (value, dtype) in self._casts:
                return self._casts[value, dtype]
            fake = value.meta["val"].to(dtype)
            cast = self._emit(torch.ops.aten.to.dtype, (value, dtype), {}, node, regime, fake)
            if value.op == "get_attr":  # autocast converts a parameter once, anything else at every use
                self._casts[value, dtype] = cast
            return cast

        old, spec = pytree.tree_flatten((node.args, node.kwargs))
        pairs = zip(old, pytree.tree_leaves((args, kwargs)), strict=True)
        cast = [operand(b, a) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else b for a, b in pairs]
        return pytree.tree_unflatten(cast, spec)

    def _refuse_data_dependence(self) -> None:
        for node in self.graph.nodes:
            values = [value for value in pytree.tree_leaves(node.meta.get("val")) if value is not None]
            if any(isinstance(value, torch.Tensor) and is_batchedtensor(value) for value in values):
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: its forward traces into torch.vmap",
                    where=node.meta["source"],
                    why=f"{node.target} was recorded on a value of one sample, which has no meaning outside",
                    help="write the mask or the function for a whole batch, or choose another attention implementation",
                )
            if getattr(node.target, "__module__", None) == "torch._functorch.predispatch":
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: its forward differentiates with torch.func",
                    where=node.meta["source"],
                    why=f"{node.target.__name__} was recorded, which has no meaning outside of its transform",
                    help="write the derivative as plain tensor ops, or transform the compiled module from outside",
                )
            if any(free_unbacked_symbols(value) for value in values):
                raise CaptureError(
                    f"{type(self.model).__name__} cannot be captured: a size or a number in its forward is the value "
                    "of a tensor",
                    where=node.meta["source"],
                    why=f"{node.target} gives what only the data know",
                    help="keep the value in a tensor (torch.where, masks), or compute it outside the model and pass "
                    "it in",
                )


class _CastLog(TorchDispatchMode):
    """The dtype conversions that run below a call: (tensor, dtype)."""

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
    with mode:
        fresh = {operand: torch.empty_like(value) for operand, value in floats.items()}  # one object per operand

    def run(
        dtypes: Mapping[fx.Node, torch.dtype] | None, *, enabled: bool
    ) -> tuple[list[tuple[torch.Tensor, torch.dtype]], list[torch.dtype]]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            for kind in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(kind, autocast.get(kind), enabled and kind in autocast, False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(mode)
            values = fresh if dtypes is None else {n: v.to(dtypes.get(n, v.dtype)) for n, v in fresh.items()}
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta["val"]))
            log = stack.enter_context(_CastLog())
            try:
                result = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
            except RuntimeError:  # operands of different dtypes, which autocast would have made equal
                result = None
            return log.casts, [leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    (casts, dtypes), (plain, _) = run(None, enabled=True), run(None, enabled=False)
    usual = {(id(tensor), dtype) for tensor, dtype in plain}  # the op's own conversions, such as those of `to`
    seen = [(tensor, dtype) for tensor, dtype in casts if (id(tensor), dtype) not in usual]
    wanted = {operand: dtype for operand, value in fresh.items() for tensor, dtype in seen if tensor is value}
    if run(wanted, enabled=False)[1] == dtypes:
        return wanted
    # It converts inside, as einsum does: to convert the operands first is the same.
    wanted = {operand: autocast[value.device.type] for operand, value in fresh.items() if value.device.type in autocast}
    if run(wanted, enabled=False)[1] == dtypes:
        return wanted
    raise CaptureError(
        f"{node.target} under autocast cannot be captured",
        where=source(node),
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


def _operand_itself(node: fx.Node) -> fx.Node | None:
    """The operand that the op returns as it is, such as ``x.to(x.dtype)``: under no_grad it keeps its gradients.

    It is one tensor with two names, and the tracer uses the later one, also behind the region.
    """
    if node.target not in _MAY_RETURN_OPERAND or not isinstance(operand := node.args[0], fx.Node):
        return None
    now, before = node.meta.get("val"), operand.meta.get("val")
    if not isinstance(now, torch.Tensor) or not isinstance(before, torch.Tensor):
        return None
    if (now.dtype, now.device, now.shape, now.stride()) != (before.dtype, before.device, before.shape, before.stride()):
        return None
    target: Any = node.target
    names = {entry.name for entry in target._schema.arguments}
    copied = "copy" in names and argument(node, "copy")
    drawn = "train" in names and argument(node, "train") and argument(node, "p") != 0
    return None if copied or drawn else operand


def _is_fresh(node: fx.Node) -> bool:
    """Whether ``node`` is a constant of the code, such as ``torch.tensor([1, 2])``, which has no gradient to detach."""
    return node.target in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


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
    return tuple(path.removeprefix("wrapped.") for path in paths if path.startswith("wrapped."))
