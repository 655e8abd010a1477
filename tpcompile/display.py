"""What the command line prints: tables, folded listings, diffs; coloured on a terminal, bare text in a pipe.

Blocks are data. ``write`` alone knows whether a person or a program is reading.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from tpcompile.activations import Kept
    from tpcompile.errors import TpcompileError
    from tpcompile.program import Line
    from tpcompile.report import Collective


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; columns in ``right`` hold numbers. A row of one cell is a remark across the table."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Verdict:
    """The answer in one line, green or red."""

    ok: bool
    text: str


@dataclass(frozen=True)
class Diff:
    """The lines of a unified diff."""

    lines: tuple[str, ...]


_NARROWEST = 12  # columns of text; a terminal that has less room breaks the lines of the table itself

Block = str | Table | Verdict | Diff


def write(console: Console, blocks: Iterable[Block]) -> None:
    """Print the blocks: colours and columns wrapped to a terminal's width, aligned text and whole lines elsewhere."""
    for block in blocks:
        match block:
            case str():
                _line(console, block)
            case Verdict(ok, text):
                _line(console, text, "bold green" if ok else "bold red")
            case Diff(lines):
                for line in lines:
                    _line(console, line, _diff_style(line))
            case Table():
                if console.is_terminal and _fits(block, console.width):
                    console.print(_rich_table(block))
                else:
                    for line in aligned(block):
                        _line(console, line)
            case _:
                assert_never(block)


def write_error(console: Console, error: TpcompileError) -> None:
    """Print an error for users: in a panel on a terminal, else after the word ``error``."""
    if console.is_terminal:
        console.print(Panel(Text(error.render()), title="error", title_align="left", border_style="red"))
    else:
        _line(console, f"error: {error.render()}")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _diff_style(line: str) -> str:
    for mark, style in (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red")):
        if line.startswith(mark):
            return style
    return ""


def _fits(table: Table, width: int) -> bool:
    """Whether numbers and their heads stand whole, and texts are broken at no less than ``_NARROWEST`` characters."""
    rows = [table.head, *(row for row in table.rows if len(row) > 1)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(table.head))]
    needed = (n if index in table.right else min(n, _NARROWEST) for index, n in enumerate(widths))
    return sum(needed) + 2 * (len(widths) - 1) <= width


def _rich_table(table: Table) -> RichTable:
    rich = RichTable(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(table.head):
        number = index in table.right
        rich.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in table.rows:
        rich.add_row(*(Text(cell, style="dim" if len(row) == 1 else "") for cell in row))
    return rich


def aligned(table: Table) -> list[str]:
    """The table as lines of text, two spaces between the columns and none at the end of a line."""
    rows = [table.head, *(row for row in table.rows if len(row) > 1)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(table.head))]

    def line(row: tuple[str, ...]) -> str:
        if len(row) == 1:
            return row[0]
        cells = (
            cell.rjust(width) if index in table.right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(row) for row in (table.head, *table.rows)]


def byte_text(count: int) -> str:
    """A number of bytes for people, in powers of 1024: ``512 B``, ``8.0 KiB``, ``3.2 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def time_text(timings: Mapping[str, float]) -> str:
    """``capture 3.20 s, then 0.41 s (structure 0.12, place 0.20, emit 0.09)``; steps below 10 ms are not named."""
    rest = {name: seconds for name, seconds in timings.items() if name != "capture"}
    parts = [f"capture {timings['capture']:.2f} s"] if "capture" in timings else []
    if rest:
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in rest.items() if seconds >= 0.01)
        parts.append(f"then {sum(rest.values()):.2f} s ({steps})")
    return ", ".join(parts)


def range_text(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs shortened: ``0..3, 7, 9..11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def layer_of(module: str) -> tuple[str, int] | None:
    """The layer that a dotted module path lies in, by its outermost number: ``a.h.3.mlp`` -> ``("a.h", 3)``."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), int(part)
    return None


def inside(module: str, container: str) -> str:
    """The path below a layer of ``container``: ``a.h.3.mlp.up`` in ``a.h`` is ``mlp.up``."""
    return module.removeprefix(f"{container}.").partition(".")[2]


@dataclass(frozen=True)
class Alike:
    """Layers of ``container`` whose lines differ from those of layer ``like`` in nothing but names."""

    container: str
    numbers: tuple[int, ...]
    like: int

    def __str__(self) -> str:
        """``transformer.h: 1..11 like 0``."""
        return f"{self.container or 'layers'}: {range_text(self.numbers)} like {self.like}"


def fold(lines: Iterable[Line]) -> Iterator[Line | Alike]:
    """Leave out every layer whose lines are those of an earlier one, and say so where it stood."""
    bodies: dict[str, dict[tuple[tuple[str, ...], ...], int]] = {}
    pending: dict[tuple[str, int], list[int]] = {}  # (container, like) -> numbers, since the last line that was shown

    def said() -> Iterator[Alike]:
        yield from (Alike(container, tuple(numbers), like) for (container, like), numbers in pending.items())
        pending.clear()

    for layer, group in _by_layer(lines):
        if layer is not None:
            container, number = layer
            body = tuple(_without_names(line, container) for line in group)
            like = bodies.setdefault(container, {}).setdefault(body, number)
            if like != number:
                pending.setdefault((container, like), []).append(number)
                continue
        yield from said()
        yield from group
    yield from said()


def _by_layer(lines: Iterable[Line]) -> Iterator[tuple[tuple[str, int] | None, list[Line]]]:
    group: list[Line] = []
    current: tuple[str, int] | None = None
    for line in lines:
        layer = layer_of(line.module)
        if group and layer != current:
            yield current, group
            group = []
        current = layer
        group.append(line)
    if group:
        yield current, group


