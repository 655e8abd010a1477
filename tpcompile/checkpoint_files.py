"""Tensors of safetensors files, read in parts: a header says where each of them lies, and only wanted bytes are read.

Bytes go from their offsets in the file straight into the tensor's own memory. (Pages of a mapped file would count as
memory of the process, and are read around the wanted ones.) Everything that can be wrong with a file's form is found
when it is opened, before a tensor is read. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from tpcompile.errors import TpcompileError
from tpcompile.layout import Runs

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
STAGED = 1 << 20  # elements that are converted to another dtype at a time
SAMPLES, SAMPLE = 64, 64  # of a file, to tell whether ranks read the same one; bytes of each
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"


@dataclass(frozen=True)
class Merged(Stored):
    """A tensor that several in the files make up: each of ``blocks`` begins at an index of it, and has as many dims."""

    blocks: tuple[tuple[tuple[int, ...], Stored], ...]


class Files(Protocol):
    """Tensors on a disk that are read in parts."""

    bytes_read: int

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """By name."""
        ...

    def read(self, stored: Stored, held: Sequence[Runs], dtype: torch.dtype) -> torch.Tensor:
        """The positions ``held`` (runs of every dim) of a tensor, in ``dtype``."""
        ...

    def fingerprint(self) -> str:
        """What tells whether ranks read the same files: one line per file."""
        ...


class Checkpoint:
    """The safetensors files of a directory: ``model.safetensors``, or those that its index lists.

    Raises:
        TpcompileError: there are none, or one is missing, truncated, or not as the format says.
    """

    def __init__(self, directory: Path):
        self.bytes_read = 0
        self.tensors: dict[str, Stored] = {}
        self._files: dict[Path, int] = {}
        self._opened = contextlib.ExitStack()
        try:
            self._open(directory)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, directory: Path) -> None:
        if (directory / SINGLE).is_file():
            self.tensors = self._header(directory / SINGLE)
            return
        index = directory / INDEX
        if not index.is_file():
            raise _without_safetensors(directory)
        headers: dict[str, Mapping[str, Stored]] = {}
        for name, file in _weight_map(index).items():
            if file not in headers:
                headers[file] = self._header(directory / file, f"{index} lists it")
            if name not in headers[file]:
                raise TpcompileError(
                    f"{directory / file}: tensor {name} is missing",
                    why=f"{index} says that it is there",
                    help="the files are of different checkpoints; download or save them again",
                )
            self.tensors[name] = headers[file][name]

    def _header(self, path: Path, listed: str | None = None) -> dict[str, Stored]:
        """The tensors of a file, which is open from then on."""
        try:
            file = self._opened.enter_context(path.open("rb", buffering=0))
        except OSError as error:
            what = f"{path}: the file cannot be opened"
            raise TpcompileError(what, why="; ".join(filter(None, (listed, error.strerror)))) from error
        self._files[path] = number = file.fileno()
        total = os.fstat(number).st_size
        length = int.from_bytes(self._bytes(path, 0, min(8, total)), "little")
        if total < 8 or length > min(total - 8, MAX_HEADER):
            raise _broken(path, f"a header of {length} bytes in a file of {total}")
        try:
            entries = json.loads(self._bytes(path, 8, length))
            found = {n: _stored(n, path, e, 8 + length) for n, e in entries.items() if n != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, f"its header: {type(error).__name__}: {error}") from error
        at = 8 + length
        for stored in sorted(found.values(), key=lambda each: (each.offset, each.bytes)):
            if stored.offset != at or at + stored.bytes > total:
                raise _broken(
                    path, f"tensor {stored.name} is bytes {stored.offset} to {stored.offset + stored.bytes} of {total}"
                )
            at += stored.bytes
        if at != total:
            raise _broken(path, f"its tensors end at byte {at}, and it has {total}")
        return found

    def fingerprint(self) -> str:
        """One line per file: its name and a digest of its header and of samples of its content."""
        rows: list[str] = []
        for path, number in self._files.items():
            start = 8 + int.from_bytes(self._bytes(path, 0, 8), "little")
            rows.append(fingerprint(path.name, start, os.fstat(number).st_size, partial(self._bytes, path)))
        return "\n".join(rows)

    def read(self, stored: Stored, held: Sequence[Runs], dtype: torch.dtype) -> torch.Tensor:
        """The positions ``held`` (runs of every dim) of a tensor, in ``dtype``; no other bytes of it are read.

        Raises:
            TpcompileError: the file has become shorter than it was, or the disk fails.
        """
        if isinstance(stored, Merged):
            return self._merged(stored, held, dtype)
        part = torch.empty([sum(n for _, n in runs) for runs in held], dtype=dtype)
        flat = part.view(-1)
        staged = flat if dtype == stored.dtype else torch.empty(min(STAGED, flat.numel()), dtype=stored.dtype)
        memory, width = memoryview(cast("Any", staged.view(torch.uint8).numpy())), stored.dtype.itemsize
        done = filled = 0
        for first, count in spans(stored.shape, held):
            while count:
                n = min(count, staged.numel() - filled)
                self._into(memory[filled * width : (filled + n) * width], stored.path, stored.offset + first * width)
                filled, first, count = filled + n, first + n, count - n
                if filled == min(staged.numel(), flat.numel() - done):
                    if staged is not flat:
                        flat[done : done + filled].copy_(staged[:filled])
                    done, filled = done + filled, 0
        assert done == flat.numel(), f"{stored}: {done} of {flat.numel()} elements"
        return part

    def _merged(self, stored: Merged, held: Sequence[Runs], dtype: torch.dtype) -> torch.Tensor:
        part = torch.empty([sum(n for _, n in runs) for runs in held], dtype=dtype)
        for begin, block in stored.blocks:
            pairs = [within(runs, first, n) for runs, first, n in zip(held, begin, block.shape, strict=True)]
            if not all(runs for _, runs in pairs):
                continue
            read = self.read(block, [runs for _, runs in pairs], dtype)
            for pieces in itertools.product(*(places for places, _ in pairs)):
                target, source = part, read
                for dim, (to, at, n) in enumerate(pieces):
                    target, source = target.narrow(dim, to, n), source.narrow(dim, at, n)
                target.copy_(source)
        return part

    def _bytes(self, path: Path, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self._into(memoryview(buffer), path, offset)
        return bytes(buffer)

    def _into(self, memory: memoryview, path: Path, offset: int) -> None:
        while len(memory):
            try:
                n = os.preadv(self._files[path], [memory], offset)
            except OSError as error:
                raise TpcompileError(f"{path}: byte {offset} cannot be read", why=error.strerror) from error
            if n == 0:
                raise _broken(path, f"it ends at byte {offset}, and was longer when it was opened")
            self.bytes_read += n
            memory, offset = memory[n:], offset + n


def names_in(stored: Stored) -> list[str]:
    """The names that a tensor has in the files: of its blocks, if several make it up."""
    return [block.name for _, block in stored.blocks] if isinstance(stored, Merged) else [stored.name]


def whole(files: Files, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """All of a tensor."""
    return files.read(stored, [((0, n),) for n in stored.shape], dtype)


def within(runs: Runs, first: int, count: int) -> tuple[list[tuple[int, int, int]], Runs]:
    """What ``runs`` have of the ``count`` indices from ``first``: as runs from there, and for each of these its place
    among all of ``runs``, its place among them, and its length."""
    places: list[tuple[int, int, int]] = []
    found: list[tuple[int, int]] = []
    at = read = 0
    for start, n in runs:
        low, high = max(start, first), min(start + n, first + count)
        if low < high:
            places.append((at + low - start, read, high - low))
            found.append((low - first, high - low))
            read += high - low
        at += n
    return places, tuple(found)


def fingerprint(name: str, start: int, total: int, read: Callable[[int, int], bytes]) -> str:
    """A file's name, size and a digest of the ``start`` bytes of its header and of samples; ``read(offset, count)``."""
    digest = sha256(read(0, start))
    step = max((total - start) // SAMPLES, 1 << 16)
    for at in range(start, total, step):
        digest.update(read(at, min(SAMPLE, total - at)))
    return f"{name} {total} bytes {digest.hexdigest()[:16]}"


def spans(shape: Sequence[int], held: Sequence[Runs]) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of the contiguous elements that make up a part, in the part's own row-major order."""
    cut = [d for d, n in enumerate(shape) if tuple(held[d]) != ((0, n),)]
    if not cut:
        yield 0, math.prod(shape)
        return
    last = cut[-1]
    inner = math.prod(shape[last + 1 :])
    for index in itertools.product(*([i for s, n in held[d] for i in range(s, s + n)] for d in range(last))):
        row = 0
        for i, n in zip(index, shape, strict=False):
            row = row * n + i
        for start, n in held[last]:
            yield (row * shape[last] + start) * inner, n * inner


def _stored(name: str, path: Path, entry: Mapping[str, Any], start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise TpcompileError(
            f"{path}: tensor {name} has dtype {entry['dtype']}",
            why=f"dtypes that are read: {', '.join(DTYPES)}",
            help="load the model with transformers and save it in one of these",
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise _broken(path, f"tensor {name}: {list(shape)} {dtype} in bytes {begin} to {end}")
    return Stored(name, path, dtype, shape, start + begin)


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = dict(json.loads(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TpcompileError(
            f"{index}: no index of safetensors files", why=f"{type(error).__name__}: {error}"
        ) from error
    for name, file in found.items():
        if Path(str(file)).name != file:
            raise TpcompileError(f"{index}: tensor {name} is in {file!r}", why="files must be next to the index")
    return found


def _without_safetensors(directory: Path) -> TpcompileError:
    if not directory.is_dir():
        return TpcompileError(
            f"there is no directory {directory}",
            why="a checkpoint is looked for on this disk only; nothing is downloaded",
            help="download it first: hf download NAME --local-dir DIR",
        )
    others = sorted(path.name for path in directory.glob("*.bin*") if path.name.startswith("pytorch_model"))
    if others:
        return TpcompileError(
            f"{directory} has no safetensors file, but {others[0]}",
            why="it is a pickle: it must be loaded as a whole, and loading it runs code",
            help="convert it once: load the model with transformers and call "
            "model.save_pretrained(directory, safe_serialization=True)",
        )
    return TpcompileError(
        f"{directory} has neither {SINGLE} nor {INDEX}",
        why="weights are read from there",
        help="name a directory that save_pretrained has written",
    )


def _broken(path: Path, why: str) -> TpcompileError:
    what = f"{path}: not a whole safetensors file"
    return TpcompileError(what, why=why, help="download or save the file again")


__all__ = ["Checkpoint", "Files", "Merged", "Stored", "fingerprint", "names_in", "spans", "whole", "within"]
