"""A reference-free loss in Lightning Fabric: SimPO over hidden states of a module of your own.

    pip install lightning-fabric
    python examples/fabric_loop.py

The head is applied inside ``forward``, by the fused op, so that Fabric's wrappers (DDP, FSDP, mixed
precision) see one call that returns log-probabilities.
"""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import fastpref
from fastpref import losses

PAIRS, TOKENS, HIDDEN, VOCAB = 8, 16, 64, 5_000


class Policy(nn.Module):
    """A GRU language model that scores sequences instead of returning logits."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.body = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probability of each row of ``tokens (B, T)`` after its first token, ``(B,)``."""
        hidden, _ = self.body(self.embed(tokens[:, :-1]))
        return fastpref.linear_logprobs(hidden, self.head.weight, tokens[:, 1:]).sum(-1)


def main() -> None:
    """Prefer sequences that count up to random ones, and print loss and accuracy."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    model = Policy()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    simpo = losses.get("simpo")
    lengths = torch.full((PAIRS,), TOKENS - 1, device=fabric.device)
    start = torch.randint(VOCAB - TOKENS, (PAIRS, 1), device=fabric.device)
    rising = start + torch.arange(TOKENS, device=fabric.device)
    random = torch.randint(VOCAB, (PAIRS, TOKENS), device=fabric.device)
    for step in range(20):
        chosen, rejected = model(torch.cat([rising, random])).chunk(2)
        pairs = losses.PairLogps(
            chosen=chosen, rejected=rejected, chosen_lengths=lengths, rejected_lengths=lengths
        )
        loss = simpo(pairs).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if step % 5 == 0 or step == 19:
            won = (chosen > rejected).float().mean()
            print(f"step {step:2d}  loss {loss.item():.4f}  accuracy {won.item():.2f}")


if __name__ == "__main__":
    main()
