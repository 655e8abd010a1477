"""The truth of a pattern: what it matches and what is written instead, on all ranks in lock step.

``before`` becomes a program of a few nodes, which the real matcher rewrites. For every assignment of states to the
tensor variables that obeys the typing rule, both programs must have a result in the same state and agree: in the value
that the state stands for, and in the gradients that the variables' states stand for. Knows no pattern by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor

from tpcompile.collectives import transition_of
from tpcompile.layout import Leaf, Mesh
from tpcompile.patterns import Pattern, explain, match, rewrite, write
from tpcompile.placement import Placement
from tpcompile.program import Program
from tpcompile.rules import RULES, op_name
from tpcompile.sentence import Call, tensor_operands
from tpcompile.simulate import Simulation

ROUNDING = 2**12  # in units of the dtype's precision: 1e-12 in fp64
NONE = "N"  # a value without a gradient, the same everywhere: R and H at once
ANY = "?"  # the result of an op without a rule


@dataclass(frozen=True)
class Given:
    """A tensor variable: its shape on each rank, or on all of them."""

    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float64

    def draw(self, state: str, ranks: int, seed: int) -> list[Tensor]:
        """One tensor for each rank: different ones for parts and partial sums, else the same."""
        shapes = self.shape if self.shape and isinstance(self.shape[0], tuple) else (self.shape,) * ranks
        generator = torch.Generator().manual_seed(seed)
        found: list[Tensor] = []
        for shape in cast("tuple[tuple[int, ...], ...]", shapes):
            if state not in "SP":
                generator.manual_seed(seed)
            x = torch.randint(-4, 5, shape, generator=generator)
            noise = torch.rand(shape, generator=generator) if self.dtype.is_floating_point else 0
            found.append((x + noise).to(self.dtype))
        return found

    @property
    def states(self) -> str:
        return "RHSP" if self.dtype.is_floating_point else NONE + "SP"


class IllTyped(Exception):
    """An op's operands break the typing rule, or a transition is given another state than its own."""


def letter_of(node: torch.fx.Node, letters: Mapping[torch.fx.Node, str]) -> str:
    """State of a call's result."""
    operands = tensor_operands(node)
    given = [letters[x] for x in operands]
    transition = transition_of(node.target)
    if transition is not None:
        if given[0] == NONE and transition.source in "RH":
            return NONE if transition.target in "RH" else transition.target
        if given[0] != transition.source:
            raise IllTyped(f"{transition.name} takes {transition.source}, not {given[0]}")
        return transition.target
    known = [x for x in given if x != NONE]
    if not known:
        return NONE
    rule = RULES.get(op_name(node))
    if rule is None or ANY in known:
        return ANY
    if "R" in known:
        if set(known) != {"R"}:
            raise IllTyped(f"{op_name(node)} mixes R with {sorted(set(known))}")
        return "R"
    if "P" in known:
        shapes = tuple(tuple(x.meta["val"].shape) for x in operands)
        results = (tuple(node.meta["val"].shape),) if "val" in node.meta else shapes[:1]
        try:
            linear = rule.sentence(Call(node, operands, shapes, results, int)).linear
        except ValueError:  # not for this form of the op
            return ANY
        alone = given.count("P") == 1 and not set(given) - {"P", "H", NONE}
        if isinstance(linear, frozenset):
            linear = "each" if given.index("P") in linear else None
        if not (set(given) == {"P"} if linear == "joint" else linear == "each" and alone):
            raise IllTyped(f"{op_name(node)} is not linear in a partial sum")
        return "P"
    return "S" if "S" in known else "H"  # S: each rank has a value and a gradient of its own


