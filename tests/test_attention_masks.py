"""Attention masks of transformers in captured graphs: as in eager, unless the values of inputs decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tpcompile import attention_masks
from tpcompile.capture import Captured, capture
from tpcompile.errors import CaptureError

transformers = pytest.importorskip("transformers")
LENGTH, WINDOW = 7, 9


def _ids(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def _decoder(kind: str = "Llama", **config: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}ForCausalLM")
    return cls(getattr(transformers, f"{kind}Config")(**sizes, **config)).double()


def _attentions(captured: Captured) -> list[fx.Node]:
    return captured.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )


def _has_mask(captured: Captured) -> bool:
    masks = {len(node.args) > 3 and node.args[3] is not None for node in _attentions(captured)}
    assert len(masks) == 1
    return masks.pop()


def _error(model: nn.Module, captured: Captured, inputs: Mapping[str, Any]) -> float:
    expected = model(**inputs).logits
    module = captured.graph_module
    found = captured.unflatten(module(*captured.flatten((), inputs))).logits
    own = list(model.parameters())
    wanted, got = (torch.autograd.grad(x.square().sum(), own) for x in (expected, found))
    pairs = [(expected, found), *zip(wanted, got, strict=True)]
    return max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in pairs)


def test_without_padding_attention_is_causal_at_every_length() -> None:
    model = _decoder()
    captured = capture(model, (), {"input_ids": _ids()})
    assert not _has_mask(captured)
    for length in (1, 2, LENGTH, 12):
        assert _error(model, captured, {"input_ids": _ids(length, batch=length % 3 + 1)}) < 1e-12


def test_without_it_the_mask_is_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masks, "_SKIPS", ())
    assert _has_mask(capture(_decoder(), (), {"input_ids": _ids()}))


def test_padding_that_is_an_input_stays_a_mask() -> None:
    model = _decoder()
    captured = capture(model, (), {"input_ids": _ids(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)})
    assert _has_mask(captured)
    padded = torch.ones(2, LENGTH, dtype=torch.long)
    padded[0, :3] = 0
    assert _error(model, captured, {"input_ids": _ids(), "attention_mask": padded}) < 1e-12


def test_positions_that_are_an_input_may_be_packed() -> None:
    model = _decoder()
    captured = capture(model, (), {"input_ids": _ids(), "position_ids": torch.arange(LENGTH).expand(2, -1).clone()})
    assert _has_mask(captured)
    packed = torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(2, -1).clone()
    assert _error(model, captured, {"input_ids": _ids(), "position_ids": packed}) < 1e-12


def test_positions_taken_for_an_arange_would_be_seen_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def yes(_: Tensor) -> bool:
        return True

    monkeypatch.setattr(attention_masks, "_counts_up", yes)
    model = _decoder()
    captured = capture(model, (), {"input_ids": _ids(), "position_ids": torch.arange(LENGTH).expand(2, -1).clone()})
    packed = torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand(2, -1).clone()
    assert _error(model, captured, {"input_ids": _ids(), "position_ids": packed}) > 1e-3


def test_a_window_longer_than_the_sequence_is_a_guard() -> None:
    model = _decoder("Mistral", sliding_window=WINDOW)
    captured = capture(model, (), {"input_ids": _ids()})
    assert not _has_mask(captured)
    for length in (1, WINDOW - 1):
        assert _error(model, captured, {"input_ids": _ids(length)}) < 1e-12
    with pytest.raises(CaptureError, match=rf"does not cover input_ids.shape\[1\] = {WINDOW}\n"):
        captured.flatten((), {"input_ids": _ids(WINDOW)})


def test_a_window_within_the_sequence_is_a_mask_at_every_length() -> None:
    model = _decoder("Mistral", sliding_window=3)
    captured = capture(model, (), {"input_ids": _ids()})
    assert _has_mask(captured)
    for length in (1, 2, 3, LENGTH, 12):
        assert _error(model, captured, {"input_ids": _ids(length)}) < 1e-12


def test_masks_that_are_added_stay() -> None:
    model = _decoder(attn_implementation="eager")
    captured = capture(model, (), {"input_ids": _ids()})
    for length in (1, LENGTH, 12):
        assert _error(model, captured, {"input_ids": _ids(length)}) < 1e-12


def test_tokens_after_a_cache_keep_their_mask() -> None:
    model = _decoder()

    def inputs(new: int, past: int) -> dict[str, Any]:
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=_ids(past), past_key_values=cache, use_cache=True)
        return {"input_ids": _ids(new), "past_key_values": cache, "use_cache": True}

    captured = capture(model, (), inputs(3, 5))
    assert _has_mask(captured)
    for new, past in ((3, 5), (2, 4), (4, 4)):
        expected = model(**inputs(new, past)).logits.detach()
        given = inputs(new, past)
        found = captured.graph_module(*captured.flatten((), given))
        again = captured.unflatten(found, [given["past_key_values"]]).logits.detach()
        assert float((again - expected).abs().max()) < 1e-12 * float(expected.abs().max())


class Positions(nn.Module):
    """Asks for packed sequences with positions made in one of several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        from transformers import masking_utils

        arange = torch.arange(x.shape[1])
        match self.way:
            case "arange":
                positions = arange.unsqueeze(0)
            case "offset":
                positions = (torch.arange(3, x.shape[1] + 3) + 2)[None].expand(x.shape[0], -1)
            case "row":
                positions = arange.view(1, 1, -1).expand(3, x.shape[0], -1)[0]
            case "step":
                positions = torch.arange(0, 2 * x.shape[1], 2)[None]
            case "column":
                positions = arange[:, None]
            case "repeated":
                positions = torch.arange(1)[:, None].expand(x.shape[0], x.shape[1])
            case "product":
                positions = (arange * 2)[None]
            case "input":
                positions = arange[None] + x
            case _:
                positions = arange[None]
                arange[2:] -= 2
        found = masking_utils.find_packed_sequence_indices(positions)
        return x + (0 if found is None else 1)


