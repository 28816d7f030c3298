"""Pairs against a reference where the two log-ratios play different parts: BCO, APO, SPPO, DPOP and
others.

``a = beta * (chosen - ref_chosen)`` and ``b = beta * (rejected - ref_rejected)`` throughout.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import safe_exp
from fastpref.losses.parameters import Parameter
from fastpref.losses.states import RewardShift


@register(
    "nca_pair",
    needs={"ref"},
    paper="Chen et al. 2024, arXiv:2402.05369",
    confidence="H",
    formula="-logsigmoid(a) - logsigmoid(-a) / 2 - logsigmoid(-b) / 2",
    when="the chosen likelihood must not fall: each response is judged on its own",
    found_in="TRL, Liger",
    shift_invariant=True,
)
def nca_pair(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Noise-contrastive alignment of two responses, the first of them preferred."""
    a, b = (beta * ratio for ratio in p.logratios)
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def binary_classifier(a: Tensor, b: Tensor, delta: float | Tensor) -> Tensor:
    """``-logsigmoid(a - delta) - logsigmoid(delta - b)``: rewards above the shift are good."""
    return -F.logsigmoid(a - delta) - F.logsigmoid(delta - b)


@register(
    "bco_pair",
    needs={"ref"},
    state=RewardShift,
    paper="Jung et al. 2024, arXiv:2404.04656",
    confidence="H",
    formula="-logsigmoid(a - delta) - logsigmoid(-(b - delta))",
    when=(
        "a classifier of good and bad answers is wanted; `delta` follows the rewards (option "
        "`delta_mode`)"
    ),
    found_in="TRL (delta 0), InternVL, LLaMA-Factory, Liger",
    shift_invariant=True,
    variants=({"delta": 0.3},),
)
def bco_pair(p: PairLogps, *, beta: float = 0.1, delta: float | Tensor = 0.0) -> Tensor:
    """Binary cross-entropy of the two rewards against a reward shift."""
    a, b = (beta * ratio for ratio in p.logratios)
    return binary_classifier(a, b, delta)


