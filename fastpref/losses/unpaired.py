"""Single responses with a thumb up or down: KTO, BCO, APO-zero; or with a reward: DRO."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import UnpairedLogps
from fastpref.losses.core import register
from fastpref.losses.parameters import Parameter
from fastpref.losses.states import State, UnpairedShift


def _mismatched_kl(u: UnpairedLogps) -> Tensor:
    """``max(0, mean(kl_logps - ref_kl_logps))``, detached; 0 of no responses."""
    gaps = (u.kl_logps - u.ref_kl_logps).detach()
    return (gaps.sum() / max(len(gaps), 1)).clamp(min=0)


class MismatchedKL(State):
    """KTO's reference point, pooled over all ranks."""

    reads = ("kl_logps", "ref_kl_logps")

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``kl``."""
        return {"kl": _mismatched_kl(batch)}


def _side(u: UnpairedLogps, desirable: float, undesirable: float | Tensor) -> Tensor:
    """``desirable`` where the label is true, else ``undesirable``."""
    good = u.labels.to(u.logps.dtype)
    return good * desirable + (1 - good) * undesirable


def _kto(
    u: UnpairedLogps, beta: float, kl: float | Tensor, desirable: float, undesirable: float
) -> Tensor:
    losses = (_side(u, 1.0, -1.0) * beta * (kl - u.logratios)).sigmoid()
    return losses * _side(u, desirable, undesirable)


@register(
    "kto",
    kind="unpaired",
    needs={"ref", "mismatched"},
    coupled=True,
    state=MismatchedKL,
    paper="Ethayarajh et al. 2024, arXiv:2402.01306",
    equation="Eq. 7",
    confidence="H",
    formula=(
        "desirable_weight (1 - sigmoid(beta (log-ratio - kl))), undesirable_weight (1 - "
        "sigmoid(beta (kl - log-ratio)))"
    ),
    when=(
        "thumbs up and down without pairs; keep desirable_weight n_D / (undesirable_weight n_U) in"
        " 1 to 4/3"
    ),
    found_in="TRL, HALOs, LLaMA-Factory, ms-swift, Compose-RL, Liger, align-anything",
    parameters={
        "kl": Parameter(
            "reference point; default: max(0, mean log-ratio of the mismatched responses)",
            "[0, inf)",
        )
    },
    shift_invariant=True,
)
def kto(
    u: UnpairedLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: float | Tensor | None = None,
) -> Tensor:
    """Prospect-theoretic value of one response against a reference point."""
    reference = _mismatched_kl(u) if kl is None else kl
    return _kto(u, beta, reference, desirable_weight, undesirable_weight)


@register(
    "apo_zero_unpaired",
    kind="unpaired",
    needs={"ref"},
    paper="D'Oosterlinck et al. 2024, arXiv:2408.06266",
    equation="Eq. 7, on single responses",
    confidence="H",
    formula="1 - sigmoid(beta log-ratio) if desirable, else sigmoid(beta log-ratio)",
    when="KTO without its reference point: half the forward passes",
    found_in="TRL",
    shift_invariant=True,
)
def apo_zero_unpaired(
    u: UnpairedLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Raise the likelihood of desirable responses, lower that of the others."""
    return _kto(u, beta, 0.0, desirable_weight, undesirable_weight)


@register(
    "bco",
    aliases=("bco_unpaired",),
    kind="unpaired",
    needs={"ref"},
    state=UnpairedShift,
    paper="Jung et al. 2024, arXiv:2404.04656",
    confidence="H",
    formula=(
        "-logsigmoid(r - delta) if desirable, else -density_weights logsigmoid(delta - r), r = "
        "beta log-ratio"
    ),
    when="a classifier of good and bad answers, prompts of which may differ (density weights)",
    found_in="TRL up to 1.13",
    parameters={
        "density_weights": Parameter(
            "p(desirable | prompt) / p(undesirable | prompt) of each example, from a classifier;"
            " clamped to 0.5 to 10"
        )
    },
    shift_invariant=True,
)
def bco(
    u: UnpairedLogps,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
    density_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of the reward against a reward shift."""
    losses = -F.logsigmoid(_side(u, 1.0, -1.0) * (beta * u.logratios - delta))
    weight = 1.0 if density_weights is None else density_weights.clamp(0.5, 10.0)
    return losses * _side(u, 1.0, weight)


@register(
    "dro_v",
    kind="unpaired",
    needs={"ref", "scores", "values"},
    paper="Richemond et al. 2024, arXiv:2405.19107",
    confidence="M",
    formula="(scores - values - tau * log-ratio)^2 / 2",
    when="single responses with a reward; `values` is trained with the policy",
    parameters={"tau": Parameter("pull to the reference", "(0, inf)")},
    shift_invariant=True,
)
def dro_v(u: UnpairedLogps, *, tau: float = 1.0) -> Tensor:
    """Squared residual of the optimality condition of regularised reinforcement learning."""
    return 0.5 * (u.scores - u.values - tau * u.logratios) ** 2
