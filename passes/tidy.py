"""Tidying the emitted code: local identities, declared as pairs of functions, so that it reads as a person writes it.

What is global (what is cut, where all-reduces go) was decided by the placement. One generic test proves every
pattern, forward and backward, in all states that its variables can have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from tpcompile import collectives
from tpcompile.aliasing import is_inplace, may_share
from tpcompile.collectives import transition_of
from tpcompile.effects import drop_dead
from tpcompile.layout import Mesh
from tpcompile.localize import known_part, per_rank
from tpcompile.patterns import Match, Pattern, leaf, rewrite
from tpcompile.program import Program, copy_graph
from tpcompile.runs import Parts, run_length

aten = torch.ops.aten
_attention = aten.scaled_dot_product_attention.default
ARITHMETIC = (aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv)  # on sizes
CONVOLUTIONS = (  # and over how many dims each
    *((getattr(getattr(aten, f"conv{n}d"), form), n) for n in (1, 2, 3) for form in ("default", "padding")),
    (aten.conv_transpose1d.default, 1),
    (aten.conv_transpose2d.input, 2),
    (aten.conv_transpose3d.input, 3),
)
EVERYBODY = Mesh((1,)).group_name([0])  # the group whose members are all ranks, in their order
all_reduce = leaf(collectives.all_reduce)
copy = leaf(collectives.copy)
cut = leaf(collectives.cut)
reduce_scatter = leaf(collectives.reduce_scatter)
scatter = leaf(collectives.scatter)


def tidy(program: Program) -> Program:
    """Apply ``PATTERNS`` until none fits, compute equal sizes once, part dims at once, and drop what nothing uses."""
    module, graph = copy_graph(program.graph_module)
    rewrite(graph, PATTERNS, program, _written(graph))
    _share_sizes(graph)
    _split(graph)
    drop_dead(graph)
    graph.lint()
    module.recompile()
    return program.with_(graph_module=module)


# ---------------------------------------------------------------------------------------------- why not, at some place
def _other_dtype(match: Match) -> str | None:
    x, y = match["x"].meta["val"].dtype, match["y"].meta["val"].dtype
    return None if x == y else f"x is {x} and y is {y}: the message would be in the wider of the two"


def _not_per_column(name: str, operands: str, what: str, dim: int = -1) -> Any:
    """Whether a variable has not one number for each column of the root's value, or another dtype than ``operands``.

    Columns are the root's dim ``dim``.
    """

    def reason(match: Match) -> str | None:
        if not isinstance(match[name], torch.fx.Node):
            return f"{name} is a number"
        x, out = match[name].meta["val"], match.root.meta["val"]
        if _exact(x.shape) != _exact(out.shape[dim:][:1]):
            return f"{name} is {list(x.shape)}, not one number for each of the {out.shape[dim]} columns"
        dtypes = {match[v].meta["val"].dtype for v in operands}
        return None if len(dtypes) == 1 else f"{what} takes one dtype, not {sorted(map(str, dtypes))}"

    return reason


_no_bias = _not_per_column("b", "xwb", "a product with bias")
_no_weight = _not_per_column("w", "xw", "a norm with weight")


def _changes(neutral: int) -> Any:
    """Whether an addition of (product with) a number does something."""

    def reason(match: Match) -> str | None:
        number, x, out = match["number"], match["x"].meta["val"], match.root.meta["val"]
        if not isinstance(number, (int, float)) or number != neutral:
            return f"the number is {number}, not {neutral}"
        if x.dtype != out.dtype:
            return f"it makes {out.dtype} of {x.dtype}"
        if neutral == 0 and (x.dtype.is_floating_point or x.dtype.is_complex):
            return "-0.0 + 0 is 0.0"
        return _new_memory(match)

    return reason


def _not_a_mask(match: Match) -> str | None:
    dtype = match["x"].meta["val"].dtype
    return _new_memory(match) if dtype == torch.bool else f"x is {dtype}, not bool"


def _new_memory(match: Match) -> str | None:
    """Whether the copy of ``x`` that the root makes is needed."""
    x, out = match["x"].meta["val"], match.root.meta["val"]
    if any(user.op == "output" for user in match.root.users):
        return "the program's output must be a tensor of its own"
    if (_exact(x.shape), _exact(x.stride())) != (_exact(out.shape), _exact(out.stride())):
        return "it is laid out in memory in another way"
    return None


def _narrow(match: Match) -> str | None:
    """Whether rounding between the ops is part of the result."""
    dtype = match["x"].meta["val"].dtype
    return None if dtype in (torch.float32, torch.float64) else f"x is {dtype}: the fused op rounds once, these each"


def _unusual_norm(match: Match) -> str | None:
    """Whether the written norm is more, or less, than that of the last dim by a known number."""
    x, eps = match["x"].meta["val"], match["eps"]
    if not isinstance(eps, (int, float)) or not isinstance(x.shape[-1], int):
        return "eps and the width must be known"
    return _narrow(match)


def _other_repeats(match: Match) -> str | None:
    """Whether more than the heads of k and v is expanded, or q has another number of them."""
    for name in "kv":
        x = match[name].meta["val"]
        each, every = (n.meta["val"] for n in _repeats(match, match[name]))
        if x.dim() != 4 or _exact(each.shape) != _exact((*x.shape[:2], each.shape[2], *x.shape[2:])):
            return f"more than the heads of {name} is repeated"
        if _exact(every.shape) != _exact((x.shape[0], x.shape[1] * each.shape[2], *x.shape[2:])):
            return f"heads of {name} are not next to their copies"
    return None


def _repeats(match: Match, x: torch.fx.Node) -> list[torch.fx.Node]:
    """The expand and the reshape in the match that repeat ``x``."""
    unsqueeze = next(n for n in match.nodes if n.args[0] is x)
    expand = next(n for n in match.nodes if n.args[0] is unsqueeze)
    return [expand, next(n for n in match.nodes if n.args[0] is expand)]


def _changes_shape(match: Match) -> str | None:
    x, root = match["x"], match.root
    before, after = _exact(x.meta["val"].shape), _exact(root.meta["val"].shape)
    if before != after:
        return f"the shape becomes {list(after)}, it was {list(before)}"
    cut, uncut = root.meta.get("placement"), x.meta.get("placement")
    return None if cut is not None and cut == uncut else f"the placement becomes {cut}, it was {uncut}"


def _unknown_part(match: Match) -> str | None:
    size, dim, parts = match["size"], match["dim"], match["parts"]
    if not isinstance(parts, tuple) or not isinstance(size[dim], int):
        return "the size of the part is known only at run time"
    if len({run_length(runs) for runs in parts}) > 1 and match["group"] != EVERYBODY:
        return "ranks hold parts of different sizes"
    return None


def _indivisible(match: Match) -> str | None:
    a, b = match["a"], match["b"]
    if not isinstance(a, int) or not isinstance(b, int) or a % b:
        return f"{b} does not divide {a}"
    return None


def _exact(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes to be compared as expressions, without a guess at what symbols stand for."""
    return tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes)


