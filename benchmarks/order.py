"""How even the tokens of steps and micro-batches are under each order of the data.

    python benchmarks/order.py

20,000 examples of log-normal length (median 400 tokens, sigma 0.6, cut at 2,048), one epoch; prints
the table of ``docs/data.md``. Nothing is timed: the numbers are the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastpref.data.sampling import EvenTokens

EXAMPLES = 20_000
LAYOUTS = ((8, 1), (4, 4), (1, 16))


def lengths() -> np.ndarray:
    """Tokens of each example."""
    drawn = np.random.default_rng(0).lognormal(np.log(400), 0.6, EXAMPLES)
    return np.clip(drawn.astype(np.int64), 16, 2048)


def orders(tokens: np.ndarray, batch_size: int, batches: int) -> dict[str, list[int]]:
    """The examples of an epoch, by strategy."""
    generator = torch.Generator().manual_seed(0)
    grouped = LengthGroupedSampler(
        batch_size * batches, lengths=tokens.tolist(), generator=generator
    )
    return {
        "random": np.random.default_rng(0).permutation(len(tokens)).tolist(),
        "even_tokens": list(EvenTokens(tokens.tolist(), batch_size, batches, seed=0)),
        "group_by_length": list(grouped),
    }


def spread(tokens: np.ndarray, order: list[int], size: int) -> str:
    """Largest and standard deviation of the tokens of as many examples, over their mean."""
    sums = tokens[order[: len(order) // size * size]].reshape(-1, size).sum(1)
    return f"{sums.max() / sums.mean():.2f} | {sums.std() / sums.mean():.3f}"


def main() -> None:
    """Print the table."""
    print("| pairs | strategy | step: max | std | micro-batch: max | std |")
    print("| --- | --- | --- | --- | --- | --- |")
    tokens = lengths()
    for batch_size, batches in LAYOUTS:
        for name, order in orders(tokens, batch_size, batches).items():
            step, micro = (spread(tokens, order, n) for n in (batch_size * batches, batch_size))
            print(f"| {batches} x {batch_size} | `{name}` | {step} | {micro} |")


if __name__ == "__main__":
    main()
