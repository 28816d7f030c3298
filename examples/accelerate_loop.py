"""DPO in a loop of your own, with Accelerate alone: packed batches, one forward, any loss.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py        # several processes, mixed precision, FSDP

Prompts are held once for both responses and rows are packed without padding; the model's own
forward runs, and its logits are never stored.
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from datasets import Dataset

from fastpref import losses
from fastpref.data import PreferenceCollator, tokenize_dataset
from fastpref.demo import tiny_model, tiny_pairs
from fastpref.ops import segment_sum
from fastpref.policy import response_logps


def main() -> None:
    """Train for a few steps and print loss and accuracy."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    model, tokenizer = tiny_model()
    reference = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
    rows, report = tokenize_dataset(Dataset.from_list(tiny_pairs(32)), tokenizer)
    accelerator.print(f"{len(rows)} pairs, {report.bad} dropped")
    loader = torch.utils.data.DataLoader(
        rows, batch_size=8, shuffle=True, collate_fn=PreferenceCollator(tokenizer.pad_token_id)
    )
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader
    )
    dpo = losses.get("dpo")
    for epoch in range(3):
        for batch in loader:
            logps = segment_sum(response_logps(model, batch).logps, batch["cu_seqlens"])
            with torch.no_grad():
                ref = segment_sum(response_logps(reference, batch).logps, batch["cu_seqlens"])
            chosen, rejected = batch["pairs"].T
            pairs = losses.PairLogps(
                chosen=logps[chosen],
                rejected=logps[rejected],
                ref_chosen=ref[chosen],
                ref_rejected=ref[rejected],
            )
            loss = dpo(pairs, beta=0.1).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        won = (pairs.margin > 0).float().mean()
        accelerator.print(f"epoch {epoch}  loss {loss.item():.4f}  accuracy {won.item():.2f}")


if __name__ == "__main__":
    main()