@pytest.mark.parametrize("way", ["arange", "offset", "row"])
def test_positions_that_count_up_are_one_sequence(way: str) -> None:
    captured = capture(Positions(way), (_ids(),))
    assert torch.equal(captured.graph_module(_ids())[0], _ids())


@pytest.mark.parametrize("way", ["step", "column", "repeated", "product", "input", "written"])
def test_other_positions_may_be_packed(way: str) -> None:
    captured = capture(Positions(way), (_ids(),))
    assert torch.equal(captured.graph_module(_ids())[0], _ids() + 1)


class Padding(nn.Module):
    """Asks for a mask of two directions, with padding made in one of several ways; 1 where there is one."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        from transformers import masking_utils

        match self.way:
            case "ones":
                padding = torch.ones(x.shape, dtype=torch.bool)
            case "full":
                padding = torch.full((x.shape[0], x.shape[1] * 1), True)
            case "cast":
                padding = torch.ones(x.shape[1]).expand(x.shape[0], -1).to(torch.bool)
            case "zeros":
                padding = torch.zeros(x.shape, dtype=torch.bool)
            case "input":
                padding = x > 0
            case _:
                padding = torch.ones(x.shape, dtype=torch.bool)
                padding[:, 0] = False
        left_out = masking_utils._ignore_bidirectional_mask_sdpa(padding, x.shape[1], None)
        return x * 0 + (0 if left_out else 1)


@pytest.mark.parametrize("way", ["ones", "full", "cast"])
def test_padding_of_ones_is_none(way: str) -> None:
    captured = capture(Padding(way), (_ids(),))
    assert not captured.graph_module(_ids())[0].any()


@pytest.mark.parametrize("way", ["zeros", "input", "written"])
def test_other_padding_is_a_mask(way: str) -> None:
    captured = capture(Padding(way), (_ids(),))
    assert captured.graph_module(_ids())[0].all()


@pytest.mark.parametrize(("kv_length", "left_out"), [(LENGTH, True), (LENGTH + 2, False)])
def test_a_causal_mask_with_padding_of_ones_is_left_out_where_it_is_square(kv_length: int, left_out: bool) -> None:
    """With more keys than queries eager reads the padding: all of it is true, so there is a mask."""

    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            from transformers import masking_utils

            padding = torch.ones(x.shape[0], kv_length, dtype=torch.bool)
            skip = masking_utils._ignore_causal_mask_sdpa(padding, x.shape[1], kv_length, 0, 0)
            return x * 0 + (0 if skip else 1)

    eager = Causal()(_ids())
    captured = capture(Causal(), (_ids(),))
    assert torch.equal(captured.graph_module(_ids())[0], eager)
    assert bool(eager.any()) is not left_out


def test_transformers_is_left_as_it_was() -> None:
    from transformers import masking_utils

    before = dict(vars(masking_utils))
    capture(_decoder(), (), {"input_ids": _ids()})
    with pytest.raises(ZeroDivisionError), attention_masks.as_in_eager([]):
        _ = 1 / 0
    assert {k: v for k, v in vars(masking_utils).items() if before.get(k) is not v} == {}
