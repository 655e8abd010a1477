"""The value that passes hand to one another: a captured graph, what is known of it, and what was decided.

A pass is a plain function ``Program -> Program``; it never changes the program it was given. Before ``emit`` the graph
is the model's own and the decisions are tables beside it; after ``emit`` the graph is one rank's code.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import sympy
import torch
import torch.fx
from torch.fx._lazy_graph_module import (
    _LazyGraphModule,  # pyright: ignore[reportPrivateUsage]
)

from tpcompile.caches import Cut as CacheCut
from tpcompile.capture import Captured
from tpcompile.errors import ShardingError, Where
from tpcompile.layout import Layout, Mesh
from tpcompile.placement import Placement
from tpcompile.rules import op_name, result_shapes
from tpcompile.sentence import Call, tensor_operands
from tpcompile.structure import Atom, Pin, Term

if TYPE_CHECKING:
    from tpcompile.activations import RankMemory
    from tpcompile.report import Collective, Line
    from tpcompile.spec import Claim, Spec


Recompute = Literal["attention", "layers"] | None
"""What runs again in backward: attention cores (scores, softmax, dropout, product with v), layers, or nothing."""


@dataclass(frozen=True)
class Structure:
    """Index spaces of every value (node name -> one tuple of terms per tensor result) and of every parameter."""

    values: Mapping[str, tuple[tuple[Term, ...], ...]]
    parameters: Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True)
class Cut:
    """An index space cut over mesh ``axes``; ``parameter`` and ``claim`` say where and by which line it was asked for.

    ``atoms`` is usually one. Two neighbours are cut as their product (kv heads and the repeats of each, where neither
    alone has a place for every rank): what has only one of them stays whole.
    """

    atoms: tuple[Atom, ...]
    axes: tuple[int, ...]
    parameter: str
    claim: Claim | None

    @property
    def size(self) -> int:
        """Positions of the index space."""
        return math.prod(a.size for a in self.atoms)


@dataclass(frozen=True)
class Row:
    """Placement of one node: what its operands become, what it makes, what it leaves behind, and why.

    ``results`` are the states the op itself produces; ``settled`` what its users see: partial sums all-reduced at
    once unless a pass decided to keep them.
    """

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    settled: tuple[Placement, ...]
    reason: str


@dataclass(frozen=True)
class Options:
    """What a compile asks for beyond the cuts.

    Attributes:
        sequence_parallel: norms, dropout and residuals run on a part of the positions (Korthikanti et al. 2022): less
            memory for activations, the same bytes sent.
        gather_logits: False leaves outputs that are cut along their last dim (the vocabulary) as this rank's part.
        reduce_dtype: sums over ranks of bfloat16 and float16 values are made in this dtype; None: in their own.
        dropout: ``exact`` masks are bitwise those of one device on a CPU; ``independent`` ones are drawn by each rank
            for its own part, which is cheaper, and other numbers (Megatron's way).
        recompute: what is run again in backward instead of being kept for it: ``"attention"`` (the scores, softmax,
            dropout and product with v), ``"layers"`` (every repeated layer), or None.
        per_layer: every layer reads its own parameters alone, for ``fully_shard`` and :func:`tpcompile.pipeline_stage`;
            gradients of whole parameters in cut regions are then summed in a bucket per layer instead of one per step.
        overlap: 2 or more makes a product whose partial sums are added up over the ranks in so many pieces, so that
            the sum of one travels while the next is multiplied (Wang et al. 2024, Domino).
    """

    sequence_parallel: bool = False
    gather_logits: bool = True
    reduce_dtype: torch.dtype | None = None
    dropout: Literal["exact", "independent"] = "exact"
    recompute: Recompute = None
    per_layer: bool = False
    overlap: int = 1

    def __post_init__(self) -> None:
        if self.reduce_dtype not in (None, torch.float32, torch.float64):
            raise ShardingError(
                f"reduce_dtype is {self.reduce_dtype}",
                why="it is the dtype in which narrower values are summed over ranks",
                help="pass torch.float32, or None",
            )
        if self.dropout not in ("exact", "independent"):
            raise ShardingError(
                f"dropout is {self.dropout!r}",
                why="masks are `exact`, those of one device, or `independent`, each rank's own",
                help='pass dropout="exact" or dropout="independent"',
            )
        if self.recompute not in (None, "attention", "layers"):
            raise ShardingError(
                f'recompute must be "attention", "layers" or None, not {self.recompute!r}',
                why="it says what is run again in backward instead of being kept for it",
                help='"attention" runs the scores, softmax and product with v again; "layers" every repeated layer',
            )
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int) or self.overlap < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ShardingError(
                f"overlap is {self.overlap!r}",
                why="it is the number of pieces of a product, of which one is summed while the next is made",
                help="pass overlap=2, or leave it at 1",
            )
        if self.overlap > 1 and self.recompute == "layers":
            raise ShardingError(
                'overlap and recompute="layers" together',
                why="a layer that runs again in backward would start its sums again and not wait for them",
                help='pass recompute="attention", or no overlap',
            )

    @staticmethod
    def of(asked: Mapping[str, Any]) -> Options:
        """The options of a call, by keyword.

        Raises:
            TypeError: one of them is unknown.
        """
        known = [f.name for f in fields(Options)]
        for name in asked:
            if name not in known:
                near = difflib.get_close_matches(name, ["spec", "degree", "example_inputs", "mesh", *known], n=1)
                help = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(known)}"
                raise TypeError(f"unknown keyword argument {name!r}: {help}")
        return Options(**asked)


DEFAULT = Options()


class Asked(TypedDict, total=False):
    """:class:`Options` as keyword arguments of ``compile``, ``rewrite`` and ``verify``."""

    sequence_parallel: bool
    gather_logits: bool
    reduce_dtype: torch.dtype | None
    dropout: Literal["exact", "independent"]
    recompute: Recompute
    per_layer: bool
    overlap: int


@dataclass(frozen=True)
class Stage:
    """What one pass left behind, and how long it took."""

    name: str
    seconds: float
    program: Program


@dataclass(frozen=True)
class Program:
    """See the module docstring. ``mesh`` and everything below it is filled in by the passes, top to bottom."""

    captured: Captured
    graph_module: torch.fx.GraphModule
    degree: int
    spec: Spec | None = None
    claims: tuple[Claim, ...] = ()
    structure: Structure | None = None
    mesh: Mesh = field(default_factory=lambda: Mesh((1,)))
    cuts: tuple[Cut, ...] = ()
    parameters: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict[str, tuple[Layout, ...]])
    whole: frozenset[str] = frozenset()  # parameters that a `replicate` line keeps whole
    keep: frozenset[str] = frozenset()  # nodes whose partial sums travel on
    early: frozenset[tuple[str, int]] = frozenset()  # (node, mesh axis) that run behind f
    options: Options = DEFAULT
    streams: tuple[Term, ...] = ()  # index spaces of positions that are spread over the ranks between the cut blocks
    whole_ops: frozenset[str] = frozenset()  # nodes that gather spread operands although they could do without
    table: Mapping[str, Row] = field(default_factory=dict[str, Row])
    emitted: bool = False
    held: Mapping[str, CacheCut] = field(default_factory=dict[str, CacheCut])  # inputs of which a rank holds a part
    resident: frozenset[int] = frozenset()  # outputs of which a rank keeps its part: tensors of caches
    sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict[sympy.Symbol, int])  # at the example inputs
    history: tuple[Stage, ...] = ()  # capture first, then the passes in order

    @property
    def graph(self) -> torch.fx.Graph:
        """The current graph."""
        return self.graph_module.graph

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of the capture and of every pass."""
        return {stage.name: stage.seconds for stage in self.history}

    @property
    def stages(self) -> tuple[tuple[str, str, str], ...]:
        """``(pass, text before, text after)`` for every pass that ran."""
        texts = [stage.program.text() for stage in self.history]
        names = [stage.name for stage in self.history]
        return tuple(zip(names[1:], texts, texts[1:], strict=False))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective of one step, at the sizes of the example inputs."""
        from tpcompile.report import collectives_of

        return collectives_of(self, self.sizes)

    def memory(self, inputs: Sequence[torch.Tensor] | None = None) -> tuple[RankMemory, ...]:
        """What each rank holds in a training step, at the sizes of the example inputs or of ``inputs``."""
        from tpcompile.activations import memory

        return memory(self, inputs)

    def lines(self) -> tuple[Line, ...]:
        """One line per value."""
        from tpcompile.report import lines

        return lines(self)

    def text(self) -> str:
        """The program, one value a line."""
        from tpcompile.report import text

        return text(self)

    def explain(self, name: str) -> str:
        """Why a parameter, or the parameters of a module, are cut as they are."""
        from tpcompile.explain import explain

        return explain(self, name)

    def __str__(self) -> str:
        return self.text()

    def with_(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def call(self, node: torch.fx.Node) -> Call:
        """A call_function node as rules see it."""
        operands = tensor_operands(node)
        shapes = tuple(self.shape(x) for x in operands)
        return Call(node, operands, shapes, result_shapes(node, self.captured.size), self.captured.size)

    def shape(self, node: torch.fx.Node) -> tuple[int, ...]:
        """Shape of a tensor node, symbols at their hints."""
        return tuple(self.captured.size(n) for n in node.meta["val"].shape)


Pass = Callable[[Program], Program]


def copy_graph(module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, torch.fx.Graph]:
    """A fresh graph over the same attributes; node names and metadata are kept."""
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    return module_of(module, graph), graph


def module_of(module: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A module of ``graph`` with the attributes of ``module``; its code is made when it is first called.

    Most graphs between passes are never called, and to make their code took half of the time of the rewriting.
    """
    return _LazyGraphModule(module, graph)


def where(node: torch.fx.Node) -> Where:
    """The place in the model that made ``node``: module path, op, and the model's own source line."""
    source = node.meta.get("source")
    base = source if isinstance(source, Where) else Where()
    return replace(base, module=node.meta.get("module") or None, op=op_name(node))


__all__ = [
    "DEFAULT",
    "Asked",
    "Cut",
    "Options",
    "Pass",
    "Pin",
    "Program",
    "Recompute",
    "Row",
    "Structure",
    "copy_graph",
    "module_of",
    "where",
]
