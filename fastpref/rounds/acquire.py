"""Which examples are worth an oracle's answer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def entropy(logps: Sequence[float]) -> float:
    """Monte-Carlo entropy of a prompt's responses, nats: minus their mean log-probability.

    Args:
        logps: Of responses drawn at temperature 1, summed over their tokens.
    """
    return -sum(logps) / len(logps)


def uncertainty(reward_a: float, reward_b: float) -> float:
    """``1 - 2 |sigmoid(reward_a - reward_b) - 1/2|``: 1 where a pair is undecided, else nearer 0.

    Args:
        reward_a: Implicit reward of one response, beta in it.
        reward_b: Of the other.
    """
    gap = abs(reward_a - reward_b)
    return 2 * math.exp(-gap) / (1 + math.exp(-gap))


def keep(values: Sequence[float], n: int, which: str, seed: int) -> list[int]:
    """Numbers of ``n`` of the values; ties are broken at random.

    Args:
        values: One for each candidate.
        n: How many to keep; all, if there are fewer.
        which: ``"largest"``, ``"smallest"``, ``"middle"`` (around the median) or ``"tails"`` (half
            from each end).
        seed: Of the order among ties.

    Returns:
        Numbers in rising order.

    Raises:
        ValueError: ``which`` is unknown.

    Source: Muldrew et al. 2024, arXiv:2402.08114.
    """
    draw = random.Random(seed)
    order = sorted(range(len(values)), key=lambda i: (values[i], draw.random()))
    n = min(n, len(order))
    if which == "largest":
        kept = order[len(order) - n :]
    elif which == "smallest":
        kept = order[:n]
    elif which == "middle":
        start = (len(order) - n) // 2
        kept = order[start : start + n]
    elif which == "tails":
        kept = order[: n - n // 2] + order[len(order) - n // 2 :]
    else:
        raise ValueError(f"which must be 'largest', 'smallest', 'middle' or 'tails', got {which!r}")
    return sorted(kept)
