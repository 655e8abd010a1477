"""MODEL, as the command line takes it, and example inputs for models that can say what they eat.

    hf:llama                       a model type of transformers, with the library's default config
    hf:gpt2:GPT2Model              the same, in another class than the usual one with a head
    hf:gpt2?n_layer=2,n_embd=64    the same, with some config values changed
    hf:DIR  hf:DIR/config.json  hf:FILE.gguf     a config, or a config with weights, on this disk
    file.py:function               a function that returns a module, or (module, example inputs)
    package.module:function        the same

Nothing is ever downloaded. transformers is imported only where a model needs it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from tpcompile.errors import CaptureError, TpcompileError, Where
from tpcompile.source_lines import TORCH

SEED = 0  # every process that loads a MODEL draws the same weights


@dataclass(frozen=True)
class Loaded:
    """A model and example inputs for it: ``model(*args, **kwargs)`` is a call."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str  # MODEL, as it was written


def load(text: str, *, weights: bool, dtype: torch.dtype | None = None) -> Loaded:
    """The model that ``text`` (see above) stands for.

    Without ``weights`` it is built on the meta device: at once, and however large it is. With ``weights``, they are
    read where the directory has them, and drawn otherwise: the same ones every time, and none of them constant (a bias
    of zeros would hide errors). A Hugging Face model comes in eval mode, one of a function as the function leaves it.

    Raises `TpcompileError` for a text that stands for no model, and for a function that fails.
    """
    if text.startswith("hf:"):
        model = _huggingface(text, weights=weights, dtype=dtype)
        args, kwargs = default_inputs(model)
    else:
        model, args, kwargs = _from_function(text, weights=weights)
        if dtype is not None:
            model = model.to(dtype)
            args, kwargs = _to_dtype(args, dtype), _to_dtype(kwargs, dtype)
    return Loaded(model, args, kwargs, text)


def _to_dtype(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)


# ---------------------------------------------------------------- hf:...


def _huggingface(text: str, *, weights: bool, dtype: torch.dtype | None) -> nn.Module:
    target, class_name, changes = _parse(text)
    with _offline():
        transformers = _transformers()
        config, directory, gguf = _config(transformers, text, target)
        config = _changed(config, changes, text)
        cls = usual_class(config, text, class_name)
        stored = gguf or (directory is not None and any(directory.glob("*.safetensors")))
        if weights and stored and directory is not None and not changes:
            source = {"gguf_file": gguf} if gguf else {}
            with _reported(f"{text}: the weights cannot be read"):
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
        with _reported(f"{text}: the tokenizer cannot be read"):
            source = {"gguf_file": gguf} if gguf else {}
            return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, **source)


