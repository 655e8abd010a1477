"""Norms, softmax and losses along a cut axis: exact, and only statistics travel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tpcompile
from tpcompile import Spec
from tpcompile.equivalence import Report, verify_program
from tpcompile.program import Program, copy_graph

TOKENS, LENGTH, BATCH = 37, 7, 3


class Loss(nn.Module):
    """An embedding, a head, and a loss on the head's logits ``[b, s, TOKENS]``."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 16, padding_idx=3)
        self.head = nn.Linear(16, TOKENS)
        self.options = options

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embed(ids))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **self.options)  # type: ignore[arg-type]


class Between(nn.Module):
    """Two Linears with a function of the whole cut axis between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(16, 24), between, nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_report(degree: int, **options: object) -> Report:
    torch.manual_seed(0)
    labels = ids(1)
    labels[0, :3] = -100
    return tpcompile.verify(
        Loss(**options), Spec.parse("embed head vocab"), degree=degree, example_inputs=(ids(0), labels)
    )


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 5, "reduction": "sum"},
    ],
    ids=str,
)
def test_cross_entropy_on_cut_logits(degree: int, options: dict[str, object]) -> None:
    if options.get("ignore_index"):
        labels = ids(1)
        report = tpcompile.verify(
            Loss(**options), Spec.parse("embed head vocab"), degree=degree, example_inputs=(ids(0), labels)
        )
    else:
        report = loss_report(degree, **options)
    assert report.ok, report.mismatch


def test_only_statistics_travel() -> None:
    """Embedding, then three all-reduces of one number per token (Korthikanti et al. 2022 count the same three)."""
    forward = [c for c in loss_report(2).collectives if c.direction == "forward"]
    assert [c.kind for c in forward] == ["all_reduce"] * 4
    tokens = BATCH * LENGTH
    assert sorted(c.bytes for c in forward) == [tokens * 4] * 3 + [tokens * 16 * 4]


def test_class_weights_are_refused_with_the_place() -> None:
    with pytest.raises(tpcompile.ShardingError, match="whole logits") as refusal:
        loss_report(2, weight=torch.ones(TOKENS))
    assert refusal.value.where is not None
    assert refusal.value.where.file is not None
    assert refusal.value.where.file.endswith("test_decompose.py")


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(
    "between",
    [nn.LayerNorm(24), nn.LayerNorm(24, elementwise_affine=False), nn.RMSNorm(24), nn.Softmax(-1), nn.LogSoftmax(-1)],
    ids=lambda m: f"{type(m).__name__}{'' if list(m.parameters()) else '-plain'}",
)
def test_functions_of_the_whole_cut_axis(between: nn.Module, degree: int) -> None:
    torch.manual_seed(0)
    spec = Spec.parse("up column\ndown row")
    report = tpcompile.verify(Between(between), spec, degree=degree, example_inputs=(torch.randn(2, 5, 16),))
    assert report.ok, report.mismatch
    assert not [c for c in report.collectives if c.kind == "all_gather"], "the value itself must not travel"


class WithZ(Loss):
    """A loss with the z-loss of PaLM, as models write it: the square of the log of the softmax's normalizer."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embed(ids))
        z = logits.logsumexp(-1)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 1e-2 * z.square().mean()


@pytest.mark.parametrize("degree", [2, 3])
def test_the_z_loss_on_cut_logits(degree: int) -> None:
    torch.manual_seed(0)
    given = (ids(0), ids(1))
    report = tpcompile.verify(WithZ(), Spec.parse("embed head vocab"), degree=degree, example_inputs=given)
    assert report.ok, report.mismatch
    assert not [c for c in report.collectives if c.kind == "all_gather"]


def test_a_missing_statistic_is_caught() -> None:
    """Negative control: without one of the all-reduces of statistics, verify fails."""
    torch.manual_seed(0)
    model, inputs = Between(nn.Softmax(-1)), (torch.randn(2, 5, 16),)
    program = tpcompile.rewrite(model, Spec.parse("up column\ndown row"), degree=2, example_inputs=inputs)
    assert verify_program(program, model, inputs).ok
    statistics = [
        n.name for n in program.graph.nodes if "all_reduce" in str(n.target) and n.meta["module"] == "between"
    ]
    assert statistics
    for name in statistics:
        assert not verify_program(without(program, name), model, inputs).ok or name.endswith("max"), name


def without(program: Program, name: str) -> Program:
    module, graph = copy_graph(program.graph_module)
    node = next(n for n in graph.nodes if n.name == name)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)
    module.recompile()
    return program.with_(graph_module=module)
