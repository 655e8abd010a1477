"""Tiny models by name, with random weights: what the tests of whole models are run over.

Each has a few layers of width 64 and, where its class knows dropout, dropout of 0.1, so that train mode differs from
eval mode. Building, capturing and rewriting are cached: a model is captured once and rewritten for many degrees.
(BLOOM is missing: its GELU is an autograd.Function of its own, which capture refuses.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompile import shards
from tpcompile.capture import Captured
from tpcompile.compare import backward
from tpcompile.compile_cache import cached_capture
from tpcompile.compiler import choose_spec, rewrite_captured
from tpcompile.program import DEFAULT, Options, Program
from tpcompile.simulate import Recorder, Simulation
from tpcompile.spec import Spec

Inputs = Mapping[str, Any]
Counts = Mapping[tuple[str, str], int]  # (kind, direction) -> how many collectives of activations

WIDTH, VOCABULARY, BATCH, LENGTH = 64, 128, 3, 7
LANGUAGE_MODEL: Counts = {
    ("all_reduce", "forward"): 1,  # the rows of the embedding
    ("all_reduce", "backward"): 1,  # what the head reads
    ("all_gather", "forward"): 1,  # the logits
}


@dataclass(frozen=True)
class Entry:
    """One model: how to build it with a number of layers, what to call it with, and what it may communicate.

    ``layer`` and ``once`` are the collectives of activations: of one layer, and of everything around the layers.
    ``spec`` is a text; None is the shipped spec of the model's class.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[], Inputs]
    layer: Counts = field(default_factory=lambda: {("all_reduce", "forward"): 2, ("all_reduce", "backward"): 2})
    once: Counts = field(default_factory=lambda: LANGUAGE_MODEL)
    degrees: tuple[int, ...] = (2, 3, 4)
    dropout: bool = True
    spec: str | None = None


PARALLEL: Counts = {("all_reduce", "forward"): 1, ("all_reduce", "backward"): 1}
"""Attention and MLP side by side on one residual: one all-reduce each way serves both."""


