"""Machines, as data: what a device computes and moves per second, and the links between ranks, level by level.

A machine is a TOML file (``tpcompile/machines/*.toml`` are the shipped ones, with their sources). Ranks lie in order:
the first ``ranks`` of them share the innermost level (a node), and so on outwards. Time of a collective is
``steps * latency + bytes / bandwidth``, the alpha-beta model of Thakur, Rabenseifner and Gropp (2005), with the best of

* a ring over all ranks: 2(p-1) steps and 2n(p-1)/p bytes for an all-reduce, half of both for an all-gather or a
  reduce-scatter (Patarasuk and Yuan 2009); a step between nodes has their latency, the bytes the least bandwidth, as in
  NCCL's own model (src/graph/tuning.cc);
* a tree: 2 ceil(log2 p) steps and 2n bytes for an all-reduce (Sanders, Speck and Traeff 2009: two trees, both full);
* level by level: reduce-scatter inside, all-reduce of the part outside, all-gather inside (Cho et al. 2019).
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from tpcompile.errors import TpcompileError, Where

SHIPPED = ("nvlink", "pcie", "ethernet")
"""Names of the machines that come with tpcompile."""


@dataclass(frozen=True)
class Device:
    """One rank's device.

    Attributes:
        flops: peak floating point operations per second in matrix products, by dtype (``"bfloat16"``).
        bandwidth: bytes per second from and to its memory.
        memory: bytes that it has.
        start: seconds that starting a kernel takes.
    """

    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    start: float


@dataclass(frozen=True)
class Level:
    """One level of links.

    Attributes:
        ranks: how many consecutive ranks it connects; None on the outermost level: any number.
        latency: seconds per step (alpha).
        bandwidth: bytes per second that a rank sends while it receives as many (1 / beta).
        shared: the bandwidth is that of a whole group of the next inner level (one port per node).
    """

    name: str
    ranks: int | None
    latency: float
    bandwidth: float
    shared: bool = False


@dataclass(frozen=True)
class Machine:
    """Equal devices, and the links between them from the innermost level outwards.

    ``start`` is the seconds that a collective takes before its first step.
    """

    name: str
    about: str
    device: Device
    levels: tuple[Level, ...]
    start: float = 0.0

    def kernel_seconds(self, flops: int, moved: int, dtype: str) -> float:
        """Seconds of one op: the longer of computing and moving (Williams et al. 2009, roofline), after its start.

        Raises TpcompileError if the machine does not say how fast it multiplies in ``dtype``.
        """
        computing = 0.0
        if flops:
            if dtype not in self.device.flops:
                known = ", ".join(sorted(self.device.flops))
                raise TpcompileError(
                    f"the machine {self.name} says no FLOPs per second in {dtype}",
                    why=f"the model multiplies matrices of {dtype}; the machine knows {known}",
                    help=f"pass --dtype with one of these, or add `{dtype} = ...` to [device.flops] of a file of yours",
                )
            computing = flops / self.device.flops[dtype]
        return self.device.start + max(computing, moved / self.device.bandwidth)

    def collective_seconds(self, kind: str, size: int, ranks: Sequence[int]) -> float:
        """Seconds of one collective over ``size`` bytes (of the reduced tensor, or of the gathered one).

        Args:
            kind: ``all_reduce``, ``all_gather`` or ``reduce_scatter``.
            ranks: the members, as their places in the machine.
        """
        if len(ranks) < 2:
            return 0.0
        blocks = self._blocks(ranks)
        choices = [self._ring(kind, size, [len(ranks), *(len(found) for found in blocks)])]
        within = _sizes(len(ranks), blocks)
        if within is not None:
            choices.append(self._level_by_level(kind, size, within, 0))
        return self.start + min(choices)

    def _blocks(self, ranks: Sequence[int]) -> list[Mapping[int, int]]:
        """For every level, the groups that it connects which have members, and how many members."""
        found: list[Mapping[int, int]] = []
        for level in self.levels:
            block: dict[int, int] = {}
            for rank in ranks:
                index = rank // level.ranks if level.ranks is not None else 0
                block[index] = block.get(index, 0) + 1
            found.append(block)
        if len(found[-1]) > 1:
            raise TpcompileError(
                f"the machine {self.name} has {self.levels[-1].ranks} ranks, and {max(ranks) + 1} are asked for",
                help="ask for fewer with --tp, or add a level without `ranks` to its file",
            )
        return found

    def _ring(self, kind: str, size: int, counts: Sequence[int]) -> float:
        """One ring over all members, of which level i joins ``counts[i]`` groups to ``counts[i + 1]``."""
        passes = 2 if kind == "all_reduce" else 1
        used = [(level, counts[i] - counts[i + 1]) for i, level in enumerate(self.levels) if counts[i] > counts[i + 1]]
        latency = sum(level.latency * steps for level, steps in used)
        moved = size * (counts[0] - 1) / counts[0]
        return passes * (latency + moved / min(level.bandwidth for level, _ in used))

    def _level_by_level(self, kind: str, size: float, within: Sequence[int], index: int) -> float:
        members, level = within[index], self.levels[index]
        sharing = math.prod(within[:index]) if level.shared else 1
        once = (members - 1) * level.latency + size * (members - 1) / members / (level.bandwidth / sharing)
        outside = math.prod(within[index + 1 :])
        if kind == "all_reduce" and outside == 1:
            steps = 2 * math.ceil(math.log2(members))
            return min(2 * once, steps * level.latency + 2 * size / (level.bandwidth / sharing))
        inside = 2 * once if kind == "all_reduce" else once
        return inside + (self._level_by_level(kind, size / members, within, index + 1) if outside > 1 else 0.0)

    def toml(self) -> str:
        """The machine as the text of a file that :func:`machine` reads."""
        device = self.device
        rows = [
            f'about = "{self.about}"',
            f"start = {self.start!r}",
            "",
            "[device]",
            f"memory = {device.memory!r}",
            f"bandwidth = {device.bandwidth!r}",
            f"start = {device.start!r}",
            "",
            "[device.flops]",
            *(f"{dtype} = {flops!r}" for dtype, flops in device.flops.items()),
        ]
        for level in self.levels:
            rows += ["", "[[level]]", f'name = "{level.name}"']
            rows += [f"ranks = {level.ranks}"] if level.ranks is not None else []
            rows += [f"bandwidth = {level.bandwidth!r}", f"latency = {level.latency!r}"]
            rows += ["shared = true"] if level.shared else []
        return "\n".join(rows) + "\n"


def _sizes(members: int, blocks: Sequence[Mapping[int, int]]) -> list[int] | None:
    """How many groups of the next inner level a group of each level joins; None if unlike ones are joined."""
    sizes: list[int] = []
    inner = 1
    for block in blocks:
        counts = set(block.values())
        if len(counts) > 1:
            return None
        (held,) = counts
        sizes.append(held // inner)
        inner = held
    assert inner == members
    return sizes


def machine(name: str | os.PathLike[str]) -> Machine:
    """The shipped machine of that name, or the one in a TOML file.

    Raises:
        TpcompileError: there is no such file, or it does not parse, lacks a key, or has one that means nothing; with
            the line.
    """
    if str(name) in SHIPPED:
        text = files("tpcompile").joinpath("machines", f"{name}.toml").read_text(encoding="utf-8")
        return _Reader(f"{name}.toml", text).machine(str(name))
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TpcompileError(
            f"cannot read the machine `{name}`",
            why=getattr(error, "strerror", None) or str(error),
            help=f"name a TOML file, or one of {', '.join(SHIPPED)}",
        ) from error
    return _Reader(str(name), text).machine(Path(name).stem)


_POSITION = re.compile(r" \(at line (\d+), column (\d+)\)$")
_HEADER = re.compile(r"^\s*\[\[?\s*([\w.]+)\s*\]\]?")


@dataclass(frozen=True)
class _Reader:
    """Reads a machine from a text, and knows the line of what is wrong in it."""

    file: str
    text: str

    def machine(self, name: str) -> Machine:
        try:
            document = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            found = _POSITION.search(str(error))
            line, column = (int(n) for n in found.groups()) if found else (None, None)
            row = self.text.splitlines()[line - 1] if line and line <= len(self.text.splitlines()) else None
            where = Where(self.file, line, column, text=row)
            raise TpcompileError(f"{self.file} is not TOML: {_POSITION.sub('', str(error))}", where=where) from error
        top = _Table(self, "", 0, document)
        top.only("about", "start", "device", "level")
        device = top.table("device")
        device.only("flops", "bandwidth", "memory", "start")
        peaks = device.table("flops")
        rows = document.get("level")
        if not isinstance(rows, list) or not rows:
            raise self.error("no [[level]] says how ranks are linked", "level", 0, None)
        levels = [_Table(self, "level", i, row) for i, row in enumerate(cast("list[Any]", rows))]
        return Machine(
            name,
            str(document.get("about", name)),
            Device(
                {dtype: peaks.number(dtype) for dtype in peaks.given},
                device.number("bandwidth"),
                device.number("memory"),
                device.number("start", 0.0),
            ),
            tuple(self.level(each, i == len(levels) - 1, levels[:i]) for i, each in enumerate(levels)),
            top.number("start", 0.0),
        )

    def level(self, given: _Table, outermost: bool, inner: Sequence[_Table]) -> Level:
        given.only("name", "ranks", "latency", "bandwidth", "shared")
        ranks = given.given.get("ranks")
        least = int(inner[-1].given["ranks"]) if inner else 1
        if ranks is None and not outermost:
            raise given.error("a level that is not the outermost must say how many `ranks` it connects", None)
        if ranks is not None and (type(ranks) is not int or ranks < 1 or ranks % least):
            raise given.error(f"`ranks` must be a whole number of {least} ranks, not {ranks!r}", "ranks")
        shared = given.given.get("shared", False)
        if not isinstance(shared, bool):
            raise given.error(f"`shared` is true or false, not {shared!r}", "shared")
        name = str(given.given.get("name", f"level {given.index}"))
        return Level(name, ranks, given.number("latency", positive=False), given.number("bandwidth"), shared)

    def error(self, what: str, table: str, index: int, key: str | None) -> TpcompileError:
        """The error for a key of a table (the ``index``-th of its name); None: for the table itself."""
        seen, current, found = -1, "", None
        for number, line in enumerate(self.text.splitlines(), 1):
            header = _HEADER.match(line)
            if header:
                current = header.group(1)
                seen += current == table and line.lstrip().startswith("[[")
            here = current == table and (seen == index or seen < 0)
            wanted = header is not None if key is None else re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", line)
            if here and wanted and found is None:
                found = number, line
        where = Where(self.file, found[0], 1, text=found[1]) if found else Where(self.file)
        return TpcompileError(what, where=where, help="tpcompile/machines/nvlink.toml is an example of such a file")


@dataclass(frozen=True)
class _Table:
    reader: _Reader
    name: str
    index: int
    given: Mapping[str, Any]

    def error(self, what: str, key: str | None) -> TpcompileError:
        return self.reader.error(what, self.name, self.index, key)

    def only(self, *keys: str) -> None:
        """Refuse keys that mean nothing: they are misspelt."""
        for key in self.given:
            if key not in keys:
                raise self.error(f"`{key}` means nothing in [{self.name or 'the file'}]: {', '.join(keys)}", key)

    def table(self, key: str) -> _Table:
        name = f"{self.name}.{key}" if self.name else key
        found = self.given.get(key)
        if not isinstance(found, Mapping):
            raise self.error(f"there is no [{name}]", None)
        return _Table(self.reader, name, 0, cast("Mapping[str, Any]", found))

    def number(self, key: str, default: float | None = None, positive: bool = True) -> float:
        """A finite number, above zero if ``positive`` and no default is given."""
        value = self.given.get(key, default)
        if value is None:
            raise self.error(f"[{self.name}] lacks `{key}`", None)
        least = positive and default is None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(f"`{key}` must be a number, not {value!r}", key)
        if value < 0 or (least and value == 0):
            raise self.error(f"`{key}` must be {'above' if least else 'at least'} zero, not {value!r}", key)
        return float(value)


__all__ = ["SHIPPED", "Device", "Level", "Machine", "machine"]
