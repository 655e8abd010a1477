"""The floor: one transformer on plain tensors, cut by hand as Megatron-LM does it (Shoeybi et al. 2019).

f and g around every block, q, k and v in one product, gate and up in another, fused norms and attention, a
vocabulary-parallel embedding, head and cross-entropy, one bucket for gradients that are partial. With
``sequence_parallel``, activations between the blocks are cut along the positions (Korthikanti et al. 2022), first dim
first: ``[positions, batch, hidden]``.

Nothing here is checked, general or reusable: it is what one would write for exactly this model, and the test of it is
that its outputs and all its gradients are those of one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.workloads import Workload

# ------------------------------------------------------------------------------------------------ communication
ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CopyToRanks(torch.autograd.Function):
    """f: identity; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class SumOverRanks(torch.autograd.Function):
    """g: the sum over the ranks; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _gathered(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0] * dist.get_world_size(), *x.shape[1:])
    ALL_GATHER(out, x.contiguous())
    return out


def _scattered(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0] // dist.get_world_size(), *x.shape[1:])
    REDUCE_SCATTER(out, x.contiguous())
    return out


class GatherPositions(torch.autograd.Function):
    """All-gather of the first dim; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _scattered(grad)


class ScatterPositions(torch.autograd.Function):
    """Reduce-scatter of the first dim; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _scattered(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gathered(grad)


class VocabularyCrossEntropy(torch.autograd.Function):
    """Losses ``[n]`` of logits ``[n, vocabulary / ranks]``, which are overwritten: three all-reduces."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        largest = logits.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        logits -= largest[:, None]
        mine = target - dist.get_rank() * logits.shape[-1]
        elsewhere = (mine < 0) | (mine >= logits.shape[-1])
        mine = mine.masked_fill_(elsewhere, 0)[:, None]
        picked = logits.gather(-1, mine)[:, 0].masked_fill_(elsewhere, 0.0)
        dist.all_reduce(picked)
        exps = logits.exp_()
        total = exps.sum(-1)
        dist.all_reduce(total)
        exps /= total[:, None]
        ctx.save_for_backward(exps, mine, elsewhere)
        return total.log_() - picked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        softmax, mine, elsewhere = ctx.saved_tensors
        softmax.scatter_add_(-1, mine, (~elsewhere)[:, None].to(softmax.dtype).neg_())
        return softmax.mul_(grad[:, None]), None


# ------------------------------------------------------------------------------------------------ weights
@dataclass(frozen=True)
class Family:
    """Names of a class of models; ``qkv`` and ``up`` are several weights to be packed, or one that is."""

    layers: str
    qkv: Sequence[str]
    out: str
    up: Sequence[str]
    down: str
    norms: tuple[str, str]  # before attention and before the MLP; after them for BERT; phi has one for both
    top: Mapping[str, str]  # this file's name -> the model's
    kind: str = "sequential"  # parallel: both branches on one residual; after: norms behind the residual
    activation: str = "gelu"  # silu: gated; tanh: gelu's approximation
    conv1d: bool = False  # weights stored transposed
    by_head: bool = False  # q, k and v of one head after the other


