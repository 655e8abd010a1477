"""docs/benchmarks.md from the recorded results: what was measured, with its spread, and where a peer is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.workloads import MODES, WORKLOADS

Row = Mapping[str, Any]
OWN = ("tpcompile", "tpcompile, inductor", "tpcompile, shared memory", "tpcompile, sequence")
IN_SHARED_MEMORY = {("DeepSpeed", "inference")}  # peers that are compared with what adds up there, too
FLOOR_OF = {name: "floor, sequence" if "sequence" in name else "floor" for name in CONTENDERS}
PHASES = ("forward", "backward", "optimizer")
INTRODUCTION = """\
# tpcompile beside its peers

Generated from `benchmarks/results/compare.json`. Take the numbers of your own machine with one command, and write this
page again with the other:

```bash
python -m benchmarks.compare
python -m benchmarks.compare --write-docs
```

**The floor** is one rank of the model written by hand on plain tensors as Megatron-LM cuts it
(`benchmarks/peers/floor.py`): f and g, packed q, k and v, packed gate and up, torch's fused norms, causal attention
without a mask, embedding, head and cross-entropy cut along the vocabulary. Its outputs and all its gradients are tested
against one device.

All contenders of a workload live in the same two processes with one thread each, on gloo where they do not say
otherwise, and run in turn: one sample of each per round, in random order. A figure is the median over the rounds of
the ratio to the floor *in the same round*, with its quartiles; below 1 is faster than the floor. What else the machine
does falls on all of them. *CPU* is the processor time of a rank, its communication threads included. Collectives,
bytes (what a rank sends in a ring) and memory (the peak of live tensors within a step, with weights and AdamW's
states) are read off torch's profiler. Errors are relative to one device, in float32. In training only the loss is
asked for: a contender that can leave the logits cut does.
"""


def document(results: Row, one_rank: Row) -> str:
    """The page, from what benchmarks/compare.py and benchmarks/one_rank.py recorded."""
    found: Row = results["workloads"]
    parts = [
        INTRODUCTION,
        _machine(results),
        _summary(found),
        _better(found),
        _contenders(),
        *(_workload(name, row) for name, row in found.items()),
        _four_ranks(found),
        _resident(results.get("resident")),
        _one_rank(one_rank.get("rows", {})),
    ]
    return "\n".join(part for part in parts if part)


def ratios(rows: Row, name: str, base: str, kind: str) -> tuple[float, float, float] | None:
    """Median and quartiles of the per-round ratios of two contenders; None where one of them has no samples."""
    own, other = rows.get(name, {}).get(kind), rows.get(base, {}).get(kind)
    if not own or not other:
        return None
    each = [x / y for x, y in zip(own, other, strict=True)]
    low, _, high = quantiles(each, n=4)
    return median(each), low, high


def _machine(results: Row) -> str:
    machine: Row = results["machine"]
    loads = [x for row in results["workloads"].values() for mode in MODES for x in row[mode]["load"]]
    missing = [name for name in WORKLOADS if name not in results["workloads"]]
    rest = f" Not taken there: {', '.join(missing)}." if missing else ""
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("cores", "machine"))
    return (
        f"Taken on {machine['cores']} cores ({machine['machine']}) that were shared with other work (load average "
        f"{min(loads):.1f} to {max(loads):.1f}), {versions}.{rest}\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spread(found: tuple[float, float, float] | None) -> str:
    return "-" if found is None else "{:.2f} ({:.2f} to {:.2f})".format(*found)


def _totals(row: Row) -> tuple[int, int]:
    """Collectives of a step, and the bytes of them."""
    counts = [count for phase in row["collectives"].values() for count in phase.values()]
    return sum(n for n, _ in counts), sum(size for _, size in counts)


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f}"


def _summary(found: Row) -> str:
    rows: list[list[str]] = []
    for name, work in found.items():
        for mode in MODES:
            every = work[mode]["contenders"]
            own, floor = every["tpcompile"], every["floor"]
            same = "same" if _totals(own) == _totals(floor) else f"{_totals(own)} for {_totals(floor)}"
            rows.append([
                name, mode, _spread(ratios(every, "tpcompile", "floor", "wall")),
                _spread(ratios(every, "tpcompile", "floor", "cpu")), same,
                f"{own['memory']['peak'] / floor['memory']['peak']:.3f}",
                _spread(ratios(every, "tpcompile, inductor", "floor", "wall")),
                _spread(ratios(every, "tpcompile, shared memory", "floor", "wall")),
            ])  # fmt: skip
    head = (
        "workload", "", "tpcompile: time", "CPU", "collectives, bytes", "peak memory", "with torch.compile: time",
        "in shared memory: time",
    )  # fmt: skip
    return "## tpcompile, as a ratio to the floor\n\n" + _table(head, rows)


def _better(found: Row) -> str:
    """What is better than eager tpcompile: by the whole spread, or by any count or byte of memory."""
    lines: list[str] = []
    for name, work in found.items():
        for mode in MODES:
            every = work[mode]["contenders"]
            lines += [f"* {name}, {mode}: {line}" for line in _where_better(every, mode)]
    if not lines:
        return "## Where another one is better\n\nNowhere, in what was measured.\n"
    text = (
        "A time is listed if the upper quartile of its ratio is below 1, memory if it is 1% less. In inference,\n"
        'DeepSpeed adds up in shared memory: there it is beside tpcompile on the backend "shm".\n\n'
    )
    return "## Where another one is better than eager tpcompile\n\n" + text + "\n".join(lines) + "\n"


def _where_better(every: Row, mode: str) -> Iterator[str]:
    for name, row in every.items():
        if name in OWN or "failed" in row or not row:
            continue
        base = "tpcompile"
        if (name, mode) in IN_SHARED_MEMORY and "collectives" in every.get("tpcompile, shared memory", {}):
            base = "tpcompile, shared memory"
        own = every[base]
        for kind, says in (("wall", "time"), ("cpu", "CPU")):
            found = ratios(every, name, base, kind)
            if found is not None and found[2] < 1:
                yield f"{name} takes {_spread(found)} of its {says}"
        if not CONTENDERS[name].alone and "collectives" in row:
            (calls, size), (own_calls, own_size) = _totals(row), _totals(own)
            if calls < own_calls or size < own_size:
                yield f"{name} has {calls} collectives of {_mib(size)} MiB for {own_calls} of {_mib(own_size)} MiB"
            peak = row["memory"]["peak"] / own["memory"]["peak"]
            if peak < 0.99:
                yield f"{name} has a peak of {peak:.3f} of its memory"


def _contenders() -> str:
    rows = [[name, contender.says] for name, contender in CONTENDERS.items()]
    return "## Contenders\n\n" + _table(("", ""), rows)


def _counts(phase: Mapping[str, Sequence[int]]) -> str:
    short = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS"}
    return " + ".join(f"{n} {short.get(kind, kind)}" for kind, (n, _) in sorted(phase.items())) or "0"


def _workload(name: str, work: Row) -> str:
    parts = [f"## {name}\n\n{work['says'][0].upper()}{work['says'][1:]}; {work['rounds']} rounds.\n"]
    for mode in MODES:
        every = work[mode]["contenders"]
        phases = PHASES[:1] if mode == "inference" else PHASES
        head = [mode, "time / floor", "CPU / floor", *phases, "MiB sent", "peak MiB", "error"]
        rows = [_measured(every, contender, phases) for contender, row in every.items() if "failed" not in row]
        parts.append(_table(head, rows))
        parts += [f"* {c}: {row['failed']}" for c, row in every.items() if "failed" in row]
        if any("failed" in row for row in every.values()):
            parts.append("")
    return "\n".join(parts)


def _measured(every: Row, name: str, phases: Sequence[str]) -> list[str]:
    row = every[name]
    times = [_spread(ratios(every, name, "floor", kind)) for kind in ("wall", "cpu")]
    if "collectives" not in row:  # not all of it was counted
        return [name, *times, *("-" for _ in phases), "-", "-", _error(row["errors"])]
    counts = [_counts(row["collectives"].get(phase, {})) for phase in phases]
    return [name, *times, *counts, _mib(_totals(row)[1]), _mib(row["memory"]["peak"]), _error(row["errors"])]


def _error(errors: Row) -> str:
    if "wrong" in errors:
        return f"**wrong**: {errors['wrong']}"
    gradient = f", gradients {errors['gradient']:.0e}" if "gradient" in errors else ""
    return f"{errors['output']:.0e}{gradient}"


def _four_ranks(found: Row) -> str:
    rows: list[list[str]] = []
    for name, work in found.items():
        for contender, row in work["four ranks"].items():
            if "failed" in row:
                rows.append([name, contender, row["failed"][:80], "", ""])
            else:
                counts = [_counts(row["collectives"][phase]) for phase in PHASES[:2]]
                rows.append([name, contender, *counts, _mib(_totals(row)[1])])
    return "## Four ranks, training: collectives alone\n\n" + _table(("", "", "forward", "backward", "MiB sent"), rows)


def _resident(resident: Row | None) -> str:
    if resident is None:
        return ""
    says = (
        f"## Resident memory, training {resident['workload']}\n\nEach contender in processes of its own: the largest "
        "resident size of a rank in three steps, above what it had with everything imported.\n\n"
    )
    rows = [[c, peak if isinstance(peak, str) else f"{_mib(peak)} MiB"] for c, peak in resident["peak"].items()]
    return says + _table(("", ""), rows)


def _one_rank(found: Mapping[str, Row]) -> str:
    if not found:
        return ""
    says = (
        "## One rank alone\n\nWhat a rank does itself: its collectives are local copies of the same size "
        "(`python -m benchmarks.one_rank`). *Host* is the processor time until the last kernel was started, on a CPU "
        "until it has ended. The roofline takes for every op the time to compute or to move its bytes, whichever "
        "is longer, at the speed that this device reaches in a large product and a large copy; its share is of the "
        "fastest step. Training is loss and backward.\n\n"
    )
    head = ("", "ranks", "", "dtype, device", "", "time / floor", "host / floor", "ms", "of roofline", "peak MiB")
    rows: list[list[str]] = []
    for row in found.values():
        every, roofline = row["contenders"], row["roofline"]
        for name, own in every.items():
            rows.append([
                row["workload"], str(row["degree"]), row["mode"], f"{row['dtype']}, {row['device']}", name,
                *(_spread(ratios(every, name, "floor", kind)) for kind in ("wall", "host")),
                f"{median(own['wall']) * 1e3:.2f}", f"{roofline['seconds'] / min(own['wall']):.0%}",
                _mib(own["peak"]) if "peak" in own else "-",
            ])  # fmt: skip
    return says + _table(head, rows)


__all__ = ["document", "ratios"]
