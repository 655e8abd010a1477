"""How many wrong programs and wrong rules are caught: at least 99 of 100 must be, and the rate is printed.

Of programs: each transition of each program is deleted, doubled, swapped with its neighbours, given another dim, other
parts or another group, and each constant that emission made local another value; `verify` must see it and name the
place. Of rules: each fact of each row is turned round; the truth test of rules must see it. What cannot be seen because
nothing is wrong is listed here, with the reason, and counted apart. The default run takes a fixed sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import torch
import zoo
from mutants import Mutant, mutants
from rule_samples import call, ints, real, samples_of

from tpcompile.collectives import transition_of
from tpcompile.equivalence import Report, verify_program
from tpcompile.layout import Mesh
from tpcompile.per_rank import PerRank
from tpcompile.placement import Placement, PlacementError, solve
from tpcompile.program import Program, copy_graph
from tpcompile.rule_truth import Case, Sample, _options, assignments, check  # pyright: ignore[reportPrivateUsage]
from tpcompile.rules import ROWS, Rule
from tpcompile.sentence import Linear, Sentence
from tpcompile.transitions import STATISTICS, TRANSITIONS

LEAST = 0.99
T = TypeVar("T")


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Tiny tensors on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Rate:
    """Mutants that were caught and that were not, and those that are not wrong, by the reason."""

    caught: int = 0
    right: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    survivors: list[str] = field(default_factory=list[str])

    @property
    def share(self) -> float:
        return self.caught / max(1, self.caught + len(self.survivors))

    def __str__(self) -> str:
        rows = [f"{self.caught} of {self.caught + len(self.survivors)} mutants caught ({self.share:.1%})"]
        rows += [f"{len(names)} left out: {why}" for why, names in self.right.items()]
        return "\n".join([*rows, *(f"not caught: {name}" for name in self.survivors)])


def sampled(found: Sequence[T], count: int) -> list[T]:
    """``count`` of them, evenly spread; all of them if there are no more."""
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


# --------------------------------------------------------------------------------------------------------- programs
PROGRAMS = [
    ("gpt2", 2),
    ("llama_few_kv", 4),  # a grid of 2 * 2
    ("llama_uneven", 2),
    ("gpt_neox", 2),
    ("falcon_mqa", 3),
    ("bert", 2),
    ("t5", 2),
]
RIGHT: Mapping[str, Mapping[str, str]] = {
    "phi3": {r"slice_3: argument 3 (whole again|one more)": "a slice that ends behind its dim ends with it"},
    "gpt_neox": {r"once(_\d+)?: doubled": "what is zero on all ranks but the first stays so"},
    "falcon_mqa": {
        r"slice_4: argument 3 whole again": "-2 counts from the end, whatever the length",
        r"slice_tensor_1: argument 3 (whole again|one more|rank 0's)": "a slice that ends behind its dim ends with it",
    },
}
"""Mutants that compute the same, by program: a pattern of their names, and why no check can tell them apart."""

FATAL = {"phi3": "slice_2: argument 2 whole again"}
"""Mutants that end the process: without key heads, torch's fused attention on the CPU divides by their number."""


def near(program: Program, mutant: Mutant, report: Report) -> bool:
    """Whether the report names the mutated node, what follows soon after it, or, for a gradient, what feeds it."""
    assert report.mismatch is not None
    node = next(n for n in program.graph.nodes if n.name == mutant.node)
    if report.mismatch.startswith("the gradients cannot be computed: "):
        return node.name in report.mismatch or transition_of(node.target) is not None
    named = re.match(r"(output \d+, value|value|gradient of) (\w+) (differs|cannot be computed)", report.mismatch)
    assert named is not None, report.mismatch
    assert re.search(r"^  in \S+", report.mismatch, re.MULTILINE), "the module is not named"
    found = {node, *(node.users if transition_of(node.target) is not None else ())}
    for _ in range(3):
        if named[1] == "gradient of":
            found |= {x for n in found for x in n.all_input_nodes if n is node or transition_of(n.target) is not None}
        else:
            found |= {user for n in found for user in n.users}
    if named[1].startswith("output"):
        found |= set(node.all_input_nodes)
    return named[2] in {n.name for n in found}


