"""The .tpspec language: grammar, resolution, every error message, and the shipped specs on every class they name."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources.abc import Traversable
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import transformers
from goldens import FOLDER, Golden
from hypothesis import find, given, settings
from torch import nn

from tpcompile.errors import SpecError
from tpcompile.spec import WORDS, Claim, Line, Pattern, Spec, find_shipped, resolve, shipped

# --- models, as resolve() sees them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """A model's names, and its config."""

    modules: Mapping[str, str]
    parameters: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    config: object | None = None

    def resolve(self, spec: Spec | str) -> tuple[Claim, ...]:
        spec = Spec.parse(spec, "llama.tpspec") if isinstance(spec, str) else spec
        return resolve(spec, self.modules, self.parameters, self.aliases, self.config)


def names_of(model: nn.Module) -> Names:
    modules = {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    aliases |= {name: name for name, _ in model.named_buffers()}
    return Names(modules, tuple(canonical.values()), aliases, getattr(model, "config", None))


def llama(tied: bool = False, layers: int = 3) -> Names:
    """A Llama with embeddings, attention and MLP, by name alone."""
    modules = {"": "LlamaForCausalLM", "model": "LlamaModel", "model.embed_tokens": "Embedding"}
    modules["model.layers"] = "ModuleList"
    for layer in (f"model.layers.{i}" for i in range(layers)):
        modules |= {layer: "LlamaDecoderLayer", f"{layer}.self_attn": "LlamaAttention"}
        modules |= {f"{layer}.self_attn.{name}_proj": "Linear" for name in "qkvo"}
        modules[f"{layer}.mlp"] = "LlamaMLP"
        modules |= {f"{layer}.mlp.{name}_proj": "Linear" for name in ("gate", "up", "down")}
        modules |= {f"{layer}.mlp.act_fn": "SiLU", f"{layer}.input_layernorm": "LlamaRMSNorm"}
    modules |= {"model.norm": "LlamaRMSNorm", "lm_head": "Linear"}
    leaves = {"Embedding", "Linear", "LlamaRMSNorm"}
    weights = [f"{path}.weight" for path, kind in modules.items() if kind in leaves]
    aliases = {name: name for name in weights} | {"model.rotary.inv_freq": "model.rotary.inv_freq"}
    if tied:
        weights.remove("lm_head.weight")
        aliases["lm_head.weight"] = "model.embed_tokens.weight"
    return Names(
        modules, tuple(weights), aliases, SimpleNamespace(num_key_value_heads=2, num_attention_heads=4, scale=0.5)
    )


def starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


# --- the grammar -----------------------------------------------------------------------------------------------------


def test_the_tree_of_a_spec() -> None:
    spec = Spec.parse(
        "# a comment\n"
        "for LlamaModel LlamaForCausalLM  # another\r\n"
        "\n"
        "\t**.{q, k , v}_proj ?m.*_ln\tcolumn by config.num_heads# no blank needed\n"
        "  lm_head.weight  vocab by 8",
    )
    assert spec.classes == ("LlamaModel", "LlamaForCausalLM")
    first, second = spec.lines
    assert [p.components for p in first.patterns] == [
        ((("**",),), (("q", "k", "v"), ("_proj",))),
        ((("m",),), (("*_ln",),)),
    ]
    assert [p.optional for p in first.patterns] == [False, True]
    assert (first.word, first.by) == ("column", "config.num_heads")
    assert (str(second), second.word, second.by) == ("lm_head.weight  vocab by 8", "vocab", 8)
    assert spec.text() == (
        "for LlamaModel LlamaForCausalLM\n"
        "\n"
        "**.{q,k,v}_proj ?m.*_ln  column by config.num_heads\n"
        "lm_head.weight           vocab by 8\n"
    )


@pytest.mark.parametrize("text", ["", "\n", "  ", "# only a comment", "\t# c\r\n\r\n", "for A\n"])
def test_a_spec_may_be_empty(text: str) -> None:
    assert Spec.parse(text).lines == ()


def test_reserved_words_are_reserved_only_in_their_place() -> None:
    spec = Spec.parse("for.x.by by by.config column\nby x.for for\n")
    assert [str(line) for line in spec.lines] == ["for.x.by by by.config  column", "by x.for  for"]


def text_of(letters: str, least: int = 1) -> st.SearchStrategy[str]:
    return st.text(letters, min_size=least, max_size=3)


def canonical(pieces: list[tuple[str, ...]]) -> bool:
    """Whether this is how a parser would cut a component: no plain pieces touch, no choice of alternatives has `**`."""
    plain = all(len(a) > 1 or len(b) > 1 for a, b in itertools.pairwise(pieces))
    return plain and not any("**" in "".join(choice) for choice in itertools.product(*pieces))


GLOB = text_of("ab_1*-")
PIECE = st.one_of(st.tuples(GLOB), st.lists(GLOB, min_size=2, max_size=3).map(tuple))
COMPONENT = st.one_of(st.just((("**",),)), st.lists(PIECE, min_size=1, max_size=3).filter(canonical).map(tuple))
PATTERN = st.builds(Pattern, st.lists(COMPONENT, min_size=1, max_size=4).map(tuple), st.booleans())
ATTRIBUTE = st.lists(text_of("ab_"), min_size=1, max_size=2).map(lambda names: ".".join(["config", *names]))
BY = st.one_of(st.none(), st.integers(1, 10**18 - 1), ATTRIBUTE)
LINE = st.builds(Line, st.lists(PATTERN, min_size=1, max_size=3).map(tuple), text_of("ab_-"), BY)
SPEC = st.builds(
    Spec,
    st.lists(text_of("ABé_"), unique=True, max_size=60).map(tuple),
    st.lists(LINE, max_size=4).map(tuple),
)


@given(SPEC)
@settings(deadline=None)
def test_text_round_trips(spec: Spec) -> None:
    assert Spec.parse(spec.text()) == spec


@given(
    SPEC, st.lists(st.sampled_from(["# a.{b column", " \t", "", "\t# for X"]), min_size=1, max_size=3), st.booleans()
)
@settings(deadline=None)
def test_comments_and_layout_mean_nothing(spec: Spec, noise: list[str], dos: bool) -> None:
    filler = itertools.cycle(noise)
    rows = [
        row
        for line in spec.text().splitlines()
        for row in (next(filler), "  " + line.replace("  ", "\t ") + next(filler))
    ]
    assert Spec.parse(("\r\n" if dos else "\n").join(rows)) == spec


def test_trees_that_differ_are_not_equal() -> None:
    """Negative control of the two tests above: equality ignores places and nothing else."""
    spec = Spec.parse("for A\na.{b,c} ?d column by 2")
    others = ["for B\na.{b,c} ?d column by 2", "for A\na.{c,b} ?d column by 2", "for A\na.{b,c} d column by 2"]
    others += ["for A\na.{b,c} ?d row by 2", "for A\na.{b,c} ?d column by 3", "for A\na.{b,c} ?d column"]
    assert all(Spec.parse(other) != spec for other in others)
    assert Spec.parse("\n\nfor A # x\n\n a.{b,c}   ?d  column by 2", "elsewhere") == spec


@given(SPEC)
@settings(deadline=None)
def test_places_point_at_what_they_name(spec: Spec) -> None:
    for line in Spec.parse(spec.text()).lines:
        marked = [(p.where, str(p)) for p in line.patterns] + [(line.word_where, line.word)]
        marked += [(line.by_where, str(line.by))] if line.by is not None else []
        for where, text in marked:
            assert where.text is not None
            assert where.column is not None
            assert where.text[where.column - 1 :][: where.width] == text
            assert where.text == spec.text().splitlines()[(where.line or 0) - 1]


@given(st.text("ab.*?{,} #\n\tforby12:é\x00\u2028", max_size=40))
@settings(deadline=None, max_examples=500)
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    try:
        spec = Spec.parse(text)
    except SpecError as error:
        where, help = error.where, error.help
    else:
        assert Spec.parse(spec.text()) == spec
        return
    assert help
    assert where is not None
    assert where.line is not None
    assert where.column is not None
    rows = text.split("\n")
    assert 1 <= where.line <= len(rows)
    assert 1 <= where.column <= len(rows[where.line - 1]) + 1


# --- globs -----------------------------------------------------------------------------------------------------------


def reference_match(glob: str, name: str) -> bool:
    """The meaning of a glob, by its definition and without regular expressions on dotted names."""
    if (brace := re.search(r"\{([^{}]*)\}", glob)) is not None:
        start, end = brace.span()
        return any(reference_match(glob[:start] + each + glob[end:], name) for each in brace[1].split(","))

    def fits(components: list[str], names: list[str]) -> bool:
        if not components:
            return not names
        if components[0] == "**":
            return any(fits(components[1:], names[i:]) for i in range(len(names) + 1))
        return bool(names) and fnmatch.fnmatchcase(names[0], components[0]) and fits(components[1:], names[1:])

    return fits(glob.split("."), name.split(".") if name else [])


NAME = st.lists(text_of("ab_1"), max_size=5).map(".".join)


@given(PATTERN, NAME)
@settings(deadline=None, max_examples=1000)
def test_globs_match_what_their_definition_says(pattern: Pattern, name: str) -> None:
    assert pattern.matches(name) == reference_match(pattern.glob, name)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda glob, name: re.fullmatch(re.escape(glob).replace(r"\*", ".*"), name) is not None,  # `*` crosses dots
        lambda glob, name: reference_match(glob.replace("**", "*"), name),  # `**` is one component
        lambda glob, name: reference_match(glob.replace("**", "*.**"), name),  # `**` is one component or more
        lambda glob, name: reference_match(glob, name.lstrip("a")),
    ],
)
def test_a_wrong_matcher_is_told_apart(wrong: Callable[[str, str], bool]) -> None:
    """Negative control of the test above: its inputs hold a counterexample to every wrong reading of a glob."""
    find(
        st.tuples(PATTERN, NAME),
        lambda case: wrong(case[0].glob, case[1]) != reference_match(case[0].glob, case[1]),
        settings=settings(max_examples=20_000, derandomize=True),  # few of the inputs are one
    )


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("a.*.c", ["a.b.c", "a.0.c"], ["a.c", "a.b.b.c", "xa.b.c"]),
        ("**.c", ["c", "a.c", "a.b.c"], ["a.bc", "c.a", ""]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a", ""]),
        ("a.**.c", ["a.c", "a.b.c", "a.b.b.c"], ["a", "c", "ac"]),
        ("**", ["", "a", "a.b"], []),
        ("*_ln", ["a_ln", "_ln"], ["a_ln.b", "b.a_ln", "a_lnx"]),
        ("{q,k}_{a,b}", ["q_a", "k_b"], ["q_", "qk_a"]),
        ("a+b.c", ["a+b.c"], ["aab.c", "a+bxc"]),
    ],
)
def test_globs(glob: str, yes: list[str], no: list[str]) -> None:
    if "+" in glob:  # no name that a spec can write, but a regular expression would read it
        pattern = Pattern(((("a+b",),), (("c",),)))
    else:
        pattern = Spec.parse(f"{glob} row").lines[0].patterns[0]
    assert [name for name in yes + no if pattern.matches(name)] == yes


