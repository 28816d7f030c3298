"""Pairs against a reference, functions of ``h = beta * margin`` alone: DPO and its closest
relatives.

All of them accept ``f_divergence`` (Wang et al. 2023, arXiv:2309.16240).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import safe_exp, smoothed_logistic
from fastpref.losses.parameters import Parameter


@register(
    "dpo",
    aliases=("sigmoid", "spin"),
    needs={"ref"},
    paper="Rafailov et al. 2023, arXiv:2305.18290",
    equation="Eq. 7",
    confidence="H",
    formula="-logsigmoid(beta * margin)",
    when=(
        "the default; with pairs whose rejected side is the previous iterate's own sample it is "
        "SPIN"
    ),
    found_in=(
        "TRL, HALOs, LLaMA-Factory, OpenRLHF, ms-swift, open-instruct, NeMo-RL, torchtune, oat, "
        "Liger"
    ),
    shift_invariant=True,
    f_divergence=True,
    variants=(
        {"label_smoothing": 0.3},
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js"},
        {"f_divergence": "alpha", "f_alpha": 0.5},
    ),
)
def dpo(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of the preference when the policy is its own reward model."""
    return smoothed_logistic(beta * p.margin, label_smoothing)


@register(
    "cdpo",
    needs={"ref"},
    paper="Mitchell 2023, A note on DPO with noisy preferences",
    confidence="H",
    formula=(
        "-(1 - e) logsigmoid(beta * margin) - e logsigmoid(-beta * margin), e = label_smoothing"
    ),
    when="some labels are wrong and the margin should stop growing, at log((1 - e) / e)",
    found_in="HALOs, OpenRLHF, LLaMA-Factory, open-instruct, TRL up to 0.28",
    shift_invariant=True,
    f_divergence=True,
)
def cdpo(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.2) -> Tensor:
    """DPO with soft labels."""
    return smoothed_logistic(beta * p.margin, label_smoothing)


