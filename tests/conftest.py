"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from goldens import Golden
from hypothesis import settings

# No deadline: a first example may import or compile. CI repeats itself; elsewhere every run looks at new examples.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Captures are cached, as they are for users, but for this run alone: a model is traced once for all files."""
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the variable
        folder = tempfile.TemporaryDirectory(prefix="tpcompile-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["TPCOMPILE_CACHE"] = folder.name


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "write the texts that tests get into tests/golden; read what changed before you commit it"
    parser.addoption("--update-goldens", action="store_true", help=help)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text with tests/golden/NAME.txt: ``golden(NAME, text)``."""
    return Golden(update=bool(request.config.getoption("--update-goldens")))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()
