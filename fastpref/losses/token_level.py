"""Losses of single tokens: a reward model from minimal edits, and PPO with a reward on every token.

They have signatures of their own. Fine-grained supervision: Xu et al. 2024, arXiv:2406.02756, whose
exact formulas were not available; the form here is the recommended one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import Packed
from fastpref.losses.core import register
from fastpref.losses.maths import safe_exp
from fastpref.losses.parameters import Parameter


def token_diff(rejected: Sequence[Any], edited: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Indices of the tokens an edit added and of those it removed: all but a longest common
    subsequence.

    Args:
        rejected: Tokens of the original response.
        edited: Tokens of its minimal edit.

    Returns:
        ``(added, removed)``: indices into ``edited``, and into ``rejected``.
    """
    m, n = len(rejected), len(edited)
    # common[i][j]: longest common subsequence of rejected[i:] and edited[j:]
    common = [[0] * (n + 1) for _ in range(m + 1)]
    for i in range(m - 1, -1, -1):
        for j in range(n - 1, -1, -1):
            same = rejected[i] == edited[j]
            common[i][j] = (
                common[i + 1][j + 1] + 1 if same else max(common[i + 1][j], common[i][j + 1])
            )
    added, removed, i, j = [], [], 0, 0
    while i < m and j < n:
        if rejected[i] == edited[j]:
            i, j = i + 1, j + 1
        elif common[i + 1][j] >= common[i][j + 1]:
            removed.append(i)
            i += 1
        else:
            added.append(j)
            j += 1
    return added + list(range(j, n)), removed + list(range(i, m))


@register(
    "fine_grained_rm",
    kind="token",
    paper="Xu et al. 2024, arXiv:2406.02756",
    confidence="L",
    formula=(
        "-logsigmoid(sum of edited rewards over added tokens - sum of rejected rewards over "
        "removed tokens)"
    ),
    when="training a token-level reward model on answers that were minimally edited",
)
def fine_grained_rm(edited: Packed, rejected: Packed, added: Tensor, removed: Tensor) -> Tensor:
    """Bradley-Terry loss of an edit, on the changed tokens only. ``(edited, rejected, added,
    removed) -> (B,)``.

    ``edited`` and ``rejected`` hold a reward per token, ``added`` and ``removed`` are bool masks
    over their tokens (`token_diff`). A pair in which nothing changed gives 0.
    """
    kind = torch.promote_types(edited.values.dtype, torch.float32)
    edited, rejected = (Packed(x.values.to(kind), x.cu_seqlens) for x in (edited, rejected))
    plus, minus = added.to(kind), removed.to(kind)
    losses = -F.logsigmoid(edited.sum(plus) - rejected.sum(minus))
    changed = Packed(plus, edited.cu_seqlens).sum() + Packed(minus, rejected.cu_seqlens).sum() > 0
    return torch.where(changed, losses, 0.0)


def token_advantages(
    old_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    kl_coef: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates of tokens whose reward pays for the KL.

    Args:
        old_logps: Log-probabilities under the policy that sampled. Shape ``(..., T)``.
        ref_logps: Under the reference. Same shape.
        rewards: Reward of each token. Same shape.
        values: Value before each token. Same shape.
        mask: bool, tokens of the response, which must come first; default all.
        kl_coef: Price of ``old_logps - ref_logps``.
        gamma: Discount.
        lam: Trace decay.

    Returns:
        ``(advantages, returns)``, detached, same shape.
    """
    shaped = (rewards - kl_coef * (old_logps - ref_logps)).detach()
    values, valid = values.detach(), torch.ones_like(shaped) if mask is None else mask.to(shaped)
    advantages, following, trace = [], torch.zeros_like(shaped[..., 0]), 0.0 * shaped[..., 0]
    for t in range(shaped.shape[-1] - 1, -1, -1):
        error = shaped[..., t] + gamma * following - values[..., t]
        trace = (error + gamma * lam * trace) * valid[..., t]
        following = values[..., t] * valid[..., t]
        advantages.append(trace)
    stacked = torch.stack(advantages[::-1], -1)
    return stacked, stacked + values * valid


def token_value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """``0.5 * (values - returns) ** 2``, of each token."""
    return 0.5 * (values - returns) ** 2


@register(
    "token_ppo",
    kind="token",
    paper=(
        "Schulman et al. 2017, arXiv:1707.06347, with the rewards of Xu et al. 2024, "
        "arXiv:2406.02756"
    ),
    confidence="M",
    formula=(
        "-mean_t min(ratio_t A_t, clip(ratio_t, 1 +- clip) A_t), ratio = exp(logps - old_logps)"
    ),
    when="reinforcement learning with a reward on every token",
    parameters={
        "kl_coef": Parameter("price of the log-ratio to the reference", "[0, inf)"),
        "gamma": Parameter("discount", "[0, 1]"),
        "lam": Parameter("trace decay of the advantage", "[0, 1]"),
        "clip": Parameter("how far the ratio may leave 1", "(0, 1)"),
    },
)
def token_ppo(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    kl_coef: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
) -> Tensor:
    """Clipped surrogate, mean over a response's tokens. ``(logps, old_logps, ref_logps, rewards,
    values) -> (...)``.

    All ``(..., T)``, one number a token; ``mask`` marks the response's tokens. `token_advantages`
    gives the returns that `token_value_loss` trains the value on.
    """
    kind = torch.promote_types(logps.dtype, torch.float32)
    logps, old_logps, ref_logps, rewards, values = (
        x.to(kind) for x in (logps, old_logps, ref_logps, rewards, values)
    )
    advantages, _ = token_advantages(
        old_logps, ref_logps, rewards, values, mask=mask, kl_coef=kl_coef, gamma=gamma, lam=lam
    )
    ratio = safe_exp(logps - old_logps.detach())
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    valid = torch.ones_like(losses) if mask is None else mask.to(losses)
    return (losses * valid).sum(-1) / valid.sum(-1).clamp(min=1)
