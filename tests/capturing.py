"""What the tests of capture share: models, calls of any size, and the difference between a model and its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from torch import nn

from tpcompile.capture import Captured
from tpcompile.errors import CaptureError


def one_thread() -> Iterator[None]:
    """Tiny tensors on several threads mostly wait for each other; the same numbers in every test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def line_of(file: str, code: str) -> int:
    """Number of the one line of ``file`` that ends with ``code`` followed by a comment ``# HERE``."""
    lines = Path(file).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.strip() == f"{code}  # HERE"]
    return number


def message(call: Callable[[], Any]) -> list[str]:
    with pytest.raises(CaptureError) as caught:
        call()
    return str(caught.value).splitlines()


def snapshot(model: nn.Module) -> list[Any]:
    """Identity of everything the modules hold, their flags, and the values of their tensors."""
    held = [
        (path, name, id(value), list(value) if isinstance(value, dict | list) else None)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    ]
    state = [*model.named_parameters(), *model.named_buffers()]
    return [
        held,
        [(name, id(t), t.requires_grad, t.grad is None, None if t.is_meta else t.tolist()) for name, t in state],
    ]


# ---------------------------------------------------------------- the oracle

Call = tuple[tuple[Any, ...], dict[str, Any]]


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def gradients(model: nn.Module, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    parameters = dict(model.named_parameters())
    floats = [output for output in outputs if output.requires_grad]
    loss = sum((output * torch.arange(output.numel()).view(output.shape).cos()).sum() for output in floats)
    assert isinstance(loss, torch.Tensor)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def difference(model: nn.Module, captured: Captured, call: Call) -> float:
    """The largest difference of outputs and gradients between the model and its graph; they also return alike trees."""
    args, kwargs = call
    torch.manual_seed(7)
    wanted = model(*args, **kwargs)
    torch.manual_seed(7)
    got = captured.unflatten(captured.graph_module(*captured.flatten(args, kwargs)))
    assert type(got) is type(wanted)
    assert pytree.tree_structure(got) == pytree.tree_structure(wanted)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = list(zip(tensors(got), tensors(wanted), strict=True))
    mine, theirs = (gradients(model, [pair[i] for pair in pairs]) for i in (0, 1))
    assert [name for name, value in mine.items() if value is None] == [
        n for n, value in theirs.items() if value is None
    ]
    pairs += [(a, b) for a, b in zip(mine.values(), theirs.values(), strict=True) if a is not None and b is not None]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return max(float((a - b).detach().abs().max()) for a, b in pairs if a.is_floating_point())


# ---------------------------------------------------------------- models

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def ids(batch: int, length: int, high: int = 64) -> torch.Tensor:
    return torch.randint(3, high, (batch, length))


def text(batch: int, length: int) -> Call:
    return (), {"input_ids": ids(batch, length), "use_cache": False}


def small(model: Any, config: Any, **sizes: Any) -> Any:
    return model(config(**sizes))


def llama(**changes: Any) -> Any:
    sizes = {**SMALL, **SPECIAL, "num_hidden_layers": 2, "num_key_value_heads": 2, **changes}
    return small(transformers.LlamaForCausalLM, transformers.LlamaConfig, **sizes)


def gpt2(**changes: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, **SPECIAL, **changes}
    return small(transformers.GPT2LMHeadModel, transformers.GPT2Config, **sizes)


def phi3() -> nn.Module:
    return small(transformers.Phi3ForCausalLM, transformers.Phi3Config, **SMALL, **SPECIAL, num_key_value_heads=2)


def falcon() -> nn.Module:
    sizes = {**SMALL, **SPECIAL, "num_kv_heads": 2, "new_decoder_architecture": True}
    return small(transformers.FalconForCausalLM, transformers.FalconConfig, **sizes)


def bert() -> nn.Module:
    return small(transformers.BertModel, transformers.BertConfig, **SMALL, **SPECIAL)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64, "num_layers": 1}
    return small(transformers.T5ForConditionalGeneration, transformers.T5Config, **sizes, decoder_start_token_id=0)


def vit() -> nn.Module:
    sizes = {**SMALL, "image_size": 16, "patch_size": 8}
    return small(transformers.ViTForImageClassification, transformers.ViTConfig, **sizes)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))


class Block(nn.Module):
    """As in nanoGPT: fused qkv, split and viewed with constants."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        q, k, v = self.attention(self.norm(x)).split(self.width, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.projection(y.transpose(1, 2).contiguous().view(b, t, c))


class NanoGPT(nn.Module):
    """With an assert on the length, a tie, and a loss only where there are targets."""

    block_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(64, 16)
        self.wpe = nn.Embedding(self.block_size, 16)
        self.blocks = nn.ModuleList(Block(16, 4) for _ in range(2))
        self.lm_head = nn.Linear(16, 64, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, t = idx.size()
        assert t <= self.block_size, f"cannot forward {t} tokens"  # HERE
        x = self.wte(idx) + self.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device))
        for block in self.blocks:
            x = block(x)
        if targets is not None:
            logits = self.lm_head(x)
            return logits, nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return self.lm_head(x[:, [-1], :]), None


def floats(*shape: int) -> Callable[[int, int], Call]:
    """Calls with one float tensor; in ``shape``, -1 is the batch and -2 the sequence."""
    return lambda b, s: ((torch.randn([{-1: b, -2: s}.get(n, n) for n in shape], dtype=torch.float64),), {})


def pixels(batch: int, _: int) -> Call:
    return (), {"pixel_values": torch.randn(batch, 3, 16, 16, dtype=torch.float64)}


def two_texts(batch: int, length: int) -> Call:
    return (), {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, length + 2), "use_cache": False}


def with_targets(batch: int, length: int) -> Call:
    tokens = ids(batch, length)
    return (tokens, tokens), {}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Call]]] = {
    "gpt2": (gpt2, text),
    "llama": (lambda: llama(attn_implementation="eager"), text),
    "phi3": (phi3, text),
    "falcon": (falcon, text),
    "bert": (bert, lambda b, s: ((), {"input_ids": ids(b, s), "attention_mask": torch.ones(b, s, dtype=torch.long)})),
    "t5": (t5, two_texts),
    "vit": (vit, pixels),
    "transformer_encoder": (encoder, floats(-1, -2, 32)),
    "nanogpt": (NanoGPT, lambda b, s: ((ids(b, s),), {})),
    "nanogpt_loss": (NanoGPT, with_targets),
    "mlp": (mlp, floats(-1, -2, 8)),
    "mlp_2d": (mlp, floats(-1, 8)),
}
