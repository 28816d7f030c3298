"""Pairs without a reference: likelihood itself is the reward, usually per token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import log1mexp, nll, per_token, safe_exp
from fastpref.losses.parameters import Parameter

_GAMMA = Parameter(
    "target margin; takes the place of gamma_beta_ratio * beta when given", "[0, inf)"
)


def mean_logps(p: PairLogps) -> tuple[Tensor, Tensor]:
    """Mean log-probability of a token: of the chosen, of the rejected response."""
    return per_token(p.chosen, p.chosen_lengths), per_token(p.rejected, p.rejected_lengths)


def _simpo(p: PairLogps, beta: float, gamma_beta_ratio: float, gamma: float | None) -> Tensor:
    chosen, rejected = mean_logps(p)
    target = gamma_beta_ratio * beta if gamma is None else gamma
    return -F.logsigmoid(beta * (chosen - rejected) - target)


@register(
    "sft",
    needs={"lengths"},
    paper="the usual cross-entropy",
    confidence="H",
    formula="-chosen / chosen_lengths",
    when=(
        "as a term beside another loss, to keep the chosen likelihood up; TRL's `sft` is "
        "`nll_reduction=tokens`"
    ),
    found_in="TRL",
    variants=({"nll_reduction": "tokens"}, {"nll_scope": "all"}),
)
def sft(
    p: PairLogps,
    *,
    nll_reduction: str = "example",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the chosen response."""
    return nll(p, "chosen", nll_reduction, nll_scope, tokens_per_pair)


@register(
    "simpo",
    needs={"lengths"},
    mean_reward=True,
    paper="Meng et al. 2024, arXiv:2405.14734",
    equation="Eq. 6",
    confidence="H",
    formula="-logsigmoid(beta (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)",
    when=(
        "no memory for a reference, and length should not count; beta 2 to 10, gamma / beta 0.3 to"
        " 1.6, low learning rate"
    ),
    found_in="SimPO, TRL (CPO), HALOs, LLaMA-Factory, ms-swift, open-instruct, oat, Liger",
    parameters={"gamma": _GAMMA},
    variants=({"gamma": 1.4},),
)
def simpo(
    p: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5, gamma: float | None = None
) -> Tensor:
    """Logistic loss on the difference of mean token log-probabilities, beyond a target margin."""
    return _simpo(p, beta, gamma_beta_ratio, gamma)


@register(
    "cpo",
    needs={"lengths"},
    paper="Xu et al. 2024, arXiv:2401.08417",
    equation="Eq. 3",
    confidence="H",
    formula="-logsigmoid(beta (chosen - rejected)) + nll_weight * nll",
    when=(
        "no memory for a reference, both answers are good (translation); TRL takes the likelihood "
        "per token over all"
    ),
    found_in="TRL (experimental), ms-swift, Liger",
    variants=({"nll_reduction": "tokens"}, {"nll_scope": "all"}),
)
def cpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll_reduction: str = "example",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """DPO with a uniform reference, plus the likelihood of the chosen response."""
    likelihood = nll(p, "chosen", nll_reduction, nll_scope, tokens_per_pair)
    return -F.logsigmoid(beta * (p.chosen - p.rejected)) + nll_weight * likelihood


