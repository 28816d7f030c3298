"""How often one policy's answers are preferred, as they are and as if they were equally long.

Judges, human and model, like longer answers, so a policy can win by talking more. AlpacaEval 2
(Dubois et al. 2024, arXiv:2404.04475) models the probability of a preference as ``sigmoid(theta +
phi * tanh(d / std(d)) + psi * difficulty)``, d the difference in length, and reports it with the
length term taken out. Here the two policies answer the same prompts and no leaderboard of models is
at hand from which the prompts' difficulties could be estimated, so that term is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 500


class Estimate(NamedTuple):
    """A number with its 95 % percentile-bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Three decimals."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(
    statistic: Callable[..., float], *data: Sequence[float], resamples: int = RESAMPLES
) -> Estimate:
    """A statistic of paired data with its 95 % percentile-bootstrap interval.

    Args:
        statistic: Of as many arrays as there are in ``data``.
        *data: Sequences of one length; they are resampled together, with a fixed seed.
        resamples: Number of draws with replacement.

    Raises:
        ValueError: there is no data.
    """
    from scipy.stats import bootstrap

    arrays = [np.asarray(values, dtype=np.float64) for values in data]
    if not len(arrays[0]):
        raise ValueError("nothing to estimate from: no data")
    value = statistic(*arrays)
    if len(arrays[0]) == 1:
        return Estimate(value, float("-inf"), float("inf"))
    found = bootstrap(
        arrays,
        statistic,
        n_resamples=resamples,
        vectorized=False,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def mean(values: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """The mean with its interval."""
    return estimate(lambda x: float(np.mean(x)), values, resamples=resamples)


def win_rate(preferences: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """Share of answers that are preferred, a tie counting half.

    Args:
        preferences: Probability that the policy's answer is the better one, by prompt.
        resamples: Number of draws with replacement.
    """
    return mean(preferences, resamples)


def accuracy(margins: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """Share of margins above 0, a margin of 0 counting half."""
    return mean([0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins], resamples)


def length_controlled(preferences: Array, differences: Array, strength: float = 1.0) -> float:
    """The win rate that equally long answers would have, by a logistic model with a length term.

    ``sigmoid(theta)`` of the fit ``P(win) = sigmoid(theta + phi * tanh(d / std(d)))``.

    Args:
        preferences: In [0, 1], a tie being 1/2. Shape ``(n,)``.
        differences: Length of the policy's answer minus that of the other. Shape ``(n,)``.
        strength: Inverse of the L2 penalty on ``phi`` (``theta`` has none), so that the fit is
            finite where length alone decides.

    Returns:
        In [0, 1]; ``mean(preferences)`` where all differences are equal or all preferences are.

    Source: Dubois et al. 2024, arXiv:2404.04475.
    """
    spread = differences.std()
    if spread == 0 or preferences.min() == preferences.max():
        return float(preferences.mean())
    from sklearn.linear_model import LogisticRegression

    feature = np.tanh(differences / spread)[:, None]
    # A preference of p is p of a win and 1 - p of a loss.
    labels = np.repeat([1, 0], len(preferences))
    weights = np.concatenate([preferences, 1 - preferences])
    model = LogisticRegression(C=strength, solver="newton-cholesky")
    model.fit(np.concatenate([feature, feature]), labels, sample_weight=weights)
    return float(1 / (1 + np.exp(-model.intercept_[0])))


def length_controlled_win_rate(
    preferences: Sequence[float], differences: Sequence[float], resamples: int = RESAMPLES
) -> Estimate:
    """:func:`length_controlled` with its interval, prompts resampled and the model fitted anew.

    Args:
        preferences: As for :func:`length_controlled`.
        differences: As for :func:`length_controlled`.
        resamples: Number of draws with replacement.
    """
    return estimate(length_controlled, preferences, differences, resamples=resamples)
