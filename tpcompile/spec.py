"""The .tpspec language: which Linears of a model are cut, in a few lines per model family.

A text becomes a `Spec` (grammar: spec.lark), a frozen tree that remembers its places; `resolve` lays it over the
names of a model and returns `Claim`s. A line that claims nothing, a parameter claimed twice and an unknown word are
errors, because a plan that silently does less than it says is the defect this language exists to prevent.
Nothing here knows operators, sizes or degrees: what a claim implies is derived from the graph. See docs/tpspec.md.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias, TypeGuard

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken
from lark.tree import Meta

from tpcompile.errors import SpecError, Where

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "column": "cut the index of the weight that reaches the output",
        "row": "cut the index of the weight that is summed over",
        "vocab": "cut the vocabulary index of an embedding or a head",
        "experts": "give every rank some of the experts of a mixture",
        "sequence": "with sequence_parallel=True, spread the positions of its values over the ranks",
        "replicate": "keep whole on every rank",
    }
)
"""The placement words, Megatron's own, and what each says of a parameter."""

Component: TypeAlias = tuple[tuple[str, ...], ...]
"""What stands between dots: pieces in a row, each a tuple of alternatives; ``{q,k}_p`` is (("q", "k"), ("_p",))."""

_ANY_DEPTH: Component = (("**",),)
_NOWHERE = Where()


# --- the tree ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A glob over dotted names: ``*`` stays inside one component, ``**`` spans any number of them, also none.

    Equality ignores `where`, the place in the text.
    """

    components: tuple[Component, ...]
    optional: bool = False
    where: Where = field(default=_NOWHERE, compare=False, repr=False)

    @functools.cached_property
    def glob(self) -> str:
        """The pattern as written, without the ``?`` of an optional one."""
        return ".".join(map(_component_text, self.components))

    def __str__(self) -> str:
        return "?" * self.optional + self.glob

    def matches(self, name: str) -> bool:
        """Whether the whole dotted `name` fits; the root module is the empty name."""
        return self._regex.fullmatch(name + "." if name else "") is not None

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        # Each component is matched together with a dot after it, so that `**` may also be nothing at all.
        return re.compile("".join(map(_component_regex, self.components)))

    def narrowed(self) -> Iterator[Pattern]:
        """One pattern per alternative of every ``{a,b}``: that alternative alone, everything else as it is."""
        for c, component in enumerate(self.components):
            for p, piece in enumerate(component):
                for alternative in piece if len(piece) > 1 else ():
                    chosen = _merged((*component[:p], (alternative,), *component[p + 1 :]))
                    yield replace(self, components=(*self.components[:c], chosen, *self.components[c + 1 :]))


@dataclass(frozen=True)
class Line:
    """One line of a spec: every parameter that a pattern claims gets `word`.

    `by` is the count that the spec asserts for the cut axis, a number or an attribute such as
    ``config.num_key_value_heads``. Equality ignores `where`.
    """

    patterns: tuple[Pattern, ...]
    word: str
    by: str | int | None = None
    where: Where = field(default=_NOWHERE, compare=False, repr=False)
    word_where: Where = field(default=_NOWHERE, compare=False, repr=False)
    by_where: Where = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        return " ".join(map(str, self.patterns)) + f"  {self.rule}"

    @property
    def rule(self) -> str:
        """The word, with its count if there is one: ``column by 8``."""
        return self.word if self.by is None else f"{self.word} by {self.by}"


@dataclass(frozen=True)
class Spec:
    """A .tpspec: the model classes it is written for, and its lines. Equality ignores file, places and comments.

    `head` and `notes` are lines of comment above and below everything else. A planned spec has them; parsing keeps
    none.
    """

    classes: tuple[str, ...]
    lines: tuple[Line, ...]
    filename: str = field(default="<spec>", compare=False)
    head: tuple[str, ...] = field(default=(), compare=False, repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def parse(text: str, filename: str = "<spec>") -> Spec:
        """Parse the text of a spec.

        Raises:
            SpecError: the text is not a spec; `filename`, line and column are in the message.
        """
        # The grammar ends every statement with a newline, also the last.
        try:
            tree = _grammar().parse(text + "\n")
        except UnexpectedInput as error:
            raise _syntax_error(error, text, filename) from None
        return _Reader(text, filename).spec(tree)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Spec:
        """Parse a file.

        Raises:
            SpecError: the file cannot be read (the message names its neighbours), or is not a spec.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            what = f"`{path}` is not UTF-8 text"
            raise SpecError(what, why=f"byte {error.start} is 0x{error.object[error.start]:02x}") from None
        except OSError as error:
            raise _unreadable(path, error) from None
        return Spec.parse(text, str(path))

    def text(self) -> str:
        """The spec as a canonical text: parsing it gives an equal spec. Comments and layout of a file are not kept."""
        rows = [f"# {row}".rstrip() for row in self.head]
        rows += [f"for {row}" for row in textwrap.wrap(" ".join(self.classes), 96, break_on_hyphens=False)]
        left = [" ".join(map(str, line.patterns)) for line in self.lines]
        width = max((len(row) for row in left if len(row) <= 60), default=0)
        body = [f"{row:<{width}}  {line.rule}" for row, line in zip(left, self.lines, strict=True)]
        notes = [f"# {row}".rstrip() for row in self.notes]
        return "\n\n".join("\n".join(block) for block in (rows, body, notes) if block) + "\n"