def hunted(name: str, degree: int, most: int) -> tuple[Rate, list[str]]:
    """The rate of one program's mutants, and reports that lead astray."""
    case, program = zoo.case(name, layers=1), zoo.program(name, degree, layers=1)
    assert verify_program(program, case.model, case.inputs).ok
    rate, astray = Rate(), list[str]()
    for mutant in sampled([mutant for mutant in mutants(program) if str(mutant) != FATAL.get(name)], most):
        report = verify_program(mutant.program(program), case.model, case.inputs)
        reasons = [why for pattern, why in RIGHT.get(name, {}).items() if re.fullmatch(pattern, str(mutant))]
        assert report.ok == bool(reasons) or not reasons, f"{mutant} is caught: it is no longer right"
        if reasons:
            rate.right.setdefault(reasons[0], []).append(str(mutant))
        elif report.ok:
            rate.survivors.append(f"{mutant} of {name}")
        else:
            rate.caught += 1
            if not near(program, mutant, report):
                astray.append(f"{mutant} of {name} -> {report.mismatch}")
    return rate, astray


def shown(rate: Rate, record_property: Callable[[str, object], None]) -> None:
    print(rate)
    record_property("kill rate", round(rate.share, 4))
    assert rate.share >= LEAST, str(rate)


ASTRAY = {"falcon_mqa", "phi3"}
"""Where a slice that is one longer is first noticed by the reshape behind it."""


@pytest.mark.parametrize(("name", "degree"), PROGRAMS)
def test_wrong_programs_are_caught(name: str, degree: int, record_property: Callable[[str, object], None]) -> None:
    rate, astray = hunted(name, degree, most=14)
    shown(rate, record_property)
    assert name in ASTRAY or astray == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "degree"), [*PROGRAMS, ("llama_mqa", 3), ("phi3", 2), ("gemma3", 3), ("vit", 2)])
def test_all_wrong_programs_are_caught(name: str, degree: int, record_property: Callable[[str, object], None]) -> None:
    rate, astray = hunted(name, degree, most=10_000)
    shown(rate, record_property)
    assert name in ASTRAY or astray == []
    found = {mutant for names in rate.right.values() for mutant in names}
    unused = [p for p in RIGHT.get(name, {}) if not any(re.fullmatch(p, mutant) for mutant in found)]
    assert unused == [], "a mutant in RIGHT is not made any more"


def test_all_transitions_that_models_use_are_mutated() -> None:
    """The programs hold the transitions that this file means to break; each can be made wrong in three ways or more."""
    seen: dict[str, set[str]] = {}
    for name, degree in PROGRAMS[:5]:
        program = zoo.program(name, degree, layers=1)
        nodes = {n.name: n for n in program.graph.nodes}
        for mutant in mutants(program):
            transition = transition_of(nodes[mutant.node].target)
            seen.setdefault("constants" if transition is None else transition.name, set()).add(mutant.what)
    assert seen.keys() >= {"copy", "all_reduce", "gather", "copy_segments", "copy_all", "once", "constants"}
    assert seen.keys() <= {*TRANSITIONS, *STATISTICS, "constants"}
    assert min(map(len, seen.values())) >= 3


