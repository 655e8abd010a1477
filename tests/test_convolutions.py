"""Convolutions: what `column` and `row` cut of them, and where their bias is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutants import Mutant, delete
from torch import Tensor, nn

from tpcompile import collectives
from tpcompile.compiler import rewrite
from tpcompile.equivalence import verify_program
from tpcompile.layout import axes_of
from tpcompile.program import Program
from tpcompile.rules import op_name
from tpcompile.spec import Spec


class Convolutions(nn.Module):
    """Widens, convolves each channel by itself, and narrows."""

    def __init__(self, dims: int, bias: bool, transposed: bool) -> None:
        super().__init__()
        kinds: dict[tuple[int, bool], Callable[..., nn.Module]] = {
            (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
            (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
        }  # fmt: skip
        conv = kinds[dims, transposed]
        self.up = conv(3, 8, 3, padding=1, bias=bias)
        self.each = conv(8, 8, 3, padding=1, groups=8, bias=bias)
        self.down = conv(8, 3, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.each(self.up(x))))


def cut(dims: int, bias: bool, transposed: bool, spec: str, degree: int = 2) -> tuple[Program, nn.Module, Any]:
    torch.manual_seed(0)
    model, inputs = Convolutions(dims, bias, transposed), (torch.randn(2, 3, *[4] * dims),)
    return rewrite(model, Spec.parse(spec), degree=degree, example_inputs=inputs), model, inputs


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pair_of_convolutions_is_cut_by_channels(dims: int, bias: bool, transposed: bool) -> None:
    program, model, inputs = cut(dims, bias, transposed, "up column\ndown row", degree=3)
    whole = {name for name, layout in program.parameters.items() if not any(map(axes_of, layout))}
    assert whole == ({"down.bias"} if bias else set())
    report = verify_program(program, model, inputs)
    assert report.ok, report.mismatch
    assert sorted((c.kind, c.direction) for c in report.collectives) == [
        ("all_reduce", "backward"),
        ("all_reduce", "forward"),
    ]


def test_a_bias_is_added_once_and_where_it_can_inside_of_the_convolution() -> None:
    program, model, inputs = cut(2, True, False, "up column\ndown row")
    products = [node for node in program.graph.nodes if "conv" in op_name(node)]
    assert [node.args[2] is not None for node in products] == [True, True, False]
    reduce = next(node for node in program.graph.nodes if node.target is collectives.all_reduce)
    broken = Mutant("", reduce.name, delete).program(program)
    assert not verify_program(broken, model, inputs).ok


@pytest.mark.parametrize("line", ["each column", "up column"])
def test_either_line_cuts_the_same_channels(line: str) -> None:
    program, model, inputs = cut(1, True, False, line)
    assert {name for name, layout in program.parameters.items() if any(map(axes_of, layout))} == {
        "up.weight", "up.bias", "each.weight", "each.bias", "down.weight",
    }  # fmt: skip
    assert verify_program(program, model, inputs).ok


class Modulated(nn.Module):
    """As in FocalNet: a weight whose two dims are two segments of a packed one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.context, self.out = nn.Linear(6, 16), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        query, context = self.into(x).chunk(2, -1)
        return self.out(query * self.context(F.gelu(context)))


@pytest.mark.parametrize(
    ("spec", "cut_dim"), [("into column\nout row", 0), ("into column\ncontext row", 1), (None, 1)], ids=str
)
def test_a_segment_stays_whole_where_a_weight_would_be_cut_along_both_dims(spec: str | None, cut_dim: int) -> None:
    torch.manual_seed(0)
    model, inputs = Modulated(), (torch.randn(2, 5, 6),)
    program = rewrite(model, None if spec is None else Spec.parse(spec), degree=2, example_inputs=inputs)
    assert [bool(axes_of(dim)) for dim in program.parameters["context.weight"]] == [cut_dim == 0, cut_dim == 1]
    report = verify_program(program, model, inputs)
    assert report.ok, report.mismatch
