"""MODEL strings and default example inputs (placeholder)."""
from __future__ import annotations
from typing import Any
import torch
from torch import nn
from tpcompile.errors import CaptureError


def default_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config = getattr(model, "config", None)
    if config is None:
        raise CaptureError("example_inputs are needed", help="pass example_inputs=(tensor,) or dict(name=tensor)")
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return (), {"pixel_values": torch.randn(2, config.num_channels, config.image_size, config.image_size)}
    ids = torch.randint(0, config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    kwargs: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids[:, :5].clone()
    if hasattr(config, "use_cache"):
        kwargs["use_cache"] = False
    return (), kwargs
