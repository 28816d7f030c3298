"""The numerically stable pieces that several losses share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps

_MAX_LOGP = -1e-7
"""log(1 - p) is singular at p = 1: the closest to 0 a mean log-probability is allowed there."""


def safe_exp(x: Tensor, limit: float = 80.0) -> Tensor:
    """``exp(min(x, limit))``: neither value nor gradient overflows."""
    return x.clamp(max=limit).exp()


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, exact near 0 and far from it; x is clamped at -1e-7."""
    x = x.clamp(max=_MAX_LOGP)
    near = torch.log(-torch.expm1(x))
    return torch.where(x > -math.log(2), near, torch.log1p(-x.exp()))


def smoothed_logistic(h: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - e) logsigmoid(h) - e logsigmoid(-h)``: logistic loss, labels flipped at rate e."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """``sums / lengths``, an empty response counting as one token."""
    return sums / lengths.clamp(min=1)


def sample_std(x: Tensor) -> Tensor:
    """Standard deviation with ``n - 1``; 0 for fewer than two values."""
    return x.std() if x.numel() > 1 else torch.zeros_like(x).sum()


def nll(
    batch: PairLogps,
    side: str,
    reduction: str,
    scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of one response per pair. Shape ``(B,)``.

    Args:
        batch: The pairs.
        side: ``"chosen"`` or ``"third"``.
        reduction: ``"example"``: mean over the response's tokens. ``"sum"``: their sum.
            ``"tokens"``: divided so that the mean over pairs is the mean over tokens.
        scope: ``"response"``, or ``"all"``: the prompt's tokens count too.
        tokens_per_pair: For ``"tokens"``: tokens / pairs of the global accumulation window;
            default: of this batch.
    """
    total: Tensor = getattr(batch, side)
    if scope == "all":
        total = total + batch.prompt
    if reduction == "sum":
        return -total
    if reduction == "tokens" and tokens_per_pair is not None:
        return -total / tokens_per_pair
    count: Tensor = getattr(batch, f"{side}_lengths")
    if scope == "all":
        count = count + batch.prompt_lengths
    count = count.to(total.dtype)
    return per_token(-total, count.mean() if reduction == "tokens" else count)


def divergence_score(logratio: Tensor, divergence: str, alpha: float, limit: float) -> Tensor:
    """``f'(exp(logratio))``, 0 at 0: what replaces the log-ratio under an f-divergence.

    Source: Wang et al. 2023, arXiv:2309.16240. ``alpha`` follows TRL: the paper's is ``1 - alpha``.
    """
    if divergence == "forward_kl":
        return -torch.expm1((-logratio).clamp(max=limit))
    if divergence in ("js", "js_divergence"):
        return F.logsigmoid(logratio) + math.log(2)
    if divergence in ("alpha", "alpha_divergence") and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * logratio).clamp(max=limit)) / (alpha - 1)
    return logratio


def wpo_weight(batch: PairLogps, clamp: bool = True) -> Tensor:
    """``exp(m_w + m_l)``, detached; ``m = mean_t(log pi - log sum_v p_v**2)``, at most 1 if asked.

    Source: Zhou et al. 2024, arXiv:2406.11827, Eq. 2.
    """
    chosen = per_token(batch.chosen, batch.chosen_lengths) - batch.chosen_log_sum_sq
    rejected = per_token(batch.rejected, batch.rejected_lengths) - batch.rejected_log_sum_sq
    return safe_exp(chosen + rejected, 0.0 if clamp else batch.exponent_limit).detach()
