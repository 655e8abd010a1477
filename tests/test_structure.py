"""Index spaces by unification: what the ops of a model tie together, and what they must not.

Sizes tell index spaces apart: 4 heads (or 2 kv heads of 3 queries), 6 or 8 per head. Terms are written with a letter
for every atom, so that equal letters are one index space: ``[a*b|a*b|a*c]`` is a packed q, k, v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.compiler import rewrite_captured
from tpcompile.passes.canonicalize import canonicalize
from tpcompile.passes.structure import structure
from tpcompile.program import DEFAULT, Options, Program, Structure
from tpcompile.spec import Spec
from tpcompile.structure import (
    Atom,
    Cat,
    Prod,
    Term,
    Unifier,
    atoms,
    cat,
    factors,
    find,
    prod,
    segments,
    show,
    size,
)


def structure_of(model: nn.Module, *inputs: Tensor) -> Structure:
    captured = capture(model, inputs)
    found = structure(canonicalize(Program(captured, captured.graph_module, 2))).structure
    assert found is not None
    return found


class Names:
    """Letters for atoms in the order in which they are first shown; one position needs none."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}

    def __call__(self, term: Term) -> str:
        for atom in atoms(term):
            if atom.size > 1:
                self.names.setdefault(id(atom), chr(ord("a") + len(self.names)))
        return show(term, self.names)


def shown(found: Structure, *parameters: str) -> list[str]:
    """The dims of parameters, in one naming."""
    names = Names()
    return [" ".join(map(names, found.parameters[p])) for p in parameters]


def sizes(term: Term) -> str:
    return show(term, {})


def pins(term: Term) -> set[str]:
    return {pin.reason for atom in atoms(term) for pin in atom.pins}


# ---------------------------------------------------------------------------------------------- attention, packed


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """Self-attention on one projection of ``rows`` outputs, taken apart by ``unpack`` into q, k, v ``[b, h, s, d]``."""

    def __init__(self, rows: int, width: int, unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], out: int = 24):
        super().__init__()
        self.qkv = nn.Linear(width, rows)
        self.out = nn.Linear(out, width)
        self.unpack = unpack

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(*self.unpack(self.qkv(x))))


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Llama's repeat_kv."""
    b, kv, s, d = x.shape
    return x[:, :, None].expand(b, kv, times, s, d).reshape(b, kv * times, s, d)


def gpt2(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_heads(x, 4) for x in y.split(24, dim=-1))
    return q, k, v