def _component_text(component: Component) -> str:
    return "".join(piece[0] if len(piece) == 1 else "{" + ",".join(piece) + "}" for piece in component)


def _component_regex(component: Component) -> str:
    if component == _ANY_DEPTH:
        return r"(?:[^.]+\.)*"
    pieces = ["|".join(re.escape(alternative).replace(r"\*", "[^.]*") for alternative in piece) for piece in component]
    return "".join(f"(?:{piece})" for piece in pieces) + r"\."


def _merged(component: Component) -> Component:
    """The canonical form: pieces without alternatives are joined with their neighbours."""
    pieces: list[tuple[str, ...]] = []
    for piece in component:
        if pieces and len(pieces[-1]) == len(piece) == 1:
            pieces[-1] = (pieces[-1][0] + piece[0],)
        else:
            pieces.append(piece)
    return tuple(pieces)


# --- text to tree --------------------------------------------------------------------------------------------------


@functools.cache
def _grammar() -> Lark:
    text = resources.files("tpcompile").joinpath("spec.lark").read_text(encoding="utf-8")
    return Lark(text, parser="lalr", propagate_positions=True)


def _place(filename: str, rows: Sequence[str], line: int, column: int, width: int = 1) -> Where:
    # A tab would push the carets aside, and a control character does worse to a terminal.
    text = "".join(char if char.isprintable() else " " for char in rows[line - 1])
    return Where(filename, line, column, width, text)


class _Reader:
    """Turns lark's tree into a `Spec`, with a place for everything an error may want to point at."""

    def __init__(self, text: str, filename: str):
        self.filename = filename
        self.rows = _rows(text)

    def spec(self, tree: Tree[Token]) -> Spec:
        classes: dict[str, Where] = {}
        lines: list[Line] = []
        for statement in _trees(tree):
            if statement.data == "line":
                lines.append(self.line(statement))
                continue
            for name in _tokens(statement):
                where = self.where(name)
                if (first := classes.get(name)) is not None:
                    what = f"class `{name}` is named twice"
                    why = _at("the first time is here", first)
                    raise SpecError(what, where=where, why=why, help="keep one of them")
                classes[str(name)] = where
        return Spec(tuple(classes), tuple(lines), self.filename)

    def line(self, tree: Tree[Token]) -> Line:
        *patterns, word = _trees(tree)
        name = _tokens(word)[0]
        if "*" in name:
            raise _no_word(self.where(name), self.rows[(name.line or 1) - 1])
        read = tuple(map(self.pattern, patterns))
        line = Line(read, str(name), where=self.where(tree.meta), word_where=self.where(name))
        for by in _tokens(tree):
            if by.type == "COUNT" and int(by) < 1:
                raise SpecError(f"`by {by}` counts nothing", where=self.where(by), help="counts start at 1")
            line = replace(line, by=int(by) if by.type == "COUNT" else str(by), by_where=self.where(by))
        return line

    def pattern(self, tree: Tree[Token]) -> Pattern:
        components = tuple(_merged(tuple(map(_piece, component.children))) for component in _trees(tree))
        return Pattern(components, _tokens_within(tree)[0].type == "OPTIONAL", self.where(tree.meta))

    def where(self, span: Token | Meta) -> Where:
        column = span.column or 1
        return _place(self.filename, self.rows, span.line or 1, column, (span.end_column or column + 1) - column)


