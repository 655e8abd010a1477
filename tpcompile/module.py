"""``compile``: this rank's module, on torch.distributed.

The module holds plain local parameters under the original names, in the original module tree at layer granularity.
The code that runs is the rewritten graph, bound to this rank: local sizes filled in, groups by their c10d names.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
import torch.fx
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpcompile import shards
from tpcompile.caches import Cut, mark_cut, restores, taken_apart
from tpcompile.capture import outside_autocast, set_apart
from tpcompile.capture_check import check_capture
from tpcompile.compiler import Inputs, SpecLike, call_arguments, held_parts, rewrite
from tpcompile.effects import is_random
from tpcompile.errors import CaptureError, ShardingError, TpcompileError
from tpcompile.generation import generate, part_of
from tpcompile.groups import group_of
from tpcompile.held import Held
from tpcompile.kept_values import keep
from tpcompile.layers import Functions, install, module_at, read_outside, repeated_layers, tensor_at
from tpcompile.layout import Layout, axes_of
from tpcompile.onlookers import is_transformed
from tpcompile.placement import Placement
from tpcompile.program import Asked, Options, Program
from tpcompile.rank_code import bind, bind_groups
from tpcompile.same_calls import check_same_call, is_due
from tpcompile.same_ranks import check_same, check_same_generators, check_same_inputs, check_same_weights, layout_text
from tpcompile.spec import Spec
from tpcompile.traced_calls import Accepts, accepts
from tpcompile.whole_gradients import watch
from tpcompile.whole_state import is_dtensor

Read = Callable[[str], torch.Tensor]
"""From the canonical name of a parameter to this rank's part of it, as a tensor of its own."""
MAX_VARIANTS = 64
UNTRACED = (
    "tpcompile has no graph yet for this call (its arguments, sizes, train or eval mode, autocast): "
    "call the module once without torch.compile, as it will be called with it"
)
"""What torch.compile(fullgraph=True) says to a call that must be captured, or refused, first."""


@set_apart()
def compile(
    model: nn.Module,
    spec: SpecLike = None,
    *,
    example_inputs: Inputs = None,
    mesh: DeviceMesh | None = None,
    **options: Unpack[Asked],
) -> TensorParallel:
    """This rank's module: called, trained and saved like ``model``, with the same signature and outputs.

    Collective: every rank of the mesh calls it with the same model (same weights), spec and example inputs; the model
    itself is left alone, and may be deleted afterwards. It runs the model and its captured graph once on the example
    inputs, forward and (unless under torch.no_grad) backward, whole and on one device, to compare them.

    Args:
        spec: a path to a ``.tpspec``, a :class:`Spec`, or None for the shipped spec of the model's class, or a plan.
        example_inputs: keyword arguments as a dict, or positional ones as a tuple; transformers models have defaults.
        mesh: a 1-D DeviceMesh, or one with a dim called ``tp``; None for all ranks.
        options: see :class:`tpcompile.program.Options`.

    Raises:
        TpcompileError: see :func:`tpcompile.rewrite`; and when there is no process group, when parameters are on the
            meta device or made in inference mode, when ranks bring different programs or weights
            (RuntimeMismatchError), or when the model computes something else for the example inputs than its captured
            graph (CaptureError).
    """
    group = group_of(mesh)
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise TpcompileError(
            f"parameter {meta} is on the meta device: it has no value",
            why="compile gives every rank its part of the weights",
            help="load the weights first; for a model without weights use tpcompile.rewrite or the command line",
        )
    inferred = next((n for n, p in model.named_parameters() if p.is_inference()), None)
    if inferred is not None:
        raise TpcompileError(
            f"parameter {inferred} was made in torch.inference_mode",
            why="autograd cannot read such a tensor, so the model cannot be traced",
            help="build, load or copy the model outside of torch.inference_mode; compile may be called inside of it",
        )
    given = call_arguments_as_inputs(model, example_inputs)
    program = rewrite(model, spec, degree=group.size(), example_inputs=given, **options)
    check_capture(program, model, *call_arguments(model, example_inputs))
    check_same(program, group)
    check_same_weights(model, group)
    assert program.spec is not None, "rewrite finds or plans one"
    module = TensorParallel(model, program, program.spec, group)
    forget_weights(program)
    return module


