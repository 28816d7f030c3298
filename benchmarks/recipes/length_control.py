"""How well the length-controlled win rate finds what equally long answers would win.

    python benchmarks/recipes/length_control.py     # the table of docs/recipes/reports.md, a minute

Preferences are drawn from the model that the estimate fits: the truth is known. ``phi`` is how much
a longer answer is liked, and the answers are longer than the others by 60 characters, give or take
60. A strength is the C of the penalty ``phi^2 / (2 C)``: the larger, the weaker.
"""

from __future__ import annotations

import itertools

import numpy as np

from fastpref.rounds.winrate import Array, length_controlled

PROMPTS, EFFECTS, TRUTHS = (24, 64, 200), (0.0, 1.0, 2.0, 4.0), (0.0, 1.0)
STRENGTHS = (1.0, 10.0, 100.0, 1e6)
DRAWS = 200


def expit(x: Array | float) -> Array:
    """The logistic function."""
    return np.asarray(1 / (1 + np.exp(-np.asarray(x, dtype=np.float64))))


def errors(prompts: int, phi: float, theta: float) -> Array:
    """Errors of the plain win rate, and of the estimate at each strength, for each draw."""
    draw = np.random.default_rng([prompts, int(phi), int(theta)])
    found = []
    for _ in range(DRAWS):
        longer = draw.normal(60, 60, prompts).round()
        odds = theta + phi * np.tanh(longer / longer.std(ddof=1))
        wins = (draw.random(prompts) < expit(odds)).astype(np.float64)
        values = [length_controlled(wins, longer, strength) for strength in STRENGTHS]
        found.append(np.array([wins.mean(), *values]) - expit(theta))
    return np.array(found)


def main() -> None:
    """Print the table."""
    heads = ["as they are", *(f"C = {strength:g}" for strength in STRENGTHS)]
    print("| prompts | phi | " + " | ".join(heads) + " |")
    print("| --- " * (len(heads) + 2) + "|")
    for prompts, phi in itertools.product(PROMPTS, EFFECTS):
        own = [errors(prompts, phi, theta) for theta in TRUTHS]
        bias = np.mean([of_one.mean(0) for of_one in own], 0)
        spread = np.sqrt(np.mean([(of_one**2).mean(0) for of_one in own], 0))
        cells = [f"{b:+.2f}, {s:.2f}" for b, s in zip(bias, spread, strict=True)]
        print(f"| {prompts} | {phi:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
