"""Op rules as data: one row per aten overload, read like einsum (see :mod:`tpcompile.sentence`).

Rows for shape ops are computed from the call but return the same kind of sentence. A row may say how its size
arguments become local (``localize``) and which kernel replaces the op when a cut asks for it (``kernel``). Every row's
truth is tested over all layouts by one generic test; an op without a row is fine while nothing cut reaches it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.fx

from tpcompile import collectives, kernels
from tpcompile.layout import axes_of, size
from tpcompile.localize import LocalCall
from tpcompile.sentence import Call, Labels, Linear, Sentence, Shape, parse_row, reshape_sentence

Row = str | Callable[[Call], Sentence]


@dataclass(frozen=True)
class Rule:
    """What one overload means. ``op`` is e.g. ``"aten.linear.default"``.

    ``linear``/``sums`` are the facts of :class:`~tpcompile.sentence.Sentence` for text rows. ``localize`` rewrites
    arguments to local sizes; ``kernel`` emits the replacement and returns it, or None to keep the op. ``random``: the
    op draws from the generator, so replicas must draw the same numbers. ``because`` is the reason for ``!`` labels.
    """

    op: str
    row: Row
    linear: Linear = None
    sums: bool = False
    because: str | None = None
    localize: Callable[[LocalCall], None] | None = None
    kernel: Callable[[LocalCall], torch.fx.Node | None] | None = None
    random: bool = False
    references: frozenset[int] = field(default_factory=frozenset[int])

    def sentence(self, call: Call) -> Sentence:
        """The sentence of one call."""
        if callable(self.row):
            return self.row(call)
        found = parse_row(self.row, call.shapes, call.results, self.op)
        linear = self.linear
        if linear == "joint" and _has_scalar_operand(call):
            linear = None  # x + 1 is affine: each rank would add its own 1
        whole = {k: self.because or why for k, why in found.whole.items()}
        return replace(found, linear=linear, sums=self.sums, whole=whole, references=self.references)


def _has_scalar_operand(call: Call) -> bool:
    return len(call.operands) < 2


# ---------------------------------------------------------------------------------------------- elementwise, generated
def _names(text: str) -> list[str]:
    return text.split()


LINEAR_UNARY = _names("neg alias clone contiguous detach lift_fresh_copy positive real imag _conj")
NONLINEAR_UNARY = _names("""
abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal relu gelu silu mish sigmoid tanh erf sin cos tan asin acos
atan sinh cosh logical_not bitwise_not isnan isinf isfinite floor ceil round trunc sign sgn square nan_to_num hardtanh
hardswish hardsigmoid leaky_relu elu selu celu softplus log_sigmoid relu6 frac erfc threshold logit softshrink
hardshrink sinc erfinv digamma lgamma angle""")
NONLINEAR_BINARY = _names("""
eq ne lt le gt ge maximum minimum bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ logical_and logical_or
logical_xor atan2 fmod remainder floor_divide pow clamp clamp_min clamp_max hypot xlogy logaddexp copysign polar complex
fill expand_as""")
ALIASES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "concat": "cat", "concatenate": "cat",
}  # fmt: skip
"""Other names of the same ops, with overloads of the same names; they get the same rows."""


def _overloads(name: str) -> list[str]:
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [f"aten.{name}.{o}" for o in packet.overloads()]


def _tensor_count(op: str) -> int:
    """Tensor operands of an overload that returns one new tensor of them; 0 for ``out=`` forms, lists and scalars."""
    _, name, overload = op.split(".")
    schema = getattr(getattr(torch.ops.aten, name), overload)._schema
    kinds = [str(a.type) for a in schema.arguments]
    plain = [str(r.type) for r in schema.returns] == ["Tensor"] and not any(a.is_out for a in schema.arguments)
    return sum("Tensor" in k for k in kinds) if plain and not any("List[Tensor]" in k for k in kinds) else 0


def _elementwise() -> Iterable[Rule]:
    for name in dict.fromkeys(LINEAR_UNARY + NONLINEAR_UNARY + NONLINEAR_BINARY):
        for op in _overloads(name):
            if inputs := _tensor_count(op):
                linear: Linear = "each" if name in LINEAR_UNARY else None
                yield Rule(op, ", ".join(["..."] * inputs) + " -> ...", linear)
    for op in ("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default"):
        yield Rule(op, "... -> ...")
    for name in ("add", "sub"):
        yield Rule(f"aten.{name}.Tensor", "..., ... -> ...", "joint")
        yield Rule(f"aten.{name}.Scalar", "... -> ...")
    yield Rule("aten.rsub.Tensor", "..., ... -> ...", "joint")
    yield Rule("aten.rsub.Scalar", "... -> ...")
    yield Rule("aten.view_as_complex.default", "... c! -> ...", "each", because="two numbers make one complex number")
    yield Rule("aten.view_as_real.default", "... -> ... c", "each")
    yield Rule("aten.bucketize.Tensor", "..., b! -> ...", because="positions are counted over all boundaries")
    yield Rule("aten.prelu.default", _prelu)
    yield Rule("aten.broadcast_tensors.default", _broadcast)
    yield Rule("aten.mul.Tensor", "..., ... -> ...", "each")
    yield Rule("aten.mul.Scalar", "... -> ...", "each")
    yield Rule("aten.div.Tensor", "..., ... -> ...", frozenset({0}))
    yield Rule("aten.div.Scalar", "... -> ...", "each")
    yield Rule("aten.div.Tensor_mode", "..., ... -> ...")
    yield Rule("aten.div.Scalar_mode", "... -> ...")
    yield Rule("aten.lerp.Scalar", "..., ... -> ...", "joint")
    yield Rule("aten.lerp.Tensor", "..., ..., ... -> ...")
    for name in ("max", "min"):
        yield Rule(f"aten.{name}.other", "..., ... -> ...")
    yield Rule("aten.addcmul.default", "..., ..., ... -> ...")
    yield Rule("aten.addcdiv.default", "..., ..., ... -> ...")
    yield Rule("aten.where.self", "..., ..., ... -> ...")
    yield Rule("aten.where.ScalarSelf", "..., ... -> ...")
    yield Rule("aten.where.ScalarOther", "..., ... -> ...")
    yield Rule("aten.where.Scalar", "... -> ...")
    yield Rule("aten.masked_fill.Scalar", "..., ... -> ...")
    yield Rule("aten.masked_fill.Tensor", "..., ..., -> ...")
    yield Rule("aten.type_as.default", _type_as)
    yield Rule("aten.to.other", _type_as)
    for name in ("zeros_like", "ones_like", "full_like", "empty_like"):
        yield Rule(f"aten.{name}.default", "... -> ...", references=frozenset({0}))
    for name in ("new_zeros", "new_ones", "new_full", "new_empty"):
        yield Rule(f"aten.{name}.default", _fresh, references=frozenset({0}))


def _fresh(call: Call) -> Sentence:
    """A new constant: neither its shape nor its values come from the operand."""
    operands = tuple(tuple(f"x{d}" for d in range(len(s))) for s in call.shapes)
    results = tuple(tuple(f"y{d}" for d in range(len(s))) for s in call.results)
    sizes = {f"x{d}": n for d, n in enumerate(call.shapes[0])} | {f"y{d}": n for d, n in enumerate(call.results[0])}
    return Sentence(operands, results, sizes, references=frozenset({0}))


def _prelu(call: Call) -> Sentence:
    """One slope, or one per channel (dim 1)."""
    labels = tuple(f"d{d}" for d in range(len(call.shapes[0])))
    slope: Labels = tuple(labels[1] if n != 1 else None for n in call.shapes[1])
    return Sentence((labels, slope), (labels,), dict(zip(labels, call.shapes[0], strict=True)))


def _broadcast(call: Call) -> Sentence:
    every = ", ".join(["..."] * len(call.shapes))
    return replace(parse_row(f"{every} -> {every}", call.shapes, call.results, "broadcast_tensors"), linear=None)


def _type_as(call: Call) -> Sentence:
    found = parse_row("... -> ...", call.shapes[:1], call.results, "type_as")
    other = tuple(f"y{d}" for d in range(len(call.shapes[1])))
    sizes = dict(found.sizes) | dict(zip(other, call.shapes[1], strict=True))
    return replace(found, operands=(found.operands[0], other), sizes=sizes, references=frozenset({1}))


# ---------------------------------------------------------------------------------------------- products and sums
def _matmul(call: Call) -> Sentence:
    a, b = (len(s) for s in call.shapes)
    left = {1: "k"}.get(a, "... m k")
    right = {1: "k"}.get(b, "... k n")
    out = "... " + ("m " if a > 1 else "") + ("n" if b > 1 else "")
    text = f"{left}, {right} -> {out}" if max(a, b) > 1 else "k, k -> "
    found = parse_row(text, call.shapes, call.results, "matmul")
    return replace(found, linear="each", sums=True)


def _einsum(call: Call) -> Sentence:
    left, arrow, right = str(call.argument("equation")).replace(" ", "").partition("->")
    parts = [re.findall(r"\.\.\.|[A-Za-z]", part) for part in left.split(",")]
    names = [x for part in parts for x in part]
    if any(len(set(part)) != len(part) for part in parts):
        raise ValueError(f"einsum {left!r} takes a diagonal")
    result = re.findall(r"\.\.\.|[A-Za-z]", right)
    if not arrow:  # implicit: broadcast dims, then what appears once, in alphabetical order
        result = ["..."] * ("..." in names) + sorted(x for x in set(names) - {"..."} if names.count(x) == 1)
    text = ", ".join(map(" ".join, parts)) + " -> " + " ".join(result)
    return replace(parse_row(text, call.shapes, call.results, "einsum"), linear="each", sums=True)


def _grouped_product(call: Call) -> Sentence:
    """Rows sorted by expert times the matrix of their expert; ``offs`` says where each expert's rows end."""
    if tuple(map(len, call.shapes)) != (2, 3, 1):
        raise ValueError("a grouped product of other than rows [r, k], matrices [e, k, n] and ends [e] has no rule")
    found = parse_row("r k, e k n, e -> r n", call.shapes, call.results, "grouped_mm")
    names = tuple(x.name for x in call.operands)
    return replace(found, linear=frozenset({0, 1}), sums=True, owners=(("r", "e", 2),), names=names)


