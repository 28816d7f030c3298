"""The truth: every op in a few lines of plain torch, in any dtype, with the logits materialised.

Tests and documentation compare with this file. It is not fast and not lean: `[tokens, vocab]` is
allocated.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Detached statistics of the next-token distribution, one value a token, shape of ``targets``.

    Ignored tokens hold 0 (``False`` for ``top1``). Floats are fp32 (float64 for float64 inputs).
    """

    entropy: Tensor
    """Shannon entropy, nats."""
    lse: Tensor
    """Log of the sum of exponentials of the (scaled, capped) logits."""
    top1: Tensor
    """bool: no token has a larger logit than the target."""
    logit_mean: Tensor
    """Mean of the (scaled, capped) logits over the vocabulary."""
    log_sum_sq_probs: Tensor
    """``log(sum_v p_v**2)``, nats."""


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``cap(scale * (hidden @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)``."""
    z = scale * torch.nn.functional.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, TokenStats]:
    """Log-probability of each target, and the statistics, from materialised logits."""
    z = logits(hidden, weight, bias, scale, softcap)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    ignored = targets == ignore_index
    safe = targets.masked_fill(ignored, 0)
    logp_all = z.log_softmax(-1)
    logp = logp_all.gather(-1, safe[..., None])[..., 0].masked_fill(ignored, 0.0)
    with torch.no_grad():
        p = logp_all.exp()
        stats = (
            -(p * logp_all).nan_to_num(nan=0.0).sum(-1) + 0 * logp_all.sum(-1).isnan(),
            z.logsumexp(-1),
            z.gather(-1, safe[..., None])[..., 0] >= z.amax(-1),
            z.mean(-1),
            (2 * logp_all).logsumexp(-1),
        )
        return logp, TokenStats(*(s.detach().masked_fill(ignored, 0) for s in stats))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of materialised logits; all rows ignored gives 0."""
    z = logits(hidden, weight, bias, scale, softcap).flatten(0, -2)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(
        z,
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if reduction == "none":
        return loss.view(targets.shape)
    count = (targets != ignore_index).sum().clamp(min=1)
    return loss.sum() / count if reduction == "mean" else loss.sum()


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
) -> Tensor:
    """KL(reference || policy) per token, of materialised logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = logits(hidden, weight, bias, scale, softcap).to(wide).log_softmax(-1)
    z = logits(ref_hidden, ref_weight, ref_bias, ref_scale, ref_softcap)
    log_r = z.to(wide).log_softmax(-1)
    return torch.where(log_r == -math.inf, 0.0, log_r.exp() * (log_r - log_p)).sum(-1)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``torch.stack([values[a:b].sum() for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])])``."""
    bounds = cu_seqlens.tolist()
    parts = [values[a:b].sum() for a, b in pairwise(bounds)]
    return torch.stack(parts) if parts else values.new_zeros(0)


def preference_margins(
    logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, chosen log-ratio and rejected log-ratio of each pair of sequences."""
    ratios = segment_sum(logps - ref_logps, cu_seqlens)
    chosen, rejected = ratios[pairs[:, 0]], ratios[pairs[:, 1]]
    return chosen - rejected, chosen, rejected
