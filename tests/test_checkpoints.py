"""Checkpoints: saved at one degree and resumed at another, bit by bit; whatever kills a save, the last one is there."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import zoo
from distributed import run
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from test_distributed_models import Widened
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import WORDS, adamw, apart, batch, loss_of

import tpcompile
from tpcompile import pieces, shards
from tpcompile.checkpoints import INDEX
from tpcompile.errors import TpcompileError
from tpcompile.module import TensorParallel
from tpcompile.pieces import Part, described, overlaps, read_part, uncut, write_parts
from tpcompile.whole_state import gathered

MODELS = ("gpt2", "llama_uneven", "falcon_mqa")  # packed and tied; 9 heads on 3 kv heads; k and v whole on every rank
BITS: Mapping[torch.dtype, torch.dtype] = {torch.float64: torch.int64, torch.float32: torch.int32}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


# ------------------------------------------------------------------------------------------ pieces, without processes
def written(folder: Path, name: str, degree: int) -> tuple[Mapping[str, Tensor], Mapping[str, Any], dict[int, Any]]:
    """The whole weights of a model, and the pieces that ``degree`` ranks write of them."""
    program = zoo.program(name, degree)
    whole = {n: p.detach() for n, p in program.captured.parameters.items()}
    index: Mapping[str, Any] = {}
    for rank in range(degree):
        parts = {
            n: Part(shards.cut(p, program.parameters[n], program.mesh, rank), program.parameters[n])
            for n, p in whole.items()
        }
        index = described(parts, program.mesh)
        write_parts(folder / f"{rank}.safetensors", parts, program.mesh, rank)
    opener: Any = safe_open
    files = {rank: opener(folder / f"{rank}.safetensors", framework="pt") for rank in range(degree)}
    return whole, json.loads(json.dumps(index)), files


def reread(
    name: str, degree: int, index: Mapping[str, Any], files: Mapping[int, Any]
) -> Iterator[tuple[str, int, Tensor]]:
    program = zoo.program(name, degree)
    for n, dims in program.parameters.items():
        for rank in range(degree):
            yield n, rank, read_part(files, n, index[n], dims, program.mesh, rank)


@pytest.mark.parametrize(
    ("name", "degree"),
    [(n, d) for n in (*MODELS, "llama_few_kv", "gpt_neox") for d in sorted({1, *zoo.MODELS[n].degrees})],
)
def test_pieces_of_one_degree_are_the_parts_of_every_other(name: str, degree: int, tmp_path: Path) -> None:
    degrees = {1, *zoo.MODELS[name].degrees}
    whole, index, files = written(tmp_path, name, degree)
    stored = sum(len(file.keys()) for file in files.values())
    assert stored == sum(len(tensor["pieces"]) for tensor in index.values())
    sizes = [f.get_tensor(key).numel() for f in files.values() for key in f.keys()]  # noqa: SIM118
    assert sum(sizes) == sum(x.numel() for x in whole.values()), "every position once"
    for other in sorted(degrees):
        program = zoo.program(name, other)
        for n, rank, part in reread(name, other, index, files):
            assert same_bits(part, shards.cut(whole[n], program.parameters[n], program.mesh, rank)), (n, other, rank)


def test_the_comparison_sees_a_piece_in_another_place(tmp_path: Path) -> None:
    whole, index, files = written(tmp_path, "gpt2", 2)
    name = "transformer.h.0.attn.c_attn.weight"
    first, second = index[name]["pieces"]
    first["box"], second["box"] = second["box"], first["box"]
    program = zoo.program("gpt2", 3)
    wrong = [
        n for n, rank, part in reread("gpt2", 3, index, files)
        if not same_bits(part, shards.cut(whole[n], program.parameters[n], program.mesh, rank))
    ]  # fmt: skip
    assert {*wrong} == {name}


def test_a_position_that_is_in_no_piece_is_an_error(tmp_path: Path) -> None:
    _, index, files = written(tmp_path, "gpt2", 2)
    name = "transformer.h.0.attn.c_attn.weight"
    del index[name]["pieces"][1]
    with pytest.raises(TpcompileError, match=rf"has not all of {name}"):
        list(reread("gpt2", 3, index, files))


def test_overlaps_of_runs() -> None:
    assert overlaps([(0, 4), (8, 4)], [(2, 8)]) == [(2, 0, 2), (4, 6, 2)]
    assert overlaps([(0, 2)], [(2, 2)]) == []


@pytest.mark.parametrize("dtype", [*pieces.DTYPES])
def test_the_files_are_what_safetensors_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6).view(2, 3).T.to(dtype),
        "b": torch.ones(()).to(dtype),
        "c": torch.ones(0, 3).to(dtype),
    }
    shapes = {n: (x.dtype, tuple(x.shape)) for n, x in {**tensors, "wide": torch.ones(3).double()}.items()}
    given = {**tensors, "wide": torch.ones(3).double()}
    pieces.write_safetensors(tmp_path / "x", shapes, (given[n] for n in pieces.order(shapes)), {"format": "pt"})
    found = load_file(tmp_path / "x")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.double())


def test_a_scalar_and_an_empty_tensor_are_read_again(tmp_path: Path) -> None:
    mesh = zoo.program("gpt2", 2).mesh
    parts = {"s": uncut(torch.tensor(3.5)), "e": uncut(torch.ones(0, 4))}
    write_parts(tmp_path / "0", parts, mesh, 0)
    opener: Any = safe_open
    files = {0: opener(tmp_path / "0", framework="pt")}
    for name, part in parts.items():
        got = read_part(files, name, described(parts, mesh)[name], part.dims, mesh, 1)
        assert torch.equal(got, part.tensor)


# ------------------------------------------------------------------------------------------ one rank, in this process
def compiled(name: str, seed: int = 0, layers: int = 2) -> TensorParallel:
    model = zoo.build(name, layers).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * seed)
    return tpcompile.compile(model, example_inputs={"input_ids": batch(0), "use_cache": False})


@pytest.fixture(scope="module")
def two(group: None) -> tuple[TensorParallel, TensorParallel]:
    """Two modules of one model with different weights."""
    return compiled("gpt2"), compiled("gpt2", seed=1)


def changed(tp: TensorParallel) -> None:
    with torch.no_grad():
        for parameter in tp.parameters():
            parameter.add_(torch.randn_like(parameter))


def weights(tp: TensorParallel) -> dict[str, Tensor]:
    return {n: x.clone() for n, x in tpcompile.full_state_dict(tp).items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


Two = tuple[TensorParallel, TensorParallel]


def test_what_was_saved_is_loaded_and_extra_comes_back(two: Two, tmp_path: Path) -> None:
    one, other = two
    extra: dict[str, Any] = {
        "step": 3,
        "best": float("inf"),
        "rng": torch.get_rng_state(),
        "betas": (0.9, [0.95, None, True]),
    }
    tpcompile.save(tmp_path / "c", one, extra=extra)
    assert not equal(weights(one), weights(other))
    found = tpcompile.load(tmp_path / "c", other)
    assert equal(weights(one), weights(other))
    assert torch.equal(found.pop("rng"), extra.pop("rng"))
    assert found == extra
    keys = [key for file in (tmp_path / "c").glob("*/*.safetensors") for key in load_file(file)]
    assert [key for key in keys if "wte" in key or "lm_head" in key] == ["weights/transformer.wte.weight#0"], "once"


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(two: Two, tmp_path: Path, monkeypatch: Any) -> None:
    """Every write, sync, rename and removal of a save is, in turn, the one that does not happen."""
    one, other = two
    tpcompile.save(tmp_path, one, extra=0)
    old = weights(one)
    changed(one)
    new = weights(one)
    left = [-1]

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return called

    for owner, name in ((pieces, "put"), (os, "fsync"), (os, "replace"), (shutil, "rmtree"), (os, "mkdir")):
        monkeypatch.setattr(owner, name, fatal(getattr(owner, name)))
    seen: list[int] = []
    for moment in range(1000):
        left[0] = moment
        try:
            tpcompile.save(tmp_path, one, extra=1)
        except Killed:
            left[0] = 10**9
            seen.append(tpcompile.load(tmp_path, other))
            assert equal(weights(other), new if seen[-1] else old), moment
        else:
            break
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}, "kills before and after the new one is complete"
    assert len(seen) > 30, "as many moments as there are tensors"
    assert len([*tmp_path.iterdir()]) == 2, "the index and one folder: what kills left behind is removed"


def test_the_kill_test_sees_a_checkpoint_that_is_not_replaced_in_one_step(two: Two, tmp_path: Path) -> None:
    """What the loop above would find if parts were written over those of the old checkpoint."""
    one, other = two
    tpcompile.save(tmp_path, one)
    old = weights(one)
    changed(one)
    tpcompile.save(tmp_path / "new", one)
    (file,) = (tmp_path / "new").glob("*/*.safetensors")
    (victim,) = tmp_path.glob("parts-*/*.safetensors")
    shutil.copy(file, victim)
    tpcompile.load(tmp_path, other)
    assert not equal(weights(other), old)


def test_optimizers_come_back(two: Two, tmp_path: Path) -> None:
    one, other = two
    optimizer = adamw(one)
    loss_of(one, batch(0)).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.125
    tpcompile.save(tmp_path, one, optimizer)
    with torch.no_grad():
        fresh = adamw(other)
    tpcompile.load(tmp_path, other, fresh)
    assert fresh.param_groups[0]["lr"] == 0.125
    assert fresh.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    a, b = optimizer.state_dict(), fresh.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        assert all(same_bits(x, b["state"][number][key]) for key, x in state.items())
        assert b["state"][number].keys() == state.keys()


def test_what_cannot_be_saved_is_refused(two: Two, tmp_path: Path) -> None:
    one, _ = two
    with pytest.raises(TpcompileError, match=r"extra/a/1 is a set, which cannot be saved"):
        tpcompile.save(tmp_path / "c", one, extra={"a": [1, {2}]})
    with pytest.raises(TpcompileError, match=r"the key 1 in extra"):
        tpcompile.save(tmp_path / "c", one, extra={1: 2})
    with pytest.raises(TpcompileError, match=r"state of Adafactor cannot be saved"):
        tpcompile.save(tmp_path / "c", one, torch.optim.Adafactor(one.parameters()))
    with pytest.raises(TpcompileError, match=r"parameter 0 of group 0 .* not one of the module's"):
        tpcompile.save(tmp_path / "c", one, torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    with pytest.raises(TpcompileError, match=r"Linear is not a compiled module"):
        tpcompile.save(tmp_path / "c", nn.Linear(2, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(TpcompileError, match=r"file is a file"):
        tpcompile.save(tmp_path / "file", one)
    assert not (tmp_path / "c").exists()


def test_what_is_divided_further_is_refused(group: None, tmp_path: Path, monkeypatch: Any) -> None:
    tp = compiled("gpt2", layers=1)
    monkeypatch.setattr(tp, "_stage_group", tp.group)
    for action in (tpcompile.save, tpcompile.load, tpcompile.export):
        with pytest.raises(TpcompileError, match=r"a stage of a pipeline has only a part of the model"):
            action(tmp_path / "c", tp)
    monkeypatch.undo()
    fully_shard(tp, mesh=init_device_mesh("cpu", (1,)))
    for action in (tpcompile.save, tpcompile.load, tpcompile.export):
        with pytest.raises(TpcompileError, match=r"fully_shard has divided transformer.wte.weight"):
            action(tmp_path / "c", tp)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_refused_by_name(two: Two, tmp_path: Path) -> None:
    one, _ = two
    tpcompile.save(tmp_path, one)
    with pytest.raises(TpcompileError, match=r"another model\n.*lm_head.weight is \[128, 64\] here, and not"):
        tpcompile.load(tmp_path, compiled("llama"))
    index = json.loads((tmp_path / INDEX).read_text())
    index["tensors"]["weights/transformer.wpe.weight"]["shape"] = [16, 64]
    (tmp_path / INDEX).write_text(json.dumps(index))
    before = weights(one)
    with pytest.raises(TpcompileError, match=r"wpe.weight is \[16, 64\] F64 in the checkpoint, \[32, 64\] F64 here"):
        tpcompile.load(tmp_path, one)
    assert equal(before, weights(one)), "nothing was loaded"


def test_another_optimizer_is_refused(two: Two, tmp_path: Path) -> None:
    one, _ = two
    tpcompile.save(tmp_path / "bare", one)
    with pytest.raises(TpcompileError, match=r"has no optimizer's state"):
        tpcompile.load(tmp_path / "bare", one, adamw(one))
    tpcompile.save(tmp_path / "c", one, adamw(one))
    with pytest.raises(TpcompileError, match=r"state of AdamW, not of SGD"):
        tpcompile.load(tmp_path / "c", one, torch.optim.SGD(one.parameters()))
    with pytest.raises(TpcompileError, match=r"has 1 groups, that of the checkpoint 2"):
        tpcompile.load(tmp_path / "c", one, torch.optim.AdamW(one.parameters()))
    optimizer = adamw(one)
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].append(moved)
    with pytest.raises(TpcompileError, match=r"only the checkpoint has transformer"):
        tpcompile.load(tmp_path / "c", one, optimizer)


def test_damage_is_found_before_anything_is_loaded(two: Two, tmp_path: Path) -> None:
    one, other = two
    with pytest.raises(TpcompileError, match=r"is not a checkpoint\n.*no such folder"):
        tpcompile.load(tmp_path / "none", other)
    with pytest.raises(TpcompileError, match=rf"is not a checkpoint\n.*it has no {INDEX}"):
        tpcompile.load(tmp_path, other)
    tpcompile.save(tmp_path, one)
    (file,) = tmp_path.glob("*/*.safetensors")
    content, before = file.read_bytes(), weights(other)
    file.write_bytes(content[:-1])
    with pytest.raises(TpcompileError, match=rf"has {len(content) - 1} bytes, and was written with {len(content)}"):
        tpcompile.load(tmp_path, other)
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(TpcompileError, match=r"rank0.safetensors is damaged"):
        tpcompile.load(tmp_path, other)
    file.unlink()
    with pytest.raises(TpcompileError, match=r"rank0.safetensors is missing"):
        tpcompile.load(tmp_path, other)
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text[:-9])
    with pytest.raises(TpcompileError, match=rf"{INDEX} is damaged"):
        tpcompile.load(tmp_path, other)
    (tmp_path / INDEX).write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(TpcompileError, match=r"of version 2; this tpcompile reads version 1"):
        tpcompile.load(tmp_path, other)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(TpcompileError, match=r"does not say"):
        tpcompile.load(tmp_path, other)
    assert equal(before, weights(other))


def test_export_is_the_original_model(group: None, tmp_path: Path) -> None:
    model: Any = zoo.build("gpt2")
    tp = tpcompile.compile(model, example_inputs=zoo.inputs("gpt2"))
    tpcompile.export(tmp_path / "out", tp)
    model.save_pretrained(tmp_path / "theirs")
    assert same_files(tmp_path / "theirs", tmp_path / "out")
    tpcompile.export(tmp_path / "sharded", tp, max_shard_size=100_000)
    assert len([*(tmp_path / "sharded").glob("model-*-of-*.safetensors")]) > 3
    for name in ("out", "sharded"):
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name)
        assert equal(again.state_dict(), model.state_dict())
        assert again.lm_head.weight is again.transformer.wte.weight
        assert again.config.to_dict().keys() == model.config.to_dict().keys()
    with pytest.raises(TpcompileError, match=r"out is there already"):
        tpcompile.export(tmp_path / "out", tp)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "theirs", "sharded"}, "nothing temporary is left"
    changed(tp)
    tpcompile.export(tmp_path / "trained", tp)
    assert not same_files(tmp_path / "theirs", tmp_path / "trained")


def same_files(theirs: Path, ours: Path) -> bool:
    """Names, shapes and bits of the weights, and the config."""
    same_config = json.loads((theirs / "config.json").read_text()) == json.loads((ours / "config.json").read_text())
    files = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    return same_config and {*os.listdir(theirs)} == {*os.listdir(ours)} and equal(*files)


def test_export_of_a_model_that_is_not_of_transformers(group: None, tmp_path: Path) -> None:
    model = zoo.build("nanogpt")
    from tpcompile.spec import Spec

    text = zoo.MODELS["nanogpt"].spec
    tp = tpcompile.compile(model, text and Spec.parse(text), example_inputs=zoo.inputs("nanogpt"))
    tpcompile.export(tmp_path / "out", tp)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_model(fresh, tmp_path / "out" / "model.safetensors")
    assert equal(
        {n: p.detach() for n, p in fresh.named_parameters()}, {n: p.detach() for n, p in model.named_parameters()}
    )


# ------------------------------------------------------------------------------------------ real ranks
def start(name: str) -> TensorParallel:
    torch.set_num_threads(1)
    return compiled(name, layers=1)


def steps(tp: TensorParallel, optimizer: torch.optim.Optimizer, begin: int, end: int) -> list[float]:
    losses: list[float] = []
    for step in range(begin, end):
        optimizer.zero_grad()
        with Widened():
            loss = loss_of(tp, batch(step) % WORDS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def everything(tp: TensorParallel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole weights and whole state of the optimizer."""
    found = weights(tp)
    for name, parameter in tp.named_parameters():
        for key, value in optimizer.state[parameter].items():
            whole = value if value.ndim == 0 else gathered(tp, name, value)
            found[f"{name}: {key}"] = whole.clone()
    return found


