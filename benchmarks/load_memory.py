"""Memory and bytes of ``tpcompile.from_pretrained``, measured on gloo processes: what a rank takes beside its shards.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --gib 2 --ranks 2 4 --write

Makes a Llama checkpoint of random weights in a temporary folder, in files of 512 MB. Per rank: the bytes of its
parameters (shards), the bytes it read from the files, and its peak of resident memory (VmHWM), over two base lines:
``total`` over the imports, with building and rewriting the model, and ``loading`` over the peak of a process that has
rewritten the same model without weights. Capture and rewriting take what they take however large the weights are.
``--write`` records benchmarks/results/load_memory.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "load_memory.json"
WIDTH = 2048


def make(directory: Path, gib: float, dtype: torch.dtype) -> None:
    """Files of random weights and a config.json, a layer at a time."""
    import transformers
    from safetensors.torch import save_file

    layer = 4 * WIDTH**2 + 3 * WIDTH * 5504
    layers = max(2, round(gib * 2**30 / dtype.itemsize / layer))
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=8192, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        file = f"model-{len(set(weight_map.values())) + (not held):05}.safetensors"
        held[name] = torch.randn(shape, dtype=dtype) * 0.02
        weight_map[name] = file
        if sum(x.nbytes for x in held.values()) > 512e6 or number == len(shapes) - 1:
            save_file(held, directory / file, {"format": "pt"})
            held = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since it began (ru_maxrss begins with the parent's)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def rank(directory: str, load: bool) -> dict[str, Any]:
    """On one process: load the checkpoint, or only build and rewrite its model."""
    import transformers.models.llama.modeling_llama

    import tpcompile
    import tpcompile.pretrained
    from tpcompile.checkpoint_files import Checkpoint

    transformers.models.llama.modeling_llama.LlamaForCausalLM  # noqa: B018 - imported now
    base = resident("VmRSS")
    if not load:
        from tpcompile.huggingface import without_weights

        size = torch.distributed.get_world_size()
        tpcompile.rewrite(without_weights(Path(directory), None, torch.float32), degree=size)
        return {"peak": resident("VmHWM") - base}
    opened: list[Checkpoint] = []
    keep = Checkpoint.__init__

    def kept(self: Checkpoint, place: Path) -> None:
        opened.append(self)
        keep(self, place)

    Checkpoint.__init__ = kept
    start = time.perf_counter()
    module = tpcompile.from_pretrained(directory)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - base
    parts = [p.numel() * p.element_size() for p in module.parameters()]
    return {
        "peak": peak,
        "shards": sum(parts),
        "largest": max(parts),
        "bytes_read": opened[0].bytes_read,
        "seconds": round(seconds, 2),
    }


def measure(directory: Path, ranks: int) -> list[dict[str, Any]]:
    from tpcompile.launch import launch

    without = launch(rank, ranks, (str(directory), False), 900.0)
    rows: list[dict[str, Any]] = []
    for number, (found, bare) in enumerate(
        zip(launch(rank, ranks, (str(directory), True), 900.0), without, strict=True)
    ):
        loading = found["peak"] - bare["peak"]
        goal = 1.1 * found["shards"] + found["largest"]
        rows.append(
            {
                "ranks": ranks,
                "rank": number,
                **found,
                "rewriting": bare["peak"],
                "loading": loading,
                "read_over_shards": round(found["bytes_read"] / found["shards"], 5),
                "total_over_shards": round(found["peak"] / found["shards"], 3),
                "loading_over_shards": round(loading / found["shards"], 3),
                "goal_met_by": [name for name, x in (("total", found["peak"]), ("loading", loading)) if x <= goal],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), asked.gib, getattr(torch, asked.dtype))
        total = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"checkpoint of {total / 2**20:.0f} MiB in {asked.dtype}; MiB")
        print(
            f"{'rank':>6}{'shards':>9}{'read':>9}{'total':>9}{'rewriting':>11}{'loading':>9}{'seconds':>9}  goal met by"
        )
        rows: list[dict[str, Any]] = []
        for ranks in asked.ranks:
            for row in measure(Path(folder), ranks):
                columns = [row[n] / 2**20 for n in ("shards", "bytes_read", "peak", "rewriting", "loading")]
                shown = "".join(f"{x:{w}.1f}" for x, w in zip(columns, (9, 9, 9, 11, 9), strict=True))
                print(f"{row['rank']:>3}/{ranks:<2}{shown}{row['seconds']:>9.1f}  {', '.join(row['goal_met_by'])}")
                rows.append(row)
    if asked.write:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        record = {**machine, "checkpoint_bytes": total, "dtype": asked.dtype, "rows": rows}
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
