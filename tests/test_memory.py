"""What a rank keeps for backward: the static report is what autograd keeps in a real step, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from tpcompile import shards, simulate
from tpcompile.activations import Kept, Saved, memory
from tpcompile.compiler import rewrite
from tpcompile.program import Program
from tpcompile.simulate import Simulation

transformers = zoo._transformers


def gpt2(**config: Any) -> Callable[[int], nn.Module]:
    return transformers("GPT2LMHeadModel", "n_layer", n_embd=64, n_head=4, n_positions=32, **config)


BUILDERS: Mapping[str, Callable[[int], nn.Module]] = {
    "gpt2": gpt2(),
    "gpt2 eager": gpt2(attn_implementation="eager"),
    "llama": zoo.MODELS["llama_gqa"].build,
    "llama eager": zoo._decoder("LlamaForCausalLM", 8, 4, attn_implementation="eager"),
    "bert": zoo.MODELS["bert"].build,
    "llama uneven": zoo.MODELS["llama_uneven"].build,
}


@cache
def program(name: str, degree: int, training: bool, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = BUILDERS[name](2).train(training).to(dtype)
    return rewrite(model, degree=degree, example_inputs=inputs(name))


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 127, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} if name == "bert" else {"input_ids": ids, "labels": ids}


def measured(rewritten: Program, monkeypatch: pytest.MonkeyPatch, given: Mapping[str, Any]) -> list[int]:
    """Bytes that autograd keeps on each rank, all ranks in lock step on real tensors."""
    captured = rewritten.captured
    ranks = shards.attributes(
        captured.parameters, {**captured.buffers, **captured.constants}, rewritten.parameters, rewritten.mesh
    )
    flat = [[x.clone() for x in captured.flatten((), given)] for _ in ranks]
    saved = Saved([*(x for own in ranks for x in own.values()), *(x for own in flat for x in own)])
    in_step = simulate._in_step

    def on(rank: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        saved.saved_by(str(rank))
        return made

    def tracked(functions: Sequence[Callable[..., Any]], arguments: Sequence[Any]) -> list[Any]:
        return in_step([partial(on, rank, f) for rank, f in enumerate(functions)], arguments)

    monkeypatch.setattr(simulate, "_in_step", tracked)
    simulation = Simulation(rewritten.graph_module, len(ranks), rewritten.mesh.all_groups(), ranks)
    with saved.counting():
        outputs = simulation.run(flat)
    found = [0] * len(ranks)
    for _, x, savers in saved:
        (rank,) = savers
        found[int(str(rank))] += x.untyped_storage().nbytes()
    assert sum(found) == saved.bytes
    del outputs
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "llama uneven"])
def test_the_report_is_what_autograd_keeps(
    name: str, degree: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten = program(name, degree, training)
    assert [rank.activations for rank in memory(rewritten)] == measured(rewritten, monkeypatch, inputs(name))