@register(
    "cpo_simpo",
    needs={"lengths"},
    mean_reward=True,
    paper="Xu et al. 2024, arXiv:2401.08417; Meng et al. 2024, arXiv:2405.14734",
    confidence="M",
    formula="simpo + nll_weight * nll",
    when="SimPO drifts: the likelihood term holds it",
    found_in="TRL (CPO), ms-swift",
    parameters={"gamma": _GAMMA},
)
def cpo_simpo(
    p: PairLogps,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    gamma: float | None = None,
    nll_weight: float = 0.1,
    nll_reduction: str = "example",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """SimPO plus the likelihood of the chosen response."""
    likelihood = nll(p, "chosen", nll_reduction, nll_scope, tokens_per_pair)
    return _simpo(p, beta, gamma_beta_ratio, gamma) + nll_weight * likelihood


@register(
    "orpo",
    needs={"lengths"},
    mean_reward=True,
    paper="Hong et al. 2024, arXiv:2403.07691",
    confidence="H",
    formula=(
        "nll - beta logsigmoid(log odds(chosen) - log odds(rejected)), odds of the mean token "
        "log-probability"
    ),
    when="fine-tuning and preference in one step, from a base model; `beta` is the paper's lambda",
    found_in="TRL (experimental), LLaMA-Factory, ms-swift, Liger",
    parameters={"beta": Parameter("weight of the odds ratio (lambda)", "[0, inf)")},
    variants=({"nll_reduction": "tokens"}, {"nll_scope": "all"}),
)
def orpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    nll_reduction: str = "example",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """Likelihood of the chosen response plus the log odds ratio of the two."""
    chosen, rejected = mean_logps(p)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    likelihood = nll(p, "chosen", nll_reduction, nll_scope, tokens_per_pair)
    return likelihood - beta * F.logsigmoid(log_odds)


@register(
    "alphapo",
    needs={"lengths"},
    mean_reward=True,
    paper="Gupta et al. 2025, arXiv:2501.03884",
    confidence="H",
    formula=(
        "-logsigmoid(beta (f(chosen mean) - f(rejected mean)) - gamma), f(m) = (1 - exp(-alpha m))"
        " / alpha"
    ),
    when="SimPO displaces likelihood: alpha shapes the reward; alpha 0 is SimPO",
    found_in="TRL (CPO)",
    parameters={
        "alpha": Parameter(
            "shape of the reward; 0 is the plain mean log-probability", "(-inf, inf)"
        ),
        "gamma": Parameter("target margin", "[0, inf)"),
    },
    variants=({"alpha": -0.25}, {"alpha": 0.0}),
)
def alphapo(p: PairLogps, *, beta: float = 2.5, alpha: float = 0.25, gamma: float = 0.1) -> Tensor:
    """SimPO with a reward of adjustable shape."""

    def shaped(mean: Tensor) -> Tensor:
        if alpha == 0:
            return mean
        # expm1: exp(m) ** -alpha underflows for long, unlikely responses
        return -(-alpha * mean).clamp(max=p.exponent_limit).expm1() / alpha

    chosen, rejected = mean_logps(p)
    return -F.logsigmoid(beta * (shaped(chosen) - shaped(rejected)) - gamma)


@register(
    "slic_hf",
    paper="Zhao et al. 2023, arXiv:2305.10425",
    confidence="H",
    formula="relu(margin - chosen + rejected) - nll_weight * chosen",
    when="the original calibration of sequence likelihood, without a reference",
    found_in="HALOs",
    parameters={"margin": Parameter("log-probability gap asked for (delta)", "[0, inf)")},
)
def slic_hf(p: PairLogps, *, margin: float = 1.0, nll_weight: float = 0.1) -> Tensor:
    """Hinge loss on the log-probabilities themselves, plus the chosen one's summed likelihood."""
    return F.relu(margin - p.chosen + p.rejected) - nll_weight * p.chosen


@register(
    "simper",
    needs={"lengths"},
    mean_reward=True,
    paper="Xiao et al. 2025, arXiv:2502.00883",
    confidence="M",
    formula="-exp(chosen / chosen_lengths) + exp(rejected / rejected_lengths)",
    when="nothing should have to be tuned: inverse perplexities, no hyper-parameter",
)
def simper(p: PairLogps) -> Tensor:
    """Difference of the inverse perplexities."""
    chosen, rejected = mean_logps(p)
    return safe_exp(rejected, p.exponent_limit) - safe_exp(chosen, p.exponent_limit)


@register(
    "tpo",
    needs={"third", "lengths"},
    paper="Saeidi et al. 2024, arXiv:2405.16681",
    confidence="H",
    formula="-logsigmoid(beta (chosen - rejected)) + nll_weight * nll(third)",
    when="there is a gold answer beside the pair; `length_normalized` is TPO-L",
    found_in="TRL (experimental)",
    parameters={
        "gamma": Parameter("target margin of TPO-L", "[0, inf)"),
        "length_normalized": Parameter("TPO-L: mean log-probabilities and a margin gamma"),
        "third_tokens_per_pair": Parameter(
            "for `tokens`: gold tokens / pairs of the global accumulation window", "(0, inf)"
        ),
    },
    variants=({"length_normalized": True}, {"nll_reduction": "tokens"}, {"nll_scope": "all"}),
)
def tpo(
    p: PairLogps,
    *,
    beta: float = 0.01,
    nll_weight: float = 1.0,
    gamma: float = 0.5,
    length_normalized: bool = False,
    nll_reduction: str = "example",
    nll_scope: str = "response",
    third_tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """Preference of a pair plus the likelihood of a third, gold response."""
    if length_normalized:
        preference = _simpo(p, beta, 0.0, gamma)
    else:
        preference = -F.logsigmoid(beta * (p.chosen - p.rejected))
    return preference + nll_weight * nll(
        p, "third", nll_reduction, nll_scope, third_tokens_per_pair
    )
