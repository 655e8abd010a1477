"""Random stacks of MLP and attention blocks: what compiles is equal to one device, what does not says where and why.

The drawn plans vary what an inference of structure could trip over: sizes that no degree divides, fused and interleaved
weights, grouped heads, shared weights, blocks used twice, odd names, residuals of three kinds.
`--hypothesis-show-statistics` tells which share was refused, and by which error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from keyword import iskeyword

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tpcompile import rewrite
from tpcompile.equivalence import verify_program
from tpcompile.errors import ShardingError
from tpcompile.program import Program
from tpcompile.spec import WORDS, Spec

BATCH, LENGTH = 2, 5
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Attention:
    kv_heads: int
    repeat: int  # query heads for each kv head
    head_dim: int
    fused: str  # "no", "packed" [q|k|v], "heads": q, k and v of one kv head after the other
    bias: bool
    out_bias: bool
    norm: bool  # of q and k, over a head
    kernel: str  # "explicit", "fused", "grouped": the fused kernel on unequal heads
    causal: bool
    copies: str  # how k and v are repeated: "expand" or "interleave"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.repeat


@dataclass(frozen=True)
class Mlp:
    hidden: int
    gated: str  # "no", "separate", "fused"
    bias: bool
    out_bias: bool
    activation: str


@dataclass(frozen=True)
class Block:
    attention: Attention | None
    mlp: Mlp | None
    residual: str  # "after", "parallel", "none"
    norm: str  # "none", "layer", "rms"
    uses: int


@dataclass(frozen=True)
class Plan:
    """A model, the spec that goes with it, and how it is run."""

    width: int
    blocks: tuple[Block, ...]
    shared: bool  # the second block has the first one's weights
    vocabulary: int  # 0: the input is a float tensor
    tied: bool
    dropout: float
    names: tuple[str, ...]
    columns_only: bool  # leave the `row` lines out: they only assert
    degree: int

    def name(self, role: str) -> str:
        return self.names[ROLES.index(role)]  # pyright: ignore[reportArgumentType]

    def spec(self) -> str:
        """Lines that cut every block and the vocabulary."""
        lines: list[str] = []
        for index, block in enumerate(self.blocks):
            at = f"{self.name('blocks')}.{index}"
            if (a := block.attention) is not None:
                first = ("qkv",) if a.fused != "no" else ("q", "k", "v")
                lines += [f"{at}.{self.name('attention')}.{self.name(x)} column" for x in first]
                lines += [] if self.columns_only else [f"{at}.{self.name('attention')}.{self.name('out')} row"]
            if (m := block.mlp) is not None:
                first = ("gate", "up") if m.gated == "separate" else ("up",)
                lines += [f"{at}.{self.name('mlp')}.{self.name(x)} column" for x in first]
                lines += [] if self.columns_only else [f"{at}.{self.name('mlp')}.{self.name('down')} row"]
        if self.vocabulary:
            lines += [f"{self.name('embedding')} {self.name('head')} vocab"]
        return "\n".join(lines) + "\n"


ROLES = "blocks attention mlp q k v qkv out gate up down norm embedding head q_norm k_norm".split()  # noqa: SIM905


def linear(owner: nn.Module, name: str, ins: int, outs: int, bias: bool) -> nn.Linear:
    made = nn.Linear(ins, outs, bias=bias)
    owner.add_module(name, made)
    return made


class AttentionModule(nn.Module):
    def __init__(self, plan: Plan, a: Attention):
        super().__init__()
        self.a, self.p, width = a, plan.dropout, plan.width
        self.mine: dict[str, str] = {
            role: plan.name(role) for role in ("q", "k", "v", "qkv", "out", "q_norm", "k_norm")
        }
        if a.fused == "no":
            linear(self, self.mine["q"], width, a.heads * a.head_dim, a.bias)
            linear(self, self.mine["k"], width, a.kv_heads * a.head_dim, a.bias)
            linear(self, self.mine["v"], width, a.kv_heads * a.head_dim, a.bias)
        else:
            linear(self, self.mine["qkv"], width, a.kv_heads * (a.repeat + 2) * a.head_dim, a.bias)
        linear(self, self.mine["out"], a.heads * a.head_dim, width, a.out_bias)
        if a.norm:
            self.add_module(self.mine["q_norm"], nn.RMSNorm(a.head_dim))
            self.add_module(self.mine["k_norm"], nn.LayerNorm(a.head_dim))

    def run(self, role: str, x: Tensor) -> Tensor:
        return getattr(self, self.mine[role])(x)

    def forward(self, x: Tensor) -> Tensor:
        a, (b, s, _) = self.a, x.shape
        q, k, v = self.split(x)
        if a.norm:
            q, k = self.run("q_norm", q), self.run("k_norm", k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if a.repeat > 1 and a.kernel != "grouped":
            k, v = self.repeated(k), self.repeated(v)
        if a.kernel == "explicit":
            scores = q @ k.transpose(-2, -1) / math.sqrt(a.head_dim)
            if a.causal:
                scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).tril().logical_not(), -math.inf)
            y = F.dropout(scores.softmax(-1), self.p, self.training) @ v
        else:
            p = self.p if self.training else 0.0
            grouped = a.kernel == "grouped"
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=a.causal, enable_gqa=grouped)
        return self.run("out", y.transpose(1, 2).reshape(b, s, -1))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, (b, s, _) = self.a, x.shape
        if a.fused == "no":
            q, k, v = (self.run(role, x).view(b, s, -1, a.head_dim) for role in "qkv")
        elif a.fused == "packed":
            sizes = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
            q, k, v = (part.view(b, s, -1, a.head_dim) for part in self.run("qkv", x).split(sizes, -1))
        else:
            every = self.run("qkv", x).view(b, s, a.kv_heads, a.repeat + 2, a.head_dim)
            q = every[:, :, :, : a.repeat].reshape(b, s, a.heads, a.head_dim)
            k, v = every[:, :, :, -2], every[:, :, :, -1]
        return q, k, v

    def repeated(self, x: Tensor) -> Tensor:
        if self.a.copies == "interleave":
            return x.repeat_interleave(self.a.repeat, dim=1)
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, self.a.repeat, s, d).reshape(b, h * self.a.repeat, s, d)


class MlpModule(nn.Module):
    def __init__(self, plan: Plan, m: Mlp):
        super().__init__()
        self.m, self.p = m, plan.dropout
        self.mine: dict[str, str] = {role: plan.name(role) for role in ("gate", "up", "down")}
        if m.gated == "separate":
            linear(self, self.mine["gate"], plan.width, m.hidden, m.bias)
        linear(self, self.mine["up"], plan.width, m.hidden * (2 if m.gated == "fused" else 1), m.bias)
        linear(self, self.mine["down"], m.hidden, plan.width, m.out_bias)

    def run(self, role: str, x: Tensor) -> Tensor:
        return getattr(self, self.mine[role])(x)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.m.activation]
        if self.m.gated == "no":
            y = act(self.run("up", x))
        elif self.m.gated == "separate":
            y = act(self.run("gate", x)) * self.run("up", x)
        else:
            gate, up = self.run("up", x).chunk(2, dim=-1)
            y = act(gate) * up
        return self.run("down", F.dropout(y, self.p, self.training))


class BlockModule(nn.Module):
    def __init__(self, plan: Plan, block: Block):
        super().__init__()
        self.block, self.p = block, plan.dropout
        self.parts = [plan.name("attention")] if block.attention is not None else []
        if block.attention is not None:
            self.add_module(plan.name("attention"), AttentionModule(plan, block.attention))
        if block.mlp is not None:
            self.add_module(plan.name("mlp"), MlpModule(plan, block.mlp))
            self.parts.append(plan.name("mlp"))
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.norm_name = plan.name("norm")
        self.add_module(self.norm_name, norms[block.norm](plan.width))

    def forward(self, x: Tensor) -> Tensor:
        norm: nn.Module = getattr(self, self.norm_name)
        modules: list[nn.Module] = [getattr(self, name) for name in self.parts]
        if self.block.residual == "parallel":
            z = norm(x)
            for module in modules:
                x = x + F.dropout(module(z), self.p, self.training)
            return x
        for module in modules:
            y = F.dropout(module(norm(x)), self.p, self.training)
            x = y if self.block.residual == "none" else x + y
        return x


class Stack(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        blocks = nn.ModuleList(BlockModule(plan, block) for block in plan.blocks)
        self.add_module(plan.name("blocks"), blocks)
        if plan.shared:
            for path, _ in list(blocks[1].named_parameters()):
                owner, _, last = path.rpartition(".")
                setattr(blocks[1].get_submodule(owner), last, blocks[0].get_parameter(path))
        if plan.vocabulary:
            self.add_module(plan.name("embedding"), nn.Embedding(plan.vocabulary, plan.width))
            head = linear(self, plan.name("head"), plan.width, plan.vocabulary, bias=False)
            if plan.tied:
                head.weight = getattr(self, plan.name("embedding")).weight

    def forward(self, x: Tensor) -> Tensor:
        if self.plan.vocabulary:
            x = getattr(self, self.plan.name("embedding"))(x)
        for block, module in zip(self.plan.blocks, getattr(self, self.plan.name("blocks")), strict=True):
            for _ in range(block.uses):
                x = module(x)
        return getattr(self, self.plan.name("head"))(x) if self.plan.vocabulary else x


# ------------------------------------------------------------------------------------------------------ what is drawn
ODD = (*WORDS, "by", "config", "weight", "_0", "Linear", "h", "x1", "layers")
IDENTIFIER = (st.sampled_from(ODD) | st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,5}", fullmatch=True)).filter(
    lambda name: (
        not iskeyword(name) and not hasattr(Stack, name) and name not in ("a", "p", "m", "mine", "plan", "block")
    )
)
yes = st.booleans()


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    repeat = draw(st.sampled_from([1, 1, 2, 3, 4]))
    return Attention(
        kv_heads=draw(st.integers(1, 6)),
        repeat=repeat,
        head_dim=draw(st.sampled_from([2, 3, 4])),
        fused=draw(st.sampled_from(["no", "packed", "heads"])),
        bias=draw(yes),
        out_bias=draw(yes),
        norm=draw(yes),
        kernel=draw(st.sampled_from(["explicit", "fused", "grouped"] if repeat > 1 else ["explicit", "fused"])),
        causal=draw(yes),
        copies=draw(st.sampled_from(["expand", "interleave"])),
    )


mlps = st.builds(
    Mlp,
    hidden=st.integers(2, 12),
    gated=st.sampled_from(["no", "separate", "fused"]),
    bias=yes,
    out_bias=yes,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    which = draw(st.sampled_from(["both", "both", "attention", "mlp"]))
    return Block(
        attention=draw(attentions()) if which != "mlp" else None,
        mlp=draw(mlps) if which != "attention" else None,
        residual=draw(st.sampled_from(["after", "after", "parallel", "none"])),
        norm=draw(st.sampled_from(["none", "layer", "rms"])),
        uses=draw(st.sampled_from([1, 1, 1, 2])),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    first = draw(blocks())
    shared = draw(st.sampled_from([False, False, True]))
    others = [first] if shared else draw(st.lists(blocks(), max_size=1))
    vocabulary = draw(st.sampled_from([0, 0, 8, 11]))
    return Plan(
        width=draw(st.sampled_from([4, 6, 8])),
        blocks=(first, *others),
        shared=shared,
        vocabulary=vocabulary,
        tied=bool(vocabulary) and draw(yes),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.25])),
        names=tuple(draw(st.lists(IDENTIFIER, min_size=len(ROLES), max_size=len(ROLES), unique=True))),
        columns_only=draw(yes),
        degree=draw(st.integers(2, 4)),
    )


def built(plan: Plan) -> tuple[nn.Module, Tensor]:
    """The model with fixed weights, in train mode where there is dropout, and its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stack(plan).train(plan.dropout > 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        shape = (BATCH, LENGTH)
        x = torch.randint(0, plan.vocabulary, shape) if plan.vocabulary else torch.randn(*shape, plan.width)
    return model, x


def check(plan: Plan) -> bool:
    """Whether the plan compiles; if it does it must be equal, if not the error must say where and what to do."""
    model, x = built(plan)
    spec = Spec.parse(plan.spec())
    note(plan.spec())
    program: Program | None = None
    refusal: ShardingError | None = None
    try:
        program = rewrite(model, spec, degree=plan.degree, example_inputs=(x,))
    except ShardingError as error:
        refusal = error
    if refusal is not None:
        event(f"refused: {refusal.what.split('`')[0].split(':')[0][:20]}...")
        assert refusal.where is not None, refusal
        assert refusal.where.file is not None or refusal.where.module is not None, refusal
        assert refusal.why, refusal
        assert refusal.help, refusal
        return False
    assert program is not None
    report = verify_program(program, model, (x,))
    assert max(report.output_error, report.gradient_error) <= 1e-10, report.mismatch
    assert report.replicas_equal, report.mismatch
    # in float32 a random stack may be badly conditioned: report.ok would be too much to ask
    assert report.native_output_error <= 1e-3, report.mismatch
    event("equal")
    return True


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(plans())
def test_a_random_stack_is_equal_or_refused(plan: Plan) -> None:
    check(plan)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(plans())
def test_many_random_stacks_are_equal_or_refused(plan: Plan) -> None:
    check(plan)