def save_two_steps(path: Path, tp: TensorParallel) -> Any:
    """Save in the middle of four steps: what was saved, and the losses after it."""
    optimizer = adamw(tp)
    steps(tp, optimizer, 0, 2)
    tpcompile.save(path, tp, optimizer, extra={"step": 2})
    return everything(tp, optimizer), steps(tp, optimizer, 2, 4)


def resume(path: Path, tp: TensorParallel) -> Any:
    """The same, after a resume over other weights."""
    changed(tp)
    optimizer = adamw(tp)
    step = tpcompile.load(path, tp, optimizer)["step"]
    return everything(tp, optimizer), steps(tp, optimizer, step, 4)


def save_all(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: save_two_steps(folder / name, start(name)) for name in names}


def resume_all(folders: list[Path], names: tuple[str, ...]) -> dict[Any, Any]:
    modules = {name: start(name) for name in names}
    return {(folder, name): resume(folder / name, modules[name]) for folder in folders for name in names}


def check_resumed(saved: Any, resumed: Any) -> float:
    """Bits are the same; how far the losses are apart."""
    (state, losses), (again, continued) = saved, resumed
    assert any("exp_avg_sq" in name for name in state)
    assert equal(state, again)
    return apart(losses, continued)


@pytest.mark.distributed
def test_two_ranks_resume_what_one_rank_saved_and_the_other_way_round(group: None, tmp_path: Path) -> None:
    tp = start("llama_uneven")
    saved = save_two_steps(tmp_path / "1", tp)
    answers = run(both_ways, 2, tmp_path, "llama_uneven")
    assert check_resumed(saved, answers[0]["resumed"]) < 1e-10
    assert equal(answers[0]["export"], answers[0]["whole"])
    assert check_resumed(answers[0]["saved"], resume(tmp_path / "2", tp)) < 1e-10
    changed(tp)
    tpcompile.load(tmp_path / "1", tp)
    assert apart(saved[1], steps(tp, adamw(tp), 2, 4)) > 1e-6, "without the optimizer's state it is another run"
    assert answers[0]["alone"] == "tpcompile.save: rank 1 did not come within 0.5 s"
    for answer in answers:
        assert answer["different"] == "ranks save different checkpoints: 1 and 0 differ"
    assert answers[0]["bad"] == "tpcompile.save: rank 1 failed"
    assert answers[1]["bad"] == "extra is a set, which cannot be saved"


