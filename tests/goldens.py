"""Golden files: an expected text that a person has read once, kept as tests/golden/NAME.txt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """What the fixture `golden` gives: call it with a name and a text; it fails where they differ."""

    update: bool
    folder: Path = FOLDER

    def __call__(self, name: str, text: str) -> None:
        """Compare `text` with the golden file `name`; with ``--update-goldens``, write it there instead."""
        path = self.folder / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if self.update:
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden file {path.name}: write it with --update-goldens and read it")
        assert text == path.read_text(encoding="utf-8"), f"differs from {path.name} (--update-goldens accepts it)"
