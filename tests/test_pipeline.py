"""Stages: how a rewritten graph is parted, and pipelines of real processes that train as one device does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from test_composition import ddp, fsdp
from test_distributed_models import Widened
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from training import LARGEST_NORM, adamw, apart, batch, loss_of, next_token_loss, of_torch, parameters_apart

import tpcompile
from tpcompile import shards
from tpcompile.capture import capture
from tpcompile.compare import backward
from tpcompile.compiler import rewrite_captured
from tpcompile.errors import TpcompileError
from tpcompile.layers import repeated_layers
from tpcompile.module import TensorParallel
from tpcompile.pipeline import owners, pipeline_stage, stage_graph, stages_of
from tpcompile.program import Options, Program
from tpcompile.simulate import Simulation
from tpcompile.spec import Spec

LAYERS = 3
PER_LAYER = Options(per_layer=True)
Answers = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- parting a graph
def untied(name: str, layers: int = LAYERS, training: bool = False) -> nn.Module:
    """The model of the catalogue with an output head of its own."""
    config: Any = zoo.build(name, layers).config
    config.tie_word_embeddings = False
    kind: Any = type(zoo.build(name, layers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).train(training)


def rewritten(name: str, degree: int, layers: int = LAYERS, options: Options = PER_LAYER) -> Program:
    model, inputs, text = untied(name, layers), zoo.inputs(name), zoo.MODELS[name].spec
    assert text is None
    spec = tpcompile.compiler.choose_spec(model, None)
    return rewrite_captured(capture(model, (), inputs), spec, model, degree, ((), inputs), options=options)


def parted(program: Program, count: int) -> tuple[list[fx.Graph], Mapping[str, int]]:
    """The graphs of all stages, and the stage of every parameter."""
    layers = repeated_layers(program.captured.module_classes)
    parameters = set(program.captured.parameters)
    stages = stages_of(program.graph, layers, parameters, count)
    held = owners(program.graph, stages, layers, parameters)
    return [stage_graph(program.graph, stages, stage, layers) for stage in range(count)], held


def in_turn(program: Program, graphs: Sequence[fx.Graph], inputs: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Outputs and gradients of each simulated rank, each stage fed with what the one before it returns."""
    captured, mesh = program.captured, program.mesh
    others = {**captured.buffers, **captured.constants}
    ranks = shards.attributes(captured.parameters, others, program.parameters, mesh)
    flat = captured.flatten((), inputs)
    received: list[list[Any]] = [[] for _ in ranks]
    for graph in graphs:
        module = fx.GraphModule(program.graph_module, graph)
        simulation = Simulation(module, len(ranks), mesh.all_groups(), ranks)
        received = [list(x) for x in simulation.run([[*own, *flat] for own in received])]
    backward(*received)
    return received, [{n: x.grad for n, x in own.items() if x.grad is not None} for own in ranks]


@pytest.mark.parametrize(
    ("name", "degree", "count", "options"),
    [
        ("gpt2", 2, 2, PER_LAYER),
        ("gpt2", 1, 3, PER_LAYER),
        ("llama_few_kv", 4, 2, PER_LAYER),
        ("gpt_neox", 2, 3, PER_LAYER),
        ("falcon_mqa", 2, 2, PER_LAYER),
        ("llama_gqa", 2, 3, Options(per_layer=True, sequence_parallel=True)),
        ("gpt2", 3, 2, Options(per_layer=True, sequence_parallel=True, recompute="attention")),
    ],
)
def test_stages_in_turn_are_the_whole_graph_bit_for_bit(name: str, degree: int, count: int, options: Options) -> None:
    program, inputs = rewritten(name, degree, options=options), zoo.inputs(name)
    graphs, held = parted(program, count)
    outputs, gradients = in_turn(program, [program.graph], inputs)
    found, found_gradients = in_turn(program, graphs, inputs)
    for rank in range(degree):
        assert all(torch.equal(a, b) for a, b in zip(outputs[rank], found[rank], strict=True))
        assert gradients[rank].keys() == found_gradients[rank].keys() == held.keys()
        assert all(torch.equal(g, found_gradients[rank][n]) for n, g in gradients[rank].items())


