"""Pairs whose responses carry scores: how much better matters, not only which is better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.parameters import Parameter

_ETA = Parameter("scale of the score difference", "(0, inf)")


def sppo_win_probabilities(scores: Tensor) -> Tensor:
    """Estimated probability that each response beats a random one: ``sigmoid(s_i - s_j)``, mean
    over all j.

    Args:
        scores: Scores of K responses to a prompt. Shape ``(..., K)``.

    Returns:
        Probabilities, same shape. SPPO takes the largest as chosen, the smallest as rejected.

    Source: Wu et al. 2024, arXiv:2405.00675.
    """
    return (scores[..., :, None] - scores[..., None, :]).sigmoid().mean(-1)


@register(
    "sppo",
    aliases=("sppo_soft",),
    needs={"ref", "scores"},
    paper="Wu et al. 2024, arXiv:2405.00675",
    equation="Eq. 4.7",
    confidence="H",
    formula="((log-ratio chosen - (chosen_scores - 1/2) / beta)^2 + (same of rejected)^2) / 2",
    when="self-play with a preference model: `*_scores` are win probabilities",
    found_in="SPPO",
    shift_invariant=True,
)
def sppo(p: PairLogps, *, beta: float = 1e-3) -> Tensor:
    """Squared distance of both log-ratios from their centred win probabilities over beta."""
    chosen, rejected = p.logratios
    error_chosen = chosen - (p.chosen_scores - 0.5) / beta
    error_rejected = rejected - (p.rejected_scores - 0.5) / beta
    return 0.5 * (error_chosen**2 + error_rejected**2)


def _bernoulli_kl(logit_p: Tensor, logit_q: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(logit_p)) || Bernoulli(sigmoid(logit_q)))``."""
    yes = logit_p.sigmoid() * (F.logsigmoid(logit_p) - F.logsigmoid(logit_q))
    return yes + (-logit_p).sigmoid() * (F.logsigmoid(-logit_p) - F.logsigmoid(-logit_q))


@register(
    "rpo_aware",
    needs={"ref", "scores"},
    paper="Adler et al. 2024 (Nemotron-4), arXiv:2406.11704; Sun et al. 2025, arXiv:2502.00203",
    confidence="H",
    formula=(
        "d(beta margin, eta (chosen_scores - rejected_scores)): bwd_kl, fwd_kl or squared distance"
    ),
    when=(
        "trusted reward scores: the implicit reward gap is fitted to them, so that close pairs "
        "stay close"
    ),
    found_in="NeMo-RL, Compose-RL",
    parameters={
        "eta": _ETA,
        "form": Parameter("distance between the two preferences", "bwd_kl | fwd_kl | sq"),
    },
    shift_invariant=True,
    variants=({"form": "fwd_kl"}, {"form": "sq"}),
)
def rpo_aware(p: PairLogps, *, beta: float = 0.1, eta: float = 1.0, form: str = "bwd_kl") -> Tensor:
    """Distance between the policy's preference and that of given rewards."""
    h, target = beta * p.margin, eta * (p.chosen_scores - p.rejected_scores)
    if form == "sq":
        return (h - target) ** 2
    return _bernoulli_kl(target, h) if form == "bwd_kl" else _bernoulli_kl(h, target)


@register(
    "odpo",
    needs={"ref", "scores"},
    paper="Amini et al. 2024, arXiv:2402.10571",
    confidence="H",
    formula="-logsigmoid(beta margin - alpha log(chosen_scores - rejected_scores))",
    when=(
        "scores with a meaningful gap: a better answer must win by more; a pair without a gap asks"
        " for nothing"
    ),
    parameters={"alpha": Parameter("scale of the offset", "[0, inf)")},
    shift_invariant=True,
)
def odpo(p: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """DPO with an offset that grows with the score difference."""
    gap = (p.chosen_scores - p.rejected_scores).clamp(min=1e-6)
    return -F.logsigmoid(beta * p.margin - alpha * gap.log())


@register(
    "rebel",
    needs={"ref", "scores"},
    paper="Gao et al. 2024, arXiv:2404.16767",
    confidence="M",
    formula="(margin / eta - (chosen_scores - rejected_scores))^2",
    when="online reinforcement learning as regression; the reference is the previous iterate",
    found_in="Compose-RL",
    parameters={"eta": Parameter("step size", "(0, inf)")},
    shift_invariant=True,
)
def rebel(p: PairLogps, *, eta: float = 1.0) -> Tensor:
    """Squared error of the log-ratio difference as a prediction of the reward difference."""
    return (p.margin / eta - (p.chosen_scores - p.rejected_scores)) ** 2


def nash_md_mixture(logits: Tensor, ref_logits: Tensor, mixture_coef: float = 0.5) -> Tensor:
    """Log-probabilities of the geometric mixture that Nash-MD's opponent samples from.

    Equals ``log_softmax(mixture_coef * ref_logits + (1 - mixture_coef) * logits, -1)``.

    Args:
        logits: Of the policy. Shape ``(..., V)``.
        ref_logits: Of the reference. Same shape.
        mixture_coef: Share of the reference.

    Source: Munos et al. 2023, arXiv:2312.00886.
    """
    return torch.lerp(logits, ref_logits, mixture_coef).log_softmax(-1)


@register(
    "nash_md",
    needs={"tokens", "ref_tokens", "scores"},
    paper="Munos et al. 2023, arXiv:2312.00886",
    confidence="H",
    formula="beta sum_t sg(log pi_t - log ref_t) log pi_t - (chosen_scores - 1/2) sum_t log pi_t",
    when=(
        "online against a mixture of policy and reference; chosen is the policy's sample, its "
        "score P(it wins)"
    ),
    found_in="TRL up to 1.13",
    parameters={
        "beta": Parameter("weight of the KL", "[0, inf)"),
        "mixture_coef": Parameter(
            "share of the reference in the opponent; used where it is sampled", "[0, 1]"
        ),
    },
)
def nash_md(p: PairLogps, *, beta: float = 0.1, mixture_coef: float = 0.5) -> Tensor:
    """Policy gradient of the win probability, with the KL to the reference as a per-token cost."""
    tokens = p.chosen_tokens
    cost = beta * (tokens.values - p.ref_chosen_tokens.values).detach()
    return tokens.sum(cost) - (p.chosen_scores - 0.5) * tokens.sum()
