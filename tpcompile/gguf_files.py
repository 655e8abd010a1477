"""Tensors of a GGUF file, one at a time: dequantized, put into the order that transformers has them in, and cut.

Which tensor of the file is which parameter, and what is done to it (llama.cpp permutes q and k), is transformers' own
table (``transformers.modeling_gguf_pytorch_utils``), and dequantization is the ``gguf`` package's. A rank reads every
tensor that it needs a part of whole, since blocks and permutations do not follow the cuts, and keeps its part.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tpcompile.checkpoint_files import Stored, fingerprint
from tpcompile.errors import TpcompileError
from tpcompile.layout import Runs

DEQUANTIZED = 1 << 20  # elements at a time
Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Packed:
    """A tensor as the file has it."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of its numbers
    dtype: Any  # of numpy, and
    packed: tuple[int, ...]  # the shape of what is in the file
    offset: int
    bytes: int


class GgufFile:
    """The tensors of one file, under the names that ``model`` has for them.

    Raises:
        TpcompileError: the ``gguf`` package is missing, or the file is truncated, is no GGUF file, or is of a kind that
            ``transformers`` does not read.
    """

    def __init__(self, path: Path, model: nn.Module):
        self.path = path
        self.bytes_read = 0
        self.tensors: dict[str, Stored] = {}
        self._parts: dict[str, list[_Packed]] = {}
        try:
            self._open(model)
        except TpcompileError:
            raise
        except Exception as error:  # of gguf and transformers, which have no error class for it
            raise TpcompileError(
                f"{path}: the GGUF file cannot be read",
                why=f"{type(error).__name__}: {error}",
                help="download it again, or convert it again with llama.cpp's convert_hf_to_gguf.py",
            ) from error

    def _open(self, model: nn.Module) -> None:
        gguf: Any = importlib.import_module("gguf")
        loading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        reader = gguf.GGUFReader(self.path)
        if reader.byte_order == "S":
            raise TpcompileError(f"{self.path} is big-endian", help="convert it with gguf-convert-endian")
        (kind,) = loading.read_field(reader, "general.architecture")
        config = loading.load_gguf_checkpoint(str(self.path))["config"]
        self._processor = loading.TENSOR_PROCESSORS.get(kind, loading.TensorProcessor)(config=config)
        self._names = loading.get_gguf_hf_weights_map(model, self._processor)
        self._dequantize = gguf.dequantize
        self._start = int(reader.data_offset)
        for x in reader.tensors:
            shape = tuple(int(n) for n in reversed(x.shape.tolist()))
            self._add(_Packed(x.name, x.tensor_type, shape, x.data.dtype, x.data.shape, x.data_offset, x.n_bytes))

    def _add(self, packed: _Packed) -> None:
        """Note which parameters it is, or is a part of, and of which shape: found without its numbers."""
        last = 1 if len(packed.shape) == 3 else packed.shape[-1]  # experts, of any width, are large
        sample = np.broadcast_to(np.float32(-1), (*packed.shape[:-1], last))
        made_of = self._processed(packed, sample)
        if not made_of:  # the model has no place for it
            self.tensors[packed.name] = Stored(packed.name, self.path, torch.float32, packed.shape, packed.offset)
        for name, made in made_of.items():
            shape = tuple(made.shape)
            shape = (*shape[:-1], packed.shape[-1]) if last != packed.shape[-1] else shape
            self.tensors[name] = Stored(name, self.path, torch.float32, shape, packed.offset)
            self._parts.setdefault(name, []).append(packed)

    def _processed(self, packed: _Packed, numbers: Numbers, box: dict[str, Any] | None = None) -> dict[str, Any]:
        """What transformers makes of a tensor: by the names of parameters; into ``box``, where several make up one."""
        tensors: dict[str, Any] = {} if box is None else box
        made = self._processor.process(
            weights=numbers,
            name=packed.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": tensors},
        )
        if made.name in self._names:
            tensors[self._names[made.name]] = made.weights
        return tensors

    def read(self, stored: Stored, held: Sequence[Runs], dtype: torch.dtype) -> torch.Tensor:
        """The positions ``held`` (runs of every dim) of a tensor, in ``dtype``; all of it is read and dequantized.

        Raises:
            TpcompileError: the file has become shorter than it was, or its numbers are of a kind that is not known.
        """
        box: dict[str, Any] = {}
        for packed in self._parts[stored.name]:
            self._processed(packed, self._numbers(packed), box)
        made = box[stored.name]
        if tuple(made.shape) != stored.shape:
            raise TpcompileError(
                f"{stored} has shape {list(made.shape)}, and should have {list(stored.shape)}",
                why="transformers does not put its parts together for this model",
            )
        part = made if isinstance(made, torch.Tensor) else torch.from_numpy(made)
        for dim, runs in enumerate(held):
            if tuple(runs) != ((0, stored.shape[dim]),):
                part = torch.cat([part.narrow(dim, start, n) for start, n in runs], dim)
        return torch.empty(part.shape, dtype=dtype).copy_(part)

    def _numbers(self, packed: _Packed) -> Numbers:
        """A tensor in float32, a few rows at a time: what dequantization keeps beside its result is small."""
        raw = np.fromfile(self.path, np.uint8, packed.bytes, offset=packed.offset)
        self.bytes_read += raw.size
        if raw.size < packed.bytes:
            raise TpcompileError(
                f"{self.path}: not a whole GGUF file",
                why=f"tensor {packed.name} is bytes {packed.offset} to {packed.offset + packed.bytes}, "
                f"and the file ends at {os.stat(self.path).st_size}",
                help="download it again",
            )
        rows = raw.view(packed.dtype).reshape(-1, packed.packed[-1])
        made = np.empty((len(rows), packed.shape[-1]), np.float32)
        step = max(1, DEQUANTIZED // packed.shape[-1])
        for at in range(0, len(rows), step):
            try:
                made[at : at + step] = self._dequantize(rows[at : at + step], packed.kind)
            except NotImplementedError as error:
                raise TpcompileError(
                    f"{self.path}: tensor {packed.name} is {packed.kind.name}",
                    why=str(error),
                    help="use a file in another quantization, such as Q8_0 or Q4_K",
                ) from error
        return made.reshape(packed.shape)

    def fingerprint(self) -> str:
        """Name, size and a digest of the header and of samples of the content."""
        with self.path.open("rb") as file:

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            return fingerprint(self.path.name, self._start, self.path.stat().st_size, read)


__all__ = ["GgufFile"]
