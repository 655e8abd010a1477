"""Capture: an unmodified model becomes one flat ``torch.fx`` graph of aten ops.

`tracing` runs torch.export on it, `inlining` makes the result one flat graph, and here is what comes out: `Captured`,
the graph with everything that is needed to call it in the model's place. Batch and sequence are dynamic; what the trace
assumed of sizes, constants and arguments is checked on every call, and refused by name, never used silently.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import networkx as nx
import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.utils._sympy.functions import Mod
from torch.utils._sympy.printers import PythonPrinter

from tpcompile import caches
from tpcompile.caches import PLAIN, flattened
from tpcompile.errors import CaptureError, Where
from tpcompile.forward_state import warn_of_lost_state
from tpcompile.inlining import Inliner, Names
from tpcompile.quantized import refuse_wrapped
from tpcompile.refused_models import refuse_hooks, refuse_shared_memory
from tpcompile.size_branches import Guard
from tpcompile.tracing import Trace, trace


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
class _Slot:
    """One leaf of the flattened ``(args, kwargs)``: a tensor of the graph, or a constant that the trace baked in."""

    path: str
    tensor: bool
    value: Any = None


@dataclass(frozen=True, eq=False)
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
    grad_mode: Where | None  # where forward asks whether gradients are recorded: the graph is for calls with them
    _slots: tuple[_Slot, ...]
    _signature: inspect.Signature
    _dims: dict[sympy.Symbol, tuple[int, int]]  # symbol -> (input, dim) that defines it
    _ranges: dict[sympy.Symbol, tuple[int, int]]
    _shells: Mapping[str, caches.Shell]  # of the caches among the arguments
    _accepted: set[tuple[torch.Size, ...]] = field(default_factory=lambda: set[tuple[torch.Size, ...]]())
    _sizes: dict[sympy.Expr, int] = field(default_factory=lambda: dict[sympy.Expr, int]())  # at the hints

    @property
    def signature(self) -> inspect.Signature:
        """Of the model's own forward."""
        return self._signature

    def size(self, n: int | torch.SymInt | sympy.Expr) -> int:
        """``n`` with every symbol at its own large prime: equality and divisibility of sizes become integer tests."""
        if isinstance(n, int):
            return n
        expression: Any = n.node.expr if isinstance(n, torch.SymInt) else n
        found = self._sizes.get(expression)
        if found is None:
            found = self._sizes[expression] = int(expression.xreplace(self.hints))
        return found

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
        if self.grad_mode is not None and not torch.is_grad_enabled():
            raise CaptureError(
                "called under torch.no_grad, captured with gradients",
                where=self.grad_mode,
                why="forward asks whether gradients are recorded, and computes something else where they are not",
                help="call it with gradients on (and detach what it returns), or let forward decide by self.training",
            )
        leaves, spec = flattened((tuple(args), dict(kwargs or {})))
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
        sizes = tuple(map(caches.whole_shape, tensors))
        for given, wanted in zip(tensors, self.inputs, strict=True):
            self._check_kind(given, wanted)
        if sizes not in self._accepted:
            self._check_sizes(sizes)
            if len(self._accepted) < 4096:
                self._accepted.add(sizes)
        return tensors

    def unflatten(self, outputs: Sequence[Any], live: Sequence[Any] = ()) -> Any:
        """The model's own output structure from the graph's flat tuple.

        Caches that the call was given, in ``live``, are changed as the model would have; without them they are new.
        """
        return caches.returned(pytree.tree_unflatten(list(outputs), self.out_spec), live)

    def cache_outputs(self) -> frozenset[int]:
        """Which of the flat outputs are tensors of caches."""
        return caches.resident(pytree.tree_unflatten(range(self.out_spec.num_leaves), self.out_spec))

    def _rearranged(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Leaves in captured order, from a call that passes the same arguments in another way."""
        given = dict(_leaf_paths(self._signature, args, kwargs))
        self._check_caches(args, kwargs)
        present = {_argument(path) for path in given}
        leaves: list[Any] = []
        for slot in self._slots:
            if slot.path in given:
                leaves.append(given.pop(slot.path))
            elif not slot.tensor and self._is_default(slot.path, slot.value):
                leaves.append(slot.value)
            else:
                missing = slot.path if _argument(slot.path) in present else _argument(slot.path)
                raise CaptureError(
                    f"argument {_quoted(missing)} is missing",
                    why="the model was captured with it",
                    help=f"pass {missing}, or compile with example_inputs that leave it out",
                )
        for path, leaf in given.items():
            if not self._is_default(path, leaf):
                known = dict.fromkeys(_argument(slot.path) for slot in self._slots if slot.tensor)
                raise CaptureError(
                    f"argument {_quoted(path)} was not there when the model was captured",
                    why=f"captured tensors: {', '.join(known)}",
                    help=f"leave {path} out, or compile with example_inputs that contain it",
                )
        return leaves

    def _check_caches(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        shells = caches.shells(dict(_named(self._signature, args, kwargs)))
        for name in sorted(shells.keys() | self._shells.keys()):
            if shells.get(name) != self._shells.get(name):
                raise CaptureError(
                    f"the cache in {_quoted(name)} is of another kind, or in another state, than the one captured with",
                    why="layers of it, what they have been given and their fixed sizes are constants of the graph",
                    help="compile with example_inputs that contain such a cache",
                )

    def _is_default(self, path: str, value: Any) -> bool:
        parameter = self._signature.parameters.get(path)
        if parameter is None or parameter.default is parameter.empty:
            return value is None
        return _same_constant(parameter.default, value)

    def _check_kind(self, given: torch.Tensor, wanted: Input) -> None:
        example, name = wanted.example, _quoted(wanted.path)
        if given.dtype is not example.dtype:
            raise CaptureError(
                f"input {name} has dtype {given.dtype}, captured with {example.dtype}",
                help=f"pass {wanted.path}.to({example.dtype}), or compile with example_inputs of dtype {given.dtype}",
            )
        if given.device.type != example.device.type:
            raise CaptureError(
                f"input {name} is on {given.device}, captured on {example.device}",
                help=f"move it to {example.device.type!r}, or compile with model and example_inputs on {given.device}",
            )
        if given.dim() != example.dim():
            raise CaptureError(
                f"input {name} has {given.dim()} dims {list(given.shape)}, captured with {example.dim()}",
                help=f"pass {example.dim()} dims, or compile with example_inputs of that rank",
            )

    def check_shapes(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise `CaptureError` unless the graph is valid for inputs of these shapes, in placeholder order."""
        self._check_sizes(tuple(torch.Size(shape) for shape in shapes))

    def _check_sizes(self, sizes: tuple[torch.Size, ...]) -> None:
        places = [(i, dim) for i, wanted in enumerate(self.inputs) for dim in range(wanted.example.dim())]
        expected: int | torch.SymInt
        for i, dim in places:
            wanted, expected, got = self.inputs[i], self.inputs[i].example.shape[dim], sizes[i][dim]
            if not isinstance(expected, torch.SymInt) and expected != got:
                raise CaptureError(
                    f"input {_quoted(wanted.path)} has size {got} in dim {dim}, captured with {expected}",
                    where=wanted.fixed.get(dim),
                    why="this size is fixed in the captured graph",
                    help=f"pass size {expected}, or compile with example_inputs of size {got} in that dim",
                )
        values = {symbol: sympy.Integer(sizes[i][dim]) for symbol, (i, dim) in self._dims.items()}
        for i, dim in places:
            wanted, expected, got = self.inputs[i], self.inputs[i].example.shape[dim], sizes[i][dim]
            if isinstance(expected, torch.SymInt) and (tied := expected.node.expr.xreplace(values)) != got:
                raise CaptureError(
                    f"input {_quoted(wanted.path)} has size {got} in dim {dim}, expected {tied}",
                    why=f"the captured graph ties it to {self._sizes_text(expected.node.expr.free_symbols, sizes)}",
                    help="pass inputs whose sizes agree, or compile with example_inputs of these sizes",
                )
        for guard in self.guards:
            if guard.fails(values):
                condition = self._text(guard.condition)
                raise CaptureError(
                    f"the captured graph does not cover {self._sizes_text(guard.condition.free_symbols, sizes)}",
                    where=guard.where,
                    why=f"it was captured with {condition}, and the model takes another branch there"
                    if guard.branch
                    else f"the model requires {condition}",
                    help="compile with example_inputs of these sizes" + ("" if guard.branch else ", if it takes them"),
                )
        for symbol, (low, high) in self._ranges.items():
            if symbol in values and not low <= int(values[symbol]) <= high:
                raise CaptureError(
                    f"the captured graph does not cover {self._sizes_text({symbol}, sizes)}",
                    why=f"the model requires it to be within {low}..{high}",
                )

    def _text(self, condition: sympy.Basic) -> str:
        """``condition`` in Python, with ``ids.shape[1]`` for symbols."""
        text = PythonPrinter().doprint(condition) + " != 0" * isinstance(condition, sympy.Symbol)
        names = {
            str(symbol): self._dims[symbol] for symbol in condition.free_symbols if isinstance(symbol, sympy.Symbol)
        }
        return re.sub(
            r"\b[a-z]+\d+\b",
            lambda found: f"{self.inputs[names[found[0]][0]].path}.shape[{names[found[0]][1]}]",
            text,
        )

    def _sizes_text(self, symbols: set[sympy.Basic], sizes: tuple[torch.Size, ...]) -> str:
        dims = sorted(self._dims[symbol] for symbol in symbols if isinstance(symbol, sympy.Symbol))
        return ", ".join(f"{self.inputs[i].path}.shape[{dim}] = {sizes[i][dim]}" for i, dim in dims)


def _argument(path: str) -> str:
    """The argument that a leaf is part of."""
    return re.split(r"[\[.]", path, maxsplit=1)[0]


def _quoted(path: str) -> str:
    return f"`{path}`"


def _other_argument(path: str, expected: str, got: Any) -> CaptureError:
    shown = f"a tensor {list(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
    return CaptureError(
        f"argument {_quoted(path)} is {shown}, captured with {expected}",
        why="everything but tensors is a constant of the captured graph",
        help=f"pass {expected}, or compile with example_inputs in which {path} is {shown}",
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
    found: list[tuple[str, Any]] = []
    for name, value in caches.packed(_named(signature, args, kwargs)):
        try:
            keyed = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_leaves_with_path(value)]
        except ValueError:  # a container registered without key paths
            keyed = [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(value))]
        found += [(name + key, leaf) for key, leaf in keyed]
    return found


