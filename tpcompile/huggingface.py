"""Models of transformers by ``hf:...``: configs, classes, weights drawn or read, and none at all.

Nothing is ever downloaded. transformers is imported only where a model needs it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from tpcompile.errors import TpcompileError, did_you_mean, reported
from tpcompile.example_inputs import SEED


def from_text(text: str, *, weights: bool, dtype: torch.dtype | None) -> nn.Module:
    """The model of ``hf:TARGET[:CLASS][?KEY=VALUE,...]``, in eval mode; without ``weights`` on the meta device."""
    target, class_name, changes = _parse(text)
    with _offline():
        transformers = _transformers()
        config, directory, gguf = _config(transformers, text, target)
        config = _changed(config, changes, text)
        cls = usual_class(config, text, class_name)
        stored = gguf or (directory is not None and any(directory.glob("*.safetensors")))
        if weights and stored and directory is not None and not changes:
            source = {"gguf_file": gguf} if gguf else {}
            with reported(f"{text}: the weights cannot be read"):
                model = cls.from_pretrained(
                    str(directory), config=config, local_files_only=True, dtype=dtype or "auto", **source
                )
            return model.eval()
        return build(config, cls, weights=weights, dtype=dtype, label=text)


def tokenizer(text: str) -> Any:
    """The tokenizer beside the weights that ``hf:DIRECTORY`` or ``hf:FILE.gguf`` names."""
    if not text.startswith("hf:"):
        raise TpcompileError(
            f"{text} has no tokenizer",
            why="one is looked for beside the weights of a transformers model",
            help="write hf: and the path of a model's directory or GGUF file",
        )
    target, _, _ = _parse(text)
    with _offline():
        transformers = _transformers()
        _, directory, gguf = _config(transformers, text, target)
        if directory is None:
            raise TpcompileError(
                f"{text} has no tokenizer",
                why="a model type has neither weights nor words",
                help="write hf: and the path of a model's directory or GGUF file",
            )
        with reported(f"{text}: the tokenizer cannot be read"):
            source = {"gguf_file": gguf} if gguf else {}
            return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, **source)


def build(
    config: Any, cls: Any = None, *, weights: bool = True, dtype: torch.dtype | None = None, label: str | None = None
) -> nn.Module:
    """The model of a transformers ``config``, in eval mode; ``cls`` is the usual class with a head unless given.

    Weights are drawn, the same ones every time and none of them constant; without ``weights`` it is on the meta device.
    """
    text = label or type(config).__name__
    with _offline(), reported(f"{text}: the model cannot be built from this config"):
        cls = cls or usual_class(config, text)
        kept = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
        if not weights:
            return _on_meta(cls, config, kept).eval()
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):  # it may need real tensors
            _refuse_too_large(_on_meta(cls, config, kept), text)
        with torch.random.fork_rng(devices=[]), _default_dtype(kept):
            torch.manual_seed(SEED)
            model = cls(config)
            _perturb(model)
    return model.eval()


def config_and_class(place: Path) -> tuple[Any, Any]:
    """The config of a directory with config.json, or of a GGUF file, and the class that it is of, which is imported."""
    with _offline():
        config, _, _ = _config(_transformers(), str(place), str(place))
        return config, usual_class(config, str(place))


def without_weights(directory: Path, dtype: torch.dtype | None, stored: torch.dtype) -> nn.Module:
    """The model of a directory's config.json, or of a GGUF file, in eval mode: parameters on meta, buffers real.

    Its dtype is ``dtype``, or that of the config, or else ``stored``; what transformers keeps in float32, it keeps too.
    """
    text = str(directory)
    with _offline(), reported(f"{text}: the model cannot be built from its config"):
        config, cls = config_and_class(directory)
        if getattr(config, "quantization_config", None) is not None:
            raise TpcompileError(
                f"{text}: the weights are quantized",
                why="only plain tensors of safetensors files, and GGUF files, can be read in parts",
                help="load the model with transformers, dequantize it, and save it with save_pretrained",
            )
        kept = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else stored)
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            if part is not None:
                part.dtype = kept
        with torch.random.fork_rng(devices=[]), _default_dtype(kept), _parameters_on_meta():
            torch.manual_seed(SEED)
            model: Any = cls(config)
        if (directory / "generation_config.json").exists() and model.can_generate():
            model.generation_config = _transformers().GenerationConfig.from_pretrained(text, local_files_only=True)
        if plan := model._get_dtype_plan(kept):
            loading: Any = importlib.import_module("transformers.core_model_loading")
            pattern, group_names, _ = loading.build_glob_alternation(list(plan))
            for name, parameter in model.named_parameters():
                if found := pattern.search(name):
                    parameter.data = parameter.data.to(plan[group_names[found.lastgroup]])
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Generator[None]:
    """A parameter loses its value as soon as a module has it; what several modules share stays shared."""
    register = nn.Module.register_parameter
    made = WeakIdKeyDictionary()

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in made:
                made[param] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
            param = made[param]
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _on_meta(cls: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"), _default_dtype(dtype):
        return cls(config)


def _parse(text: str) -> tuple[str, str | None, dict[str, Any]]:
    """``hf:TARGET[:CLASS][?KEY=VALUE,...]``."""
    target, _, query = text.removeprefix("hf:").partition("?")
    target, _, class_name = target.partition(":")
    changes: dict[str, Any] = {}
    for item in filter(None, query.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise TpcompileError(
                f"{item!r} in {text!r} is not KEY=VALUE",
                help="write hf:gpt2?n_layer=2,n_embd=64",
            )
        try:
            changes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    if not target:
        raise TpcompileError(
            f"{text!r} names no model",
            help="write hf:gpt2, or hf: and the path of a directory or config.json",
        )
    return target, class_name or None, changes


def _config(transformers: Any, text: str, target: str) -> tuple[Any, Path | None, str | None]:
    """The config that ``target`` names, the directory that it is in, and the GGUF file there that it is in."""
    path = Path(target).expanduser()
    if path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(gguf) != 1:
            found = f"it holds {len(gguf)} .gguf files" if gguf else "it holds neither config.json nor a .gguf file"
            help = "name the file itself" if gguf else "download a model there: hf download NAME --local-dir DIR"
            raise TpcompileError(f"{target} is not the directory of a model", why=found, help=help)
        path = path / "config.json" if (path / "config.json").exists() else gguf[0]
    if path.is_file() and path.suffix == ".gguf":
        with reported(f"{text}: the GGUF file cannot be read"):
            if not _installed("gguf"):
                raise TpcompileError(f"{text}: reading GGUF needs the gguf package", help="pip install gguf")
            config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return config, path.parent, path.name
    if path.is_file():
        with reported(f"{text}: {path} is not a config.json of transformers"):
            values = json.loads(path.read_text())
            kind = values.pop("model_type", None)
            if kind is None:
                raise TpcompileError(f"{text}: {path} has no model_type", help="it must be the config.json of a model")
            return _of_type(transformers, kind, text, values), path.parent, None
    if os.sep in target or path.suffix in (".json", ".gguf"):
        raise TpcompileError(
            f"{text}: there is no {target}",
            why="a model is looked for on this disk only; nothing is downloaded",
            help="download it first (hf download NAME --local-dir DIR) and write hf:DIR, or name a type: hf:llama",
        )
    return _of_type(transformers, target, text, {}), None, None


def _of_type(transformers: Any, kind: str, text: str, values: Mapping[str, Any]) -> Any:
    known = list(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        raise TpcompileError(
            f"{text}: transformers {transformers.__version__} knows no model type {kind!r}",
            help=did_you_mean(kind, known) or "name a type such as llama, or the path of a config.json",
        )
    return transformers.CONFIG_MAPPING[kind].from_dict(dict(values))


def _changed(config: Any, changes: Mapping[str, Any], text: str) -> Any:
    """``config`` made again with some values changed, so that what derives from them is derived again."""
    if not changes:
        return config
    for key in changes:
        if not hasattr(config, key):
            known = [name for name in config.to_dict() if not name.startswith("_")]
            raise TpcompileError(
                f"{text}: {type(config).__name__} has no {key!r}",
                help=did_you_mean(key, known) or f"it has {', '.join(sorted(known)[:12])}, ...",
            )
    stored = config.to_diff_dict()
    for key, value in stored.items():  # one entry a layer: as many as there are layers now
        for changed, new in changes.items():
            if isinstance(value, list) and key not in changes and len(value) == getattr(config, changed) and new:
                stored[key] = (value * -(-new // len(value)))[:new]
    with reported(f"{text}: {type(config).__name__} does not take these values"):
        return type(config).from_dict({**stored, **changes})


_HEADS = (  # the usual class of a model type: the first of these tables that has it
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
_PAIRS = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")  # encoder-decoder


def usual_class(config: Any, text: str, class_name: str | None = None) -> Any:
    """The class to build: the one asked for, the one the config was saved with, or the usual one with a head."""
    transformers = _transformers()
    if class_name is not None:
        cls = getattr(transformers, class_name, None)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            prefix = type(config).__name__.removesuffix("Config")
            known = [name for name in dir(transformers) if name.startswith(prefix) and not name.endswith("Config")]
            raise TpcompileError(
                f"{text}: transformers has no model class {class_name!r}",
                help=did_you_mean(class_name, known) or f"classes of this type: {', '.join(sorted(known)[:12])}",
            )
        return cls
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    found: list[Any] = []
    for table in (*(_PAIRS if config.is_encoder_decoder else ()), *_HEADS):
        name = getattr(tables, table, {}).get(config.model_type)
        name = name[0] if isinstance(name, tuple) else name
        if name is not None and hasattr(transformers, name):
            found.append(getattr(transformers, name))
    found += classes(type(config))
    own = [cls for cls in found if getattr(cls, "config_class", None) is type(config)]  # not the class of a part
    if found:
        return [*own, *found][0]
    raise TpcompileError(
        f"{text}: transformers has no model class for the type {config.model_type!r}",
        help="name one: hf:TYPE:CLASS",
    )


def classes(config_class: type) -> list[Any]:
    """The public model classes of transformers that are made from ``config_class``, those with a head first."""
    package, _, name = config_class.__module__.rpartition(".")
    try:
        module = importlib.import_module(f"{package}.{name.replace('configuration', 'modeling', 1)}")
    except ImportError:
        return []
    found = [getattr(module, known) for known in getattr(module, "__all__", ())]
    own = [cls for cls in found if isinstance(cls, type) and getattr(cls, "config_class", None) is config_class]
    return sorted(
        (cls for cls in own if "PreTrained" not in cls.__name__), key=lambda cls: cls.__name__.endswith("Model")
    )


def _refuse_too_large(model: nn.Module, text: str) -> None:
    need = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if need > 0.9 * have:
        count = sum(parameter.numel() for parameter in model.parameters())
        raise TpcompileError(
            f"{text} has {count / 1e9:.1f} billion parameters: {need / 2**30:.0f} GiB, "
            f"and {have / 2**30:.0f} GiB of memory are free",
            why="this needs the weights themselves, and they are drawn in memory",
            help="make it smaller, for instance hf:TYPE?num_hidden_layers=2; show, comm and explain need no weights",
        )


def _perturb(model: nn.Module) -> None:
    """Make no parameter constant: an error in the bias of zeros, or the norm weight of ones, must show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise TpcompileError(
            "a model hf:... needs the transformers package",
            why=str(error),
            help="pip install 'tpcompile[hf]'",
        ) from error


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def _offline() -> Generator[None]:
    """Keep transformers off the network and off the terminal."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    hub: Any = importlib.import_module("huggingface_hub.constants") if _installed("huggingface_hub") else None
    offline = getattr(hub, "HF_HUB_OFFLINE", None)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        log: Any = importlib.import_module("transformers.utils.logging") if _installed("transformers") else None
        verbosity = log.get_verbosity() if log is not None else 0
        if log is not None:
            log.set_verbosity(log.CRITICAL)
        if hub is not None:
            hub.HF_HUB_OFFLINE = True  # read from the environment only once, when it is imported
        try:
            yield
        finally:
            if log is not None:
                log.set_verbosity(verbosity)
            if hub is not None:
                hub.HF_HUB_OFFLINE = offline
            if before is None:
                os.environ.pop("HF_HUB_OFFLINE", None)
            else:
                os.environ["HF_HUB_OFFLINE"] = before


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