# --- resolution ------------------------------------------------------------------------------------------------------

LLAMA = """\
for LlamaForCausalLM
model.layers.*.self_attn.{q,k,v}_proj   column by config.num_key_value_heads
model.layers.*.self_attn.o_proj         row
model.layers.*.mlp.{gate,up}_proj       column by 8
model.layers.*.mlp.down_proj            row
model.embed_tokens                      vocab
lm_head                                 vocab
model.norm  model.layers.*.*_layernorm  sequence
"""


def test_claims() -> None:
    claims = llama().resolve(LLAMA)
    found = {(starred(claim.name), claim.word, claim.by) for claim in claims}
    layer = "model.layers.*"
    assert found == {
        *((f"{layer}.self_attn.{name}_proj.weight", "column", 2) for name in "qkv"),
        (f"{layer}.self_attn.o_proj.weight", "row", None),
        *((f"{layer}.mlp.{name}_proj.weight", "column", 8) for name in ("gate", "up")),
        (f"{layer}.mlp.down_proj.weight", "row", None),
        (f"{layer}.input_layernorm.weight", "sequence", None),
        ("model.embed_tokens.weight", "vocab", None),
        ("lm_head.weight", "vocab", None),
        ("model.norm.weight", "sequence", None),
    }
    assert [claim.parameter for claim in claims] == list(llama().parameters)
    assert all(claim.name == f"{claim.module}.weight" == claim.parameter for claim in claims)
    assert all(claim.word == claim.line.word for claim in claims)


