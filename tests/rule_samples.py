"""Sample calls of every op that has a rule, as data: what the truth test cuts in every way.

A new row needs a line here and no test of its own. Choose sizes that tell dims apart and that have factors (4, 6, 12),
arguments that are not the defaults, and values at which a wrong rule shows. Three operands want small dims: the
placements of all are multiplied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  # pyright: ignore[reportUnusedImport]  # it registers an op

from tpcompile.rule_truth import Given, Number, Sample
from tpcompile.rules import ALIASES


def real(*shape: int, low: float = -1.5, high: float = 1.5, order: tuple[int, ...] | None = None) -> Given:
    return Given(shape, low, high, torch.float64, order)


def positive(*shape: int) -> Given:
    return Given(shape, 0.3, 1.4)


def fraction(*shape: int) -> Given:
    return Given(shape, 0.1, 0.9)


def ints(*shape: int, below: int = 5, low: int = 0) -> Given:
    return Given(shape, low, below, torch.int64)


def bools(*shape: int) -> Given:
    return Given(shape, 0, 2, torch.bool)


def ends(*values: int) -> Given:
    """Where the rows of each expert end."""
    return Given((len(values),), dtype=torch.int32, values=values)


def imaginary(*shape: int) -> Given:
    return Given(shape, -1.5, 1.5, torch.complex128)


def statistics(*shape: int) -> Given:
    """A buffer, which receives no gradient."""
    return Given(shape, 0.3, 1.4, constant=True)


def call(op: str, *args: Any, **kwargs: Any) -> Sample:
    return Sample(f"aten.{op}", args, kwargs)


def each(names: str, *args: Any, **kwargs: Any) -> tuple[Sample, ...]:
    """One call of several overloads (``default`` if none is named)."""
    return tuple(call(name if "." in name else f"{name}.default", *args, **kwargs) for name in names.split())


def _on_two(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """On two ranks: the sentence is that of every elementwise op, only the op differs."""
    return tuple(replace(s, degrees=(2,)) for s in samples)


ELEMENTWISE = _on_two((
    *each("neg alias clone contiguous detach lift_fresh_copy positive", real(2, 3)),
    *each("abs exp exp2 expm1 relu gelu silu mish sigmoid tanh erf erfc sin cos atan sinh cosh", real(2, 3)),
    *each("sign sgn square isnan isinf isfinite floor ceil round trunc frac sinc", real(2, 3)),
    *each("nan_to_num hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus", real(2, 3)),
    *each("log_sigmoid relu6 softshrink hardshrink", real(2, 3)),
    *each("log log2 log10 log1p sqrt rsqrt reciprocal tan digamma lgamma", positive(2, 3)),
    *each("asin acos logit erfinv", fraction(2, 3)),
    *each("logical_not bitwise_not", bools(2, 3)),
    call("bitwise_not.default", ints(2, 3)),
    *each("real imag _conj angle abs view_as_real", imaginary(2, 3)),
    call("view_as_complex.default", real(3, 2)),
    *each("polar complex", positive(2, 3), real(2, 3)),
    call("mul.Tensor", imaginary(2, 3), imaginary(3)),
    call("clone.default", real(2, 3, order=(1, 0)), memory_format=torch.contiguous_format),
    call("gelu.default", real(2, 3), approximate="tanh"),
    call("round.decimals", real(2, 3), decimals=1),
    call("clamp.default", real(2, 3), -0.5, 0.7),
    call("clamp.default", real(2, 3), None, 0.7),
    call("clamp.Tensor", real(2, 3), real(3), real(2, 1)),
    call("clamp.Tensor", real(2, 3), None, real(2, 1)),
    *each("clamp_min clamp_max", real(2, 3), 0.2),
    *each("clamp_min.Tensor clamp_max.Tensor", real(2, 3), real(2, 1)),
    call("threshold.default", real(2, 3), 0.1, 20.0),
    call("prelu.default", real(2, 3), real(3)),
    call("prelu.default", real(2, 3), real(1)),
    *each("eq.Scalar ne.Scalar", ints(2, 3), 2),
    *each("lt.Scalar le.Scalar gt.Scalar ge.Scalar", real(2, 3), 0.3),
    *each("eq.Tensor ne.Tensor", ints(2, 3), ints(3)),
    *each("lt.Tensor le.Tensor gt.Tensor ge.Tensor", real(2, 3), real(2, 1)),
    *each("maximum minimum max.other min.other atan2 hypot logaddexp", real(2, 3), real(3)),
    *each("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor", ints(2, 3), ints(3)),
    *each("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", ints(2, 3), 3),
    *each("bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor", 3, ints(2, 3)),
    *each("__and__.Tensor __or__.Tensor __xor__.Tensor", bools(2, 3), bools(2, 1)),
    *each("__and__.Scalar __or__.Scalar __xor__.Scalar", ints(2, 3), 3),
    *each("logical_and logical_or logical_xor", bools(2, 3), bools(3)),
    *each("fmod.Tensor remainder.Tensor", real(2, 3), positive(3)),
    *each("fmod.Scalar remainder.Scalar", real(2, 3), 0.4),
    *each("floor_divide", ints(2, 3, below=9), ints(3, low=1)),
    *each("floor_divide.Scalar", ints(2, 3, below=9), 2),
    call("remainder.Scalar_Tensor", 7, ints(2, 3, low=1)),
    call("pow.Tensor_Tensor", positive(2, 3), real(3)),
    call("pow.Tensor_Scalar", real(2, 3), 3),
    call("pow.Scalar", 1.7, real(2, 3)),
    call("xlogy.Tensor", real(2, 3), positive(3)),
    call("xlogy.Scalar_Self", 0.7, positive(2, 3)),
    call("xlogy.Scalar_Other", real(2, 3), 0.7),
    *each("copysign.Tensor", real(2, 3), real(3)),
    *each("copysign.Scalar", real(2, 3), -1.0),
    call("to.dtype", ints(2, 3), torch.float64),
    call("to.dtype", real(2, 3), torch.float64, False, True),
    call("to.dtype_layout", real(2, 3), dtype=torch.float64, copy=True),
    call("to.device", real(2, 3), "cpu", torch.float64, False, True),
    call("to.other", ints(2, 3), real(2)),
    call("_to_copy.default", real(2, 3), dtype=torch.float64),
    call("div.Tensor_mode", ints(2, 3, below=9), ints(3, low=1), rounding_mode="floor"),
    call("div.Scalar_mode", ints(2, 3, below=9), 2, rounding_mode="trunc"),
    call("lerp.Scalar", real(2, 3), real(3), 0.3),
    call("lerp.Tensor", real(2, 3), real(3), fraction(2, 1)),
    call("addcmul.default", real(3), real(2, 3), real(2, 1), value=1.3),
    call("addcdiv.default", real(3), real(2, 3), positive(2, 1), value=1.3),
    call("where.self", bools(2, 3), real(3), real(2, 1)),
    call("where.ScalarSelf", bools(2, 3), 0.3, real(3)),
    call("where.ScalarOther", bools(2, 3), real(3), 0.3),
    call("where.Scalar", bools(2, 3), 0.3, 1.2),
    call("masked_fill.Scalar", real(2, 3), bools(3), 0.3),
    call("masked_fill.Tensor", real(2, 3), bools(2, 1), real()),
    call("fill.Scalar", real(2, 3), 0.3),
    call("fill.Tensor", real(2, 3), real()),
    call("expand_as.default", real(2, 1), real(2, 3)),
    call("broadcast_tensors.default", [real(2, 1), real(3)]),
    call("bucketize.Tensor", real(2, 3), fraction(3)),
    call("type_as.default", ints(2, 3), real(3)),
    *each("zeros_like ones_like", real(2, 3)),
    call("full_like.default", real(2, 3), 0.3),
    replace(call("empty_like.default", real(2, 3)), values=False),
    *each("new_zeros new_ones", real(2, 3), [2, 3]),
    call("new_full.default", real(2, 3), [3, 4], 0.3),
    replace(call("new_empty.default", real(2, 3), [2, 3]), values=False),
    *each("add.Tensor sub.Tensor rsub.Tensor", real(2, 3), real(3), alpha=1.7),
    *each("add.Tensor sub.Tensor", real(2, 3), 0.6),
    *each("add.Scalar sub.Scalar rsub.Scalar mul.Scalar div.Scalar", real(2, 3), 0.6),
    *each("mul.Tensor div.Tensor", real(2, 3), 0.6),
))  # fmt: skip

# the ops that carry sums, products and choices of cut values: dims with factors, on two ranks and on three
ARITHMETIC = (
    call("exp.default", real(4, 6)),
    call("add.Tensor", real(4, 6), real(4, 1)),
    call("mul.Tensor", real(4, 6), real(6)),
    call("div.Tensor", real(6), positive(4, 6)),
    call("div.Tensor", real(4, 6), positive(4, 6)),
    call("where.ScalarOther", bools(4, 6), real(6), 0.3),
)

PRODUCTS = (
    call("linear.default", real(2, 3, 6), real(4, 6)),
    call("linear.default", real(6), real(4, 6)),
    call("mm.default", real(3, 6), real(6, 4)),
    call("bmm.default", real(4, 3, 6), real(4, 6, 2)),
    call("mv.default", real(4, 6), real(6)),
    call("dot.default", real(6), real(6)),
    call("outer.default", real(4), real(6)),
    *(
        call("matmul.default", real(*a), real(*b))
        for a, b in [
            ((6,), (6,)),
            ((4, 6), (6,)),
            ((6,), (6, 4)),
            ((3, 6), (6, 4)),
            ((4, 3, 6), (6, 2)),
            ((4, 3, 6), (6,)),
            ((2, 4, 3, 6), (4, 6, 2)),
            ((1, 3, 6), (4, 6, 2)),
            ((4, 6), (3, 6, 2)),
            ((6,), (4, 6, 3)),
        ]
    ),
    Sample("transformers.grouped_mm_fallback.default", (real(6, 4), real(3, 4, 2), ends(2, 5, 6))),
    call("einsum.default", "bqhd,bkhd->bhqk", [real(1, 2, 4, 3), real(1, 2, 4, 3)]),
    call("einsum.default", "ij,jk->ik", [real(4, 6), real(6, 3)]),
    call("einsum.default", "ij,jk", [real(4, 6), real(6, 3)]),
    call("einsum.default", "ji,kj", [real(4, 6), real(3, 4)]),
    call("einsum.default", "...ij,...jk->...ik", [real(2, 4, 6), real(6, 3)]),
    call("einsum.default", "i,j->ij", [real(4), real(6)]),
    call("einsum.default", "ij->ji", [real(4, 6)]),
    call("einsum.default", "ij->i", [real(4, 6)]),
    call("einsum.default", "i,ij,j->", [real(2), real(2, 3), real(3)]),
    call("einsum.default", "...d,...d->...", [real(4, 6), real(4, 6)]),
    call("einsum.default", "...d->d", [real(4, 6)]),
    call("inner.default", real(2, 6), real(3, 6)),
    call("tensordot.default", real(2, 3, 4), real(4, 6, 3), [1, 2], [2, 0]),
    call("einsum.default", "ii->i", [real(4, 4)]),
    call("conv1d.default", real(2, 4, 3), real(4, 4, 2), None, [1], [1]),
    call("conv1d.default", real(1, 2, 3), real(4, 2, 2), None, [2], [1]),
    call("conv1d.default", real(1, 4, 2), real(4, 1, 1), None, [1], [0], [1], 4),
    call("conv1d.default", real(1, 6, 3), real(6, 1, 2), None, [1], [1], [1], 6),
    call("conv1d.default", real(1, 4, 3), real(4, 2, 2), None, [1], [0], [1], 2),
    call("conv1d.default", real(1, 2, 3), real(4, 1, 2), None, [1], [0], [1], 2),
    call("conv1d.default", real(4, 6), real(4, 4, 3)),
    call("conv1d.padding", real(2, 4, 3), real(4, 4, 3), None, [1], "same"),
    call("conv2d.default", real(2, 4, 2, 2), real(6, 4, 2, 2), None, [2, 2]),
    call("conv2d.padding", real(2, 4, 2, 2), real(6, 4, 3, 1), None, [1, 1], "same"),
    call("conv3d.default", real(2, 2, 2, 2, 2), real(4, 2, 2, 2, 2)),
    call("conv3d.padding", real(2, 2, 2, 2, 2), real(4, 2, 2, 2, 2), None, [1, 1, 1], "valid"),
    call("conv_transpose1d.default", real(2, 4, 3), real(4, 6, 2), None, [2]),
    call("conv_transpose1d.default", real(1, 4, 2), real(4, 1, 1), None, [1], [0], [0], 4),
    call("conv_transpose2d.input", real(2, 4, 2, 2), real(4, 2, 2, 2)),
    call("conv_transpose3d.input", real(2, 2, 2, 2, 2), real(2, 4, 2, 2, 2)),
    *each("max_pool1d avg_pool1d", real(2, 4, 4), [2]),
    *each("max_pool2d avg_pool2d", real(2, 4, 4, 2), [2, 1]),
    call("adaptive_avg_pool1d.default", real(2, 4, 4), [2]),
    call("adaptive_avg_pool2d.default", real(2, 4, 4, 2), [1, 2]),
    call("upsample_nearest1d.vec", real(2, 4, 3), [6], None),
    call("upsample_linear1d.vec", real(2, 4, 3), [6], False, None),
    call("upsample_nearest2d.vec", real(2, 4, 3, 2), None, [2.0, 2.0]),
    *each("upsample_bilinear2d.vec upsample_bicubic2d.vec", real(2, 4, 3, 2), [4, 4], False, None),
    call("scaled_dot_product_attention.default", real(4, 2, 1), real(4, 3, 1), real(4, 3, 2)),
    call("scaled_dot_product_attention.default", real(2, 3, 1), real(2, 3, 1), real(2, 3, 1), None, 0.0, True),
    call("scaled_dot_product_attention.default", real(1, 2, 2, 1), real(1, 2, 2, 1), real(1, 2, 2, 1), real(2, 2, 2)),
    call("scaled_dot_product_attention.default", real(4, 2, 1), real(1, 2, 1), real(1, 2, 1), bools(2, 2)),
    call("embedding.default", real(12, 4), ints(2, 3, below=12)),
    call("embedding.default", real(12, 4), ints(6, below=12), 3),
    call("embedding.default", real(12, 4), ints(6, below=12), -1, True),
)

NORMS = (
    call("dropout.default", real(4, 6), 0.4, True),
    call("dropout.default", real(4, 6), 0.4, False),
    replace(call("dropout.default", real(2, 4, 6, order=(1, 0, 2)), 0.4, True), letters="RH"),
    call("layer_norm.default", real(4, 3), [3], real(3), real(3)),
    call("layer_norm.default", real(4, 2, 3), [2, 3]),
    call("rms_norm.default", real(2, 4, 3), [3], real(3)),
    call("batch_norm.default", real(2, 3), None, None, statistics(3), statistics(3), False, 0.1, 1e-5, False),
    replace(
        call("batch_norm.default", real(2, 2, 1), real(2), real(2), *[statistics(2)] * 2, False, 0.1, 1e-5, False),
        degrees=(2,),
        letters="RH",
    ),
    call("batch_norm.default", real(4, 2), real(2), real(2), None, None, True, 0.1, 1e-5, False),
    call("group_norm.default", real(2, 4, 3), 2, real(4), real(4)),
    call("cross_entropy_loss.default", real(4, 6), ints(4, below=6)),
    *each("softmax.int log_softmax.int", real(4, 3, 6), 1),
    *each("softmax.int log_softmax.int", real(4, 6), -1),
    *each("cumsum cumprod", real(4, 3, 6), 1),
    call("flip.default", real(4, 3, 6), [0, -1]),
    call("roll.default", real(4, 3, 6), [1, 2], [0, -1]),
    call("roll.default", real(4, 6), [3]),
    *each("sort.default argsort.default", real(4, 6), 0),
    *each("sort.stable argsort.stable", ints(4, 6), stable=True, dim=0),
    call("topk.default", real(4, 6), 2),
    call("topk.default", real(4, 6), 4, 0),
    call("logcumsumexp.default", real(4, 6), 1),
    *each("cummax cummin", real(4, 6), 1),
)

_REDUCTIONS = """amax amin max.dim min.dim argmax argmin prod.dim_int any.dim all.dim mean.dim sum.dim_IntList
logsumexp var.correction var.dim std.correction std.dim linalg_vector_norm norm.ScalarOpt_dim"""

REDUCTIONS = (
    *each("sum mean max min argmax argmin prod", real(4, 6)),
    *each("any all", bools(4, 6)),
    call("sum.default", ints(4, 6)),
    call("sum.dim_IntList", real(4, 3, 6), [-1]),
    call("sum.dim_IntList", real(4, 3, 6), [0, 2], True),
    call("sum.dim_IntList", real(4, 6), None),
    call("sum.dim_IntList", bools(4, 6), [0]),
    call("mean.dim", real(4, 3, 6), [-1], True),
    call("mean.dim", real(4, 3, 6), [0, 2]),
    *each("amax amin", real(4, 3, 6), [0, 2]),
    *each("amax", real(4, 6)),
    *each("max.dim min.dim argmax argmin prod.dim_int", real(4, 3, 6), -1, True),
    *each("any.dim all.dim", bools(4, 3, 6), 1),
    *each("any.dims all.dims", bools(4, 3, 6), [0, 2]),
    call("logsumexp.default", real(4, 3, 6), [1]),
    *each("var.dim std.dim", real(4, 3, 6), [0, 1], True, True),
    *each("var.correction std.correction", real(4, 3, 6), [1], correction=0),
    *each("var_mean.correction std_mean.correction", real(4, 3, 6), [1], correction=0, keepdim=True),
    *each("linalg_vector_norm linalg_norm norm.ScalarOpt_dim", real(4, 3, 6), 2, [1]),
    call("linalg_norm.default", real(4, 6)),
    call("aminmax.default", real(4, 6), dim=1),
)

SHAPES = (
    call("view.default", real(4, 6), [4, 3, 2]),
    call("view.default", real(2, 12), [2, 2, 3, 2]),
    call("view.default", real(2, 12), [2, 3, -1]),
    call("view.default", real(2, 3, 4), [6, 4]),
    call("view.default", real(2, 3, 4), [2, 12]),
    call("view.default", real(4, 6), [6, 4]),
    call("view.default", real(4, 6), [2, 12]),
    call("view.default", real(4, 6), [1, 4, 1, 6]),
    call("view.default", real(12), [2, 3, 2]),
    call("view.default", real(4, 6), [Number(4), Number(3), 2]),
    call("_unsafe_view.default", real(4, 6), [4, 3, 2]),
    call("reshape.default", real(4, 6, order=(1, 0)), [2, 2, 6]),
    call("reshape.default", real(4, 6, order=(1, 0)), [-1]),
    call("flatten.using_ints", real(4, 3, 2), 1),
    call("flatten.using_ints", real(4, 3, 2), 0, 1),
    call("unflatten.int", real(4, 12), -1, [2, 6]),
    call("unflatten.int", real(12, 4), 0, [3, -1]),
    call("expand.default", real(4, 1), [4, 6]),
    call("expand.default", real(1, 4, 1), [2, -1, 6]),
    call("expand.default", real(6), [4, 6]),
    call("expand.default", real(2, 1), [Number(2), 3]),
    call("broadcast_to.default", real(4, 1), [2, 4, 6]),
    call("transpose.int", real(4, 3, 6), 0, -1),
    call("t.default", real(4, 6)),
    call("permute.default", real(4, 3, 6), [2, 0, -2]),
    *each("mT adjoint", real(2, 4, 6)),
    call("numpy_T.default", real(4, 6)),
    *each("mH", imaginary(2, 4, 6)),
    *each("swapaxes swapdims", real(4, 3, 6), -1, 0),
    *each("movedim.int moveaxis.int", real(4, 3, 6), 0, -1),
    *each("movedim.intlist moveaxis.intlist", real(4, 3, 6), [2, 0], [0, 1]),
    call("slice.Tensor", real(4, 6), 1, 2, 4),
    call("slice.Tensor", real(4, 6), 1, 0, 2),
    call("slice.Tensor", real(4, 6), 1, -4),
    call("slice.Tensor", real(4, 6), 0, 0, 3, 2),
    call("slice.Tensor", real(12), 0, 0, 12),
    call("slice.Tensor", real(12), 0, 0, 100, 3),
    call("slice.Tensor", real(6, 2), 0, 3, 3),
    call("slice.Tensor", real(4, 6), 1, Number(2), Number(6)),
    call("narrow.default", real(4, 6), 1, -4, 2),
    call("narrow.default", real(4, 6), 1, 2, Number(4)),
    call("select.int", real(4, 6), 1, -4),
    call("select.int", real(6, 4), 0, 1),
    call("split.Tensor", real(4, 6), 2, 1),
    call("split.Tensor", real(4, 6), 4, 1),
    call("split.Tensor", real(4, 6), 9, 1),
    call("split.sizes", real(4, 6), [2, 4], 1),
    call("split_with_sizes.default", real(4, 6), [2, 2, 2], -1),
    call("split_with_sizes.default", real(6, 4), [4, 2]),
    call("chunk.default", real(4, 6), 2, 1),
    call("chunk.default", real(4, 6), 4, 1),
    call("tensor_split.sections", real(4, 6), 4, 1),
    call("tensor_split.indices", real(4, 6), [2, 4], 1),
    call("glu.default", real(4, 8), -1),
    call("glu.default", real(6, 4), 0),
    call("unfold.default", real(4, 3, 6), 1, 2, 1),
    call("unbind.int", real(4, 3, 2), 1),
    call("squeeze.dim", real(4, 1, 6), 1),
    call("squeeze.dim", real(2, 3, 6), 0),
    call("squeeze.dims", real(2, 1, 6), [0, 1]),
    call("squeeze.default", real(2, 1, 3)),
    call("unsqueeze.default", real(4, 6), 1),
    call("unsqueeze.default", real(4, 6), -1),
    call("cat.default", [real(4, 2), real(4, 4)], -1),
    call("cat.default", [real(2), real(4), real(2)]),
    call("cat.default", [real(4, 6)], 1),
    call("cat.default", [real(0), real(4, 6)], 1),
    call("stack.default", [real(4, 3), real(4, 3)], 1),
    call("stack.default", [real(4, 6)], -1),
    call("repeat.default", real(4, 6), [1, 2]),
    call("repeat.default", real(4, 1), [2, 1, 3]),
    call("repeat.default", real(4), [3, 1]),
    call("tile.default", real(2, 4, 3), [2, 1]),
    call("repeat_interleave.self_int", real(4, 6), 2, 0),
    call("repeat_interleave.self_int", real(4, 6), 2, 0, output_size=8),
    call("repeat_interleave.self_int", real(4, 6), 2, -1),
    call("repeat_interleave.self_int", real(4, 6), 2),
    call("constant_pad_nd.default", real(4, 6), [1, 2], 0.5),
    call("constant_pad_nd.default", real(4, 6), [0, -1, 0, 1]),
    call("pad.default", real(4, 6), [1, 2]),
    call("pad.default", real(2, 4, 6), [1, 2], "reflect"),
    *each("tril triu", real(2, 3, 4), 1),
)

INDEXING = (
    call("index.Tensor", real(6, 4), [ints(4, below=6)]),
    call("index.Tensor", real(6, 4), [ints(1, below=6)]),
    call("index.Tensor", real(3, 4, 6), [None, ints(2, below=4)]),
    call("index.Tensor", real(2, 3, 4), [None, ints(2, 1, below=3), ints(3, below=4)]),
    call("index.Tensor", real(3, 2, 3), [ints(2, below=3), None, ints(2, below=3)]),
    call("index.Tensor", real(3, 2, 3), [ints(3, 1, below=3), ints(2, below=2)]),
    call("index.Tensor", real(6, 4), [bools(6)]),
    call("index_select.default", real(4, 6), 1, ints(4, below=6)),
    call("index_select.default", real(4, 6), 0, ints(2, below=4)),
    call("gather.default", real(4, 6), 1, ints(4, 3, below=6)),
    call("gather.default", real(4, 6), 0, ints(2, 6, below=4)),
    call("gather.default", real(4, 6), 1, ints(2, 6, below=6)),
    call("gather.default", real(4, 6), 1, ints(2, 4, below=6)),
    call("take_along_dim.default", real(4, 6), ints(4, 3, below=6), 1),
    call("take_along_dim.default", real(1, 6), ints(4, 3, below=6), 1),
    call("take_along_dim.default", real(4, 6), ints(1, 3, below=6), 1),
    call("take_along_dim.default", real(4, 6), ints(3, below=6)),
    call("scatter.src", real(4, 3), 1, ints(4, 1, below=3), real(4, 1)),
    call("scatter.src", real(4, 3), 1, ints(4, 1, below=3), statistics(4, 2)),
    call("scatter.value", real(4, 3), 1, ints(4, 2, below=3), 0.7),
    call("scatter_add.default", real(4, 3), 1, ints(4, 2, below=3), real(4, 2)),
    call("scatter_add.default", real(4, 3), 1, ints(2, 1, below=3), real(2, 1)),
    call("scatter_reduce.two", real(2, 3), 1, ints(2, 2, below=3), real(2, 2), "sum"),
    call("index_add.default", real(4, 3), 1, ints(2, below=3), real(4, 2)),
    call("index_copy.default", real(4, 3), 1, ints(1, below=3), real(4, 1)),
    call("index_fill.int_Scalar", real(4, 3), 1, ints(2, below=3), 0.3),
    call("index_fill.int_Tensor", real(4, 3), 1, ints(2, below=3), real()),
    call("index_put.default", real(3, 4), [ints(2, below=3)], real(2, 4), True),
    call("index_put.default", real(3, 4), [ints(2, below=3)], real(4), True),
    call("index_put.default", real(3, 4), [None, ints(2, below=4)], real(3, 1), True),
    call("index_put.default", real(3, 4), [bools(3, 4)], real()),
    call("index_put.default", real(3, 4), [bools(3)], real(4)),
    call("index_put.default", real(3, 4, 2), [None, bools(4)], real(3, 1, 2)),
    call("one_hot.default", ints(4, 3, below=5), 5),
)

_NAMED = (*ELEMENTWISE, *ARITHMETIC, *PRODUCTS, *NORMS, *REDUCTIONS, *SHAPES, *INDEXING)


def _aliases() -> tuple[Sample, ...]:
    """The calls of an op under its other names."""
    return tuple(
        replace(s, op=f"aten.{alias}.{overload}", degrees=(2,))
        for alias, real_name in ALIASES.items()
        for s in _NAMED
        for _, name, overload in [s.op.split(".")]
        if name == real_name and overload in getattr(torch.ops.aten, alias).overloads()
    )


SAMPLES: tuple[Sample, ...] = (*_NAMED, *_aliases())


SAME = {"aten._grouped_mm.default": "transformers.grouped_mm_fallback.default"}
"""Ops that are checked as another one that computes the same: the fused kernel takes no float64."""


def samples_of(op: str) -> tuple[Sample, ...]:
    return tuple(s for s in SAMPLES if s.op == SAME.get(op, op))
