"""Hugging Face's Trainer on a compiled module: the losses, weights and files of one device."""

from __future__ import annotations

from collections.abc import Mapping
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
ALLOWED = 1e-6  # weights are float64, but the losses of transformers compute in float32, and the Trainer adds in it
pytestmark = pytest.mark.distributed


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


def on_one_device(folder: str) -> tuple[list[tuple[float, float]], dict[str, Tensor], float]:
    """The plain Trainer on a process of its own."""
    torch.set_num_threads(1)
    one: Any = model()
    trainer = transformers.Trainer(one, arguments(folder), train_dataset=Lines(), eval_dataset=Lines())
    trainer.train()
    return losses(trainer), one.state_dict(), trainer.evaluate()["eval_loss"]


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


def plain(folder: str, inputs: Mapping[str, Tensor]) -> None:
    kept = arguments(folder, remove_unused_columns=False)
    tp = tpcompile.compile(model(), example_inputs=inputs)
    transformers.Trainer(tp, kept, train_dataset=Lines()).train()


def on_a_rank(folder: str) -> dict[str, Any]:
    from tpcompile.trainer import Trainer

    torch.set_num_threads(1)
    inputs = {"input_ids": Lines().ids[:4], "labels": Lines().ids[:4]}
    tp = tpcompile.compile(model(), example_inputs=inputs)
    saving = arguments(folder, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer = Trainer(tp, saving, train_dataset=Lines(), eval_dataset=Lines())
    trainer.train()
    evaluated, predicted = trainer.evaluate()["eval_loss"], trainer.predict(cast("Any", Lines()))
    trainer.save_model()
    dist.barrier()
    found: dict[str, Any] = {"losses": losses(trainer), "state": tpcompile.full_state_dict(tp), "evaluated": evaluated}
    found |= {"predicted": cast("Any", predicted).predictions.shape, "variants": len(tp._variants)}
    found["divided"] = refusal(Trainer(tp, arguments(folder), train_dataset=Divided()).train)
    for name, changes in CHANGED.items():
        found[name] = refusal(lambda c=changes: Trainer(tp, arguments(folder, **c), train_dataset=Lines()).train())
    found["not compiled"] = refusal(lambda: Trainer(model(), arguments(folder)))
    found["plain"] = refusal(lambda: plain(folder, inputs))
    return found


CHANGED: Mapping[str, Mapping[str, Any]] = {
    "adafactor": {"optim": "adafactor"},
    "checkpoints": {"save_strategy": "steps"},
    "checkpointing": {"gradient_checkpointing": True},
}
REFUSED: Mapping[str, tuple[str, str]] = {  # -> what, a part of the rest
    "adafactor": ('TrainingArguments(optim="adafactor") cannot be used with a compiled module', "adamw_torch"),
    "checkpoints": ('TrainingArguments(save_strategy="steps") cannot be used', "save_only_model=True"),
    "checkpointing": ("gradient checkpointing cannot be switched on in a compiled module", "when the graph is made"),
    "divided": ("ranks were given different inputs", "tensor 0: [4, 9] torch.int64"),
    "not compiled": ("tpcompile.trainer.Trainer trains what tpcompile.compile returned, not GPT2", "compile the model"),
    "plain": ("DistributedDataParallel over the ranks [0, 1] that the model is cut over", "tpcompile.trainer.Trainer"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[float, float]], dict[str, Tensor], float]:
    (found,) = run(on_one_device, 1, str(tmp_path_factory.mktemp("one")))
    return found


@pytest.fixture(scope="module")
def ranks(folder: str) -> list[dict[str, Any]]:
    return run(on_a_rank, 2, folder)


def test_losses_and_gradient_norms_are_those_of_one_device(one: Any, ranks: list[dict[str, Any]]) -> None:
    """With dropout, clipping, and two batches a step with different numbers of labels."""
    expected, _, evaluated = one
    assert len(expected) == STEPS
    assert all(norm > 0.5 for _, norm in expected), "clipped"
    for rank in ranks:
        assert rank["losses"] == [pytest.approx(row, rel=ALLOWED) for row in expected]
        assert rank["evaluated"] == pytest.approx(evaluated, rel=ALLOWED)
        assert rank["predicted"] == (len(Lines()), 9, zoo.VOCABULARY)
        assert rank["variants"] == 3, "as compiled, with the count of tokens that the Trainer passes, to evaluate"


def test_the_weights_are_those_of_one_device(one: Any, ranks: list[dict[str, Any]]) -> None:
    _, expected, _ = one
    before = model().state_dict()
    for rank in ranks:
        assert list(rank["state"]) == list(expected)
        assert max(relative_error(expected[n], rank["state"][n]) for n in expected) <= ALLOWED
    assert max(relative_error(expected[n], before[n]) for n in expected) > 1e-3, "they were trained"


def test_what_is_saved_is_the_original_model(folder: str, ranks: list[dict[str, Any]]) -> None:
    loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
    state = loaded.state_dict()
    assert list(state) == list(ranks[0]["state"])
    assert all(torch.equal(state[n], x) for n, x in ranks[0]["state"].items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_checkpoint_on_the_way_is_the_original_model_too(folder: str, ranks: list[dict[str, Any]]) -> None:
    loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(f"{folder}/checkpoint-2", dtype=torch.float64)
    weight = loaded.transformer.h[0].attn.c_attn.weight
    other = ranks[0]["state"]["transformer.h.0.attn.c_attn.weight"]
    assert 0 < relative_error(other, weight) < 0.5, "one step less"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_one_device_is_refused(name: str, ranks: list[dict[str, Any]]) -> None:
    what, rest = REFUSED[name]
    for rank in ranks:
        assert rank[name].startswith(what)
        assert rest in rank[name]
