"""Data of earlier rounds beside the new: a mix of offline and generated pairs, a replay buffer."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from fastpref.rounds.run import Row

logger = logging.getLogger("fastpref")

Item = TypeVar("Item")


def replay_counts(
    offline: int, generated: int, gamma: float, convention: str = "round"
) -> tuple[int, int]:
    """How many generated and how many offline pairs a round trains on.

    Args:
        offline: Offline pairs there are.
        generated: Generated pairs there are.
        gamma: Share of offline pairs, in [0, 1]; 0: only generated ones, 1: only offline ones.
        convention: ``"round"``, or ``"truncate"``: what the authors' code does, whose truncated
            floats lose a pair here and there.

    Returns:
        Number of generated pairs ``min(offline * (1 - gamma), generated)``, and of offline pairs
        ``gamma / (1 - gamma)`` times as many.

    Raises:
        ValueError: ``gamma`` or ``convention`` is out of range.

    Source: Chen et al. 2024, arXiv:2406.09760 (DICE), section 4 and its released code.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is a share: expected 0 to 1, got {gamma}")
    if convention not in ("round", "truncate"):
        raise ValueError(f"convention must be 'round' or 'truncate', got {convention!r}")
    if gamma == 1:
        return 0, offline
    whole = round if convention == "round" else int
    new = min(whole(offline * (1 - gamma)), generated)
    return new, whole(gamma * new / (1 - gamma))


def replay_mix(
    offline: Sequence[Row],
    generated: Sequence[Row],
    gamma: float,
    seed: int,
    convention: str = "round",
) -> list[Row]:
    """Generated pairs, and offline pairs of other prompts, in the shares of :func:`replay_counts`.

    Args:
        offline: Pairs with ``prompt``.
        generated: The same.
        gamma: Share of offline pairs.
        seed: Of what is drawn.
        convention: As for :func:`replay_counts`.

    Returns:
        Rows of both, without replacement, shuffled.

    Raises:
        ValueError: the shares of so few pairs are none at all.
    """
    new, old = replay_counts(len(offline), len(generated), gamma, convention)
    if not new + old:
        raise ValueError(
            f"gamma={gamma} of {len(offline)} offline and {len(generated)} generated pairs leaves "
            "none to train on: give more offline pairs, or a gamma that is lower"
        )
    draw = random.Random(seed)
    drawn = draw.sample(list(generated), new)
    seen = {repr(row["prompt"]) for row in drawn}
    others = [row for row in offline if repr(row["prompt"]) not in seen]
    if old > len(others):
        logger.warning(
            "%d offline pairs were wanted and %d have prompts that were not drawn: these are taken",
            old,
            len(others),
        )
    mixed = drawn + draw.sample(others, min(old, len(others)))
    draw.shuffle(mixed)
    return mixed


class ReplayBuffer(Generic[Item]):
    """A queue of fixed size that is drawn from in proportion to ``1 / (1 + times drawn)``.

    Args:
        capacity: Most items it holds; the oldest goes when another comes.

    Source: Yin et al. 2024, arXiv:2405.20830 (SAPO), section 3.2.
    """

    def __init__(self, capacity: int) -> None:
        """See the class."""
        if capacity < 1:
            raise ValueError(f"a replay buffer holds at least 1 item, got capacity={capacity}")
        self.items: deque[Item] = deque(maxlen=capacity)
        self.counts: deque[int] = deque(maxlen=capacity)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def push(self, item: Item) -> None:
        """Put an item in, drawn 0 times so far."""
        self.items.append(item)
        self.counts.append(0)

    def probabilities(self) -> list[float]:
        """Probability of each item, oldest first, to be drawn next."""
        weights = [1 / (1 + count) for count in self.counts]
        return [weight / sum(weights) for weight in weights]

    def draw(self, size: int, draw: random.Random) -> list[Item]:
        """``size`` items, with replacement; each counts as drawn once more.

        Raises:
            ValueError: the buffer is empty.
        """
        if not self.items:
            raise ValueError("the replay buffer is empty")
        numbers = draw.choices(range(len(self.items)), self.probabilities(), k=size)
        for number in numbers:
            self.counts[number] += 1
        return [self.items[number] for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        """Items and counts, oldest first."""
        return {"items": list(self.items), "counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.items.clear()
        self.counts.clear()
        self.items.extend(state["items"])
        self.counts.extend(state["counts"])