def _ids() -> Inputs:
    return {"input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH)), "use_cache": False}


def _ids_alone() -> Inputs:
    return {"input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH))}


def _ids_twice() -> Inputs:
    return {**_ids(), "decoder_input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH - 2))}


def _pixels() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def _source() -> Inputs:
    return {"src": torch.randn(BATCH, LENGTH, WIDTH)}


def _transformers(kind: str, layers: str = "num_hidden_layers", /, **config: Any) -> Callable[[int], nn.Module]:
    """A builder of the transformers class ``kind``; its config is the class's own, made small."""

    def build(count: int) -> nn.Module:
        import transformers

        made = getattr(transformers, kind)
        ours = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return made(made.config_class(**{**ours, "vocab_size": VOCABULARY, layers: count, **config}))

    return build


def _decoder(kind: str, heads: int, kv_heads: int, **config: Any) -> Callable[[int], nn.Module]:
    """A decoder whose config has Llama's names."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": heads, "intermediate_size": 96}
    return _transformers(
        kind, **{**sizes, "num_key_value_heads": kv_heads, "head_dim": 8, "attention_dropout": 0.1, **config}
    )


# A decoder in the style of nanoGPT (written for these tests): dotted names, an assert on the length, tied head.


@dataclass(frozen=True)
class GPTSizes:
    layers: int
    width: int = WIDTH
    heads: int = 4
    context: int = 16
    vocabulary: int = VOCABULARY
    dropout: float = 0.1


class CausalSelfAttention(nn.Module):
    allowed: Tensor

    def __init__(self, sizes: GPTSizes):
        super().__init__()
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width)
        self.c_proj = nn.Linear(sizes.width, sizes.width)
        self.drop_weights = nn.Dropout(sizes.dropout)
        self.drop_output = nn.Dropout(sizes.dropout)
        self.heads = sizes.heads
        self.register_buffer("allowed", torch.ones(sizes.context, sizes.context).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        parts = self.c_attn(x).split(d, dim=2)
        q, k, v = (part.view(b, s, self.heads, d // self.heads).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        weights = scores.masked_fill(~self.allowed[:s, :s], float("-inf")).softmax(-1)
        y = self.drop_weights(weights) @ v
        return self.drop_output(self.c_proj(y.transpose(1, 2).contiguous().view(b, s, d)))


class Feedforward(nn.Module):
    def __init__(self, sizes: GPTSizes):
        super().__init__()
        self.c_fc = nn.Linear(sizes.width, 4 * sizes.width)
        self.c_proj = nn.Linear(4 * sizes.width, sizes.width)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, sizes: GPTSizes):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attn, self.mlp = CausalSelfAttention(sizes), Feedforward(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, sizes: GPTSizes):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(sizes.vocabulary, sizes.width), nn.Embedding(sizes.context, sizes.width)
        self.drop = nn.Dropout(sizes.dropout)
        self.h = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.ln_f = nn.LayerNorm(sizes.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device)))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    def __init__(self, sizes: GPTSizes):
        super().__init__()
        self.context = sizes.context
        self.transformer = Transformer(sizes)
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.size(1)
        assert length <= self.context, f"cannot forward {length} tokens: the context is {self.context}"
        return self.lm_head(self.transformer(input_ids))


class MLP(nn.Module):
    """Blocks of two Linears with a GELU between them, each on a residual."""

    def __init__(self, layers: int):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 96) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(96, WIDTH) for _ in range(layers))
        self.drop = nn.Dropout(0.1)

    def forward(self, src: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            src = src + self.drop(down(F.gelu(up(src))))
        return src


def _torch_encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


_HIDDEN_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_FALCON = {"hidden_size": WIDTH, "num_attention_heads": 8, "hidden_dropout": 0.1, "attention_dropout": 0.1}
_ENCODER = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 128, **_HIDDEN_DROPOUT}

MODELS: Mapping[str, Entry] = {
    "gpt2": Entry(_transformers("GPT2LMHeadModel", "n_layer", n_embd=WIDTH, n_head=4, n_positions=32), _ids),
    "nanogpt": Entry(lambda layers: GPT(GPTSizes(layers)), _ids_alone),
    "llama": Entry(_decoder("LlamaForCausalLM", 8, 8), _ids),
    "llama_gqa": Entry(_decoder("LlamaForCausalLM", 8, 4), _ids),
    # 4 ranks on 2 kv heads: the mesh is factored, 4 = 2 * 2
    "llama_few_kv": Entry(_decoder("LlamaForCausalLM", 8, 2), _ids, degrees=(2, 4)),
    "llama_mqa": Entry(_decoder("LlamaForCausalLM", 8, 1), _ids, degrees=(2, 3)),
    # SmolLM2's head counts and its tied head: 9 heads on 3 kv heads, a vocabulary that nothing divides
    "llama_uneven": Entry(
        _decoder("LlamaForCausalLM", 9, 3, hidden_size=72, vocab_size=127, tie_word_embeddings=True),
        lambda: {"input_ids": torch.randint(1, 127, (BATCH, LENGTH)), "use_cache": False},
    ),
    "qwen2": Entry(_decoder("Qwen2ForCausalLM", 8, 4), _ids),
    "qwen3": Entry(_decoder("Qwen3ForCausalLM", 8, 4), _ids),
    "gemma2": Entry(_decoder("Gemma2ForCausalLM", 8, 4), _ids),
    "gemma3": Entry(_decoder("Gemma3ForCausalLM", 8, 4), _ids),
    "phi": Entry(
        _decoder("PhiForCausalLM", 4, 4, head_dim=16, resid_pdrop=0.1, embd_pdrop=0.1), _ids, layer=PARALLEL
    ),
    "phi3": Entry(_decoder("Phi3ForCausalLM", 8, 4, resid_pdrop=0.1, embd_pdrop=0.1), _ids),
    "gpt_neox": Entry(
        _transformers(
            "GPTNeoXForCausalLM", hidden_size=WIDTH, num_attention_heads=4, intermediate_size=96,
            hidden_dropout=0.1, attention_dropout=0.1,
        ), _ids, layer=PARALLEL,
    ),
    "gptj": Entry(
        _transformers(
            "GPTJForCausalLM", "n_layer", n_embd=WIDTH, n_head=4, rotary_dim=8, n_inner=96, n_positions=32,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
        ), _ids, layer=PARALLEL,
    ),
    "falcon_mqa": Entry(
        _transformers("FalconForCausalLM", multi_query=True, new_decoder_architecture=False, **_FALCON), _ids,
        layer=PARALLEL,
    ),
    "falcon_gqa": Entry(
        _transformers("FalconForCausalLM", num_kv_heads=4, new_decoder_architecture=True, **_FALCON), _ids,
        layer=PARALLEL,
    ),
    "opt": Entry(
        _transformers(
            "OPTForCausalLM", hidden_size=WIDTH, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=WIDTH,
            max_position_embeddings=32, dropout=0.1, attention_dropout=0.1,
        ), _ids,
    ),
    "bert": Entry(_transformers("BertModel", **_ENCODER), _ids_alone, once={("all_reduce", "forward"): 1}),
    "bert_mlm": Entry(_transformers("BertForMaskedLM", **_ENCODER), _ids_alone),
    "vit": Entry(
        lambda layers: _transformers("ViTForImageClassification", image_size=32, patch_size=8, **_ENCODER)(layers),
        _pixels, once={},
    ),
    "t5": Entry(
        _transformers("T5ForConditionalGeneration", "num_layers", d_model=WIDTH, d_kv=16, d_ff=128, num_heads=4),
        _ids_twice,
        # encoder 2 + 2, decoder 3 + 3
        layer={("all_reduce", "forward"): 5, ("all_reduce", "backward"): 5},
        # two lookups; the head and the encoder's output, which every cross-attention reads; the logits
        once={("all_reduce", "forward"): 2, ("all_reduce", "backward"): 2, ("all_gather", "forward"): 1},
    ),
    "torch_transformer": Entry(_torch_encoder, _source, once={}),
    "mlp": Entry(
        MLP, _source, layer=PARALLEL, once={}, spec="up.*    column\ndown.*  row\n",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, the inputs it was captured with, and its captured graph."""

    name: str
    model: nn.Module
    inputs: Inputs
    captured: Captured
    spec: Spec


def build(name: str, layers: int = 2, training: bool = False) -> nn.Module:
    """The model ``name`` with fixed random weights, norms and biases included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name].build(layers).train(training)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # ones and zeros would hide a wrong one
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name: str) -> Inputs:
    """Fixed example inputs of the model ``name``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MODELS[name].inputs()


@cache
def case(name: str, layers: int = 2, training: bool = False) -> Case:
    """The model ``name``, captured once."""
    model, given, text = build(name, layers, training), inputs(name), MODELS[name].spec
    spec = choose_spec(model, None if text is None else Spec.parse(text))
    assert spec is not None, "every model here has a shipped spec or a text of its own"
    return Case(name, model, given, cached_capture(model, (), given), spec)


@cache
def program(name: str, degree: int, layers: int = 2, training: bool = False, options: Options = DEFAULT) -> Program:
    """The model ``name`` rewritten for ``degree`` ranks."""
    found = case(name, layers, training)
    inputs = ((), found.inputs)
    return rewrite_captured(found.captured, found.spec, found.model, degree, inputs, options=options)


def counts(rewritten: Program, of: str = "activations") -> Counter[tuple[str, str]]:
    """How many collectives of each kind and direction the static report lists."""
    found: Counter[tuple[str, str]] = Counter()
    for row in rewritten.collectives:
        if row.of == of:
            found[row.kind, row.direction] += row.count
    return found


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of a program in the model's own precision, all ranks in lock step."""

    outputs: list[list[Any]]  # of each rank
    gradients: list[dict[str, Tensor]]  # of each rank, by parameter: its part
    recorder: Recorder


def step(rewritten: Program, given: Inputs, seed: int = 0) -> Step:
    """Run a program of this catalogue once. Inputs require gradients where they can, as in ``verify``."""
    captured = rewritten.captured
    others = {**captured.buffers, **captured.constants}
    ranks = shards.attributes(captured.parameters, others, rewritten.parameters, rewritten.mesh)
    flat = [[_leaf(x) for x in captured.flatten((), given)] for _ in ranks]
    recorder = Recorder()
    simulation = Simulation(rewritten.graph_module, len(ranks), rewritten.mesh.all_groups(), ranks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = simulation.run(flat, recorder=recorder)
        backward(*outputs)
    names = captured.parameters.keys()
    gradients = [{n: x.grad for n, x in own.items() if n in names and x.grad is not None} for own in ranks]
    return Step([list(rank) for rank in outputs], gradients, recorder)


def _leaf(x: Tensor) -> Tensor:
    x = x.detach().clone()
    return x.requires_grad_() if x.is_floating_point() else x


__all__ = ["LANGUAGE_MODEL", "MODELS", "Case", "Entry", "Step", "build", "case", "counts", "inputs", "program", "step"]
