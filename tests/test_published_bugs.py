"""Silent bugs that other systems published, each rebuilt as a small model: right here, and the bug would be seen.

Every test says whose bug it was and in which words one may tell it. First the model is compiled and must be equal, and
the collective that the other system missed must be there, or the compile must be refused with a reason. Then the
other system's mistake is made on our program, and `verify` must fail: on the values where theirs were wrong, or on the
gradients alone where the loss looked right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutants import Edit, Mutant, delete, without
from torch import Tensor, fx, nn

from tpcompile import collectives
from tpcompile.compiler import rewrite
from tpcompile.equivalence import Report, verify_program
from tpcompile.errors import ShardingError
from tpcompile.layout import Layout, Leaf, axes_of, concat
from tpcompile.per_rank import PerRank
from tpcompile.program import Program
from tpcompile.rules import op_name
from tpcompile.spec import Spec

aten = torch.ops.aten
WIDTH, LENGTH = 8, 5
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Tiny tensors on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- how a test speaks
class Rebuilt:
    """A model with fixed weights, cut; equal unless somebody breaks it."""

    def __init__(self, model: nn.Module, spec: str | None, *inputs: Tensor, degree: int = 2):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.model, self.inputs = model, inputs or (torch.randn(2, LENGTH, WIDTH, generator=generator),)
        given = None if spec is None else Spec.parse(spec)
        self.program = rewrite(model, given, degree=degree, example_inputs=self.inputs)
        report = self.verify(self.program)
        assert report.ok, report.mismatch

    def verify(self, program: Program) -> Report:
        return verify_program(program, self.model, self.inputs)

    def nodes(self, target: Callable[..., Any] | str) -> list[fx.Node]:
        """Nodes of the emitted graph that call ``target``, a function or the name of an op."""
        return [n for n in self.program.graph.nodes if n.target is target or op_name(n) == target]

    def is_cut(self, parameter: str) -> bool:
        return any(axes_of(d) for d in self.program.parameters[parameter])

    def edited(self, node: fx.Node, edit: Edit) -> Report:
        """What `verify` says of the program with one node changed."""
        return self.verify(Mutant("the published mistake", node.name, edit).program(self.program))

    def cut_otherwise(self, **layouts: Layout) -> Report:
        """What it says where the rows of these parameters are dealt out in another way."""
        changed = {
            name.replace("__", "."): (rows, *self.program.parameters[name.replace("__", ".")][1:])
            for name, rows in layouts.items()
        }
        return self.verify(self.program.with_(parameters={**self.program.parameters, **changed}))

    def sums(self, kind: str, direction: str, of: str = "activations") -> int:
        rows = (c for c in self.program.collectives if (c.kind, c.direction, c.of) == (kind, direction, of))
        return sum(row.count for row in rows)


def wrong_values(report: Report) -> bool:
    return not report.ok and report.output_error > TOLERANCE


def wrong_gradients_only(report: Report) -> bool:
    """The loss looks right and the model does not learn what it should."""
    return not report.ok and report.output_error <= TOLERANCE < report.gradient_error


def behind(node: fx.Node, made: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    """Put what ``made`` makes of ``node`` in its place."""
    known = set(node.users)
    with node.graph.inserting_before(node.next):
        new = made(node.graph, node)
    node.replace_all_uses_with(new, delete_user_cb=known.__contains__)


def call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any] | str, *args: Any) -> fx.Node:
    """A call (of a method, by its name) whose result is of the shape of ``like``."""
    made = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
    made.meta["val"] = like.meta["val"]
    return made


def with_gradient_times(graph: fx.Graph, x: fx.Node, factor: float) -> fx.Node:
    """The value of ``x`` and a part of its gradient."""
    part = call(graph, x, aten.mul.Tensor, x, factor)
    rest = call(graph, x, "detach", call(graph, x, aten.mul.Tensor, x, 1 - factor))
    return call(graph, x, aten.add.Tensor, part, rest)


def parameter_read(rebuilt: Rebuilt, name: str) -> fx.Node:
    return next(n for n in rebuilt.program.graph.nodes if n.op == "get_attr" and n.target == name)


def reduced_behind(rebuilt: Rebuilt, name: str) -> tuple[fx.Node, Edit]:
    """The transition that adds up the ranks' gradients of a parameter, and the edit that leaves it out."""
    read = parameter_read(rebuilt, name)
    for user in read.users:
        if user.target is collectives.copy_all:
            return user, without(list(user.args[0]).index(read))  # type: ignore[arg-type]
        if user.target in (collectives.copy, collectives.copy_segments):
            return user, delete
    raise AssertionError(f"nothing adds up the gradients of {name}")


