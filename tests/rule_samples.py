"""Sample calls of every op that has a rule, as data: what the truth test cuts in every way.

A new row needs a line here and no test of its own. Choose sizes that tell dims apart and that have several factors
(4, 6, 12), arguments that are not the defaults, and values at which a wrong rule shows.
"""

from __future__ import annotations

from typing import Any

import torch
from rule_truth import Given, Number, Sample


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


def call(op: str, *args: Any, **kwargs: Any) -> Sample:
    return Sample(f"aten.{op}", args, kwargs)


def _each(names: str, *args: Any, **kwargs: Any) -> tuple[Sample, ...]:
    return tuple(call(name if "." in name else f"{name}.default", *args, **kwargs) for name in names.split())


# two dims, the second a product of two; the last sample has an order in memory that is not its own
ELEMENTWISE = (
    *_each("neg alias clone contiguous detach lift_fresh_copy positive abs exp exp2 expm1 relu", real(4, 6)),
    *_each("gelu silu mish sigmoid tanh erf erfc sin cos atan sinh cosh sign sgn square", real(4, 6)),
    *_each("isnan isinf isfinite floor ceil round trunc frac", real(4, 6)),
    *_each("nan_to_num hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus", real(4, 6)),
    *_each("log_sigmoid relu6 softshrink hardshrink", real(4, 6)),
    *_each("log log2 log10 log1p sqrt rsqrt reciprocal tan", positive(4, 6)),
    *_each("asin acos logit", fraction(4, 6)),
    *_each("logical_not bitwise_not", bools(4, 6)),
    call("bitwise_not.default", ints(4, 6)),
    call("clone.default", real(4, 6, order=(1, 0)), memory_format=torch.contiguous_format),
    call("gelu.default", real(4, 6), approximate="tanh"),
    call("round.decimals", real(4, 6), decimals=1),
    call("clamp.default", real(4, 6), -0.5, 0.7),
    call("clamp.default", real(4, 6), None, 0.7),
    call("clamp.Tensor", real(4, 6), real(6), real(4, 1)),
    call("clamp.Tensor", real(4, 6), None, real(4, 1)),
    *_each("clamp_min clamp_max", real(4, 6), 0.2),
    *_each("clamp_min.Tensor clamp_max.Tensor", real(4, 6), real(4, 1)),
    call("threshold.default", real(4, 6), 0.1, 20.0),
    *_each("eq.Scalar ne.Scalar", ints(4, 6), 2),
    *_each("lt.Scalar le.Scalar gt.Scalar ge.Scalar", real(4, 6), 0.3),
    *_each("eq.Tensor ne.Tensor", ints(4, 6), ints(6)),
    *_each("lt.Tensor le.Tensor gt.Tensor ge.Tensor", real(4, 6), real(4, 1)),
    *_each("maximum minimum atan2 hypot", real(4, 6), real(6)),
    *_each("max.other min.other", real(4, 6), real(6)),
    *_each("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor", ints(4, 6), ints(6)),
    *_each("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", ints(4, 6), 3),
    *_each("bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor", 3, ints(4, 6)),
    *_each("__and__.Tensor __or__.Tensor __xor__.Tensor", bools(4, 6), bools(4, 1)),
    *_each("__and__.Scalar __or__.Scalar __xor__.Scalar", ints(4, 6), 3),
    *_each("logical_and logical_or logical_xor", bools(4, 6), bools(6)),
    *_each("fmod.Tensor remainder.Tensor floor_divide", real(4, 6), positive(6)),
    *_each("fmod.Scalar remainder.Scalar floor_divide.Scalar", real(4, 6), 0.4),
    call("remainder.Scalar_Tensor", 7, positive(4, 6)),
    call("pow.Tensor_Tensor", positive(4, 6), real(6)),
    call("pow.Tensor_Scalar", real(4, 6), 3),
    call("pow.Scalar", 1.7, real(4, 6)),
    call("to.dtype", ints(4, 6), torch.float64),
    call("to.dtype", real(4, 6), torch.float64, False, True),
    call("to.dtype_layout", real(4, 6), dtype=torch.float64, copy=True),
    call("to.device", real(4, 6), "cpu", torch.float64, False, True),
    call("_to_copy.default", real(4, 6), dtype=torch.float64),
    *_each("add.Tensor sub.Tensor rsub.Tensor", real(4, 6), real(6), alpha=1.7),
    *_each("add.Tensor sub.Tensor rsub.Tensor", real(4, 1), real(4, 6)),
    *_each("add.Tensor sub.Tensor rsub.Tensor", real(4, 6), 0.6),
    *_each("add.Scalar sub.Scalar rsub.Scalar", real(4, 6), 0.6),
    *_each("mul.Tensor div.Tensor", real(4, 6), positive(6)),
    *_each("mul.Tensor div.Tensor", real(6), positive(4, 6)),
    *_each("mul.Tensor div.Tensor", real(4, 6), 0.6),
    *_each("mul.Scalar div.Scalar", real(4, 6), 0.6),
    call("div.Tensor_mode", real(4, 6), positive(6), rounding_mode="floor"),
    call("div.Scalar_mode", real(4, 6), 0.4, rounding_mode="trunc"),
    call("lerp.Scalar", real(4, 6), real(6), 0.3),
    call("lerp.Tensor", real(4, 6), real(6), fraction(4, 1)),
    call("addcmul.default", real(6), real(4, 6), real(4, 1), value=1.3),
    call("addcdiv.default", real(6), real(4, 6), positive(4, 1), value=1.3),
    call("where.self", bools(4, 6), real(6), real(4, 1)),
    call("where.ScalarSelf", bools(4, 6), 0.3, real(6)),
    call("where.ScalarOther", bools(4, 6), real(6), 0.3),
    call("where.Scalar", bools(4, 6), 0.3, 1.2),
    call("masked_fill.Scalar", real(4, 6), bools(6), 0.3),
    call("masked_fill.Tensor", real(4, 6), bools(4, 1), real()),
    call("type_as.default", ints(4, 6), real(3)),
    *_each("zeros_like ones_like", real(4, 6)),
    call("full_like.default", real(4, 6), 0.3),
    *_each("new_zeros new_ones", real(4, 6), [4, 6]),
    call("new_full.default", real(4, 6), [3, 4], 0.3),
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
            ((6,), (6,)), ((4, 6), (6,)), ((6,), (6, 4)), ((3, 6), (6, 4)), ((4, 3, 6), (6, 2)), ((4, 3, 6), (6,)),
            ((2, 4, 3, 6), (4, 6, 2)), ((1, 3, 6), (4, 6, 2)), ((4, 6), (3, 6, 2)), ((6,), (4, 6, 3)),
        ]
    ),
    call("einsum.default", "bqhd,bkhd->bhqk", [real(2, 2, 4, 3), real(2, 2, 4, 3)]),
    call("einsum.default", "ij,jk->ik", [real(4, 6), real(6, 3)]),
    call("einsum.default", "ij,jk", [real(4, 6), real(6, 3)]),
    call("einsum.default", "ji,kj", [real(4, 6), real(3, 4)]),
    call("einsum.default", "...ij,...jk->...ik", [real(2, 4, 6), real(6, 3)]),
    call("einsum.default", "i,j->ij", [real(4), real(6)]),
    call("einsum.default", "ij->ji", [real(4, 6)]),
    call("einsum.default", "ij->i", [real(4, 6)]),
    call("einsum.default", "i,ij,j->", [real(4), real(4, 6), real(6)]),
    call("einsum.default", "ii->i", [real(4, 4)]),
    call("conv1d.default", real(2, 4, 6), real(4, 4, 3), None, [1], [1]),
    call("conv1d.default", real(2, 4, 6), real(4, 4, 3), real(4), [2], [1]),
    call("conv1d.default", real(2, 4, 6), real(4, 1, 3), real(4), [1], [2], [1], 4),
    call("conv1d.default", real(2, 4, 6), real(4, 1, 3), None, [1], [2], [1], 4),
    call("conv1d.default", real(2, 4, 6), real(4, 2, 3), None, [1], [0], [1], 2),
    call("conv1d.default", real(4, 6), real(4, 4, 3)),
    call("conv2d.default", real(2, 4, 4, 4), real(6, 4, 2, 2), None, [2, 2]),
    call("conv3d.default", real(2, 4, 2, 2, 2), real(4, 4, 2, 2, 2)),
    call("scaled_dot_product_attention.default", real(2, 4, 3, 2), real(2, 4, 5, 2), real(2, 4, 5, 3)),
    call("scaled_dot_product_attention.default", real(2, 4, 3, 2), real(2, 4, 3, 2), real(2, 4, 3, 2), None, 0.0, True),
    call("scaled_dot_product_attention.default", real(2, 4, 3, 2), real(2, 4, 3, 2), real(2, 4, 3, 2), real(4, 3, 3)),
    call("scaled_dot_product_attention.default", real(2, 4, 3, 2), real(2, 1, 3, 2), real(2, 1, 3, 2), real(3, 3)),
    call("embedding.default", real(12, 4), ints(2, 3, below=12)),
    call("embedding.default", real(12, 4), ints(6, below=12), 3),
    call("embedding.default", real(12, 4), ints(6, below=12), -1, True),
)

