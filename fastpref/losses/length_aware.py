"""Pairs against a reference where the length of the responses matters: by token, by margin, by
sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.losses.batch import Packed, PairLogps
from fastpref.losses.core import register
from fastpref.losses.maths import per_token
from fastpref.losses.parameters import Parameter


def normalized_margin(p: PairLogps) -> Tensor:
    """Difference of the log-ratios per token."""
    chosen, rejected = p.logratios
    return per_token(chosen, p.chosen_lengths) - per_token(rejected, p.rejected_lengths)


@register(
    "ipo",
    needs={"ref", "lengths"},
    paper="Azar et al. 2023, arXiv:2310.12036",
    equation="Eq. 17",
    confidence="H",
    formula=(
        "(log-ratio chosen / chosen_lengths - log-ratio rejected / rejected_lengths - 1 / (2 "
        "beta))^2"
    ),
    when="preferences are nearly certain and DPO overfits; `average=False` is the version on sums",
    found_in="TRL, HALOs, LLaMA-Factory (means); original DPO code, OpenRLHF, oat (sums)",
    parameters={
        "average": Parameter("log-ratios per token, as in the paper's results; else their sums")
    },
    shift_invariant=True,
    f_divergence=True,
    variants=({"average": False},),
)
def ipo(p: PairLogps, *, beta: float = 0.1, average: bool = True) -> Tensor:
    """Squared distance of the margin from ``1 / (2 beta)``; ``beta`` is the paper's tau."""
    margin = normalized_margin(p) if average else p.margin
    return (margin - 0.5 / beta) ** 2


@register(
    "sigmoid_norm",
    aliases=("dpo_norm",),
    needs={"ref", "lengths"},
    paper="Lambert et al. 2024 (Tulu 3), arXiv:2411.15124",
    confidence="H",
    formula=(
        "-logsigmoid(beta (log-ratio chosen / chosen_lengths - log-ratio rejected / "
        "rejected_lengths))"
    ),
    when="DPO favours long answers; beta 5 to 15",
    found_in="TRL, open-instruct (its default), NeMo-RL",
    shift_invariant=True,
    f_divergence=True,
)
def sigmoid_norm(p: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO on log-ratios per token."""
    return -F.logsigmoid(beta * normalized_margin(p))


@register(
    "lr_dpo",
    aliases=("r_dpo",),
    needs={"ref", "lengths"},
    paper="Liu et al. 2024 (Storm-7B), arXiv:2406.11817; Park et al. 2024, arXiv:2403.19159",
    equation="Eq. 9 of the latter",
    confidence="H",
    formula="-logsigmoid(beta * margin + alpha (chosen_lengths - rejected_lengths))",
    when="answers grow longer from round to round; alpha per token, 1e-3 to 1e-2 at beta 0.01",
    found_in="oat, Storm-7B",
    parameters={"alpha": Parameter("price of a token; negative flips the sign", "(-inf, inf)")},
    shift_invariant=True,
)
def lr_dpo(p: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """DPO with the length difference as a second objective."""
    length_margin = p.chosen_lengths - p.rejected_lengths
    return -F.logsigmoid(beta * p.margin + alpha * length_margin)


def _logratio(policy: Packed, ref: Packed, weights: Tensor, ref_weights: Tensor | None) -> Tensor:
    return policy.sum(weights) - ref.sum(ref_weights)


@register(
    "ld_dpo",
    needs={"tokens", "ref_tokens"},
    paper="Liu et al. 2024, arXiv:2409.06411",
    confidence="H",
    formula="dpo on sums where tokens past min(chosen_lengths, rejected_lengths) weigh alpha",
    when="verbosity should weigh less, not nothing; alpha 0.3 to 0.6",
    found_in="TRL (ld_alpha), LLaMA-Factory and ms-swift (on the policy only)",
    parameters={
        "alpha": Parameter("weight of the tokens past the shared length; 1 is DPO", "[0, 1]"),
        "on_reference": Parameter("weigh the reference's tokens too; false: the policy's only"),
    },
    shift_invariant=True,
    variants=({"alpha": 0.0},),
)
def ld_dpo(
    p: PairLogps, *, beta: float = 0.1, alpha: float = 0.5, on_reference: bool = True
) -> Tensor:
    """DPO where the tail of the longer response counts less."""
    shared = torch.minimum(p.chosen_tokens.lengths, p.rejected_tokens.lengths)

    def logratio(policy: Packed, ref: Packed) -> Tensor:
        tail = (policy.positions >= shared[policy.segments]).to(policy.values.dtype)
        weights = 1 - (1 - alpha) * tail
        return _logratio(policy, ref, weights, weights if on_reference else None)

    chosen = logratio(p.chosen_tokens, p.ref_chosen_tokens)
    return -F.logsigmoid(beta * (chosen - logratio(p.rejected_tokens, p.ref_rejected_tokens)))


def _drawn(tokens: Packed, keep: Tensor, generator: torch.Generator | None) -> Tensor:
    """1 for ``keep[i]`` tokens of sequence ``i``, drawn without replacement, 0 for the others."""
    device = tokens.values.device
    draw_on = device if generator is None else generator.device
    keys = torch.rand(tokens.values.shape, generator=generator, device=draw_on, dtype=torch.float64)
    order = (tokens.segments + keys.to(device)).argsort()
    rank = torch.empty_like(order).scatter_(0, order, tokens.positions)
    return (rank < keep[tokens.segments]).to(tokens.values.dtype)


def _given(tokens: Packed, kept: Sequence[Sequence[int]]) -> Tensor:
    starts = tokens.cu_seqlens.tolist()
    flat = [start + i for start, indices in zip(starts, kept, strict=False) for i in indices]
    weights = torch.zeros_like(tokens.values)
    weights[torch.tensor(flat, dtype=torch.long, device=weights.device)] = 1.0
    return weights


@register(
    "sampo",
    needs={"tokens", "ref_tokens"},
    paper="Lu et al. 2024, arXiv:2406.10957",
    confidence="H",
    formula=(
        "dpo on sums over min(chosen_lengths, rejected_lengths) tokens drawn from each response"
    ),
    when=(
        "length must not enter the reward at all; the same tokens are taken under policy and "
        "reference"
    ),
    parameters={
        "kept": Parameter(
            "token indices kept: `(chosen, rejected)`, a list for each response; default: drawn"
        ),
        "expectation": Parameter("no draw: the longer sum is scaled to the shorter length"),
    },
    stochastic=True,
    shift_invariant=True,
    variants=({"expectation": True},),
)
def sampo(
    p: PairLogps,
    *,
    beta: float = 0.1,
    kept: Sequence[Any] | Mapping[str, Any] | None = None,
    expectation: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DPO on equally many tokens of both responses."""
    chosen, rejected = p.chosen_tokens, p.rejected_tokens
    shared = torch.minimum(chosen.lengths, rejected.lengths)
    if kept is not None:
        sides = [kept["chosen"], kept["rejected"]] if isinstance(kept, Mapping) else list(kept)
        weights = [
            _given(tokens, side) for tokens, side in zip((chosen, rejected), sides, strict=True)
        ]
    elif expectation:
        weights = [
            per_token(shared.to(tokens.values.dtype), tokens.lengths)[tokens.segments]
            for tokens in (chosen, rejected)
        ]
    else:
        weights = [_drawn(tokens, shared, generator) for tokens in (chosen, rejected)]
    return -F.logsigmoid(
        beta
        * (
            _logratio(chosen, p.ref_chosen_tokens, weights[0], weights[0])
            - _logratio(rejected, p.ref_rejected_tokens, weights[1], weights[1])
        )
    )
