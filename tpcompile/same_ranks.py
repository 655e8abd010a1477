"""All ranks bring the same: programs, weights, inputs. Asked before the first collective that would need it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import nn

from tpcompile.caches import cut_of
from tpcompile.errors import RuntimeMismatchError
from tpcompile.launch import check_same_program
from tpcompile.layout import Layout, Mesh
from tpcompile.program import Program
from tpcompile.same_calls import VARIABLE, setting


def check_same(program: Program, group: dist.ProcessGroup) -> None:
    """All ranks bring the same program, before the first of its collectives."""
    parameters = "\n".join(
        f"{n}: {tuple(p.shape)} {p.dtype} as {layout_text(program.parameters.get(n, ()), program.mesh)}"
        for n, p in program.captured.parameters.items()
    )
    described = f"{parameters}\n{program.options}\n{VARIABLE}: {setting()}\n{program.text()}"
    check_same_program(f"{torch.__version__}\n{described}", group, described)


def layout_text(dims: Sequence[Layout], mesh: Mesh) -> str:
    """The layout of a tensor, one per dim, with the names of the mesh's axes."""
    return mesh.named(f"[{', '.join(map(str, dims))}]")


def check_same_weights(model: nn.Module, group: dist.ProcessGroup) -> None:
    """All ranks bring the same weights: compared by a sample of every tensor, so the check costs next to nothing."""
    samples: list[str] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].double().cpu().contiguous()
        samples.append(f"{name} {sha256(sample.numpy().tobytes()).hexdigest()[:16]}")
    try:
        check_same_program("\n".join(samples), group, "\n".join(samples))
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(
            "ranks bring different weights",
            why=(error.why or "").replace("of the program", "of the weights' fingerprints"),
            help="load the same checkpoint on every rank, or call torch.manual_seed(same) before building the model",
        ) from error


def check_same_inputs(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """All ranks were given the same tensors. Collective.

    Raises:
        RuntimeMismatchError: they were not, or not as many.
    """
    if any(type(x) is not torch.Tensor for x in tensors):  # fake, or of a tracer
        return
    described: list[str] = []
    for i, tensor in enumerate(tensors):
        if cut_of(tensor):  # every rank's own part
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 65536)].cpu().clone(memory_format=torch.contiguous_format)
        digest = sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        described.append(f"tensor {i}: {list(tensor.shape)} {tensor.dtype} {digest}")
    try:
        check_same_program("\n".join(described), group, "\n".join(described))
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(
            "ranks were given different inputs",
            why=(error.why or "").replace("of the program", "of the inputs' fingerprints"),
            help="every rank of tensor parallelism runs the same batch: do not divide the data over these ranks",
        ) from error


def check_same_generators(group: dist.ProcessGroup) -> None:
    """All ranks draw the same random numbers next. Collective."""
    state = sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    try:
        check_same_program(state, group, state)
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(
            "ranks are seeded differently, and the model draws random numbers (dropout)",
            why="every rank draws the masks of the whole model, so that they are those of one device",
            help="call torch.manual_seed(same) on every rank before the first step",
        ) from error


__all__ = ["check_same", "check_same_generators", "check_same_inputs", "check_same_weights", "layout_text"]