NORMS = (
    call("dropout.default", real(4, 6), 0.4, True),
    call("dropout.default", real(4, 6), 0.4, False),
    call("dropout.default", real(2, 4, 6, order=(1, 0, 2)), 0.4, True),
    call("native_dropout.default", real(4, 6), 0.4, True),
    call("layer_norm.default", real(2, 3, 6), [6], real(6), real(6)),
    call("layer_norm.default", real(2, 3, 6), [3, 6]),
    call("rms_norm.default", real(2, 3, 6), [6], real(6)),
    call("batch_norm.default", real(4, 6), real(6), real(6), real(6), positive(6), False, 0.1, 1e-5, False),
    call("group_norm.default", real(4, 6, 2), 3, real(6), real(6)),
    call("cross_entropy_loss.default", real(4, 6), ints(4, below=6)),
    *_each("softmax.int log_softmax.int", real(4, 3, 6), 1),
    *_each("softmax.int log_softmax.int", real(4, 6), -1),
    *_each("cumsum cumprod", real(4, 3, 6), 1),
    call("flip.default", real(4, 3, 6), [0, -1]),
    call("roll.default", real(4, 3, 6), [1, 2], [0, -1]),
    call("roll.default", real(4, 6), [3]),
    *_each("sort.default argsort.default", real(4, 6), 0),
    *_each("sort.stable argsort.stable", real(4, 6), stable=True, dim=0),
    call("topk.default", real(4, 6), 2),
    call("topk.default", real(4, 6), 4, 0),
    call("logcumsumexp.default", real(4, 6), 1),
    *_each("cummax cummin", real(4, 6), 1),
)

