"""The compile cache: captured graphs on disk, so that the second start of a model does not trace it again.

An entry is found by everything that the capture depends on (`fingerprint`), and counts only while the source files that
it came from and the environment variables that were read have the contents of then. What cannot be read completely is
not cached. Entries are data (`captured_json`): nothing in them is executed. The rewriting itself always runs.

``TPCOMPILE_CACHE`` is the directory; ``0`` or ``off`` means none. The default is ``$XDG_CACHE_HOME/tpcompile``, or
``~/.cache/tpcompile``. The logger ``tpcompile.compile_cache`` says at level DEBUG what was found and why not.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Generator, Iterable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from tpcompile import captured_json
from tpcompile.capture import Captured, capture, set_apart
from tpcompile.captured_json import NotStorableError
from tpcompile.fingerprint import Fingerprint, NotCacheableError, fingerprint, is_trusted

VARIABLE = "TPCOMPILE_CACHE"
MAX_BYTES = 256 * 2**20
MAX_ENTRIES = 1024
_STARTED = time.time()
_log = logging.getLogger(__name__)


def directory() -> Path | None:
    """Where entries are; None if there shall be none."""
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        return None if asked.lower() in ("", "0", "off") else Path(asked).expanduser()
    with contextlib.suppress(RuntimeError):  # a user without a home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpcompile"
    return None


@set_apart()
def cached_capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """`tpcompile.capture.capture`, from the cache where it has this capture, and stored where it can be.

    Raises:
        CaptureError: as `capture` does; nothing is stored then.
    """
    folder = directory()
    facts = None if folder is None or not (args or kwargs) else _facts(model, args, kwargs)
    if folder is None or facts is None:
        return capture(model, args, kwargs)
    key = sha256(f"{_own_sources()}\n{facts.digest()}".encode()).hexdigest()
    path = folder / f"{key}.json.gz"
    captured, said = _load(path, model, args, kwargs) or _captured(path, facts.files, model, args, kwargs)
    for text in said:
        warnings.warn(text, UserWarning, stacklevel=2)
    return captured


def _facts(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Fingerprint | None:
    """What this capture depends on; None if it must not be cached."""
    try:
        return fingerprint(model, args, kwargs)
    except NotCacheableError as reason:
        _log.debug("not cached: %s", reason)
    except Exception:  # noqa: BLE001  (objects of the model may raise anything while they are read)
        _log.debug("not cached: the model cannot be read", exc_info=True)
    return None


@cache
def _own_sources() -> str:
    """A digest of tpcompile itself."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


# ---------------------------------------------------------------- reading


def _load(
    path: Path, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Captured, list[str]] | None:
    try:
        if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
            _log.debug("miss: %s belongs to somebody else", path)
            return None
        document = json.loads(gzip.decompress(path.read_bytes()))
        if (changed := _changed(document)) is not None:
            _log.debug("miss: %s has changed", changed)
            return None
        captured = captured_json.decode(document["captured"], model, args, kwargs)
        said = [str(text) for text in document["warnings"]]
    except FileNotFoundError:
        _log.debug("miss: no %s", path)
        return None
    except Exception as error:  # noqa: BLE001  (a damaged entry may fail anywhere)
        warnings.warn(
            f"the compile cache's {path} cannot be read ({type(error).__name__}: {error}); it is written again",
            UserWarning,
            stacklevel=3,
        )
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the oldest entries go first
    _log.debug("hit: %s", path)
    return captured, said


def _changed(document: Mapping[str, Any]) -> str | None:
    """A file or environment variable that is not as it was when the entry was made."""
    for file, digest in document["files"].items():
        if _file_digest(file) != digest:
            return file
    for name, digest in document["environment"].items():
        if _variable_digest(name) != digest:
            return f"${name}"
    return None


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def _file_digest(file: str) -> str | None:
    try:
        return _digest(Path(file).read_bytes())
    except OSError:
        return None


def _variable_digest(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else _digest(os.fsencode(value))


# ---------------------------------------------------------------- writing


def _captured(
    path: Path, reached: set[str], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Captured, list[str]]:
    """A fresh capture, stored if nothing speaks against it, and what it warned of."""
    loaded = set(sys.modules)
    with warnings.catch_warnings(record=True) as recorded, _variables_read() as variables:
        warnings.simplefilter("always")
        captured = capture(model, args, kwargs)
    said = [str(warning.message) for warning in recorded]
    try:
        files = {*reached, *captured_json.files_of(captured), *_source_files(set(sys.modules) - loaded)}
        document = {
            "files": _digests(files),
            "environment": _unchanged(variables),
            "warnings": said,
            "captured": captured_json.encode(captured),
        }
        _write(path, gzip.compress(json.dumps(document).encode(), compresslevel=1, mtime=0))
        _log.debug("stored: %s", path)
    except (NotCacheableError, NotStorableError) as reason:
        _log.debug("not cached: %s", reason)
    except OSError as error:
        _log.debug("not cached: %s", error)
    return captured, said


def _source_files(modules: Iterable[str]) -> set[str]:
    """Of modules that the forward imported."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    return {file for file in files if isinstance(file, str)}


def _digests(files: Iterable[str]) -> dict[str, str]:
    """Digests of source files that do not count by version.

    Raises:
        NotCacheableError: one was written after this process began, which may run an older text of it.
    """
    digests: dict[str, str] = {}
    for file in sorted(files):
        path = os.path.abspath(file)
        if is_trusted(path) or not os.path.isfile(path):
            continue
        if os.path.getmtime(path) >= _STARTED:
            raise NotCacheableError(f"{path} was written after this process began")
        if (digest := _file_digest(path)) is not None:
            digests[path] = digest
    return digests


def _unchanged(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Those that the forward does not set itself; torch sets its folder for generated code, which no graph depends on.

    Raises:
        NotCacheableError: the forward sets a variable that it reads.
    """
    changed = {name for name, digest in variables.items() if _variable_digest(name) != digest}
    if others := changed - {"TORCHINDUCTOR_CACHE_DIR"}:
        raise NotCacheableError(f"the forward sets ${min(others)}")
    return {name: digest for name, digest in sorted(variables.items()) if name not in changed}


@contextlib.contextmanager
def _variables_read() -> Generator[dict[str, str | None]]:
    """The environment variables that are read while it is entered, with digests of what they were then."""
    kind: Any = type(os.environ)
    read: dict[str, str | None] = {}
    original = kind.__getitem__

    def recorded(self: Any, name: str | bytes) -> str | bytes:
        try:
            value = original(self, name)
        except KeyError:
            read.setdefault(os.fsdecode(name), None)
            raise
        read.setdefault(os.fsdecode(name), _digest(os.fsencode(value)))
        return value

    kind.__getitem__ = recorded
    try:
        yield read
    finally:
        kind.__getitem__ = original


def _write(path: Path, data: bytes) -> None:
    """Under a name of its own first: other processes see the whole entry or none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    _evict(path.parent)


def _evict(folder: Path) -> None:
    """Remove the entries that were not used for longest, down to the limits."""
    entries: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.json.gz"):
        with contextlib.suppress(OSError):  # another process removed it
            stat = path.stat()
            entries.append((stat.st_mtime, stat.st_size, path))
    size = 0
    for i, (_, bytes_, path) in enumerate(sorted(entries, reverse=True)):
        size += bytes_
        if i >= MAX_ENTRIES or size > MAX_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()


__all__ = ["MAX_BYTES", "MAX_ENTRIES", "VARIABLE", "cached_capture", "directory"]