_LLAMA = Family(
    "model.layers", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", ("input_layernorm", "post_attention_layernorm"),
    {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}, activation="silu",
)  # fmt: skip
_BERT_SELF = "attention.self."
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": Family(
        "transformer.h", ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", ("ln_1", "ln_2"),
        {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"},
        activation="tanh", conv1d=True,
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox.layers", ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h", ("input_layernorm", "post_attention_layernorm"),
        {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
        kind="parallel", by_head=True,
    ),
    "PhiForCausalLM": Family(
        "model.layers", _LLAMA.qkv, "self_attn.dense", ("mlp.fc1",), "mlp.fc2", ("input_layernorm",) * 2,
        {"embed": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"},
        kind="parallel", activation="tanh",
    ),
    "BertForMaskedLM": Family(
        "bert.encoder.layer", [_BERT_SELF + name for name in ("query", "key", "value")], "attention.output.dense",
        ("intermediate.dense",), "output.dense", ("attention.output.LayerNorm", "output.LayerNorm"),
        {
            "embed": "bert.embeddings.word_embeddings", "positions": "bert.embeddings.position_embeddings",
            "types": "bert.embeddings.token_type_embeddings", "embed_norm": "bert.embeddings.LayerNorm",
            "transform": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
            "head": "cls.predictions",
        },
        kind="after",
    ),
}  # fmt: skip

WHOLE_BIASES = ("out", "down")
CUT = ("embed", "head", "qkv", "up", *WHOLE_BIASES)


def is_cut(name: str) -> bool:
    """Whether the ranks hold parts of the packed weight of that name."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return last in CUT and not (kind == "bias" and last in WHOLE_BIASES)


def packed(work: Workload, whole: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """This rank's weights, packed, from the model's own parameters. Linear, so its adjoint unpacks gradients."""
    family, heads = FAMILIES[work.cls], work.settings.num_attention_heads

    def part(x: Tensor, dim: int) -> Tensor:
        return x.chunk(ranks, dim)[rank]

    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for name, module in family.top.items():
            if (x := whole.get(f"{module}.{kind}")) is not None:
                found[f"{name}.{kind}"] = part(x, 0) if is_cut(f"{name}.{kind}") else x
        for i in range(work.settings.num_hidden_layers):
            layer = f"{family.layers}.{i}."

            def get(name: str, layer: str = layer, kind: str = kind) -> Tensor | None:
                x = whole.get(f"{layer}{name}.{kind}")
                return x.t() if x is not None and x.ndim == 2 and family.conv1d else x

            for name, parts in (("qkv", family.qkv), ("up", family.up)):
                pieces = [x for module in parts if (x := get(module)) is not None]
                if name == "qkv" and len(pieces) == 1:
                    if family.by_head:
                        pieces = [x.flatten(0, 1) for x in pieces[0].unflatten(0, (heads, 3, -1)).unbind(1)]
                    else:
                        pieces = [*pieces[0].chunk(3)]
                if pieces:
                    found[f"{i}.{name}.{kind}"] = torch.cat([part(x, 0) for x in pieces])
            for name, module in (("out", family.out), ("down", family.down)):
                if (x := get(module)) is not None:
                    found[f"{i}.{name}.{kind}"] = part(x, 1) if kind == "weight" else x
            norms = dict(zip(("norm1", "norm2"), dict.fromkeys(family.norms), strict=False))
            for name, module in (norms | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}).items():
                if (x := get(module)) is not None:
                    found[f"{i}.{name}.{kind}"] = x
    return found


# ------------------------------------------------------------------------------------------------ the model
class Layer:
    """The local weights of one layer; those that the model lacks are None."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str):
        get = weights.get
        self.qkv, self.qkv_bias = weights[f"{prefix}qkv.weight"], get(f"{prefix}qkv.bias")
        self.out, self.out_bias = weights[f"{prefix}out.weight"], get(f"{prefix}out.bias")
        self.up, self.up_bias = weights[f"{prefix}up.weight"], get(f"{prefix}up.bias")
        self.down, self.down_bias = weights[f"{prefix}down.weight"], get(f"{prefix}down.bias")
        self.norm1 = weights[f"{prefix}norm1.weight"], get(f"{prefix}norm1.bias")
        self.norm2 = get(f"{prefix}norm2.weight"), get(f"{prefix}norm2.bias")
        self.q_norm, self.k_norm = get(f"{prefix}q_norm.weight"), get(f"{prefix}k_norm.weight")


class Floor:
    """One rank of the model: ``logits`` and ``loss``, ``parameters``, and ``after_backward`` before each step."""

    def __init__(self, work: Workload, model: nn.Module, sequence_parallel: bool = False):
        self.work, self.family, config = work, FAMILIES[work.cls], work.settings
        self.rank, self.ranks, self.spread = dist.get_rank(), dist.get_world_size(), sequence_parallel
        whole = {name: p.detach() for name, p in model.named_parameters()}
        self.weights = {
            name: x.clone(memory_format=torch.contiguous_format).requires_grad_()
            for name, x in packed(work, whole, self.rank, self.ranks).items()
        }
        self.layers = [Layer(self.weights, f"{i}.") for i in range(config.num_hidden_layers)]
        get = self.weights.get
        self.embed, self.positions, self.types = (
            self.weights["embed.weight"],
            get("positions.weight"),
            get("types.weight"),
        )
        self.embed_norm = get("embed_norm.weight"), get("embed_norm.bias")
        self.transform, self.transform_bias = get("transform.weight"), get("transform.bias")
        self.norm_last = self.weights["norm.weight"], get("norm.bias")
        self.head, self.head_bias = get("head.weight", self.embed), get("head.bias")
        self.heads = config.num_attention_heads // self.ranks
        self.kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads) // self.ranks
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        eps = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        self.eps = next(getattr(config, name) for name in eps if hasattr(config, name))
        self.first = self.rank * self.embed.shape[0]
        self.rotary = self._rotary(config)
        self.partial = [  # whole weights that see parts of the heads, or of the positions
            x
            for name, x in self.weights.items()
            if not is_cut(name) and (self.spread or "q_norm" in name or "k_norm" in name)
        ]

    def _rotary(self, config: Any) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines ``[positions, rotary dims]``."""
        rope = getattr(config, "rope_parameters", None)
        if rope is None:
            return None
        dims = int(self.head_dim * rope.get("partial_rotary_factor", 1.0))
        device = self.embed.device
        steps = torch.arange(0, dims, 2, dtype=torch.float32, device=device)
        inverse = 1.0 / rope["rope_theta"] ** (steps / dims)
        inverse = inverse.to(self.embed.dtype)  # rounded as the model rounds it
        positions = torch.arange(config.max_position_embeddings, dtype=inverse.dtype, device=device)
        angles = torch.outer(positions, inverse).repeat(1, 2)
        return angles.cos(), angles.sin()

    def parameters(self) -> list[Tensor]:
        """The local weights."""
        return list(self.weights.values())

    # -------------------------------------------------------------------------------------------- blocks
    def enter(self, x: Tensor) -> Tensor:
        """What a block of cut weights is given."""
        if self.spread:
            return GatherPositions.apply(x)  # type: ignore[no-any-return]
        return CopyToRanks.apply(x) if x.requires_grad else x  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """The sum of what the ranks' parts of a block made."""
        if self.spread:
            return ScatterPositions.apply(x)  # type: ignore[no-any-return]
        if x.requires_grad:
            return SumOverRanks.apply(x)  # type: ignore[no-any-return]
        dist.all_reduce(x)
        return x

    def norm(self, x: Tensor, weights: tuple[Tensor | None, Tensor | None]) -> Tensor:
        weight, bias = weights
        if self.family.activation == "silu":
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions on ``[batch, heads, positions, head dim]``, on the first dims of each head."""
        dims = cos.shape[-1]
        turned, kept = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
        left, right = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-right, left), -1) * sin
        return turned if kept is None else torch.cat((turned, kept), -1)

    def attention(self, layer: Layer, x: Tensor) -> Tensor:
        """A partial sum."""
        packed = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, self.head_dim))
        order = (1, 2, 0, 3) if self.spread else (0, 2, 1, 3)
        q, k, v = (y.permute(order) for y in packed.split((self.heads, self.kv_heads, self.kv_heads), 2))
        if layer.q_norm is not None:
            q, k = self.norm(q, (layer.q_norm, None)), self.norm(k, (layer.k_norm, None))
        if self.rotary is not None:
            cos, sin = (table[: q.shape[2]] for table in self.rotary)
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.work.causal, enable_gqa=self.heads != self.kv_heads)
        return F.linear(y.permute((2, 0, 1, 3) if self.spread else (0, 2, 1, 3)).flatten(2), layer.out)

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """A partial sum."""
        y = F.linear(x, layer.up, layer.up_bias)
        if self.family.activation == "silu":
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate="tanh" if self.family.activation == "tanh" else "none")
        return F.linear(y, layer.down)

    def layer(self, layer: Layer, x: Tensor) -> Tensor:
        if self.family.kind == "parallel":
            one = self.enter(self.norm(x, layer.norm1))
            two = one if layer.norm2[0] is None else self.enter(self.norm(x, layer.norm2))
            biases = layer.out_bias + layer.down_bias  # type: ignore[operator]
            return x + self.leave(self.attention(layer, one) + self.mlp(layer, two)) + biases
        if self.family.kind == "after":
            x = self.norm(x + self.leave(self.attention(layer, self.enter(x))) + layer.out_bias, layer.norm1)
            return self.norm(x + self.leave(self.mlp(layer, self.enter(x))) + layer.down_bias, layer.norm2)
        for block, norm, bias in (
            (self.attention, layer.norm1, layer.out_bias),
            (self.mlp, layer.norm2, layer.down_bias),
        ):
            y = self.leave(block(layer, self.enter(self.norm(x, norm))))
            x = x + y if bias is None else x + (y + bias)
        return x

    def local_logits(self, ids: Tensor) -> Tensor:
        """This rank's part of the vocabulary; positions first with sequence parallelism."""
        if self.spread:
            ids = ids.t()
        mine = ids - self.first
        elsewhere = (mine < 0) | (mine >= self.embed.shape[0])
        rows = F.embedding(mine.masked_fill_(elsewhere, 0), self.embed)
        x = self.leave(rows.masked_fill(elsewhere[..., None], 0.0))
        if self.positions is not None:
            length = x.shape[0] if self.spread else x.shape[1]
            start = self.rank * length if self.spread else 0
            table = self.positions[start : start + length]
            x = x + (table[:, None] if self.spread else table)
        if self.types is not None:
            x = x + self.types[0]
        if self.embed_norm[0] is not None:
            x = self.norm(x, self.embed_norm)
        for layer in self.layers:
            x = self.layer(layer, x)
        if self.transform is not None:
            x = F.gelu(F.linear(x, self.transform, self.transform_bias))
        return F.linear(self.enter(self.norm(x, self.norm_last)), self.head, self.head_bias)

    # -------------------------------------------------------------------------------------------- what is asked for
    def logits(self, ids: Tensor) -> Tensor:
        """``[batch, positions, vocabulary]``, whole on every rank."""
        part = self.local_logits(ids)
        part = part.transpose(0, 1) if self.spread else part
        found = part.new_empty(self.ranks, *part.shape)
        ALL_GATHER(found.flatten(0, 1), part.contiguous())
        return torch.cat([*found], -1)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of the labels that are not -100."""
        target = F.pad(labels, (0, 1), value=-100)[:, 1:] if self.work.causal else labels
        target = (target.t() if self.spread else target).reshape(-1)
        counted = target != -100
        losses = VocabularyCrossEntropy.apply(self.local_logits(ids).flatten(0, 1), target.clamp(min=0))
        return (losses * counted).sum() / counted.sum()  # type: ignore[operator]

    def after_backward(self) -> None:
        """Sum the gradients that are partial, in one bucket."""
        if self.partial:
            grads = [x.grad for x in self.partial if x.grad is not None]
            bucket = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(bucket)
            for grad, total in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    def gradients(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Whole gradients of the model's own parameters, each once, by name."""
        zeros = partial(torch.zeros, dtype=self.embed.dtype, requires_grad=True)
        whole = {name: zeros(shape) for name, shape in shapes.items()}
        parts = packed(self.work, whole, self.rank, self.ranks)
        grads = [g if is_cut(name) else g / self.ranks for name, x in self.weights.items() if (g := x.grad) is not None]
        torch.autograd.backward([parts[name] for name, x in self.weights.items() if x.grad is not None], grads)
        for x in whole.values():
            if x.grad is None:
                x.grad = torch.zeros_like(x)
            dist.all_reduce(x.grad)
        return {name: x.grad for name, x in whole.items() if x.grad is not None}