_REDUCTIONS = """amax amin max.dim min.dim argmax argmin prod.dim_int any.dim all.dim mean.dim sum.dim_IntList
logsumexp var.correction var.dim std.correction std.dim linalg_vector_norm norm.ScalarOpt_dim"""

REDUCTIONS = (
    *_each("sum mean max min argmax argmin prod", real(4, 6)),
    *_each("any all", bools(4, 6)),
    call("sum.default", ints(4, 6)),
    call("sum.dim_IntList", real(4, 3, 6), [-1]),
    call("sum.dim_IntList", real(4, 3, 6), [0, 2], True),
    call("sum.dim_IntList", real(4, 6), None),
    call("sum.dim_IntList", bools(4, 6), [0]),
    call("mean.dim", real(4, 3, 6), [-1], True),
    call("mean.dim", real(4, 3, 6), [0, 2]),
    *_each("amax amin", real(4, 3, 6), [0, 2]),
    *_each("amax", real(4, 6)),
    *_each("max.dim min.dim argmax argmin prod.dim_int", real(4, 3, 6), -1, True),
    *_each("any.dim all.dim", bools(4, 3, 6), 1),
    *_each("any.dims all.dims", bools(4, 3, 6), [0, 2]),
    call("logsumexp.default", real(4, 3, 6), [1]),
    *_each("var.dim std.dim", real(4, 3, 6), [0, 1], True, True),
    *_each("var.correction std.correction var_mean.correction", real(4, 3, 6), [1], correction=0),
    call("linalg_vector_norm.default", real(4, 3, 6), 2, [1]),
    call("norm.ScalarOpt_dim", real(4, 3, 6), 2, [1]),
    call("aminmax.default", real(4, 6), dim=1),
    call("count_nonzero.dim_IntList", ints(4, 6, below=3), [1]),
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
    call("transpose.int", real(4, 3, 6), 0, -1),
    call("t.default", real(4, 6)),
    call("permute.default", real(4, 3, 6), [2, 0, -2]),
    *_each("mT adjoint", real(2, 4, 6)),
    call("numpy_T.default", real(4, 3, 6)),
    call("movedim.int", real(4, 3, 6), 0, 2),
    call("slice.Tensor", real(4, 6), 1, 2, 4),
    call("slice.Tensor", real(4, 6), 1, 0, 2),
    call("slice.Tensor", real(4, 6), 1, -4),
    call("slice.Tensor", real(4, 6), 0, 0, 3, 2),
    call("slice.Tensor", real(12), 0, 0, 12),
    call("slice.Tensor", real(12), 0, 0, 100, 3),
    call("slice.Tensor", real(6, 2), 0, 3, 3),
    call("slice.Tensor", real(4, 6), 1, Number(2), Number(6)),
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
    call("unbind.int", real(4, 3, 2), 1),
    call("squeeze.dim", real(4, 1, 6), 1),
    call("squeeze.dim", real(2, 3, 6), 0),
    call("squeeze.dims", real(2, 1, 6), [0, 1]),
    call("squeeze.default", real(2, 1, 3)),
    call("unsqueeze.default", real(4, 6), 1),
    call("unsqueeze.default", real(4, 6), -1),
    call("cat.default", [real(4, 2), real(4, 4)], -1),
    call("cat.default", [real(2, 6), real(4, 6), real(2, 6)]),
    call("cat.default", [real(4, 6)], 1),
    call("cat.default", [real(0), real(4, 6)], 1),
    call("stack.default", [real(4, 6), real(4, 6)], 1),
    call("stack.default", [real(4, 6)], -1),
    call("repeat.default", real(4, 6), [1, 2]),
    call("repeat.default", real(4, 1), [2, 1, 3]),
    call("repeat.default", real(4), [3, 1]),
    call("repeat_interleave.self_int", real(4, 6), 2, 0),
    call("repeat_interleave.self_int", real(4, 6), 2, -1),
    call("repeat_interleave.self_int", real(4, 6), 2),
    call("constant_pad_nd.default", real(4, 6), [1, 2], 0.5),
    call("constant_pad_nd.default", real(4, 6), [0, -1, 0, 1]),
    call("pad.default", real(4, 6), [1, 2]),
    call("pad.default", real(2, 4, 6), [1, 2], "reflect"),
    *_each("tril triu", real(4, 3, 2), 1),
    call("diagonal.default", real(4, 3, 3), 0, 1, 2),
)

