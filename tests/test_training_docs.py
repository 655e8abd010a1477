"""The programs of docs/training.md, as they stand there, on two real processes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run
from test_pipeline import untied
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
from training import batch, next_token_loss

import tpcompile

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
SIZES = {  # of the meshes, by section
    "Optimizer and clipping": {},
    "Data parallelism": {"dp": 2, "tp": 1},
    "FSDP2": {"dp": 2, "tp": 1},
    "Pipelines": {"pp": 2, "dp": 1, "tp": 1},
}


def programs() -> dict[str, str]:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {s.splitlines()[0]: code for s in sections for code in re.findall(r"^```python\n(.*?)^```", s, re.M | re.S)}


def trained(of: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
    """How far each program moved each weight that it returns."""
    torch.set_num_threads(1)
    moved: list[dict[str, float]] = []
    for section, code in of:
        model = untied("gpt2", layers=2)
        before = {n: x.clone() for n, x in model.state_dict().items()}
        names: dict[str, Any] = {
            "DistributedDataParallel": DistributedDataParallel,
            "PipelineStage": PipelineStage,
            "Schedule1F1B": Schedule1F1B,
            "batches": [batch(0), batch(1)],
            "device": "cpu",
            "example_inputs": {"input_ids": batch(0), "use_cache": False},
            "fully_shard": fully_shard,
            "init_device_mesh": init_device_mesh,
            "model": model,
            "next_token_loss": next_token_loss,
            "torch": torch,
            "tpcompile": tpcompile,
            **SIZES[section],
        }
        exec(compile(code, f"{PAGE.name}: {section}", "exec"), names)
        moved.append({n: float((x - before[n]).abs().max()) for n, x in names["weights"].items()})
    return moved


def test_every_section_has_a_program() -> None:
    assert programs().keys() == SIZES.keys()


@pytest.mark.distributed
def test_the_programs_train() -> None:
    first, second = run(trained, 2, list(programs().items()))
    wanted = untied("gpt2", layers=2).state_dict().keys()
    for mine, other in zip(first, second, strict=True):
        assert mine.keys() | other.keys() == wanted
        assert min([*mine.values(), *other.values()]) > 0
    alike, clipped = first[0], first[1:3]
    for other in clipped:  # the same steps over the same batches
        assert max(abs(alike[n] - x) for n, x in other.items() if "bias" not in n) < 1e-4