def both_ways(folder: Path, name: str) -> dict[str, Any]:
    tp, rank = start(name), dist.get_rank()
    found: dict[str, Any] = {"resumed": resume(folder / "1", tp), "saved": save_two_steps(folder / "2", tp)}
    tpcompile.export(folder / "export", tp)
    if rank == 0:
        found["export"] = load_file(folder / "export" / "model.safetensors")
        found["alone"] = said(lambda: tpcompile.save(folder / "x", tp, timeout=0.5))
    whole = weights(tp)
    found["whole"] = {n: x for n, x in whole.items() if n != "lm_head.weight"}
    found["different"] = said(lambda: tpcompile.save(folder / "x", tp, extra=rank))
    found["bad"] = said(lambda: tpcompile.save(folder / "x", tp, extra={1} if rank else None))
    return found


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except TpcompileError as error:
        return error.what
    return "nothing"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_dies_in_the_middle_of_a_save(group: None, tmp_path: Path) -> None:
    with pytest.raises(TpcompileError, match=r"rank 1 of 2 failed\n.*status 7"):
        run(die, 2, tmp_path)
    assert len([*tmp_path.glob("parts-*")]) == 2, "the old one, and what the dead one has left"
    tp = compiled("gpt2", seed=1)
    assert tpcompile.load(tmp_path, tp) == "old"
    assert equal(weights(tp), weights(compiled("gpt2")))
    tpcompile.save(tmp_path, tp)
    assert len([*tmp_path.glob("parts-*")]) == 1


