"""Pairs against several references at once: MRPO and its baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.parameters import Parameter

_PARAMETERS = {
    "eps_max": Parameter("radius of the trust region around the base reference", "[0, 1)"),
    "adaptive_eps": Parameter("share the radius between the two responses; else both get eps_max"),
    "weights": Parameter(
        "weights of the references: by how far each separates the responses, equal, or a list",
        "adaptive | uniform",
    ),
    "arwc_convention": Parameter(
        "which reference gets the larger weight: the released code exchanges the two",
        "paper | released_code",
    ),
    "combine": Parameter("mean of the references", "harmonic | geometric"),
}


def trust_region(
    chosen: Tensor, rejected: Tensor, eps_max: float, adaptive_eps: bool
) -> tuple[Tensor, Tensor]:
    """Every reference clipped to within ``eps |base|`` of the base (CTRO). Both ``(K, B)``."""
    eps_chosen: Tensor | float = eps_max
    eps_rejected: Tensor | float = eps_max
    if adaptive_eps:
        size_chosen, size_rejected = chosen.mean(0).abs(), rejected.mean(0).abs()
        tiny = torch.finfo(chosen.dtype).tiny
        eps_chosen = eps_max * size_chosen / (size_chosen + size_rejected).clamp(min=tiny)
        eps_rejected = eps_max - eps_chosen

    def clip(logps: Tensor, eps: Tensor | float) -> Tensor:
        base, radius = logps[0], eps * logps[0].abs()
        return torch.maximum(torch.minimum(logps, base + radius), base - radius)

    return clip(chosen, eps_chosen), clip(rejected, eps_rejected)


def reference_weights(
    chosen: Tensor, rejected: Tensor, weights: str | Sequence[float], arwc_convention: str
) -> Tensor:
    """Weights ``(K, B)`` of the references, from their unclipped sums (ARWC); columns add to 1."""
    k = chosen.shape[0]
    if arwc_convention == "released_code" and k != 2:
        raise ValueError(f"arwc_convention='released_code' is defined for 2 references, got {k}")
    if not isinstance(weights, str):
        if len(weights) != k:
            raise ValueError(f"weights has {len(weights)} numbers for {k} references")
        if min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {weights}")
        alpha = chosen.new_tensor(weights)[:, None].expand_as(chosen)
        return alpha.flip(0) if arwc_convention == "released_code" else alpha
    if weights == "uniform":
        return torch.full_like(chosen, 1 / k)
    separation = (chosen - rejected).abs()
    total = separation.sum(0)
    if arwc_convention == "released_code":
        extra = separation[1] / (total + 1e-6)
        return torch.stack([extra, 1 - extra])
    share = separation / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, share, 1 / k)


def _references(
    p: PairLogps,
    eps_max: float,
    adaptive_eps: bool,
    weights: str | Sequence[float],
    arwc_convention: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, and clipped sums of both responses; each ``(K, B)``."""
    chosen, rejected = (
        ref if ref.dim() > 1 else ref[None] for ref in (p.ref_chosen, p.ref_rejected)
    )
    alpha = reference_weights(chosen, rejected, weights, arwc_convention)
    return alpha, *trust_region(chosen, rejected, eps_max, adaptive_eps)


@register(
    "mrpo",
    needs={"refs"},
    paper="Le et al. 2024, arXiv:2405.16388",
    confidence="H",
    formula=(
        "-logsigmoid(beta ((chosen - rejected) - (r_w - r_l))), r = -logsumexp_k(log alpha_k - "
        "clip(ref_k))"
    ),
    when=(
        "several good models share the role of the reference; foreign ones are kept near the base "
        "by clipping"
    ),
    parameters=_PARAMETERS,
    variants=({"combine": "geometric"}, {"weights": "uniform", "adaptive_eps": False}),
)
def mrpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    eps_max: float = 0.1,
    adaptive_eps: bool = True,
    weights: str | Sequence[float] = "adaptive",
    arwc_convention: str = "paper",
    combine: str = "harmonic",
) -> Tensor:
    """DPO against one virtual reference, the weighted mean of several clipped ones."""
    alpha, *clipped = _references(p, eps_max, adaptive_eps, weights, arwc_convention)
    if combine == "harmonic":
        chosen, rejected = (-torch.logsumexp(alpha.log() - logps, 0) for logps in clipped)
    else:
        chosen, rejected = ((alpha * logps).sum(0) for logps in clipped)
    return -F.logsigmoid(beta * ((p.chosen - p.rejected) - (chosen - rejected)))


@register(
    "multi_dpo",
    needs={"refs"},
    paper="Le et al. 2024, arXiv:2405.16388 (baseline)",
    confidence="H",
    formula="sum_k alpha_k dpo(clip(ref_k))",
    when="the baseline MRPO is compared with: a weighted sum of DPO losses",
    parameters=_PARAMETERS,
)
def multi_dpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    eps_max: float = 0.1,
    adaptive_eps: bool = True,
    weights: str | Sequence[float] = "adaptive",
    arwc_convention: str = "paper",
) -> Tensor:
    """Weighted sum of DPO against each clipped reference."""
    alpha, chosen, rejected = _references(p, eps_max, adaptive_eps, weights, arwc_convention)
    margins = (p.chosen - p.rejected) - (chosen - rejected)
    return (alpha * -F.logsigmoid(beta * margins)).sum(0)