def _without_names(line: Line, container: str) -> tuple[str, ...]:
    name = re.sub(r"_\d+(?=_|$)", "", line.name)  # the counter of a value, the layer number of a parameter
    return name, line.shape, line.dtype, line.placement, inside(line.module, container), line.source


def listing(lines: Iterable[Line]) -> Table:
    """The rewritten graph, one value a row, alike layers folded."""
    rows = tuple(
        (f"    {entry}",)
        if isinstance(entry, Alike)
        else (entry.name, entry.shape, entry.dtype, entry.placement, entry.module, entry.source)
        for entry in fold(lines)
    )
    return Table(("value", "shape", "dtype", "placement", "module", "source"), rows)


def _place_text(place: str, numbers: Sequence[int]) -> str:
    """``a.h.{}.mlp`` with the numbers of its layers: ``a.h.{0..3}.mlp``, or ``a.h.0.mlp`` of one layer."""
    known = sorted(set(numbers))
    return place.replace("{}", str(known[0]) if len(known) == 1 else f"{{{range_text(known)}}}") or "(root)"


def collectives_table(collectives: Iterable[Collective]) -> Table:
    """Every collective, those of alike layers in one row, and a row with the totals."""
    groups: dict[tuple[str, str, str, str, str, int], tuple[tuple[int, ...], int]] = {}
    times = total = 0
    for collective in collectives:
        layer = layer_of(collective.module)
        place = collective.module
        if layer is not None:
            place = ".".join(part for part in (layer[0], "{}", inside(place, layer[0])) if part)
        shape, where = str(collective.shape), str(collective.where)
        key = (place, collective.kind, collective.direction, shape, where, collective.bytes)
        numbers, count = groups.get(key, ((), 0))
        groups[key] = ((*numbers, *layer[1:]) if layer else numbers, count + collective.count)
        times += collective.count
        total += collective.bytes * collective.count
    rows = tuple(
        (
            _place_text(place, numbers),
            kind,
            direction,
            shape,
            byte_text(each),
            str(count),
            byte_text(each * count),
            where,
        )
        for (place, kind, direction, shape, where, each), (numbers, count) in groups.items()
    )
    total_row = ("total", "", "", "", "", str(times), byte_text(total), "")
    head = ("module", "kind", "direction", "shape", "bytes", "times", "bytes in all", "where")
    return Table(head, (*rows, total_row), right=frozenset({4, 5, 6}))


def memory_table(kept: Iterable[Kept]) -> Table:
    """What one rank keeps for backward, lines of alike layers in one row, and rows with the totals."""
    groups: dict[tuple[str, str, str, str, str, int], list[int]] = {}
    times: dict[tuple[str, str, str, str, str, int], int] = {}
    totals: dict[str, int] = {}
    for line in kept:
        layer = layer_of(line.module) if line.layer else None
        place = line.module
        if layer is not None:
            place = ".".join(part for part in (layer[0], "{}", inside(place, layer[0])) if part)
        value = re.sub(r"_\d+$", "", line.value) or "(its own)"
        key = (place, value, line.op, str(line.shape), str(line.dtype).removeprefix("torch."), line.bytes)
        groups.setdefault(key, []).extend(layer[1:] if layer else ())
        times[key] = times.get(key, 0) + 1
        name = line.layer or "(outside of layers)"
        totals[name] = totals.get(name, 0) + line.bytes
    rows = [
        (
            _place_text(place, groups[key]),
            value,
            op.removeprefix("aten.").removesuffix(".default"),
            shape,
            dtype,
            byte_text(each),
            str(times[key]),
            byte_text(each * times[key]),
        )
        for key in groups
        for place, value, op, shape, dtype, each in (key,)
    ]
    rows += [(name, "", "", "", "", "", "", byte_text(count)) for name, count in _alike_totals(totals)]
    rows.append(("total", "", "", "", "", "", str(sum(times.values())), byte_text(sum(totals.values()))))
    head = ("module", "value", "kept by", "shape", "dtype", "bytes", "times", "bytes in all")
    return Table(head, tuple(rows), right=frozenset({5, 6, 7}))


def _alike_totals(totals: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """``h.{0..11} each`` where alike layers have equal totals, else the layer itself."""
    groups: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, count in totals.items():
        layer = layer_of(name)
        groups.setdefault((layer[0] if layer else name, count), []).append((name, layer[1] if layer else 0))
    for (container, count), found in groups.items():
        if len(found) == 1:
            yield f"total of {found[0][0]}", count
        else:
            yield f"total of each of {container}.{{{range_text(sorted(n for _, n in found))}}}", count


def collectives_line(collectives: Iterable[Collective]) -> str:
    """``24 all_reduce forward, 24 all_reduce backward, 3.0 MiB sent per rank``."""
    times: dict[str, int] = {}
    total = 0
    for collective in collectives:
        name = f"{collective.kind} {collective.direction}"
        times[name] = times.get(name, 0) + collective.count
        total += collective.bytes * collective.count
    counts = [f"{count} {name}" for name, count in times.items()]
    return ", ".join([*counts, f"{byte_text(total)} sent per rank"]) if counts else "none"


def stage_diff(name: str, before: str, after: str) -> Diff | None:
    """What one pass changed in the program's text, or None."""
    lines = tuple(
        difflib.unified_diff(before.splitlines(), after.splitlines(), f"before {name}", f"after {name}", lineterm="")
    )
    return Diff(lines) if lines else None