def die(folder: Path) -> None:
    tp = compiled("gpt2")
    tpcompile.save(folder, tp, extra="old")
    changed(tp)
    put, count = pieces.put, [0]

    def fatal(*args: Any) -> None:
        count[0] += 1
        if count[0] == 9 and dist.get_rank() == 1:
            os._exit(7)
        put(*args)

    pieces.put = fatal
    tpcompile.save(folder, tp, extra="new")


@pytest.mark.slow
@pytest.mark.distributed
def test_of_replicas_the_first_is_written(group: None, tmp_path: Path) -> None:
    run(save_replicas, 2, tmp_path)
    assert [file.name for file in tmp_path.glob("parts-*/*")] == ["rank0.safetensors"]
    tp = compiled("gpt2", seed=1)
    assert tpcompile.load(tmp_path, tp) == "one of two"
    assert equal(weights(tp), weights(compiled("gpt2")))


def save_replicas(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    inputs = {"input_ids": batch(0), "use_cache": False}
    tp = tpcompile.compile(zoo.build("gpt2").double(), example_inputs=inputs, mesh=mesh)
    ddp = nn.parallel.DistributedDataParallel(tp, process_group=mesh.get_group("dp"))
    tpcompile.save(folder, ddp, extra="one of two")
    before = weights(tp)
    changed(tp)
    assert tpcompile.load(folder, ddp) == "one of two"
    assert equal(before, weights(tp))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_every_degree_resumes_every_degree(tmp_path: Path) -> None:
    degrees = [1, 2, 3, 4]
    saved = {degree: run(save_all, degree, tmp_path / str(degree), MODELS)[0] for degree in degrees}
    worst = 0.0
    for degree in degrees:
        resumed = run(resume_all, degree, [tmp_path / str(other) for other in degrees], MODELS)[0]
        for other in degrees:
            for name in MODELS:
                worst = max(worst, check_resumed(saved[other][name], resumed[tmp_path / str(other), name]))
    print(f"losses after a resume: {worst:.1e} apart")
    assert worst < 1e-10
