"""Names folded into few patterns: what ``tpcompile plan`` writes must be short, and claim exactly what was meant.

Numbers become ``*`` where all of them are meant, names that differ in one component ``{q,k,v}_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from tpcompile.spec import Component, Pattern

_STAR = "*"
_Row = tuple[tuple[str, ...], ...]  # per component its alternatives


def fold(wanted: Iterable[str], known: Collection[str]) -> list[Pattern]:
    """Patterns that match each of `wanted` once and nothing else of `known`, in the order of `wanted`.

    A character that a pattern cannot have is matched by ``*``: then, and only then, more than `wanted` may match.
    """
    meant, everything = _by_template(dict.fromkeys(wanted)), _by_template(known)
    rows: dict[_Row, None] = {}
    for template, members in meant.items():
        starred = tuple((part,) for part in template.split("."))
        exact = members.keys() == everything.get(template, members).keys()
        matches = _pattern(starred).matches
        if exact and not any(matches(name) for name in known if name not in members):
            rows[starred] = None
        else:
            rows |= {tuple((part,) for part in name.split(".")): None for name in members}
    found = list(rows)
    for position in range(max(map(len, found), default=0)):
        found = _merged(found, position)
    return [_pattern(_starred(row, known)) for row in found]


def _by_template(names: Iterable[str]) -> dict[str, dict[str, None]]:
    """The names with ``*`` for components that are numbers -> the names themselves."""
    found: dict[str, dict[str, None]] = {}
    for name in names:
        template = ".".join(_STAR if part.isdigit() else part for part in name.split("."))
        found.setdefault(template, {})[name] = None
    return found


def _merged(rows: Iterable[_Row], position: int) -> list[_Row]:
    """Rows that differ in one component only, counted from the last, become one; ``*`` stays by itself."""
    found: dict[tuple[bool, _Row, _Row], dict[str, None]] = {}  # what stands around a component -> its alternatives
    for row in rows:
        index = len(row) - 1 - position
        alone = index < 0 or row[index] == (_STAR,)
        key = (alone, row, ()) if alone else (alone, row[:index], row[index + 1 :])
        found.setdefault(key, {}).update(dict.fromkeys(() if alone else row[index]))
    return [before if alone else (*before, tuple(names), *after) for (alone, before, after), names in found.items()]


def _starred(row: _Row, known: Iterable[str]) -> _Row:
    """``*`` for numbers, from the first, wherever nothing else is matched by it, other rows' names included."""
    numbers = [i for i, names in enumerate(row) if len(names) > 1 and all(name.isdigit() for name in names)]
    own = _pattern(row)
    others = [name for name in known if not own.matches(name)] if numbers else []
    for index in numbers:
        wider = (*row[:index], (_STAR,), *row[index + 1 :])
        row = row if any(map(_pattern(wider).matches, others)) else wider
    return row


def _pattern(row: _Row) -> Pattern:
    return Pattern(tuple(map(_component, row)))


def _component(names: Sequence[str]) -> Component:
    """``q_proj k_proj`` as ``{q,k}_proj``, ``ln_1 ln_2`` as ``ln_{1,2}``."""
    clean = list(dict.fromkeys(name if name == _STAR else re.sub(r"[^\w-]+", _STAR, name) for name in names))
    if len(clean) == 1:
        return ((clean[0],),)
    head, tail = _shared(clean), _shared([name[::-1] for name in clean])[::-1]
    middle = tuple(name[len(head) : len(name) - len(tail)] for name in clean)
    if min(len(name) - len(head) - len(tail) for name in clean) < 1:
        return (tuple(clean),)
    return tuple(piece for piece in ((head,), middle, (tail,)) if piece != ("",))


def _shared(names: Sequence[str]) -> str:
    """The longest common beginning that ends where a word does: at ``_``, or in front of numbers."""
    end = 0
    while all(len(name) > end for name in names) and len({name[end] for name in names}) == 1:
        end += 1
    if not all(name[end:].isdigit() for name in names):
        end = names[0].rfind("_", 0, end) + 1
    return names[0][:end]


__all__ = ["fold"]
