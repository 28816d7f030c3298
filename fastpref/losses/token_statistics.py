"""Pairs that want a statistic of the whole vocabulary: TDPO's KL, WPO's likelihood weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import wpo_weight
from fastpref.losses.parameters import Parameter


@register(
    "tdpo1",
    needs={"ref", "kl"},
    paper="Zeng et al. 2024, arXiv:2404.11999",
    confidence="H",
    formula="-logsigmoid(beta (margin - (rejected_kl - chosen_kl)))",
    when="the KL of each token should be controlled, not only the sequence's log-ratio",
    shift_invariant=True,
)
def tdpo1(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO with the difference of the sequential KLs in the margin."""
    return -F.logsigmoid(beta * (p.margin - (p.rejected_kl - p.chosen_kl)))


@register(
    "tdpo2",
    needs={"ref", "kl"},
    paper="Zeng et al. 2024, arXiv:2404.11999",
    confidence="H",
    formula="-logsigmoid(beta (margin - alpha (rejected_kl - sg(chosen_kl))))",
    when="TDPO1 holds the chosen side back too: here its KL has no gradient",
    parameters={"alpha": Parameter("weight of the KL difference", "[0, inf)")},
    shift_invariant=True,
)
def tdpo2(p: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """TDPO1 with the chosen KL as a constant, and a weight."""
    return -F.logsigmoid(beta * (p.margin - alpha * (p.rejected_kl - p.chosen_kl.detach())))


@register(
    "wpo",
    needs={"ref", "lengths", "log_sum_sq"},
    paper="Zhou et al. 2024, arXiv:2406.11827",
    equation="Eq. 2",
    confidence="H",
    formula="min(1, exp(m_w + m_l)) dpo, m = mean_t(log pi - log sum_v p_v^2), detached",
    when=(
        "off-policy pairs: those the policy itself might write weigh more; `weighting='wpo'` does "
        "it to any loss"
    ),
    found_in="open-instruct, TRL (use_weighting, without the cap at 1)",
    parameters={"clamp": Parameter("cap the weight at 1, as the paper; TRL does not")},
    variants=({"clamp": False},),
)
def wpo(p: PairLogps, *, beta: float = 0.1, clamp: bool = True) -> Tensor:
    """DPO, each pair weighed by how likely the policy is to write it."""
    return wpo_weight(p, clamp) * -F.logsigmoid(beta * p.margin)
