"""How often one policy's answers are preferred, as they are and as if they were equally long.

Judges, human and model, like longer answers, so a policy can win by talking more. AlpacaEval 2
(Dubois et al. 2024, arXiv:2404.04475) models the probability of a preference as ``sigmoid(theta +
phi * tanh(d / std(d)) + psi * difficulty)``, d the difference in length, and reports it with the
length term taken out. Here the two policies answer the same prompts and no leaderboard of models is
at hand from which the prompts' difficulties could be estimated, so that term is left out. The
penalty is a fixed ridge, not one chosen by cross-validation, for which a round's held-out prompts
are too few.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 500


class Estimate(NamedTuple):
    """A number with its 95 % percentile-bootstrap interval; one value alone has none."""

    value: float
    low: float | None
    high: float | None

    def __format__(self, form: str) -> str:
        """Value and interval, each in this form; by default with three decimals."""
        form = form or ".3f"
        if self.low is None or self.high is None:
            return f"{self.value:{form}} [an interval needs at least 2 values]"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        """Three decimals."""
        return format(self)

    @property
    def ends(self) -> tuple[float, float]:
        """The interval's ends; the value itself where it has none."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )


def estimate(
    statistic: Callable[..., float],
    *data: Sequence[float],
    resamples: int = RESAMPLES,
    paired: bool = True,
) -> Estimate:
    """A statistic of data with its 95 % percentile-bootstrap interval.

    Args:
        statistic: Of as many arrays as there are in ``data``.
        *data: Sequences, resampled with a fixed seed.
        resamples: Number of draws with replacement.
        paired: They are of one length and resampled together; else each on its own.

    Returns:
        The estimate, without an interval where a sequence holds a single value.

    Raises:
        ValueError: there is no data.
    """
    from scipy.stats import bootstrap

    arrays = [np.asarray(values, dtype=np.float64) for values in data]
    fewest = min(map(len, arrays))
    if not fewest:
        raise ValueError("nothing to estimate from: no data")
    value = statistic(*arrays)
    if fewest == 1:
        return Estimate(value, None, None)
    found = bootstrap(
        arrays,
        statistic,
        n_resamples=resamples,
        batch=max(
            1, min(resamples, 10**7 // max(map(len, arrays)))
        ),  # what is drawn at once, in memory
        vectorized=False,
        paired=paired,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def mean(values: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """The mean with its interval."""
    return estimate(lambda x: float(np.mean(x)), values, resamples=resamples)


def gap(
    chosen: Sequence[float],
    rejected: Sequence[float],
    resamples: int = RESAMPLES,
    paired: bool = True,
) -> Estimate:
    """How much longer chosen responses are than rejected ones, on average.

    Args:
        chosen: Lengths.
        rejected: Lengths.
        resamples: Number of draws with replacement.
        paired: The two are of the same pairs, in one order.
    """

    def difference(a: Array, b: Array) -> float:
        return float(a.mean() - b.mean())

    return estimate(difference, chosen, rejected, resamples=resamples, paired=paired)


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


STRENGTH = 10.0
"""C of the penalty on the length term: nearly unbiased from 24 prompts on
(``docs/recipes/reports.md``)."""


def length_controlled(preferences: Array, differences: Array, strength: float = STRENGTH) -> float:
    """The win rate that equally long answers would have, by a logistic model with a length term.

    ``sigmoid(theta)`` of the fit ``P(win) = sigmoid(theta + phi * tanh(d / std(d)))``.

    Args:
        preferences: In [0, 1], a tie being 1/2. Shape ``(n,)``.
        differences: Length of the policy's answer minus that of the other. Shape ``(n,)``.
        strength: ``C`` of the penalty ``phi^2 / (2 C)`` (``theta`` has none), which keeps the fit
            finite where length alone decides, and leaves some of the length's effect in.

    Returns:
        In [0, 1]; ``mean(preferences)`` where all differences are equal or all preferences are.

    Source: Dubois et al. 2024, arXiv:2404.04475.
    """
    if np.ptp(differences) == 0 or np.ptp(preferences) == 0:
        return float(preferences.mean())
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    feature = np.tanh(differences / differences.std(ddof=1))[:, None]
    # A preference of p is p of a win and 1 - p of a loss.
    labels = np.repeat([1, 0], len(preferences))
    weights = np.concatenate([preferences, 1 - preferences])
    # To where machines agree: by default the fit stops short, in the fourth decimal.
    model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-8)
    with warnings.catch_warnings():
        # It warns where Newton's steps get no nearer, and then goes on by L-BFGS to the same end.
        warnings.simplefilter("ignore", ConvergenceWarning)
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
