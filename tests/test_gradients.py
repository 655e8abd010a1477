"""Which rank counts which position of a gradient: each position once, whatever is cut, shared or uneven."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
import zoo
from torch import Tensor, nn

import tpcompile
from tpcompile import shards
from tpcompile.errors import TpcompileError
from tpcompile.gradients import counted
from tpcompile.layout import Layout, Leaf, Mesh, concat, product, size, whole_segments
from tpcompile.program import Program
from tpcompile.runs import pick

TP = (0,)
LAYOUTS: Mapping[str, tuple[Mesh, tuple[Layout, ...]]] = {
    "whole": (Mesh((3,)), (Leaf(5), Leaf(4))),
    "no dims": (Mesh((2,)), ()),
    "cut": (Mesh((2,)), (Leaf(4), Leaf(8, TP))),
    "uneven": (Mesh((3,)), (Leaf(7, TP), Leaf(2))),
    "packed": (Mesh((2,)), (product([Leaf(3), Leaf(6, TP), Leaf(2)]),)),
    "whole segments": (Mesh((2,)), (Leaf(3), concat([Leaf(6, TP), Leaf(2), Leaf(2)]))),
    "whole segments of each": (Mesh((2,)), (product([Leaf(2), concat([Leaf(4, TP), Leaf(1), Leaf(1)])]), Leaf(3))),
    "shared by pairs": (Mesh((2, 2)), (product([Leaf(2, (0,)), Leaf(3)]), Leaf(5))),
    "cut twice in one dim": (Mesh((2, 2)), (product([Leaf(2, (0,)), Leaf(4, (1,)), Leaf(3)]),)),
    "segments of two kinds": (
        Mesh((2, 2)),
        (product([Leaf(2, (0,)), concat([Leaf(2, (1,)), Leaf(1), Leaf(1)]), Leaf(2)]), Leaf(3)),
    ),
    "two dims": (Mesh((2, 2)), (Leaf(4, (0,)), concat([Leaf(4, (1,)), Leaf(3)]))),
}


def taken(part: Tensor, dims: Sequence[Layout], mesh: Mesh, rank: int) -> list[Tensor]:
    """What ``rank`` counts of its part."""
    pieces: list[Tensor] = []
    for box in counted(tuple(dims), mesh, rank):
        piece = part
        for dim, runs in enumerate(box):
            piece = pick(piece, dim, runs)
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_position_counts_once(name: str) -> None:
    mesh, dims = LAYOUTS[name]
    shape = [size(d) for d in dims]
    whole = torch.arange(math.prod(shape)).view(shape)
    seen = [x.flatten() for r in range(mesh.degree) for x in taken(shards.cut(whole, dims, mesh, r), dims, mesh, r)]
    assert torch.equal(torch.cat(seen).sort().values, whole.flatten())


def norms(program: Program, gradients: Sequence[Mapping[str, Tensor]], p: float) -> tuple[float, float]:
    """The norm over what the ranks count, and the naive one over all that they hold."""
    right: list[Tensor] = []
    naive: list[Tensor] = []
    for rank, own in enumerate(gradients):
        for name, gradient in own.items():
            naive.append(gradient.flatten())
            right += [x.flatten() for x in taken(gradient, program.parameters[name], program.mesh, rank)]
    return tuple(float(torch.linalg.vector_norm(torch.cat(x).double(), p)) for x in (right, naive))  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "degree"), [("gpt2", 2), ("llama_few_kv", 4), ("falcon_mqa", 2), ("llama_uneven", 2)])
def test_the_norm_of_what_ranks_count_is_the_norm_on_one_device(name: str, degree: int) -> None:
    """And what replicated positions add when every rank counts them is far more than rounding."""
    inputs = zoo.inputs(name)
    alone, program = zoo.program(name, 1), zoo.program(name, degree)
    whole, parts = zoo.step(alone, inputs).gradients, zoo.step(program, inputs).gradients
    for p in (1.0, 2.0, 3.0, math.inf):
        wanted, _ = norms(alone, whole, p)
        right, naive = norms(program, parts, p)
        assert right == pytest.approx(wanted, rel=1e-5)
        assert p > 2 or naive > wanted * (1 + 1e-4)


def test_layouts_of_the_models_above_have_whole_segments_and_factored_meshes() -> None:
    falcon, llama = zoo.program("falcon_mqa", 2), zoo.program("llama_few_kv", 4)
    assert any(whole_segments(d, 0) for dims in falcon.parameters.values() for d in dims)
    assert len(llama.mesh.sizes) == 2


# What is refused; these need no process group.


def test_other_modules_are_refused() -> None:
    with pytest.raises(TpcompileError, match="Linear is not a compiled module") as caught:
        tpcompile.clip_grad_norm_(nn.Linear(2, 2), 1.0)
    assert "torch.nn.utils.clip_grad_norm_" in str(caught.value)


@pytest.mark.parametrize("p", [0.0, -math.inf, math.nan])
def test_norms_that_do_not_add_up_are_refused(p: float) -> None:
    with pytest.raises(TpcompileError, match="norm_type must be positive"):
        tpcompile.grad_norm(nn.Linear(2, 2), p)