@given(st.permutations(LLAMA.splitlines()))
@settings(deadline=None, max_examples=20)
def test_the_order_of_lines_means_nothing(lines: list[str]) -> None:
    assert llama().resolve("\n".join(lines)) == llama().resolve(LLAMA)


def test_a_module_claims_its_own_parameters_and_a_parameter_itself() -> None:
    names = names_of(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 8)}))
    claims = names.resolve("attn column\nattn.out_proj.weight row\nup.* replicate")
    assert [(claim.parameter, claim.module, claim.word) for claim in claims] == [
        ("attn.in_proj_weight", "attn", "column"),
        ("attn.in_proj_bias", "attn", "column"),
        ("attn.out_proj.weight", "attn.out_proj", "row"),
        ("up.weight", "up", "replicate"),
        ("up.bias", "up", "replicate"),
    ]


def test_a_parameter_of_the_root() -> None:
    assert [(claim.name, claim.module) for claim in names_of(nn.Linear(2, 2)).resolve("weight column")] == [
        ("weight", "")
    ]
    assert [claim.name for claim in names_of(nn.Linear(2, 2)).resolve("** column")] == ["weight", "bias"]


def test_tied_names_that_agree_are_two_claims_of_one_parameter() -> None:
    claims = llama(tied=True).resolve("lm_head vocab\nmodel.embed_tokens vocab")
    assert [(claim.parameter, claim.name, claim.module) for claim in claims] == [
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "model.embed_tokens"),
        ("model.embed_tokens.weight", "lm_head.weight", "lm_head"),
    ]
    only = llama(tied=True).resolve("lm_head vocab")
    assert [(claim.parameter, claim.name) for claim in only] == [("model.embed_tokens.weight", "lm_head.weight")]


