"""What a user reads when a plan is impossible: golden texts of the errors of the axes and of placement."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import error_models as models
import pytest
import torch
from goldens import Golden
from torch import nn

import tpcompile
from tpcompile.errors import ShardingError, TpcompileError
from tpcompile.spec import Spec

HEADS = "attn.{q,k,v}_proj  column\nattn.o_proj  row\n"
PAIR = "up    column\ndown  row\n"
GROUPS = "{one,other}.{q,k,v}_proj  column\n{one,other}.o_proj  row\n"


@dataclass(frozen=True)
class Case:
    """A spec that a model, or a degree, does not allow."""

    model: Callable[[], nn.Module]
    spec: str
    degree: Any = 2


CASES = {
    "degree_cannot_divide": Case(models.Block, HEADS, degree=4),
    "row_without_column": Case(models.Mlp, "down  row\n"),
    "row_does_not_hold": Case(models.Block, "mlp.up    column\nmlp.down  row\nattn.o_proj  row\n"),
    "row_on_the_first": Case(models.Mlp, "up  row\n"),
    "row_behind_a_norm": Case(models.Normed, "down  row\n"),
    "row_without_a_sum": Case(models.Convolved, "each  row\n"),
    "axis_needed_whole": Case(models.Sorted, PAIR),
    "op_without_rule": Case(models.Unruled, PAIR),
    "regrouped": Case(models.Regrouped, PAIR),
    "column_on_a_norm": Case(models.Normed, "norm  column\n"),
    "by_contradicts_the_graph": Case(models.Block, HEADS.replace("column", "column by 4"), degree=3),
    "two_dims_over_the_same_ranks": Case(models.Square, PAIR),
    "groupings_do_not_nest": Case(models.TwoGroupings, GROUPS, degree=6),
    "degree_zero": Case(models.Mlp, PAIR, degree=0),
    "degree_negative": Case(models.Mlp, PAIR, degree=-2),
    "degree_text": Case(models.Mlp, PAIR, degree="2"),
    "degree_bool": Case(models.Mlp, PAIR, degree=True),
}


def no_absolute_path(text: str) -> bool:
    return re.search(r"(?<![\w.*)}\]])/\w", text) is None and str(Path(__file__).parent) not in text


@pytest.mark.parametrize("name", CASES)
def test_the_message(name: str, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)  # paths are relative to the working directory
    case = CASES[name]
    with pytest.raises(ShardingError) as caught:
        tpcompile.rewrite(
            case.model(),
            Spec.parse(case.spec, "model.tpspec"),
            degree=case.degree,
            example_inputs=(torch.zeros(2, 5, 12),),
        )
    assert caught.value.why
    assert caught.value.help
    if not name.startswith("degree_") or name == "degree_cannot_divide":
        assert caught.value.where is not None
    assert no_absolute_path(str(caught.value))
    golden(f"error_{name}", str(caught.value))


def test_an_absolute_path_is_seen() -> None:
    assert not no_absolute_path(f"--> {Path(__file__).parent}/x.py:3")
    assert not no_absolute_path("--> /somewhere/x.py:3")
    assert no_absolute_path("--> tests/x.py:3 over 8/tp ranks")


def test_a_mesh_of_the_wrong_type(golden: Golden) -> None:
    wrong: Any = "tp"
    with pytest.raises(TpcompileError) as caught:
        tpcompile.compile(models.Mlp(), Spec.parse(PAIR), example_inputs=(torch.zeros(2, 5, 12),), mesh=wrong)
    golden("error_mesh_of_the_wrong_type", str(caught.value))


@pytest.mark.parametrize(
    ("model", "spec", "degree"),
    [(models.Block, HEADS, 3), (models.Mlp, PAIR, 2), (models.TwoGroupings, GROUPS, 2)],
)
def test_what_is_refused_above_is_legal_otherwise(model: Callable[[], nn.Module], spec: str, degree: int) -> None:
    """The same models and specs at a legal degree: it is the mistake that is refused."""
    example = (torch.zeros(2, 5, 12),)
    program = tpcompile.rewrite(model(), Spec.parse(spec, "model.tpspec"), degree=degree, example_inputs=example)
    assert program.cuts
