"""Hugging Face's Trainer on a compiled module: the losses, weights and files of one device."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import transformers
import zoo
from distributed import run
from torch import Tensor, nn

import tpcompile
from tpcompile.compare import relative_error
from tpcompile.errors import TpcompileError

STEPS = 3


class Lines(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of ids; some labels are left out, as padding is."""

    def __init__(self) -> None:
        self.ids = torch.randint(1, zoo.VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.ids[i].clone()
        labels[: i % 4] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def arguments(folder: str, **changes: Any) -> transformers.TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 5, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**given, **changes})


def model() -> nn.Module:
    made = zoo.build("gpt2", 1, training=True).double()
    cast("Any", made).config.use_cache = False
    return made


def losses(trainer: transformers.Trainer) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def on_one_device(folder: str) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, float]]:
    """The plain Trainer on a process of its own."""
    torch.set_num_threads(1)
    one: Any = model()
    trainer = transformers.Trainer(model=one, args=arguments(folder), train_dataset=Lines(), eval_dataset=Lines())
    trainer.train()
    return losses(trainer), one.state_dict(), trainer.evaluate()


def refusal(work: Any) -> str:
    try:
        work()
    except TpcompileError as error:
        return f"{error.what}\n{error.why}\n{error.help}"
    return "nothing was refused"


class Divided(Lines):
    """Other rows on the second rank."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return super().__getitem__((i + dist.get_rank()) % len(self))


def on_a_rank(folder: str) -> dict[str, Any]:
    from tpcompile.trainer import Trainer

    torch.set_num_threads(1)
    inputs = {"input_ids": Lines().ids[:4], "labels": Lines().ids[:4]}
    tp = tpcompile.compile(model(), example_inputs=inputs)
    trainer = Trainer(tp, arguments(folder), train_dataset=Lines(), eval_dataset=Lines())
    trainer.train()
    found: dict[str, Any] = {"losses": losses(trainer), "state": tpcompile.full_state_dict(tp)}
    found["evaluated"] = trainer.evaluate()
    found["predicted"] = len(trainer.predict(Lines()).predictions)  # pyright: ignore[reportArgumentType]
    trainer.save_model()
    dist.barrier()

    def plain() -> None:
        again = tpcompile.compile(model(), example_inputs=inputs)
        kept = arguments(folder, remove_unused_columns=False)
        transformers.Trainer(model=again, args=kept, train_dataset=Lines()).train()

    found["divided"] = refusal(Trainer(tp, arguments(folder), train_dataset=Divided()).train)
    for name, changes in {
        "adafactor": {"optim": "adafactor"},
        "checkpoints": {"save_strategy": "steps"},
        "recomputed": {"gradient_checkpointing": True},
    }.items():
        found[name] = refusal(lambda c=changes: Trainer(tp, arguments(folder, **c), train_dataset=Lines()).train())
    found["not compiled"] = refusal(lambda: Trainer(model(), arguments(folder)))
    found["plain"] = refusal(plain)
    return found


@cache
def answers() -> tuple[Any, list[dict[str, Any]], str]:
    import tempfile

    folder = tempfile.mkdtemp()
    (one,) = run(on_one_device, 1, folder)
    return one, run(on_a_rank, 2, folder), folder


pytestmark = pytest.mark.distributed


def test_the_losses_and_gradient_norms_are_those_of_one_device() -> None:
    (expected, _, _), ranks, _ = answers()
    assert len(expected) == STEPS
    for rank in ranks:
        for wanted, got in zip(expected, rank["losses"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)


def test_print():
    one, ranks, folder = answers()
    print(one[0], one[2])
    for r in ranks: print({k: v for k, v in r.items() if k != "state"})
    import os; print(os.listdir(folder))
    for r in ranks: print(max(relative_error(one[1][n], r["state"][n]) for n in one[1]))