def _rows(text: str) -> list[str]:
    return [row.removesuffix("\r") for row in text.split("\n")]


def _trees(tree: Tree[Token]) -> list[Tree[Token]]:
    return [child for child in tree.children if isinstance(child, Tree)]


def _tokens(tree: Tree[Token]) -> list[Token]:
    return [child for child in tree.children if isinstance(child, Token)]


def _tokens_within(tree: Tree[Token]) -> list[Token]:
    return list(tree.scan_values(lambda value: isinstance(value, Token)))


def _piece(node: Token | Tree[Token]) -> tuple[str, ...]:
    return (str(node),) if isinstance(node, Token) else tuple(map(str, _tokens(node)))


_LINE_HELP = "a line is one or more patterns and then one word, blanks between them: `layers.*.mlp.up_proj  column`"
_NAME_AHEAD = {"ANY_DEPTH", "GLOB", "_OPEN"}


def _syntax_error(error: UnexpectedInput, text: str, filename: str) -> SpecError:
    """What lark met and what it would have taken, as an explanation in the words of the language."""
    match error:
        case UnexpectedToken():
            kind, found, legal = error.token.type, str(error.token).strip(), set(error.accepts or error.expected)
            found = "" if kind == "_NEWLINE" else found  # or a comment before it
        case UnexpectedCharacters():
            kind, found, legal = "", str(error.char), set(error.allowed or ())
        case _:
            raise error
    where = _place(filename, _rows(text), error.line, error.column, len(found) or 1)
    gap = kind in ("_NEWLINE", "_BLANK")
    shown = f"`{found}`" if found.isprintable() else repr(found)
    what, help = f"{shown} cannot stand here", _LINE_HELP
    if legal <= {"GLOB", "_COMMA", "_CLOSE"}:
        help = "alternatives are parts of one name, with commas between them: `{q,k,v}_proj`"
        if gap:
            what = "a `{` is not closed"
        elif kind == "_OPEN":
            what, help = "a `{` inside `{ }`", "write a pattern for each: alternatives do not nest"
        elif kind == "_DOT":
            what, help = "a dot inside `{ }`", "write a pattern for each: alternatives are parts of one name"
        elif kind in ("_COMMA", "_CLOSE"):
            what = "an alternative is empty" if legal == {"GLOB"} else "a `{ }` with one alternative"
    elif kind == "_NEWLINE" and legal & {"_DOT", "OPTIONAL"}:
        return _no_word(where, where.text or "")
    elif kind == "_CLOSE":
        what, help = "a `}` without a `{`", "alternatives stand in braces: `{q,k,v}_proj`"
    elif legal == _NAME_AHEAD and (gap or kind == "_DOT"):
        what = "a name is missing here"
        help = "a dot joins two names, and `?` stands directly in front of a pattern: `?model.lm_head`"
    elif kind == "ANY_DEPTH" or legal == {"_DOT", "_BLANK"}:
        what, help = "`**` next to something else", "`**` stands alone between dots; inside a name write `*`"
    elif kind == "OPTIONAL":
        what, help = "a `?` after a name", "`?` stands in front of the pattern that may match nothing: `?lm_head`"
    elif "ATTRIBUTE" in legal:
        what = f"{shown} is not a count" if found else "`by` without a count"
        help = "`by` takes a number or an attribute of the config: `by config.num_key_value_heads`"
    elif legal == {"_NEWLINE"}:
        what, help = "the line goes on after its count", "one line, one word, one count"
    elif legal == {"CLASS"} or legal <= {"_BLANK", "_NEWLINE"}:
        what = f"{shown} is not a class name" if found else "`for` without a class"
        help = "`for` takes names of classes with blanks between them: `for LlamaModel LlamaForCausalLM`"
    return SpecError(what, where=where, help=help)


