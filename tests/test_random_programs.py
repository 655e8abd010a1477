"""Random tensor programs: what compiles is equal to one device, what does not says where and why.

A recipe is a list of steps, each the name of an op and a few small numbers. The builder plays it on real tensors, and
every choice (an operand, a dim, a width) is one of those that are possible there, picked by the next number: so every
recipe is a model, and a part of a recipe is one too, which is what lets hypothesis shrink. The model is written out as
Python: a counterexample is shown as the text of a class, which runs by itself.

Every program is compiled for a spec that is drawn, and for the plan. `Tally` says what became of them.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpcompile import rules, shards
from tpcompile.capture import Captured, capture
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.compiler import rewrite_captured
from tpcompile.equivalence import Report, verify_program
from tpcompile.errors import CaptureError, ShardingError, TpcompileError
from tpcompile.program import Options, Program
from tpcompile.rules import RULES, Rule
from tpcompile.simulate import Simulation
from tpcompile.spec import Spec

TOLERANCE = 1e-10
VOCABULARY = 7
LARGEST, MOST = 60.0, 3000  # of a value's magnitude and of its elements


# --------------------------------------------------------------------------------------------------- what is drawn
@dataclass(frozen=True)
class Step:
    op: str
    picks: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A program, its spec and its degree."""

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    claims: tuple[int, ...]  # for every weight in turn, an index into `WORDS`
    outputs: tuple[int, ...]  # which values are returned, the last ones first, and in which form
    training: bool
    degree: int


WORDS = ("column", "", "", "row", "vocab")
SHAPES = ((2, 3, 6), (2, 3, 8), (4, 6), (2, 2, 3, 8), (2, 4, 9), (3, 4, 4))
PICKS, HIGHEST = 8, 99  # numbers of a step, and the largest one


class Impossible(Exception):
    """No choice fits here: the step is left out."""


@dataclass(frozen=True, eq=False)
class Value:
    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dim(self) -> int:
        return self.tensor.dim()

    def __str__(self) -> str:
        return self.name


class Live(nn.Module):
    """Holds the weights while a program is written."""


