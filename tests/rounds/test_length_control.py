"""The length-controlled win rate on preferences whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from fastpref.rounds.winrate import STRENGTH, length_controlled, length_controlled_win_rate


def drawn(
    draw: np.random.Generator, prompts: int, theta: float, phi: float
) -> tuple[np.ndarray, np.ndarray]:
    """Preferences of the model that the estimate fits, and how much longer the answers are."""
    longer = draw.normal(60, 60, prompts).round()
    odds = theta + phi * np.tanh(longer / longer.std(ddof=1))
    return (draw.random(prompts) < 1 / (1 + np.exp(-odds))).astype(float), longer


@pytest.mark.parametrize("phi", [0.0, 2.0])
def test_longer_answers_gain_nothing_on_average(phi: float) -> None:
    draw = np.random.default_rng(0)
    samples = [drawn(draw, 64, 0.0, phi) for _ in range(150)]
    found = np.mean([length_controlled(wins, longer) for wins, longer in samples])
    assert found == pytest.approx(0.5, abs=0.03)
    plain = np.mean([wins.mean() for wins, _ in samples])
    assert plain > found + 0.15 if phi else plain == pytest.approx(0.5, abs=0.03)


def test_the_fit_is_that_of_the_penalised_likelihood() -> None:
    draw = np.random.default_rng(1)
    wins, longer = drawn(draw, 24, 0.3, 1.5)
    wins[:4] = 0.5
    feature = np.tanh(longer / longer.std(ddof=1))

    def loss(at: np.ndarray) -> float:
        odds = at[0] + at[1] * feature
        fit = np.logaddexp(0, -odds) * wins + np.logaddexp(0, odds) * (1 - wins)
        return float(fit.sum() + at[1] ** 2 / (2 * STRENGTH))

    theta, _ = minimize(loss, [0.0, 0.0], options={"gtol": 1e-9}).x
    assert length_controlled(wins, longer) == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-5)


def test_a_length_that_decides_all_leaves_a_finite_estimate() -> None:
    longer = [-40.0, -30.0, -10.0, 20.0, 30.0, 50.0]
    found = length_controlled_win_rate([0, 0, 0, 1, 1, 1], longer, 50)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert 0.2 < found.value < 0.8
