"""MODEL, as the command line takes it.

hf:llama                       a model type of transformers, with the library's default config
hf:gpt2:GPT2Model              the same, in another class than the usual one with a head
hf:gpt2?n_layer=2,n_embd=64    the same, with some config values changed
hf:DIR  hf:DIR/config.json  hf:FILE.gguf     a config, or a config with weights, on this disk
file.py:function               a function that returns a module, or (module, example inputs)
package.module:function        the same
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from tpcompile import huggingface
from tpcompile.errors import TpcompileError, Where, did_you_mean
from tpcompile.example_inputs import SEED, default_inputs, is_required
from tpcompile.source_lines import TORCH


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
        model = huggingface.from_text(text, weights=weights, dtype=dtype)
        args, kwargs = default_inputs(model)
    else:
        model, args, kwargs = _from_function(text, weights=weights)
        if dtype is not None:
            model = model.to(dtype)
            args, kwargs = _to_dtype(args, dtype), _to_dtype(kwargs, dtype)
    return Loaded(model, args, kwargs, text)


def _to_dtype(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value)


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
            help=did_you_mean(name, known) or f"it has {', '.join(known) or 'nothing that can be called'}",
        )
    function = getattr(module, name)
    returned = function if isinstance(function, nn.Module) else _called(function, text, weights=weights)
    return _module_and_inputs(returned, text)


def _imported_file(path: Path, text: str) -> Any:
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        help = did_you_mean(path.name, near) or f"paths are relative to {os.getcwd()}"
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
    required = [p.name for p in inspect.signature(function).parameters.values() if is_required(p)]
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