def _named(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arguments by their names, in pytree order."""
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), "args")
    named = [(names[i] if i < len(names) else f"{rest}[{i - len(names)}]", value) for i, value in enumerate(args)]
    return [*named, *kwargs.items()]


def _autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    kinds = ("cpu", "cuda")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


@contextlib.contextmanager
def set_apart() -> Generator[None]:
    """Make what outlives a call: inference mode around the call, and hooks on what it saves for backward (activation
    checkpointing), do not reach it."""
    with contextlib.ExitStack() as around:
        if torch.is_inference_mode_enabled():
            around.enter_context(torch.inference_mode(False))
            around.enter_context(torch.no_grad())
        if _saved_tensors_hooks(False):
            around.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        yield


_autograd: Any = getattr(getattr(torch, "_C"), "_autograd")  # noqa: B009 - private, and the only place to ask
_saved_tensors_hooks: Callable[[bool], Any] = _autograd._top_saved_tensors_default_hooks


def outside_autocast(function: Callable[..., Any], state: tuple[tuple[str, torch.dtype], ...]) -> Callable[..., Any]:
    """``function`` with the autocast modes of ``state`` switched off: what a captured graph runs in, casts included."""
    if not state:
        return function
    (kind, _), *others = state
    inner = outside_autocast(function, tuple(others))

    def switched_off(*args: Any) -> Any:
        with torch.autocast(kind, enabled=False):
            return inner(*args)

    return switched_off


def _autocast_text(state: tuple[tuple[str, torch.dtype], ...]) -> str:
    return " and ".join(f"autocast({kind!r}, {dtype})" for kind, dtype in state) or "no autocast"


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Captured:
    """``model`` as one graph, traced with the example inputs ``args`` and ``kwargs`` (only their shapes are used).

    The graph has the training or eval behaviour, dtypes and autocast state of this moment; casts of autocast are part
    of it, so it must run with autocast off. Without example inputs, those of
    `tpcompile.example_inputs.default_inputs` are used. The model is left as it was. Raises
    `CaptureError`, with the model's own source line where there is one.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if not args and not kwargs and _takes_inputs(model):
        from tpcompile.example_inputs import default_inputs

        args, kwargs = default_inputs(model)
    refuse_hooks(model)
    refuse_shared_memory(model)
    refuse_wrapped(model)
    signature = inspect.signature(model.forward)
    leaves, in_spec = flattened((args, kwargs))
    slots = tuple(
        _Slot(path, True) if isinstance(leaf, torch.Tensor) else _Slot(path, False, _plain(path, leaf))
        for path, leaf in _leaf_paths(signature, args, kwargs)
    )
    paths = [slot.path for slot in slots if slot.tensor]

    def rebuild(flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:  # caches stay taken apart
        tensors = iter(flat)
        return pytree.tree_unflatten([next(tensors) if slot.tensor else slot.value for slot in slots], in_spec)

    tensors = [caches.whole_example(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    names, autocast = Names.of(model), _autocast_state()
    shells = shells_of(model, args, kwargs)

    def traced(fixed: Collection[tuple[int, int]]) -> tuple[Trace, Inliner, fx.GraphModule]:
        found = trace(model, tensors, paths, rebuild, fixed)
        inliner = Inliner(model, found, names, paths, dict(autocast))
        return found, inliner, inliner.graph_module()

    fixed: set[tuple[int, int]] = set()
    while True:
        found, inliner, graph_module = traced(fixed)
        hints = _hints(graph_module, found, tensors)
        narrow = _unsuited(found, hints)
        if shells and not narrow:  # such as a sliding window that is about to be full
            narrow = _narrow(graph_module, found, hints)
        if narrow <= fixed:
            break
        fixed |= narrow
    warn_of_lost_state(model, found)
    return Captured(
        graph_module=graph_module,
        parameters=names.parameters,
        buffers=names.buffers,
        constants=inliner.constants,
        aliases=names.aliases,
        module_classes={n: type(m).__name__ for n, m in model.named_modules(remove_duplicate=False)},
        in_spec=in_spec,
        out_spec=found.out_spec,
        inputs=_inputs(inliner.placeholders, paths, found),
        guards=found.guards,
        hints=hints,
        training=model.training,
        autocast=autocast,
        grad_mode=found.grad_mode,
        _slots=slots,
        _signature=signature,
        _dims=found.dims(),
        _ranges=found.ranges(),
        _shells=shells,
    )


def shells_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, caches.Shell]:
    """The shells of the caches in a call, by argument."""
    return caches.shells(dict(_named(inspect.signature(model.forward), args, kwargs)))


def _takes_inputs(model: nn.Module) -> bool:
    """Whether ``model()`` alone is not a call of the model."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.kind not in variadic for p in inspect.signature(model.forward).parameters.values())


def _plain(path: str, leaf: Any) -> Any:
    if not isinstance(leaf, PLAIN):
        raise CaptureError(
            f"argument {_quoted(path)} is a {type(leaf).__name__}, neither a tensor nor a plain value",
            why="tensors inside it would become constants of the graph",
            help="pass its tensors themselves, or register the class with torch.export.register_dataclass",
        )
    return leaf


def _inputs(placeholders: list[fx.Node], paths: list[str], found: Trace) -> tuple[Input, ...]:
    inputs: list[Input] = []
    for i, (node, path) in enumerate(zip(placeholders, paths, strict=True)):
        example = node.meta["val"]
        dynamic = tuple(isinstance(size, torch.SymInt) for size in example.shape)
        lines = {dim: found.fixed_at(i, dim) for dim in found.asked[i] if not dynamic[dim]}
        fixed = {dim: where for dim, where in lines.items() if where is not None}
        inputs.append(Input(node.name, path, example, dynamic, fixed))
    return tuple(inputs)


HINT_SCALES = (1_000_000, 10_000, 1000, 500, 250, 120, 60, 30, 12, 4)
"""Above which primes are looked for: beyond the sizes of models first, so that no hint divides one."""
HINT_FACTORS = (1, 2, 4, 12)
"""What a prime is multiplied with where a condition (halves of one size, say) asks for more than a prime."""


def _hints(graph_module: fx.GraphModule, found: Trace, examples: Sequence[torch.Tensor]) -> dict[sympy.Symbol, int]:
    """A prime of its own for each symbol, times what the guards want it to be divisible by.

    As large as the guards and the limits of the sizes allow (a table of 512 positions limits the length), and a divisor
    of as few fixed sizes of the graph as can be had: symbols that no large prime suits get smaller ones, and those that
    none suits their size in the ``examples``, if that divides no fixed size.
    """
    guards, ranges = found.guards, found.ranges()
    symbols, fixed = _sizes_in(graph_module)
    moduli = dict.fromkeys(symbols, 1)
    conditions: list[Any] = [guard.condition for guard in guards]
    for condition in conditions:
        if isinstance(condition, sympy.Eq) and isinstance(condition.lhs, Mod) and condition.rhs == 0:
            of, by = cast("tuple[Any, Any]", condition.lhs.args)
            if of in moduli and isinstance(by, sympy.Integer):
                moduli[of] = math.lcm(moduli[of], int(by))
    hints: dict[sympy.Symbol, int] = {}
    follow = _equalities(guards, found.dims().keys())
    for scale, factor in itertools.product(HINT_SCALES, HINT_FACTORS):
        refused = _refused(hints, guards, ranges) if hints else symbols
        if not refused:
            break
        bases: set[Any] = {s for f in refused & follow.keys() for s in follow[f].free_symbols}
        refused = (refused | bases) - follow.keys()
        prime = scale
        for symbol in _smallest_first(refused, guards):
            prime = int(sympy.nextprime(prime))
            if scale != HINT_SCALES[0]:
                primes = (prime, *sympy.primerange(prime + 1, 4 * scale))
                prime = min(primes, key=lambda p: sum(n % p == 0 for n in fixed if n))
            hints[symbol] = prime * math.lcm(moduli[symbol], factor)
        hints |= {s: int(cast("Any", e).xreplace(hints)) for s, e in follow.items() if e.free_symbols <= hints.keys()}
    places = found.dims()
    for symbol in _refused(hints, guards, ranges) & places.keys():
        given, dim = places[symbol]
        if not any(n % examples[given].shape[dim] == 0 for n in fixed if n):
            hints[symbol] = examples[given].shape[dim]
    return hints


def _sizes_in(graph_module: fx.GraphModule) -> tuple[set[sympy.Symbol], set[int]]:
    """The symbols, and the known sizes, of all values of a graph."""
    symbols: set[sympy.Symbol] = set()
    fixed: set[int] = set()
    for node in graph_module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                    symbols |= size.node.expr.free_symbols
                elif isinstance(size, int):
                    fixed.add(size)
    return symbols, fixed


def _unsuited(found: Trace, hints: Mapping[sympy.Symbol, int]) -> set[tuple[int, int]]:
    """The dims of the symbol that has a part in most of the conditions that no hints meet: few sizes do, and often one
    alone, so that it is a fixed size."""
    failed: list[set[Any]] = [guard.condition.free_symbols for guard in found.guards if guard.fails(hints)]
    count = Counter(sorted(itertools.chain.from_iterable(failed), key=str))
    return next((places for symbol, _ in count.most_common() if (places := _places(found, {symbol}))), set())


def _places(found: Trace, symbols: Collection[sympy.Symbol]) -> set[tuple[int, int]]:
    """The dims of inputs whose sizes these symbols decide."""
    replace: Callable[[sympy.Symbol], Any] = found.env.replace
    asked = {one for symbol in symbols for one in replace(symbol).free_symbols}
    return {place for place, symbol in found.env.places.items() if replace(symbol).free_symbols & asked}


def _narrow(graph_module: fx.GraphModule, found: Trace, hints: Mapping[sympy.Symbol, int]) -> set[tuple[int, int]]:
    """The dims whose sizes cannot be told from known ones: conditions leave them too few values."""
    _, fixed = _sizes_in(graph_module)
    return _places(found, {s for s, hint in hints.items() if any(n % hint == 0 for n in fixed if n)})


def _smallest_first(symbols: Collection[sympy.Symbol], guards: Sequence[Guard]) -> list[sympy.Symbol]:
    """``symbols`` in an order in which a condition that one is less than another holds for growing primes."""
    order = nx.DiGraph()
    order.add_nodes_from(sorted(symbols, key=str))
    for guard in guards:
        small, large = _smaller(guard.condition)
        order.add_edges_from((a, b) for a in small & set(symbols) for b in large & set(symbols) if a != b)
    try:
        return list(nx.lexicographical_topological_sort(order, key=str))
    except nx.NetworkXUnfeasible:
        return sorted(symbols, key=str)


def _smaller(condition: Any) -> tuple[set[sympy.Symbol], set[sympy.Symbol]]:
    """Of an inequality: symbols that it bounds from above, and those that bound them."""
    if not isinstance(condition, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return set(), set()
    sides: Any = condition
    difference: Any = sympy.expand(sides.lhs - sides.rhs)
    if isinstance(condition, sympy.Ge | sympy.Gt):
        difference = -difference
    down = {s for s in difference.free_symbols if difference.coeff(s, 1) in (-1, -2)}
    return difference.free_symbols - down, down


def _equalities(guards: Sequence[Guard], symbols: Collection[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Expr]:
    """Symbols that the guards tie to others, such as a mask's length: that of a cache and one more."""
    conditions: list[Any] = [guard.condition for guard in guards]
    kinds = (sympy.Eq, sympy.Le)
    differences: list[Any] = [(type(c), sympy.expand(c.lhs - c.rhs)) for c in conditions if type(c) in kinds]
    zero = [d for kind, d in differences if kind is sympy.Eq]
    below = {d for kind, d in differences if kind is sympy.Le}
    zero += [x for x in below if sympy.expand(-x) in below]
    found: dict[sympy.Symbol, sympy.Expr] = {}
    for difference in zero:
        for symbol in sorted(difference.free_symbols & set(symbols), key=str, reverse=True):
            rest, factor = (sympy.expand(difference).coeff(symbol, n) for n in (0, 1))
            alone = factor in (1, -1) and sympy.expand(difference - factor * symbol - rest) == 0
            if alone and rest.free_symbols and symbol not in found and not rest.free_symbols & found.keys():
                found[symbol] = -rest / factor
                break
    return found


def _refused(
    hints: Mapping[sympy.Symbol, int], guards: Sequence[Guard], ranges: Mapping[sympy.Symbol, tuple[int, int]]
) -> set[sympy.Symbol]:
    """The symbols of the conditions that do not hold at the hints."""
    refused = {s for s, (low, high) in ranges.items() if s in hints and not low <= hints[s] <= high}
    for guard in guards:
        if guard.fails(hints):
            refused |= {s for s in hints if s in guard.condition.free_symbols}
    return refused
