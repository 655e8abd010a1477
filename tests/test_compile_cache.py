"""The compile cache: a hit is the same program, and whatever a capture depends on makes a miss when it changes."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import tpcompile
from tpcompile import compile_cache
from tpcompile.capture import Captured, capture
from tpcompile.compile_cache import cached_capture
from tpcompile.compiler import choose_spec, rewrite_captured
from tpcompile.fingerprint import Fingerprint, NotCacheableError, fingerprint

SCALE = 2.0
TABLE = torch.tensor([1.0, 2.0, 3.0, 4.0])
CHOICES: dict[str, Any] = {"order": ["gelu"], "limits": {"low": -1.0}}


def helper(x: Tensor) -> Tensor:
    return x * 3


def chosen(kind: str) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return F.relu(x) if kind == "relu" else F.gelu(x)

    return run


@dataclass
class Config:
    eps: float = 1e-5
    kinds: tuple[str, ...] = ("full",)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.config = Config()
        self.act = chosen("gelu")
        self.drop = nn.Dropout(0.1)

    def scaled(self, x: Tensor) -> Tensor:
        return x * SCALE

    @property
    def shift(self) -> float:
        return 0.5

    def forward(self, x: Tensor) -> Tensor:
        low = CHOICES["limits"]["low"]
        return self.drop(self.down(self.act(self.up(helper(self.scaled(x))) + self.shift))).clamp(min=low)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(4))
        self.order = [1, 0]
        self.plain = torch.ones(4)

    def forward(self, x: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
        for i in self.order:
            x = x + self.layers[i](x)
        y = x * self.mask * self.plain * factor * TABLE
        return {"y": y * len(os.environ.get("TPCOMPILE_TEST_VARIABLE", "one"))}


CALL: Mapping[str, Any] = {"x": torch.ones(3, 5, 4)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of this test, in a process whose sources are all older than it."""
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compile_cache, "_STARTED", float("inf"))
    return tmp_path / "cache"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were traced: one more for every miss."""
    models: list[nn.Module] = []

    def counted(model: nn.Module, *rest: Any) -> Captured:
        models.append(model)
        return capture(model, *rest)

    monkeypatch.setattr(compile_cache, "capture", counted)
    return models


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


def run(captured: Captured, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Outputs and gradients, with dropout."""
    torch.manual_seed(1)
    given = {n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    outputs = captured.graph_module(*captured.flatten((), given))
    found = [x for x in outputs if isinstance(x, Tensor)]
    weights = [p for p in captured.parameters.values() if p.requires_grad]
    grads = torch.autograd.grad(
        [x.sum() for x in found if x.requires_grad], weights, allow_unused=True, materialize_grads=True
    )
    return [*found, *grads]


# ---------------------------------------------------------------- a hit

SLOW = [name for name in zoo.MODELS if name != "nanogpt"]


def test_a_hit_is_the_same_program_with_the_same_numbers(cache: Path, traced: list[nn.Module]) -> None:
    model = build()
    first, second = (cached_capture(model, (), CALL) for _ in range(2))
    assert len(traced) == 1
    assert len(entries(cache)) == 1
    assert [str(n.meta["source"]) for n in first.graph_module.graph.nodes] == [
        str(n.meta["source"]) for n in second.graph_module.graph.nodes
    ]
    assert list(first.parameters) == list(second.parameters)
    assert all(first.parameters[n] is second.parameters[n] for n in first.parameters)
    for a, b in zip(run(first, CALL), run(second, CALL), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["nanogpt", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_models_of_the_catalogue_are_rewritten_alike_after_a_hit(
    name: str, cache: Path, traced: list[nn.Module]
) -> None:
    model, inputs = zoo.build(name, 1, training=True), zoo.inputs(name)
    spec = choose_spec(model, None)
    programs = [rewrite_captured(cached_capture(model, (), inputs), spec, model, 2, ((), inputs)) for _ in range(2)]
    assert len(traced) == 1
    assert len(entries(cache)) == 1
    assert programs[0].stages == programs[1].stages
    assert programs[0].collectives == programs[1].collectives
    tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
    if tensors.keys() == inputs.keys():
        for a, b in zip(*(run(p.captured, inputs) for p in programs), strict=True):
            assert torch.equal(a, b)


def test_passes_that_ask_for_sizes_answer_alike_after_a_hit(cache: Path, traced: list[nn.Module]) -> None:
    model, inputs = zoo.build("nanogpt", 1), zoo.inputs("nanogpt")
    texts = [str(tpcompile.rewrite(model, degree=2, example_inputs=inputs, overlap=2).lines()) for _ in range(2)]
    assert len(traced) == 1
    assert texts[0] == texts[1]


def test_what_a_captured_graph_refuses_it_refuses_after_a_hit(cache: Path, traced: list[nn.Module]) -> None:
    model = zoo.build("nanogpt", 1)
    said: list[str] = []
    for _ in range(2):
        captured = cached_capture(model, (), zoo.inputs("nanogpt"))
        with pytest.raises(tpcompile.CaptureError) as refused:
            captured.flatten((), {next(iter(zoo.inputs("nanogpt"))): torch.zeros(2, 17, dtype=torch.long)})
        said.append(str(refused.value))
    assert len(traced) == 1
    assert said[0] == said[1]
    assert "requires" in said[0] or "cover" in said[0]


def test_a_hit_warns_as_the_capture_did(cache: Path, traced: list[nn.Module]) -> None:
    class Remembers(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.last = input * 2
            return super().forward(input)

    model = Remembers(4, 4)
    for _ in range(2):
        with pytest.warns(UserWarning, match="forward sets last"):
            cached_capture(model, (torch.ones(2, 4),), {})
    assert len(traced) == 1


def test_every_entrance_uses_the_cache(cache: Path, traced: list[nn.Module], group: None) -> None:
    model = build()
    tpcompile.plan(model, 2, CALL)
    tpcompile.rewrite(model, degree=2, example_inputs=CALL)
    assert len(traced) == 1
    tp = tpcompile.compile(model, example_inputs=CALL)
    assert len(traced) == 1
    tp.eval()
    tp(**CALL)  # another graph
    assert len(traced) == 2
    again = tpcompile.compile(model, example_inputs=CALL).eval()
    torch.testing.assert_close(again(**CALL), tp(**CALL), rtol=0, atol=0)
    assert len(traced) == 2


# ---------------------------------------------------------------- what makes a miss


def _patch_class(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    patch.setattr(Inner, "forward", lambda self, x: self.down(self.up(x)))


def _patch_instance(patch: pytest.MonkeyPatch, model: Any) -> None:
    model.layers[1].forward = types.MethodType(lambda self, x: self.down(self.up(x)), model.layers[1])


def _patch_torch(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    patch.setattr(F, "linear", lambda x, w, b=None: x @ w.t())


def _patch_library_class(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.t())


def _tie(patch: pytest.MonkeyPatch, model: Any) -> None:
    model.layers[1].up.weight = model.layers[0].up.weight


def _subclass(patch: pytest.MonkeyPatch, model: Any) -> None:
    class Other(Inner):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model.layers[0].__class__ = Other


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any], object]] = {
    "class's forward": _patch_class,
    "instance's forward": _patch_instance,
    "method": lambda p, m: p.setattr(Inner, "scaled", lambda self, x: x * 5),
    "property": lambda p, m: p.setattr(Inner, "shift", property(lambda self: 0.25)),
    "class of a module": _subclass,
    "function of the file": lambda p, m: p.setattr(sys.modules[__name__], "helper", lambda x: x * 4),
    "function of torch": _patch_torch,
    "class of torch": _patch_library_class,
    "method of tensors": lambda p, m: p.setattr(Tensor, "clamp", lambda x, min: torch.maximum(x, torch.tensor(min))),
    "constant of the code": lambda p, m: p.setattr(
        Inner, "scaled", types.FunctionType(Inner.scaled.__code__.replace(co_consts=(None, 1)), globals())
    ),
    "global number": lambda p, m: p.setattr(sys.modules[__name__], "SCALE", 3.0),
    "global tensor": lambda p, m: p.setattr(sys.modules[__name__], "TABLE", TABLE + 1),
    "global container": lambda p, m: p.setitem(CHOICES["limits"], "low", -2.0),
    "closure": lambda p, m: setattr(m.layers[0], "act", chosen("relu")),
    "attribute": lambda p, m: setattr(m, "order", [0, 1]),
    "attribute of a config": lambda p, m: setattr(m.layers[1].config, "eps", 1e-6),
    "plain tensor's dtype": lambda p, m: setattr(m, "plain", torch.ones(4, dtype=torch.float64)),
    "training": lambda p, m: m.eval(),
    "training of one module": lambda p, m: m.layers[0].drop.eval(),
    "requires_grad": lambda p, m: m.layers[0].up.weight.requires_grad_(False),
    "tie": _tie,
    "parameter's dtype": lambda p, m: m.double(),
    "parameter's shape": lambda p, m: setattr(m.layers[0], "up", nn.Linear(4, 8, bias=False)),
    "parameter's strides": lambda p, m: setattr(m.layers[0].up, "weight", nn.Parameter(torch.ones(4, 8).t())),
    "parameter's device": lambda p, m: m.layers[0].up.to("meta"),
    "name": lambda p, m: m.register_buffer("other", torch.ones(1)),
    "persistence": lambda p, m: m.register_buffer("mask", torch.ones(4), persistent=False),
    "default dtype": lambda p, m: p.setattr(torch, "get_default_dtype", lambda: torch.float64),
    "deterministic": lambda p, m: p.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
    "attention kernels": lambda p, m: p.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: None),
    "version of torch": lambda p, m: p.setattr(torch, "__version__", "2.99"),
    "version of Python": lambda p, m: p.setattr(sys, "version", "3.99"),
    "version of transformers": lambda p, m: p.setitem(
        sys.modules, "transformers", types.SimpleNamespace(__version__="0")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_another_entry(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before = fingerprint(model, (), CALL).digest()
    assert fingerprint(build(), (), CALL).digest() == before, "negative control: another object that is the same"
    CHANGES[change](monkeypatch, model)
    assert fingerprint(model, (), CALL).digest() != before


@pytest.mark.parametrize("change", ["class's forward", "closure", "attribute", "tpcompile itself", "variable"])
def test_another_entry_is_a_miss(
    change: str, cache: Path, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    for _ in range(2):
        cached_capture(model, (), CALL)
    assert len(traced) == 1
    match change:
        case "tpcompile itself":
            monkeypatch.setattr(compile_cache, "_own_sources", lambda: "other")
        case "variable":
            monkeypatch.setenv("TPCOMPILE_TEST_VARIABLE", "three")
        case _:
            CHANGES[change](monkeypatch, model)
    for _ in range(2):
        cached_capture(model, (), CALL)
    assert len(traced) == 2


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "size": ((), {"x": torch.ones(3, 6, 4)}),
    "dims": ((), {"x": torch.ones(5, 4)}),
    "dtype": ((), {"x": torch.ones(3, 5, 4).double()}),
    "strides": ((), {"x": torch.ones(5, 3, 4).transpose(0, 1)}),
    "requires_grad": ((), {"x": torch.ones(3, 5, 4, requires_grad=True)}),
    "constant": ((), {"x": torch.ones(3, 5, 4), "factor": 2.0}),
    "type of a constant": ((), {"x": torch.ones(3, 5, 4), "factor": 1}),
    "position": ((torch.ones(3, 5, 4),), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_other_call_is_another_entry(call: str) -> None:
    assert fingerprint(build(), (), CALL).digest() == fingerprint(build(), (), dict(CALL)).digest()
    assert fingerprint(build(), (), CALL).digest() != fingerprint(build(), *CALLS[call]).digest()


def test_autocast_and_the_default_device_are_other_entries() -> None:
    digests = [fingerprint(build(), (), CALL).digest()]
    with torch.autocast("cpu", torch.bfloat16):
        digests.append(fingerprint(build(), (), CALL).digest())
    with torch.autocast("cpu", torch.float16):
        digests.append(fingerprint(build(), (), CALL).digest())
    model = build()
    with torch.device("meta"):
        digests.append(fingerprint(model, (), CALL).digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize("where", ["helper", "dynamic"])
def test_a_changed_source_file_is_a_miss(
    where: str, cache: Path, traced: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the model, and one that its forward finds in a way that nobody can follow."""
    (tmp_path / "cached_model.py").write_text(
        "import importlib\nimport torch\n\nclass M(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return importlib.import_module('cached_' + 'helper').f(super().forward(x))\n"
    )
    (tmp_path / "cached_helper.py").write_text("def f(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import cached_model  # pyright: ignore[reportMissingImports]

    model: nn.Module = cached_model.M(4, 4)
    for _ in range(2):
        cached_capture(model, (torch.ones(2, 4),), {})
    assert len(traced) == 1
    file = tmp_path / ("cached_helper.py" if where == "dynamic" else "cached_model.py")
    file.write_text(file.read_text() + "\n")
    cached_capture(model, (torch.ones(2, 4),), {})
    assert len(traced) == 2
    for name in ("cached_model", "cached_helper"):
        sys.modules.pop(name)


def test_negative_control_a_blind_fingerprint_hits_and_compile_notices(
    cache: Path, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    monkeypatch.setattr(Fingerprint, "digest", lambda self: "always the same")
    model = build().eval()
    tpcompile.compile(model, example_inputs=CALL)
    monkeypatch.setattr(Inner, "scaled", lambda self, x: x * 7)
    assert cached_capture(model, (), CALL).training is False
    assert len(traced) == 1, "stale"
    with pytest.raises(tpcompile.CaptureError, match="computes"):
        tpcompile.compile(model, example_inputs=CALL)


# ---------------------------------------------------------------- what is not cached


def _hooked() -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda *_: None)
    return model


def _holding(**values: Any) -> nn.Module:
    model = nn.Linear(4, 4)
    for name, value in values.items():
        model.__dict__[name] = value
    return model


UNREADABLE: dict[str, Callable[[], nn.Module]] = {
    "hook": _hooked,
    "generator": lambda: _holding(generator=torch.Generator()),
    "Python's generator": lambda: _holding(generator=random.Random(0)),
    "hidden module": lambda: _holding(hidden=[nn.Linear(4, 4)]),
    "iterator": lambda: _holding(steps=iter([1, 2])),
    "large tensor": lambda: _holding(tables=[torch.ones(2**19)]),
    "meta tensor": lambda: _holding(tables=[torch.ones(2, device="meta")]),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_not_cached(kind: str, cache: Path, traced: list[nn.Module]) -> None:
    model = UNREADABLE[kind]()
    for _ in range(2):
        cached_capture(model, (torch.ones(2, 4),), {})
    assert len(traced) == 2
    assert entries(cache) == []


def test_a_source_file_younger_than_the_process_is_not_cached(
    cache: Path, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "_STARTED", 0.0)
    cached_capture(build(), (), CALL)
    assert entries(cache) == []


def test_a_mode_or_a_hook_on_all_modules_is_not_cached() -> None:
    from torch.overrides import BaseTorchFunctionMode

    with BaseTorchFunctionMode(), pytest.raises(NotCacheableError, match="mode"):
        fingerprint(build(), (), CALL)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.raises(NotCacheableError, match="hooks on all"):
        fingerprint(build(), (), CALL)
    handle.remove()


@pytest.mark.parametrize("value", ["0", "off", "OFF", ""])
def test_off(value: str, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compile_cache.VARIABLE, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.directory() is None
    monkeypatch.setattr(compile_cache, "capture", lambda *_: "traced")
    assert [cached_capture(build(), (), CALL) for _ in range(2)] == ["traced", "traced"]
    assert entries(tmp_path) == []


def test_the_default_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.directory() == tmp_path / "tpcompile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_cache.directory() == tmp_path / ".cache" / "tpcompile"


# ---------------------------------------------------------------- files


def _without_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _with_other_target(data: bytes) -> bytes:
    text = gzip.decompress(data).decode()
    return gzip.compress(text.replace("aten.linear.default", "os.system").encode())


def _without_a_key(data: bytes) -> bytes:
    document = json.loads(gzip.decompress(data))
    del document["captured"]["nodes"]
    return gzip.compress(json.dumps(document).encode())


@pytest.mark.parametrize("damage", [_without_half, _with_other_target, _without_a_key, lambda _: b"", lambda _: b"x"])
def test_a_damaged_entry_is_said_and_written_again(
    damage: Callable[[bytes], bytes], cache: Path, traced: list[nn.Module]
) -> None:
    model, call = nn.Linear(4, 4), {"input": torch.ones(2, 4)}
    expected = run(cached_capture(model, (), call), call)
    (entry,) = entries(cache)
    entry.write_bytes(damage(entry.read_bytes()))
    with pytest.warns(UserWarning, match="cannot be read .* it is written again"):
        found = run(cached_capture(model, (), call), call)
    assert len(traced) == 2
    cached_capture(model, (), call)
    assert len(traced) == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_directory_that_cannot_be_written_is_no_error(
    tmp_path: Path, traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compile_cache, "_STARTED", float("inf"))
    with pytest.warns(UserWarning, match="cannot be read"):
        cached_capture(build(), (), CALL)
    assert len(traced) == 1


def test_the_oldest_entries_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "MAX_ENTRIES", 3)
    for i in range(5):
        path = cache / f"{i}.json.gz"
        compile_cache._write(path, b"x" * 10)  # pyright: ignore[reportPrivateUsage]
        os.utime(path, (i, i))
    compile_cache._evict(cache)  # pyright: ignore[reportPrivateUsage]
    assert [p.name for p in entries(cache)] == ["2.json.gz", "3.json.gz", "4.json.gz"]
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 25)
    compile_cache._evict(cache)  # pyright: ignore[reportPrivateUsage]
    assert [p.name for p in entries(cache)] == ["3.json.gz", "4.json.gz"]


def test_readers_see_whole_entries_while_others_write(cache: Path) -> None:
    path, texts = cache / "k.json.gz", [bytes([i]) * 200_000 for i in range(4)]
    compile_cache._write(path, texts[0])  # pyright: ignore[reportPrivateUsage]
    write = compile_cache._write  # pyright: ignore[reportPrivateUsage]
    writers = [threading.Thread(target=lambda t=t: [write(path, t) for _ in range(20)]) for t in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in texts
    assert [p.name for p in entries(cache)] == ["k.json.gz"]


PROGRAM = """
import logging
logging.basicConfig()
logging.getLogger("tpcompile.compile_cache").setLevel(logging.DEBUG)
import torch, zoo
import tpcompile
print(tpcompile.rewrite(zoo.build("llama_gqa", 1), degree=2, example_inputs=zoo.inputs("llama_gqa")).text())
"""


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    here = Path(__file__).parent
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        compile_cache.VARIABLE: str(cache),
        "PYTHONHASHSEED": "random",
    }


@pytest.mark.slow
def test_processes_that_start_together_and_one_that_starts_later(cache: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", PROGRAM]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    both = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], both
    later = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "compile_cache:hit" in later.stderr
    assert "compile_cache:stored" in both[0][1] + both[1][1]
    assert both[0][0] == both[1][0] == later.stdout
    assert "return" in later.stdout
    assert len(entries(cache)) == 1
