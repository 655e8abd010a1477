"""Example inputs for models of transformers, which can say what they eat."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tpcompile.errors import CaptureError, reported

SEED = 0  # every process that loads a MODEL draws the same inputs, and the same weights


def default_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of an example call of a transformers model: batch 2, a short sequence, on the model's device.

    What the model eats is read from its ``main_input_name``, signature and config. Raises `CaptureError` for any other
    model.
    """
    config = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters
    main = _main_input(model, config, parameters)
    if config is None or main not in _MAKERS:
        name = type(model).__name__
        raise CaptureError(
            f"example inputs are needed for {name}",
            why="sizes and dtypes of what it eats cannot be known from the module"
            if config is None
            else f"its main input is {main!r}, for which no example can be made",
            help="pass example_inputs=(torch.randn(2, 16),), or a dict of keyword arguments; on the command line, let "
            "the function return (model, example inputs)",
        )
    kwargs: dict[str, Any] = {}
    with reported(f"no example inputs can be made for {type(model).__name__} from its config"):
        for name in dict.fromkeys((main, *_other_inputs(config, main, parameters))):
            kwargs[name] = _MAKERS[name](config, kwargs)
    cached = hasattr(config, "use_cache") or (main == "input_ids" and _find(config, "use_cache") is not None)
    if "use_cache" in parameters or (cached and _takes_any_keyword(parameters)):
        kwargs["use_cache"] = False
    parameter = next(model.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        kwargs = {k: v.to(parameter.device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    if parameter is not None:
        floats = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        kwargs.update({k: v.to(parameter.dtype) for k, v in floats.items()})
    return (), kwargs


_BATCH, _LENGTH = 2, 8
_SEVERAL = ("input_ids", "pixel_values", "input_features", "input_values", "pixel_values_videos")  # of dual encoders
_ALSO = {"bridgetower": "pixel_values", "vilt": "pixel_values", "tvp": "pixel_values", "flava": "pixel_values"}


def _main_input(model: nn.Module, config: Any, parameters: Mapping[str, inspect.Parameter]) -> str:
    """The input that the model's class names, or the first of its forward: many classes inherit ``input_ids``."""
    declared = str(getattr(model, "main_input_name", None))
    first = next(iter(parameters), declared)
    if declared in parameters and (declared != "input_ids" or first == "input_ids" or _find(config, "vocab_size")):
        return declared
    return declared if first in ("args", "kwargs", "input") else first


def _other_inputs(config: Any, main: str, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Further inputs, without which the model does not run."""
    names = [name for name, parameter in parameters.items() if is_required(parameter) and name in _MAKERS]
    if main == "pixel_values" and _find(config, "vocab_size"):
        names.append("input_ids")
    if "return_loss" in parameters or hasattr(config, "logit_scale_init_value"):
        names += _SEVERAL
    names += ["bbox", "visual_feats", "visual_pos", _ALSO.get(config.model_type, main)]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return [name for name in names if name in parameters]


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a call must give it."""
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def _takes_any_keyword(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _find(config: Any, *names: str) -> Any:
    """The first of the names that the config has a value for, or one of the configs inside it."""
    for name in names:
        if (value := vars(config).get(name)) is not None:
            return value
    for part in vars(config).values():
        if hasattr(part, "model_type") and (value := _find(part, *names)) is not None:
            return value
    return None


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def _tokens(config: Any, length: int, seed: int) -> torch.Tensor:
    """Token ids ``[2, length]``, none of them special, within vocabulary and positions."""
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # there are several
        text = config.get_text_config(decoder=seed == 1, encoder=seed == 0)
    special = [getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "sep", "decoder_start")]
    special += [value for key, value in vars(config).items() if key.endswith(("token_id", "token_index"))]
    listed = {token for value in special for token in (value if isinstance(value, list) else [value])}
    known = getattr(text, "vocab_size", None) or _find(config, "vocab_size") or 96
    usable = [token for token in range(min(int(known), 256)) if token not in listed]
    positions = getattr(text, "max_position_embeddings", None)
    length = min(length, positions) if isinstance(positions, int) and positions > 0 else length
    choice = torch.randint(len(usable), (_BATCH, length), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(usable)[choice]


def _ids(config: Any, _: dict[str, Any]) -> torch.Tensor:
    return _tokens(config, _LENGTH, seed=0)


def _image(config: Any) -> tuple[int, int, int]:
    """Channels, height and width."""
    vision = getattr(config, "vision_config", config)
    size = _find(vision, "image_size", "img_size", "crop_size") or 64  # a convolutional model takes any
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(_find(vision, "num_channels", "in_channels", "in_chans") or 3), int(height), int(width)


def _pixels(config: Any, _: dict[str, Any]) -> torch.Tensor:
    frames = _find(config, "num_frames") if config.model_type in _VIDEO else None
    pair = 2 if config.model_type in ("lightglue", "superglue") else None
    return _noise(_BATCH, *filter(None, (frames, pair)), *_image(config))


_VIDEO = frozenset(("timesformer", "videomae", "vivit", "xclip"))


def _video(config: Any, _: dict[str, Any]) -> torch.Tensor:
    return _noise(_BATCH, int(_find(config, "num_frames", "frames_per_clip") or 4), *_image(config))


def _waveform(config: Any, _: dict[str, Any]) -> torch.Tensor:
    if (mel := _find(config, "num_mel_bins")) and (length := getattr(config, "max_length", None)):
        return _noise(_BATCH, int(length), int(mel))
    stride = _find(config, "conv_stride", "downsampling_ratios", "upsampling_ratios", "hop_length") or [320]
    samples = 20 * max(1, math.prod(stride if isinstance(stride, list | tuple) else [stride]))
    mono = config.model_type in _CODECS or _find(config, "audio_channels") is not None
    return _noise(_BATCH, *([1] if mono else []), samples)


_CODECS = frozenset(("dac", "neucodec", "vibevoice_acoustic_tokenizer", "xcodec", "xcodec2"))


def _spectrogram(config: Any, _: dict[str, Any]) -> torch.Tensor:
    bins = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim") or 80
    if config.model_type in ("clvp", "glmasr_encoder"):
        return _noise(_BATCH, int(bins), 4 * _LENGTH)
    positions = vars(config).get("max_source_positions") if "num_mel_bins" in vars(config) else None
    if positions and not vars(config).get("feature_projection_input_dim"):
        return _noise(_BATCH, int(bins), 2 * int(positions))
    return _noise(_BATCH, 4 * _LENGTH, int(bins))


def _mask(_: Any, given: dict[str, Any]) -> torch.Tensor:
    """Of ones, for the input that came first."""
    return torch.ones(next(iter(given.values())).shape[:2], dtype=torch.long)


def _boxes(_: Any, given: dict[str, Any]) -> torch.Tensor:
    """One ``[left, top, right, bottom]`` a token."""
    corner = 10 * torch.arange(given["input_ids"].shape[1])[:, None]
    return (corner + torch.tensor([1, 2, 8, 9])).expand(_BATCH, -1, -1).clone()


def _hidden(config: Any, _: dict[str, Any]) -> torch.Tensor:
    return _noise(_BATCH, 2 * _LENGTH, int(_find(config, "input_dim", "hidden_size", "d_model", "embed_dim")))


def _patches(config: Any, _: dict[str, Any]) -> torch.Tensor:
    """Row and column from 1, then the pixels of a patch."""
    width = int(_find(config, "num_channels") or 3) * int(_find(config, "patch_size") or 16) ** 2
    places = 1 + torch.stack((torch.arange(16) // 4, torch.arange(16) % 4), dim=1).expand(_BATCH, -1, -1)
    return torch.cat((places.float(), _noise(_BATCH, 16, width)), dim=2)


def _series(config: Any, _: dict[str, Any]) -> torch.Tensor:
    channels = _find(config, "num_input_channels")
    length = int(_find(config, "context_length"))
    return _noise(_BATCH, length, int(channels)) if channels else _noise(_BATCH, length)


_MAKERS: Mapping[str, Callable[[Any, dict[str, Any]], torch.Tensor]] = {
    "input_ids": _ids,
    "inputs": _ids,
    "qformer_input_ids": _ids,
    "decoder_input_ids": lambda config, _: _tokens(config, _LENGTH - 2, seed=1),
    "bbox": _boxes,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "flattened_patches": _patches,
    "visual_feats": lambda config, _: _noise(_BATCH, 6, int(config.visual_feat_dim)),
    "visual_pos": lambda config, _: _noise(_BATCH, 6, int(config.visual_pos_dim)),
    "input_values": _waveform,
    "input_features": _spectrogram,
    "input_features_mask": _mask,
    "hidden_states": _hidden,
    "query_embeds": _hidden,
    "inputs_embeds": _hidden,
    "past_values": _series,
    "spectrogram": lambda config, _: _noise(_BATCH, 4 * _LENGTH, int(config.model_in_dim)),
}
