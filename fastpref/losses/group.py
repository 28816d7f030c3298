"""K responses to a prompt, with scores: listwise and ranking losses. ``mask`` leaves responses
out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import GroupLogps
from fastpref.losses.core import register
from fastpref.losses.maths import per_token, safe_exp
from fastpref.losses.parameters import Parameter

_ALPHA = Parameter("temperature of the softmax over scores", "(0, inf)")
_NEVER = -1e30


def _rewards(g: GroupLogps, beta: float) -> Tensor:
    """``beta * log-ratio``, 0 for responses left out."""
    return torch.where(g.valid, beta * g.logratios, 0.0)


def _targets(g: GroupLogps, alpha: float) -> Tensor:
    """``softmax(scores / alpha)`` over the responses, 0 for those left out."""
    return (g.scores / alpha).masked_fill(~g.valid, _NEVER).softmax(-1) * g.valid


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)


@register(
    "nca",
    kind="group",
    needs={"ref", "scores"},
    paper="Chen et al. 2024, arXiv:2402.05369",
    confidence="H",
    formula=(
        "-sum_k softmax(scores / alpha)_k logsigmoid(s_k) - mean_k logsigmoid(-s_k), s = beta "
        "log-ratio"
    ),
    when="scored responses, and the likelihood of good ones must not fall",
    parameters={"alpha": _ALPHA},
    shift_invariant=True,
)
def nca(g: GroupLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """Noise-contrastive alignment of K scored responses."""
    s = _rewards(g, beta)
    good = (_targets(g, alpha) * F.logsigmoid(s)).sum(-1)
    return -good - _mean(F.logsigmoid(-s), g.valid)


@register(
    "info_nca",
    kind="group",
    needs={"ref", "scores"},
    paper="Chen et al. 2024, arXiv:2402.05369",
    confidence="H",
    formula="-sum_k softmax(scores / alpha)_k log_softmax(s)_k, s = beta log-ratio",
    when="scored responses, only their ratios matter; two responses and a one-hot target are DPO",
    parameters={"alpha": _ALPHA},
    shift_invariant=True,
)
def info_nca(g: GroupLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """Cross-entropy between the softmax of scores and that of implicit rewards."""
    log_share = _rewards(g, beta).masked_fill(~g.valid, _NEVER).log_softmax(-1)
    return -(_targets(g, alpha) * torch.where(g.valid, log_share, 0.0)).sum(-1)


@register(
    "pl_dpo",
    kind="group",
    needs={"ref", "scores"},
    paper="Rafailov et al. 2023, arXiv:2305.18290",
    equation="Appendix A.3",
    confidence="H",
    formula=(
        "-sum_k (s_k - logsumexp_{j >= k} s_j), responses from best to worst score, s = beta "
        "log-ratio"
    ),
    when="full rankings; two responses are DPO",
    shift_invariant=True,
)
def pl_dpo(g: GroupLogps, *, beta: float = 0.1) -> Tensor:
    """Negative log-likelihood of the ranking under Plackett-Luce."""
    order = g.scores.masked_fill(~g.valid, _NEVER).argsort(dim=-1, descending=True, stable=True)
    valid = g.valid.gather(-1, order)
    s = _rewards(g, beta).gather(-1, order)
    rest = s.masked_fill(~valid, _NEVER).flip(-1).logcumsumexp(-1).flip(-1)
    return -torch.where(valid, s - rest, 0.0).sum(-1)


@register(
    "lipo",
    kind="group",
    needs={"ref", "scores"},
    paper="Liu et al. 2024, arXiv:2402.01878",
    confidence="M",
    formula=(
        "-sum_{g_i > g_j} |2^g_i - 2^g_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)| logsigmoid(s_i -"
        " s_j)"
    ),
    when="graded responses, and the top of the list matters most",
    shift_invariant=True,
)
def lipo(g: GroupLogps, *, beta: float = 0.1) -> Tensor:
    """LambdaLoss over all pairs: gain of the scores times discount of the ranks."""
    s = _rewards(g, beta)
    ranked = s.detach().masked_fill(~g.valid, _NEVER)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1
    gain, discount = safe_exp(g.scores * 0.6931471805599453), 1 / rank.to(s.dtype).log1p()
    weight = _differences(gain).abs() * _differences(discount).abs()
    better = (_differences(g.scores) > 0) & g.valid[..., :, None] & g.valid[..., None, :]
    return -torch.where(better, weight * F.logsigmoid(_differences(s)), 0.0).sum((-2, -1))


def _differences(x: Tensor) -> Tensor:
    """``x_i - x_j``. Shape ``(..., K, K)``."""
    return x[..., :, None] - x[..., None, :]


@register(
    "rrhf",
    kind="group",
    needs={"scores", "lengths"},
    paper="Yuan et al. 2023, arXiv:2304.05302",
    confidence="H",
    formula=(
        "sum_{g_i < g_j} relu(p_i - p_j) + nll_weight nll(best), p = logps / lengths ** "
        "length_penalty"
    ),
    when="ranked responses and no reference: a ranking hinge plus fine-tuning on the best",
    parameters={"length_penalty": Parameter("exponent of the length", "[0, inf)")},
)
def rrhf(g: GroupLogps, *, length_penalty: float = 1.0, nll_weight: float = 1.0) -> Tensor:
    """Ranking hinge on length-normalised log-probabilities, plus the best one's likelihood."""
    lengths = g.lengths.clamp(min=1)
    p = g.logps / lengths**length_penalty
    worse = (_differences(g.scores) < 0) & g.valid[..., :, None] & g.valid[..., None, :]
    rank = torch.where(worse, F.relu(_differences(p)), 0.0).sum((-2, -1))
    best = g.scores.masked_fill(~g.valid, _NEVER).argmax(-1, keepdim=True)
    likelihood = -(g.logps / lengths).gather(-1, best)[..., 0] * g.valid.any(-1)
    return rank + nll_weight * likelihood


