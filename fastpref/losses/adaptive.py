"""Pairs under a beta or margin that follows the data: alpha-DPO, beta-DPO, epsilon-DPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import per_token, sample_std
from fastpref.losses.parameters import Parameter
from fastpref.losses.reference_free import mean_logps
from fastpref.losses.states import State

_SUMS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


class RunningGap(State):
    """Running mean and standard deviation of a gap, updated with the batch before its own loss.

    Args:
        momentum: Share of the past.
        seed_first: Begin at the first batch's values. False begins at 0, as the released code does,
            which makes the first z-scores ten times too large.
    """

    keeps: ClassVar[tuple[str, ...]] = ("mean", "std")

    def __init__(self, *, momentum: float = 0.9, seed_first: bool = True) -> None:
        """Take the options the class lists."""
        super().__init__()
        self.momentum, self.start = momentum, None if seed_first else 0.0

    def gaps(self, batch: Any) -> Tensor:
        """The gap of each pair."""
        raise NotImplementedError

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``ema_mean`` and ``ema_std``."""
        gaps = self.gaps(batch).double()
        return {
            "ema_mean": self.average("mean", gaps.mean(), self.momentum, self.start),
            "ema_std": self.average("std", sample_std(gaps), self.momentum, self.start),
        }


def _length_gap(p: PairLogps) -> tuple[Tensor, Tensor]:
    """SimPO's margin of the policy, and how far it exceeds the reference's (detached)."""
    chosen, rejected = mean_logps(p)
    ref_chosen = per_token(p.ref_chosen, p.chosen_lengths)
    ref_rejected = per_token(p.ref_rejected, p.rejected_lengths)
    margin = chosen - rejected
    return margin, (margin - (ref_chosen - ref_rejected)).detach()


class LengthGap(RunningGap):
    """Running mean and standard deviation of the length-normalised gap to the reference."""

    reads = (*_SUMS, "chosen_lengths", "rejected_lengths")

    def gaps(self, batch: Any) -> Tensor:
        """The length-normalised gap to the reference."""
        return _length_gap(batch)[1]


@register(
    "alpha_dpo",
    needs={"ref", "lengths"},
    coupled=True,
    state=LengthGap,
    paper="Wu et al. 2024, arXiv:2410.10148",
    confidence="H",
    formula="-logsigmoid(beta (u - sg(gamma_beta_ratio + alpha (gap - ema_mean) / ema_std))), "
    "u = chosen / chosen_lengths - rejected / rejected_lengths, gap = u - u_ref",
    when=(
        "SimPO with a margin per pair: larger where the policy already left the reference; beta "
        "2.5 to 10"
    ),
    parameters={"alpha": Parameter("weight of the normalised gap; 0 is SimPO", "[0, inf)")},
)
def alpha_dpo(
    p: PairLogps,
    *,
    beta: float = 2.5,
    gamma_beta_ratio: float = 0.5,
    alpha: float = 0.1,
    ema_mean: float | Tensor | None = None,
    ema_std: float | Tensor | None = None,
) -> Tensor:
    """SimPO whose target margin follows the normalised gap to the reference."""
    margin, gap = _length_gap(p)
    mean = gap.mean() if ema_mean is None else ema_mean
    std = sample_std(gap) if ema_std is None else ema_std
    target = gamma_beta_ratio + alpha * _z_scores(gap, mean, std)
    return -F.logsigmoid(beta * (margin - target))