def test_an_optional_pattern_may_match_nothing_and_claims_what_it_matches() -> None:
    claims = llama().resolve("?nothing.{like,this} ?model.layers ?lm_head vocab")
    assert [claim.name for claim in claims] == ["lm_head.weight"]


def test_one_line_may_claim_a_parameter_through_two_patterns() -> None:
    assert [claim.name for claim in llama().resolve("lm_head **.lm_head lm_head.weight vocab")] == ["lm_head.weight"]


def test_buffers_are_not_claimed() -> None:
    names = llama()
    assert "model.rotary.inv_freq" in names.aliases
    assert {claim.name for claim in names.resolve("** replicate")} == set(names.parameters)


# --- errors: one golden file each ------------------------------------------------------------------------------------

UP = "model.layers.*.mlp.up_proj"

SYNTAX_ERRORS = {
    "no_word": "for A\n\nmodel.layers.*.mlp.up_proj\n",
    "no_word_after_pattern": "model.embed_tokens model.norm   # two patterns\n",
    "no_word_but_a_glob": "model.embed_tokens *_norm\n",
    "word_first": "column model.embed_tokens model.norm\n",
    "two_dots": "model..embed_tokens vocab\n",
    "ends_with_a_dot": "model. vocab\n",
    "dot_in_braces": "model.{layers.up,norm} vocab\n",
    "brace_not_closed": "model.{q,k column\n",
    "brace_in_braces": "model.{q,{k,v}}_proj column\n",
    "empty_alternative": "model.{q,}_proj column\n",
    "one_alternative": "model.{q}_proj column\n",
    "brace_not_opened": "model.q}_proj column\n",
    "any_depth_beside_a_name": "model.**proj column\n",
    "any_depth_after_a_name": "model.layers** column\n",
    "optional_after_name": "lm_head? vocab\n",
    "character": "model.embed_tokens: vocab\n",
    "character_not_printable": "model.embed_tokens\x00 vocab\n",
    "comma": "model.embed_tokens, lm_head vocab\n",
    "by_nothing": f"{UP} column by  # how many?\n",
    "by_name": f"{UP} column by num_heads\n",
    "word_first_and_a_glob": "column *_proj  # q, k, v\n",
    "by_zero": f"{UP} column by 0\n",
    "by_two": f"{UP}\tcolumn by 2 4\n",
    "for_nothing": "for # whom?\nlm_head vocab\n",
    "for_number": "for 3\n",
    "for_commas": "for LlamaModel, LlamaForCausalLM\n",
    "class_twice": "for LlamaModel LlamaForCausalLM\nlm_head vocab\nfor GemmaModel LlamaModel\n",
}