def _no_word(where: Where, line: str) -> SpecError:
    first, *rest = line.partition("#")[0].split()
    if first in WORDS and rest:
        why = f"the last item of a line is its word, and `{first}` is the first of this one"
        help = f"write `{' '.join([*rest, first])}`"
    else:
        why, help = None, f"end the line with one of: {' '.join(WORDS)}"
    return SpecError("the line has no placement word", where=where, why=why, help=help)


def _unreadable(path: Path, error: OSError) -> SpecError:
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.tpspec"))
        help = f"name one of its files: {' '.join(names)}" if names else None
        return SpecError(f"`{path}` is a directory, not a spec", help=help)
    what = f"cannot read the spec `{path}`"
    if not isinstance(error, FileNotFoundError):
        return SpecError(what, why=error.strerror)
    if not path.parent.is_dir():
        return SpecError(what, why=f"there is no directory `{path.parent}`")
    names = sorted(entry.name for entry in path.parent.glob("*.tpspec"))
    why = f"`{path.parent}` holds {' '.join(names)}" if names else f"`{path.parent}` holds no .tpspec"
    near = [str(path.parent / name) for name in _nearest(path.name, names)]
    help = f"did you mean `{near[0]}`?" if near else f"`tpcompile plan MODEL -o {path}` writes one"
    return SpecError(what, why=f"no such file; {why}", help=help)


# --- tree to claims ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One parameter that a line claims. A tied parameter claimed under several names has one claim per name."""

    parameter: str  # canonical name
    word: str
    line: Line
    module: str  # the module that holds the parameter under `name`
    name: str  # the name that matched: `parameter` itself or one of its aliases
    by: int | None = None


def resolve(
    spec: Spec,
    modules: Mapping[str, str],
    parameters: Collection[str],
    aliases: Mapping[str, str] = MappingProxyType({}),
    config: object | None = None,
) -> tuple[Claim, ...]:
    """Lay a spec over the names of a model.

    A pattern that matches a module claims the module's own parameters (its weight and bias, not those of modules
    inside it); one that matches a parameter claims that. The claims come in the order of `parameters` and `aliases`,
    so that the order of lines means nothing.

    Args:
        spec: the spec.
        modules: dotted path -> class name of every module of the model; the root is ``""``.
        parameters: the canonical names of the model's parameters.
        aliases: name -> canonical name of tied parameters; names of anything but `parameters` are ignored.
        config: what ``by config.x`` is looked up in.

    Raises:
        SpecError: an unknown word; a pattern, or an alternative of it, that claims nothing and is not optional; a
            parameter claimed by two lines; tied names claimed differently; a count that `config` does not have.
    """
    model = _Model(modules, parameters, aliases)
    for line in spec.lines:
        if line.word not in WORDS:
            raise _unknown_word(line, model)
    claimed: dict[str, tuple[Line, Pattern]] = {}
    for line in spec.lines:
        for pattern in line.patterns:
            names = model.claimed(pattern)
            if not pattern.optional:
                for part in (pattern, *pattern.narrowed()):
                    if not model.claimed(part):
                        raise _claims_nothing(part, pattern, model)
            taken = [name for name in names if name in claimed and claimed[name][0] is not line]
            if taken:
                raise _overlap(taken, claimed, line, pattern)
            claimed |= dict.fromkeys(names, (line, pattern))
    _check_ties(claimed, model)
    claims: list[Claim] = []
    for name, canonical in model.names.items():
        if name in claimed:
            line, _ = claimed[name]
            module, _ = parametrized(name) or (name.rpartition(".")[0], name)
            claims.append(Claim(canonical, line.word, line, module, name, _count(line, config)))
    return tuple(claims)