def _grouped_part(local: LocalCall) -> torch.fx.Node | None:
    """Some of the experts are held here: their rows, zero for the others."""
    experts = local.operands[1].dims[0]
    if not axes_of(experts):
        return None
    return local.emit(kernels.grouped_product, (*local.args[:3], local.held(experts)))


def _inner(call: Call) -> Sentence:
    """Sum over the last dim of both; the other dims of one, then those of the other."""
    a, b = (len(s) - 1 for s in call.shapes)
    if a < 0 or b < 0:
        raise ValueError("inner with a scalar is a product")
    rows, columns = (" ".join(f"{x}{i}" for i in range(n)) for x, n in (("m", a), ("n", b)))
    found = parse_row(f"{rows} k, {columns} k -> {rows} {columns}", call.shapes, call.results, "inner")
    return replace(found, linear="each", sums=True)


def _tensordot(call: Call) -> Sentence:
    """Sum over the dims that ``dims_self`` and ``dims_other`` pair up."""
    labels = [[f"{x}{i}" for i in range(len(s))] for x, s in zip("mn", call.shapes, strict=True)]
    pairs = list(zip(call.argument("dims_self"), call.argument("dims_other"), strict=True))
    for i, j in pairs:
        labels[1][j] = labels[0][i]
    summed = {labels[0][i] for i, _ in pairs}
    result = " ".join(x for part in labels for x in part if x not in summed)
    text = ", ".join(map(" ".join, labels)) + " -> " + result
    return replace(parse_row(text, call.shapes, call.results, "tensordot"), linear="each", sums=True)


def _reduction(linear: bool, reason: str) -> Callable[[Call], Sentence]:
    def sentence(call: Call) -> Sentence:
        shape = call.shapes[0]
        dims = _reduced(call)
        labels = [f"d{i}" for i in range(len(shape))]
        result = [None if i in dims else x for i, x in enumerate(labels)]
        if len(call.results[0]) != len(shape):  # keepdim=False
            result = [x for i, x in enumerate(result) if i not in dims]
        whole = {} if linear else {labels[i]: reason for i in dims}
        return Sentence(
            (tuple(labels),), tuple(tuple(result) for _ in call.results), dict(zip(labels, shape, strict=True)),
            linear="each" if linear else None, sums=linear, whole=whole,
        )  # fmt: skip

    return sentence


def _reduced(call: Call) -> set[int]:
    n = len(call.shapes[0])
    try:
        dims = call.argument("dim")
    except KeyError:
        dims = None
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(n))
    chosen = dims if isinstance(dims, (list, tuple)) else [dims]
    return {int(d) % n for d in chosen} if n else set()


def _along(argument: str, reason: str, linear: Linear = None) -> Callable[[Call], Sentence]:
    """Same shape out; the dims named by ``argument`` (none: all) must be whole, all others pass."""

    def sentence(call: Call) -> Sentence:
        shape = call.shapes[0]
        labels = tuple(f"d{i}" for i in range(len(shape)))
        dims = call.argument(argument)
        chosen = dims if isinstance(dims, (list, tuple)) else [dims]
        whole = {labels[int(d) % len(shape)]: reason for d in chosen or range(len(shape))} if shape else {}
        results = tuple(labels for _ in call.results)
        sizes = dict(zip(labels, shape, strict=True))
        if any(r != shape for r in call.results):  # topk: the dim shrinks
            changed = next(i for i in range(len(shape)) if call.results[0][i] != shape[i])
            results = tuple(tuple("k" if i == changed else x for i, x in enumerate(labels)) for _ in call.results)
            sizes["k"] = call.results[0][changed]
        return Sentence((labels,), results, sizes, linear=linear, whole=whole)

    return sentence


