"""Everything that is compared: each contender builds a workload on this rank, and says what it would be used for."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import tpcompile
import tpcompile.shared_memory
from benchmarks.peers.floor import Floor
from benchmarks.peers.workloads import Workload


class NotForThisModelError(Exception):
    """The contender has no way to run this model."""


@dataclass(frozen=True)
class Running:
    """A workload that has been built: what is timed, and what is compared with one device."""

    parameters: Sequence[Tensor]
    logits: Callable[[Tensor], Tensor]  # ids -> whole logits
    loss: Callable[[Tensor, Tensor], Tensor]  # ids, labels -> loss
    gradients: Callable[[], Mapping[str, Tensor]]  # whole, by the model's names
    after_backward: Callable[[], None] = lambda: None
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # loss and backward


@dataclass(frozen=True)
class Contender:
    """``build(workload, training, dtype)`` on every rank; ``alone`` runs on the first rank only."""

    says: str
    build: Callable[[Workload, bool, torch.dtype], Running]
    alone: bool = False
    modes: Sequence[str] = ("inference", "training")


def _model(work: Workload, training: bool, dtype: torch.dtype) -> nn.Module:
    return work.model(dtype).train(training)


def _logits_of(module: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda ids: module(input_ids=ids).logits


def _loss_of(module: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, labels: module(input_ids=ids, labels=labels).loss


# ------------------------------------------------------------------------------------------------ one device, floor
def one_device(work: Workload, training: bool, dtype: torch.dtype) -> Running:
    """The unmodified model."""
    model = _model(work, training, dtype)

    def gradients() -> dict[str, Tensor]:
        return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}

    return Running(list(model.parameters()), _logits_of(model), _loss_of(model), gradients)


def floor(work: Workload, training: bool, dtype: torch.dtype, sequence_parallel: bool = False) -> Running:
    """See :mod:`benchmarks.peers.floor`."""
    model = _model(work, training, dtype)
    made = Floor(work, model, sequence_parallel)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return Running(made.parameters(), made.logits, made.loss, partial(made.gradients, shapes), made.after_backward)


# ------------------------------------------------------------------------------------------------ tpcompile
def compiled(
    work: Workload,
    training: bool,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
    inductor: bool = False,
    backend: str | None = None,
) -> Running:
    """``tpcompile.compile`` with the shipped spec; in training the logits stay cut, since only the loss is used.

    ``backend``: of a process group of its own.
    """
    ids, labels = work.batch_of_tokens()
    example = {"input_ids": ids, "labels": labels} if training else {"input_ids": ids}
    model = _model(work, training, dtype)
    mesh = None if backend is None else DeviceMesh.from_group(dist.new_group(backend=backend), work.device)
    tp = tpcompile.compile(
        model, example_inputs=example, mesh=mesh, gather_logits=not training, sequence_parallel=sequence_parallel
    )
    call: Any = torch.compile(tp, fullgraph=True) if inductor else tp
    return Running(list(tp.parameters()), _logits_of(call), _loss_of(call), lambda: tpcompile.full_gradients(tp))


# ------------------------------------------------------------------------------------------------ DTensor
def _take(positional: bool, residual: Any) -> PrepareModuleInput:
    """Gather a block's input once, however many products read it."""
    if positional:
        return PrepareModuleInput(input_layouts=(residual,), desired_input_layouts=(Replicate(),))
    return PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": residual}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )


@dataclass(frozen=True)
class Plan:
    """The plan of one layer, and where embedding and head are."""

    layers: str
    column: Sequence[str]
    row: Sequence[str]
    blocks: Mapping[str, bool]  # what PrepareModuleInput is put on, and whether its input is positional
    norms: Sequence[str]
    embed: str
    head: str
    last_norm: str = ""


_Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Plan(
    "model.layers", (*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj", "mlp.down_proj"),
    {"self_attn": False, "mlp": True}, ("input_layernorm", "post_attention_layernorm"), "model.embed_tokens",
    "lm_head", "model.norm",
)  # fmt: skip
PLANS: Mapping[str, Plan] = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": Plan(
        "transformer.h", ("attn.c_attn", "mlp.c_fc"), ("attn.c_proj", "mlp.c_proj"), {"attn": True, "mlp": True},
        ("ln_1", "ln_2"), "transformer.wte", "lm_head",
    ),
    "GPTNeoXForCausalLM": Plan(
        "gpt_neox.layers", ("attention.query_key_value", "mlp.dense_h_to_4h"),
        ("attention.dense", "mlp.dense_4h_to_h"), {"attention": True, "mlp": True}, (), "gpt_neox.embed_in", "lm_head",
    ),
    "PhiForCausalLM": Plan(
        "model.layers", (*_Q_K_V, "mlp.fc1"), ("self_attn.dense", "mlp.fc2"), {"self_attn": False, "mlp": True}, (),
        "model.embed_tokens", "lm_head",
    ),
    "BertForMaskedLM": Plan(
        "bert.encoder.layer",
        ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"),
        ("attention.output.dense", "output.dense"), {"attention.self": True}, (), "bert.embeddings.word_embeddings",
        "cls.predictions.decoder",
    ),
}  # fmt: skip


