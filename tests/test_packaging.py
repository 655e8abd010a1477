"""What a user installs is what the tree holds: the built wheel, unpacked and imported away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

REPORT = """
import sys, importlib.resources
import tpcompile, tpcompile.passes, tpcompile.specs
print(tpcompile.__file__)
print(tpcompile.passes.__file__)
specs = importlib.resources.files("tpcompile.specs")
print(*sorted(entry.name for entry in specs.iterdir() if entry.name.endswith(".tpspec")))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, built from a copy of the tree so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("tpcompile", "passes", "specs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    wheels = tmp_path_factory.mktemp("wheel")
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def tree_files() -> set[str]:
    """Every file that belongs in the wheel, by its path in the wheel."""
    places = {f"tpcompile/{inner}": ROOT / "tpcompile" / inner for inner in ("cli", "machines", "passes", "specs")}
    places["tpcompile"] = ROOT / "tpcompile"
    kept = {".py", ".lark", ".toml", ".tpspec", ".typed"}
    return {
        f"{package}/{file.name}"
        for package, folder in places.items()
        for file in folder.iterdir()
        if file.is_file() and file.suffix in kept
    } | {"tpcompile/py.typed"}


def test_the_wheel_holds_every_file_of_the_package(unpacked: Path):
    shipped = {file.relative_to(unpacked).as_posix() for file in (unpacked / "tpcompile").rglob("*") if file.is_file()}
    assert shipped == tree_files()
    assert {"tpcompile/spec.lark", "tpcompile/py.typed", "tpcompile/passes/__init__.py"} <= shipped
    assert any(name.endswith(".tpspec") for name in shipped)


def test_the_wheel_works_away_from_the_checkout(unpacked: Path, tmp_path: Path):
    # A user may well have folders of these names in the directory where Python starts.
    for decoy in ("passes", "specs"):
        (tmp_path / decoy).mkdir()
        (tmp_path / decoy / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    package, passes, specs = done.stdout.splitlines()
    assert Path(package) == unpacked / "tpcompile" / "__init__.py"
    assert Path(passes) == unpacked / "tpcompile" / "passes" / "__init__.py"
    assert specs.split() == sorted(file.name for file in (ROOT / "specs").glob("*.tpspec"))


def test_the_links_and_the_packaging_table_agree():
    for name in ("passes", "specs"):
        link = ROOT / "tpcompile" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:root|home|work|Users)/[\w.~-]")


def machine_paths(text: str) -> list[str]:
    return [line for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_no_file_names_a_path_of_one_machine():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    found: dict[str, list[str]] = {}
    for name in listing.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and not file.is_symlink() and (lines := machine_paths(file.read_text(errors="ignore"))):
            found[name] = lines
    assert found == {}


def test_the_search_for_machine_paths_finds_one():
    assert machine_paths("see " + "/".join(["", "home", "someone", "x.py"]))
    assert not machine_paths("tests" + "/".join(["", "work", "x"]) + " and .." + "/".join(["", "home", "y"]))
