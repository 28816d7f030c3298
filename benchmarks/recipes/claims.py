"""What an experiment is: a function of a seed, and what is expected of its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Numbers = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """Something that is expected: ``advantage`` of an experiment's numbers should be above 0."""

    text: str
    advantage: Callable[[Numbers], float]


@dataclass(frozen=True)
class Experiment:
    """A function of a seed, and what is expected of its numbers."""

    run: Callable[[int], Numbers]
    claims: tuple[Claim, ...]


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(
    **claims: tuple[str, Callable[[Numbers], float]],
) -> Callable[[Callable[[int], Numbers]], Callable[[int], Numbers]]:
    """Register a function under its name, with its claims."""

    def note(run: Callable[[int], Numbers]) -> Callable[[int], Numbers]:
        EXPERIMENTS[run.__name__] = Experiment(run, tuple(Claim(*c) for c in claims.values()))
        return run

    return note


def exceeds(one: str, other: str) -> Callable[[Numbers], float]:
    """How far one number lies above another."""
    return lambda n: n[one] - n[other]


def smallest_step(*names: str) -> Callable[[Numbers], float]:
    """The smallest rise from one number to the next: above 0, they rise all the way."""
    return lambda n: min(n[b] - n[a] for a, b in itertools.pairwise(names))


def average(values: Iterable[float]) -> float:
    """The mean."""
    found = list(values)
    return sum(found) / len(found)