@dataclass
class Case:
    """A pattern's ``before`` on a sample in given states, and what the matcher makes of it."""

    pattern: Pattern
    sample: Mapping[str, Any]
    states: Mapping[str, str]
    ranks: int

    def __post_init__(self) -> None:
        self.mesh = Mesh((self.ranks,))
        self.before = torch.fx.Graph()
        given = [name for name, value in self.sample.items() if isinstance(value, Given)]
        nodes = {name: self.before.placeholder(name) for name in given}
        self.root, _ = write(self.before, self.pattern.before, {**self.sample, **nodes})
        self.before.output(self.before.call_function(torch.ops.aten.clone.default, (self.root,)))
        self.inputs = {name: self.sample[name].draw(self.states[name], self.ranks, i) for i, name in enumerate(given)}

    def typed(self) -> str:
        """State of the result; IllTyped if there is none."""
        letters = self.letters(self.before)
        for node, letter in letters.items():
            shape = cast("Tensor", node.meta["val"]).shape
            node.meta["placement"] = Placement((letter,), tuple(Leaf(n) for n in shape))
        return letters[self.root]

    def letters(self, graph: torch.fx.Graph) -> dict[torch.fx.Node, str]:
        letters: dict[torch.fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                letters[node] = self.states[node.target]
            elif node.op == "call_function":
                letters[node] = letter_of(node, letters)
        return letters

    def run(self, graph: torch.fx.Graph, see: Any = None) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The result on each rank, and the variables on each rank, from which it was computed."""
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        inputs = {
            name: [x.clone().requires_grad_(x.is_floating_point()) for x in xs] for name, xs in self.inputs.items()
        }
        simulation = Simulation(module, self.ranks, self.mesh.all_groups())
        return simulation.run(list(zip(*inputs.values(), strict=True)) or [()] * self.ranks, on_node=see), inputs

    def annotate(self) -> None:
        """``meta["val"]`` of every node: rank 0's tensor."""

        def see(node: torch.fx.Node, values: list[Any]) -> None:
            node.meta["val"] = values[0]

        self.run(self.before, see)

    def failures(self) -> Iterator[str]:
        """What is wrong with the pattern here; the case is well typed."""
        result = self.typed()
        after = torch.fx.Graph()
        same: dict[torch.fx.Node, torch.fx.Node] = {}
        after.output(cast("torch.fx.Node", after.graph_copy(self.before, same)))
        if match(self.pattern, same[self.root]) is None:
            yield explain(self.pattern, same[self.root])
            return
        captured = SimpleNamespace(size=int)
        program = Program(cast("Any", captured), cast("Any", None), self.ranks, mesh=self.mesh)
        rewrite(after, [self.pattern], program)
        after.eliminate_dead_code()
        (copied,) = cast("tuple[torch.fx.Node]", next(reversed(after.nodes)).args)
        try:
            letter = self.letters(after)[copied.all_input_nodes[0]]
        except IllTyped as error:
            yield f"what is written is ill typed: {error}"
            return
        if letter not in (result, ANY, NONE):  # without a gradient: seen below
            yield f"the result was {result} and becomes {letter}"
        yield from self.differences(result, after)

    def differences(self, result: str, after: torch.fx.Graph) -> Iterator[str]:
        (ys, xs), (zs, ws) = self.run(self.before), self.run(after)
        yield from different("the value", result == "P", ys, zs)
        if not ys[0].requires_grad:
            return
        alike = "R" if result in "RP" else "S"
        cotangents = Given(tuple(tuple(y.shape) for y in ys)).draw(alike, self.ranks, 99)
        for outputs in (ys, zs):
            given = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
            torch.autograd.backward([y for y, _ in given], [g for _, g in given])
        for name in xs:
            if self.sample[name].dtype.is_floating_point:
                expected, got = ([x.grad for x in leaves[name]] for leaves in (xs, ws))
                yield from different(f"the gradient of {name}", self.states[name] == "H", expected, got)


def different(
    what: str, partial: bool, expected: Sequence[Tensor | None], got: Sequence[Tensor | None]
) -> Iterator[str]:
    """Compare on each rank; what is partial, in its sum over the ranks."""
    if any((a is None) != (b is None) for a, b in zip(expected, got, strict=True)):
        yield f"{what} is missing"
        return
    pairs = [(a.detach(), b.detach()) for a, b in zip(expected, got, strict=True) if a is not None and b is not None]
    if partial and pairs:
        pairs = [(torch.stack([a for a, _ in pairs]).sum(0), torch.stack([b for _, b in pairs]).sum(0))]
    for rank, (a, b) in enumerate(pairs):
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{what} on rank {rank} is {b.dtype}{list(b.shape)}, was {a.dtype}{list(a.shape)}"
        elif not torch.allclose(a.double(), b.double(), rtol=(near := rounding(a.dtype)), atol=near):
            yield f"{what} on rank {rank} differs by {float((a.double() - b.double()).abs().max()):.1e}"


def rounding(dtype: torch.dtype) -> float:
    return ROUNDING * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def failures(pattern: Pattern, sample: Mapping[str, Any], ranks: int) -> list[str]:
    """What is wrong with a pattern on a sample, in all states that it can be typed in; nothing if it is true."""
    given = {name: value for name, value in sample.items() if isinstance(value, Given)}
    found: list[str] = []
    typed = 0
    for states in itertools.product(*(value.states for value in given.values())):
        case = Case(pattern, sample, dict(zip(given, states, strict=True)), ranks)
        case.annotate()
        try:
            case.typed()
        except IllTyped:
            continue
        typed += 1
        found += [f"{dict(case.states)}: {failure}" for failure in case.failures()]
    return found if typed else ["no states of its variables make it well typed"]