def _conv(call: Call) -> Sentence:
    """Batch and channels may be cut; one channel per group (depthwise) too, other groups not."""
    spatial = len(call.shapes[1]) - 2
    if len(call.shapes[0]) != spatial + 2:
        raise ValueError("a convolution of one sample without a batch dim has no rule")
    if len(call.operands) == 3:
        raise ValueError("the bias of a convolution is an addition before anything is placed")
    transposed = "transpose" in str(call.node.target)
    groups = int(call.argument("groups"))
    x: Labels = ("b", "i", *(f"x{d}" for d in range(spatial)))
    w: Labels = ("i", "o") if transposed else ("o", "i")
    y: Labels = ("b", "o", *(f"y{d}" for d in range(spatial)))
    kernel = tuple(f"k{d}" for d in range(spatial))
    whole = {str(label): "a convolution reads its neighbours" for label in (*x[2:], *kernel)}
    if groups != 1 and groups == call.shapes[0][1] == call.results[0][1]:
        w, y = ("i", None), ("b", "i", *y[2:])
    elif groups != 1:
        w = ("p", "q")
        whole |= dict.fromkeys(("i", "o", "p", "q"), "a grouped convolution pairs its channels")
    operands = (*x,), (*w, *kernel)
    sizes: dict[str, int] = {}
    for labels, shape in [*zip(operands, call.shapes, strict=True), (y, call.results[0])]:
        sizes |= {label: n for label, n in zip(labels, shape, strict=True) if label is not None}
    return Sentence(operands, (y,), sizes, linear="each", sums=True, whole=whole)


def _local_groups(local: LocalCall) -> None:
    groups, channels = int(local.call.argument("groups")), local.operands[0].dims[1]
    if groups == size(channels):
        local.set("groups", local.size(groups, channels))


def _attention(call: Call) -> Sentence:
    """Fused attention: batch and heads pass, everything inside a head must be whole."""
    q, k = call.shapes[:2]
    lead = len(q) - 2
    batch = tuple(f"b{i}" for i in range(lead))
    heads_q = heads_k = batch
    products: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    sizes: dict[str, int] = {}
    whole = {x: f"attention needs {why} whole" for x, why in (("q", "the queries"), ("k", "the keys"),
                                                            ("d", "the head dim"), ("e", "the value dim"))}  # fmt: skip
    if call.argument("enable_gqa") and q[-3] != k[-3]:
        raise ValueError("grouped-query attention inside the fused kernel is lowered before placement")
    if call.argument("dropout_p"):
        raise ValueError("attention with dropout inside the fused kernel cannot be cut")
    mask = call.argument("attn_mask")
    operands: list[Labels] = [(*heads_q, "q", "d"), (*heads_k, "k", "d"), (*heads_k, "k", "e")]
    for labels, shape in zip(operands, call.shapes, strict=False):
        sizes |= {str(x): max(n, sizes.get(str(x), 0)) for x, n in zip(labels, shape, strict=True)}
    if mask is not None:
        operands.append((*batch, "q", "k")[-len(call.shapes[3]) :])
    broadcast = tuple(
        tuple(None if n == 1 and sizes[str(x)] != 1 else x for x, n in zip(labels, shape, strict=True))
        for labels, shape in zip(operands, call.shapes, strict=True)
    )
    # with one query or key, "whole" still holds; linear in v alone
    return Sentence(broadcast, ((*batch, "q", "e"),), sizes, frozenset({2}), whole=whole, products=products)


def _normalize(call: Call) -> Sentence:
    """layer_norm, rms_norm: the normalized dims must be whole; weight and bias lie along them.

    Without a bias the result is linear in the weight.
    """
    shape = call.shapes[0]
    count = len(call.argument("normalized_shape"))
    labels = tuple(f"d{i}" for i in range(len(shape)))
    whole = dict.fromkeys(labels[len(shape) - count :], "a norm takes its mean over the whole axis")
    operands = (labels, *(labels[len(shape) - len(s) :] for s in call.shapes[1:]))
    linear = frozenset({1}) if len(operands) == 2 and op_name(call.node) == "aten.rms_norm.default" else None
    return Sentence(operands, (labels,), dict(zip(labels, shape, strict=True)), linear, whole=whole)


def _batch_norm(call: Call) -> Sentence:
    """With running statistics it acts on each value alone; else it takes its mean over everything but the channels."""
    shape = call.shapes[0]
    labels = tuple(f"d{i}" for i in range(len(shape)))
    whole: dict[str, str] = {}
    if call.argument("training"):
        # the channels too: running statistics are written in place, and a cut of them would be lost
        whole = dict.fromkeys(labels, "batch statistics are taken over the whole axis")
    operands = (labels, *((labels[1],) for _ in call.shapes[1:]))
    return Sentence(operands, (labels,), dict(zip(labels, shape, strict=True)), whole=whole)


def _group_norm(call: Call) -> Sentence:
    shape = call.shapes[0]
    labels = tuple(f"d{i}" for i in range(len(shape)))
    whole = dict.fromkeys(labels[1:], "a norm over groups of channels reads the whole axis")
    operands = (labels, *((labels[1],) for _ in call.shapes[1:]))
    return Sentence(operands, (labels,), dict(zip(labels, shape, strict=True)), whole=whole)


# ---------------------------------------------------------------------------------------------- shapes, computed
def _reshape(call: Call) -> Sentence:
    return reshape_sentence(call.shapes[0], call.results[0])


def _permuted(order: Callable[[Call, int], list[int]]) -> Callable[[Call], Sentence]:
    def sentence(call: Call) -> Sentence:
        labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
        result = tuple(labels[i] for i in order(call, len(labels)))
        return Sentence((labels,), (result,), dict(zip(labels, call.shapes[0], strict=True)), linear="each")

    return sentence


def _swap(call: Call, n: int) -> list[int]:
    order = list(range(n))
    a, b = call.dim("dim0"), call.dim("dim1")
    order[a], order[b] = order[b], order[a]
    return order


def _reverse_two(_: Call, n: int) -> list[int]:
    return list(range(n)) if n < 2 else [*range(n - 2), n - 1, n - 2]


def _swap_axes(call: Call, n: int) -> list[int]:
    order = list(range(n))
    a, b = call.dim("axis0"), call.dim("axis1")
    order[a], order[b] = order[b], order[a]
    return order


def _permute(call: Call, n: int) -> list[int]:
    return [int(d) % n for d in call.argument("dims")]


def _move(call: Call, n: int) -> list[int]:
    source, target = (
        [int(d) % n for d in (x if isinstance(x, (list, tuple)) else [x])]
        for x in (call.argument("source"), call.argument("destination"))
    )
    moved = dict(zip(target, source, strict=True))
    rest = iter(d for d in range(n) if d not in source)
    return [moved[d] if d in moved else next(rest) for d in range(n)]


def _expand(call: Call) -> Sentence:
    before, after = call.shapes[0], call.results[0]
    lead = len(after) - len(before)
    result = tuple(f"y{d}" for d in range(len(after)))
    operand = tuple(None if n == 1 and after[lead + d] != 1 else f"y{lead + d}" for d, n in enumerate(before))
    return Sentence((operand,), (result,), dict(zip(result, after, strict=True)), linear="each")