# ---------------------------------------------------------------------------------------------- the patterns
def _biased(product: Any, with_bias: Any) -> tuple[Pattern, Pattern]:
    """A product plus a bias, and a bias plus a product, is a product with bias."""
    name = f"a bias goes into its {product.overloadpacket.__name__}"
    return (
        Pattern(name, lambda x, w, b: aten.add.Tensor(product(x, w), b), with_bias, _no_bias),
        Pattern(f"{name}, bias first", lambda x, w, b: aten.add.Tensor(b, product(x, w)), with_bias, _no_bias),
    )


def _biased_convolution(conv: Any, dims: int) -> Pattern:
    """A convolution over ``dims`` dims plus one number per channel is a convolution with bias."""

    def plus(product: Any, bias: Any) -> Any:
        for _ in range(dims):
            bias = aten.unsqueeze.default(bias, -1)
        return aten.add.Tensor(product, bias)

    name, unless = f"a bias goes into its {conv}", _not_per_column("b", "xwb", "a convolution", 1)
    if "transpose" in name:
        return Pattern(
            name,
            lambda x, w, b, stride, padding, more, groups, dilation: plus(
                conv(x, w, None, stride, padding, more, groups, dilation), b
            ),
            lambda x, w, b, stride, padding, more, groups, dilation: conv(
                x, w, b, stride, padding, more, groups, dilation
            ),
            unless,
        )
    return Pattern(
        name,
        lambda x, w, b, stride, padding, dilation, groups: plus(conv(x, w, None, stride, padding, dilation, groups), b),
        lambda x, w, b, stride, padding, dilation, groups: conv(x, w, b, stride, padding, dilation, groups),
        unless,
    )