@pytest.mark.parametrize("name", SYNTAX_ERRORS)
def test_syntax_errors(name: str, golden: Golden) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.parse(SYNTAX_ERRORS[name], "llama.tpspec")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    golden(f"spec_error_{name}", str(caught.value))


RESOLUTION_ERRORS = {
    "unknown_word": f"model.embed_tokens vocab\n{UP} colum\n",
    "unknown_word_far": f"{UP} megatron\n",
    "unknown_word_is_a_module": "model.embed_tokens lm_head\n",
    "matches_nothing": "model.layers.*.self_atn.q_proj column\n",
    "matches_nothing_alternative": "lm_head model.layers.*.self_attn.{q,k,vv}_proj column\n",
    "matches_nothing_all_alternatives": "model.layers.*.attn.{q,k,v}_proj column\n",
    "matches_nothing_other_prefix": "layers.*.mlp.up_proj column\n",
    "matches_nothing_far": "encoder.block.*.wq column\n",
    "matches_nothing_in_leaf": "lm_head.weight.data vocab\n",
    "matches_nothing_at_any_depth": "**.query column\n",
    "matches_nothing_number": "model.layers.7.mlp.up_proj column\n",
    "no_parameters": "model.layers.*.mlp row\n",
    "no_parameters_alternative": "model.layers.*.{mlp,input_layernorm} row\n",
    "no_parameters_deep": "model.layers row\n",
    "no_parameters_at_all": "model.layers.*.mlp.act_fn column\n",
    "overlap": f"{UP} column\n**.mlp.{{up,down}}_proj row\n",
    "overlap_same_word": "model.embed_tokens vocab\nlm_head model.embed_tokens.weight vocab\n",
    "by_missing": f"{UP} column by config.num_kv_heads\n",
    "by_missing_far": f"{UP} column by config.groups\n",
    "by_not_a_count": f"{UP} column by config.scale\n",
}
TIE_ERRORS = {
    "tied": "model.embed_tokens vocab\nlm_head column\n",
    "tied_by": "model.embed_tokens vocab\nlm_head vocab by 4\n",
}


@pytest.mark.parametrize("name", RESOLUTION_ERRORS)
def test_resolution_errors(name: str, golden: Golden) -> None:
    with pytest.raises(SpecError) as caught:
        llama().resolve(RESOLUTION_ERRORS[name])
    golden(f"spec_error_{name}", str(caught.value))


@pytest.mark.parametrize("name", TIE_ERRORS)
def test_tie_errors(name: str, golden: Golden) -> None:
    with pytest.raises(SpecError) as caught:
        llama(tied=True).resolve(TIE_ERRORS[name])
    golden(f"spec_error_{name}", str(caught.value))
    if name == "tied":
        assert llama(tied=False).resolve(TIE_ERRORS[name])


def test_by_without_a_config(golden: Golden) -> None:
    with pytest.raises(SpecError) as caught:
        replace(llama(), config=None).resolve(f"{UP} column by config.num_heads")
    golden("spec_error_by_no_config", str(caught.value))


def missing(path: Path) -> str:
    (path / "specs").mkdir()
    (path / "specs/llama.tpspec").touch()
    (path / "specs/gpt2.tpspec").touch()
    return "specs/lama.tpspec"


def no_neighbour(path: Path) -> str:
    return "lama.tpspec"


def no_directory(path: Path) -> str:
    return "nowhere/lama.tpspec"


def directory(path: Path) -> str:
    missing(path)
    return "specs"


