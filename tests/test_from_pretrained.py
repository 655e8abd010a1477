"""Checkpoint directories on N ranks: what transformers loads and one device computes, no byte more than it takes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from distributed import run
from safetensors.torch import load_file, save_file
from torch import nn

import tpcompile
from tpcompile import checkpoint_files, checkpoint_sources, huggingface, pretrained, shards
from tpcompile.checkpoint_files import Checkpoint, spans
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.compiler import rewrite
from tpcompile.errors import TpcompileError
from tpcompile.layout import Layout, axes_of

configs: Any = transformers
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 131, "intermediate_size": 76}
LLAMA: dict[str, Any] = {**LAYERS, "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64}
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "gpt2": lambda: configs.GPT2Config(
        n_layer=2, n_embd=48, n_head=6, vocab_size=131, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: configs.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "bert": lambda: configs.BertConfig(**LAYERS, num_attention_heads=6, max_position_embeddings=64),
}
"""GPT-2 with Conv1D, packed q, k and v and a tied head; Llama with 3 kv heads; BERT with a tied head and its bias."""

Cut = Callable[[nn.Module, Path], None]


def saved(name: str, directory: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Path:
    """A model with random weights as save_pretrained leaves it."""
    model: Any = huggingface.build(CONFIGS[name](), dtype=dtype)
    model.save_pretrained(directory, **options)
    return directory


def loaded(directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The oracle: transformers' own from_pretrained."""
    (name,) = configs.AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, name).from_pretrained(directory, dtype=dtype or "auto")


def parts(directory: Path, degree: int, dtype: torch.dtype | None = None) -> float:
    """The worst difference of any rank's part of any parameter or buffer from that of the loaded model; must be 0."""
    oracle = loaded(directory, dtype)
    wanted = {**dict(oracle.named_parameters()), **dict(oracle.named_buffers())}
    worst = 0.0
    with Checkpoint(directory) as files:
        model = huggingface.without_weights(directory, dtype, torch.float32)
        assert all(p.is_meta for p in model.parameters())
        sources = pretrained.sources_of(model, files, directory)
        pretrained._fill_buffers(model, files, sources)
        program = rewrite(model, degree=degree)
        assert any(axes_of(d) for dims in program.parameters.values() for d in dims), "something is cut"
        for rank in range(degree):
            read = pretrained.reader(files, sources, program, rank)
            for name in program.captured.parameters:
                dims = program.parameters.get(name, ())
                expected, got = shards.cut(wanted[name].detach(), dims, program.mesh, rank), read(name)
                assert got.dtype == expected.dtype, name
                worst = max(worst, relative_error(expected, got))
        for name, buffer in model.named_buffers():
            assert buffer.dtype == wanted[name].dtype
            assert torch.equal(buffer, wanted[name]), name
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    """Bitwise, for an even and an uneven cut, from one file and from several."""
    assert parts(saved(name, tmp_path / "one"), 2) == 0.0
    several = saved(name, tmp_path / "several", max_shard_size="60KB")
    assert len(list(several.glob("*.safetensors"))) > 2
    assert parts(several, 3) == 0.0


def test_dtypes_are_converted_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "STAGED", 100)  # elements: parts are many times as large
    directory = saved("gpt2", tmp_path, torch.float32)
    assert parts(directory, 3, torch.bfloat16) == 0.0
    assert parts(directory, 2, torch.float64) == 0.0