def _z_scores(gaps: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """``(gaps - mean) / std``; 0 while nothing has varied yet."""
    scale = torch.as_tensor(std, dtype=gaps.dtype, device=gaps.device)
    return torch.where(scale > 0, (gaps - mean) / scale, 0.0)


def _draw(
    gaps: Tensor,
    mean: float | Tensor,
    std: float | Tensor,
    keep: float,
    generator: torch.Generator | None,
) -> Tensor:
    """``B / n`` for the n pairs kept, drawn with Gaussian weights, and 0 for the others."""
    log_weight = -0.5 * _z_scores(gaps, mean, std) ** 2
    # the largest log-weights after Gumbel noise are a draw without replacement, for any weights
    device = gaps.device if generator is None else generator.device
    uniform = torch.rand(gaps.shape, generator=generator, device=device, dtype=torch.float64)
    gumbel = -(-uniform.clamp(min=1e-300).log()).log()
    kept = (log_weight + gumbel.to(gaps)).topk(max(1, int(keep * gaps.numel()))).indices
    return _kept_weights(gaps, kept)


def _kept_weights(gaps: Tensor, kept: Sequence[int] | Tensor) -> Tensor:
    index = torch.as_tensor(kept, device=gaps.device)
    if index.is_floating_point():
        return index
    weights = torch.zeros_like(gaps)
    weights[index] = 1.0
    return weights / weights.mean()


class MarginGap(RunningGap):
    """Running mean and standard deviation of the margins; draws the pairs kept, alike on all ranks.

    Args:
        keep: Share of the pairs kept.
        momentum: Share of the past.
        seed_first: See `RunningGap`.
        seed: Of the draws, together with the number of batches seen.
    """

    reads = _SUMS
    keeps = ("mean", "std", "draws")

    def __init__(
        self, *, keep: float = 0.8, momentum: float = 0.9, seed_first: bool = True, seed: int = 0
    ) -> None:
        """Take the options the class lists."""
        super().__init__(momentum=momentum, seed_first=seed_first)
        self.keep, self.seed = keep, seed

    def gaps(self, batch: Any) -> Tensor:
        """The margins."""
        margins: Tensor = batch.margin
        return margins

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``ema_mean``, ``ema_std``, ``kept`` and ``kept_mean``."""
        keywords = super().compute(batch, local)
        gaps, past = self.gaps(batch), self.recall("draws")
        draws = 0 if past is None else int(past.item())
        self.remember("draws", torch.tensor(draws + 1))
        generator = torch.Generator().manual_seed(self.seed + draws)
        weights = _draw(gaps, keywords["ema_mean"], keywords["ema_std"], self.keep, generator)
        return {**keywords, "kept": weights[local], "kept_mean": (weights * gaps).mean()}


@register(
    "beta_dpo",
    needs={"ref"},
    coupled=True,
    state=MarginGap,
    paper="Wu et al. 2024, arXiv:2407.08639",
    confidence="H",
    formula=(
        "-logsigmoid(beta_b margin) over the pairs kept, beta_b = max(1e-3, beta (1 + a (kept_mean"
        " - ema_mean)))"
    ),
    when="pairs of very different quality: beta follows the batch, outliers are left out",
    parameters={
        "a": Parameter("how strongly beta follows the gap; 0 leaves it alone", "[0, inf)"),
        "keep": Parameter("share of the pairs kept", "(0, 1]"),
        "kept": Parameter(
            "indices or mask of the pairs kept, or their weights (mean 1); default: drawn"
        ),
        "kept_mean": Parameter(
            "mean margin of the pairs kept; default: of this batch", "(-inf, inf)"
        ),
    },
    stochastic=True,
    shift_invariant=True,
)
def beta_dpo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    a: float = 0.6,
    keep: float = 0.8,
    ema_mean: float | Tensor | None = None,
    ema_std: float | Tensor | None = None,
    kept: Sequence[int] | Tensor | None = None,
    kept_mean: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DPO on the pairs kept, under the batch's own beta; its mean is the mean over those pairs."""
    gaps = p.margin.detach()
    mean = gaps.mean() if ema_mean is None else ema_mean
    if kept is None:
        std = sample_std(gaps) if ema_std is None else ema_std
        weights = _draw(gaps, mean, std, keep, generator)
    else:
        weights = _kept_weights(gaps, kept)
    level = (weights * gaps).mean() if kept_mean is None else kept_mean
    beta_b = gaps.new_ones(()) * beta * (1 + a * (level - mean))
    return weights * -F.logsigmoid(beta_b.clamp(min=1e-3) * p.margin)


def _steps(p: PairLogps) -> Tensor:
    """+1 where the log-ratio grows with the perturbation, -1 where it falls, 0 where neither."""
    now = (p.chosen - p.rejected).detach()
    plus, minus = p.chosen_plus - p.rejected_plus, p.chosen_minus - p.rejected_minus
    up, down = (plus > now) & (now > minus), (minus > now) & (now > plus)
    return (up.to(now.dtype) - down.to(now.dtype)).detach()


class DriftingBeta(State):
    """epsilon-DPO's beta: divided by ``1 + epsilon * mean step`` after every batch.

    Args:
        beta: Where it starts.
        epsilon: Size of the perturbation.
    """

    reads = ("chosen", "rejected", "chosen_plus", "rejected_plus", "chosen_minus", "rejected_minus")
    keeps = ("beta",)

    def __init__(self, *, beta: float = 0.01, epsilon: float = 0.01) -> None:
        """Take the options the class lists."""
        super().__init__()
        self.beta, self.epsilon = beta, epsilon

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``beta``."""
        step = _steps(batch).double().mean()
        past = self.recall("beta")
        beta = step.new_tensor(self.beta) if past is None else past
        self.remember("beta", beta / (1 + self.epsilon * step))
        return {"beta": beta}


@register(
    "epsilon_dpo",
    needs={"ref", "perturbed"},
    state=DriftingBeta,
    paper="Lee et al. 2025, arXiv:2502.13177",
    confidence="H",
    formula=(
        "-logsigmoid(beta / (1 + epsilon step) * margin), step = +-1 where the log-ratio is "
        "monotone in beta, else 0"
    ),
    when="the pull to the reference should be chosen pair by pair, at no extra forward pass",
    parameters={"epsilon": Parameter("size of the perturbation", "(0, 1)")},
    shift_invariant=True,
)
def epsilon_dpo(p: PairLogps, *, beta: float | Tensor = 0.01, epsilon: float = 0.01) -> Tensor:
    """DPO with a beta for each pair, from how the pair reacts to a perturbed temperature."""
    return -F.logsigmoid(beta / (1 + epsilon * _steps(p)) * p.margin)
