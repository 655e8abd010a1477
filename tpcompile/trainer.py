"""Hugging Face's Trainer on a compiled module.

To the Trainer the ranks of tensor parallelism are one device: all of them see every batch, whole, and one of them
writes. So it is told that there is one process, and what it would do with a rank's parts as if they were whole (the
gradient norm, saving) is done for the original model here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from tpcompile.errors import TpcompileError
from tpcompile.gradients import clip_grad_norm_
from tpcompile.module import TensorParallel
from tpcompile.same_ranks import check_same_inputs
from tpcompile.whole_state import full_state_dict

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers of the Trainer that treat every element alone: those of a part are those of the whole."""


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for what :func:`tpcompile.compile` returned: the same arguments, losses and files.

    Every rank makes one, with the same arguments and data; ``per_device_train_batch_size`` is the batch of all ranks
    together. ``save_model`` is collective and writes the original model, as its own ``save_pretrained`` does.

    Raises:
        TpcompileError: the model is not a compiled one, or over a part of the ranks only; the arguments ask for what
            would not be what one device does (an optimizer that looks at whole parameters, fp16 loss scaling, another
            kind of parallelism) or for checkpoints with the optimizer's state.
        RuntimeMismatchError: ranks were given different batches.
    """

    def __init__(self, model: Any, args: transformers.TrainingArguments | None = None, **rest: Any):
        args = args or transformers.TrainingArguments(output_dir="tmp_trainer", save_strategy="no")
        _check_model(model)
        _check_arguments(args, own_optimizer=any(rest.get("optimizers", ())) or "optimizer_cls_and_kwargs" in rest)
        state: Any = args.distributed_state
        state.num_processes, state.distributed_type = 1, DistributedType.NO
        self._compiled = cast("TensorParallel", model)
        super().__init__(model=model, args=args, **rest)
        takes = self._compiled.program.captured.signature.parameters
        takes_more = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self.model_accepts_loss_kwargs = bool(getattr(self._compiled.original, "accepts_loss_kwargs", takes_more))
        if not args.label_names:
            self.label_names = [n for n in takes if "label" in n or n in ("start_positions", "end_positions")]

    def _set_signature_columns_if_needed(self) -> None:
        names = self._compiled.program.captured.signature.parameters
        self._signature_columns = list(dict.fromkeys([*names, "label", "label_ids", *self.label_names]))

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        check_same_inputs([x for x in prepared.values() if isinstance(x, torch.Tensor)], self._compiled.group)
        return prepared

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return clip_grad_norm_(self._compiled, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return clip_grad_norm_(self._compiled, float("inf")) if grad_norm is None else grad_norm

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        whole = full_state_dict(self._compiled)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        original: Any = self._compiled.original
        if hasattr(original, "save_pretrained"):
            original.save_pretrained(folder, state_dict=whole)
        else:
            save_file({n: x.clone() for n, x in whole.items()}, folder / "model.safetensors", {"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise TpcompileError(
            "a checkpoint cannot be loaded into a compiled module by the Trainer",
            why="its files hold whole parameters, and a rank holds parts",
            help="load it into the original model, then compile that",
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, TensorParallel):
        raise TpcompileError(
            f"tpcompile.trainer.Trainer trains what tpcompile.compile returned, not {type(model).__name__}",
            help="compile the model first; for others use transformers.Trainer",
        )
    if model.group.size() != dist.get_world_size():
        raise TpcompileError(
            f"the model is cut over {model.group.size()} of {dist.get_world_size()} ranks",
            why="this Trainer gives every rank the same data and averages no gradients",
            help="start as many ranks as the model is cut over, or write the loop yourself for replicas",
        )


def _check_arguments(args: transformers.TrainingArguments, own_optimizer: bool) -> None:
    def refuse(what: str, why: str, help: str) -> None:
        raise TpcompileError(f"TrainingArguments({what}) cannot be used with a compiled module", why=why, help=help)

    optimizer = str(getattr(args.optim, "value", args.optim))
    if not own_optimizer and optimizer not in ELEMENTWISE:
        refuse(
            f'optim="{optimizer}"',
            "it is not known to treat every element alone, and a rank holds parts of parameters",
            f"use one of {', '.join(ELEMENTWISE)}, or pass an optimizer of which you know it",
        )
    if args.fp16:
        refuse("fp16=True", "each rank would skip steps by the infinities of its own parts", "use bf16=True")
    if args.deepspeed or args.fsdp or args.parallelism_config is not None:
        refuse("deepspeed, fsdp or parallelism_config", "the model is parallel already", "leave it out")
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if args.load_best_model_at_end or (strategy != "no" and not args.save_only_model):
        refuse(
            f'save_strategy="{strategy}"',
            "the optimizer's state of one rank would be saved as if it were all of it",
            'pass save_only_model=True, or save_strategy="no" and call save_model() at the end',
        )


__all__ = ["ELEMENTWISE", "Trainer"]