def test_a_gradient_that_only_one_rank_gets_wrong_is_caught() -> None:
    """Replicas are compared with one another, and every rank with the reference."""
    case, program = zoo.case("mlp"), zoo.program("mlp", 3)
    module, graph = copy_graph(program.graph_module)
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.gelu.default)
    factor: Any = PerRank((1.0, 1.0, 1.0 + 1e-6))
    with graph.inserting_after(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    report = verify_program(program.with_(graph_module=module), case.model, case.inputs)
    assert not report.ok
    assert 1e-10 < report.output_error < 1e-5
    assert report.mismatch is not None
    assert "all_reduce" in report.mismatch.splitlines()[0] or "linear" in report.mismatch.splitlines()[0]


# ------------------------------------------------------------------------------------------------------------ rules
Turn = Callable[[Sentence], Sentence]


def stronger(linear: Linear) -> Iterator[Linear]:
    """What an op would be linear in that is not."""
    if linear != "joint":
        yield "joint"
    if linear != "each":
        yield "each"


def exchanged(labels: Sequence[tuple[str | None, ...]]) -> tuple[tuple[str | None, ...], ...]:
    """The first two labels of the first of these with two change places."""
    at = next((i for i, x in enumerate(labels) if len(x) > 1), None)
    return tuple((x[1], x[0], *x[2:]) if i == at else x for i, x in enumerate(labels))


def turns(rule: Rule, sentences: Sequence[Sentence]) -> Iterator[tuple[str, Turn]]:
    """Facts of the row turned round; only what claims more than the row does, for less is not wrong."""
    for linear in dict.fromkeys(x for s in sentences for x in stronger(s.linear)):
        yield f"linear: {linear}", lambda s, linear=linear: replace(s, linear=linear)
    yield "sums what is not in the result", lambda s: replace(s, sums=True)
    yield "nothing must be whole", lambda s: replace(s, whole={})
    for label in dict.fromkeys(x for s in sentences for x in s.whole):
        yield (
            f"{label} need not be whole",
            lambda s, x=label: replace(s, whole={k: why for k, why in s.whole.items() if k != x}),
        )
    yield "labels of an operand exchanged", lambda s: replace(s, operands=exchanged(s.operands))
    yield "labels of a result exchanged", lambda s: replace(s, results=exchanged(s.results))
    yield "segments back to front", lambda s: replace(s, concats=tuple((x, parts[::-1]) for x, parts in s.concats))
    yield "factors back to front", lambda s: replace(s, products=tuple((a[::-1], b[::-1]) for a, b in s.products))
    for operand in range(max((len(s.operands) for s in sentences), default=0)):
        yield f"operand {operand} is only a reference", lambda s, o=operand: replace(s, references=s.references | {o})


def wrong_rules(rule: Rule, sentences: Sequence[Sentence]) -> Iterator[tuple[str, Rule]]:
    """Every mutant of a row that says something else of a sample than the row does."""
    for what, turn in turns(rule, sentences):
        if any(turn(s) != s for s in sentences):
            yield what, replace(rule, row=lambda call, turn=turn: turn(rule.sentence(call)))
    for name in ("localize", "kernel"):
        if getattr(rule, name) is not None:
            yield f"no {name}", replace(rule, **dict.fromkeys((name,)))  # type: ignore[arg-type]


def said(rule: Rule, samples: Sequence[Sample]) -> list[Sentence]:
    """What a row says of each sample that it takes."""
    found: list[Sentence] = []
    for sample in samples:
        try:
            found.append(Case(sample).sentence(rule))
        except ValueError:
            continue
    return found


def claims_more(rule: Rule, mutant: Rule, samples: Sequence[Sample]) -> bool:
    """Whether some operands that the row refuses, or places in another way, are accepted by the mutant."""
    for sample in samples:
        case = Case(sample)
        try:
            ours = case.sentence(rule)
        except ValueError:
            continue
        theirs = case.sentence(mutant)
        for mesh in (Mesh((degree,)) for degree in sample.degrees):
            for ins in assignments(case, mesh):
                for options in _options(ins, mesh):
                    found = solution(theirs, ins, mesh, options)
                    if found is not None and found != solution(ours, ins, mesh, options):
                        return True
    return False


def solution(sentence: Sentence, ins: Sequence[Placement], mesh: Mesh, options: Mapping[str, Any]) -> object:
    """What `solve` says, None if it refuses; the words of a reason do not count."""
    try:
        return replace(solve(sentence, ins, mesh, **options), reason="")
    except PlacementError:
        return None
    except Exception as error:  # noqa: BLE001  a sentence that does not hold together
        return repr(error)


DEPTHWISE = tuple(
    call(f"{name}d.{overload}", real(1, 4, *[2] * n), real(4, 1, *[1] * n), None, [1] * n, padding, *more)
    for name, n, overload, padding, more in [
        *(("conv1", 1, "padding", "valid", ([1], 4)),),
        *((f"conv{n}", n, o, p, ([1] * n, 4)) for n in (2, 3) for o, p in (("default", [0] * n), ("padding", "valid"))),
        *((f"conv_transpose{n}", n, "input", [0] * n, ([0] * n, 4)) for n in (2, 3)),
    ]
)
MORE: Sequence[Sample] = (
    *DEPTHWISE,
    *(call(f"{name}.Tensor", ints(2, 3, below=2), ints(3, below=2)) for name in ("ne", "not_equal")),
)
"""Calls that the samples of the table leave out; only here does a wrong row show."""

RIGHT_RULES: Mapping[str, str] = {
    r"((any|all)\.(dims|default)|(logical_not|is\w+)\.default|(where|fill)\.Scalar): operand 0 is only a reference": (
        "a result without a gradient, of an operand that is the same on all ranks"
    ),
    r"(isnan|isinf|isfinite|nan_to_num)\.default: linear.*": "of partial sums that are finite, as their sum is",
    r"(to|_to_copy|type_as)\.\w+: linear.*": "a cast is linear but for its rounding; all samples are fp64",
    r"(\w*avg_pool|upsample_\w+?)[12]d\.\w+: linear.*": "an average is linear: the row says less than is true",
    r"pad\.default: linear.*": "padding with zeros is linear: the row says less than is true",
    r"(complex|broadcast_tensors)\.default: linear: joint": "it is linear: the row says less than is true",
    r"xlogy\.Scalar_Other: linear.*": "it is linear: the row says less than is true",
    r"(fill\.Tensor|expand_as\.default): linear: joint": "of one operand only the shape is read, the other is copied",
    r"scaled_dot_product_attention\.default: e need not be whole": "a head's values may be cut: the row says less",
    r"batch_norm\.default: d1 need not be whole": "channels may be cut where no running statistics are written",
    r"amax\.default: no kernel": "only what has no gradient has its maximum taken on a cut: test_rules.py",
}
"""Mutants of rules that are not wrong, and why: a pattern of their names."""


def hunted_rules(found: Sequence[Rule]) -> Rate:
    """The rate of the mutants of these rows."""
    rate = Rate()
    for rule in found:
        samples = [replace(s, degrees=(2,)) for s in (*samples_of(rule.op), *MORE) if s.op == rule.op]
        for what, wrong in wrong_rules(rule, said(rule, samples)):
            name = f"{rule.op.removeprefix('aten.')}: {what}"
            reasons = [why for pattern, why in RIGHT_RULES.items() if re.fullmatch(pattern, name)]
            if check(wrong, samples, first_only=True).failures:
                assert not reasons, f"{name} is caught: it is no longer right"
                rate.caught += 1
            elif what not in ("no localize", "no kernel") and not claims_more(rule, wrong, samples):
                rate.right.setdefault("no operands are placed in another way", []).append(name)
            elif reasons:
                rate.right.setdefault(reasons[0], []).append(name)
            else:
                rate.survivors.append(name)
    return rate


def test_wrong_rules_are_caught(record_property: Callable[[str, object], None]) -> None:
    shown(hunted_rules(sampled(ROWS, 60)), record_property)


@pytest.mark.slow
def test_all_wrong_rules_are_caught(record_property: Callable[[str, object], None]) -> None:
    rate = hunted_rules(ROWS)
    shown(rate, record_property)
    unused = set(RIGHT_RULES.values()) - rate.right.keys()
    assert unused == set(), "a mutant in RIGHT_RULES is not made any more"


def test_a_rule_that_is_right_survives() -> None:
    """The control: the row itself, under another name for one of its labels, is not caught and changes nothing."""
    (rule,) = (r for r in ROWS if r.op == "aten.mm.default")
    samples = [replace(s, degrees=(2,)) for s in samples_of(rule.op)]
    renamed = Rule(rule.op, "a b, b c -> a c", "each", sums=True)
    assert not check(renamed, samples).failures
    assert not claims_more(rule, renamed, samples)
    assert claims_more(rule, replace(rule, row=lambda call: replace(rule.sentence(call), linear="joint")), samples)
