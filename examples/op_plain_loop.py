"""The op in a plain PyTorch loop: next-token training of a toy model that never stores its logits.

    python examples/op_plain_loop.py

A GRU reads a repeating text of random symbols; its output embedding is 20,000 x 128. The same loss
written with ``log_softmax`` would store a [tokens, 20,000] matrix, and its gradient, at every step.
"""

from __future__ import annotations

import torch
from torch import nn

import fastpref

VOCAB, HIDDEN, BATCH, LENGTH, STEPS = 20_000, 128, 4, 32, 20


def main() -> None:
    """Train for a few steps and print the loss."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (1, 17)).repeat(BATCH, 4)[:, : LENGTH + 1]
    embed, body = nn.Embedding(VOCAB, HIDDEN), nn.GRU(HIDDEN, HIDDEN, batch_first=True)
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    parameters = [*embed.parameters(), *body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)

    for step in range(STEPS):
        hidden, _ = body(embed(tokens[:, :-1]))  # (BATCH, LENGTH, HIDDEN)
        logps = fastpref.linear_logprobs(
            hidden, head.weight, tokens[:, 1:]
        )  # (BATCH, LENGTH), nats
        loss = -logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