def build(
    config: Any, cls: Any = None, *, weights: bool = True, dtype: torch.dtype | None = None, label: str | None = None
) -> nn.Module:
    """The model of a transformers ``config``, in eval mode; ``cls`` is the usual class with a head unless given.

    Weights are drawn, the same ones every time and none of them constant; without ``weights`` it is on the meta device.
    """
    text = label or type(config).__name__
    with _offline(), _reported(f"{text}: the model cannot be built from this config"):
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
    with _offline(), _reported(f"{text}: the model cannot be built from its config"):
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
        with _reported(f"{text}: the GGUF file cannot be read"):
            if not _installed("gguf"):
                raise TpcompileError(f"{text}: reading GGUF needs the gguf package", help="pip install gguf")
            config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return config, path.parent, path.name
    if path.is_file():
        with _reported(f"{text}: {path} is not a config.json of transformers"):
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
            help=_did_you_mean(kind, known) or "name a type such as llama, or the path of a config.json",
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
                help=_did_you_mean(key, known) or f"it has {', '.join(sorted(known)[:12])}, ...",
            )
    stored = config.to_diff_dict()
    for key, value in stored.items():  # one entry a layer: as many as there are layers now
        for changed, new in changes.items():
            if isinstance(value, list) and key not in changes and len(value) == getattr(config, changed) and new:
                stored[key] = (value * -(-new // len(value)))[:new]
    with _reported(f"{text}: {type(config).__name__} does not take these values"):
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
                help=_did_you_mean(class_name, known) or f"classes of this type: {', '.join(sorted(known)[:12])}",
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


@contextlib.contextmanager
def _reported(what: str) -> Generator[None]:
    """Whatever a library raises, as one error for users."""
    try:
        yield
    except TpcompileError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise TpcompileError(what, why=f"{type(error).__name__}: {said[:300]}") from error


def _did_you_mean(word: str, known: list[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else None


# ---------------------------------------------------------------- file.py:function


def _from_function(text: str, *, weights: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        bare = text.rstrip(":")
        types = [bare] if "/" in bare or bare.endswith(".py") else [f"hf:{bare}"]
        raise TpcompileError(
            f"{text!r} is not a MODEL",
            help=f"write {types[0]} for a model type of transformers, or file.py:function, or package.module:function"
            if types[0].startswith("hf:")
            else f"write {bare}:function, with the name of a function that returns the model",
        )
    module = _imported_file(Path(place), text) if place.endswith(".py") else _imported_module(place, text)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TpcompileError(
            f"{text}: {place} has no {name!r}",
            help=_did_you_mean(name, known) or f"it has {', '.join(known) or 'nothing that can be called'}",
        )
    function = getattr(module, name)
    returned = function if isinstance(function, nn.Module) else _called(function, text, weights=weights)
    return _module_and_inputs(returned, text)


def _imported_file(path: Path, text: str) -> Any:
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        help = _did_you_mean(path.name, near) or f"paths are relative to {os.getcwd()}"
        raise TpcompileError(f"{text}: there is no file {path}", help=help)
    name = f"tpcompile_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class up by its module
    sys.path.insert(0, str(path.resolve().parent))  # a script may import its neighbours
    try:
        with _users(text, f"{path} cannot be imported"):
            spec.loader.exec_module(module)
    except TpcompileError:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _imported_module(name: str, text: str) -> Any:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        if not name or not all(part.isidentifier() for part in name.split(".")):
            raise TpcompileError(
                f"{text!r} is not a MODEL",
                why=f"{name!r} is neither a file that ends in .py nor the name of a Python module",
                help="write hf:TYPE, file.py:function or package.module:function",
            )
        with _users(text, f"module {name} cannot be imported"):
            return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(here)


def _called(function: Any, text: str, *, weights: bool) -> Any:
    if not callable(function):
        raise TpcompileError(
            f"{text} is a {type(function).__name__}, not a function",
            help="name a function without arguments that returns an nn.Module, or (module, example inputs)",
        )
    required = [p.name for p in inspect.signature(function).parameters.values() if _is_required(p)]
    if required:
        raise TpcompileError(
            f"{text} needs arguments: {', '.join(required)}",
            help="name a function without arguments; write one that calls it with those you want",
        )
    failed = f"{text} failed"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if not weights:
            try:
                with torch.device("meta"):
                    return function()
            except Exception:  # noqa: BLE001  (it needs real tensors: it gets them)
                torch.manual_seed(SEED)
        with _users(text, failed):
            return function()


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


@contextlib.contextmanager
def _users(text: str, what: str) -> Generator[None]:
    """An error of the user's own code, at the user's own line."""
    try:
        yield
    except TpcompileError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = [frame for frame in frames if not frame.filename.startswith("<") and "importlib" not in frame.filename]
        own = [frame for frame in own if not frame.filename.startswith(TORCH)] or own
        where = Where(file=_relative(own[-1].filename), line=own[-1].lineno, text=own[-1].line) if own else None
        if isinstance(error, SyntaxError) and error.filename:
            line = (error.text or "").strip() or None
            where = Where(file=_relative(error.filename), line=error.lineno, text=line)
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise TpcompileError(what, where=where, why=f"{type(error).__name__}: {said}") from error


def _relative(file: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


def _module_and_inputs(returned: Any, text: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    match returned:
        case nn.Module() as model:
            args, kwargs = default_inputs(model)
        case (nn.Module() as model, dict() as kwargs):
            args = ()
        case (nn.Module() as model, tuple() | list() as given):
            args, kwargs = tuple(given), {}
        case (nn.Module() as model, torch.Tensor() as tensor):
            args, kwargs = (tensor,), {}
        case _:
            kind = type(returned).__name__
            shown = f"({', '.join(type(item).__name__ for item in returned)})" if isinstance(returned, tuple) else kind
            raise TpcompileError(
                f"{text} returned {shown}",
                why="it must return an nn.Module, or (module, example inputs)",
                help="return model, (x,) or return model, {'input_ids': ids}",
            )
    return model, _real(args), _real(kwargs)


def _real(value: Any) -> Any:
    """``value`` with tensors on cpu where they were made on meta: zeros for integers, noise for floats."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return pytree.tree_map_only(torch.Tensor, real, value)


# ---------------------------------------------------------------- example inputs


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
    with _reported(f"no example inputs can be made for {type(model).__name__} from its config"):
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
    names = [name for name, parameter in parameters.items() if _is_required(parameter) and name in _MAKERS]
    if main == "pixel_values" and _find(config, "vocab_size"):
        names.append("input_ids")
    if "return_loss" in parameters or hasattr(config, "logit_scale_init_value"):
        names += _SEVERAL
    names += ["bbox", "visual_feats", "visual_pos", _ALSO.get(config.model_type, main)]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return [name for name in names if name in parameters]


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
