"""A loss of your own: three lines, and it works in a loop, in the trainer and on the command line.

    python examples/own_loss.py

The loop is the smallest one that has everything: hidden states of a policy and of a frozen
reference turned into log-probabilities of the response tokens, summed by response, compared by the
loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpref
from fastpref import losses

PAIRS, TOKENS, HIDDEN, VOCAB = 4, 12, 64, 1_000


@losses.register("softplus_margin", needs={"ref"})
def softplus_margin(pairs: losses.PairLogps, *, beta: float = 0.1, target: float = 1.0) -> Tensor:
    """DPO's margin, asked to exceed a target reward difference."""
    return F.softplus(target - beta * pairs.margin)


def main() -> None:
    """Fit made-up pairs with the loss and print how often the chosen response wins."""
    torch.manual_seed(0)
    # 2 * PAIRS responses end to end: first the chosen ones, then the rejected ones
    x = torch.randn(2 * PAIRS * TOKENS, HIDDEN)
    targets = torch.randint(VOCAB, (2 * PAIRS * TOKENS,))
    cu_seqlens = torch.arange(0, 2 * PAIRS * TOKENS + 1, TOKENS, dtype=torch.int32)
    head = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    policy = nn.Linear(HIDDEN, HIDDEN)
    with torch.no_grad():
        reference = fastpref.sequence_logprobs(policy(x), head.weight, targets, cu_seqlens)

    loss_function = losses.get("softplus_margin")
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    for step in range(20):
        logps = fastpref.sequence_logprobs(policy(x), head.weight, targets, cu_seqlens)
        pairs = losses.PairLogps(
            chosen=logps[:PAIRS],
            rejected=logps[PAIRS:],
            ref_chosen=reference[:PAIRS],
            ref_rejected=reference[PAIRS:],
        )
        loss = loss_function(pairs, beta=0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == 19:
            wins = int((pairs.margin > 0).sum())
            print(f"step {step:2d}  loss {loss.item():.4f}  chosen preferred in {wins} of {PAIRS}")


if __name__ == "__main__":
    main()
