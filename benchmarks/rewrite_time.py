"""Time and memory of capture and of every pass, on the meta device: no weights, no GPU.

    python benchmarks/rewrite_time.py llama-8b --tp 8
    python benchmarks/rewrite_time.py llama-8b llama-70b llama-405b:32 llama-405b:63 llama-405b gpt3-175b --write

NAME:N is the shape with N layers. Each row runs in two processes of its own, so that peaks are its own: the first start
fills a compile cache, the second finds its capture there. ``--write`` records benchmarks/results/rewrite_time.json.
Seconds are those of the processor, all of it in one thread: what else runs on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-405b": {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "gpt3-175b": {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048},
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "rewrite_time.json"


def build(row: str) -> Any:
    """The model of a row, on meta."""
    import torch
    import transformers

    name, _, layers = row.partition(":")
    shape = dict(SHAPES[name])
    if layers:
        shape["n_layer" if "n_layer" in shape else "num_hidden_layers"] = int(layers)
    with torch.device("meta"):
        if name.startswith("gpt3"):
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def measure(row: str, degree: int) -> dict[str, object]:
    """Seconds per step and peak memory in this process."""
    import torch
    import transformers

    import tpcompile

    torch.set_num_threads(1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(row)
    inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.long), "use_cache": False}
    time.perf_counter = time.process_time  # what the timings of a program are made with
    start = time.process_time()
    program = tpcompile.rewrite(model, degree=degree, example_inputs=inputs)
    total = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {step: round(value, 3) for step, value in program.timings.items()}
    return {
        "model": row,
        "degree": degree,
        "parameters": sum(p.numel() for p in model.parameters()),
        "values": len(program.graph.nodes),
        "collectives": len(program.collectives),
        "total_seconds": round(total, 3),
        "capture_seconds": seconds.pop("capture"),
        "rewrite_seconds": round(sum(seconds.values()), 3),
        "passes": seconds,
        "peak_mb": round(peak / 1024),
        "peak_over_imports_mb": round((peak - base) / 1024),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def both_starts(row: str, degree: int) -> dict[str, object]:
    """A row of the first start, with the seconds of a second one beside it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TPCOMPILE_CACHE": folder}
        command = [sys.executable, __file__, row, "--tp", str(degree), "--here"]
        starts: list[dict[str, object]] = []
        for _ in range(2):
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            starts.append(json.loads(out.splitlines()[-1]))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    first, second = starts
    kept = ("total_seconds", "capture_seconds", "rewrite_seconds", "peak_mb")
    return {**first, "second_start": {name: second[name] for name in kept}, "cache_entry_kb": round(size / 1024)}


def main() -> None:
    """Measure each model named on the command line and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help=f"{', '.join(SHAPES)}, each of them with :LAYERS or without")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [row for row in options.models if row.partition(":")[0] not in SHAPES]:
        parser.error(f"no shape {', '.join(unknown)}; shapes are {', '.join(SHAPES)}")
    if options.here:
        print(json.dumps(measure(options.models[0], options.tp)))
        return
    rows: list[dict[str, object]] = []
    for name in options.models:
        row: dict[str, Any] = both_starts(name, options.tp)
        rows.append(row)
        print(f"{name:<13} capture {row['capture_seconds']:6.2f} s  rewrite {row['rewrite_seconds']:5.2f} s  "
              f"peak {row['peak_mb']} MB  second start {row['second_start']['total_seconds']:5.2f} s  "
              f"{row['values']} values  {row['passes']}", flush=True)  # fmt: skip
        if options.write:
            write(rows)


def write(rows: list[dict[str, object]]) -> None:
    """Record the rows so far, all of them or none."""
    command = "python benchmarks/rewrite_time.py " + " ".join(sys.argv[1:])
    RESULTS.parent.mkdir(exist_ok=True)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n")
    part.replace(RESULTS)


if __name__ == "__main__":
    main()
