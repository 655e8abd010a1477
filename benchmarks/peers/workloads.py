"""What is run: transformers models with random weights, and one batch of tokens for each.

Every contender is given the same weights and the same batch on every rank, and two things to do: ``inference``, the
whole logits of the batch, and ``training``, the model's own loss (the logits themselves are not asked for), backward
and a step of AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MODES = ("inference", "training")


@dataclass(frozen=True)
class Workload:
    """A model and a batch of ``[batch, positions]`` tokens."""

    name: str
    cls: str
    config: Mapping[str, Any]
    batch: int
    positions: int
    says: str
    steps: int = 1  # in one timed sample
    device: str = "cpu"

    @cached_property
    def settings(self) -> Any:
        """The config of the model."""
        return getattr(transformers, self.cls).config_class(
            **self.config, use_cache=False, bos_token_id=0, eos_token_id=1, pad_token_id=None
        )

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The unmodified model; no parameter is constant, since zero biases and unit norms would hide errors."""
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(0)
            model: nn.Module = getattr(transformers, self.cls)(self.settings)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.to(dtype)

    def batch_of_tokens(self) -> tuple[Tensor, Tensor]:
        """``(ids, labels)``, both ``[batch, positions]``; some labels are -100, which counts for nothing."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, self.settings.vocab_size, (self.batch, self.positions), generator=generator)
        labels = ids.clone() if self.causal else ids.roll(1, 1)
        labels[:, ::7] = -100
        return ids.to(self.device), labels.to(self.device)

    @property
    def causal(self) -> bool:
        """Whether a position predicts the next one; otherwise itself."""
        return "CausalLM" in self.cls or "LMHead" in self.cls


LLAMA = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408, "vocab_size": 4096, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {**LLAMA, "hidden_size": 128, "intermediate_size": 352, "vocab_size": 512}
GPT2 = {
    "n_embd": 512, "n_layer": 4, "n_head": 8, "n_inner": 2048, "vocab_size": 4096, "n_positions": 512,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
NEOX = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048,
    "vocab_size": 4096, "max_position_embeddings": 512, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
PHI = {
    **{k: v for k, v in NEOX.items() if k != "hidden_dropout"}, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
BERT = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048,
    "vocab_size": 4096, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
QWEN3 = {**LLAMA, "head_dim": 64, "tie_word_embeddings": True}

WORKLOADS: Mapping[str, Workload] = {
    work.name: work
    for work in (
        Workload("llama", "LlamaForCausalLM", LLAMA, 2, 128, "hidden 512, 4 layers, 8 heads on 4, 2 x 128 tokens"),
        Workload("llama-small", "LlamaForCausalLM", SMALL, 1, 16, "hidden 128, 4 layers, 16 tokens: overhead", 2),
        Workload("gpt2", "GPT2LMHeadModel", GPT2, 2, 128, "hidden 512, 4 layers, packed q, k and v, 2 x 128 tokens"),
        Workload("gpt-neox", "GPTNeoXForCausalLM", NEOX, 2, 128, "parallel residual with two norms, hidden 512"),
        Workload("phi", "PhiForCausalLM", PHI, 2, 128, "parallel residual with one norm, hidden 512"),
        Workload("qwen3", "Qwen3ForCausalLM", QWEN3, 2, 128, "llama with q_norm and k_norm, tied head"),
        Workload("bert", "BertForMaskedLM", BERT, 2, 128, "norms after the residual, no causal mask, hidden 512"),
    )
}

LARGE: Mapping[str, Workload] = {
    name: Workload(
        name,
        "LlamaForCausalLM",
        {
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 4, "num_attention_heads": heads,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False,
        },
        1, 4096, f"4 layers of Llama-3-{size}, its embedding and its head, 1 x 4096 tokens",
    )
    for name, size, hidden, inner, heads in (
        ("llama-8b", "8B", 4096, 14336, 32), ("llama-70b", "70B", 8192, 28672, 64),
    )
}  # fmt: skip
"""For a GPU (Grattafiori et al. 2024, table 3)."""


class Widened(TorchFunctionMode):
    """Models cast to float32 inside, whatever they hold: a comparison in float64 makes these casts float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {torch.float32: torch.float64}
        args = [wide.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
        kwargs = {k: wide.get(x, x) if isinstance(x, torch.dtype) else x for k, x in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def tiny(name: str) -> Workload:
    """The workload at a size for tests: 2 layers, hidden 32, 2 x 6 tokens."""
    work = WORKLOADS[name]
    sizes = {
        "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "n_inner": 48, "vocab_size": 64, "head_dim": 8,
        "max_position_embeddings": 16, "n_positions": 16,
    }  # fmt: skip
    config = {key: sizes.get(key, value) for key, value in work.config.items()}
    return Workload(f"tiny {name}", work.cls, config, 2, 6, work.says)
