"""Pairs with several things to please: MODPO, SPO round after round, HPO's auxiliary rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import safe_exp
from fastpref.losses.parameters import Parameter
from fastpref.losses.states import State


def _weighted(weights: Sequence[float], rows: Tensor, what: str) -> Tensor:
    """``sum_m weights[m] rows[m]``. Shape ``(B,)``."""
    rows = rows if rows.dim() > 1 else rows[None]
    if len(weights) != rows.shape[0]:
        raise ValueError(f"{what}: {len(weights)} weights for {rows.shape[0]} rows")
    return (rows.new_tensor(weights)[:, None] * rows).sum(0)


@register(
    "modpo",
    needs={"ref", "margins"},
    paper="Zhou et al. 2023, arXiv:2310.03708",
    confidence="H",
    formula=(
        "-logsigmoid((beta margin - sum_m w[1 + m] (chosen_margins[m] - rejected_margins[m])) / "
        "w[0])"
    ),
    when=(
        "a front between objectives: train one, keep the others as frozen margins, a run for each "
        "w (sum 1)"
    ),
    parameters={
        "w": Parameter(
            "weights, the trained objective's first (at least 0.05), then one per margin",
            "[0, inf)",
        ),
        "hinge": Parameter("relu(1 - x) in the place of -logsigmoid(x)"),
    },
    shift_invariant=True,
    variants=({"hinge": True},),
)
def modpo(
    p: PairLogps, *, beta: float = 0.1, w: Sequence[float] = (0.5, 0.5), hinge: bool = False
) -> Tensor:
    """DPO on one objective with the weighted rewards of the others as a margin."""
    if w[0] < 0.05:
        raise ValueError(f"modpo: w[0] is {w[0]}; below 0.05 the margin drowns the preference")
    others = _weighted(w[1:], p.chosen_margins - p.rejected_margins, "modpo (w without its first)")
    logit = (beta * p.margin - others) / w[0]
    return F.relu(1 - logit) if hinge else -F.logsigmoid(logit)


@register(
    "spo",
    needs={"ref", "prior"},
    paper="Lou et al. 2024, arXiv:2405.12739",
    confidence="L",
    formula=(
        "-logsigmoid(beta D(pi / pi_last) - sum_i alpha_i R_i), R_i the margins earlier rounds "
        "learned"
    ),
    when=(
        "one preference dimension per round, without giving up the earlier ones; alpha 0.1 to 0.5 "
        "is a guess"
    ),
    parameters={
        "alpha": Parameter(
            "weight of each earlier round's reward, a list, oldest first, or one number", "[0, inf)"
        ),
        "current_coef": Parameter(
            "two-coefficient form: factor of this round's margin", "(0, inf)"
        ),
        "prior_coefs": Parameter(
            "its factors of the earlier rounds' margins, oldest first", "[0, inf)"
        ),
    },
    variants=({"current_coef": 0.05, "prior_coefs": [0.1, 0.1]},),
    shift_invariant=True,
)
def spo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    alpha: float | Sequence[float] = 0.5,
    current_coef: float | None = None,
    prior_coefs: Sequence[float] = (),
) -> Tensor:
    """DPO against the last round's policy, minus what the earlier rounds already reward."""
    gaps = p.prior_chosen - p.prior_rejected
    steps = gaps.diff(dim=0)  # D(pi_i / pi_{i-1}) of each earlier round. (R - 1, B)
    current = (p.chosen - p.rejected) - gaps[-1]
    if current_coef is None and prior_coefs:
        raise ValueError(
            "spo: prior_coefs belong to the two-coefficient form: give current_coef too"
        )
    if current_coef is not None:
        return -F.logsigmoid(current_coef * current - _weighted(prior_coefs, steps, "spo"))
    rounds = steps.shape[0]
    weights = [alpha] * rounds if isinstance(alpha, (int, float)) else list(alpha)
    if len(weights) != rounds:
        raise ValueError(f"spo: alpha has {len(weights)} numbers for {rounds} earlier rounds")
    learned = torch.zeros_like(current)  # sum_i alpha_i R_i; R_n is beta * step n - the sum before
    for weight, step in zip(weights, steps, strict=True):
        learned = learned + weight * (beta * step - learned)
    return -F.logsigmoid(beta * current - learned)


