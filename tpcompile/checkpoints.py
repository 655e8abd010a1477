"""Checkpoints that do not know the degree: saved by any number of ranks, resumed by any other.

A checkpoint is a folder: ``tpcompile.json`` says what every tensor is and where its pieces lie, and a folder of parts
has one safetensors file per rank. The index is replaced in one step when all parts are on the disk, so that whatever
kills a process, the folder holds the last complete checkpoint. torch.distributed.checkpoint is not used: it unpickles
its metadata without ``weights_only``, and its DTensors cannot say fused segments and uneven cuts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, optim

from tpcompile.errors import RuntimeMismatchError, TpcompileError
from tpcompile.layout import Layout, Leaf, Mesh, axes_of
from tpcompile.module import TensorParallel
from tpcompile.pieces import Part, described, dtype_name, read_part, sync, uncut, write_parts
from tpcompile.together import all_do
from tpcompile.whole_state import is_dtensor

INDEX = "tpcompile.json"
PARTS = re.compile(r"parts-[0-9a-f]{12}")
FORMAT, VERSION = "tpcompile.checkpoint", 1
WRITING = 3600.0
"""Seconds that the slowest rank may take to write or read its part longer than the fastest."""

ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.ASGD, optim.NAdam, optim.RAdam,
    optim.RMSprop, optim.Rprop, optim.SGD,
)  # fmt: skip
"""Optimizers that treat every element alone, so that their state is cut as the parameter is."""


def save(
    path: str | os.PathLike[str],
    module: nn.Module,
    optimizer: optim.Optimizer | None = None,
    *,
    extra: Any = None,
    timeout: float = 60.0,
) -> None:
    """Write a checkpoint that any number of ranks can :func:`load`.

    Collective: every rank of the default process group calls it, with a ``path`` on a filesystem that all of them
    share. Of replicas (data parallelism) the first one is written. A checkpoint that is there already is replaced,
    and stays usable until the new one is complete.

    Args:
        path: a folder.
        module: what :func:`tpcompile.compile` returned. Parameters and persistent buffers are written, tied ones once.
        optimizer: one that treats every element alone (AdamW, SGD, ...), over parameters of ``module``.
        extra: what else to keep, the same on every rank: tensors, numbers, strings, None, and lists, tuples and dicts
            (with str keys) of them. For example a step, the state of a scheduler, ``torch.get_rng_state()``.
        timeout: seconds that ranks wait for the last of them to call it.

    Raises:
        TpcompileError: something cannot be saved (it says what), or a rank could not write.
        RuntimeMismatchError: a rank did not call it (it says which), or brings something else.
    """
    folder = Path(path)
    content: list[tuple[_Content, TensorParallel]] = []
    index: dict[str, Any] = {}

    def describe() -> str:
        tp = compiled(module)
        check_can_be_saved(tp)
        found = _content(tp, optimizer, extra)
        content.append((found, tp))
        index.update(format=FORMAT, version=VERSION, degree=tp.group.size(), names=names_of(tp), values=found.values)
        index["tensors"] = described(found.parts, mesh_of(tp))
        same = [hash_of(found.parts[name].tensor) for name in sorted(found.shared)]
        return sha256(json.dumps([str(folder), index, same]).encode()).hexdigest()

    _check_same(all_do("tpcompile.save", describe, timeout), "save")
    ((found, tp),) = content
    name = all_do("tpcompile.save: prepare", lambda: _prepare(folder), WRITING)[0]
    writes = 0 in dist.get_process_group_ranks(tp.group)
    rank = dist.get_rank(tp.group)

    def write() -> dict[str, int]:
        if not writes:
            return {}
        file = folder / name / f"rank{rank}.safetensors"
        write_parts(file, found.parts, mesh_of(tp), rank)
        return {f"{name}/{file.name}": file.stat().st_size}

    sizes = all_do("tpcompile.save: write", write, WRITING)
    index["files"] = {file: size for other in sizes for file, size in other.items()}
    all_do("tpcompile.save: publish", lambda: _publish(folder, index), WRITING)


def load(
    path: str | os.PathLike[str],
    module: nn.Module,
    optimizer: optim.Optimizer | None = None,
    *,
    timeout: float = 60.0,
) -> Any:
    """Load what :func:`save` wrote into ``module`` and ``optimizer``, whatever the number of ranks then; ``extra``.

    Collective over the default process group. A rank reads only what it holds. Nothing is unpickled, and nothing is
    changed before every rank has found that names, shapes, dtypes and the sizes of files are right.

    Args:
        path: the folder.
        module: what :func:`tpcompile.compile` returned for the same model.
        optimizer: a new one with the same groups of parameters; None to load the weights alone.
        timeout: seconds that ranks wait for the last of them to call it.

    Raises:
        TpcompileError: the folder is no checkpoint, or one of another model (it says what differs), or is damaged.
        RuntimeMismatchError: a rank did not call it (it says which), or gave another path.
    """
    folder = Path(path)
    opened: list[tuple[TensorParallel, Mapping[str, Any], Mapping[int, Any]]] = []

    def check() -> str:
        tp = compiled(module)
        check_can_be_saved(tp)
        index = _index(folder)
        _check_same_model(index, tp)
        if optimizer is not None:
            _check_same_optimizer(index, tp, optimizer)
        opened.append((tp, index, _files(folder, index)))
        return sha256(json.dumps([str(folder), index, optimizer is None]).encode()).hexdigest()

    _check_same(all_do("tpcompile.load", check, timeout), "load")
    ((tp, index, files),) = opened
    extra: list[Any] = []

    def read() -> None:
        reader = _Reader(index["tensors"], files, mesh_of(tp), dist.get_rank(tp.group))
        with torch.no_grad():
            for name, (tensor, dims) in tensors_of(tp).items():
                tensor.copy_(reader.read(f"weights/{name}", dims))
        if optimizer is not None:
            optimizer.load_state_dict(_state_dict(reader, index["values"]["optimizer"], tp, optimizer))
        extra.append(decoded(index["values"]["extra"], reader.whole))

    all_do("tpcompile.load: read", read, WRITING)
    return extra[0]


# ---------------------------------------------------------------------------------------------- what there is to save
@dataclass
class _Content:
    """Tensors by their names in the files, those that must be the same on all ranks, and everything else as JSON."""

    parts: dict[str, Part] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def compiled(module: nn.Module) -> TensorParallel:
    """The compiled module, also inside of DistributedDataParallel or torch.compile."""
    inside: Any = module
    while not isinstance(inside, TensorParallel):
        inside = getattr(inside, "_orig_mod", None) or getattr(inside, "module", None)
        if not isinstance(inside, nn.Module):
            raise TpcompileError(
                f"{type(module).__name__} is not a compiled module",
                help="pass what tpcompile.compile returned",
            )
    return inside


def check_can_be_saved(tp: TensorParallel) -> None:
    """Refuse a module whose tensors are cut in more ways than over the ranks of tensor parallelism."""
    if tp._stage_group is not None:  # pyright: ignore[reportPrivateUsage]
        raise TpcompileError(
            "a stage of a pipeline has only a part of the model",
            help="use tpcompile.full_state_dict, which gives what its stage holds",
        )
    names = tp._names  # pyright: ignore[reportPrivateUsage]
    for name, parameter in tp.named_parameters(remove_duplicate=False):
        if is_dtensor(parameter):
            raise TpcompileError(
                f"fully_shard has divided {name}",
                why="checkpoints know how parameters are cut over the ranks of tensor parallelism only",
                help="save before fully_shard, or use tpcompile.full_state_dict, which gathers over both",
            )
        if name not in names:
            raise TpcompileError(
                f"parameter {name} was not there when the model was compiled",
                why="nothing says whether the ranks hold parts of it or copies",
                help="add parameters to the model before tpcompile.compile, and wrap no module inside the compiled one",
            )


def names_of(tp: TensorParallel) -> dict[str, str]:
    """Every name of a parameter, and the first name of the same one."""
    return dict(sorted(tp._names.items()))  # pyright: ignore[reportPrivateUsage]


def mesh_of(tp: TensorParallel) -> Mesh:
    """The grid of ranks that parameters are cut over."""
    return tp._mesh  # pyright: ignore[reportPrivateUsage]


def tensors_of(tp: TensorParallel) -> dict[str, tuple[Tensor, tuple[Layout, ...]]]:
    """Parameters and persistent buffers with their layouts, tied ones once."""
    names, layouts = names_of(tp), tp.parameter_layouts()
    found: dict[str, tuple[Tensor, tuple[Layout, ...]]] = {}
    for name, tensor in tp.state_dict(keep_vars=True).items():
        canonical = names.get(name, name)
        found.setdefault(canonical, (tensor, layouts.get(canonical) or uncut(tensor).dims))
    return found


def _content(tp: TensorParallel, optimizer: optim.Optimizer | None, extra: Any) -> _Content:
    content = _Content()
    for name, (tensor, dims) in tensors_of(tp).items():
        content.parts[f"weights/{name}"] = Part(tensor.detach(), dims)
    content.values["optimizer"] = None if optimizer is None else _optimizer_content(content, tp, optimizer)
    content.values["extra"] = encoded(extra, "extra", _keeper(content))
    return content


def _keeper(content: _Content) -> Any:
    def keep(name: str, tensor: Tensor) -> None:
        if is_dtensor(tensor):
            raise TpcompileError(f"{name} is a DTensor", help="pass its full_tensor()")
        content.parts[name] = uncut(tensor)
        content.shared.append(name)

    return keep


def _by_parameter(tp: TensorParallel, optimizer: optim.Optimizer) -> list[list[str]]:
    """Names of the parameters of every group of ``optimizer``."""
    if not isinstance(optimizer, ELEMENTWISE):
        raise TpcompileError(
            f"the state of {type(optimizer).__name__} cannot be saved",
            why="it is not known to treat every element alone, and a rank holds parts of parameters",
            help=f"use one of torch.optim's {', '.join(kind.__name__ for kind in ELEMENTWISE)}, or a subclass",
        )
    names = {id(tensor): name for name, (tensor, _) in tensors_of(tp).items()}
    found: list[list[str]] = []
    for i, group in enumerate(optimizer.param_groups):
        foreign = [j for j, p in enumerate(group["params"]) if id(p) not in names]
        if foreign:
            raise TpcompileError(
                f"parameter {foreign[0]} of group {i} of the optimizer is not one of the module's",
                help="make the optimizer from the parameters of the compiled module",
            )
        found.append([names[id(p)] for p in group["params"]])
    return found


def _optimizer_content(content: _Content, tp: TensorParallel, optimizer: optim.Optimizer) -> dict[str, Any]:
    keep = _keeper(content)
    tensors = tensors_of(tp)
    state: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for i, (group, names) in enumerate(zip(optimizer.param_groups, _by_parameter(tp, optimizer), strict=True)):
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": names, "options": encoded(options, f"groups/{i}", keep)})
        for name, parameter in zip(names, group["params"], strict=True):
            mine = cast("Mapping[str, Any]", optimizer.state.get(parameter, {}))
            dims = tensors[name][1]
            state[name] = {}
            for key, value in mine.items():
                place = f"optimizer/{key}/{name}"
                if isinstance(value, Tensor) and value.shape == parameter.shape and not is_dtensor(value):
                    content.parts[place] = Part(value.detach(), dims)
                    state[name][key] = {"$part": place}
                elif isinstance(value, Tensor) and value.numel() != 1 and any(map(axes_of, dims)):
                    raise TpcompileError(
                        f"the optimizer's {key} of {name} is {list(value.shape)}, not {list(parameter.shape)}",
                        why="only state of the parameter's shape is cut as the parameter is",
                        help="use an optimizer that treats every element alone, such as AdamW",
                    )
                else:
                    state[name][key] = encoded(value, place, keep)
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def hash_of(tensor: Tensor) -> str:
    """A fingerprint of every byte of a tensor, its shape and its dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha256(f"{tensor.shape} {tensor.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- values as JSON
def encoded(value: Any, place: str, keep: Any) -> Any:
    """``value`` as JSON; tensors in it go to ``keep(name, tensor)``. ``place`` names it in errors."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        dtype_name(place, value.dtype)
        keep(place, value)
        return {"$tensor": place}
    if type(value) in (list, tuple):
        items = [encoded(x, f"{place}/{i}", keep) for i, x in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value)
        for key in pairs:
            if not isinstance(key, str) or key.startswith("$"):
                raise TpcompileError(
                    f"the key {key!r} in {place} cannot be saved",
                    why="keys are str, and do not begin with $",
                    help="use other keys",
                )
        return {key: encoded(x, f"{place}/{key}", keep) for key, x in pairs.items()}
    raise TpcompileError(
        f"{place} is a {type(value).__name__}, which cannot be saved",
        why="a checkpoint holds tensors, numbers, strings, None, and lists, tuples and dicts of them: nothing pickled",
        help="save its state_dict(), or what it is made from",
    )


def decoded(value: Any, read: Any) -> Any:
    """What was :func:`encoded`; ``read(name)`` gives a tensor."""
    if isinstance(value, list):
        return [decoded(x, read) for x in cast("list[Any]", value)]
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value)
        if "$tensor" in pairs:
            return read(pairs["$tensor"])
        if "$tuple" in pairs:
            return tuple(decoded(x, read) for x in pairs["$tuple"])
        return {key: decoded(x, read) for key, x in pairs.items()}
    return value


# ---------------------------------------------------------------------------------------------- writing
def _check_same(digests: Sequence[str], what: str) -> None:
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise RuntimeMismatchError(
            f"ranks {what} different checkpoints: {', '.join(map(str, other))} and 0 differ",
            why="the path, the names and shapes, the optimizer's steps and options, or extra are not the same",
            help="give the same on every rank; gather what belongs to one rank before it goes into extra",
        )


def _prepare(folder: Path) -> str | None:
    """Remove what interrupted saves have left; the name of a new folder for the parts, from rank 0."""
    if dist.get_rank():
        return None
    if folder.exists() and not folder.is_dir():
        raise TpcompileError(f"{folder} is a file", help="give the path of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    name = f"parts-{uuid.uuid4().hex[:12]}"
    (folder / name).mkdir()
    return name


def _remove_stale(folder: Path) -> None:
    used: set[str] = set()
    if (folder / INDEX).exists():
        used = {file.split("/")[0] for file in _index(folder)["files"]}
    for other in folder.iterdir():
        if PARTS.fullmatch(other.name) and other.name not in used:
            shutil.rmtree(other)


def _publish(folder: Path, index: Mapping[str, Any]) -> None:
    """Make the new parts the checkpoint, in one step, and remove the old ones."""
    if dist.get_rank():
        return
    for file, size in index["files"].items():
        if not (folder / file).exists() or (folder / file).stat().st_size != size:
            raise TpcompileError(
                f"{folder / file} is not here as it was written",
                why="another rank wrote it to a disk that rank 0 does not see",
                help="give a path on a filesystem that all ranks share",
            )
    written = folder / f"{INDEX}.part"
    with written.open("w") as file:
        json.dump(index, file)
        sync(file)
    os.replace(written, folder / INDEX)
    _remove_stale(folder)


# ---------------------------------------------------------------------------------------------- reading
def _index(folder: Path) -> Mapping[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        why = f"it has no {INDEX}" if folder.is_dir() else "there is no such folder"
        raise TpcompileError(f"{folder} is not a checkpoint", why=why, help="pass a folder that tpcompile.save wrote")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise TpcompileError(f"{path} is damaged", why=str(error), help="use another checkpoint") from error
    if not isinstance(index, dict) or cast("Any", index).get("format") != FORMAT:
        raise TpcompileError(f"{folder} is not a checkpoint", why=f'{INDEX} does not say "format": "{FORMAT}"')
    found = cast("dict[str, Any]", index)
    if found.get("version") != VERSION:
        raise TpcompileError(
            f"{folder} is a checkpoint of version {found.get('version')}; this tpcompile reads version {VERSION}",
            help="use the version of tpcompile that wrote it",
        )
    return found


def _files(folder: Path, index: Mapping[str, Any]) -> Mapping[int, Any]:
    """Every file of the checkpoint, opened, by the rank that wrote it."""
    opened: dict[int, Any] = {}
    for rank in range(index["degree"]):
        name, size = next((n, s) for n, s in index["files"].items() if Path(n).name == f"rank{rank}.safetensors")
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            held = "is missing" if found is None else f"has {found} bytes, and was written with {size}"
            raise TpcompileError(f"{path} {held}", why="the checkpoint is damaged", help="use another checkpoint")
        try:
            opened[rank] = cast("Any", safe_open)(path, framework="pt")
        except SafetensorError as error:
            raise TpcompileError(f"{path} is damaged", why=str(error), help="use another checkpoint") from error
    return opened


def _check_same_model(index: Mapping[str, Any], tp: TensorParallel) -> None:
    stored = {n.removeprefix("weights/"): t for n, t in index["tensors"].items() if n.startswith("weights/")}
    here = {n: (list(Part(x, dims).whole), dtype_name(n, x.dtype)) for n, (x, dims) in tensors_of(tp).items()}
    rows = [
        f"{n} is {list(shape)} here, and not in the checkpoint" for n, (shape, _) in here.items() if n not in stored
    ]
    rows += [f"{n} is {t['shape']} in the checkpoint, and not here" for n, t in stored.items() if n not in here]
    for name in here.keys() & stored.keys():
        was, now = (stored[name]["shape"], stored[name]["dtype"]), here[name]
        if was != now:
            rows.append(f"{name} is {was[0]} {was[1]} in the checkpoint, {now[0]} {now[1]} here")
    if not rows:
        ties, was = names_of(tp), index["names"]
        rows = [f"{n} is tied here otherwise than in the checkpoint" for n in ties | was if ties.get(n) != was.get(n)]
    if rows:
        more = f"; and {len(rows) - 3} more" if len(rows) > 3 else ""
        raise TpcompileError(
            "the checkpoint is of another model",
            why="; ".join(sorted(rows)[:3]) + more,
            help="compile the model that was saved",
        )


def _check_same_optimizer(index: Mapping[str, Any], tp: TensorParallel, optimizer: optim.Optimizer) -> None:
    stored = index["values"]["optimizer"]
    if stored is None:
        raise TpcompileError(
            "the checkpoint has no optimizer's state",
            help="load the weights alone, with optimizer=None, or save with the optimizer",
        )
    groups = _by_parameter(tp, optimizer)
    if stored["class"] != type(optimizer).__name__:
        raise TpcompileError(f"the checkpoint has the state of {stored['class']}, not of {type(optimizer).__name__}")
    if len(groups) != len(stored["groups"]):
        raise TpcompileError(f"the optimizer has {len(groups)} groups, that of the checkpoint {len(stored['groups'])}")
    for i, (names, group) in enumerate(zip(groups, stored["groups"], strict=True)):
        apart = sorted({*names} ^ {*group["params"]})
        if apart:
            has = "only the optimizer" if apart[0] in names else "only the checkpoint"
            raise TpcompileError(
                f"group {i} of the optimizer has other parameters than in the checkpoint",
                why=f"{has} has {apart[0]} in it" + (f", and {len(apart) - 1} more differ" if len(apart) > 1 else ""),
                help="make the groups as they were when it was saved",
            )


@dataclass(frozen=True)
class _Reader:
    """The tensors of a checkpoint, for one rank."""

    tensors: Mapping[str, Any]
    files: Mapping[int, Any]
    mesh: Mesh
    rank: int

    def read(self, name: str, dims: Sequence[Layout]) -> Tensor:
        return read_part(self.files, name, self.tensors[name], dims, self.mesh, self.rank)

    def whole(self, name: str) -> Tensor:
        return self.read(name, [Leaf(n) for n in self.tensors[name]["shape"]])


def _state_dict(
    reader: _Reader, stored: Mapping[str, Any], tp: TensorParallel, optimizer: optim.Optimizer
) -> dict[str, Any]:
    """The state dict that ``optimizer`` loads: its own numbers of parameters, this rank's parts."""
    tensors = tensors_of(tp)
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for names, group in zip(_by_parameter(tp, optimizer), stored["groups"], strict=True):
        numbers = [number for number, _ in enumerate(names, start=sum(len(g["params"]) for g in groups))]
        groups.append({**decoded(group["options"], reader.whole), "params": numbers})
        for number, name in zip(numbers, names, strict=True):
            held = dict(_entries(reader, stored["state"][name], tensors[name][1]))
            if held:
                state[number] = held
    return {"state": state, "param_groups": groups}


def _entries(reader: _Reader, stored: Mapping[str, Any], dims: Sequence[Layout]) -> Iterator[tuple[str, Any]]:
    for key, value in stored.items():
        if isinstance(value, dict) and "$part" in value:
            yield key, reader.read(cast("Any", value)["$part"], dims)
        else:
            yield key, decoded(value, reader.whole)


__all__ = ["ELEMENTWISE", "check_can_be_saved", "compiled", "load", "mesh_of", "names_of", "save", "tensors_of"]
