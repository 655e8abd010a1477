"""A process group of one rank alone: its collectives are local copies of the same size.

What one rank computes on a machine of many can then be timed on one device. Reduced values are this rank's own, and
gathered ones too: they are wrong, and of the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

_work_of: Any = getattr(getattr(torch, "_C")._distributed_c10d, "_create_work_from_future")  # noqa: B009


def _done(tensors: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(tensors)
    return _work_of(future)


class Copies(dist.ProcessGroup):
    """The methods that torch.distributed calls, under the names of torch 2.11 to 2.15."""

    def __init__(self, rank: int, ranks: int):
        super().__init__(rank, ranks)
        self.ranks, self.called = ranks, ""

    def getBackendName(self) -> str:
        return "copies"

    def setGroupName(self, name: str) -> None:
        self.called = name

    def getGroupName(self) -> str:
        return self.called

    def barrier(self, *_: Any) -> Any:
        return _done([])

    def broadcast(self, tensors: Sequence[Tensor], *_: Any) -> Any:
        return _done(tensors)

    def allreduce(self, tensors: Sequence[Tensor], *_: Any) -> Any:
        for x in tensors:
            x.copy_(x.clone())
        return _done(tensors)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], *_: Any) -> Any:
        for parts, x in zip(outputs, tensors, strict=True):
            for part in parts:
                part.copy_(x)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, x: Tensor, *_: Any) -> Any:
        output.view(self.ranks, -1).copy_(x.reshape(1, -1))
        return _done([output])

    def reduce_scatter_single(self, output: Tensor, x: Tensor, *_: Any) -> Any:
        output.view(-1).copy_(x.reshape(self.ranks, -1)[0])
        return _done([output])

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], *_: Any) -> Any:
        for output, x in zip(outputs, tensors, strict=True):
            self.all_gather_single(output, x)
        return _done(outputs)

    def reduce_scatter_single_coalesced(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], *_: Any) -> Any:
        for output, x in zip(outputs, tensors, strict=True):
            self.reduce_scatter_single(output, x)
        return _done(outputs)

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def be_one_of(ranks: int) -> None:
    """Be the first of ``ranks`` ranks in this process."""
    if "copies" not in dist.Backend.backend_list:
        dist.Backend.register_backend("copies", lambda _, rank, n, __: Copies(rank, n), devices=["cpu", "cuda"])
    dist.init_process_group("copies", rank=0, world_size=ranks, store=dist.HashStore())


__all__ = ["Copies", "be_one_of"]
