"""Options and fixtures that all tests share."""

from __future__ import annotations

import os

import pytest
from goldens import Golden
from hypothesis import settings

# No deadline: a first example may import or compile. CI repeats itself; elsewhere every run looks at new examples.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "write the texts that tests get into tests/golden; read what changed before you commit it"
    parser.addoption("--update-goldens", action="store_true", help=help)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text with tests/golden/NAME.txt: ``golden(NAME, text)``."""
    return Golden(update=bool(request.config.getoption("--update-goldens")))