def dtensor(work: Workload, training: bool, dtype: torch.dtype, sequence_parallel: bool = False) -> Running:
    """``parallelize_module``: one gather per block, embedding and head cut along the vocabulary, ``loss_parallel``."""
    plan = PLANS[work.cls]
    if sequence_parallel and not plan.last_norm:
        raise NotForThisModelError("a plan with sequence parallelism is written for the Llama layout only")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = _model(work, training, dtype)
    whole, residual = Replicate(), Shard(1) if sequence_parallel else Replicate()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for layer in model.get_submodule(plan.layers):
        given: dict[str, Any] = {name: ColwiseParallel() for name in plan.column}
        given |= {name: RowwiseParallel(output_layouts=residual) for name in plan.row}
        given |= {name: _take(positional, residual) for name, positional in plan.blocks.items()}
        given |= {name: SequenceParallel() for name in plan.norms if sequence_parallel}
        parallelize_module(layer, mesh, given)
    cut = Shard(-1) if training else whole
    top: dict[str, Any] = {
        plan.embed: RowwiseParallel(input_layouts=whole, output_layouts=residual),
        plan.head: ColwiseParallel(input_layouts=residual, output_layouts=cut, use_local_output=not training),
    }
    if sequence_parallel:
        top[plan.last_norm] = SequenceParallel()
        model.model.register_forward_pre_hook(_positions_of_ids, with_kwargs=True)
    parallelize_module(model, mesh, top)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        if hasattr(model, "cls"):
            model.cls.predictions.bias = model.cls.predictions.decoder.bias

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        target = F.pad(labels, (0, 1), value=-100)[:, 1:] if work.causal else labels
        return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target.flatten())

    return Running(
        list(model.parameters()), _logits_of(model), loss, partial(_gradients, model, work, dtype), around=loss_parallel
    )


def _positions_of_ids(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """transformers counts positions in the embedded tokens, which are a part here."""
    kwargs["position_ids"] = torch.arange((args[0] if args else kwargs["input_ids"]).shape[1])[None]
    return args, kwargs


def _gradients(model: nn.Module, work: Workload, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole gradients of parameters that are DTensors, or whole, or contiguous parts along one dim."""
    wanted = dict(work.model(dtype).named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad, name = parameter.grad, name.removeprefix("module.")
        if grad is None or name not in wanted:
            continue
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else _joined(grad, wanted[name].shape)
    return found


def _joined(part: Tensor, shape: torch.Size) -> Tensor:
    different = [dim for dim, size in enumerate(shape) if part.shape[dim] != size]
    if not different:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, different[0])


# ------------------------------------------------------------------------------------------------ transformers
def tp_plan(work: Workload, training: bool, dtype: torch.dtype) -> Running:
    """``from_pretrained(..., tp_plan="auto")``."""
    cls: Any = getattr(transformers, work.cls)
    model = _model(work, training, dtype)
    if not getattr(model, "_tp_plan", None) and not work.settings.base_model_tp_plan:
        raise NotForThisModelError(f"transformers has no tp_plan for {work.cls}")
    with _saved(model) as folder:
        made = cls.from_pretrained(folder, dtype=dtype, tp_plan="auto").train(training)
    return Running(list(made.parameters()), _logits_of(made), _loss_of(made), partial(_gradients, made, work, dtype))


@contextlib.contextmanager
def _saved(model: Any) -> Any:
    """A checkpoint folder that all ranks see."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    if dist.get_rank() == 0:
        model.save_pretrained(box[0])
    dist.broadcast_object_list(box)
    try:
        yield box[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(box[0], ignore_errors=True)


# ------------------------------------------------------------------------------------------------ DeepSpeed
def auto_tp(work: Workload, training: bool, dtype: torch.dtype) -> Running:
    """DeepSpeed AutoTP: ``init_inference``, or ``initialize`` with ``autotp_size``."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])  # its shared-memory all-reduce reads it
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.module_inject.layers import set_autotp_mode  # pyright: ignore[reportMissingImports]

    set_autotp_mode(training=training)
    model, ranks = _model(work, training, dtype), dist.get_world_size()
    if not training:
        engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": ranks}, dtype=dtype)
        held = list(engine.module.parameters())
        return Running(held, _logits_of(engine.module), _loss_of(engine.module), dict)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {"autotp_size": ranks},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    module: Any = engine.module
    return Running(
        [p for p in module.parameters() if p.requires_grad], _logits_of(module), _loss_of(module),
        partial(_gradients, module, work, dtype),
    )  # fmt: skip


CONTENDERS: Mapping[str, Contender] = {
    "one device": Contender("the unmodified model; the other ranks wait", one_device, alone=True),
    "floor": Contender("written by hand as Megatron-LM does it, on plain tensors", floor),
    "floor, sequence": Contender("the same with sequence parallelism", partial(floor, sequence_parallel=True)),
    "tpcompile": Contender("tpcompile.compile(model), eager", compiled),
    "tpcompile, inductor": Contender(
        "torch.compile(tpcompile.compile(model), fullgraph=True)", partial(compiled, inductor=True)
    ),
    "tpcompile, shared memory": Contender(
        'tpcompile.compile(model) on a process group of the backend "shm"', partial(compiled, backend="shm")
    ),
    "tpcompile, sequence": Contender(
        "tpcompile.compile(model, sequence_parallel=True)", partial(compiled, sequence_parallel=True)
    ),
    "DTensor": Contender("parallelize_module with PrepareModuleInput, and loss_parallel", dtensor),
    "DTensor, sequence": Contender("the same with SequenceParallel", partial(dtensor, sequence_parallel=True)),
    "transformers": Contender('from_pretrained(tp_plan="auto")', tp_plan),
    "DeepSpeed": Contender(
        "AutoTP: init_inference, which sums through shared memory of its own, or initialize with autotp_size", auto_tp
    ),
}