def hpo_value_loss(values: Tensor, rewards: Tensor, *, tau: float = 0.7) -> Tensor:
    """Expectile regression of values: ``|tau - (rewards < values)| (rewards - values)^2``.

    Args:
        values: Value of each prompt, with gradient. Any shape.
        rewards: Weighted auxiliary reward of a response. The same shape; no gradient flows into it.
        tau: Expectile, in (0, 1); 0.5 is half the squared error.

    Returns:
        Loss of each example, the same shape.

    Source: Badrinath et al. 2024, arXiv:2405.17956.
    """
    advantage = rewards.detach() - values
    return (tau - (advantage < 0).to(advantage.dtype)).abs() * advantage**2


class PooledKL(State):
    """HPO's reference point over all ranks: the mean of all log-ratios, at least 0."""

    reads = ("chosen", "rejected", "ref_chosen", "ref_rejected")

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``kl``."""
        return {"kl": _pooled_kl(batch)}


def _pooled_kl(p: PairLogps) -> Tensor:
    return torch.cat(p.logratios).detach().mean().clamp(min=0)


@register(
    "hpo",
    needs={"ref", "aux"},
    coupled=True,
    state=PooledKL,
    paper="Badrinath et al. 2024, arXiv:2405.17956",
    confidence="L",
    formula=(
        "mean over both responses of kto - gamma min(exp((R - values) / beta_a), max_weight) * "
        "log pi, R = aux_weights . aux"
    ),
    when=(
        "rewards that are no preference (safety, readability) should count too; the constants are "
        "unverified"
    ),
    parameters={
        "gamma": Parameter("weight of the advantage-weighted likelihood", "[0, inf)"),
        "beta_a": Parameter("temperature of the advantage", "(0, inf)"),
        "tau": Parameter("expectile of the value head's own loss", "(0, 1)"),
        "aux_weights": Parameter(
            "weights of the auxiliary rewards; default: equal, sum 1", "(-inf, inf)"
        ),
        "max_weight": Parameter("cap of the weight", "(0, inf)"),
        "kl": Parameter(
            "reference point of KTO; default: pooled mean of the batch's log-ratios", "[0, inf)"
        ),
    },
)
def hpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    gamma: float = 0.1,
    beta_a: float = 0.5,
    tau: float = 0.7,
    aux_weights: Sequence[float] | None = None,
    kl: float | Tensor | None = None,
    max_weight: float = 20.0,
) -> Tensor:
    """KTO on both responses plus their likelihood, weighed by the advantage of auxiliary rewards.

    The value is the policy's loss. Where ``values`` has a gradient, that of `hpo_value_loss` is
    added to it.
    """
    reference = _pooled_kl(p) if kl is None else kl
    chosen, rejected = p.logratios
    total = torch.zeros_like(chosen)
    sides = ((p.chosen, p.chosen_aux, chosen, 1.0), (p.rejected, p.rejected_aux, rejected, -1.0))
    for logps, aux, ratio, sign in sides:
        weights = [1 / aux.shape[0]] * aux.shape[0] if aux_weights is None else aux_weights
        reward = _weighted(weights, aux, "hpo (aux_weights)")
        weight = safe_exp((reward - p.values.detach()) / beta_a).clamp(max=max_weight)
        value_loss = hpo_value_loss(p.values, reward, tau=tau)
        total = total + (sign * beta * (reference - ratio)).sigmoid() - gamma * weight * logps
        total = total + value_loss - value_loss.detach()
    return total / 2