class Builder:
    """Writes a program, line by line, running each line as it goes."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.module = Live().train(recipe.training)
        self.declared: list[str] = []
        self.weights: dict[str, str] = {}  # name -> its word
        self.lines: list[str] = []
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(recipe.shape, generator=generator)
        ids = torch.randint(0, VOCABULARY, recipe.shape[:2], generator=generator)
        self.inputs = (x, ids)
        self.values = [Value("ids", ids.clone()), Value("x", x.clone().requires_grad_())]
        self.numbers: Iterator[int] = iter(())
        self.names = itertools.count()

    # ------------------------------------------------------------------------------------------------ choices
    def pick(self, options: Sequence[Any]) -> Any:
        """One of ``options``, by the next number of the step."""
        if not options:
            raise Impossible
        return options[next(self.numbers) % len(options)]

    def value(self, fits: Callable[[Value], bool] = lambda v: True, kind: str = "float") -> Value:
        """A value of that kind, the latest most likely."""
        kinds = {
            "float": lambda t: t.is_floating_point(),
            "bool": lambda t: t.dtype == torch.bool,
            "int": lambda t: t.dtype == torch.int64,
        }
        found = [v for v in reversed(self.values) if kinds[kind](v.tensor) and fits(v)]
        return self.pick([*found[:3], *found[:1], *found])

    def dim(self, x: Value, least: int = 2) -> int:
        """A dim of ``x`` of that size or more, the last most likely."""
        found = [d for d in reversed(range(x.dim)) if x.shape[d] >= least]
        return self.pick([*found[:1], *found])

    # ------------------------------------------------------------------------------------------------ writing
    def declare(self, prefix: str, made: str, weight: bool = False) -> str:
        """A new attribute of the model; its name."""
        name = f"{prefix}{next(self.names)}"
        line = f"self.{name} = {made}"
        if made.startswith("torch.") and weight is False:
            line = f"self.register_buffer({name!r}, {made})"
        exec(line, self.space())
        self.module.train(self.recipe.training)
        self.declared.append(line)
        if weight:
            self.weights[name] = WORDS[self.recipe.claims[len(self.weights) % len(self.recipe.claims)] % len(WORDS)]
        return f"self.{name}"

    def parameter(self, *shape: int, weight: bool = False) -> str:
        sizes = ", ".join(map(str, shape))
        return self.declare("p", f"nn.Parameter(torch.randn({sizes}) * 0.4)", weight)

    def space(self) -> dict[str, Any]:
        return {"self": self.module, "torch": torch, "F": F, "nn": nn, **{v.name: v.tensor for v in self.values}}

    def let(self, *expressions: str) -> None:
        """New values, one a line."""
        for expression in expressions:
            made = eval(expression, self.space())
            many = isinstance(made, (tuple, list))
            made = list(made) if many else [made]
            fresh = [Value(f"v{len(self.values) + i}", t) for i, t in enumerate(made)]
            for v in fresh:
                is_tensor = isinstance(v.tensor, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
                if not is_tensor or not 0 < v.tensor.numel() <= MOST or v.dim > 6:
                    raise Impossible
                t = v.tensor.detach()
                if t.is_floating_point() and not (t.abs().max() <= LARGEST and t.isfinite().all()):
                    raise Impossible
            self.lines.append(
                ", ".join(v.name for v in fresh) + ("," if many and len(made) == 1 else "") + f" = {expression}"
            )
            self.values += fresh

    def do(self, statement: str) -> None:
        """A line that writes in place."""
        exec(statement, self.space())
        self.lines.append(statement)

    def at(self, d: int, index: str) -> str:
        """``[:, index]``: along dim ``d``."""
        return "[" + ":, " * d + index + "]"


# --------------------------------------------------------------------------------------------------------- the ops
Op = Callable[[Builder], None]
OPS: dict[str, Op] = {}
WIDTHS = (8, 6, 12, 4, 9, 10)


def op(write: Op) -> Op:
    OPS[write.__name__] = write
    return write


@op
def linear(b: Builder) -> None:
    x = b.value()
    out, bias = b.pick(WIDTHS), b.pick((False, True))
    b.let(f"{b.declare('l', f'nn.Linear({x.shape[-1]}, {out}, bias={bias})', weight=True)}({x})")


@op
def linear_again(b: Builder) -> None:
    """A Linear that is there already, or its weight alone, or the other way round."""
    names = [n for n in b.weights if isinstance(getattr(b.module, n), nn.Linear)]
    layer = b.pick(names)
    out, ins = getattr(b.module, layer).weight.shape
    x = b.value(lambda v: v.shape[-1:] in ((ins,), (out,)))
    if x.shape[-1] == ins:
        b.let(b.pick([f"self.{layer}({x})", f"F.linear({x}, self.{layer}.weight)"]))
    else:
        b.let(b.pick([f"{x} @ self.{layer}.weight", f"F.linear({x}, self.{layer}.weight.t())"]))


@op
def weight_view(b: Builder) -> None:
    """A part or another shape of a weight."""
    layer = b.pick([n for n in b.weights if isinstance(getattr(b.module, n), nn.Linear)])
    out, ins = getattr(b.module, layer).weight.shape
    w = f"self.{layer}.weight"
    x = b.value(lambda v: v.shape[-1:] == (ins,))
    forms = [
        f"F.linear({x}, {w}[:3])",
        f"F.linear({x}, {w}[1:])",
        f"F.linear({x}, {w} * 2.0)",
        f"{x} * {w}[0]",
        f"F.linear({x}, {w}.flip(0))",
        f"F.linear({x}, torch.cat([{w}, {w}]))",
        f"{x} * {w}.mean(0)",
        f"F.linear({x}, F.normalize({w}, dim=1))",
        f"{x} * {w}.sum()",
        f"F.linear({x}, {w}[torch.tensor([1, 0, 1])])",
        f"F.linear({x}, {w}.reshape(-1).view({out}, {ins}))",
    ]
    if out % 2 == 0:
        forms.append(f"torch.einsum('...i,abi->...ab', {x}, {w}.view(2, {out // 2}, {ins}))")
        forms.append(f"torch.einsum('...i,abi->...ba', {x}, {w}.unflatten(0, ({out // 2}, 2)))")
    b.let(b.pick(forms))


UNARY = (
    "F.gelu({x})",
    "torch.tanh({x})",
    "F.silu({x})",
    "F.relu({x})",
    "torch.sigmoid({x})",
    "{x} * 1.5",
    "{x} + 1.0",
    "1.0 - {x}",
    "-{x}",
    "{x} / 3",
    "{x}.abs()",
    "{x}.square()",
    "{x}.clamp(-1.0, 0.5)",
    "{x}.clamp(min=0.1)",
    "{x}.exp()",
    "{x}.sin()",
    "F.softplus({x})",
    "{x}.abs().add(0.5).log()",
    "{x}.abs().add(0.5).rsqrt()",
    "{x}.clone()",
    "{x}.detach()",
    "{x}.contiguous()",
    "{x}.to(torch.float64).to(torch.float32)",
    "{x}.masked_fill({x} > 0.5, 0.25)",
    "torch.where({x} > 0, {x}, 0.1 * {x})",
    "F.dropout({x}, 0.3, self.training)",
    "{x}.flatten()",
    "{x}.sum()",
    "{x}.mean()",
    "{x} - {x}.detach()",
    "{x} * {x}.detach()",
    "{x}.mT",
    "{x} / {x}.size(0)",
    "{x} * {x}.shape[-1] ** -0.5",
    "{x}.view({x}.size(0), -1)",
    "{x}.reshape(-1, {x}.size(-1))",
    "{x} / {x}.numel()",
    "{x} + torch.zeros_like({x})",
    "{x} * torch.ones({x}.size(0), *([1] * ({x}.dim() - 1)))",
    "{x}.std()",
    "{x}.max()",
    "{x}.repeat(2, *([1] * ({x}.dim() - 1)))",
    "F.elu({x})",
    "F.leaky_relu({x}, 0.1)",
    "{x}.pow(3)",
    "{x}.new_ones({x}.shape) * {x}",
    "{x}.T",
    "{x}.ravel()",
    "torch.atleast_3d({x})",
    "{x} + torch.arange({x}.size(-1))",
    "{x}.nan_to_num()",
    "{x}.float()",
    "{x}.sign() * {x}",
)


@op
def unary(b: Builder) -> None:
    b.let(b.pick(UNARY).format(x=b.value()))


ALONG = (
    "{x}.softmax({d})",
    "{x}<1:> - {x}<:-1>",
    "{x}.sum({d})",
    "{x}.mean({d}, keepdim=True)",
    "{x}.log_softmax({d})",
    "{x}.logsumexp({d})",
    "{x}.max({d}).values",
    "{x}.min({d}, keepdim=True)[0]",
    "{x}.amax({d})",
    "{x}.mean({d})",
    "{x}.var({d})",
    "{x}.std({d}, keepdim=True)",
    "{x} - {x}.mean({d}, keepdim=True)",
    "F.normalize({x}, dim={d})",
    "{x}.prod({d})",
    "{x}.cumsum({d})",
    "{x}.cumprod({d})",
    "{x}.logcumsumexp({d})",
    "{x}.cummax({d})[0]",
    "{x}.flip({d})",
    "{x}.roll(1, {d})",
    "{x}.roll(-2, {d})",
    "{x}.sort({d})[0]",
    "{x}.sort({d}, descending=True)[0]",
    "{x}.topk(2, {d})[0]",
    "{x}.kthvalue(2, {d})[0]",
    "{x}.median({d})[0]",
    "{x}<::2>",
    "{x}<1::2>",
    "{x}<-2:>",
    "{x}<:1>",
    "{x}<0>",
    "{x}<-1>",
    "{x}<[0, 1, 0]>",
    "{x}.narrow({d}, 1, {n} - 1)",
    "{x}.index_select({d}, torch.tensor([1, 0, 1]))",
    "{x}.repeat_interleave(2, {d})",
    "torch.cat([{x}, {x}], {d})",
    "torch.cat([{x}<1:>, {x}<:1>], {d})",
    "torch.cat([{x}, {x}<:1> * 2], {d})",
    "torch.stack([{x}, -{x}], {d})",
    "torch.stack([{x}<0>, {x}<1>], -1)",
    "{x}.diff(dim={d})",
    "{x}.unfold({d}, 2, 1)",
    "F.glu({x}, {d})",
    "{x}.unsqueeze({d})",
    "{x}.movedim({d}, 0)",
    "{x}.transpose({d}, 0)",
    "{x}.transpose({d}, -1)",
    "{x}.swapaxes({d}, 1)",
    "{x}.select({d}, 1)",
    "{x}.sum({d}, keepdim=True) * {x}",
    "{x}.norm(dim={d}, keepdim=True)",
    "{x}.abs().amax({d}, keepdim=True) + {x}",
    "{x} * {x}.softmax({d})",
    "{x}.gather({d}, {x}.argsort({d}))",
    "{x}.take_along_dim({x}.argmax({d}, keepdim=True), {d})",
    "{x} + torch.arange({n}).view(<shape>)",
    "{x} * torch.linspace(0.5, 1.5, {n}).view(<shape>)",
    "torch.where(torch.arange({n}).view(<shape>) % 2 == 0, {x}, -{x})",
    "{x}.masked_fill((torch.arange({n}) > 1).view(<shape>), 0.5)",
    "{x} * F.one_hot(torch.tensor(1), {n}).view(<shape>)",
    "torch.zeros_like({x}).index_add({d}, torch.arange({n}).flip(0), {x})",
    "{x}.index_copy({d}, torch.tensor([0]), {x}<-1:>)",
    "{x}.index_fill({d}, torch.tensor([0]), 0.5)",
    "torch.zeros_like({x}).scatter({d}, {x}.argsort({d}), {x})",
    "torch.zeros_like({x}).scatter_add({d}, {x}.argsort({d}), {x})",
    "{x}.scatter({d}, torch.zeros_like({x}, dtype=torch.long), 0.5)",
    "{x}.sum({d}).unsqueeze({d}).expand({x}.shape)",
    "F.gumbel_softmax({x}, dim={d}) * {x}",
    "{x}.var({d}, correction=0, keepdim=True) + {x}",
    "{x}.cumsum({d}) / {n}",
    "torch.linalg.vector_norm({x}, dim={d})",
    "{x}.aminmax(dim={d})[1]",
    "torch.addcmul({x}, {x}, {x}<:1>, value=0.5)",
    "torch.lerp({x}, {x}<:1>, 0.3)",
    "{x}.std({d}, correction=0)",
    "torch.maximum({x}, {x}<:1>)",
    "{x}.renorm(2, {d}, 1.0)",
    "{x}.squeeze({d})",
    "{x}.tile((2,))",
    "{x}.float().softmax({d}).type_as({x})",
    "torch.cat([{x}<:1>, {x}, {x}<-1:>], {d})",
)
"""``x``: a float value, ``d``: one of its dims, ``n``: its size, ``<i>``: the index ``i`` of that dim."""


@op
def along(b: Builder) -> None:
    template = b.pick(ALONG)
    x = b.value(lambda v: any(n >= 2 for n in v.shape))
    d = b.dim(x)
    shape = ", ".join("-1" if i == d else "1" for i in range(x.dim))
    text = template.format(x=x, d=d, n=x.shape[d]).replace("<shape>", shape)
    b.let(re.sub(r"<(.*?)>", lambda m: b.at(d, m[1]), text) if "<" in template else text)


@op
def residual(b: Builder) -> None:
    x = b.value()
    y = b.value(lambda v: v is not x and v.shape == x.shape)
    b.let(
        b.pick(
            (
                "{x} + {y}",
                "{x} * {y}",
                "{x} - {y}",
                "torch.maximum({x}, {y})",
                "torch.where({x} > {y}, {x}, 0.5 * {y})",
                "torch.cat([{x}, {y}], -1)",
                "torch.stack([{x}, {y}]).sum(0)",
                "torch.stack([{x}, {y}], -1).flatten(-2)",
                "torch.lerp({x}, {y}, 0.25)",
                "{x} * {y}.sigmoid()",
                "torch.cat([{x}, {y}], 0)",
                "(({x} - {y}) ** 2).mean()",
                "F.cosine_similarity({x}, {y}, dim=-1)",
                "F.mse_loss({x}, {y}.detach())",
                "torch.addcdiv({x}, {y}, {y}.abs() + 1)",
                "torch.atan2({x}, {y}.abs() + 1)",
            )
        ).format(x=x, y=y)
    )


@op
def broadcast(b: Builder) -> None:
    def fits(v: Value) -> bool:
        pairs = list(zip(reversed(v.shape), reversed(x.shape), strict=False))
        return v is not x and v.shape != x.shape and all(m in (1, n) or n == 1 for m, n in pairs)

    x = b.value()
    y = b.value(fits)
    b.let(
        b.pick(
            ("{x} + {y}", "{x} * {y}", "{y} - {x}", "torch.where({y} > 0, {x}, 0.5)", "torch.maximum({x}, {y})")
        ).format(x=x, y=y)
    )


@op
def weight(b: Builder) -> None:
    """A parameter or buffer along some dim."""
    x = b.value(lambda v: v.dim > 0)
    d = b.dim(x, 1)
    shape = (x.shape[d], *([1] * (x.dim - 1 - d)))
    p = b.parameter(*shape) if b.pick((True, True, False)) else b.declare("b", f"torch.randn{shape}")
    b.let(
        b.pick(("{x} * {p}", "{x} + {p}", "{x} * (1 + {p})", "{x} * {p}.sigmoid()", "{x} - {p} * {p}")).format(x=x, p=p)
    )


@op
def prelu(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 2)
    b.let(f"F.prelu({x}, {b.parameter(b.pick((1, x.shape[1])))})")


@op
def split_dim(b: Builder) -> None:
    x = b.value(lambda v: any(n >= 4 for n in v.shape))
    d = b.pick([d for d in reversed(range(x.dim)) if x.shape[d] >= 4])
    n = x.shape[d]
    a = b.pick([a for a in range(2, n) if n % a == 0])
    sizes = [*x.shape[:d], a, n // a, *x.shape[d + 1 :]]
    b.let(
        b.pick(
            (
                f"{x}.unflatten({d}, ({a}, {n // a}))",
                f"{x}.reshape({', '.join(map(str, sizes))})",
                f"{x}.unflatten({d}, ({a}, -1)).transpose({d}, {d + 1})",
                f"{x}.unflatten({d}, (-1, {n // a})).sum({d})",
                f"{x}.unflatten({d}, ({a}, {n // a})).softmax({d + 1}).flatten({d}, {d + 1})",
                f"{x}.unflatten({d}, ({a}, {n // a})).transpose({d}, {d + 1}).flatten({d}, {d + 1})",
                f"{x}.unflatten({d}, ({a}, {n // a})).mean({d + 1})",
                f"{x}.unflatten({d}, ({a}, {n // a})).unbind({d})",
                f"{x}.unflatten({d}, ({a}, {n // a}))" + b.at(d + 1, "0"),
                f"{x}.unflatten({d}, ({a}, {n // a})).flip({d})",
            )
        )
    )


@op
def merge_dims(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 2)
    d = b.pick([*reversed(range(x.dim - 1))])
    merged = [*x.shape[:d], x.shape[d] * x.shape[d + 1], *x.shape[d + 2 :]]
    b.let(
        b.pick(
            (
                f"{x}.flatten({d}, {d + 1})",
                f"{x}.reshape({', '.join(map(str, merged))})",
                f"{x}.flatten({d})",
                f"{x}.transpose({d}, {d + 1}).flatten({d}, {d + 1})",
                f"{x}.transpose({d}, {d + 1}).reshape({', '.join(map(str, x.shape))})",
            )
        )
    )


@op
def permute(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 2)
    order = list(range(x.dim))
    random.Random(b.pick(range(24))).shuffle(order)
    b.let(f"{x}.permute({', '.join(map(str, order))})")


@op
def pieces(b: Builder) -> None:
    x = b.value(lambda v: any(n >= 2 for n in v.shape))
    d = b.dim(x)
    n = x.shape[d]
    parts = b.pick(("chunk", "split", "sizes", "unbind", "uneven", "tensor_split"))
    if parts == "sizes":
        a = b.pick([n // 2, *range(1, n)])
        b.let(f"{x}.split([{a}, {n - a}], {d})")
    elif parts == "unbind":
        b.let(f"{x}.unbind({d})")
    elif parts == "uneven":
        b.let(f"{x}.split({max(1, n - 1)}, {d})")
    else:
        b.let(
            {
                "chunk": f"{x}.chunk(2, {d})",
                "split": f"{x}.split({max(1, n // 2)}, {d})",
                "tensor_split": f"{x}.tensor_split(3, {d})",
            }[parts]
        )


@op
def gated(b: Builder) -> None:
    """A fused gate and value, packed or interleaved, and what sums over them."""
    x = b.value()
    width, k = b.pick((4, 6, 9)), x.shape[-1]
    fused = b.declare("l", f"nn.Linear({k}, {2 * width})", weight=True)
    down = b.declare("l", f"nn.Linear({width}, {k}, bias=False)", weight=True)
    both = f"{fused}({x})"
    halves = b.pick(
        (
            f"{both}.chunk(2, -1)",
            f"{both}.unflatten(-1, ({width}, 2)).unbind(-1)",
            f"{both}.split({width}, -1)",
            f"{both}.unflatten(-1, (2, {width})).unbind(-2)",
        )
    )
    b.let(halves)
    g, u = b.values[-2:]
    b.let(f"F.silu({g}) * {u}")
    b.let(f"{b.values[-1]} + 0.5" if b.pick((False, True)) else f"{b.values[-1]} * 0.5")
    b.let(f"{down}({b.values[-1]})")
    if b.pick((True, False)):
        b.let(f"{x} + {b.values[-1]}")


@op
def attention(b: Builder) -> None:
    """Heads of one packed or interleaved projection, or of three; explicit or fused."""
    x = b.value(lambda v: v.dim == 3)
    n, s, k = x.shape
    h, e = b.pick((2, 3, 4)), b.pick((2, 4))
    form = b.pick(("packed", "heads", "separate", "shared"))
    if form == "packed":
        qkv = b.declare("l", f"nn.Linear({k}, {3 * h * e})", weight=True)
        b.let(f"{qkv}({x}).view({n}, {s}, 3, {h}, {e}).permute(2, 0, 3, 1, 4)")
        b.let(f"{b.values[-1]}.unbind(0)")
    elif form == "heads":
        qkv = b.declare("l", f"nn.Linear({k}, {3 * h * e})", weight=True)
        b.let(f"{qkv}({x}).view({n}, {s}, {h}, 3 * {e}).transpose(1, 2)")
        b.let(f"{b.values[-1]}.chunk(3, -1)")
    else:
        names = [b.declare("l", f"nn.Linear({k}, {h * e})", weight=True) for _ in range(3 if form == "separate" else 2)]
        for name in [*names, names[-1]][:3]:
            b.let(f"{name}({x}).view({n}, {s}, {h}, {e}).transpose(1, 2)")
    q, kk, v = b.values[-3:]
    kind = b.pick(("explicit", "sdpa", "causal", "linear", "bias"))
    if kind == "explicit":
        b.let(f"({q} @ {kk}.mT).softmax(-1)", f"F.dropout(v{len(b.values)}, 0.2, self.training) @ {v}")
    elif kind == "causal":
        b.let(f"({q} @ {kk}.mT).masked_fill(torch.ones({s}, {s}, dtype=torch.bool).triu(1), -9.0).softmax(-1)")
        b.let(f"torch.einsum('bhqk,bhkd->bhqd', {b.values[-1]}, {v})")
    elif kind == "linear":
        b.let(f"F.elu({q}) + 1", f"{kk}.softmax(-2)")
        b.let(f"{b.values[-2]} @ ({b.values[-1]}.mT @ {v})")
    elif kind == "bias":
        b.let(f"({q} @ {kk}.mT + {b.parameter(h, 1, 1)}).softmax(-1) @ {v}")
    else:
        b.let(f"F.scaled_dot_product_attention({q}, {kk}, {v}, is_causal={b.pick((False, True))})")
    y = b.values[-1]
    b.let(f"{y}.transpose(1, 2).reshape({n}, {s}, -1)")
    out = b.declare("l", f"nn.Linear({h * e}, {k})", weight=True)
    b.let(f"{out}({b.values[-1]})")


@op
def sdpa(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 3)
    p = b.pick(("0.0", "0.2 if self.training else 0.0"))
    b.let(f"F.scaled_dot_product_attention({x}, {x}, {x}, dropout_p={p}, is_causal={b.pick((False, True))})")


@op
def norm(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 2 and v.shape[-1] >= 2)
    n = x.shape[-1]
    kind = b.pick(
        (
            "nn.LayerNorm({n})",
            "nn.RMSNorm({n})",
            "functional",
            "rms",
            "nn.BatchNorm1d({c})",
            "nn.GroupNorm(1, {c})",
            "two",
            "nn.InstanceNorm1d({c}, affine=True)",
            "statistics",
        )
    )
    if kind == "functional":
        b.let(f"F.layer_norm({x}, ({n},))")
    elif kind == "rms":
        b.let(f"{x} * ({x}.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * {b.parameter(n)}")
    elif kind == "two":
        b.let(f"F.layer_norm({x}, {x.shape[-2:]})")
    elif kind == "statistics":
        b.let(f"({x} - {x}.mean(-1, keepdim=True)) / ({x}.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()")
    else:
        b.let(f"{b.declare('n', kind.format(n=n, c=x.shape[1]))}({x})")


@op
def gram(b: Builder) -> None:
    """Products of a value with itself, and what becomes of their two equal dims."""
    x = b.value(lambda v: v.dim >= 2)
    b.let(b.pick((f"({x} @ {x}.mT) / {x.shape[-1]}", f"({x}.mT @ {x}) / {x.shape[-2]}")))
    g = b.values[-1]
    b.let(
        b.pick(
            (
                "{g} + {g}.mT",
                "{g}.softmax(-1)",
                "{g}.tril()",
                "{g}.triu(1) + {g}",
                "{g} * {g}.transpose(-1, -2)",
                "{g}.diagonal(dim1=-2, dim2=-1)",
                "{g} @ {x}" if b.lines[-1].count(".mT)") else "{x} @ {g}",
                "{g} + torch.eye({n})",
                "torch.cat([{g}, {g}.mT], -1)",
                "{g} - {g}.mT.softmax(-1)",
            )
        ).format(g=g, x=x, n=g.shape[-1])
    )


@op
def products(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 2)
    n, lead = x.shape[-1], x.shape[-2]
    out = b.pick(WIDTHS)
    form = b.pick(range(9))
    if form == 0:
        b.let(f"{x} @ {b.parameter(n, out, weight=True)}")
    elif form == 1:
        b.let(f"torch.einsum('...i,oi->...o', {x}, {b.parameter(out, n, weight=True)})")
    elif form == 2:
        b.let(f"torch.einsum('...ij,jk->...ki', {x}, {b.parameter(n, out, weight=True)})")
    elif form == 3:
        b.let(f"torch.einsum('...ij,ij->...', {x}, {b.parameter(lead, n, weight=True)})")
    elif form == 4:
        b.let(f"torch.einsum('...i,...j->...ij', {x}, {x}).flatten(-2)")
    elif form == 5:
        b.let(f"{x}.unsqueeze(-1) * {x}.unsqueeze(-2)")
    elif form == 6:
        b.let(f"{x} @ {b.parameter(n)}")
    elif form == 7:
        b.let(f"torch.outer({x}.flatten()[:4], {b.parameter(6)})")
    else:
        y = b.value(lambda v: v.dim == x.dim and v.shape == x.shape)
        b.let(f"torch.einsum('...i,...i->...', {x}, {y})" if b.pick((True, False)) else f"{x}.mT @ {y}")


@op
def bmm(b: Builder) -> None:
    x = b.value(lambda v: v.dim == 3)
    n, _, k = x.shape
    b.let(
        b.pick(
            (
                f"torch.bmm({x}, {b.parameter(n, k, 4)})",
                f"torch.bmm({x}, {x}.transpose(1, 2))",
                f"torch.baddbmm({b.parameter(1, 1, 4)}, {x}, {b.parameter(n, k, 4)})",
            )
        )
    )


@op
def experts(b: Builder) -> None:
    """A stack of weights, one for each expert, weighted by a router."""
    x = b.value(lambda v: v.dim >= 2)
    k, count, width = x.shape[-1], b.pick((2, 3, 4)), b.pick((4, 6))
    up, down = b.parameter(count, k, width, weight=True), b.parameter(count, width, k, weight=True)
    router = b.declare("l", f"nn.Linear({k}, {count}, bias=False)", weight=True)
    b.let(f"{router}({x}).softmax(-1)", f"torch.einsum('...i,eih->...eh', {x}, {up}).relu()")
    weights, hidden = b.values[-2:]
    b.let(
        b.pick(
            (
                f"torch.einsum('...eh,ehi,...e->...i', {hidden}, {down}, {weights})",
                f"(torch.einsum('...eh,ehi->...ei', {hidden}, {down}) * {weights}.unsqueeze(-1)).sum(-2)",
            )
        )
    )


@op
def shapes(b: Builder) -> None:
    """expand, repeat, pad, as_strided and their kin."""
    x = b.value(lambda v: v.dim >= 1)
    last = x.shape[-1]
    b.let(
        b.pick(
            (
                f"F.pad({x}, (1, 0))",
                f"F.pad({x}, (0, 2), value=0.5)",
                f"F.pad({x}, (-1, 1))",
                f"{x}.unsqueeze(0).expand(2, {', '.join(['-1'] * x.dim)})",
                f"{x}.repeat({', '.join(['1'] * (x.dim - 1) + ['2'])})",
                f"{x}.unsqueeze(-1).expand({', '.join(['-1'] * x.dim)}, 2).flatten(-2)",
                f"{x}.unsqueeze(-2).expand({', '.join(['-1'] * (x.dim - 1))}, 2, -1).flatten(-2)",
                f"{x}.contiguous().as_strided(({max(1, x.tensor.numel() // 2)},), (1,))",
                f"{x}.contiguous().as_strided(({last}, 2), (1, 0))",
                f"F.pad({x}, (0, 0, 1, 0))",
                f"{x}.repeat_interleave({x.shape[0]}, 0)",
                f"torch.broadcast_tensors({x}, {x}[..., :1])[1]",
                f"{x}.contiguous().view(-1).view({', '.join(map(str, x.shape))})",
                f"{x}.view_as({x}) + {x}.expand_as({x})",
                f"F.pad({x}, (1, 1), mode='circular')",
                f"F.pad({x}, (1, 1), mode='replicate')",
            )
        )
    )


@op
def convolution(b: Builder) -> None:
    x = b.value(lambda v: v.dim in (3, 4) and min(v.shape[2:]) >= 2)
    c, spatial = x.shape[1], x.dim - 2
    groups = b.pick([g for g in range(1, c + 1) if c % g == 0])
    out = groups * b.pick((2, 1, 3))
    size, bias = b.pick((1, 2, 3)), b.pick((False, True))
    layer = f"nn.Conv{spatial}d({c}, {out}, {size}, padding={size // 2}, groups={groups}, bias={bias})"
    b.let(f"{b.declare('c', layer, weight=True)}({x})")


@op
def pooling(b: Builder) -> None:
    x = b.value(lambda v: v.dim == 3 and v.shape[-1] >= 2)
    b.let(
        b.pick(
            (
                f"F.avg_pool1d({x}, 2)",
                f"F.max_pool1d({x}, 2)",
                f"F.adaptive_avg_pool1d({x}, 2)",
                f"F.interpolate({x}, scale_factor=2)",
            )
        )
    )


@op
def integers(b: Builder) -> None:
    """Masks and indices: made of values, or of the input."""
    x = b.value(lambda v: v.dim >= 1)
    d = b.dim(x, 1)
    b.let(
        b.pick(
            (
                f"{x} > 0.3",
                f"{x}.argmax({d})",
                f"{x}.argsort({d})",
                f"({x} > 0).sum({d})",
                f"{x}.topk(1, {d})[1]",
                f"torch.arange({x}.size({d}))",
                f"({x} > 0).any({d})",
                f"({x} > 0).long()",
                "(ids > 2)",
                "ids.cumsum(-1)",
                f"{x}.isnan()",
                f"torch.ones({x.shape[d]}, dtype=torch.bool)",
                f"({x} * 4).long()",
                f"({x} > 0).all({d})",
                f"torch.searchsorted(torch.linspace(-1, 1, 4), {x}.contiguous())",
                f"torch.bucketize({x}, torch.linspace(-1, 1, 4))",
            )
        )
    )


@op
def masked(b: Builder) -> None:
    """A bool or an int value meets a float one."""

    def fits(v: Value) -> bool:
        return all(m in (1, n) for m, n in zip(reversed(v.shape), reversed(x.shape), strict=False)) and v.dim <= x.dim

    x = b.value()
    m = b.value(fits, b.pick(("bool", "int")))
    if m.tensor.dtype == torch.bool:
        b.let(
            b.pick(
                (
                    "{x} * {m}",
                    "{x}.masked_fill({m}, 0.5)",
                    "torch.where({m}, {x}, {x} * 0.1)",
                    "{x}.masked_fill(~{m}, -2.0)",
                    "{m}.float() + {x}",
                    "torch.where({m}, {x}, torch.zeros(()))",
                )
            ).format(x=x, m=m)
        )
    else:
        b.let(
            b.pick(
                ("{x} * {m}", "{x} + {m}", "{x} * ({m} % 3)", "torch.where({m} > 1, {x}, 0.25)", "{x} / ({m} + 1)")
            ).format(x=x, m=m)
        )


@op
def lookup(b: Builder) -> None:
    """An index picks from a float value."""
    x = b.value(lambda v: v.dim >= 1 and v.shape[0] >= 2)
    i = b.value(lambda v: v.dim <= 2, "int")
    d = b.dim(x, 1)
    index = f"{i}.remainder({x.shape[d]})"
    b.let(
        b.pick(
            (
                f"{x}{b.at(d, index)}",
                f"{x}.index_select({d}, {index}.flatten())",
                f"F.embedding({i}.remainder({x.shape[0]}), {x}.flatten(1))",
                f"torch.zeros_like({x}).index_add({d}, {index}.flatten()[:1], {x}{b.at(d, ':1')})",
                f"{x}.flatten()[{i}.remainder({x.tensor.numel()})]",
            )
        )
    )


@op
def embedding(b: Builder) -> None:
    """Tokens, and perhaps a head tied to their table."""
    width = b.pick((6, 8, 4))
    padding = b.pick(("", ", padding_idx=0"))
    table = b.declare("e", f"nn.Embedding({VOCABULARY}, {width}{padding})", weight=True)
    b.let(f"{table}(ids)")
    if b.pick((False, True)):
        b.let(f"torch.tanh({b.values[-1]})", f"F.linear(v{len(b.values)}, {table}.weight)")
        if b.pick((False, True)):
            b.let(f"F.cross_entropy({b.values[-1]}.flatten(0, 1), ids.flatten())")


@op
def loss(b: Builder) -> None:
    x = b.value(lambda v: v.dim >= 2 and v.shape[-1] >= 2)
    n, rows = x.shape[-1], x.tensor.numel() // x.shape[-1]
    reduction = b.pick(("mean", "sum", "none"))
    target = f"torch.arange({rows}) % {n}"
    b.let(
        b.pick(
            (
                f"F.cross_entropy({x}.reshape(-1, {n}), {target}, reduction={reduction!r})",
                f"F.cross_entropy({x}.reshape(-1, {n}), {target}, ignore_index=0, label_smoothing=0.1)",
                f"F.nll_loss({x}.reshape(-1, {n}).log_softmax(-1), {target}, reduction={reduction!r})",
                f"F.cross_entropy({x}.reshape(-1, {n}), {x}.reshape(-1, {n}).detach().softmax(-1))",
                f"F.binary_cross_entropy_with_logits({x}, torch.ones_like({x}))",
                f"F.mse_loss({x}, torch.zeros_like({x}))",
                f"F.kl_div({x}.log_softmax(-1), {x}.detach().softmax(-1), reduction='batchmean')",
                f"F.smooth_l1_loss({x}, torch.zeros_like({x}), reduction={reduction!r})",
            )
        )
    )


@op
def in_place(b: Builder) -> None:
    """A write into a value, often behind a view of it that is read afterwards."""
    base = b.value(lambda v: v.dim >= 1 and v.name != "x" and v.tensor.requires_grad)
    if b.pick((True, False)):
        b.let(f"{base}.clone()")
        base = b.values[-1]
    view = b.pick(("", "[..., :1]", "[0]", ".transpose(0, -1)", "[..., 1:]", ".flatten()", "[..., -1]", "[..., ::2]"))
    if view and b.pick((True, False)):
        b.let(f"{base}{view}")
        base, view = b.values[-1], ""
    write = b.pick(
        (
            ".add_(0.5)",
            ".mul_(2.0)",
            ".clamp_(-1, 1)",
            ".masked_fill_",
            ".tanh_()",
            ".zero_()",
            ".neg_()",
            "=",
            "+=",
            ".copy_",
            ".relu_()",
            ".sub_(0.25)",
            ".fill_(0.5)",
        )
    )
    if write == "=":
        b.do(f"{base}{view}[...] = 0.5")
    elif write == "+=":
        b.do(f"{base}{view}[...] += {b.value(lambda v: v.dim == 0 or v.shape == (1,))}")
    elif write == ".masked_fill_":
        b.do(f"{base}{view}.masked_fill_({base}{view} > 0.5, 0.25)")
    elif write == ".copy_":
        b.do(f"{base}{view}.copy_({base}{view}.detach().sin())")
    else:
        b.do(f"{base}{view}{write}")
    if b.pick((True, False)):
        b.let(f"{base} * 1.5")


@op
def buffer(b: Builder) -> None:
    """State that a step reads and writes."""
    x = b.value(lambda v: v.dim >= 1)
    n = x.shape[-1]
    state = b.declare("b", f"torch.ones({n})")
    b.do(
        b.pick(
            (
                f"{state}.mul_(0.9)",
                f"{state}.add_({x}.detach().flatten(0, -2).mean(0))" if x.dim > 1 else f"{state}.add_(1)",
                f"{state}.copy_({x}.detach().reshape(-1, {n})[0])",
                f"{state} += 1",
            )
        )
    )
    b.let(b.pick((f"{x} * {state}", f"{x} + {state}.clone()", f"{x} * {state}.sum()")))


@op
def no_grad(b: Builder) -> None:
    x = b.value()
    name = f"v{len(b.values)}"
    with torch.no_grad():
        made = x.tensor.tanh() * 0.5
    b.lines += ["with torch.no_grad():", f"    {name} = {x}.tanh() * 0.5"]
    b.values.append(Value(name, made))
    b.let(f"{x} + {name}")


LIKELY = (
    "linear",
    "linear",
    "linear",
    "along",
    "along",
    "along",
    "unary",
    "unary",
    "split_dim",
    "residual",
    "residual",
)
NAMES = (*LIKELY, *OPS)


# ------------------------------------------------------------------------------------------------------ the program
@dataclass(frozen=True)
class Built:
    """A recipe written out: its class, an instance, its inputs and its spec."""

    text: str
    model: nn.Module
    inputs: tuple[Tensor, Tensor]
    spec: str
    recipe: Recipe
    lines: tuple[str, ...]

    def __str__(self) -> str:
        shown = "\n".join(
            f"# {line}"
            for line in [
                *self.spec.splitlines(),
                f"degree {self.recipe.degree}, training {self.recipe.training}, x {self.recipe.shape}",
            ]
        )
        return f"{self.text}{shown}\n"


def build(recipe: Recipe, writes: bool = True) -> Built | None:
    """The program of a recipe; None where autograd itself cannot run what is left of it."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on x.T, and on strides
        torch.manual_seed(0)
        b = Builder(recipe)
        for step in recipe.steps:
            if step.op == "in_place" and not writes:
                continue
            before = (len(b.lines), len(b.values))
            b.numbers = itertools.cycle(step.picks)
            try:
                OPS[step.op](b)
            except (Impossible, RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                if any(
                    "_(" in line or "=" in line.partition(" = ")[0] or not line.startswith("v")
                    for line in b.lines[before[0] :]
                ):
                    continue  # what was written in place stays written
                del b.lines[before[0] :], b.values[before[1] :]
        return _written(b, recipe) or (build(recipe, writes=False) if writes else None)


def _written(b: Builder, recipe: Recipe) -> Built | None:
    made = [v for v in b.values[2:] if v.tensor.is_floating_point()] or b.values[1:2]
    last, form = made[-1], recipe.outputs[0] % 4
    others = [made[-1 - n % len(made)] for n in recipe.outputs[1:]]
    whole = [v for v in b.values[2:] if not v.tensor.is_floating_point()][-1:]
    named = list(dict.fromkeys(v.name for v in [last, *others, *whole]))
    returned = {
        0: str(last),
        1: f"({', '.join(named)},)",
        2: "{" + ", ".join(f"{n!r}: {n}" for n in named) + "}",
        3: f"({last}, {{'rest': [{', '.join(named)}]}})",
    }[form]
    declared = "\n".join(f"        {line}" for line in b.declared)
    body = "\n".join(f"        {line}" for line in [*b.lines, f"return {returned}"])
    head = "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()"
    text = f"{head}\n{declared}\n\n    def forward(self, x, ids):\n{body}\n"
    file = f"random_program_{abs(hash(text)) % 10**6}.py"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "__name__": "random_program"}
    exec(compile(text, file, "exec"), space)
    torch.manual_seed(0)
    model: nn.Module = space["Model"]().train(recipe.training)
    lines = [
        f"{name} {word if word != 'vocab' or name[0] == 'e' else 'row'}" for name, word in b.weights.items() if word
    ]
    built = Built(text, model, b.inputs, "\n".join(lines) + "\n", recipe, tuple(b.lines))
    return built if _runs(built) else None


