"""A small GPT-2 trained for a few steps on every rank torchrun starts, beside the same model on one device.

torchrun --nproc-per-node 2 examples/two_ranks.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

import tpcompile


def main() -> None:
    """Train both for five steps and print the two losses side by side."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(0, 128, (4, 32))

    cut = tpcompile.compile(model, example_inputs={"input_ids": ids, "use_cache": False})
    steps = {"one device": model, f"{dist.get_world_size()} ranks": cut}
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=1e-2) for name, module in steps.items()}
    for step in range(5):
        losses: dict[str, float] = {}
        for name, module in steps.items():
            torch.manual_seed(step)  # the same dropout masks for both
            logits = module(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name] = loss.item()
        if dist.get_rank() == 0:
            print(f"step {step}  " + "  ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