def _window(call: Call, dim: int, start: int, length: int, step: int = 1) -> Sentence:
    """A slice: the dim is what comes before, the window, and what comes after."""
    shape = call.shapes[0]
    labels = [f"d{i}" for i in range(len(shape))]
    sizes = dict(zip(labels, shape, strict=True))
    result = list(labels)
    whole: dict[str, str] = {}
    concats: tuple[tuple[str, tuple[str, ...]], ...] = ()
    if length != shape[dim]:
        result[dim] = "window"
        if step != 1 or length == 0:
            whole[labels[dim]] = f"a slice with step {step} reads across it"
            sizes["window"] = length
        else:
            sizes |= {"before": start, "window": length, "after": shape[dim] - start - length}
            concats = ((labels[dim], ("before", "window", "after")),)
    return Sentence((tuple(labels),), (tuple(result),), sizes, linear="each", whole=whole, concats=concats)


def _slice_bounds(call: Call) -> tuple[int, int, int, int]:
    dim = call.dim()
    n = call.shapes[0][dim]
    start, end, step = call.argument("start"), call.argument("end"), call.integer(call.argument("step") or 1)
    low = 0 if start is None else call.integer(start)
    high = n if end is None else call.integer(end)
    low = min(max(low + n if low < 0 else low, 0), n)
    high = min(max(high + n if high < 0 else high, low), n)
    return dim, low, high, step