def _without_adapters(name: str) -> str:
    """What a parameter or module was called before PEFT wrapped the model, and the layer that it is in."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


_PARAMETRIZED = re.compile(r"(.+)\.parametrizations\.([^.]+)\.original\d*")


def parametrized(name: str) -> tuple[str, str] | None:
    """The module and the parameter that ``name`` is a part of, if it is what a parametrization computes one from."""
    found = _PARAMETRIZED.fullmatch(name)
    return None if found is None else (found[1], f"{found[1]}.{found[2]}")


class _Model:
    """The names of a model, as patterns and errors need them."""

    def __init__(self, modules: Mapping[str, str], parameters: Collection[str], aliases: Mapping[str, str]):
        self.modules = modules
        canonical = dict.fromkeys(parameters)
        self.names = {name: name for name in canonical}
        self.names |= {alias: name for alias, name in aliases.items() if name in canonical}

    def claimed(self, pattern: Pattern) -> list[str]:
        """The names of the parameters that a pattern claims, as matched."""
        found: list[str] = []
        for name in self.names:
            spellings = {name, name.rpartition(".")[0], *(parametrized(name) or ())}
            if self.modules.get("", "").startswith("Peft"):
                spellings |= {_without_adapters(spelling) for spelling in spellings}
            if any(map(pattern.matches, spellings)):
                found.append(name)
        return found

    def matched(self, pattern: Pattern) -> list[str]:
        """The modules that a pattern matches, with or without parameters."""
        return [path for path in self.modules if pattern.matches(path)]

    def inside(self, paths: Collection[str], below: Iterable[str]) -> list[str]:
        """The first components, under any module of `paths`, of the names in `below`; each once."""
        starts = {path + "." if path else "" for path in paths}
        found: dict[str, None] = {}
        for name in below:
            for dot in [0, *(match.end() for match in re.finditer(r"\.", name))]:
                if name[:dot] in starts and (component := name[dot:].partition(".")[0]):
                    found[component] = None
        return list(found)


def _unknown_word(line: Line, model: _Model) -> SpecError:
    near = _nearest(line.word, WORDS)
    why = None
    if model.matched(Pattern((((line.word,),),))):
        why = f"`{line.word}` is a module of the model, and the last item of a line is its word"
    help = f"did you mean `{near[0]}`? The words are: " if near else "the words are: "
    return SpecError(f"unknown word `{line.word}`", where=line.word_where, why=why, help=help + " ".join(WORDS))


def _claims_nothing(part: Pattern, pattern: Pattern, model: _Model) -> SpecError:
    """`part` is `pattern` itself, or one alternative of it."""
    of = f", a part of `{pattern.glob}`," if part != pattern else ""
    if paths := model.matched(part):
        what = f"`{part.glob}`{of} has no parameters of its own"
        classes = sorted({model.modules[path] for path in paths if model.modules[path]})
        inside = model.inside(paths, model.modules)
        why = f"it is a {' or '.join(classes) or 'module'}" + (f" and has {_listed(inside)}" if inside else "")
        below = [name for name in model.names if any(name.startswith(path + "." if path else "") for path in paths)]
        with_parameters = model.inside(paths, (name.rpartition(".")[0] for name in below))
        direct = [child for child in with_parameters if model.claimed(_child(part, child))]
        if direct:
            help = f"did you mean `{part.glob}.{_folded(direct)}`?"
        elif below:
            help = f"name what is inside it and has parameters, such as `{_starred(below[0].rpartition('.')[0])}`"
        else:
            help = "nothing inside it has parameters: leave it out"
        return SpecError(what, where=pattern.where, why=why, help=help)
    near = _nearest_names(part, model)
    help = "write it as `model.named_parameters()` lists it; a `?` in front of the pattern says that it may be missing"
    if near:
        help = f"did you mean `{near}`?"
    what = f"`{part.glob}`{of} matches nothing in the model"
    return SpecError(what, where=pattern.where, why=_how_far(part, model), help=help)


def _how_far(pattern: Pattern, model: _Model) -> str:
    """The longest beginning of a pattern that exists, and what is there."""
    count = len(pattern.components) - 1
    while count and not model.matched(replace(pattern, components=pattern.components[:count])):
        count -= 1
    prefix = replace(pattern, components=pattern.components[:count])
    wanted = _component_text(pattern.components[count])
    if not count:
        return f"at the top, the model has {_listed(model.inside([''], [*model.modules, *model.names]))}"
    if prefix.components[-1] == _ANY_DEPTH:
        return f"nothing under `{prefix.glob}` is named `{wanted}`"
    inside = model.inside(model.matched(prefix), [*model.modules, *model.names])
    return f"`{prefix.glob}` exists and has {_listed(inside) or 'nothing inside'}"


def _nearest_names(pattern: Pattern, model: _Model) -> str | None:
    """The name of the model that a pattern most likely means, as a pattern; None if none is near."""
    numbered = any(char.isdigit() for char in pattern.glob)
    names = dict.fromkeys(path for name in model.names for path in (name.rpartition(".")[0], name) if path)
    options = list(dict.fromkeys([*map(_starred, names), *(names if numbered else ())]))
    found: dict[str, None] = {}
    for glob in _expanded(pattern):
        last = glob.rpartition(".")[2]
        # The whole may be near because of a long common beginning: what is wanted is named by the last component.
        near = _nearest(glob, [name for name in options if _nearest(last, [name.rpartition(".")[2]])])
        found |= dict.fromkeys(near)
    parents = {name.rpartition(".")[0] for name in found}
    if len(parents) == 1 and len(found) > 1 and (parent := parents.pop()):
        return f"{parent}.{_folded([name.rpartition('.')[2] for name in found])}"
    return "` `".join(found) or None


def _expanded(pattern: Pattern) -> list[str]:
    """A pattern without ``{ }``: one glob for every choice of alternatives, the first 64 of them."""
    pieces = [piece for component in pattern.components for piece in (*component, (".",))][:-1]
    return ["".join(choice) for choice in itertools.islice(itertools.product(*pieces), 64)]


def _overlap(
    names: Sequence[str], claimed: Mapping[str, tuple[Line, Pattern]], line: Line, pattern: Pattern
) -> SpecError:
    first, first_pattern = claimed[names[0]]
    more = sum(claimed[name][0] is first for name in names) - 1
    return SpecError(
        f"`{names[0]}`{f' (and {more} more)' if more else ''} is claimed by two lines, "
        f"as `{first.rule}` and as `{line.rule}`",
        where=pattern.where,
        why=_at("the other line is here", first_pattern.where),
        help="narrow one of the two patterns: the order of lines means nothing, so neither wins",
    )


def _check_ties(claimed: Mapping[str, tuple[Line, Pattern]], model: _Model) -> None:
    """Raise SpecError if two names of one tied parameter are claimed differently."""
    firsts: dict[str, str] = {}
    for name in claimed:
        first = firsts.setdefault(model.names[name], name)
        (line, pattern), (other, other_pattern) = claimed[name], claimed[first]
        if (line.word, line.by) != (other.word, other.by):
            raise SpecError(
                f"`{first}` and `{name}` are one tied parameter, claimed as `{other.rule}` and as `{line.rule}`",
                where=pattern.where,
                why=_at("the other line is here", other_pattern.where),
                help="say the same of both names, or leave one of them out",
            )


def _count(line: Line, config: object | None) -> int | None:
    """The number that ``by`` stands for."""
    if not isinstance(line.by, str):
        return line.by
    if config is None:
        help = "write the number itself, or give the model a `config` attribute"
        raise SpecError(f"`by {line.by}` on a model that has no config", where=line.by_where, help=help)
    path, value = "config", config
    for name in line.by.split(".")[1:]:
        if not hasattr(value, name):
            names = [known for known in dir(value) if not known.startswith("_")]
            near = _nearest(name, names)
            what = f"`{path}` ({type(value).__name__}) has no `{name}`"
            counts = (
                [key for key, count in vars(value).items() if _is_count(count)] if hasattr(value, "__dict__") else []
            )
            help = f"did you mean `{path}.{near[0]}`?" if near else f"its counts are: {_listed(counts) or 'none'}"
            raise SpecError(what, where=line.by_where, help=help)
        path, value = f"{path}.{name}", getattr(value, name)
    if not _is_count(value):
        what = f"`{path}` is {value!r}, not a count"
        raise SpecError(what, where=line.by_where, help="a count is a whole number from 1")
    return value


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# --- specs that ship with tpcompile --------------------------------------------------------------------------------


@functools.cache
def shipped() -> Mapping[str, Traversable]:
    """The shipped specs: model class -> the file whose ``for`` line names it."""
    found: dict[str, Traversable] = {}
    for entry in sorted(resources.files("tpcompile").joinpath("specs").iterdir(), key=lambda entry: entry.name):
        for name in _shipped_spec(entry).classes if entry.name.endswith(".tpspec") else ():
            if name in found:
                raise ValueError(f"{found[name].name} and {entry.name} are both for {name}")
            found[name] = entry
    return MappingProxyType(found)


def find_shipped(model_class_names: Sequence[str]) -> Spec:
    """The shipped spec of a model, found by the names along its class's MRO, the class itself first.

    Raises:
        SpecError: no shipped spec names any of them.
    """
    specs = shipped()
    for name in model_class_names:
        if name in specs:
            return _shipped_spec(specs[name])
    # A family shares the beginning of its names; the ends, ForCausalLM and the like, say nothing about structure.
    families = {re.split("For|Model|LMHead", name)[0]: name for name in specs}
    near = [families[family] for family in _nearest(re.split("For|Model", model_class_names[0])[0], families)]
    like = f"; `{specs[near[0]].name}`, for `{near[0]}`, may be a start" if near else ""
    raise SpecError(
        f"no shipped spec is for the class `{model_class_names[0]}`",
        why="the classes that have one:\n" + _indented(sorted(specs)),
        help=f"write a spec of a few lines (docs/tpspec.md) and pass its path{like}",
    )


def _shipped_spec(entry: Traversable) -> Spec:
    return Spec.parse(entry.read_text(encoding="utf-8"), f"specs/{entry.name}")


# --- words for errors ----------------------------------------------------------------------------------------------


def _nearest(word: str, options: Iterable[str]) -> list[str]:
    """The option nearest to a word, whatever their case; empty if none is near."""
    lower = {option.lower(): option for option in options}
    return [lower[near] for near in difflib.get_close_matches(word.lower(), lower, n=1)]


def _starred(name: str) -> str:
    """``model.layers.3.mlp`` as the pattern that a spec would have: ``model.layers.*.mlp``."""
    return ".".join("*" if component.isdigit() else component for component in name.split("."))


def _listed(names: Sequence[str]) -> str:
    """Names with blanks between them; a run of numbers as its ends, a long list cut short."""
    numbers = [name for name in names if name.isdigit()]
    rest = [name for name in names if not name.isdigit()]
    shown = ([f"{numbers[0]}..{numbers[-1]}"] if len(numbers) > 2 else numbers) + rest
    return " ".join(shown[:16]) + (f" and {len(shown) - 16} more" if len(shown) > 16 else "")


def _folded(names: Sequence[str]) -> str:
    """One component that matches all of `names`."""
    if any(name.isdigit() for name in names):
        return "*"
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _child(pattern: Pattern, name: str) -> Pattern:
    return replace(pattern, components=(*pattern.components, ((name,),)))


def _at(what: str, where: Where) -> str:
    return f"{what}\n{where.render()}"


def _indented(names: Sequence[str]) -> str:
    margin = " " * 8
    return textwrap.fill(" ".join(names), 110, initial_indent=margin, subsequent_indent=margin)