def not_text(path: Path) -> str:
    (path / "model.tpspec").write_bytes(b"lm_head\xff vocab")
    return "model.tpspec"


@pytest.mark.parametrize(
    "make", [missing, no_neighbour, no_directory, directory, not_text], ids=lambda make: make.__name__
)
def test_file_errors(
    make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        Spec.load(make(tmp_path))
    golden(f"spec_error_file_{make.__name__}", str(caught.value))


def test_a_file_is_read_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tpspec"
    path.write_bytes("\ufefffor A\r\nlm_head vocab\r\n".encode())
    spec = Spec.load(path)
    assert spec == Spec.parse("for A\nlm_head vocab")
    assert spec.filename == str(path)
    assert spec.lines[0].where.file == str(path)


def test_no_shipped_spec(golden: Golden) -> None:
    with pytest.raises(SpecError) as caught:
        find_shipped(["LlamaForSequenceClassification", "LlamaPreTrainedModel", "Module", "object"])
    golden("spec_error_no_shipped_spec", str(caught.value))
    with pytest.raises(SpecError) as caught:
        find_shipped(["Zebra", "Module"])
    assert "may be a start" not in str(caught.value)


# --- the shipped specs, on every class they name ---------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(8, 24)
        self.c_proj = nn.Linear(8, 8)


class NanoMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(8, 32)
        self.c_proj = nn.Linear(32, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(8)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(8)
        self.mlp = NanoMLP()


class GPT(nn.Module):
    """nanoGPT's names and its tie."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList([Block(), Block()])
        parts = {"wte": nn.Embedding(96, 8), "wpe": nn.Embedding(16, 8), "h": blocks, "ln_f": nn.LayerNorm(8)}
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(8, 96, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KV = TINY | {"num_key_value_heads": 2, "head_dim": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# The arguments of a config, and further variants of it whose modules have other names.
CONFIGS: Mapping[str, Sequence[Mapping[str, object]]] = {
    "GPT2Config": [TINY],
    "LlamaConfig": [KV, KV | {"attention_bias": True, "tie_word_embeddings": True}],
    "MistralConfig": [KV],
    "GraniteConfig": [KV],
    "SmolLM3Config": [KV],
    "Qwen2Config": [KV],
    "Qwen3Config": [KV],
    "GemmaConfig": [KV],
    "Gemma2Config": [KV],
    "Gemma3TextConfig": [KV],
    "PhiConfig": [TINY, TINY | {"qk_layernorm": True}],
    "Phi3Config": [KV],
    "GPTNeoXConfig": [TINY],
    "GPTJConfig": [TINY | {"rotary_dim": 4}],
    "FalconConfig": [
        TINY,
        TINY | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        TINY | {"parallel_attn": False, "multi_query": False, "alibi": True},
    ],
    "BloomConfig": [TINY],
    "OPTConfig": [
        TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        TINY | {"ffn_dim": 64, "word_embed_proj_dim": 16},
        TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ],
    "BertConfig": [TINY, TINY | {"is_decoder": True, "add_cross_attention": True}],
    "ViTConfig": [VIT | {"image_size": 16, "patch_size": 8}],
    "T5Config": [T5, T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}],
}


def tiny_models(name: str) -> list[nn.Module]:
    """Models of the class called `name`, one per variant of its config, without memory for weights."""
    with torch.device("meta"):
        if name == "GPT":
            return [GPT()]
        if name == "TransformerEncoder":
            return [transformer_encoder()]
        cls: type[transformers.PreTrainedModel] = getattr(transformers, name)
        config = cls.config_class
        assert config is not None
        return [cls(config.from_dict(dict(arguments))) for arguments in CONFIGS[config.__name__]]


@pytest.mark.parametrize("name", list(shipped()))
def test_a_shipped_spec_resolves_on_every_class_it_names(name: str) -> None:
    for model in tiny_models(name):
        spec = find_shipped([cls.__name__ for cls in type(model).__mro__])
        assert name in spec.classes
        names = names_of(model)
        claims = names.resolve(spec)
        # Inside a layer every matrix is claimed: what is not is replicated, and would be so silently.
        claimed = {claim.parameter for claim in claims}
        matrices = [n for n, p in model.named_parameters() if p.dim() > 1 and re.search(r"\.(h|layers?|block)\.\d", n)]
        assert [n for n in matrices if n not in claimed and "relative_attention_bias" not in n] == []
        # Linears are cut, norms are not.
        for claim in claims:
            is_norm = "norm" in names.modules[claim.module].lower()
            assert (claim.word == "sequence") == is_norm, claim


@pytest.mark.parametrize("file", dict.fromkeys(shipped().values()), ids=lambda file: file.name)
def test_what_a_shipped_spec_claims(file: Traversable, golden: Golden) -> None:
    """The plan of all classes of a spec together, for a person to read; and each of its patterns is of use."""
    spec = Spec.parse(file.read_text(), file.name)
    rows: dict[tuple[str, str], set[str]] = {}
    unused = {pattern for line in spec.lines for pattern in line.patterns}
    for name in spec.classes:
        for model in tiny_models(name):
            names = names_of(model)
            words = {claim.parameter: claim.word for claim in names.resolve(spec)}
            for alias, parameter in names.aliases.items():
                if parameter in names.parameters:
                    # The base model's name in front is what the classes of a family differ in.
                    path = starred(alias.removeprefix(f"{getattr(model, 'base_model_prefix', '')}."))
                    rows.setdefault((path, words.get(parameter, "-")), set()).add(name)
            unused -= {p for p in unused if any(p.matches(n) or p.matches(n.rpartition(".")[0]) for n in names.aliases)}
    assert not unused
    lines = ["# parameter, its word, and the classes that have it, where not all do"]
    for (path, word), having in rows.items():
        which = "" if having == set(spec.classes) else " ".join(name for name in spec.classes if name in having)
        lines.append(f"{path:<62} {word:<10} {which}".rstrip())
    golden(f"spec_shipped_{file.name.removesuffix('.tpspec')}", "\n".join(lines))


def test_a_spec_is_found_along_the_mro() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    assert find_shipped([cls.__name__ for cls in Mine.__mro__]).filename == "specs/llama.tpspec"
    assert find_shipped(["GPT2Model", "LlamaModel"]).filename == "specs/gpt2.tpspec"


def test_shipped_specs_use_every_word_but_replicate() -> None:
    used = {line.word for path in shipped().values() for line in Spec.parse(path.read_text()).lines}
    assert used == set(WORDS) - {"replicate", "experts"}


# --- the golden files -------------------------------------------------------------------------------------------------


def test_every_error_has_its_golden_file_and_no_file_is_left_over() -> None:
    tables = [*SYNTAX_ERRORS, *RESOLUTION_ERRORS, *TIE_ERRORS, "by_no_config", "no_shipped_spec"]
    files = ["missing", "no_neighbour", "no_directory", "directory", "not_text"]
    expected = {f"spec_error_{name}" for name in [*tables, *(f"file_{name}" for name in files)]}
    expected |= {f"spec_shipped_{path.name.removesuffix('.tpspec')}" for path in shipped().values()}
    assert {path.stem for path in FOLDER.glob("spec_*.txt")} == expected


DOCS = Path(__file__).parents[1] / "docs/tpspec.md"


def test_the_page_of_the_language_is_true() -> None:
    """Its specs parse, its errors are those of the golden files, and it names every word and shipped class."""
    page = DOCS.read_text(encoding="utf-8")
    specs = re.findall(r"^```tpspec\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert specs
    for text in specs:
        Spec.parse(text)
    errors = re.findall(r"^<!-- tests/golden/(\w+)\.txt -->\n```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(errors) == page.count("```text")
    assert errors
    for name, text in errors:
        assert text == (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), name
    missing = [name for name in [*WORDS, *shipped()] if not re.search(rf"`{name}`", page)]
    assert missing == []


def test_the_golden_fixture_can_fail(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"no golden file a\.txt"):
        Golden(update=False, folder=tmp_path)("a", "text")
    Golden(update=True, folder=tmp_path)("a", "text")
    Golden(update=False, folder=tmp_path)("a", "text\n")
    with pytest.raises(AssertionError, match=r"differs from a\.txt"):
        Golden(update=False, folder=tmp_path)("a", "texts")