def test_a_stage_reads_its_own_layers_alone() -> None:
    graphs, held = parted(rewritten("gpt2", 2), 3)
    for stage, graph in enumerate(graphs):
        read = {str(node.target) for node in graph.find_nodes(op="get_attr")} & held.keys()
        assert read == {name for name, at in held.items() if at == stage}
        assert {name.split(".")[2] for name in read if ".h." in name} == {str(stage)}
    assert held["transformer.wte.weight"] == held["transformer.wpe.weight"] == 0
    assert held["transformer.ln_f.weight"] == held["lm_head.weight"] == 2


def test_only_activations_travel() -> None:
    """Masks, positions and rotary tables are computed again by every stage."""
    for name in ("gpt2", "llama_uneven"):
        graphs, _ = parted(rewritten(name, 2), 3)
        for graph in graphs[:-1]:
            assert len(graph.output_node().all_input_nodes) == 1


# What is refused.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Twice(nn.Module):
    """All layers run, and then once more."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.h, *self.h):
            x = block(x)
        return x


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(TpcompileError, match="3 layers cannot be parted into 4 stages") as caught:
        parted(rewritten("gpt2", 2), 4)
    assert "transformer.h.0, transformer.h.1, transformer.h.2" in str(caught.value)


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(TpcompileError, match=r"parameter transformer\.wte\.weight is read in stages 0, 1") as caught:
        parted(zoo.program("nanogpt", 2), 2)
    assert "tie_word_embeddings=False" in str(caught.value)


def test_layers_that_run_again_are_refused() -> None:
    model, x = Twice(), (torch.ones(2, 4),)
    spec = Spec.parse("h.*.up column\nh.*.down row")
    program = rewrite_captured(capture(model, x), spec, model, 2, (x, {}), options=PER_LAYER)
    with pytest.raises(TpcompileError, match=r"layer h\.0 is in stage 0 and needs what stage 1 makes"):
        parted(program, 2)


def test_dropout_is_refused_with_its_place() -> None:
    with pytest.raises(TpcompileError, match="draws random numbers cannot be parted") as caught:
        parted(zoo.program("gpt2", 2, training=True), 2)
    assert caught.value.where is not None


def test_parameters_gathered_at_the_top_are_refused() -> None:
    with pytest.raises(TpcompileError, match=r"parameter model\.layers\.1.* is read in stage 0") as caught:
        parted(zoo.program("qwen3", 2), 2)
    assert caught.value.help == "compile with per_layer=True"


# ---------------------------------------------------------------------------------------------------- real processes
Wrap = Callable[[TensorParallel, DeviceMesh], nn.Module]
MICRO_BATCHES = 2
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


def alone(stage: TensorParallel, mesh: DeviceMesh) -> nn.Module:
    return stage


def trained(name: str, schedule: str, grid: DeviceMesh, wrap: Wrap, steps: int, in_graph: bool = False) -> Answers:
    """Steps of AdamW with clipping beside those of one device; the loss of the graph itself, or one of its logits."""
    model = untied(name).double()
    example = {"input_ids": batch(0), "use_cache": False}
    whole = tpcompile.compile(
        model, example_inputs=example | ({"labels": batch(0)} if in_graph else {}), mesh=grid, per_layer=True
    )
    part = pipeline_stage(whole, grid["pp"])
    del whole
    wrapped = wrap(part, grid["dp"])
    index, count = grid.get_local_rank("pp"), grid["pp"].size()
    last = index == count - 1
    rows = 8 // grid["dp"].size() // MICRO_BATCHES
    sizes = (rows, zoo.LENGTH)
    known = activations(sizes, index, last, in_graph) if wrap is ddp else {}
    stage = PipelineStage(wrapped, index, count, torch.device("cpu"), group=grid.get_group("pp"), **known)
    runner = SCHEDULES[schedule](stage, MICRO_BATCHES, loss_fn=first if in_graph else next_token_loss)
    optimizers = [adamw(model), adamw(wrapped)]
    answers: dict[str, Any] = {"losses": [], "norms": [], "found": [], "found norms": [], "of a stage": []}
    for step in range(steps):
        ids = batch(step, 8)
        loss = loss_of(model, ids)
        loss.backward()
        mine = ids.chunk(grid["dp"].size())[grid.get_local_rank("dp")]
        losses: list[Tensor] = []
        inputs: dict[str, Any] = {"input_ids": mine, "use_cache": False} | ({"labels": mine} if in_graph else {})
        runner.step(target=mine, losses=losses, return_outputs=False, **inputs)
        average = torch.stack(losses).mean().detach() if last else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(average, group=grid.get_group("dp"))
        answers["losses"].append(float(loss.detach()))
        answers["found"].append(float(average) / grid["dp"].size())
        answers["norms"].append(float(of_torch(model, LARGEST_NORM)))
        answers["of a stage"].append(norm_of_this_stage(part))
        answers["found norms"].append(float(tpcompile.clip_grad_norm_(wrapped, LARGEST_NORM)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state, wanted = tpcompile.full_state_dict(part), model.state_dict()
    return answers | {
        "last": last,
        "index": index,
        "parameters": parameters_apart({n: wanted[n] for n in state}, state),
        "names": list(state),
        "all names": list(wanted),
    }


def norm_of_this_stage(part: TensorParallel) -> float:
    """The control: what clipping would use if stages did not add up theirs."""
    group, part._stage_group = part._stage_group, None
    norm = float(tpcompile.grad_norm(part))
    part._stage_group = group
    return norm


def activations(sizes: tuple[int, int], index: int, last: bool, in_graph: bool) -> dict[str, Any]:
    """What travels, which DistributedDataParallel cannot bear to be found by a trial run of its module."""
    hidden = torch.empty(*sizes, zoo.WIDTH, dtype=torch.float64, requires_grad=True)
    logits = torch.empty(*sizes, zoo.VOCABULARY, dtype=torch.float64, requires_grad=True)
    loss = [torch.empty((), dtype=torch.float64, requires_grad=True)] if in_graph else []
    return {"input_args": (hidden,) if index else (), "output_args": (*loss, logits) if last else (hidden,)}


def first(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return outputs[0]


def on_a_grid(name: str, shape: tuple[int, int, int], kinds: Sequence[tuple[str, Wrap, bool]], steps: int) -> Answers:
    torch.set_num_threads(1)
    grid = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp"))
    with Widened():
        return {
            f"{schedule} {wrap.__name__}": trained(name, schedule, grid, wrap, steps, in_graph)
            for schedule, wrap, in_graph in kinds
        }


def check(answers: Sequence[Answers]) -> None:
    for kind in answers[0]:
        stages = [own[kind] for own in answers]
        names = [n for index in dict.fromkeys(s["index"] for s in stages) for n in _of(stages, index)]
        assert sorted(names) == sorted(stages[0]["all names"]), "each parameter in one stage"
        for own in stages:
            assert own["parameters"] < 1e-9
            assert apart(own["norms"], own["found norms"]) < 1e-9
            assert apart(own["norms"], own["of a stage"]) > 1e-3
            assert min(own["norms"]) > LARGEST_NORM
            assert not own["last"] or apart(own["losses"], own["found"]) < 1e-9
        assert len({tuple(own["found norms"]) for own in stages}) == 1
        assert len(set(stages[0]["losses"])) > 1


def _of(stages: Sequence[Answers], index: int) -> list[str]:
    return next(s["names"] for s in stages if s["index"] == index)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "tp"), [("gpt2", 1), pytest.param("qwen3", 2, marks=pytest.mark.slow)])
def test_two_stages_train_as_one_device(name: str, tp: int) -> None:
    kinds = [("GPipe", alone, False), ("1F1B", alone, True)]
    check(run(on_a_grid, 2 * tp, name, (2, 1, tp), kinds, 2))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_dimensions_train_as_one_device() -> None:
    kinds = [("1F1B", ddp, False), ("1F1B", fsdp, False), ("GPipe", ddp, True), ("GPipe", fsdp, False)]
    check(run(on_a_grid, 8, "gpt2", (2, 2, 2), kinds, 4, timeout=600.0))