def _runs(built: Built) -> bool:
    """Whether eager autograd runs it, and something in it has a gradient."""
    try:
        return bool(_step(copy.deepcopy(built.model), built.inputs)[1])
    except (RuntimeError, TpcompileError):
        return False


def _step(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one eager step."""
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [x for x in pytree.tree_leaves(model(*given)) if isinstance(x, Tensor)]
        backward(outputs)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], {
        **found,
        **{f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None},
    }


def is_smooth(built: Built) -> bool:
    """Whether a change of 1e-13 changes little: at a tie or a jump, rounding alone decides the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = copy.deepcopy(built.model).double()
        near = copy.deepcopy(wide)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in near.parameters():
                p.mul_(1 + 1e-13 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        x, ids = built.inputs
        outputs, gradients = _step(wide, (x.double(), ids))
        others, moved = _step(near, (x.double() * (1 + 1e-13), ids))
    errors = [relative_error(a, c) for a, c in zip(outputs, others, strict=True)]
    return max([*errors, *gradient_errors(gradients, moved).values()], default=0.0) < TOLERANCE


# --------------------------------------------------------------------------------------------------------- the check
@dataclass
class Tally:
    """What became of the programs."""

    run: int = 0
    equal: int = 0
    cut: int = 0  # equal, with at least one parameter cut
    wrong: int = 0
    jumpy: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])

    def __str__(self) -> str:
        share = self.refused.total() / max(1, self.run)
        head = f"{self.run} run: {self.equal} equal ({self.cut} with something cut), {self.wrong} wrong, "
        head += f"{self.jumpy} at a jump, {share:.0%} refused"
        return "\n".join([head, *(f"  {count:5} {reason}" for reason, count in self.refused.most_common(25))])