@register(
    "robust",
    aliases=("robust_dpo",),
    needs={"ref"},
    paper="Chowdhury et al. 2024, arXiv:2403.00409",
    confidence="H",
    formula=(
        "(-(1 - e) logsigmoid(h) + e logsigmoid(-h)) / (1 - 2 e), h = beta * margin, e = "
        "label_smoothing"
    ),
    when=(
        "the rate of flipped labels is known: its expectation over flips is the clean DPO loss; "
        "may be negative"
    ),
    found_in="TRL, HALOs, Liger, ms-swift",
    shift_invariant=True,
    f_divergence=True,
)
def robust(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO debiased for labels that are flipped at a known rate."""
    h, e = beta * p.margin, label_smoothing
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


@register(
    "hinge",
    needs={"ref"},
    paper="Liu et al. 2023 (RSO), arXiv:2309.06657; Zhao et al. 2023 (SLiC), arXiv:2305.10425",
    confidence="H",
    formula="relu(1 - beta * margin)",
    when="pairs that are already well apart should not train any more",
    found_in="TRL, LLaMA-Factory, ms-swift, torchtune (RSO), oat (SLiC), Liger",
    shift_invariant=True,
    f_divergence=True,
)
def hinge(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Hinge loss on the implicit reward margin."""
    return F.relu(1 - beta * p.margin)


@register(
    "exo_pair",
    needs={"ref"},
    paper="Ji et al. 2024, arXiv:2402.00856",
    equation="Eq. 16",
    confidence="H",
    formula="q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigmoid(beta * margin)",
    when=(
        "mode-seeking fit is wanted: the KL of DPO the other way round; saturates on hopeless pairs"
    ),
    found_in="TRL, Liger",
    parameters={
        "label_smoothing": Parameter("mass of the target on the rejected side", "(0, 0.5)")
    },
    shift_invariant=True,
    f_divergence=True,
)
def exo_pair(p: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL from the policy's preference to the smoothed label: zero at ``h = log((1 - e) / e)``."""
    h = beta * p.margin
    log_q, log_not_q = F.logsigmoid(h), F.logsigmoid(-h)
    chosen = log_q.exp() * (log_q - math.log1p(-label_smoothing))
    return chosen + log_not_q.exp() * (log_not_q - math.log(label_smoothing))


@register(
    "discopop",
    needs={"ref"},
    paper="Lu et al. 2024, arXiv:2406.08414",
    equation="Eq. 5",
    confidence="H",
    formula="(1 - m) (-logsigmoid(h)) + m exp(-h), m = sigmoid(h / tau), h = beta * margin",
    when="trying the loss a language model discovered (LRML); not convex, has a local optimum",
    found_in="TRL, Liger",
    parameters={"tau": Parameter("temperature of the blend of the two terms", "(0, inf)")},
    shift_invariant=True,
    f_divergence=True,
    variants=({"tau": 4.0},),
)
def discopop(p: PairLogps, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """Logistic and exponential loss, blended by the log-ratio itself."""
    h = beta * p.margin
    # m exp(-h) as one exponent: the product is inf * 0 for very negative h
    exponential = safe_exp(F.logsigmoid(h / tau) - h, p.exponent_limit)
    return (1 - (h / tau).sigmoid()) * -F.logsigmoid(h) + exponential


_GPO: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda h: -F.logsigmoid(h),
    "hinge": lambda h: F.relu(1 - h),
    "squared": lambda h: (1 - h) ** 2,
    "truncated_quadratic": lambda h: F.relu(1 - h) ** 2,
    "savage": lambda h: (-h).sigmoid() ** 2,
}


@register(
    "gpo",
    needs={"ref"},
    paper="Tang et al. 2024, arXiv:2402.05749",
    confidence="M",
    formula=(
        "f(beta * margin), f convex: logistic, exponential, hinge, squared, truncated_quadratic, "
        "savage"
    ),
    when=(
        "comparing convex surrogates; `exponential` grows as exp(-h) and is clamped there unless "
        "`clamp` is false"
    ),
    parameters={
        "form": Parameter(
            "the convex function",
            "logistic | exponential | hinge | squared | truncated_quadratic | savage",
        ),
        "clamp": Parameter("cap the exponent of `exponential` at 80 (11 in fp16)"),
    },
    shift_invariant=True,
    f_divergence=True,
    variants=tuple({"form": form} for form in ("exponential", *_GPO)),
)
def gpo(p: PairLogps, *, beta: float = 0.1, form: str = "logistic", clamp: bool = True) -> Tensor:
    """A convex surrogate of the preference error."""
    h = beta * p.margin
    if form == "exponential":
        return safe_exp(-h, p.exponent_limit if clamp else math.inf)
    return _GPO[form](h)


@register(
    "spo_silu",
    needs={"ref"},
    paper=(
        "Sun et al. 2025 (SPO: self preference optimization with self regularization), EMNLP "
        "Findings"
    ),
    confidence="M",
    formula="-h sigmoid(h), h = beta * margin",
    when=(
        "labels are noisy: a pair the policy is sure against hardly pulls; falls without bound as "
        "h grows"
    ),
    shift_invariant=True,
    f_divergence=True,
)
def spo_silu(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """SiLU in the place of the log-sigmoid."""
    return -F.silu(beta * p.margin)


@register(
    "focal_po",
    needs={"ref"},
    paper="Liu et al. 2025, arXiv:2501.06645",
    confidence="L",
    formula="-sigmoid(h) ** gamma * logsigmoid(h), h = beta * margin",
    when=(
        "weight should go to pairs the policy already ranks rightly; whether the factor is "
        "detached is unverified"
    ),
    parameters={"gamma": Parameter("strength of the focus; 0 is DPO", "[0, inf)")},
    shift_invariant=True,
    f_divergence=True,
)
def focal_po(p: PairLogps, *, beta: float = 0.1, gamma: float = 0.05) -> Tensor:
    """DPO, each pair weighed by a power of its own likelihood."""
    log_q = F.logsigmoid(beta * p.margin)
    return -(gamma * log_q).exp() * log_q
