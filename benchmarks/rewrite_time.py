"""Time and memory of capture and of every pass, on the meta device: no weights, no GPU.

    python benchmarks/rewrite_time.py llama-7b --tp 8
    python benchmarks/rewrite_time.py llama-7b llama-70b --tp 8 --write

Each model runs in a process of its own, so that peaks are its own; ``--write`` records
benchmarks/results/rewrite_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

SHAPES = {
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
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "rewrite_time.json"


def measure(name: str, degree: int) -> dict[str, object]:
    """Seconds per step and peak memory in this process."""
    import torch
    import transformers

    import tpcompile

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[name]))
    inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.long), "use_cache": False}
    program = tpcompile.rewrite(model, degree=degree, example_inputs=inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {step: round(value, 3) for step, value in program.timings.items()}
    return {
        "model": name,
        "degree": degree,
        "parameters": sum(p.numel() for p in model.parameters()),
        "values": len(program.graph.nodes),
        "collectives": len(program.collectives),
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


def main() -> None:
    """Measure each model named on the command line in a fresh process and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=SHAPES)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.models[0], options.tp)))
        return
    rows: list[dict[str, object]] = []
    for name in options.models:
        command = [sys.executable, __file__, name, "--tp", str(options.tp), "--here"]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append(row)
        print(f"{name:<11} capture {row['capture_seconds']:6.2f} s  rewrite {row['rewrite_seconds']:5.2f} s  "
              f"peak {row['peak_mb']} MB  {row['values']} values  {row['passes']}", flush=True)  # fmt: skip
    if options.write:
        command_line = "python benchmarks/rewrite_time.py " + " ".join(sys.argv[1:])
        RESULTS.parent.mkdir(exist_ok=True)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps({"command": command_line, "rows": rows}, indent=2) + "\n")
        part.replace(RESULTS)


if __name__ == "__main__":
    main()
