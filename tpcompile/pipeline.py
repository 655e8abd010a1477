"""One stage of a compiled module: some of its layers, with the code around them, for torch.distributed.pipelining.

The rewritten graph is cut between layers. What depends on inputs alone (masks, positions, sizes) every stage computes
for itself, so that only activations travel; each rank sends them to the rank of the next stage that has the same place
in tensor parallelism. A parameter belongs to the one stage that reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.effects import has_effect, is_random
from tpcompile.errors import CaptureError, RuntimeMismatchError, TpcompileError
from tpcompile.held import Held
from tpcompile.launch import check_same_program
from tpcompile.layers import Functions, install, module_at, read_outside
from tpcompile.module import TensorParallel
from tpcompile.program import where
from tpcompile.rank_code import bind
from tpcompile.whole_state import is_dtensor

Stages = Mapping[torch.fx.Node, int]
"""The stage of every node that belongs to one; the others depend on inputs and buffers alone, and are anywhere."""


def pipeline_stage(module: TensorParallel, mesh: DeviceMesh) -> Stage:
    """This rank's stage of a compiled module, for ``torch.distributed.pipelining.PipelineStage``.

    Stage i of n has the i-th of n equal runs of the layers; what comes before the layers (embeddings) is in the first,
    what comes after them in the last. Collective over ``mesh``. Parameters are shared with ``module``, which is not
    needed any more: delete it to free those of other stages.

    Args:
        module: what ``tpcompile.compile(..., per_layer=True)`` returned, before ``fully_shard`` and
            DistributedDataParallel, which are applied to the stage.
        mesh: the 1-D mesh of the stages, as ``mesh["pp"]``.

    Raises:
        TpcompileError: the graph cannot be parted so: fewer layers than stages, a parameter that two stages read (tied
            embeddings), layers that run more than once, random numbers (dropout), buffers that the forward writes.
    """
    group = mesh.get_group()
    program = module.program
    text = program.text()
    try:
        check_same_program(text, group, text)
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(
            "stages of one pipeline are of different programs", why=error.why, help=error.help
        ) from error
    graph = bind(program, dist.get_rank(module._group), module._groups)  # pyright: ignore[reportPrivateUsage]
    return Stage(module, graph, group)


class Stage(TensorParallel):
    """One stage: ``stage(*received, **inputs)`` returns what the next one receives; the last one, the model's outputs.

    Every stage takes the model's inputs by keyword, as ``schedule.step(input_ids=ids)`` passes them on all ranks; the
    first also by position. Outputs are the tensors among those of the model, as a tuple, or one alone. Parameters and
    buffers have the original names; over the stages together they are those of the model.
    """

    def __init__(self, whole: TensorParallel, graph: torch.fx.Graph, group: dist.ProcessGroup):
        nn.Module.__init__(self)
        for name in ("_group", "_groups", "_spec", "_options", "_mesh", "_layers"):
            setattr(self, name, getattr(whole, name))
        if hasattr(whole, "config"):
            self.config = whole.config
        self._stage_group = group
        stage, count = dist.get_rank(group), group.size()
        parameters = set(whole._names.values())
        stages = stages_of(graph, self._layers, parameters, count)
        held = {n for n, at in owners(graph, stages, self._layers, parameters).items() if at == stage}
        self._layouts = {n: dims for n, dims in whole._layouts.items() if n in held}
        self._names = {n: c for n, c in whole._names.items() if c in held}
        part = stage_graph(graph, stages, stage, self._layers)
        self._functions = Functions()
        read = {str(node.target) for node in part.find_nodes(op="get_attr")}
        self._fill_from(whole, read, stage)
        call = install(self, part, self._layers, self._functions, whole.program.captured.training)
        first, paths = whole._variants[0], [path for path, _ in self.named_modules()]
        self._held = Held(self, self._names, paths)
        modes = whole._held.modes_of(first.modes, paths)
        frozen = [n for n in first.frozen if n in held]
        outside = read_outside(part, self._layers)
        self._variants = [replace(first, call=call, outside=outside, modes=modes, frozen=frozen)]
        self._last = stage == count - 1
        self._received = len(crossing(graph, stages, stage - 1))
        self._held.take_modes(whole)

    def _fill_from(self, whole: TensorParallel, read: set[str], stage: int) -> None:
        """This stage's parameters and buffers: those of ``whole``; buffers that no code reads stay in the first."""
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            if is_dtensor(parameter):
                raise TpcompileError(
                    f"fully_shard has divided {name} before the module was parted into stages",
                    help="call tpcompile.pipeline_stage first, then fully_shard the stage and its layers",
                )
            if name in self._names:
                path, _, last = name.rpartition(".")
                module_at(self, path, self._layers, whole)._parameters[last] = parameter
        persistent = set(whole.state_dict(keep_vars=True))
        aliases = whole.program.captured.aliases
        for name, buffer in whole.named_buffers(remove_duplicate=False):
            if name in read or aliases.get(name, name) in read or (stage == 0 and name in persistent):
                path, _, last = name.rpartition(".")
                module_at(self, path, self._layers, whole).register_buffer(last, buffer, name in persistent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class."""
        (variant,) = self._variants
        if variant.modes != self._held.modes():
            raise CaptureError(
                f"the stage was compiled for {'train' if variant.program.captured.training else 'eval'} mode",
                why="a stage is a part of one captured graph, in which the mode of every module is fixed",
                help="call model.train() or model.eval() before tpcompile.compile",
            )
        if not self._fits(variant):
            raise CaptureError(
                "the stage was compiled with frozen parameters that ask for gradients now",
                why="its graph lets no gradient flow to them",
                help="call requires_grad_() on parameters before tpcompile.compile",
            )
        self._check_held(variant)
        received, given = args[: self._received], args[self._received :]
        outputs = variant.run(self, *received, *variant.program.captured.flatten(given, kwargs))
        if not self._last:
            return tuple(x.contiguous() for x in outputs)
        tensors = tuple(x for x in outputs if isinstance(x, Tensor))
        return tensors[0] if len(tensors) == 1 else tensors


# ------------------------------------------------------------------------------------------------ parting the graph
def stages_of(graph: torch.fx.Graph, layers: frozenset[str], parameters: Collection[str], count: int) -> Stages:
    """The stage of every node that depends on a parameter, and of the output.

    Layers are parted into equal runs; other nodes are as early as the activations that they read allow, or else, such
    as embeddings, where they are used first.

    Raises:
        TpcompileError: see :func:`pipeline_stage`.
    """
    weighed: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function":
            _check_effect(node)
            if any(x in weighed or (x.op == "get_attr" and x.target in parameters) for x in node.all_input_nodes):
                weighed.add(node)
    in_layers = {node: layer for node in weighed if (layer := _layer(node, layers))}
    order = list(dict.fromkeys(in_layers[node] for node in graph.nodes if node in in_layers))
    if len(order) < count:
        raise TpcompileError(
            f"{len(order)} layers cannot be parted into {count} stages",
            why="layers are the repeated modules of one class: " + (", ".join(order) or "there are none"),
            help=f"use a pipeline of at most {max(1, len(order))} stages",
        )
    own = {layer: index * count // len(order) for index, layer in enumerate(order)}
    stages: dict[torch.fx.Node, int] = {graph.output_node(): count - 1}
    for node in graph.nodes:
        before = max((stages[x] for x in node.all_input_nodes if x in stages), default=None)
        layer = in_layers.get(node)
        if layer is not None and not (node.target is operator.getitem and before is not None):
            if before is not None and before > own[layer]:
                raise TpcompileError(
                    f"layer {layer} is in stage {own[layer]} and needs what stage {before} makes",
                    where=where(node),
                    why="a pipeline runs its stages in order, each layer once",
                    help="use fewer stages",
                )
            stages[node] = own[layer]
        elif node in weighed and before is not None:
            stages[node] = before
    for node in reversed(graph.nodes):
        if node in weighed and node not in stages:
            stages[node] = min((stages[user] for user in node.users), default=0)
    return stages


def _check_effect(node: torch.fx.Node) -> None:
    if is_random(node):
        raise TpcompileError(
            "a model that draws random numbers cannot be parted into stages",
            where=where(node),
            why="stages draw for themselves, so the numbers (dropout masks) would not be those of one device",
            help="set dropout to 0, or compile the model in eval mode",
        )
    if has_effect(node):
        raise TpcompileError(
            "a model that writes into its buffers cannot be parted into stages",
            where=where(node),
            why="every micro-batch would do so again",
            help="compile the model in eval mode, or without a pipeline",
        )


def _layer(node: torch.fx.Node, layers: frozenset[str]) -> str | None:
    """The layer whose code a node is; sizes are nobody's."""
    if isinstance(node.meta.get("val"), int | torch.SymInt):
        return None
    return next((m for m in node.meta.get("modules") or () if m in layers), None)


def owners(
    graph: torch.fx.Graph, stages: Stages, layers: frozenset[str], parameters: Collection[str]
) -> Mapping[str, int]:
    """The stage of every parameter, by canonical name: the one that reads it; what nobody reads is with its layer.

    Raises:
        TpcompileError: two stages read it, or another one than that of its layer.
    """
    homes = {layer: stage for node, stage in stages.items() if (layer := _layer(node, layers))}
    found = {name: homes.get(_layer_of(name, layers) or "", 0) for name in parameters}
    for node in graph.find_nodes(op="get_attr"):
        name, layer = str(node.target), _layer_of(str(node.target), layers)
        readers = sorted({stages[user] for user in node.users}) if name in found else []
        if len(readers) > 1:
            raise TpcompileError(
                f"parameter {name} is read in stages {', '.join(map(str, readers))}",
                why="stages hold no common parameters; embeddings that are tied to the output head are such",
                help="untie them (tie_word_embeddings=False in the config of transformers models), or use no pipeline",
            )
        if layer in homes and readers and readers != [homes[layer]]:
            raise TpcompileError(
                f"parameter {name} is read in stage {readers[0]}, and its layer is in stage {homes[layer]}",
                help="compile with per_layer=True",
            )
        if readers:
            (found[name],) = readers
    return found


def _layer_of(name: str, layers: frozenset[str]) -> str | None:
    return next((layer for layer in layers if name.startswith(f"{layer}.")), None)


def crossing(graph: torch.fx.Graph, stages: Stages, boundary: int) -> list[torch.fx.Node]:
    """The values that stage ``boundary`` sends on: made there or before, and needed later."""
    made = [node for node in graph.nodes if node in stages and stages[node] <= boundary]
    found = [node for node in made if any(stages[user] > boundary for user in node.users)]
    for node in found:
        if not isinstance(node.meta.get("val"), Tensor):
            raise TpcompileError(
                f"stage {boundary + 1} needs {node.name} of stage {boundary}, which is no tensor",
                where=where(node),
                why="only tensors are sent from stage to stage",
                help="use another number of stages, or no pipeline",
            )
    return found


def stage_graph(graph: torch.fx.Graph, stages: Stages, stage: int, layers: frozenset[str]) -> torch.fx.Graph:
    """The code of one stage: takes what it receives, then the model's inputs; returns what it sends, or the outputs."""
    received = crossing(graph, stages, stage - 1)
    output = graph.output_node()
    last = stages[output] == stage
    wanted = output.all_input_nodes if last else crossing(graph, stages, stage)
    needed, waiting = set(received), [*wanted]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            assert stages.get(node, stage) == stage, f"{node} of stage {stages[node]} in stage {stage}"
            needed.add(node)
            waiting += node.all_input_nodes
    homes = {layer: at for node, at in stages.items() if (layer := _layer(node, layers))}
    part = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in received:
        env[node] = part.placeholder(f"received_{node.name}")
    for node in graph.nodes:
        if node.op == "placeholder" or (node in needed and node not in env):
            env[node] = part.node_copy(node, lambda n: env[n])
            if homes.get(_layer(node, layers) or "", stage) != stage:
                env[node].meta["modules"] = ()  # of another stage's layer, computed here again
    results = output.args[0] if last else tuple(wanted)
    part.output(torch.fx.map_arg(cast("Any", results), lambda n: env[n]))
    part.lint()
    return part


__all__ = ["Stage", "crossing", "owners", "pipeline_stage", "stage_graph", "stages_of"]