def _written_gelu(x: Any) -> Any:
    """Gelu with tanh as transformers' NewGELUActivation writes it (Hendrycks and Gimpel 2016)."""
    inner = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, 3.0), 0.044715))
    tanh = aten.tanh.default(aten.mul.Tensor(inner, math.sqrt(2.0 / math.pi)))
    return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), aten.add.Tensor(tanh, 1.0))


def _written_rms_norm(x: Any, eps: Any) -> Any:
    """Without its weight, as transformers writes it (Zhang and Sennrich 2019)."""
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
    return aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps)))


def _weighted(norm: Any) -> tuple[Pattern, Pattern]:
    """A norm without a weight times a weight, and a weight times a norm, is a norm with that weight."""
    name, with_weight = "an RMS norm has its weight", lambda x, shape, eps, w: norm(x, shape, w, eps)
    return (
        Pattern(name, lambda x, shape, eps, w: aten.mul.Tensor(norm(x, shape, None, eps), w), with_weight, _no_weight),
        Pattern(
            f"{name}, weight first",
            lambda x, shape, eps, w: aten.mul.Tensor(w, norm(x, shape, None, eps)),
            with_weight,
            _no_weight,
        ),
    )


def _repeated(x: Any, sizes: Sequence[Any], shape: Sequence[Any]) -> Any:
    """kv heads next to their copies, as ``repeat_kv`` of transformers makes them."""
    return aten.reshape.default(aten.expand.default(aten.unsqueeze.default(x, 2), sizes), shape)


def _part(size: Sequence[Any], dim: int, parts: Parts) -> list[Any]:
    """``size`` with the part that a rank holds of ``dim``."""
    return [per_rank(list(map(run_length, parts))) if d == dim else n for d, n in enumerate(size)]


def _born_cut(op: Any) -> Pattern:
    """A part of a constant is a smaller constant."""
    return Pattern(
        f"a part of {op.overloadpacket.__name__} is smaller",
        lambda size, dtype, layout, device, pin_memory, dim, parts, group: cut(
            op(size, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory), dim, parts, group
        ),
        lambda size, dtype, layout, device, pin_memory, dim, parts, group: op(
            _part(size, dim, parts), dtype=dtype, layout=layout, device=device, pin_memory=pin_memory
        ),
        _unknown_part,
    )


PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "two all-reduces that meet are one",
        lambda x, y, group: aten.add.Tensor(all_reduce(x, group), all_reduce(y, group)),
        lambda x, y, group: all_reduce(aten.add.Tensor(x, y), group),
        _other_dtype,
    ),
    Pattern(
        "a part of a complete value",
        lambda x, dim, parts, group: cut(copy(x, group), dim, parts, group),
        lambda x, dim, parts, group: scatter(x, dim, parts, group),
    ),
    Pattern(
        "a part of an all-reduce is a reduce-scatter",
        lambda x, dim, parts, group: scatter(all_reduce(x, group), dim, parts, group),
        lambda x, dim, parts, group: reduce_scatter(x, dim, parts, group),
    ),
    *_biased(aten.linear.default, lambda x, w, b: aten.linear.default(x, w, b)),
    *_biased(aten.mm.default, lambda x, w, b: aten.addmm.default(b, x, w)),
    *(_biased_convolution(conv, dims) for conv, dims in CONVOLUTIONS),
    Pattern(
        "gelu, written out", _written_gelu, lambda x: aten.gelu.default(x, approximate="tanh"), _narrow,
    ),
    Pattern(
        "an RMS norm, written out",
        _written_rms_norm,
        lambda x, eps: aten.rms_norm.default(x, x.node.meta["val"].shape[-1:], None, eps),
        _unusual_norm,
    ),
    *_weighted(aten.rms_norm.default),
    Pattern(
        "attention repeats kv heads by itself",
        lambda q, k, v, k_sizes, k_shape, v_sizes, v_shape, mask, p, causal, scale: _attention(
            q, _repeated(k, k_sizes, k_shape), _repeated(v, v_sizes, v_shape), mask, p, causal, scale=scale
        ),
        lambda q, k, v, k_sizes, k_shape, v_sizes, v_shape, mask, p, causal, scale: _attention(
            q, k, v, mask, p, causal, scale=scale, enable_gqa=True
        ),
        _other_repeats,
    ),
    *map(_born_cut, (aten.zeros.default, aten.ones.default)),
    Pattern(
        "a part of full is smaller",
        lambda size, value, dtype, layout, device, pin_memory, dim, parts, group: cut(
            aten.full.default(size, value, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory),
            dim, parts, group,
        ),
        lambda size, value, dtype, layout, device, pin_memory, dim, parts, group: aten.full.default(
            _part(size, dim, parts), value, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory
        ),
        _unknown_part,
    ),
    Pattern("x + 0 is x", lambda x, number: aten.add.Tensor(x, number), lambda x, number: x, _changes(0)),
    Pattern("x * 1 is x", lambda x, number: aten.mul.Tensor(x, number), lambda x, number: x, _changes(1)),
    Pattern(
        "True & x is x",
        lambda x, y, dtype, pin_memory: aten.__and__.Tensor(
            aten.new_ones.default(y, [], dtype=dtype, pin_memory=pin_memory), x
        ),
        lambda x, y, dtype, pin_memory: x,
        _not_a_mask,
    ),
    Pattern(
        "a reshape to the same shape",
        lambda x, shape: aten.reshape.default(x, shape), lambda x, shape: x, _changes_shape,
    ),
    Pattern(
        "a view of the same shape",
        lambda x, shape: aten.view.default(x, shape), lambda x, shape: x, _changes_shape,
    ),
    Pattern("(n * a) // b, divided", lambda n, a, b: n * a // b, lambda n, a, b: n * (a // b), _indivisible),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is no pattern
def _written(graph: torch.fx.Graph) -> frozenset[torch.fx.Node]:
    """Nodes that may share memory with what an in-place op writes."""
    base: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        first = node.args[0] if node.op == "call_function" and node.args else None
        shares = may_share(node) or transition_of(node.target) is not None
        base[node] = base[first] if isinstance(first, torch.fx.Node) and shares else node
    written = {base[node] for node in graph.nodes if is_inplace(node)}
    return frozenset(node for node, of in base.items() if of in written)


def _share_sizes(graph: torch.fx.Graph) -> None:
    """Equal arithmetic on sizes in one module is done once."""
    first: dict[tuple[Any, ...], torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in ARITHMETIC:
            continue
        same = first.setdefault((node.target, node.args, node.meta.get("module")), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _split(graph: torch.fx.Graph) -> None:
    """Slices that part a whole dim are one split, and their gradients one concatenation: rotary halves."""
    found: dict[tuple[Any, ...], dict[int, tuple[int, torch.fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        if (part := known_part(node)) is not None:
            dim, start, end = part
            found.setdefault((node.args[0], dim, node.meta.get("modules")), {})[start] = (end, node)
    for (_, dim, _), parts in found.items():
        starts = sorted(parts)
        x: Any = parts[starts[0]][1].args[0]  # (a slice itself, perhaps, of which there is a split by now)
        bounds = [*starts[1:], x.meta["val"].shape[dim]]
        if len(parts) < 2 or starts[0] != 0 or [parts[start][0] for start in starts] != bounds:
            continue
        slices = [parts[start][1] for start in starts]
        with graph.inserting_before(min(slices)):
            sizes = [end - start for start, end in zip(starts, bounds, strict=True)]
            made = graph.create_node("call_function", aten.split_with_sizes.default, (x, sizes, dim), name="split")
            made.meta = dict(slices[0].meta) | {
                key: tuple(node.meta[key] for node in slices) for key in ("val", "placement")
            }
            items = [graph.call_function(operator.getitem, (made, index)) for index in range(len(slices))]
        for node, item in zip(slices, items, strict=True):
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
            graph.erase_node(node)


__all__ = ["PATTERNS", "tidy"]
