"""Names folded into few patterns: what `tpcompile plan` writes must be short, and claim exactly what was meant.

Numbers become ``*`` where all of them are meant; names that differ in one component become ``{q,k,v}_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from tpcompile.spec import Component, Pattern

_STAR = "*"


def fold(wanted: Iterable[str], known: Collection[str]) -> list[Pattern]:
    """Patterns that together match `wanted` and nothing else of `known`, in the order of `wanted`.

    A name with characters that a pattern cannot have is matched by ``*`` in their place.
    """
    names = list(dict.fromkeys(wanted))
    meant, everything = _by_template(names), _by_template(known)
    rows: dict[tuple[str, ...], None] = {}
    for template, members in meant.items():
        if set(members) == set(everything.get(template, members)):
            rows[template] = None
        else:
            rows |= dict.fromkeys(tuple(name.split(".")) for name in members)
    merged = [tuple((component,) for component in row) for row in rows]
    for position in range(max(map(len, merged), default=0)):
        merged = _merge(merged, position)  # counted from the right: what a block calls its parts comes first
    return [Pattern(tuple(map(_component, row))) for row in merged]


def _by_template(names: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """The names with ``*`` for components that are numbers -> the names themselves."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        template = tuple(_STAR if part.isdigit() else part for part in name.split("."))
        found.setdefault(template, []).append(name)
    return found


_Row = tuple[tuple[str, ...], ...]  # per component its alternatives


def _merge(rows: Sequence[_Row], position: int) -> list[_Row]:
    """Rows that differ in one component become one, if that is a number, the last, the first, or above a number.

    Different parts of one block (``*.attn.c_proj`` and ``*.mlp.c_proj``) keep a line each.
    """
    found: dict[object, list[_Row]] = {}
    for row in rows:
        index = len(row) - 1 - position
        if index < 0 or row[index] == (_STAR,):
            found[row] = [row]
            continue
        below = row[index + 1 :]
        numbers = all(name.isdigit() for name in row[index])
        free = not below or not index or numbers or any(part == (_STAR,) or part[0].isdigit() for part in below)
        key = (index, numbers, row[:index], below) if free else row
        found.setdefault(key, []).append(row)
    merged: list[_Row] = []
    for group in found.values():
        if len(group) == 1:
            merged += group
            continue
        index = len(group[0]) - 1 - position
        alternatives = tuple(dict.fromkeys(name for row in group for name in row[index]))
        merged.append((*group[0][:index], alternatives, *group[0][index + 1 :]))
    return merged


def _component(names: Sequence[str]) -> Component:
    """``q_proj k_proj`` as ``{q,k}_proj``, ``ln_1 ln_2`` as ``ln_{1,2}``."""
    clean = list(dict.fromkeys(re.sub(r"[^\w-]+", _STAR, name) if name != _STAR else name for name in names))
    if len(clean) == 1:
        return ((clean[0],),)
    head, tail = _shared(clean), _shared([name[::-1] for name in clean])[::-1]
    middle = [name[len(head) : len(name) - len(tail)] for name in clean]
    if min(map(len, middle)) == 0 or any(len(name) < len(head) + len(tail) for name in clean):
        head, tail, middle = "", "", clean
    return tuple(piece for piece in ((head,), tuple(middle), (tail,)) if piece != ("",))


def _shared(names: Sequence[str]) -> str:
    """The longest common beginning that ends where a word does: at ``_``, or before numbers."""
    end = 0
    while all(len(name) > end for name in names) and len({name[end] for name in names}) == 1:
        end += 1
    if not all(name[end:].isdigit() for name in names):
        end = max((i + 1 for i in range(end) if names[0][i] == "_"), default=0)
    return names[0][:end]


__all__ = ["fold"]