def test_a_wrong_slice_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: one element too far, or the parts of another rank."""
    directory, right = saved("gpt2", tmp_path), pretrained.held_by

    def wrong(dims: tuple[Layout, ...], shape: tuple[int, ...], mesh: Any, rank: int) -> Any:
        return right(dims, shape, mesh, rank ^ 1)

    monkeypatch.setattr(pretrained, "held_by", wrong)
    assert parts(directory, 2) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint_files, "spans", lambda *a: ((max(0, first - 1), n) for first, n in spans(*a)))
    assert parts(directory, 2) > 1e-3


def test_a_rank_reads_its_parts_and_no_more(tmp_path: Path) -> None:
    config = configs.LlamaConfig(**{**LLAMA, "hidden_size": 192, "intermediate_size": 520, "vocab_size": 1001})
    model: Any = huggingface.build(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    model = huggingface.without_weights(tmp_path, None, torch.float32)
    program = rewrite(model, degree=3)
    for rank in range(3):
        with Checkpoint(tmp_path) as files:
            sources = pretrained.sources_of(model, files, tmp_path)
            read = pretrained.reader(files, sources, program, rank)
            held = sum(x.numel() * x.element_size() for x in map(read, program.captured.parameters))
            files.fingerprint()
            assert held < 0.4 * (tmp_path / "model.safetensors").stat().st_size
            assert held < files.bytes_read < 1.01 * held


# ---------------------------------------------------------------------------------------------------- real processes
def answers(directories: Sequence[str], dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """On one rank, per checkpoint: errors of outputs and of gradients, and the share of the parameters held."""
    torch.set_num_threads(1)
    found: list[tuple[float, float, float]] = []
    for directory in directories:
        one, tp = loaded(Path(directory), dtype), tpcompile.from_pretrained(directory, dtype=dtype)
        ids = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids} | ({} if directory.endswith("bert") else {"use_cache": False})
        expected, got = one(**inputs).logits, tp(**inputs).logits
        backward(expected)
        backward(got)
        wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        share = sum(p.numel() for p in tp.parameters()) / sum(p.numel() for p in one.parameters())
        state = tpcompile.full_state_dict(tp)
        assert state.keys() == one.state_dict().keys()
        assert all(torch.equal(x, state[n]) for n, x in one.state_dict().items())
        gradients = gradient_errors(wanted, tpcompile.full_gradients(tp))
        found.append((relative_error(expected.detach(), got.detach()), max(gradients.values()), share))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, ["gpt2"]), pytest.param(3, ["gpt2", "llama", "bert"], marks=pytest.mark.slow),
     pytest.param(2, ["llama", "bert"], marks=pytest.mark.slow)],
)  # fmt: skip
def test_logits_and_gradients_are_those_of_the_loaded_model(ranks: int, names: list[str], tmp_path: Path) -> None:
    """In float32: norms and rotary tables compute in it whatever the dtype of the model."""
    options: dict[str, Any] = {"max_shard_size": "60KB"} if ranks == 3 else {}
    directories = [str(saved(name, tmp_path / name, torch.float32, **options)) for name in names]
    for found in run(answers, ranks, directories, torch.float32):
        for output, gradient, share in found:
            assert output < 1e-5
            assert gradient < 1e-5
            assert share < 1.4 / ranks


def with_one_bad_rank(directories: Sequence[str]) -> tuple[str, str]:
    """What a rank says whose neighbour has another, or a broken checkpoint: (the same for all of them, its own)."""
    rank = torch.distributed.get_rank()
    said: list[str] = []
    for directory in directories:
        with pytest.raises(TpcompileError) as refused:
            tpcompile.from_pretrained(f"{directory}/{rank}")
        said.append(refused.value.what)
    return said[0], said[1]


def onto_another_device(directory: str) -> set[tuple[str, str]]:
    """Loads a model onto the device that has no memory; the devices and dtypes of what it holds."""
    pretrained.group_device = lambda group: torch.device("meta")
    pretrained._to = lambda device: lambda x: x  # inputs must have values
    model = tpcompile.from_pretrained(directory)
    return {(x.device.type, str(x.dtype)) for x in (*model.parameters(), *model.buffers())}


@pytest.mark.distributed
def test_parts_and_buffers_go_to_the_device_of_the_group(tmp_path: Path) -> None:
    found = run(onto_another_device, 1, str(saved("llama", tmp_path, torch.float32)))
    assert found == [{("meta", "torch.float32")}]


@pytest.mark.distributed
def test_an_error_of_one_rank_ends_the_call_on_all(tmp_path: Path) -> None:
    for kind in ("other", "broken"):
        saved("gpt2", tmp_path / kind / "0")
        shutil.copytree(tmp_path / kind / "0", tmp_path / kind / "1")
    bad = tmp_path / "other" / "1" / "model.safetensors"
    save_file({n: x + 1 for n, x in load_file(bad).items()}, bad, {"format": "pt"})
    (tmp_path / "broken" / "1" / "model.safetensors").unlink()
    first, second = run(with_one_bad_rank, 2, [str(tmp_path / "other"), str(tmp_path / "broken")])
    assert first[0] == second[0] == "ranks read different files"
    assert first[1] == "another rank could not load its part of the checkpoint"
    assert "has neither model.safetensors" in second[1]


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return saved("gpt2", tmp_path / "gpt2", torch.float32)


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def read_all(directory: Path) -> None:
    with Checkpoint(directory) as files:
        model = huggingface.without_weights(directory, None, torch.float32)
        sources = pretrained.sources_of(model, files, directory)
        program = rewrite(model, degree=2)
        list(map(pretrained.reader(files, sources, program, 1), program.captured.parameters))


def refused(directory: Path) -> TpcompileError:
    with pytest.raises(TpcompileError) as caught:
        read_all(directory)
    return caught.value


def test_a_missing_tensor(gpt2: Path) -> None:
    changed(gpt2, lambda x: x.pop("transformer.h.1.mlp.c_fc.weight"))
    error = refused(gpt2)
    assert "transformer.h.1.mlp.c_fc.weight is missing" in error.what
    assert str(gpt2) in error.what


def test_a_wrong_shape(gpt2: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    changed(gpt2, lambda x: x.update({name: x[name].t().contiguous()}))
    error = refused(gpt2)
    assert f"model.safetensors: tensor {name} has shape [144, 48]" in error.what


def test_integers_for_floats(gpt2: Path) -> None:
    changed(gpt2, lambda x: x.update({"transformer.ln_f.bias": torch.zeros(48, dtype=torch.int8)}))
    assert "tensor transformer.ln_f.bias is torch.int8" in refused(gpt2).what


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_truncated_file(gpt2: Path, left: int) -> None:
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    error = refused(gpt2)
    assert error.what == f"{file}: not a whole safetensors file"
    assert left != -1 or "tensor transformer." in str(error.why)


def test_a_file_that_shrinks_after_it_was_opened(gpt2: Path) -> None:
    with Checkpoint(gpt2) as files:
        stored = files.tensors["transformer.wte.weight"]
        with stored.path.open("r+b") as file:
            file.truncate(stored.offset + 10)
        with pytest.raises(TpcompileError, match="not a whole safetensors file"):
            checkpoint_files.whole(files, stored, torch.float32)


def test_files_that_the_index_lists(tmp_path: Path) -> None:
    directory = saved("gpt2", tmp_path, max_shard_size="60KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["transformer.wpe.weight"]
    other = next(f for f in index["weight_map"].values() if f != file)
    index["weight_map"]["transformer.wpe.weight"] = other
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(directory).what == f"{directory / other}: tensor transformer.wpe.weight is missing"
    (directory / other).unlink()
    assert f"{directory / other}: the file cannot be opened" in refused(directory).what


def test_pickles_are_refused_with_what_to_do(gpt2: Path) -> None:
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    error = refused(gpt2)
    assert "pytorch_model.bin" in error.what
    assert "safe_serialization=True" in str(error.help)


def test_names_of_the_hub_are_not_looked_up(tmp_path: Path) -> None:
    error = refused(tmp_path / "gpt2")
    assert error.what == f"there is no directory {tmp_path / 'gpt2'}"
    assert "nothing is downloaded" in str(error.why)


def test_tied_weights_under_two_names(gpt2: Path) -> None:
    """Equal ones are one parameter; different ones are refused, not silently one of the two."""
    changed(gpt2, lambda x: x.update({"lm_head.weight": x["transformer.wte.weight"].clone()}))
    assert parts(gpt2, 3) == 0.0
    changed(gpt2, lambda x: x["lm_head.weight"][-1].add_(1e-3))
    error = refused(gpt2)
    assert "tensor transformer.wte.weight differs from lm_head.weight" in error.what
    assert "tie_word_embeddings" in str(error.help)


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bert", "bert.")])
def test_names_without_the_prefix_of_the_base_model(name: str, prefix: str, tmp_path: Path) -> None:
    """``wte.weight``, as the published GPT-2 has it."""
    directory = saved(name, tmp_path)
    changed(directory, lambda tensors: [tensors.update({n.removeprefix(prefix): tensors.pop(n)}) for n in [*tensors]])
    assert "wte.weight" in load_file(directory / "model.safetensors") or name != "gpt2"
    assert parts(directory, 2) == 0.0


def of_class(directory: Path, name: str) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    return directory


def test_a_base_model_from_the_files_of_one_with_a_head(gpt2: Path, tmp_path: Path) -> None:
    """Names lose their prefix; what the files lack is refused (transformers would draw a pooler at random)."""
    assert parts(of_class(gpt2, "GPT2Model"), 2) == 0.0
    bert = of_class(saved("bert", tmp_path / "bert"), "BertModel")
    assert "tensor pooler.dense.weight is missing" in refused(bert).what


@pytest.mark.parametrize("kind", ["Mixtral", pytest.param("Qwen2Moe", marks=pytest.mark.slow)])
def test_experts_that_are_stored_one_by_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked and concatenated as transformers does it, each rank of its own parts; a wrong order is noticed."""
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 16, "intermediate_size": 80}
    config = getattr(configs, f"{kind}Config")(
        **{**LLAMA, **sizes}, num_local_experts=5, num_experts=5, num_experts_per_tok=2
    )
    huggingface.build(config, dtype=torch.float32).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(".experts." in name for name in stored) == 2 * 5 * 3
    assert parts(tmp_path, 3, torch.bfloat16) == 0.0
    with Checkpoint(tmp_path) as files:
        sources = pretrained.sources_of(huggingface.without_weights(tmp_path, None, torch.float32), files, tmp_path)
        (name,) = (n for n in sources if n.endswith("layers.1.mlp.experts.gate_up_proj"))
        rows = [sources[name][0].shape[1] // 2]
        held = (((1, 2), (4, 1)), ((rows[0] - 3, 5),), ((7, 4),))
        got = files.read(sources[name][0], held, torch.float32)
        assert files.bytes_read < 1.2 * got.nbytes + files.tensors[next(iter(stored))].offset
    monkeypatch.setattr(checkpoint_sources, "_joined", lambda n, xs, d: right(n, xs[::-1], d))
    assert parts(tmp_path, 2) > 1e-3


right = checkpoint_sources._joined


def test_what_transformers_computes_is_refused(tmp_path: Path) -> None:
    part = checkpoint_files.Stored("experts.0.w1", tmp_path / "model.safetensors", torch.float32, (2, 3), 0)
    wider = checkpoint_files.Stored("experts.1.w1", tmp_path / "model.safetensors", torch.float32, (3, 3), 0)

    class Transpose:
        dim = 0

    class MergeModulelist(Transpose): ...

    for step, said in ((Transpose(), "is only a part of experts"), (MergeModulelist(), "has shape [1, 3, 3]")):
        converter = SimpleNamespace(operations=[step], target_patterns=["experts"], source_patterns=["w1"])
        with pytest.raises(TpcompileError) as caught:
            checkpoint_sources.merged("experts", converter, {"w1": [part, wider]})
        assert said in caught.value.what


def test_tensors_without_a_place_are_warned_of(gpt2: Path) -> None:
    changed(gpt2, lambda x: x.update({"score.weight": torch.zeros(2, 48)}))
    with Checkpoint(gpt2) as files:
        model = huggingface.without_weights(gpt2, None, torch.float32)
        sources = pretrained.sources_of(model, files, gpt2)
        with pytest.warns(UserWarning, match=r"no place for score\.weight \(model\.safetensors\)"):
            pretrained.warn_of_unused(pretrained.Opened(gpt2, model, files, sources))
    changed(gpt2, lambda x: x.pop("score.weight"))
    with Checkpoint(gpt2) as files, warnings.catch_warnings():
        model = huggingface.without_weights(gpt2, None, torch.float32)
        sources = pretrained.sources_of(model, files, gpt2)
        pretrained.warn_of_unused(pretrained.Opened(gpt2, model, files, sources))


def test_spans_are_the_elements_of_the_part() -> None:
    x = torch.arange(5 * 6 * 4).view(5, 6, 4)
    for held in [
        (((0, 5),), ((0, 6),), ((0, 4),)),
        (((1, 2), (4, 1)), ((0, 6),), ((0, 4),)),
        (((0, 5),), ((0, 1), (3, 2)), ((0, 4),)),
        (((2, 2),), ((5, 1),), ((1, 1), (3, 1))),
        (((0, 5),), ((0, 0),), ((0, 4),)),
    ]:
        part = x
        for dim, runs in enumerate(held):
            part = torch.cat([part.narrow(dim, s, n) for s, n in runs], dim)
        found = [i for first, n in spans(x.shape, held) for i in range(first, first + n)]
        assert found == part.flatten().tolist()