class Wrong(AssertionError):
    """A program that compiles and is not equal, or is refused without a reason, or breaks the compiler."""


def reason(error: TpcompileError) -> str:
    """The kind of a refusal: its headline without names and numbers."""
    return re.sub(r"\d+", "N", re.sub(r"`[^`]*`|'[^']*'", "_", (error.why or error.what).partition(" (cuts")[0]))[:90]


def compiled(built: Built, captured: Captured, spec: Spec | None, options: Options) -> Program | ShardingError:
    inputs = (built.inputs, dict[str, Any]())
    try:
        return rewrite_captured(captured, spec, built.model, built.recipe.degree, inputs, options=options)
    except ShardingError as error:
        return error


def unlocated(error: TpcompileError) -> str | None:
    """What a refusal leaves unsaid."""
    missing = [name for name in ("where", "why", "help") if not getattr(error, name)]
    if error.where is not None and error.where.file is None and error.where.module is None:
        missing.append("place")
    return ", ".join(missing) or None


def mismatch(program: Program, built: Built) -> str | None:
    """How the program differs from the model, or None."""
    report: Report = verify_program(program, built.model, built.inputs)
    worst = max(report.output_error, report.gradient_error)
    if worst > TOLERANCE or worst != worst or not report.replicas_equal:
        return f"{worst:.1e}, replicas equal: {report.replicas_equal}\n{report.mismatch}"
    if max(report.native_output_error, report.native_gradient_error) > 1e-4 and (error := capture_differs(built)):
        return error
    if built.model.state_dict().keys() - dict(built.model.named_parameters()):
        return buffers_differ(program, built)
    return None


