"""What torch.distributed is really asked for, counted below the functions that ask."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tpcompile.transitions import sent_bytes

Sent = Counter[tuple[str, str, int]]  # kind, direction, bytes that a rank sends -> how often


class Issued(TorchDispatchMode):
    """Counts what torch.distributed itself is asked for, by whoever asks; not the check that all ranks call alike."""

    KINDS: ClassVar = {
        "c10d.allreduce_.default": "all_reduce",
        "c10d._allgather_base_.default": "all_gather",
        "c10d._reduce_scatter_base_.default": "reduce_scatter",
    }

    def __init__(self, into: Sent, direction: str):
        super().__init__()
        self.into, self.direction = into, direction

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d.") and str(func) != "c10d.allgather_.default":
            kind = self.KINDS[str(func)]
            group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
            tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
            whole = max(tensors, key=Tensor.numel)
            sent = sent_bytes(kind, whole.numel(), whole.element_size(), group.size())
            self.into[kind, self.direction, sent] += 1
        return func(*args, **(kwargs or {}))
