"""Numbers that need the logits of policy and reference together, without storing either."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastpref.heads import Head
from fastpref.losses.combine import Combined
from fastpref.ops import linear_logprobs
from fastpref.policy import Batch, ResponseLogps
from fastpref.token_kl import linear_token_kl

NEEDS = frozenset({"kl", "perturbed"})
"""Needs of losses that are met here."""


def against(
    reference: ResponseLogps | None, batch: Batch, combined: Combined, options: dict[str, Any]
) -> Callable[[Head], dict[str, Tensor]] | None:
    """What to do with the policy's head in its forward, for the losses' sake; None if nothing.

    Args:
        reference: Scores of the reference, with its head (``inspect=Head.detach``).
        batch: That is scored.
        combined: The losses.
        options: ``backend`` and ``memory_budget`` of the head.
    """
    needs = combined.needs & NEEDS
    if not needs or reference is None:
        return None
    epsilon = getattr(combined.states.get("epsilon_dpo"), "epsilon", 0.0)
    targets = batch["response_targets"]
    return lambda head: contrast(head, reference.extra, targets, needs, epsilon, **options)


def contrast(
    policy: Head,
    reference: Head,
    targets: Tensor,
    needs: Collection[str],
    epsilon: float,
    **options: Any,
) -> dict[str, Tensor]:
    """Per-token numbers of the policy's head against the reference's.

    Args:
        policy: With gradient.
        reference: Without.
        targets: Tokens, -100 where masked. Shape ``(n,)``.
        needs: ``kl``, ``perturbed`` or both.
        epsilon: Size of the perturbation.
        **options: ``backend`` and ``memory_budget`` of :func:`fastpref.linear_logprobs`.

    Returns:
        ``kl``: KL(reference || policy), differentiable. ``plus`` and ``minus``: log-probability of
        the target under the logits ``(1 +- epsilon) z -+ epsilon z_ref``, without gradient. 0 where
        masked; shape ``(n,)``.

    Raises:
        ValueError: ``perturbed`` of logits with a soft cap.
    """
    found = {}
    if "kl" in needs:
        kl = linear_token_kl(
            policy.hidden,
            policy.weight,
            reference.hidden,
            reference.weight,
            bias=policy.bias,
            ref_bias=reference.bias,
            scale=policy.scale,
            softcap=policy.softcap,
            ref_scale=reference.scale,
            ref_softcap=reference.softcap,
            **options,
        )
        found["kl"] = kl.where(targets >= 0, 0.0)
    if "perturbed" in needs:
        found["plus"] = _mixed(policy, reference, targets, epsilon, options)
        found["minus"] = _mixed(policy, reference, targets, -epsilon, options)
    return found


@torch.no_grad()
def _mixed(
    policy: Head, reference: Head, targets: Tensor, epsilon: float, options: dict[str, Any]
) -> Tensor:
    """Log-probabilities under ``(1 + epsilon) z - epsilon z_ref``: one product of joined operands.

    Only the small term is scaled in the operands' precision.
    """
    if policy.softcap is not None or reference.softcap is not None:
        raise ValueError("epsilon_dpo mixes logits, and those of this model have a soft cap")
    scale = policy.scale * (1 + epsilon)
    share = -epsilon * reference.scale / scale
    bias = None
    if policy.bias is not None or reference.bias is not None:
        zero = policy.weight.new_zeros(len(policy.weight))
        own, other = (zero if h.bias is None else h.bias for h in (policy, reference))
        bias = own + share * other
    logps = linear_logprobs(
        torch.cat([policy.hidden, share * reference.hidden], -1),
        torch.cat([policy.weight, reference.weight], -1),
        targets,
        bias=bias,
        scale=scale,
        **options,
    )
    assert isinstance(logps, Tensor)
    return logps