def _slice(call: Call) -> Sentence:
    dim, low, high, step = _slice_bounds(call)
    if not _strides(call):
        return _window(call, dim, low, -(-(high - low) // step), step)
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    sizes = dict(zip(labels, call.shapes[0], strict=True)) | {"every": call.results[0][dim], "step": step}
    result = tuple("every" if i == dim else x for i, x in enumerate(labels))
    whole = {"step": f"a slice with step {step} takes one of every {step}"}
    products = (((labels[dim],), ("every", "step")),)
    return Sentence((labels,), (result,), sizes, linear="each", whole=whole, products=products)


def _strides(call: Call) -> bool:
    """Whether a slice takes one of every ``step`` positions, from the first group of them to the last."""
    dim, low, high, step = _slice_bounds(call)
    n = call.shapes[0][dim]
    return step > 1 and n % step == 0 and low < step and high > n - step + low


def _local_slice(local: LocalCall) -> None:
    dim, low, high, _ = _slice_bounds(local.call)
    layout = local.operands[0].dims[dim]
    n = local.call.shapes[0][dim]
    if _strides(local.call):
        local.set("end", sys.maxsize if axes_of(layout) else local.current("end"))
        return
    if axes_of(layout) and (low, high) != (0, n):
        local.set("start", local.offset(layout, low))
        local.set("end", local.offset(layout, high))


def _narrow(call: Call) -> Sentence:
    dim = call.dim()
    start = call.integer(call.argument("start"))
    return _window(call, dim, start % call.shapes[0][dim] if start < 0 else start, call.results[0][dim])


def _local_narrow(local: LocalCall) -> None:
    dim = local.call.dim()
    layout, taken = local.operands[0].dims[dim], local.results[0].dims[dim]
    n = local.call.shapes[0][dim]
    if axes_of(layout):
        start = local.call.integer(local.call.argument("start"))
        local.set("start", local.offset(layout, start % n if start < 0 else start))
        local.set("length", local.length(taken))


def _pieces(call: Call) -> Sentence:
    """split and chunk: the dim is its pieces one after the other."""
    dim = call.dim()
    shape = call.shapes[0]
    labels = tuple(f"d{i}" for i in range(len(shape)))
    parts = tuple(f"p{i}" for i in range(len(call.results)))
    sizes = dict(zip(labels, shape, strict=True)) | {p: r[dim] for p, r in zip(parts, call.results, strict=True)}
    results = tuple(tuple(p if i == dim else x for i, x in enumerate(labels)) for p in parts)
    if len(parts) == 1:
        return Sentence((labels,), (labels,), dict(zip(labels, shape, strict=True)), linear="each")
    return Sentence((labels,), results, sizes, linear="each", concats=((labels[dim], parts),))


def _local_pieces(local: LocalCall) -> None:
    dim = local.call.dim()
    if axes_of(local.operands[0].dims[dim]):
        sizes = [
            local.size(shape[dim], r.dims[dim]) for shape, r in zip(local.call.results, local.results, strict=True)
        ]
        local.replace("aten.split_with_sizes.default", (local.args[0], sizes, dim))


def _glu(call: Call) -> Sentence:
    """``a * sigmoid(b)`` of the two halves of a dim, which must be cut alike."""
    dim = call.dim()
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    result = tuple("half" if i == dim else x for i, x in enumerate(labels))
    sizes = dict(zip(labels, call.shapes[0], strict=True)) | {"two": 2, "half": call.results[0][dim]}
    whole = {"two": "a gated unit pairs its two halves"}
    return Sentence((labels,), (result,), sizes, whole=whole, products=(((labels[dim],), ("two", "half")),))


def _unfold(call: Call) -> Sentence:
    """Windows of a dim, as a new last dim."""
    dim = call.dim("dimension")
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    result = (*("windows" if i == dim else x for i, x in enumerate(labels)), "inside")
    sizes = dict(zip(labels, call.shapes[0], strict=True)) | dict(zip(result, call.results[0], strict=True))
    whole = {labels[dim]: "windows run across it"}
    return Sentence((labels,), (result,), sizes, linear="each", whole=whole)


def _local_squeeze(local: LocalCall) -> None:
    """Name the dims of size 1: on one rank a cut dim may have that size too."""
    shape = local.call.shapes[0]
    name = str(local.call.node.target)
    if name == "aten.squeeze.default":
        chosen = range(len(shape))
    else:
        dims = local.call.argument("dim")
        chosen = [int(d) % len(shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    local.replace("aten.squeeze.dims", (local.args[0], [d for d in chosen if shape[d] == 1]))


def _drop_dims(call: Call) -> Sentence:
    """squeeze, unsqueeze: dims of size 1 come and go."""
    labels = tuple(f"d{i}" if n != 1 else None for i, n in enumerate(call.shapes[0]))
    kept = iter([x for x in labels if x is not None])
    result = tuple(None if n == 1 else next(kept) for n in call.results[0])
    sizes = {x: n for x, n in zip(labels, call.shapes[0], strict=True) if x is not None}
    return Sentence((labels,), (result,), sizes, linear="each")


def _select(call: Call) -> Sentence:
    dim = call.dim()
    n = call.shapes[0][dim]
    index = call.argument("index")
    position = call.integer(index)
    found = _window(call, dim, position % n, 1)
    result = tuple(x for i, x in enumerate(found.results[0]) if i != dim)
    return replace(found, results=(result,))


def _local_select(local: LocalCall) -> None:
    dim = local.call.dim()
    layout = local.operands[0].dims[dim]
    if axes_of(layout):
        n = local.call.shapes[0][dim]
        local.set("index", local.offset(layout, local.call.integer(local.call.argument("index")) % n))


def _unbind(call: Call) -> Sentence:
    dim = call.dim()
    shape = call.shapes[0]
    labels = tuple(f"d{i}" for i in range(len(shape)))
    result = tuple(x for i, x in enumerate(labels) if i != dim)
    return Sentence(
        (labels,), tuple(result for _ in call.results), dict(zip(labels, shape, strict=True)), linear="each",
        whole={labels[dim]: "unbind takes it apart position by position"},
    )  # fmt: skip


def _cat(call: Call) -> Sentence:
    rank = max(len(s) for s in call.shapes)
    dim = int(call.argument("dim")) % rank
    labels = tuple(f"d{i}" for i in range(rank))
    sizes = {x: n for i, (x, n) in enumerate(zip(labels, call.results[0], strict=True)) if i != dim}
    operands: list[Labels] = []
    parts: list[str] = []
    for index, shape in enumerate(call.shapes):
        if len(shape) != rank:  # the legacy empty tensor
            operands.append((None,) * len(shape))
            continue
        part = f"p{index}"
        sizes[part] = shape[dim]
        parts.append(part)
        operands.append(tuple(part if i == dim else x for i, x in enumerate(labels)))
    joined = parts[0] if len(parts) == 1 else "joined"
    sizes[joined] = call.results[0][dim]
    result = tuple(joined if i == dim else x for i, x in enumerate(labels))
    concats = ((joined, tuple(parts)),) if len(parts) > 1 else ()
    return Sentence(tuple(operands), (result,), sizes, linear="joint", concats=concats)


def _stack(call: Call) -> Sentence:
    rank = len(call.shapes[0])
    dim = int(call.argument("dim")) % (rank + 1)
    labels = tuple(f"d{i}" for i in range(rank))
    sizes = dict(zip(labels, call.shapes[0], strict=True)) | {"new": len(call.shapes)}
    return Sentence(
        tuple(labels for _ in call.shapes), ((*labels[:dim], "new", *labels[dim:]),), sizes,
        linear="joint" if len(call.shapes) > 1 else "each",
    )  # fmt: skip


def _repeat(call: Call) -> Sentence:
    before, after = call.shapes[0], call.results[0]
    lead = len(after) - len(before)
    operand: list[Label_] = []
    result: list[Label_] = [f"n{d}" for d in range(lead)]
    sizes: dict[str, int] = {f"n{d}": after[d] for d in range(lead)}
    products: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for d, n in enumerate(before):
        times = after[lead + d] // n if n else 1
        if n == 1 and times > 1:
            operand.append(None)
            result.append(f"y{d}")
            sizes[f"y{d}"] = times
            continue
        operand.append(f"x{d}")
        sizes[f"x{d}"] = n
        if times == 1:
            result.append(f"x{d}")
        else:
            result.append(f"y{d}")
            sizes |= {f"y{d}": n * times, f"t{d}": times}
            products.append(((f"t{d}", f"x{d}"), (f"y{d}",)))
    return Sentence((tuple(operand),), (tuple(result),), sizes, linear="each", products=tuple(products))


Label_ = str | None


def _repeat_interleave(call: Call) -> Sentence:
    shape = call.shapes[0]
    labels = tuple(f"d{i}" for i in range(len(shape)))
    if call.argument("dim") is None:
        whole = dict.fromkeys(labels, "repeat_interleave without a dim flattens its operand")
        sizes = dict(zip(labels, shape, strict=True)) | {"y": call.results[0][0]}
        return Sentence((labels,), (("y",),), sizes, linear="each", whole=whole)
    dim = call.dim()
    result = tuple("y" if i == dim else x for i, x in enumerate(labels))
    times = call.results[0][dim] // shape[dim]
    sizes = dict(zip(labels, shape, strict=True)) | {"y": call.results[0][dim], "t": times}
    return Sentence((labels,), (result,), sizes, linear="each", products=(((labels[dim], "t"), ("y",)),))


def _local_repeats(local: LocalCall) -> None:
    """``output_size``, where it is given, is a size of the result."""
    if (stated := local.current("output_size")) is not None and local.call.argument("dim") is not None:
        local.set("output_size", local.size(stated, local.results[0].dims[local.call.dim()]))


def _pad(call: Call) -> Sentence:
    before, after = call.shapes[0], call.results[0]
    labels = tuple(f"d{i}" for i in range(len(before)))
    pads = list(call.argument("pad"))
    padded = {len(before) - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    result = tuple(f"y{i}" if i in padded else x for i, x in enumerate(labels))
    sizes = dict(zip(labels, before, strict=True)) | {f"y{i}": after[i] for i in padded}
    return Sentence((labels,), (result,), sizes, whole={labels[i]: "padding moves its positions" for i in padded})


def _index(call: Call) -> Sentence:
    """x[..., i, ...]: indexed dims must be whole, the others pass; index tensors broadcast together."""
    indices = list(call.argument("indices"))
    shape = call.shapes[0]
    labels = [f"d{i}" for i in range(len(shape))]
    indexed = [i for i, x in enumerate(indices) if x is not None]
    if any(x.meta["val"].dtype in (torch.bool, torch.uint8) for x in call.operands[1 : 1 + len(indexed)]):
        raise ValueError("a mask as an index picks as many positions as it holds")
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    wide = max(len(s) for s in call.shapes[1:])
    fresh = [f"i{j}" for j in range(wide)]
    rest = [x for i, x in enumerate(labels) if i not in indexed]
    at = indexed[0] if adjacent else 0
    result = (*rest[:at], *fresh, *rest[at:])
    sizes = dict(zip(labels, shape, strict=True)) | dict(zip(result, call.results[0], strict=True))
    operands: list[Labels] = [tuple(labels)]
    for s in call.shapes[1:]:
        own = fresh[wide - len(s) :]
        operands.append(tuple(None if n == 1 and sizes[x] != 1 else x for x, n in zip(own, s, strict=True)))
    whole = {labels[i]: "an index tensor picks positions from all of it" for i in indexed}
    return Sentence(tuple(operands), (tuple(result),), sizes, linear=frozenset({0}), whole=whole)


def _index_select(call: Call) -> Sentence:
    dim = call.dim()
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    result = tuple("i" if d == dim else x for d, x in enumerate(labels))
    sizes = dict(zip(labels, call.shapes[0], strict=True)) | {"i": call.results[0][dim]}
    whole = {labels[dim]: "an index tensor picks positions from all of it"}
    return Sentence((labels, ("i",) if call.shapes[1] else ()), (result,), sizes, frozenset({0}), whole=whole)


def _aligned(call: Call, dim: int, *others: int) -> tuple[list[Labels], dict[str, int], dict[str, str]]:
    """Labels of operands read position by position beside operand 0 but for ``dim``: a dim that they cover in part
    must be whole everywhere."""
    shape = call.shapes[0]
    labels = tuple(f"d{i}" for i in range(len(shape)))
    sizes, whole = dict(zip(labels, shape, strict=True)), dict[str, str]()
    found: list[Labels] = [labels]
    covered = {d for d, n in enumerate(shape) if d != dim and any(call.shapes[o][d] != n for o in others)}
    for o in others:
        own = tuple("i" if d == dim else (f"o{o}_{d}" if d in covered else x) for d, x in enumerate(labels))
        whole |= {own[d]: "the index covers a part of it" for d in covered}
        sizes |= dict(zip(own, call.shapes[o], strict=True))
        found.append(own)
    whole |= {labels[d]: "the index covers a part of it" for d in covered}
    whole |= {labels[dim]: "an index tensor picks positions from all of it"} if labels else {}
    return found, sizes, whole


def _gather(call: Call) -> Sentence:
    """gather: along a cut dim every rank picks what it holds, zero elsewhere, and the sum is the whole pick."""
    found, sizes, whole = _aligned(call, call.dim(), 1)
    whole = {label: why for label, why in whole.items() if label != f"d{call.dim()}"}
    return Sentence(tuple(found), (found[1],), sizes, frozenset({0}), sums=True, whole=whole)


def _pick(local: LocalCall) -> torch.fx.Node | None:
    dim = local.call.dim()
    along = local.operands[0].dims[dim] if local.operands[0].dims else None
    if along is None or not axes_of(along):
        return None
    return local.emit(kernels.gather_part, (local.args[0], dim, local.args[2], local.held(along), size(along)))


def _largest(call: Call) -> Sentence:
    """amax of a value without a gradient (the shift of a softmax): local maxima, and their maximum over the ranks."""
    source = call.operands[0]
    if source.meta.get("no_grad") or op_name(source) == "aten.detach.default":
        return replace(_reduction(True, "")(call), linear=None, settles=True)
    return _reduction(False, "the reduction needs the whole axis")(call)


def _all_reduced_max(local: LocalCall) -> torch.fx.Node | None:
    axes = local.summed_axes()
    if not axes:
        return None
    return local.emit(collectives.all_reduce_max, (local.emit_op(), local.mesh.group_name(axes)))


def _take_along(call: Call) -> Sentence:
    """gather whose operands are broadcast against each other but for the dim."""
    if call.argument("dim") is None:
        raise ValueError("take_along_dim without a dim flattens its operand")
    dim = call.dim()
    text = " ".join("{0}" if d == dim else f"d{d}" for d in range(len(call.shapes[0])))
    row = f"{text.format('s!')}, {text.format('i')} -> {text.format('i')}"
    found = parse_row(row, call.shapes, call.results, "take_along_dim")
    return replace(found, linear=frozenset({0}), whole={"s": "an index tensor picks positions from all of it"})


def _scatter(call: Call) -> Sentence:
    """scatter and its kin: every position of the index writes into all of the dim, so the index is whole there."""
    found, sizes, whole = _aligned(call, call.dim(), *range(1, len(call.shapes)))
    for o, labels in enumerate(found[1:], 1):  # the source may be longer than the index
        found[o] = tuple(f"i{o}" if x == "i" else x for x in labels)
        sizes[f"i{o}"] = call.shapes[o][call.dim()] if labels else 1
        whole[f"i{o}"] = "the index writes all of it"
    return Sentence(tuple(found), (found[0],), sizes, whole=whole)


def _index_write(call: Call) -> Sentence:
    """index_add, index_copy, index_fill: whole slices are written where a list of positions says."""
    dim = call.dim()
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    sizes = dict(zip(labels, call.shapes[0], strict=True)) | {"i": math.prod(call.shapes[1])}
    whole = {labels[dim]: "an index tensor writes into all of it", "i": "the index writes all of it"}
    source = tuple("i" if d == dim else x for d, x in enumerate(labels)) if call.shapes[2:] and call.shapes[2] else ()
    operands = (labels, ("i",) * len(call.shapes[1]), source)[: len(call.shapes)]
    return Sentence(operands, (labels,), sizes, whole=whole)


def _index_put(call: Call) -> Sentence:
    """``x[..., i, ...] = values``: indexed dims and the index itself must be whole, the others pass."""
    if any(x.meta["val"].dtype in (torch.bool, torch.uint8) for x in call.operands[1:-1]):
        return _mask_put(call)
    picked = _index(replace(call, operands=call.operands[:-1], shapes=call.shapes[:-1], results=(_picked(call),)))
    fresh = {x for labels in picked.operands[1:] for x in labels if x is not None}
    wide = picked.results[0]
    written = zip(wide[len(wide) - len(call.shapes[-1]) :], call.shapes[-1], strict=True)
    values = tuple(None if n == 1 and picked.sizes[str(x)] != 1 else x for x, n in written)
    whole = dict(picked.whole) | dict.fromkeys(fresh, "the index writes all of it")
    return Sentence((*picked.operands, values), (picked.operands[0],), picked.sizes, whole=whole)


def _mask_put(call: Call) -> Sentence:
    """``x[..., mask, ...] = values``, alike for all that the mask picks: every position is written by itself."""
    indices = list(call.argument("indices"))
    at = next(i for i, x in enumerate(indices) if x is not None)
    labels = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    end = at + len(call.shapes[1])
    written = (*labels[:at], "picked", *labels[end:])
    wide = dict(zip(labels, call.shapes[0], strict=True)) | {"picked": 0}
    last = tuple(zip(written[len(written) - len(call.shapes[-1]) :], call.shapes[-1], strict=True))
    values = tuple(None if n == 1 and wide[x] != 1 else x for x, n in last)
    if len(call.operands) != 3 or "picked" in values:
        raise ValueError("a mask as an index picks as many positions as it holds")
    del wide["picked"]
    return Sentence((labels, labels[at:end], values), (labels,), wide)


def _picked(call: Call) -> Shape:
    """Shape of ``x[..., i, ...]`` for the indices of an index_put."""
    meta = torch.empty(call.shapes[0], device="meta")
    shapes = iter(call.shapes[1:])
    index = [
        slice(None) if x is None else torch.zeros(next(shapes), dtype=torch.long, device="meta")
        for x in call.argument("indices")
    ]
    return tuple(meta[tuple(index)].shape)


def _cross_entropy(call: Call) -> Sentence:
    """Logits ``[n, c, ...]``: the class axis must be whole; targets follow the other dims. The rest stays whole too
    because the mean runs over all of it."""
    operands = tuple(tuple(f"x{o}_{d}" for d in range(len(s))) for o, s in enumerate(call.shapes))
    sizes = {x: n for labels, s in zip(operands, call.shapes, strict=True) for x, n in zip(labels, s, strict=True)}
    results = tuple(tuple(f"y{d}" for d in range(len(s))) for s in call.results)
    sizes |= {x: n for labels, s in zip(results, call.results, strict=True) for x, n in zip(labels, s, strict=True)}
    return Sentence(operands, results, sizes, whole={x: "the loss needs whole logits" for o in operands for x in o})


# ---------------------------------------------------------------------------------------------- local sizes and kernels
def _local_shape(name: str) -> Callable[[LocalCall], None]:
    """The size-list argument ``name`` describes the result: its entries become local."""

    def localize(local: LocalCall) -> None:
        dims = local.results[0].dims
        if any(axes_of(d) for d in dims):
            sizes = list(local.current(name))
            offset = len(dims) - len(sizes)
            local.set(name, [local.size(n, dims[offset + i]) for i, n in enumerate(sizes)])

    return localize


def _local_unflatten(local: LocalCall) -> None:
    dims = local.results[0].dims
    sizes = list(local.current("sizes"))
    dim = local.call.dim()
    local.set("sizes", [local.size(n, dims[dim + i]) for i, n in enumerate(sizes)])


def _mean(local: LocalCall) -> torch.fx.Node | None:
    """A mean over a cut axis: the local mean, weighted by the share of positions that this rank holds."""
    shares = local.held_share()
    if shares is None:
        return None
    return local.emit(torch.ops.aten.mul.Tensor, (local.emit_op(), shares))


def _embedding(local: LocalCall) -> torch.fx.Node | None:
    """Rows of the table are cut: look up the rows held here, zero for the others (Megatron-LM, section 3)."""
    rows = local.operands[0].dims[0]
    if not axes_of(rows):
        return None
    padding = int(local.call.argument("padding_idx"))
    return local.emit(kernels.embedding_rows, (local.args[0], local.args[1], local.held(rows), padding, size(rows)))


def _lookup(call: Call) -> Sentence:
    if call.argument("scale_grad_by_freq") or call.argument("sparse"):
        raise ValueError("an embedding with sparse or frequency-scaled gradients has no rule")
    return replace(parse_row("v d, ... -> ... d", call.shapes, call.results, "embedding"), sums=True)


def _dropout(local: LocalCall) -> torch.fx.Node | None:
    """Draw the whole mask in the order of one device, keep the part held here, so masks are those of one device."""
    cuts = local.cut_dims(0)
    if not local.call.argument("train"):
        return None
    strides = [local.call.size(n) for n in local.call.operands[0].meta["val"].stride()]
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    return local.emit(kernels.dropout_part, (local.args[0], local.call.argument("p"), cuts, order))


def _resampling(spatial: int) -> list[str]:
    """Pooling and interpolation over the last ``spatial`` dims: all others pass."""
    pools = [f"aten.{n}{spatial}d.default" for n in ("max_pool", "avg_pool", "adaptive_avg_pool")]
    scales = {1: ("nearest1d", "linear1d"), 2: ("nearest2d", "bilinear2d", "bicubic2d")}[spatial]
    return [*pools, *(f"aten.upsample_{n}.vec" for n in scales)]


def _with_aliases(rows: Iterable[Rule]) -> Iterable[Rule]:
    for rule in rows:
        yield rule
        _, name, overload = rule.op.split(".")
        for alias, real in ALIASES.items():
            if real == name and overload in getattr(torch.ops.aten, alias).overloads():
                yield replace(rule, op=f"aten.{alias}.{overload}")


_ROWS: tuple[Rule, ...] = (
    *_elementwise(),
    Rule("aten.linear.default", "... k, n k -> ... n", "each", sums=True),
    Rule("aten.mm.default", "m k, k n -> m n", "each", sums=True),
    Rule("aten.bmm.default", "b m k, b k n -> b m n", "each", sums=True),
    Rule("aten.mv.default", "m k, k -> m", "each", sums=True),
    Rule("aten.dot.default", "k, k -> ", "each", sums=True),
    Rule("aten.outer.default", "m, n -> m n", "each"),
    Rule("aten.matmul.default", _matmul),
    Rule("aten.einsum.default", _einsum),
    *(
        Rule(op, _grouped_product, kernel=_grouped_part)
        for op in ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
    ),
    Rule("aten.inner.default", _inner),
    Rule("aten.tensordot.default", _tensordot),
    *(Rule(f"aten.conv{n}d.{o}", _conv, localize=_local_groups) for n in (1, 2, 3) for o in ("default", "padding")),
    *(Rule(f"aten.conv_transpose{n}", _conv, localize=_local_groups) for n in ("1d.default", "2d.input", "3d.input")),
    *(Rule(op, "... x! -> ... y", because="it reads its neighbours") for op in _resampling(1)),
    *(Rule(op, "... x! y! -> ... z w", because="it reads its neighbours") for op in _resampling(2)),
    Rule("aten.scaled_dot_product_attention.default", _attention),
    Rule("aten.embedding.default", _lookup, kernel=_embedding),
    Rule("aten.dropout.default", "... -> ...", "each", kernel=_dropout, random=True),
    Rule("aten.layer_norm.default", _normalize),
    Rule("aten.rms_norm.default", _normalize),
    Rule("aten.batch_norm.default", _batch_norm),
    Rule("aten.group_norm.default", _group_norm),
    Rule("aten.cross_entropy_loss.default", _cross_entropy),
    *(Rule(f"aten.{n}.int", _along("dim", "softmax runs over the whole axis")) for n in ("softmax", "log_softmax")),
    Rule("aten.cumsum.default", _along("dim", "cumsum runs along the whole axis", "each")),
    *(
        Rule(f"aten.{n}.default", _along("dim", f"{n} runs along the whole axis"))
        for n in ("cumprod", "logcumsumexp", "cummax", "cummin")
    ),
    Rule("aten.flip.default", _along("dims", "flip reverses it", "each")),
    Rule("aten.roll.default", _along("dims", "roll moves its positions", "each")),
    *(
        Rule(f"aten.{n}.{o}", _along("dim", "sort runs over the whole axis"))
        for n in ("sort", "argsort")
        for o in ("default", "stable")
    ),
    Rule("aten.topk.default", _along("dim", "topk runs over the whole axis")),
    *(Rule(f"aten.sum.{o}", _reduction(True, "")) for o in ("dim_IntList", "default")),
    *(Rule(f"aten.mean.{o}", _reduction(True, ""), kernel=_mean) for o in ("dim", "default")),
    *(
        Rule(op, _reduction(False, "the reduction needs the whole axis"))
        for op in _names("""aten.amin.default aten.max.dim aten.min.dim aten.max.default aten.min.default
        aten.argmax.default aten.argmin.default aten.prod.dim_int aten.prod.default aten.any.dim aten.any.dims
        aten.any.default aten.all.dim aten.all.dims aten.all.default aten.logsumexp.default aten.var.correction
        aten.var.dim aten.std.correction aten.std.dim aten.var_mean.correction aten.std_mean.correction
        aten.aminmax.default aten.linalg_vector_norm.default aten.linalg_norm.default aten.norm.ScalarOpt_dim""")
    ),
    *(Rule(f"aten.{n}.default", _reshape, localize=_local_shape("size")) for n in ("view", "_unsafe_view")),
    Rule("aten.reshape.default", _reshape, localize=_local_shape("shape")),
    Rule("aten.flatten.using_ints", _reshape),
    Rule("aten.unflatten.int", _reshape, localize=_local_unflatten),
    *(Rule(f"aten.{n}.default", _expand, localize=_local_shape("size")) for n in ("expand", "broadcast_to")),
    Rule("aten.transpose.int", _permuted(_swap)),
    Rule("aten.t.default", _permuted(_reverse_two)),
    Rule("aten.permute.default", _permuted(_permute)),
    *(Rule(f"aten.{n}.default", _permuted(_reverse_two)) for n in ("mT", "mH", "adjoint")),
    Rule("aten.swapaxes.default", _permuted(_swap_axes)),
    Rule("aten.swapdims.default", _permuted(_swap)),
    *(Rule(f"aten.{n}.{o}", _permuted(_move)) for n in ("movedim", "moveaxis") for o in ("int", "intlist")),
    Rule("aten.numpy_T.default", _permuted(lambda _, n: list(reversed(range(n))))),
    Rule("aten.slice.Tensor", _slice, localize=_local_slice),
    Rule("aten.narrow.default", _narrow, localize=_local_narrow),
    Rule("aten.select.int", _select, localize=_local_select),
    Rule("aten.split.Tensor", _pieces, localize=_local_pieces),
    Rule("aten.split.sizes", _pieces, localize=_local_pieces),
    Rule("aten.split_with_sizes.default", _pieces, localize=_local_pieces),
    Rule("aten.chunk.default", _pieces, localize=_local_pieces),
    *(Rule(f"aten.tensor_split.{o}", _pieces, localize=_local_pieces) for o in ("sections", "indices")),
    Rule("aten.glu.default", _glu),
    Rule("aten.unfold.default", _unfold),
    Rule("aten.unbind.int", _unbind),
    *(Rule(f"aten.squeeze.{o}", _drop_dims, localize=_local_squeeze) for o in ("dim", "dims", "default")),
    Rule("aten.unsqueeze.default", _drop_dims),
    Rule("aten.cat.default", _cat),
    Rule("aten.stack.default", _stack),
    *(Rule(f"aten.{n}.default", _repeat) for n in ("repeat", "tile")),
    Rule("aten.repeat_interleave.self_int", _repeat_interleave, localize=_local_repeats),
    Rule("aten.constant_pad_nd.default", _pad),
    Rule("aten.pad.default", _pad),
    Rule("aten.index.Tensor", _index),
    Rule("aten.index_select.default", _index_select),
    Rule("aten.amax.default", _largest, kernel=_all_reduced_max),
    Rule("aten.gather.default", _gather, kernel=_pick),
    Rule("aten.take_along_dim.default", _take_along),
    *(Rule(f"aten.scatter.{o}", _scatter) for o in ("src", "value")),
    Rule("aten.scatter_add.default", _scatter),
    Rule("aten.scatter_reduce.two", _scatter),
    *(Rule(f"aten.{n}.default", _index_write) for n in ("index_add", "index_copy")),
    *(Rule(f"aten.index_fill.{o}", _index_write) for o in ("int_Scalar", "int_Tensor")),
    Rule("aten.index_put.default", _index_put),
    Rule("aten.one_hot.default", "... -> ... n"),
    *(
        Rule(f"aten.{n}.default", "... r! c! -> ... r c", "each", because="a triangle of the matrix is zeroed")
        for n in ("tril", "triu")
    ),
)


ROWS: tuple[Rule, ...] = tuple(_with_aliases(_ROWS))


def table(rows: Iterable[Rule] = ROWS) -> Mapping[str, Rule]:
    """Rules by overload name; a name given twice is a defect."""
    found: dict[str, Rule] = {}
    for rule in rows:
        if rule.op in found:
            raise ValueError(f"two rules for {rule.op}")
        found[rule.op] = rule
    return MappingProxyType(found)


_TABLE: dict[str, Rule] = dict(table())
RULES: Mapping[str, Rule] = MappingProxyType(_TABLE)


def add(rule: Rule, *calls: tuple[Any, ...] | tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
    """Add the rule of a custom op (``torch.library``), once the truth test that every built-in rule passes agrees.

    ::

        rules.add(Rule("mylib.scale.default", "... d, d -> ... d", "each"), (torch.randn(4, 6), torch.randn(6)))

    Args:
        rule: its ``row`` labels every dim of the tensor operands and results (see :mod:`tpcompile.sentence`).
        calls: example calls, the positional arguments of each or ``(args, kwargs)``. Their tensors say shapes, kinds
            and ranges of values; dims of 4 or 6 positions can be cut in most ways.

    Raises:
        TpcompileError: the op is unknown or has a rule already, a call fails, or the rule is wrong. Nothing is added.
    """
    from tpcompile.errors import TpcompileError
    from tpcompile.rule_truth import admit

    if rule.op in _TABLE:
        raise TpcompileError(f"{rule.op} has a rule already", help="a rule is never replaced; give the op another name")
    if not calls:
        raise TpcompileError(
            f"the rule for {rule.op} comes without an example call",
            why="a rule is believed only when it has been tested",
            help="write rules.add(rule, (torch.randn(4, 6),)) with the arguments of a call of the op",
        )
    admit(rule, [_args_kwargs(call) for call in calls])
    _TABLE[rule.op] = rule


def how_to_add(op: str) -> str:
    """What to do about an op that has no rule."""
    if op.startswith("aten."):
        return f'add a row for "{op}" to the op rules (tpcompile/rules.py)'
    return f'say what it does: tpcompile.rules.add(Rule("{op}", "..."), the arguments of a call)'


def _args_kwargs(call: tuple[Any, ...]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    pair = len(call) == 2 and isinstance(call[0], tuple) and isinstance(call[1], Mapping)
    return call if pair else (call, {})


def op_name(node: torch.fx.Node) -> str:
    """``aten.linear.default`` for an OpOverload target, else the function's name."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def result_shapes(node: torch.fx.Node, size: Callable[[Any], int]) -> tuple[Shape, ...]:
    """Shapes of the tensor results of a call, symbols at their hints."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return tuple(tuple(size(n) for n in v.shape) for v in values if isinstance(v, torch.Tensor))


ROW_BY_ROW = frozenset(
    f"aten.{name}"
    for name in _names("""silu.default gelu.default relu.default sigmoid.default tanh.default mul.Tensor mul.Scalar
    add.Tensor add.Scalar sub.Tensor neg.default clamp.default clamp.Tensor slice.Tensor chunk.default split.Tensor
    split_with_sizes.default to.dtype unsqueeze.default select.int contiguous.default clone.default square.default
    minimum.default maximum.default""")
) | {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}
"""Ops that rows of which only the data know who holds them may pass: finite, with finite derivatives, on rows of zeros,
and without a sum over rows in their backward."""

ANY_LENGTH = frozenset(
    f"aten.{name}"
    for name in _names("""view.default _unsafe_view.default reshape.default expand.default broadcast_to.default
    slice.Tensor narrow.default select.int split.Tensor split.sizes split_with_sizes.default chunk.default
    unflatten.int squeeze.dim squeeze.dims squeeze.default dropout.default mean.dim amax.default embedding.default
    gather.default""")
)
"""Ops with a kernel or local arguments that may keep a cut dim whose length is known only when the program runs."""

GETITEM: Callable[..., Any] = operator.getitem