# ------------------------------------------------------------------------------------------------------------- models
class Attention(nn.Module):
    """Attention over ``kv`` heads of ``repeat`` queries each; ``split`` says how a packed projection is laid out."""

    def __init__(self, kv: int = 2, repeat: int = 1, size: int = 4, split: str = "separate", norm: str = "none"):
        super().__init__()
        self.kv, self.repeat, self.size, self.split, self.norm = kv, repeat, size, split, norm
        heads = kv * repeat
        if split == "separate":
            self.q, self.k, self.v = (nn.Linear(WIDTH, n * size) for n in (heads, kv, kv))
        else:
            self.qkv = nn.Linear(WIDTH, (heads + 2 * kv) * size)
        self.o = nn.Linear(heads * size, WIDTH)
        if norm == "head":
            self.q_norm, self.k_norm = nn.RMSNorm(size), nn.RMSNorm(size)
        elif norm == "layer":
            self.q_norm, self.k_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        elif norm == "full":
            self.q_norm, self.k_norm = nn.RMSNorm(heads * size), nn.RMSNorm(kv * size)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.projected(x)
        if self.norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(b, s, -1, self.size) for y in (q, k, v))
        if self.norm in ("head", "layer"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if self.repeat > 1:
            k, v = (y.repeat_interleave(self.repeat, 1) for y in (k, v))
        y = (q @ k.mT / math.sqrt(self.size)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, s, -1))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        kv, size, heads = self.kv, self.size, self.kv * self.repeat
        if self.split == "separate":
            return self.q(x), self.k(x), self.v(x)
        y = self.qkv(x)
        if self.split == "packed":  # [q|k|v]: GPT-2, GLM
            q, k, v = y.split([heads * size, kv * size, kv * size], -1)
        elif self.split == "heads":  # q, k and v of one head after the other: BLOOM, GPT-NeoX
            q, k, v = (z.flatten(2) for z in y.view(b, s, kv, 3, size).unbind(3))
        else:  # CodeGen: pieces of heads, q, v and k of one piece after the other
            q, v, k = (z.flatten(2) for z in y.view(b, s, 2, 3, kv // 2 * size).unbind(3))
        return q, k, v


class Mlp(nn.Module):
    def __init__(self, hidden: int = 6, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """A router and experts, every token through all of them."""

    def __init__(self, experts: int = 3, hidden: int = 6):
        super().__init__()
        self.below, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, WIDTH, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        weights = self.gate(x).softmax(-1)
        hidden = F.silu(torch.einsum("bsi,eih->bseh", x, self.up))
        return x + torch.einsum("bseh,ehi,bse->bsi", hidden, self.down, weights)


SEPARATE = "q k v column\no row\n"
PACKED = "qkv column\no row\n"
EXPERTS = "up column\ndown row\n"


# ---------------------------------------------------------------- gradients of what is whole in a cut region
def test_the_input_of_cut_experts_gets_a_complete_gradient() -> None:
    """torchtitan#1805 (and PR#1878): in the MoE layer activations left DTensor without saying that their gradients
    are partial sums; below the experts every rank went on with its own share."""
    rebuilt = Rebuilt(Experts(), EXPERTS)
    assert rebuilt.is_cut("up")
    assert rebuilt.sums("all_reduce", "backward") >= 1
    copies = [n for n in rebuilt.nodes(collectives.copy) if n.args[0].op == "call_function"]  # type: ignore[union-attr]
    assert copies
    for node in copies:
        assert wrong_gradients_only(rebuilt.edited(node, delete))


def test_the_router_in_front_of_cut_experts_gets_a_complete_gradient() -> None:
    """torchtitan#2387 (PR#2416, and once more PR#4054): the router's weight is on all ranks, but what flows back to it
    through the experts' weights is one rank's share. Its copies drifted apart after the first step."""
    rebuilt = Rebuilt(Experts(), EXPERTS)
    assert not rebuilt.is_cut("gate.weight")
    assert wrong_gradients_only(rebuilt.edited(*reduced_behind(rebuilt, "gate.weight")))


@pytest.mark.parametrize("name", ["q_norm.weight", "k_norm.weight"])
def test_a_norm_of_heads_gets_a_complete_gradient(name: str) -> None:
    """NeMo-RL#3716, torchtitan PR#2532: q_norm and k_norm hold one weight for all heads, each rank sees some heads,
    and the all-reduce of their gradients was left out on one path."""
    rebuilt = Rebuilt(Attention(norm="head"), SEPARATE)
    assert not rebuilt.is_cut(name)
    assert wrong_gradients_only(rebuilt.edited(*reduced_behind(rebuilt, name)))


@pytest.mark.parametrize("name", ["q_norm.weight", "q_norm.bias", "k_norm.weight"])  # a bias of keys has no gradient
def test_a_layer_norm_where_ranks_see_other_data_gets_a_complete_gradient(name: str) -> None:
    """gpt-neox PR#1257 and PR#1259, Megatron-LM#1446: a LayerNorm whose ranks see different parts of the data needs
    its gradients summed, weight and bias, and once an average was taken for the sum."""
    rebuilt = Rebuilt(Attention(norm="layer"), SEPARATE)
    node, edit = reduced_behind(rebuilt, name)
    assert wrong_gradients_only(rebuilt.edited(node, edit))

    def averaged(graph: fx.Graph, node: fx.Node) -> None:
        read = next(n for n in graph.nodes if n.op == "get_attr" and n.target == name)
        behind(read, lambda g, x: with_gradient_times(g, x, 1 / rebuilt.program.degree))

    assert wrong_gradients_only(rebuilt.edited(node, averaged))


def test_a_key_that_all_heads_share_gets_a_complete_gradient() -> None:
    """Told of DeepSeek-V3's k_pe in the discussion of torchtitan PR#1373: one rotary key for all heads is expanded to
    the heads of each rank. Forward that is right; backward a rank never sees the gradient from the others' heads."""

    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.down = nn.Linear(WIDTH, 4 * 6), nn.Linear(WIDTH, 6 + 2)
            self.up, self.o = nn.Linear(6, 4 * (4 + 4)), nn.Linear(4 * 4, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            b, s, _ = x.shape
            q = self.q(x).view(b, s, 4, 6).transpose(1, 2)
            latent, rotary = self.down(x).split([6, 2], -1)
            k, v = self.up(latent).view(b, s, 4, 8).transpose(1, 2).split([4, 4], -1)
            k = torch.cat([k, rotary.view(b, 1, s, 2).expand(b, 4, s, 2)], -1)
            y = (q @ k.mT).softmax(-1) @ v
            return self.o(y.transpose(1, 2).reshape(b, s, -1))

    rebuilt = Rebuilt(Latent(), "q up column\no row\n")
    assert not rebuilt.is_cut("down.weight")
    (pieces,) = rebuilt.nodes("aten.split_with_sizes.default")[:1]
    mistakes: list[tuple[fx.Node, Edit]] = [
        (node, delete) for node in rebuilt.nodes(collectives.copy) if _made_of(node, pieces)
    ]
    for node, edit in mistakes or [reduced_behind(rebuilt, "down.weight")]:  # f stands behind the pieces or before
        assert wrong_gradients_only(rebuilt.edited(node, edit))


def _made_of(node: fx.Node, source: fx.Node) -> bool:
    return node is source or any(_made_of(x, source) for x in node.all_input_nodes)


# ---------------------------------------------------------------- statistics and losses
def test_log_softmax_on_a_cut_vocabulary_has_its_own_gradient() -> None:
    """pytorch#190746: inside loss_parallel the backward of every log_softmax is the identity, since the loss that
    usually follows does the rest. Anything else that reads one, an entropy say, gets a wrong gradient, silently."""

    class Entropy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            found = self.head(x).log_softmax(-1)
            return -(found.exp() * found).sum(-1).mean()

    rebuilt = Rebuilt(Entropy(), "head vocab\n")
    assert rebuilt.is_cut("head.weight")
    (log,) = rebuilt.nodes("aten.log.default")

    def constant(graph: fx.Graph, node: fx.Node) -> None:
        behind(node, lambda g, n: call(g, n, "detach", n))

    assert wrong_gradients_only(rebuilt.edited(log, constant))


def test_a_mean_over_unequal_parts_weighs_them() -> None:
    """Megatron-LM#7452, its third finding: a loss is divided by each rank's own token count, so that unequal counts
    weigh tokens unequally. Here: a mean over an axis of which the ranks hold 3 and 2 positions."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.up(x)).mean(-1)

    rebuilt = Rebuilt(Mean(), "up column\n")
    (weighed,) = (n for n in rebuilt.nodes("aten.mul.Tensor") if isinstance(n.args[1], PerRank))
    assert weighed.args[1] == PerRank((3 / 5, 2 / 5))
    assert wrong_values(rebuilt.edited(weighed, lambda graph, node: node.update_arg(1, 1 / 2)))


class Sinks(nn.Module):
    """Attention with one more logit for each head, learned."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 8) for _ in range(3))
        self.sinks, self.o = nn.Parameter(torch.empty(4)), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, 4, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        logits = torch.cat([q @ k.mT, self.sinks.view(1, 4, 1, 1).expand(b, 4, s, 1)], -1)
        y = logits.softmax(-1)[..., :-1] @ v
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


def test_attention_sinks_are_cut_with_their_heads() -> None:
    """Megatron-LM#7452, its eighth finding: the sink logits of a rank's heads are its own, but are not marked as cut,
    so that one rank's count for all in the norm of the gradients."""
    rebuilt = Rebuilt(Sinks(), SEPARATE)
    assert rebuilt.program.parameters["sinks"] == (Leaf(4, (0,)),)
    swapped = concat([Leaf(2), Leaf(2, (0,))])
    assert not rebuilt.cut_otherwise(sinks=swapped).ok


@pytest.mark.parametrize("degree", [2, 3])
def test_a_norm_over_all_heads_sums_its_statistics(degree: int) -> None:
    """gpt-neox PR#1424, vLLM PR#38191 and others on OLMo-2 and MiniMax-M2: where q is normalised over all heads, the
    statistics of a rank's heads are not those of all."""
    rebuilt = Rebuilt(Attention(kv=4, norm="full"), SEPARATE, degree=degree)
    assert rebuilt.is_cut("q_norm.weight")
    statistics = [n for n in rebuilt.nodes(collectives.all_reduce) if _statistic(n)]
    assert len(statistics) == 2
    for node in statistics:
        assert wrong_values(rebuilt.edited(node, delete))


def _statistic(node: fx.Node) -> bool:
    return node.meta["placement"].dims[-1] == Leaf(1)


# ------------------------------------------------------------------------------------------------------- fused layouts
@pytest.mark.parametrize("split", ["packed", "heads", "pieces"])
def test_every_fused_layout_is_read_off_the_model(split: str) -> None:
    """DeepSpeed PR#3844: q, k and v are fused in three ways (BLOOM, GLM, CodeGen), known by the model's name; one that
    is not known is cut as another is, and the output is nonsense without a warning."""
    rebuilt = Rebuilt(Attention(kv=4, split=split), PACKED)
    rows = 3 * 4 * 4
    mistaken = Leaf(rows, (0,)) if split == "packed" else concat([Leaf(rows // 3, (0,))] * 3)
    assert rebuilt.is_cut("qkv.weight")
    assert wrong_values(rebuilt.cut_otherwise(qkv__weight=mistaken, qkv__bias=mistaken))


def test_unequal_parts_of_a_fused_weight_are_cut_one_by_one() -> None:
    """Automodel PR#1324: [all q|all k|all v] with fewer kv heads than query heads was cut into equal runs of rows: one
    rank got q and a bit of k, the other the rest."""
    rebuilt = Rebuilt(Attention(kv=2, repeat=3, split="packed"), PACKED)
    rows = Leaf((6 + 2 + 2) * 4, (0,))
    assert wrong_values(rebuilt.cut_otherwise(qkv__weight=rows, qkv__bias=rows))


class Gated(nn.Module):
    """Gate and value in one projection."""

    def __init__(self, interleaved: bool = False):
        super().__init__()
        self.both, self.down, self.interleaved = nn.Linear(WIDTH, 12), nn.Linear(6, WIDTH), interleaved

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        gate, value = y.unflatten(-1, (6, 2)).unbind(-1) if self.interleaved else y.chunk(2, -1)
        return self.down(F.silu(gate) * value)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_value_stay_in_pairs(interleaved: bool) -> None:
    """Automodel PR#1324, its other half: [gate|up] cut in the middle gives one rank all gates and the other all
    values; an interleaved one cut as if it were packed mixes them up in the other way."""
    rebuilt = Rebuilt(Gated(interleaved), "both column\ndown row\n")
    rows = concat([Leaf(6, (0,)), Leaf(6, (0,))]) if interleaved else Leaf(12, (0,))
    assert wrong_values(rebuilt.cut_otherwise(both__weight=rows, both__bias=rows))


def test_values_that_are_fused_by_group_stay_with_their_group() -> None:
    """vLLM PR#36242: Qwen3-Next packs b and a of each key head one after the other; taken for [all b|all a] and cut in
    the middle, the gates of one rank's heads went to the other's."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ba, self.v, self.o = nn.Linear(WIDTH, 4 * 2 * 2, bias=False), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            n, s, _ = x.shape
            b, a = self.ba(x).view(n, s, 4, 2, 2).unbind(3)
            v = self.v(x).view(n, s, 4, 2)
            return self.o((v * b.sigmoid() * F.softplus(a)).flatten(2))

    rebuilt = Rebuilt(Grouped(), "ba v column\no row\n")
    assert wrong_values(rebuilt.cut_otherwise(ba__weight=concat([Leaf(8, (0,)), Leaf(8, (0,))])))


# ---------------------------------------------------------------- what is added up twice
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x))


def test_a_layer_that_is_whole_is_not_summed() -> None:
    """tokenspeed PR#80: the MLP was built whole on every rank, since nobody told it of the ranks, and the all-reduce
    that follows an MLP was made all the same: its part of the residual counted once for every rank."""
    rebuilt = Rebuilt(Block(), "attention.{q,k,v} column\nattention.o row\n")
    assert not rebuilt.is_cut("mlp.up.weight")
    assert rebuilt.sums("all_reduce", "forward") == 1
    down = next(n for n in reversed(rebuilt.nodes("aten.linear.default")))

    def summed(graph: fx.Graph, node: fx.Node) -> None:
        behind(node, lambda g, n: call(g, n, collectives.all_reduce, n, "tp"))

    report = rebuilt.edited(down, summed)
    assert wrong_values(report)


def test_the_bias_of_a_row_cut_is_added_once() -> None:
    """text-generation-inference#1036, torchtitan PR#4245: every rank adds the whole bias to its partial sum, so that
    it is in the result as many times as there are ranks."""
    rebuilt = Rebuilt(Mlp(), "up column\ndown row\n")
    node, bias = _bias_of(rebuilt)

    def before(graph: fx.Graph, node: fx.Node) -> None:
        (add,) = (u for u in node.users if u.target is aten.add.Tensor)
        partial, read = node.args[0], next(x for x in add.all_input_nodes if x is not node)
        with graph.inserting_before(node):
            early = call(graph, node, aten.add.Tensor, partial, read)
        node.update_arg(0, early)
        add.replace_all_uses_with(node)

    assert bias.target == "down.bias"
    assert wrong_values(rebuilt.edited(node, before))


def test_the_bias_of_a_row_cut_gets_its_whole_gradient() -> None:
    """torchtitan PR#4332: each rank adds its share, the bias over the number of ranks. The sum is right, and the
    gradient is divided as well: the bias learns too slowly."""
    rebuilt = Rebuilt(Mlp(), "up column\ndown row\n")
    node, _ = _bias_of(rebuilt)

    def shared(graph: fx.Graph, node: fx.Node) -> None:
        (add,) = (u for u in node.users if u.target is aten.add.Tensor)
        partial, read = node.args[0], next(x for x in add.all_input_nodes if x is not node)
        with graph.inserting_before(node):
            share = call(graph, read, aten.div.Tensor, read, rebuilt.program.degree)
            early = call(graph, node, aten.add.Tensor, partial, share)
        node.update_arg(0, early)
        add.replace_all_uses_with(node)

    assert wrong_gradients_only(rebuilt.edited(node, shared))


def _bias_of(rebuilt: Rebuilt) -> tuple[fx.Node, fx.Node]:
    """The all-reduce behind the row cut, and the bias that is added to its result."""
    (node,) = rebuilt.nodes(collectives.all_reduce)
    (add,) = (u for u in node.users if u.target is aten.add.Tensor)
    return node, next(x for x in add.all_input_nodes if x is not node)


# ---------------------------------------------------------------- tied weights
class Tied(nn.Module):
    def __init__(self, vocabulary: int = 11):
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def test_a_tied_table_has_one_gradient() -> None:
    """axolotl PR#2999, transformers and DTensor: tied to its head, a table was cut at one of its names only, or became
    two. Here it is one parameter, cut once, and both uses add to its gradient."""
    ids = torch.randint(0, 11, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    rebuilt = Rebuilt(Tied(), "table vocab\n", ids)
    assert list(rebuilt.program.parameters) == ["table.weight"]
    assert rebuilt.is_cut("table.weight")
    (head,) = rebuilt.nodes("aten.linear.default")

    def untied(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_before(node):
            node.update_arg(1, call(graph, node.args[1], "detach", node.args[1]))  # type: ignore[arg-type]

    assert wrong_gradients_only(rebuilt.edited(head, untied))


# ---------------------------------------------------------------- sizes that do not divide
@pytest.mark.parametrize(("kv", "degree"), [(2, 4), (1, 3), (3, 2)])
def test_fewer_kv_heads_than_ranks(kv: int, degree: int) -> None:
    """transformers#48307, torchtitan PR#2577 and #932: rows of k and v were dealt out evenly, less than one head for
    each rank, and the model died in a reshape. Here: heads are whole, and a rank shares one if it must."""
    repeat = 3 if kv == 1 else 2
    rebuilt = Rebuilt(Attention(kv=kv, repeat=repeat), SEPARATE, degree=degree)
    assert rebuilt.is_cut("q.weight")
    heads = Leaf(kv * repeat * 4, (0,) if len(rebuilt.program.mesh.sizes) == 1 else (0, 1))
    if kv * repeat % degree:
        assert not rebuilt.cut_otherwise(q__weight=heads, q__bias=heads).ok


def test_more_ranks_than_heads_are_refused() -> None:
    """What cannot be is said when it is asked for, with the degrees that can, and not in the middle of a forward."""
    with pytest.raises(ShardingError) as caught:
        Rebuilt(Attention(kv=3), SEPARATE, degree=4)
    assert caught.value.where is not None
    assert caught.value.why is not None
    assert caught.value.help is not None