INDEXING = (
    call("index.Tensor", real(6, 4), [ints(4, below=6)]),
    call("index.Tensor", real(6, 4), [ints(1, below=6)]),
    call("index.Tensor", real(3, 4, 6), [None, ints(2, below=4)]),
    call("index.Tensor", real(3, 4, 6), [None, ints(2, 1, below=4), ints(4, below=6)]),
    call("index.Tensor", real(3, 4, 6), [ints(4, below=3), None, ints(4, below=6)]),
    call("index.Tensor", real(3, 4, 6), [ints(4, 1, below=3), ints(2, below=4)]),
    call("index_select.default", real(4, 6), 1, ints(4, below=6)),
    call("index_select.default", real(4, 6), 0, ints(2, below=4)),
    call("gather.default", real(4, 6), 1, ints(4, 3, below=6)),
    call("gather.default", real(4, 6), 0, ints(2, 6, below=4)),
    call("gather.default", real(4, 6), 1, ints(2, 6, below=6)),
    call("gather.default", real(4, 6), 1, ints(2, 4, below=6)),
    call("scatter.src", real(4, 6), 1, ints(4, 3, below=6), real(4, 3)),
    call("scatter.value", real(4, 6), 1, ints(4, 3, below=6), 0.7),
    call("scatter_add.default", real(4, 6), 1, ints(4, 3, below=6), real(4, 3)),
    call("scatter_add.default", real(4, 6), 1, ints(2, 3, below=6), real(4, 4)),
    call("index_add.default", real(4, 6), 1, ints(3, below=6), real(4, 3)),
    call("index_put.default", real(6, 4), [ints(3, below=6)], real(3, 4), True),
    call("index_put.default", real(6, 4), [ints(3, below=6)], real(4), True),
    call("take_along_dim.default", real(4, 6), ints(4, 3, below=6), 1),
    call("one_hot.default", ints(4, 3, below=5), 5),
)

SAMPLES: tuple[Sample, ...] = (*ELEMENTWISE, *PRODUCTS, *NORMS, *REDUCTIONS, *SHAPES, *INDEXING)


def samples_of(op: str) -> tuple[Sample, ...]:
    return tuple(s for s in SAMPLES if s.op == op)