def capture_differs(built: Built) -> str | None:
    """Whether the captured graph is not the eager model: in fp64, since float32 may be too coarse to tell."""
    model, (x, ids) = copy.deepcopy(built.model).double(), built.inputs
    inputs = (x.double(), ids)
    captured = capture(model, inputs)
    program = rewrite_captured(captured, Spec.parse(""), model, 1, (inputs, {}))
    report = verify_program(program, model, inputs)
    worst = max(report.native_output_error, report.native_gradient_error)
    return f"the capture is not the model: {worst:.1e}\n{report.mismatch}" if not worst <= 1e-5 else None


def buffers_differ(program: Program, built: Built) -> str | None:
    """Whether a rank's buffers after a step are not the model's."""
    captured = program.captured
    model = copy.deepcopy(built.model).double()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x, ids = built.inputs
        model(x.double(), ids)
        others = {**captured.buffers, **captured.constants}
        ranks = shards.attributes(captured.parameters, others, program.parameters, program.mesh)
        ranks = [{n: v.detach().clone() for n, v in mine.items()} for mine in ranks]
        torch.manual_seed(0)
        flat = [[t.clone() for t in captured.flatten(built.inputs)] for _ in ranks]
        Simulation(program.graph_module, len(ranks), program.mesh.all_groups(), ranks).run(flat)
    for name, value in model.named_buffers():
        for rank, mine in enumerate(ranks):
            got = mine[captured.aliases.get(name, name)]
            if not torch.allclose(got.double(), value.double(), rtol=1e-3, atol=1e-4):
                return f"buffer {name} of rank {rank} differs after a step"
    return None