def neox(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(y, 4).chunk(3, dim=-1)
    return q, k, v


def bloom(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = y.view(*y.shape[:-1], 4, 3, 6)
    q, k, v = (y[..., i, :].transpose(1, 2) for i in range(3))
    return q, k, v


def phi3(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = y[..., :36], y[..., 36:48], y[..., 48:]
    return _heads(q, 6), _repeated(_heads(k, 2), 3), _repeated(_heads(v, 2), 3)


def falcon(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per kv head its queries, then its key and its value."""
    y = y.view(*y.shape[:-1], 2, 5, 6)
    q, k, v = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
    k, v = (torch.broadcast_to(x, q.shape) for x in (k, v))
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))
    return q, k, v


@pytest.mark.parametrize(
    ("unpack", "rows", "inner", "weight", "out"),
    [
        (gpt2, 72, 24, "[a*b|a*b|a*c] d", "e a*c"),  # a: heads; q and k share the head dim, v has its own
        (neox, 72, 24, "a*[b|b|c] d", "e a*c"),
        (bloom, 72, 24, "a*[1|1|1]*b c", "d a*b"),  # one head dim, of which q, k and v are three rows
        (phi3, 60, 36, "[a*b*c|a*c|a*d] e", "f a*b*d"),  # a: kv heads, b: queries of one
        (falcon, 60, 36, "a*[b|1|1]*c d", "e a*b*c"),
    ],
)
def test_packed_projections(
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], rows: int, inner: int, weight: str, out: str
) -> None:
    found = structure_of(Packed(rows, 20, unpack, inner), torch.randn(2, 5, 20))
    assert shown(found, "qkv.weight", "out.weight") == [weight, out]
    assert shown(found, "qkv.weight", "qkv.bias")[1] == weight.rpartition(" ")[0], "the bias lies along the rows"


def test_multihead_attention_of_torch() -> None:
    model = nn.MultiheadAttention(24, 4, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    found = structure_of(SelfAttention(), torch.randn(2, 5, 24))
    assert shown(found, "attention.in_proj_weight", "attention.out_proj.weight") == ["[1|1|1]*a*b c", "d a*b"]


class Llama(nn.Module):
    """Grouped-query attention: 2 kv heads of 3 queries each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(20, 36), nn.Linear(20, 12), nn.Linear(20, 12)
        self.o = nn.Linear(36, 20)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.q(x), 6), _heads(self.k(x), 2), _heads(self.v(x), 2)
        return self.o(attend(q, _repeated(k, 3), _repeated(v, 3)))


def test_the_query_rows_of_grouped_attention_learn_their_kv_heads() -> None:
    """From k's expand, at the attention; the q projection itself knows of 6 heads only."""
    found = structure_of(Llama(), torch.randn(2, 5, 20))
    assert shown(found, "q.weight", "k.weight", "v.weight", "o.weight") == ["a*b*c d", "a*c d", "a*e d", "f a*b*e"]


def test_grouped_attention_inside_the_kernel() -> None:
    class Grouped(Llama):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = _heads(self.q(x), 6), _heads(self.k(x), 2), _heads(self.v(x), 2)
            return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    found = structure_of(Grouped(), torch.randn(2, 5, 20))
    assert shown(found, "q.weight", "k.weight", "o.weight") == ["a*b*c d", "a*c d", "e a*b*f"]


# ---------------------------------------------------------------------------------------------- feed-forward


class Gated(nn.Module):
    def __init__(self, half: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 20), nn.Linear(10, 8)
        self.halves = half

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.halves(self.gate_up(x))
        return x + self.down(F.silu(gate) * up)


@pytest.mark.parametrize(
    ("half", "rows"),
    [
        (lambda y: y.chunk(2, -1), "[a|a]"),
        (lambda y: (y[..., :10], y[..., 10:]), "[a|a]"),
        (lambda y: y.unflatten(-1, (2, 10)).unbind(-2), "b*a"),
        (lambda y: (y[..., ::2], y[..., 1::2]), "a*b"),  # GPT-OSS interleaves: every pair is one unit of the inner axis
    ],
)
def test_gate_and_up(half: Callable[[Tensor], tuple[Tensor, Tensor]], rows: str) -> None:
    found = structure_of(Gated(half), torch.randn(2, 5, 8))
    down, gate_up = shown(found, "down.weight", "gate_up.weight")
    names = Names()
    inner, hidden = names(found.parameters["down.weight"][1]), names(found.parameters["gate_up.weight"][0])
    assert inner == "a"
    assert hidden == rows
    assert down.split()[0] == gate_up.split()[-1], "the residual ties what is read to what is written"


def test_tied_weights_are_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    found = structure_of(Tied(), torch.tensor([[1, 2]]))
    assert list(found.parameters) == ["embedding.weight"]
    assert shown(found, "embedding.weight") == ["a b"]


# ---------------------------------------------------------------------------------------------- what must not be tied


def test_slices_of_what_no_parameter_carries_do_not_cut_it_up() -> None:
    """A label shift or the first position of position_ids must not cut the sequence into [1|s-1]."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.linear(x)
            return (y[:, 1:] * ids[:, :-1, None]).sum() + (ids[:, :1] * 2).sum()

    found = structure_of(Shifted(), torch.randn(2, 7, 4), torch.ones(2, 7))
    sequence = found.values["x"][0][1]
    assert isinstance(find(sequence), Atom)
    assert pins(sequence) == {"a slice or concatenation takes part of it"}


def test_a_dim_of_one_position_beside_a_longer_one_is_broadcast() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.each = nn.Parameter(torch.ones(1, 6)), nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale * self.each

    found = structure_of(Scaled(), torch.randn(4, 6))
    rows, columns = found.values["x"][0]
    names = Names()
    assert [names(rows), names(columns)] == ["a", "b"]
    assert [" ".join(map(names, found.parameters[p])) for p in ("scale", "each")] == ["1 b", "a 1"]


def test_an_op_without_a_rule_pins_what_it_reads() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.pinv(self.linear(x))

    found = structure_of(Odd(), torch.randn(5, 4))
    assert pins(found.parameters["linear.weight"][0]) == {"aten.linalg_pinv.atol_rtol_tensor has no rule"}
    assert not pins(found.parameters["linear.weight"][1])


def test_a_matrix_added_to_its_transpose_ties_its_two_dims() -> None:
    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight + self.weight.T)

    assert shown(structure_of(Symmetric(), torch.randn(2, 6)), "weight") == ["a a"]


def test_whole_axes_are_pinned_with_their_reason() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).softmax(-1)

    found = structure_of(Normed(), torch.randn(2, 6))
    assert pins(found.parameters["norm.weight"][0]) == {
        "a norm takes its mean over the whole axis",
        "softmax runs over the whole axis",
    }


# ---------------------------------------------------------------------------------------------- the unifier itself


@pytest.fixture
def unifier() -> Unifier:
    found = Unifier()
    graph = torch.fx.Graph()
    found.node = graph.placeholder("here")
    return found


def test_terms_are_kept_flat() -> None:
    a, b, c = Atom(2), Atom(3), Atom(1)
    assert prod([a, prod([b, c]), c]) == prod([prod([a]), b]) or factors(prod([a, prod([b, c]), c])) == [a, b]
    assert prod([c, a]) is a
    assert size(prod([])) == 1
    assert segments(cat([cat([a, Atom(0)]), b])) == [a, b]
    assert cat([a, Atom(0)]) is a
    assert size(cat([])) == 0
    assert size(Prod((a, Cat((a, b))))) == 10


def test_products_are_matched_from_the_right(unifier: Unifier) -> None:
    rows, heads, dim = Atom(24), Atom(4), Atom(6)
    unifier.unify_products([rows], [heads, dim])
    assert factors(rows) == [heads, dim]
    other = [Atom(2), Atom(12)]
    unifier.unify_products([rows], other)
    assert [sizes(t) for t in (heads, dim, *other)] == ["2*2", "6", "2", "2*6"]


def test_segments_are_matched_from_the_left(unifier: Unifier) -> None:
    whole, parts = Atom(10), [Atom(4), Atom(6)]
    unifier.unify_segments(whole, parts)
    assert segments(whole) == parts
    again = [Atom(4), Atom(2), Atom(4)]
    unifier.unify_segments(whole, again)
    assert sizes(whole) == "[4|2|4]"
    assert segments(parts[1]) == again[1:]


def test_a_common_minor_factor_of_all_segments(unifier: Unifier) -> None:
    packed, dim = cat([Atom(12), Atom(4), Atom(4)]), Atom(2)
    units = Atom(10)
    unifier.unify_products([packed], [units, dim])
    assert all(factors(s)[-1] is dim for s in segments(packed))
    assert sizes(units) == "[6|2|2]"


def test_equal_pieces_of_a_product(unifier: Unifier) -> None:
    heads, rows = Atom(6), Prod((Atom(6), Atom(4)))
    unifier.unify(rows.factors[0], heads)
    unifier.unify_segments(rows, [Atom(16), Atom(8)])
    assert sizes(heads) == "[4|2]"


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        ([6], [4], "a reshape mixes its positions with those of another dim"),
        ([2, 6], [3, 4], "a reshape mixes its positions with those of another dim"),
        ([4], [2], "a reshape leaves it without a counterpart"),
    ],
)
def test_what_does_not_fit_is_pinned(unifier: Unifier, left: list[int], right: list[int], reason: str) -> None:
    xs, ys = [Atom(n) for n in left], [Atom(n) for n in right]
    unifier.unify_products(xs, ys)
    assert reason in {r for t in (*xs, *ys) for r in pins(t)}


def test_unequal_sizes_are_pinned(unifier: Unifier) -> None:
    a, b = Atom(3), Atom(4)
    unifier.unify(a, b)
    assert pins(a) == pins(b) == {"sizes 3 and 4 meet here"}


def test_overlapping_segments_are_pinned(unifier: Unifier) -> None:
    xs = [Prod((Atom(2), Atom(3))), Atom(4)]
    unifier.unify_segments(cat([Atom(4), Atom(6)]), xs)
    assert any("segments of" in reason and "overlap" in reason for t in xs for reason in pins(t))


def test_segments_without_a_common_factor_are_pinned(unifier: Unifier) -> None:
    packed = cat([Atom(3), Atom(5)])
    unifier.unify_products([packed], [Atom(4), Atom(2)])
    assert pins(packed)


def test_an_index_space_cannot_contain_itself(unifier: Unifier) -> None:
    a = Atom(4)
    unifier.unify(a, Cat((a, Atom(0))))
    assert find(a) is a
    assert not pins(a) or pins(a) == {"the index space would contain itself"}
    b = Atom(4)
    unifier.unify(b, Prod((Cat((b,)),)))
    assert find(b) is b, "bound to itself it would never be found"


def test_pins_and_ties_stay_with_what_an_atom_becomes(unifier: Unifier) -> None:
    rows, heads, dim = Atom(24, from_parameter=True), Atom(4), Atom(6)
    unifier.pin(rows, "before")
    unifier.unify_products([rows], [heads, dim])
    assert pins(heads) == pins(dim) == {"before"}
    assert heads.from_parameter
    assert dim.from_parameter
    unifier.pin(rows, "after")
    assert pins(heads) == {"before", "after"}


def test_unification_is_symmetric(unifier: Unifier) -> None:
    def tied(swap: bool) -> str:
        rows, heads, dim, major, minor = (Atom(n) for n in (24, 4, 6, 2, 12))
        pairs: list[tuple[Any, Any]] = [([rows], [heads, dim]), ([rows], [major, minor])]
        for left, right in pairs:
            unifier.unify_products(*((right, left) if swap else (left, right)))
        names = Names()
        return " ".join(map(names, (rows, heads, dim, major, minor)))

    assert tied(False) == tied(True)


@pytest.mark.parametrize("name", ["llama_few_kv", "gpt2"])
def test_other_degrees_specs_and_options_leave_what_they_share_alone(name: str) -> None:
    """The first passes run once for a captured model; no program tells whether others were made of it before."""
    case = zoo.case(name)
    captured = capture(case.model, (), case.inputs)

    def text(degree: int, spec: Spec | None = case.spec, options: Options = DEFAULT) -> str:
        inputs = ((), case.inputs)
        return rewrite_captured(captured, spec, case.model, degree, inputs, options=options).text()

    alone = text(2)
    others = [text(4), text(3, None), text(2, options=Options(sequence_parallel=True))]
    assert alone not in others
    assert text(2) == alone
