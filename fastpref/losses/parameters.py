"""What each hyper-parameter of a loss means and which values it may take: stated once, checked and
printed from here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """One hyper-parameter.

    Args:
        meaning: What it does, in a line.
        valid: An interval, ``"[0, 0.5)"``, for numbers (and for each number of a list), or the
            words allowed, ``"response | all"``; empty: anything.
    """

    meaning: str
    valid: str = ""

    def check(self, loss: str, name: str, value: Any) -> None:
        """Raise ``TypeError`` or ``ValueError`` if ``value`` may not be used; ``None`` means "not
        given"."""
        if not self.valid or value is None or isinstance(value, Tensor):
            return
        if isinstance(value, str) or "|" in self.valid:
            self._check_word(loss, name, value)
        elif isinstance(value, Sequence):
            for item in value:
                self.check(loss, name, item)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{loss}: {name} must be a number in {self.valid}, got {value!r}")
        elif not self._contains(float(value)):
            raise ValueError(f"{loss}: {name} must be in {self.valid}, got {value!r}")

    def _check_word(self, loss: str, name: str, value: Any) -> None:
        words = [word.strip() for word in self.valid.split("|")]
        if len(words) == 1:
            raise TypeError(f"{loss}: {name} must be a number in {self.valid}, got {value!r}")
        if isinstance(value, str) and value not in words:
            raise ValueError(f"{loss}: {name}={value!r} is unknown{nearest(value, words)}")
        if not isinstance(value, (str, Sequence)):
            raise TypeError(f"{loss}: {name} must be one of {', '.join(words)}, got {value!r}")

    def _contains(self, value: float) -> bool:
        low, high = (float(part) for part in self.valid[1:-1].split(","))
        above = value > low or (self.valid[0] == "[" and value == low)
        below = value < high or (self.valid[-1] == "]" and value == high)
        return above and below and math.isfinite(value)


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of an error message: the nearest of ``words``, or all of them if they are few."""
    words, word = list(words), word.lower()
    begun = sorted((known for known in words if f"{word}_".startswith(f"{known}_")), key=len)
    close = (
        get_close_matches(word, words, n=1, cutoff=0.8)
        or begun[-1:]
        or get_close_matches(word, words, n=1, cutoff=0.5)
    )
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(words)}" if 0 < len(words) <= 12 else ""


COMMON: dict[str, Parameter] = {
    "beta": Parameter("pull to the reference: larger stays closer to it", "(0, inf)"),
    "label_smoothing": Parameter("rate at which labels are believed flipped", "[0, 0.5)"),
    "nll_weight": Parameter("weight of the likelihood term", "[0, inf)"),
    "nll_reduction": Parameter(
        "likelihood per example (mean over its tokens), per token of the window, or summed",
        "example | tokens | sum",
    ),
    "nll_scope": Parameter(
        "tokens the likelihood counts; `all` adds the prompt's", "response | all"
    ),
    "tokens_per_pair": Parameter(
        "for `tokens`: chosen tokens / pairs of the global accumulation window; default: of this"
        " batch",
        "(0, inf)",
    ),
    "gamma_beta_ratio": Parameter("target margin, divided by beta", "[0, inf)"),
    "delta": Parameter("reward shift: rewards are judged against it", "(-inf, inf)"),
    "ema_mean": Parameter("running mean of the gap; default: of this batch", "(-inf, inf)"),
    "ema_std": Parameter(
        "running standard deviation of the gap; default: of this batch", "[0, inf)"
    ),
    "generator": Parameter("source of randomness; default: torch's global one"),
    "f_divergence": Parameter(
        "divergence that ties the policy to the reference",
        "reverse_kl | forward_kl | js | js_divergence | alpha | alpha_divergence",
    ),
    "f_alpha": Parameter("order of the alpha-divergence; 1 is the reverse KL", "(-inf, inf)"),
    "weighting": Parameter(
        "`wpo`: weigh pairs by how likely the policy itself writes them", "none | wpo"
    ),
    "desirable_weight": Parameter("weight of desirable examples", "[0, inf)"),
    "undesirable_weight": Parameter("weight of undesirable examples", "[0, inf)"),
    "kl": Parameter("reference point: estimate of KL(policy || reference), at least 0", "[0, inf)"),
    "momentum": Parameter("share of the past in the running statistics", "[0, 1)"),
    "delta_mode": Parameter(
        "how delta follows the rewards: not at all, mean of batch means, mean of all, decaying "
        "mean",
        "zero | batch_means | elements | ema",
    ),
    "seed_first": Parameter("start the running statistics at the first batch's, not at 0"),
    "seed": Parameter("seed of the draws; the same on every rank"),
}