def check(built: Built, tally: Tally) -> list[str]:
    """Compile for the drawn spec, for the plan, and for the plan with positions spread over the ranks; what became of
    each, and ``Wrong`` if it is not as it must be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers that a step writes
        return list(_checked(built, tally))


def _checked(built: Built, tally: Tally) -> Iterator[str]:
    try:
        captured = capture(built.model, built.inputs)
    except CaptureError as error:
        tally.run += 1
        tally.refused["capture: " + reason(error)] += 1
        if missing := unlocated(error):
            raise Wrong(f"a capture refused without {missing}: {error}\n\n{built}") from error
        yield "not captured"
        return
    spread = Options(sequence_parallel=True)
    for spec, options in ((Spec.parse(built.spec), Options()), (None, Options()), (None, spread)):
        tally.run += 1
        kind = "spec" if spec is not None else "spread plan" if options == spread else "plan"
        try:
            program = compiled(built, captured, spec, options)
            if isinstance(program, ShardingError):
                tally.refused[reason(program)] += 1
                if options == spread and program.what == "there is no sequence to spread over the ranks":
                    yield "nothing to spread"
                    continue
                if (missing := unlocated(program)) or (spec is None and options != spread):
                    raise Wrong(f"{kind} refused, without {missing}: {program}\n\n{built}")
                yield f"{kind} refused"
                continue
            error = mismatch(program, built)
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"{kind}: {type(error).__name__}: {error}\n\n{built}") from error
        if error is not None and not is_smooth(built):
            tally.jumpy += 1
            yield "at a jump"
            continue
        if error is not None:
            tally.wrong += 1
            raise Wrong(f"{kind}: {error}\n\n{built}")
        tally.equal += 1
        is_cut = any(rules.axes_of(d) for dims in program.parameters.values() for d in dims)
        tally.cut += is_cut
        yield f"{kind} equal" + (", cut" if is_cut else "")


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Tiny tensors on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


numbers = st.tuples(*[st.integers(0, HIGHEST)] * PICKS)
recipes = st.builds(
    Recipe,
    shape=st.sampled_from(SHAPES),
    steps=st.builds(
        lambda first, rest: (Step("linear", first), *rest),
        numbers,
        st.lists(st.builds(Step, st.sampled_from(NAMES), numbers), min_size=1, max_size=9),
    ),
    claims=st.tuples(st.just(0), *[st.integers(0, len(WORDS) - 1)] * 4),
    outputs=st.tuples(*[st.integers(0, 11)] * 3),
    training=st.booleans(),
    degree=st.sampled_from((2, 2, 3, 4)),
)


def examined(recipe: Recipe, tally: Tally) -> None:
    """What a property test does with a recipe."""
    built = build(recipe)
    assume(built is not None)
    assert built is not None
    note(str(built))
    for what in check(built, tally):
        event(what)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(recipes)
def test_a_random_program_is_equal_or_refused(recipe: Recipe) -> None:
    examined(recipe, Tally())


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_random_programs_are_equal_or_refused(record_property: Callable[[str, object], None]) -> None:
    """Thousands; the counts are printed, those of the programs that hypothesis shrinks to among them."""
    tally = Tally()

    @settings(
        max_examples=4000,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(recipes)
    def every(recipe: Recipe) -> None:
        examined(recipe, tally)

    try:
        every()
    finally:
        print(tally)
        record_property("programs", str(tally))
    assert tally.wrong == 0
    assert tally.jumpy <= tally.run / 100
    assert tally.refused.total() <= tally.run / 2
    assert tally.cut >= tally.run / 4


def test_every_op_is_written() -> None:
    """Each op of the generator finds a place, and so does each text of the two long lists."""

    def lines(recipe: Recipe) -> int:
        built = build(recipe)
        return 0 if built is None else len(built.lines)

    for name in OPS:
        found = [sown(seed, "unary", "integers", name) for seed in range(30)]
        assert any(lines(r) > lines(replace(r, steps=(*r.steps[:3], *r.steps[4:]))) for r in found), name
    first = Step("linear", (0,) * PICKS)
    for name, options in (("unary", UNARY), ("along", ALONG)):
        for index, template in enumerate(options):
            steps = [(first, Step(name, (index, value, dim, *[0] * 5))) for value in (0, 5) for dim in range(4)]
            drawn = (Recipe(shape, step, (0,), (1, 1), False, 2) for shape in SHAPES for step in steps)
            assert any(lines(r) > 1 for r in drawn), template


def sown(seed: int, *ops: str) -> Recipe:
    """A recipe with these ops behind a Linear that is cut, and one more behind them; all numbers from ``seed``."""
    r = random.Random(seed)
    steps = tuple(Step(op, tuple(r.randint(0, HIGHEST) for _ in range(PICKS))) for op in ("linear", *ops, "linear"))
    claims = (0, *(r.randrange(len(WORDS)) for _ in range(4)))
    return Recipe(r.choice(SHAPES), steps, claims, (0, r.randrange(12), r.randrange(12)), False, 2)


def whole_not_needed(op: str) -> Rule:
    rule = RULES[op]
    return replace(rule, row=lambda call: replace(rule.sentence(call), whole={}))


def linear_too(op: str) -> Rule:
    rule = RULES[op]
    return replace(rule, row=lambda call: replace(rule.sentence(call), linear="each"))


PLANTED: Mapping[str, tuple[Rule, str]] = {
    "roll needs nothing whole": (whole_not_needed("aten.roll.default"), "{x}.roll(1, {d})"),
    "flip needs nothing whole": (whole_not_needed("aten.flip.default"), "{x}.flip({d})"),
    "cumsum needs nothing whole": (whole_not_needed("aten.cumsum.default"), "{x}.cumsum({d})"),
    "sort needs nothing whole": (whole_not_needed("aten.sort.default"), "{x}.sort({d})[0]"),
    "a mean is a sum": (replace(RULES["aten.mean.dim"], kernel=None), "{x}.mean({d}, keepdim=True)"),
    "a product is a sum": (
        replace(RULES["aten.prod.dim_int"], row=rules._reduction(True, "")),
        "{x}.prod({d})",
    ),
    "the sum of squares is linear": (linear_too("aten.square.default"), "{x}.square()"),
}


@contextmanager
def planted(rule: Rule) -> Generator[None]:
    """Every part of the compiler believes ``rule``."""
    believed = MappingProxyType({**RULES, rule.op: rule})
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.startswith("tpcompile")]:
            if getattr(module, "RULES", None) is RULES:
                patch.setattr(module, "RULES", believed)
        yield


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_wrong_rule_is_found(what: str) -> None:
    """The control: programs around one op, drawn as all are, find that its row is wrong, and find nothing without."""
    rule, template = PLANTED[what]
    op, options = ("unary", UNARY) if template in UNARY else ("along", ALONG)
    tally = Tally()
    for seed in range(40):
        recipe = sown(seed, *(("linear",) if op == "unary" else ()), op)
        at = len(recipe.steps) - 2
        step = replace(recipe.steps[at], picks=(options.index(template), 0, *recipe.steps[at].picks[2:]))
        built = build(replace(recipe, steps=(*recipe.steps[:at], step, *recipe.steps[at + 1 :])))
        if built is None:
            continue
        try:
            with planted(rule):
                list(check(built, tally))
        except Wrong:
            list(check(built, Tally()))
            return
    pytest.fail(f"not found among {tally}")