def call_arguments_as_inputs(model: nn.Module, example_inputs: Inputs) -> Inputs:
    """The example inputs, or the model's defaults, as :func:`rewrite` takes them."""
    args, kwargs = call_arguments(model, example_inputs)
    return kwargs if not args else (args if not kwargs else example_inputs)


@dataclass(frozen=True, eq=False)
class _Variant:
    """One captured form of the model: modes of its modules, a set of arguments."""

    program: Program
    modes: list[bool]  # of all modules
    frozen: list[str]  # parameters to which its code lets no gradient flow
    call: Callable[..., Any]
    random: bool
    outside: list[str]  # tensors of layers that code outside of the layer reads
    accepts: Accepts  # what torch.compile asks
    cuts: Mapping[int, Cut]  # flat outputs of which a rank holds a part: tensors of caches
    part: str | None  # the method that returns the part of the model that this is; None: the whole
    restore: Callable[[Sequence[Any], Sequence[Any]], Any]  # the model's own outputs, from flat ones and the caches

    def run(self, module: nn.Module, *tensors: torch.Tensor) -> Any:
        """Flat outputs of the code, which has the casts of autocast in it."""
        outputs = outside_autocast(self.call, self.program.captured.autocast)(module, *tensors)
        for index, cut in self.cuts.items():
            mark_cut(outputs[index], cut)
        return outputs

    def takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether caches are cut as in this graph."""
        return self.program.held == held_parts(self.program.captured, tensors)


class TensorParallel(nn.Module):
    """One rank of a model: local parameters under the original names, and the rewritten code.

    Other modes (of any module), arguments or autocast than those compiled for are compiled on their first call, by all
    ranks together; so is a gradient of parameters that were frozen.
    """

    def __init__(
        self, model: nn.Module, program: Program, spec: Spec, group: dist.ProcessGroup, read: Read | None = None
    ):
        """``read`` gives this rank's parts, for a model that has no weights; by default they are cut from its own."""
        super().__init__()
        captured = program.captured
        self._group = group
        self._spec = spec
        self._options = program.options
        self._layouts = dict(program.parameters)
        self._mesh = program.mesh
        self._functions = Functions()
        self._layers = repeated_layers(captured.module_classes)
        self._names = {n: c for n, c in captured.aliases.items() if c in captured.parameters}
        self._names |= {n: n for n in captured.parameters}
        self._groups = bind_groups(program.mesh, group)
        self._stage_group: dist.ProcessGroup | None = None  # the stages of a pipeline, if this is one of them
        self._variants: list[_Variant] = []
        self._called: list[_Variant] = []
        self._calls = 0
        self._random_checked = False
        object.__setattr__(self, "_skeleton", _skeleton(model))
        self._untraced: Callable[..., Any] = torch.compiler.disable(self._eager, reason=UNTRACED)
        if hasattr(model, "config"):
            self.config = cast("Any", model).config
        self._fill(model, program, read or _own_weights(program, dist.get_rank(group)))
        self._held = Held(self, self._names, captured.module_classes)
        self.train(model.training)
        self._held.take_modes(model)
        self._add_variant(program)

    # ------------------------------------------------------------------------------------------------ parameters
    def _fill(self, model: nn.Module, program: Program, read: Read) -> None:
        """This rank's parameters and the model's buffers, under every name the model has for them."""
        for path in program.captured.module_classes:
            module_at(self, path, self._layers, model)
        local: dict[str, nn.Parameter] = {}
        for name, canonical in self._names.items():
            if canonical not in local:
                whole = program.captured.parameters[canonical]
                local[canonical] = nn.Parameter(read(canonical), requires_grad=whole.requires_grad)
                local[canonical].grad_dtype = whole.grad_dtype
            path, _, last = name.rpartition(".")
            module_at(self, path, self._layers)._parameters[last] = local[canonical]
        watch((name, x) for name, x in local.items() if any(axes_of(dim) for dim in self._layouts.get(name, ())))
        persistent = set(model.state_dict(keep_vars=True))
        tensors = {**program.captured.buffers, **program.captured.constants}
        for name in dict.fromkeys([*(n for n, _ in model.named_buffers()), *tensors]):
            tensor = tensors.get(captured_name(program, name))
            if tensor is None:
                tensor = model.get_buffer(name)
            path, _, last = name.rpartition(".")
            module_at(self, path, self._layers).register_buffer(last, tensor.detach().clone(), name in persistent)

    def parameter_layouts(self) -> Mapping[str, tuple[Layout, ...]]:
        """How every parameter is cut: one layout per dim, by original name."""
        return {name: self._layouts[c] for name, c in self._names.items() if c in self._layouts}

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        """Modules, parameters and buffers of its own; the ranks and the code are shared."""
        copied = memo[id(self)] = object.__new__(type(self))
        shared = [self._group, self._stage_group, self._functions, self.__dict__.get("_skeleton"), *self._variants]
        memo |= {id(x): x for x in shared}
        copied.__dict__ = copy.deepcopy({n: x for n, x in self.__dict__.items() if n != "_untraced"}, memo)
        copied._untraced = torch.compiler.disable(copied._eager, reason=UNTRACED)
        return copied

    def __getstate__(self) -> Any:
        """Refused: pickled, it would be tied to this run's process groups."""
        raise TpcompileError(
            "a compiled module cannot be pickled",
            why="it holds the process group of this run, and only one rank's part of the weights",
            help="save it with tpcompile.save or tpcompile.export, or its tensors with tp.state_dict() or "
            "tpcompile.full_state_dict(tp)",
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # what torch keeps beside a state dict, in files too
            destination._metadata[prefix[:-1]]["rank"] = self._rank()

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        found, mine = local_metadata.get("rank"), self._rank()
        if found is not None and found != mine:
            raise TpcompileError(
                f"this is the state dict of rank {found[0]} of {found[1]}, and this is rank {mine[0]} of {mine[1]}",
                why="every rank holds other parts of the weights, of the same names and often of the same shapes",
                help="have every rank save to and load from a file of its own; tpcompile.save and tpcompile.load need "
                "no file per rank, nor the same number of ranks",
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _rank(self) -> list[int]:
        """This rank's index among those that the model is cut over, and how many they are."""
        return [dist.get_rank(self._group), self._group.size()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TensorParallel:
        sample = next(iter(self.parameters()), None)
        changed = sample if sample is None else fn(sample.detach().reshape(-1)[:0])
        if sample is not None and changed is not None:
            before, after = (f"{x.dtype} on {x.device}" for x in (sample, changed))
            if before != after:
                raise TpcompileError(
                    f"a compiled module cannot be moved from {before} to {after}",
                    why="dtypes and devices are part of the captured graph",
                    help="convert the model first, then compile it",
                )
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------------------------------------ code
    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that the model is cut over."""
        return self._group

    @property
    def original(self) -> nn.Module | None:
        """The model that was compiled, without its weights (parameters on meta); None if it could not be copied."""
        return cast("nn.Module | None", object.__getattribute__(self, "_skeleton"))

    @property
    def program(self) -> Program:
        """The rewritten program that was compiled first."""
        return self._variants[0].program

    def _add_variant(
        self, program: Program, part: str | None = None, renamed: Mapping[str, str] | None = None
    ) -> _Variant:
        bound = bind(program, dist.get_rank(self._group), self._groups, renamed or {})
        keep(bound, frozenset(program.captured.parameters), self._functions.of)
        call = install(self, bound, self._layers, self._functions, program.captured.training)
        random = any(map(is_random, program.graph.nodes))
        outside = read_outside(bound, self._layers)
        variant = _Variant(
            program,
            self._held.modes(),
            [n for n, p in program.captured.parameters.items() if not p.requires_grad],
            call,
            random,
            outside,
            accepts(program.captured),
            cache_cuts(program),
            part,
            restores(program.captured.out_spec),
        )
        self._variants.append(variant)
        return variant

    def _variant_for(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: str | None = None
    ) -> tuple[_Variant, list[torch.Tensor]]:
        variants = [v for v in self._variants if v.part == part and self._fits(v)]
        for variant in variants:
            if (flat := variant.accepts(args, kwargs)) is not None and variant.takes(flat):
                return variant, flat
        refused: CaptureError | None = None
        for variant in variants:
            try:
                flat = variant.program.captured.flatten(args, kwargs)
                if variant.takes(flat):
                    return variant, flat
            except CaptureError as error:
                refused = refused or error
        variant = self._captured_again(args, kwargs, part, refused)
        return variant, variant.program.captured.flatten(args, kwargs)

    @set_apart()
    def _captured_again(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: str | None, refused: CaptureError | None
    ) -> _Variant:
        """The graph of a call that none fits, of which one was ``refused``."""
        skeleton = self.original
        if skeleton is None or len(self._variants) >= MAX_VARIANTS:
            raise refused or CaptureError(
                f"the model was compiled for {'eval' if self.training else 'train'} mode",
                why="it cannot be copied, so it cannot be captured again",
                help="compile it in the mode that you run",
            )
        self._held.lend_modes(skeleton)
        try:
            model = skeleton if part is None else part_of(skeleton, part)
            program = rewrite_call(model, self._spec, self._group.size(), args, kwargs, self._options)
        except TpcompileError as error:
            raise error from refused
        check_same(program, self._group)
        self._check_layouts(program)
        return self._add_variant(program, part, self._add_constants(program))

    def _fits(self, variant: _Variant) -> bool:
        """Whether its graph was made in these modes, and for a gradient of every parameter that asks for one."""
        if variant.modes != self._held.modes():
            return False
        return not (variant.frozen and torch.is_grad_enabled() and self._held.trains(variant.frozen))

    def _check_layouts(self, program: Program) -> None:
        """Another call's graph must find the parameters, and the caches, as they are held."""
        if program.held and program.mesh != self._mesh:
            raise ShardingError(
                "this call needs a cache cut in another way than it is held",
                why=f"held over {self._mesh.sizes}, needed over {program.mesh.sizes}",
                help="compile with the arguments of this call",
            )
        read = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
        for name, needed in program.parameters.items():
            if name not in read:
                continue
            held = self._layouts.get(name, ())
            cut = any(axes_of(dim) for dim in (*held, *needed))
            if cut and (program.mesh, needed) != (self._mesh, held):
                raise ShardingError(
                    f"this call needs {name} cut in another way than it is held",
                    why=f"held as {layout_text(held, self._mesh)}, needed as {layout_text(needed, program.mesh)}: "
                    "its graph ties the dims of parameters in another way than the one compiled first",
                    help="compile with the arguments, and in the mode (train or eval), of this call",
                )

    def _add_constants(self, program: Program) -> dict[str, str]:
        """Hold the constants of another call's graph too, and say which have other names here: a graph numbers those
        that have no name of their own."""
        held = dict(self.named_buffers(remove_duplicate=False))
        renamed: dict[str, str] = {}
        for name, tensor in program.captured.constants.items():
            own = name
            if name.startswith("_lifted."):
                again = (f"{name}_{i}" if i else name for i in itertools.count())
                own = next(n for n in again if n not in held or _same_bytes(held[n], tensor))
            if own != name:
                renamed[name] = own
            if own not in held:
                path, _, last = own.rpartition(".")
                held[own] = tensor.detach().clone()
                module_at(self, path, self._layers).register_buffer(last, held[own], persistent=False)
        return renamed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own signature and outputs; whole (gathered) outputs on every rank."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self._traced(args, kwargs)
        if is_transformed():
            return self._transformed(args, kwargs)
        return self._eager(args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the model's class; see :func:`tpcompile.generation.generate`. Collective."""
        return generate(self, *args, **kwargs)

    def run_part(self, part: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One part of the model, that which its method ``part`` returns, called by itself. Collective."""
        return self._eager(args, kwargs, part)

    def _eager(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: str | None = None) -> Any:
        self._check_data_parallel()
        if is_due(self._calls):
            check_same_call(args, kwargs, self.training, self._group)
        self._calls += 1
        args, kwargs, live = taken_apart(args, kwargs)
        variant, flat = self._variant_for(args, kwargs, part)
        if variant not in self._called:
            check_same_inputs(flat, self._group)
            self._called.append(variant)
        if variant.random:
            self._check_generators()
        self._check_held(variant)
        return variant.restore(variant.run(self, *flat), live)

    def _check_held(self, variant: _Variant) -> None:
        """Refuse what ``fully_shard`` may have made of parameters and the graph does not know."""
        for name in variant.outside:
            if is_dtensor(tensor_at(self, name)):
                raise TpcompileError(
                    f"fully_shard has divided {name}, which is read outside of its layer",
                    why="FSDP2 gathers a layer's parameters only while the layer runs",
                    help="compile with per_layer=True, or apply fully_shard to the whole module alone",
                )
        self._held.check()

    def _traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``forward`` as torch.compile traces it: the graph alone, where there is one for this call."""
        if (known := self._known(args, kwargs)) is None:
            return self._untraced(args, kwargs)
        variant, flat = known
        if variant.random:
            self._check_generators()
        return variant.program.captured.unflatten(variant.run(self, *flat))

    def _transformed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``forward`` inside of torch.func: the graph alone, since ranks cannot compare values there."""
        if (known := self._known(args, kwargs)) is None:
            raise CaptureError(
                "there is no graph yet for this call inside of a transform of torch.func",
                why="a model cannot be captured while grad, vmap or another transform looks on",
                help="first call the module once outside of it, with arguments of the shapes that they have inside, in "
                "the same mode (train or eval) and autocast",
            )
        variant, flat = known
        return variant.program.captured.unflatten(variant.run(self, *flat))

    def _known(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[_Variant, Sequence[torch.Tensor]] | None:
        """The graph that there is for a call, told without looking at values, and its inputs."""
        for variant in self._variants:
            if variant.part is not None or variant.program.held or not self._fits(variant):
                continue
            if (flat := variant.accepts(args, kwargs)) is not None:
                return variant, flat
        return None

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Refused: what is kept for backward is part of the graph."""
        raise TpcompileError(
            "gradient checkpointing cannot be switched on in a compiled module",
            why="what backward keeps and what it computes again is decided when the graph is made",
            help='leave it off here, and compile with recompute="layers"',
        )

    def _check_data_parallel(self) -> None:
        """DistributedDataParallel over these ranks would average the gradients of different parts."""
        around = cast("Any", nn.parallel.DistributedDataParallel)._active_ddp_module
        if around is None:
            return
        shared = {*dist.get_process_group_ranks(around.process_group)} & {*dist.get_process_group_ranks(self._group)}
        if len(shared) > 1:
            raise TpcompileError(
                f"DistributedDataParallel over the ranks {sorted(shared)} that the model is cut over",
                why="it has copied the parts of one rank to the others, and would average gradients of different parts",
                help="wrap over the other dim of a mesh, DistributedDataParallel(tp, process_group=mesh['dp']."
                "get_group()); for transformers use tpcompile.trainer.Trainer",
            )

    def _check_generators(self) -> None:
        """Ranks must draw the same dropout masks: once, before the first of them (when traced: while tracing)."""
        if self._random_checked:
            return
        check_same_generators(self._group)
        self._random_checked = True

    setattr(_check_generators, "_dynamo_marked_constant", True)  # noqa: B010 - assume_constant_result, without Dynamo


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    x, y = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(x, y)


def rewrite_call(
    model: nn.Module, spec: Spec, degree: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options
) -> Program:
    """The program for one call, positional and keyword arguments as they come."""
    from tpcompile.compile_cache import cached_capture
    from tpcompile.compiler import rewrite_captured

    captured = cached_capture(model, args, kwargs)
    return rewrite_captured(captured, spec, model, degree, (args, kwargs), options=options)


def cache_cuts(program: Program) -> dict[int, Cut]:
    """The tensors of caches, among a graph's flat outputs, of which a rank holds a part."""
    outputs: Any = program.graph.output_node().args[0]
    cuts: dict[int, Cut] = {}
    for index in program.resident:
        placed = outputs[index].meta.get("placement") if isinstance(outputs[index], torch.fx.Node) else None
        if isinstance(placed, Placement) and (cut := {d: x for d, x in enumerate(placed.dims) if axes_of(x)}):
            cuts[index] = cut
    return cuts


def captured_name(program: Program, name: str) -> str:
    """Canonical name of a buffer or parameter."""
    return program.captured.aliases.get(name, name)


def _own_weights(program: Program, rank: int) -> Read:
    """Parts of the parameters that the model itself has."""

    def read(name: str) -> torch.Tensor:
        whole = program.captured.parameters[name].detach()
        return shards.cut(whole, program.parameters.get(name, ()), program.mesh, rank).clone()

    return read


def forget_weights(program: Program) -> None:
    """Let go of the whole weights, in place: a rank holds its part of them, and a program needs only their shapes."""
    for name, parameter in program.captured.parameters.items():
        program.captured.parameters[name] = _shape_of(parameter)
    for stage in (program, *(stage.program for stage in program.history)):
        for module in stage.graph_module.modules():
            for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                module.register_parameter(name, _shape_of(parameter))


def _shape_of(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def _skeleton(model: nn.Module) -> nn.Module | None:
    """The model without its weights (parameters on meta), kept to be captured again; None if it cannot be copied."""
    memo: dict[int, Any] = {id(p): _shape_of(p) for p in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001  whatever a module's own __deepcopy__ raises
        return None


__all__ = ["TensorParallel", "compile"]
