"""Pairs whose losses depend on each other: AOT's sorting, Dr. DPO's weights, KTO's zero point.

Beside each stands a state that computes the statistic over all ranks; alone, a loss takes it from
its own batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import smoothed_logistic
from fastpref.losses.parameters import Parameter
from fastpref.losses.states import State

_SUMS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def _matched(values: Tensor, others: Tensor) -> Tensor:
    """For each value the member of ``others`` with the same rank."""
    return others.sort().values[values.argsort().argsort()]


class PairedQuantiles(State):
    """AOT over all ranks: the reference gap that shares each pair's rank."""

    reads = _SUMS

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``matched``."""
        gaps = batch.chosen - batch.rejected, batch.ref_chosen - batch.ref_rejected
        return {"matched": _matched(*gaps)[local]}


class UnpairedQuantiles(State):
    """Unpaired AOT over all ranks: the other side's log-ratio of each response's rank."""

    reads = _SUMS

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``matched``: for the chosen, and for the rejected responses."""
        chosen, rejected = batch.logratios
        return {"matched": (_matched(chosen, rejected)[local], _matched(rejected, chosen)[local])}


@register(
    "aot",
    aliases=("aot_paired",),
    needs={"ref"},
    coupled=True,
    aligned=False,
    state=PairedQuantiles,
    paper="Melnyk et al. 2024, arXiv:2406.05882",
    confidence="H",
    formula=(
        "-logsigmoid(beta (sort(chosen - rejected) - sort(ref_chosen - ref_rejected))), smoothed"
    ),
    when=(
        "the distribution of margins should dominate the reference's; wants large batches, "
        "returned by rank"
    ),
    found_in="TRL (within one rank)",
    parameters={
        "matched": Parameter(
            "reference gap of the same rank, for each pair; default: of this batch"
        )
    },
)
def aot(
    p: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    matched: Tensor | None = None,
) -> Tensor:
    """Logistic loss between equal quantiles of the policy's and the reference's gaps, ascending."""
    gaps, order = (p.chosen - p.rejected).sort()
    if matched is None:
        quantiles = (p.ref_chosen - p.ref_rejected).sort().values
    else:
        quantiles = matched[order]
    return smoothed_logistic(beta * (gaps - quantiles), label_smoothing)


@register(
    "aot_unpaired",
    aliases=("aot_pair",),
    needs={"ref"},
    coupled=True,
    aligned=False,
    state=UnpairedQuantiles,
    paper="Melnyk et al. 2024, arXiv:2406.05882",
    confidence="H",
    formula="-logsigmoid(beta (sort(log-ratio chosen) - sort(log-ratio rejected))), smoothed",
    when="chosen and rejected answers come as two distributions, not as pairs; returned by rank",
    found_in="TRL (within one rank)",
    parameters={
        "matched": Parameter(
            "log-ratio of the same rank on the other side, for chosen and rejected; default: of "
            "this batch"
        )
    },
    shift_invariant=True,
)
def aot_unpaired(
    p: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    matched: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Logistic loss between equal quantiles of chosen and rejected log-ratios, ascending."""
    (chosen, order), (rejected, rejected_order) = (ratio.sort() for ratio in p.logratios)
    if matched is None:
        return smoothed_logistic(beta * (chosen - rejected), label_smoothing)
    # a partner may live on another rank: each side trains against the other as a constant
    over = smoothed_logistic(beta * (chosen - matched[0][order]), label_smoothing)
    under = smoothed_logistic(beta * (matched[1][rejected_order] - rejected), label_smoothing)
    both = over + under
    return both - both.detach() / 2


def _log_mean_weight(p: PairLogps, beta: float, beta_prime: float) -> Tensor:
    """``log mean_i exp(-dpo_i / beta_prime)``, detached."""
    weights = F.logsigmoid(beta * p.margin).detach() / beta_prime
    return weights.logsumexp(0) - math.log(max(1, weights.numel()))


class RobustNormaliser(State):
    """Dr. DPO's normaliser over all ranks."""

    reads = _SUMS

    def __init__(self, *, beta: float = 0.1, beta_prime: float = 1.0) -> None:
        """Take the options the class lists."""
        super().__init__()
        self.beta, self.beta_prime = beta, beta_prime

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``log_mean``."""
        return {"log_mean": _log_mean_weight(batch, self.beta, self.beta_prime)}


@register(
    "dr_dpo",
    needs={"ref"},
    coupled=True,
    aligned=False,
    state=RobustNormaliser,
    paper="Wu et al. 2024, arXiv:2407.07880",
    confidence="M",
    formula="-beta_prime log mean_i exp(-dpo_i / beta_prime)",
    when="some pairs are wrong: those of high loss get little weight",
    parameters={
        "beta_prime": Parameter("trust in the pairs: large is DPO", "(0, inf)"),
        "log_mean": Parameter("log of the mean weight; default: of this batch", "(-inf, inf)"),
    },
    shift_invariant=True,
)
def dr_dpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    beta_prime: float = 1.0,
    log_mean: float | Tensor | None = None,
) -> Tensor:
    """Distributionally robust DPO: value and gradient of its mean are the published scalar's."""
    normaliser = _log_mean_weight(p, beta, beta_prime) if log_mean is None else log_mean
    # mean 1 over the batch; its gradient is that of the log-mean-exp, example by example
    weight = (F.logsigmoid(beta * p.margin) / beta_prime - normaliser).exp()
    return beta_prime * (1 - weight - normaliser)


def _positive_means(p: PairLogps) -> tuple[Tensor, Tensor]:
    chosen, rejected = p.logratios
    return chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)


class PairKL(State):
    """kto_pair's two reference points over all ranks; none while their gradient is wanted."""

    reads = _SUMS

    def __init__(self, *, detach_kl: bool = True) -> None:
        """Take the options the class lists."""
        super().__init__()
        self.detach_kl = detach_kl

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``kl``: of the chosen, of the rejected responses."""
        return {"kl": _positive_means(batch)} if self.detach_kl else {}


@register(
    "kto_pair",
    needs={"ref"},
    coupled=True,
    state=PairKL,
    paper="Ethayarajh et al. 2024, arXiv:2402.01306",
    equation="Eq. 7, on pairs",
    confidence="H",
    formula=(
        "(sigmoid(beta (kl_rejected - log-ratio chosen)) + sigmoid(beta (log-ratio rejected - "
        "kl_chosen))) / 2"
    ),
    when="repeating studies made with TRL up to 0.8; else use kto on unpaired data",
    found_in="TRL up to 0.8",
    parameters={
        "detach_kl": Parameter(
            "treat the reference points as constants; the original code did not"
        ),
        "kl": Parameter("reference points `(chosen, rejected)`; default: of this batch"),
    },
    shift_invariant=True,
    variants=({"detach_kl": False},),
)
def kto_pair(
    p: PairLogps,
    *,
    beta: float = 0.1,
    detach_kl: bool = True,
    kl: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """KTO with each side of a pair judged against the other side's KL; the mean over the two."""
    chosen, rejected = p.logratios
    kl_chosen, kl_rejected = _positive_means(p) if kl is None else kl
    if detach_kl and kl is None:
        kl_chosen, kl_rejected = kl_chosen.detach(), kl_rejected.detach()
    losses = (beta * (kl_rejected - chosen)).sigmoid() + (beta * (rejected - kl_chosen)).sigmoid()
    return torch.div(losses, 2)