@register(
    "apo_zero",
    needs={"ref"},
    paper="D'Oosterlinck et al. 2024, arXiv:2408.06266",
    equation="Eq. 7",
    confidence="H",
    formula="1 - sigmoid(a) + sigmoid(b)",
    when="chosen answers are better than the policy's own",
    found_in="TRL, Liger",
    shift_invariant=True,
)
def apo_zero(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Anchored: raise the chosen likelihood, lower the rejected."""
    a, b = (beta * ratio for ratio in p.logratios)
    return (-a).sigmoid() + b.sigmoid()


@register(
    "apo_down",
    needs={"ref"},
    paper="D'Oosterlinck et al. 2024, arXiv:2408.06266",
    equation="Eq. 8",
    confidence="H",
    formula="sigmoid(a) + 1 - sigmoid(a - b)",
    when="even the chosen answers are worse than the policy's own",
    found_in="TRL, Liger",
    shift_invariant=True,
)
def apo_down(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Anchored: lower both likelihoods, the rejected one more."""
    a, b = (beta * ratio for ratio in p.logratios)
    return a.sigmoid() + (b - a).sigmoid()


@register(
    "sppo_hard",
    needs={"ref"},
    paper="Wu et al. 2024, arXiv:2405.00675",
    equation="Eq. 4.7 with win probabilities 1 and 0",
    confidence="H",
    formula="(log-ratio chosen - 1 / (2 beta))^2 + (log-ratio rejected + 1 / (2 beta))^2",
    when="self-play where only the winner is known; log-ratios are regressed, not ranked",
    found_in="TRL, Liger",
    shift_invariant=True,
)
def sppo_hard(p: PairLogps, *, beta: float = 1e-3) -> Tensor:
    """Squared distance of both log-ratios from the targets ``+-1 / (2 beta)``."""
    chosen, rejected = p.logratios
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@register(
    "cal_dpo",
    needs={"ref"},
    paper="Xiao et al. 2024, arXiv:2412.14516",
    confidence="H",
    formula=(
        "-logsigmoid(margin) + cal_coef ((log-ratio chosen - 1/(2 beta))^2 + (log-ratio rejected +"
        " 1/(2 beta))^2)"
    ),
    when=(
        "rewards should have the scale of the true ones; no beta inside the sigmoid (0.5 in the "
        "code, 1 in the paper)"
    ),
    parameters={"cal_coef": Parameter("weight of the calibration term", "[0, inf)")},
    shift_invariant=True,
)
def cal_dpo(p: PairLogps, *, beta: float = 0.1, cal_coef: float = 0.5) -> Tensor:
    """A preference loss plus the regression of both log-ratios to their calibrated values."""
    chosen, rejected = p.logratios
    calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return -F.logsigmoid(chosen - rejected) + cal_coef * calibration


@register(
    "dpop",
    needs={"ref"},
    paper="Pal et al. 2024 (Smaug), arXiv:2402.13228",
    confidence="H",
    formula="-logsigmoid(beta (margin - penalty * relu(ref_chosen - chosen)))",
    when="chosen and rejected answers differ in a few tokens, where DPO lowers both",
    found_in="oat",
    parameters={"penalty": Parameter("cost of a chosen response below the reference", "[0, inf)")},
    shift_invariant=True,
)
def dpop(p: PairLogps, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """DPO that penalises a chosen likelihood below the reference's."""
    return -F.logsigmoid(beta * (p.margin - penalty * F.relu(p.ref_chosen - p.chosen)))


@register(
    "minor_dpo",
    needs={"ref"},
    paper="Xie et al. 2024, arXiv:2408.09834",
    confidence="H",
    formula="-logsigmoid(beta (log-ratio chosen - relu(log-ratio rejected)))",
    when="high learning rates push rejected answers too far down",
    shift_invariant=True,
)
def minor_dpo(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO that leaves a rejected response alone once it is less likely than under the reference."""
    chosen, rejected = p.logratios
    return -F.logsigmoid(beta * (chosen - F.relu(rejected)))


@register(
    "dpo_shift",
    needs={"ref"},
    paper="Yang et al. 2025, arXiv:2502.07599",
    confidence="H",
    formula="-logsigmoid(beta (log-ratio chosen - shift * log-ratio rejected))",
    when="chosen likelihood falls during training; 0.55 to 1, or scheduled from 0.95 to 1",
    parameters={"shift": Parameter("factor of the rejected reward; 1 is DPO", "[0, inf)")},
    shift_invariant=True,
)
def dpo_shift(p: PairLogps, *, beta: float = 0.1, shift: float = 0.75) -> Tensor:
    """DPO with the rejected reward scaled down."""
    chosen, rejected = p.logratios
    return -F.logsigmoid(beta * (chosen - shift * rejected))


@register(
    "hypo",
    needs={"ref"},
    paper="Yuan et al. 2026, arXiv:2602.11902",
    confidence="H",
    formula="-logsigmoid(beta (chosen - rejected - relu(ref_chosen - ref_rejected)))",
    when="the reference often prefers the rejected answer, where DPO is content too early",
)
def hypo(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO that ignores the reference where it prefers the rejected response."""
    return -F.logsigmoid(beta * (p.chosen - p.rejected - F.relu(p.ref_chosen - p.ref_rejected)))


@register(
    "h_dpo",
    needs={"ref"},
    paper="Omura et al. 2024, arXiv:2411.07595",
    confidence="M",
    formula="-logsigmoid(beta (alpha (chosen - rejected) - (ref_chosen - ref_rejected)))",
    when="the entropy of the policy should be set: alpha below 1 makes it sharper",
    parameters={"alpha": Parameter("weight of the entropy; 1 is DPO", "(0, inf)")},
)
def h_dpo(p: PairLogps, *, beta: float = 0.1, alpha: float = 0.9) -> Tensor:
    """DPO with control of the policy's entropy."""
    margin = alpha * (p.chosen - p.rejected) - (p.ref_chosen - p.ref_rejected)
    return -F.logsigmoid(beta * margin)


@register(
    "chi_po",
    needs={"ref"},
    paper="Huang et al. 2024, arXiv:2407.13399",
    confidence="M",
    formula=(
        "-logsigmoid(beta (phi(log-ratio chosen) - phi(log-ratio rejected))), phi(r) = exp(r) + r"
    ),
    when="over-optimisation is the worry: the chi-squared divergence punishes it exponentially",
    parameters={
        "clip": Parameter("bound on the logit, 2 R_max in the paper; default none", "(0, inf)")
    },
    shift_invariant=True,
    variants=({"clip": 2.0},),
)
def chi_po(p: PairLogps, *, beta: float = 0.1, clip: float | None = None) -> Tensor:
    """DPO under the chi-squared divergence mixed with the KL; exponents stop at 80 (11 in fp16)."""
    chosen, rejected = (safe_exp(ratio, p.exponent_limit) + ratio for ratio in p.logratios)
    bound = math.inf if clip is None else clip
    return -F.logsigmoid((beta * (chosen - rejected)).clamp(-bound, bound))


@register(
    "mdpo",
    needs={"ref", "corrupted"},
    paper="Wang et al. 2024, arXiv:2406.11839",
    confidence="H",
    formula=(
        "-logsigmoid(beta margin) - logsigmoid(a - anchor)"
        " - logsigmoid(beta ((chosen - corrupted) - (ref_chosen - ref_corrupted)))"
    ),
    when=(
        "the policy ignores part of its context, an image or a document: the same answer is scored"
        " without it"
    ),
    parameters={"anchor": Parameter("reward the chosen response must reach", "(-inf, inf)")},
    shift_invariant=True,
)
def mdpo(p: PairLogps, *, beta: float = 0.1, anchor: float = 0.0) -> Tensor:
    """DPO, plus a preference for the true context, plus an anchor on the chosen reward."""
    chosen, _ = p.logratios
    context = chosen - (p.corrupted - p.ref_corrupted)
    return (
        -F.logsigmoid(beta * p.margin)
        - F.logsigmoid(beta * context)
        - F.logsigmoid(beta * chosen - anchor)
    )


@register(
    "c2_dpo",
    needs={"ref"},
    paper="Asadi et al. 2025, arXiv:2502.17507",
    confidence="L",
    formula="-logsigmoid(beta margin) + penalty (log-ratio chosen + log-ratio rejected)^2",
    when="both likelihoods collapse: their sum of log-ratios is held near 0",
    parameters={"penalty": Parameter("weight of the constraint", "[0, inf)")},
    shift_invariant=True,
)
def c2_dpo(p: PairLogps, *, beta: float = 0.1, penalty: float = 2e-4) -> Tensor:
    """DPO that holds the two log-ratios opposite."""
    chosen, rejected = p.logratios
    return -F.logsigmoid(beta * (chosen - rejected)) + penalty * (chosen + rejected) ** 2
