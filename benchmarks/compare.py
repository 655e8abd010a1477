"""How tpcompile compares with what people would use instead, and how far it is from a reference written by hand.

    python -m benchmarks.compare                                  # everything; recorded after every workload
    python -m benchmarks.compare --workloads llama --rounds 40    # one workload again
    python -m benchmarks.compare --write-docs                     # docs/benchmarks.md from what is recorded

Two processes on this machine for times, memory and errors, four for counts alone. Results of a workload replace those
recorded before in benchmarks/results/compare.json; contenders that are not installed are recorded as such.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import measure
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.document import document
from benchmarks.peers.workloads import MODES, WORKLOADS, tiny
from tpcompile.launch import launch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compare.json"
ONE_RANK = RESULTS.with_name("one_rank.json")  # benchmarks/one_rank.py records it
DOCUMENT = ROOT / "docs" / "benchmarks.md"
COUNTED = (
    "floor",
    "floor, sequence",
    "tpcompile",
    "tpcompile, sequence",
    "DTensor",
    "DTensor, sequence",
    "transformers",
)
TIMEOUT = 3000.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def can_run(name: str) -> str | None:
    """Why the contender cannot run here at all, or None: a library's crash must not take the others down."""
    try:
        failed = launch(measure.compare, 2, ([name], tiny("llama"), "inference", 0, torch.float32), 300.0)[0][name]
    except Exception as error:  # noqa: BLE001 - a peer's failure is a result
        return f"its processes ended: {error}".splitlines()[0][:200]
    return failed.get("failed")


def measured(name: str, contenders: Sequence[str], rounds: int, absent: dict[str, str]) -> dict[str, Any]:
    """One workload: both modes on two ranks, and counts on four."""
    work, found = WORKLOADS[name], dict[str, Any]()
    running = [c for c in contenders if c not in absent]
    for mode in MODES:
        load = os.getloadavg()[0]
        rows = launch(measure.compare, 2, (running, work, mode, rounds, torch.float32), TIMEOUT)[0]
        rows |= {c: {"failed": why} for c, why in absent.items()}
        found[mode] = {"load": [load, os.getloadavg()[0]], "contenders": {c: rows[c] for c in contenders}}
    counted = [c for c in running if c in COUNTED]
    on_four = launch(measure.compare, 4, (counted, work, "training", 0, torch.float32), TIMEOUT)[0]
    found["four ranks"] = {c: {k: row[k] for k in row if k in ("collectives", "failed")} for c, row in on_four.items()}
    return {"says": work.says, "rounds": rounds, **found}


def resident(name: str, contenders: Sequence[str]) -> dict[str, Any]:
    """Peak resident memory of training, each contender in processes of its own."""
    found: dict[str, Any] = {}
    for contender in contenders:
        try:
            rows = launch(measure.resident, 2, (contender, WORKLOADS[name], "training"), TIMEOUT)
            found[contender] = max(row["peak"] for row in rows)
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result
            found[contender] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    names = ("torch", "transformers", "deepspeed")
    versions = {name: version for name in names if (version := _version(name)) is not None}
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), **versions}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def recorded(path: Path = RESULTS) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write results whole or not at all, a list of samples on one line."""
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(results, indent=1))
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--resident", default="llama", help="the workload of the resident memory, or nothing")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md, and measure nothing")
    asked = parser.parse_args(argv)
    if asked.write_docs:
        DOCUMENT.write_text(document(recorded(), recorded(ONE_RANK)))
        return
    os.environ |= ENVIRONMENT
    contenders = asked.contenders.split(";")
    absent = {c: why for c in contenders if c == "DeepSpeed" and (why := can_run(c)) is not None}
    for name in asked.workloads.split(","):
        start = time.perf_counter()
        found = measured(name, contenders, asked.rounds, absent)
        workloads = recorded().get("workloads", {}) | {name: found}
        write_json(RESULTS, recorded() | {"machine": recorded().get("machine", {}) | machine(), "workloads": workloads})
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if asked.resident:
        kept = {
            "workload": asked.resident,
            "peak": resident(asked.resident, [c for c in contenders if c not in absent]),
        }
        write_json(RESULTS, recorded() | {"resident": kept})


if __name__ == "__main__":
    main()
