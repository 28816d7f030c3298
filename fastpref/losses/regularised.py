"""DPO plus a likelihood, or plus other terms: MPO, the RPO that is a regulariser, iterative RPO."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.asymmetric import binary_classifier
from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import nll
from fastpref.losses.parameters import Parameter
from fastpref.losses.states import BatchMeansShift


@register(
    "mpo",
    needs={"ref", "lengths"},
    state=BatchMeansShift,
    paper="Wang et al. 2024 (InternVL2-MPO), arXiv:2411.10442",
    confidence="H",
    formula="preference_weight * dpo + quality_weight * bco_pair + generation_weight * nll",
    when=(
        "DPO spoils chain-of-thought: relative preference, absolute quality and generation together"
    ),
    found_in="InternVL, ms-swift, TRL (as a list of losses)",
    parameters={
        "preference_weight": Parameter("weight of DPO", "[0, inf)"),
        "quality_weight": Parameter("weight of BCO", "[0, inf)"),
        "generation_weight": Parameter("weight of the likelihood", "[0, inf)"),
    },
    variants=({"nll_reduction": "example"}, {"nll_scope": "all"}),
)
def mpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    generation_weight: float = 1.0,
    delta: float | Tensor = 0.0,
    nll_reduction: str = "tokens",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """DPO, BCO and the likelihood of the chosen response, weighted."""
    a, b = (beta * ratio for ratio in p.logratios)
    return (
        -preference_weight * F.logsigmoid(a - b)
        + quality_weight * binary_classifier(a, b, delta)
        + generation_weight * nll(p, "chosen", nll_reduction, nll_scope, tokens_per_pair)
    )


def _with_likelihood(
    p: PairLogps,
    beta: float,
    nll_weight: float,
    reduction: str,
    scope: str,
    tokens_per_pair: float | Tensor | None,
) -> Tensor:
    """DPO plus the likelihood of the chosen response: both RPOs, which differ in its reduction."""
    likelihood = nll(p, "chosen", reduction, scope, tokens_per_pair)
    return -F.logsigmoid(beta * p.margin) + nll_weight * likelihood


@register(
    "rpo",
    aliases=("rpo_regularized",),
    needs={"ref", "lengths"},
    paper="Liu et al. 2024, arXiv:2405.16436",
    confidence="H",
    formula="-logsigmoid(beta * margin) + nll_weight * (-chosen)",
    when="over-optimisation is the worry: the summed likelihood acts as an adversarial regulariser",
    variants=({"nll_reduction": "example"},),
)
def rpo(
    p: PairLogps,
    *,
    beta: float = 0.01,
    nll_weight: float = 0.005,
    nll_reduction: str = "sum",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """DPO plus the summed likelihood of the chosen response."""
    return _with_likelihood(p, beta, nll_weight, nll_reduction, nll_scope, tokens_per_pair)


@register(
    "iterative_rpo",
    needs={"ref", "lengths"},
    paper="Pang et al. 2024, arXiv:2404.19733",
    confidence="H",
    formula="-logsigmoid(beta * margin) - nll_weight * chosen / chosen_lengths",
    when="reasoning: winners and losers of the policy's own chains of thought, round after round",
    found_in="TRL up to 0.28 (rpo_alpha), OpenRLHF, LLaMA-Factory, ms-swift, NeMo-RL, oat",
    variants=({"nll_reduction": "tokens"},),
)
def iterative_rpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll_reduction: str = "example",
    nll_scope: str = "response",
    tokens_per_pair: float | Tensor | None = None,
) -> Tensor:
    """DPO plus the likelihood of the chosen response per token."""
    return _with_likelihood(p, beta, nll_weight, nll_reduction, nll_scope, tokens_per_pair)