def group_advantages(
    scores: Tensor,
    *,
    std_eps: float = 1e-4,
    sample_std: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Scores centred and scaled within each group: ``(r - mean) / (std + std_eps)``; all equal
    gives 0.

    Args:
        scores: Rewards. Shape ``(..., K)``.
        std_eps: Added to the standard deviation: 1e-4 as TRL, 1e-2 as HALOs, 0 for the bare
            formula.
        sample_std: Divide by K - 1 (TRL); else by K.
        mask: bool, the responses that count; default all. Others get 0.

    Source: Shao et al. 2024, arXiv:2402.03300.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    centred = torch.where(valid, scores - _mean(scores, valid)[..., None], 0.0)
    count = (valid.sum(-1, keepdim=True) - int(sample_std)).clamp(min=1)
    scale = ((centred**2).sum(-1, keepdim=True) / count).sqrt() + std_eps
    return centred / scale.clamp(min=torch.finfo(centred.dtype).tiny)


@register(
    "grpo_pair",
    kind="group",
    needs={"ref", "scores", "lengths"},
    paper="Shao et al. 2024 (GRPO), arXiv:2402.03300",
    confidence="M",
    formula=(
        "-mean_k min(ratio_k A_k, clip(ratio_k) A_k) + beta (exp(-d_k) + d_k - 1), d = log-ratio /"
        " lengths, ratio = exp(d)"
    ),
    when="groups with rewards, the reference being the policy that wrote them (or re-synced to it)",
    found_in="HALOs",
    parameters={
        "std_eps": Parameter("added to the group's standard deviation", "[0, inf)"),
        "sample_std": Parameter("divide by K - 1; else by K"),
        "clip": Parameter("how far the ratio may leave 1", "(0, 1)"),
        "beta": Parameter("weight of the KL", "[0, inf)"),
    },
    shift_invariant=True,
    variants=({"beta": 0.04},),
)
def grpo_pair(
    g: GroupLogps,
    *,
    std_eps: float = 1e-4,
    sample_std: bool = True,
    clip: float = 0.2,
    beta: float = 0.0,
) -> Tensor:
    """Clipped policy gradient with group-normalised rewards and one ratio for each response."""
    advantage = group_advantages(g.scores, std_eps=std_eps, sample_std=sample_std, mask=g.valid)
    d = per_token(g.logratios, g.lengths)
    ratio = safe_exp(d, g.exponent_limit)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    penalty = safe_exp(-d, g.exponent_limit) + d - 1 if beta else torch.zeros_like(d)
    return _mean(beta * penalty - surrogate, g.valid)
