"""From per-token log-probabilities to what the losses take: their options, where each of their
needs is met, and the sums per response.

This file knows configs, batches and losses; not models, trainers or devices.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastpref import contrast, losses
from fastpref.batches import count
from fastpref.losses import GroupLogps, Packed, PairLogps, UnpairedLogps
from fastpref.losses.batch import BATCHES
from fastpref.losses.combine import Combined
from fastpref.ops import segment_sum
from fastpref.policy import Batch, ResponseLogps
from fastpref.ref_columns import REF_COLUMNS

logger = logging.getLogger("fastpref")

SIDES, EXTRAS = ("chosen", "rejected"), ("third", "corrupted")
"""A pair's responses, and further ones some losses want."""
FROM_FORWARD = frozenset({"lengths", "tokens", "log_sum_sq", "mismatched", "prompt"})
"""Needs that the policy's own forward meets."""
FROM_REFERENCE = frozenset({"ref", "refs", "ref_tokens", *contrast.NEEDS})
"""Needs that the reference meets; some want its forward beside the policy's."""
BEYOND_SUMS = frozenset({"mismatched", "ref_tokens"})
"""Needs that a reference in columns cannot meet, which are a sum for each response."""
FROM_COLUMNS: dict[str, dict[str, dict[str, str]]] = {
    "pair": {
        "scores": {"chosen_scores": "chosen_score", "rejected_scores": "rejected_score"},
        "margins": {name: name for name in ("chosen_margins", "rejected_margins")},
        "prior": {name: name for name in ("prior_chosen", "prior_rejected")},
        "aux": {name: name for name in ("chosen_aux", "rejected_aux", "values")},
        "third": {"third": "third_ids"},
        "corrupted": {"corrupted": "corrupted_ids"},
    },
    "unpaired": {
        "scores": {"scores": "score"},
        "values": {"values": "values"},
        "aux": {"aux": "aux", "values": "values"},
    },
    "group": {"scores": {"scores": "scores"}},
}
"""Needs that dataset columns meet: the column of each field, by kind and need."""


Examples = PairLogps | UnpairedLogps | GroupLogps


def make_losses(args: Any) -> Combined:
    """The weighted sum of losses that a :class:`fastpref.PreferenceConfig` asks for.

    An option of the config goes to every loss that has it; ``loss_args`` goes first.

    Raises:
        ValueError: An option has no effect on any of the losses, losses are mixed that cannot be
            added, or a hyper-parameter is out of range.
        TypeError: A loss has no such hyper-parameter.
    """
    names, own = list(args.loss_type), dict(args.loss_args or {})
    if len(names) == 1 and not set(own) <= set(names):
        own = {names[0]: own}
    by_name = {name: dict(own.pop(name, {})) for name in names}
    defaults = {f.name: f.default for f in fields(args)}
    for option, (keyword, value) in args.loss_options().items():
        if value is None:
            continue
        takers = [name for name in names if keyword in losses.get(name).entry.defaults]
        if option == "discopop_tau":
            takers = [name for name in takers if losses.get(name).entry.name == "discopop"]
        if not takers and getattr(args, option) != defaults[option]:
            raise ValueError(
                f"{option}={getattr(args, option)!r} has no effect on {', '.join(names)}: drop it, "
                "or choose a loss that takes it"
            )
        for name in takers:
            by_name[name].setdefault(keyword, value)
    return losses.combine(names, args.loss_weights, {**by_name, **own}, args.beta)


def tell_coupled(combined: Combined, size: int) -> None:
    """Log whether a loss couples the examples of a micro-batch, and warn where there is but one.

    Args:
        combined: Of :func:`make_losses`.
        size: Examples of a micro-batch, over all ranks.
    """
    entries = [losses.get(name).entry for name in combined.names]
    # of mismatched responses it is told where they are made
    names = [e.name for e in entries if e.coupled and "mismatched" not in e.needs]
    if names and size == 1:
        logger.warning(
            "per_device_train_batch_size=1: %s compares the examples of a batch with each other, "
            "and there is one. Use 2 or more; gradient_accumulation_steps does not help.",
            ", ".join(names),
        )
    elif combined.coupled:
        logger.info("the loss couples the examples of a micro-batch, over all ranks")


def check_needs(
    combined: Combined,
    columns: Collection[str],
    references: int,
    live: bool = True,
    given: bool = False,
) -> None:
    """Raise ``ValueError`` unless everything the losses need is provided.

    Args:
        combined: Of :func:`make_losses`.
        columns: Of the tokenised dataset.
        references: Number of reference policies.
        live: The reference runs beside the policy, rather than before training.
        given: The reference is columns with a sum for each response.
    """
    known = FROM_COLUMNS[combined.kind]
    for word in sorted(combined.needs):
        wanted = [*known.get(word, {}).values()]
        if given and word in EXTRAS and "ref" in combined.needs:
            wanted.append(f"ref_{word}_logps")
        missing = [name for name in wanted if name not in columns]
        sums = given and word in BEYOND_SUMS
        enough = references >= (2 if word == "refs" else 1)
        met = word in FROM_FORWARD or (word in known and not missing)
        met |= word in FROM_REFERENCE and enough and (live or word not in contrast.NEEDS)
        if met and not sums:
            continue
        asking = " and ".join(name for name in combined.names if _needs(name, word)) or "the loss"
        fields = ", ".join(BATCHES[combined.kind].fields[word])
        if missing:
            end = f"The dataset has no column {missing[0]!r}."
        elif sums:
            end = (
                "The ref_*_logps columns hold a sum for each response alone: drop them, so that a "
                "reference model scores the data."
            )
        elif enough:
            end = (
                "The reference is not run with the policy: set precompute_ref_log_probs=False, and "
                "drop ref_*_logps columns."
            )
        else:
            end = f"The run has {references or 'none'}."
        raise ValueError(f"{asking} needs {fields}: {losses.SOURCES[word]}. {end}")


def _needs(name: str, word: str) -> bool:
    return word in losses.get(name).entry.needs


def make_examples(
    combined: Combined,
    batch: Batch,
    policy: ResponseLogps,
    reference: Tensor | None,
    ld_alpha: float | None = None,
) -> Examples:
    """A batch as the losses take it: sums per response, and what else they need.

    Args:
        combined: The losses.
        batch: Of the collator.
        policy: Log-probabilities of its response tokens.
        reference: The reference's, ``(n,)``, of several ``(K, n)``; None where the batch holds
            sums, or there is no reference.
        ld_alpha: Weight of the tokens beyond the shorter response's length (pairs); None: 1.

    Returns:
        The examples, differentiable in the policy's log-probabilities.
    """
    weights = None if ld_alpha is None or "pairs" not in batch else ld_weights(batch, ld_alpha)
    sums = _sums(policy.logps, batch, weights)
    ref = None if reference is None else _sums(reference, batch, weights)
    if combined.kind == "unpaired":
        given = _unpaired(batch, sums, ref)
    elif combined.kind == "group":
        given = _groups(batch, sums, ref)
    else:
        given = _pairs(batch, sums, ref)
        if "tokens" in combined.needs:
            given |= _packed("{}_tokens", policy.logps, batch)
        if "ref_tokens" in combined.needs and reference is not None:
            given |= _packed("ref_{}_tokens", reference, batch)
        if "log_sum_sq" in combined.needs and policy.stats is not None:
            total = segment_sum(policy.stats.log_sum_sq_probs, batch["cu_seqlens"])
            mean = total / batch["lengths"].clamp(min=1)
            chosen, rejected = mean[batch["pairs"]].unbind(1)
            given |= {"chosen_log_sum_sq": chosen, "rejected_log_sum_sq": rejected}
        for name, values in (policy.extra or {}).items():
            total = _sums(values, batch, weights)
            given |= {
                f"{side}_{name}": total[i] for side, i in zip(SIDES, batch["pairs"].T, strict=True)
            }
    for word in combined.needs & FROM_COLUMNS[combined.kind].keys():
        for field, column in FROM_COLUMNS[combined.kind][word].items():
            if column in batch:  # else token ids, which the policy scored
                # (B, K), K numbers for each example, become (K, B); a group's are its responses'.
                several = batch[column].dim() > 1 and combined.kind != "group"
                given[field] = batch[column].mT if several else batch[column]
    kind: Any = BATCHES[combined.kind]
    examples: Examples = kind(**given, weights=batch.get("weight"))
    return examples


def _pairs(batch: Batch, sums: Tensor, ref: Tensor | None) -> dict[str, Any]:
    chosen, rejected = batch["pairs"].unbind(1)
    given = {
        "chosen": sums[chosen],
        "rejected": sums[rejected],
        "chosen_lengths": batch["lengths"][chosen],
        "rejected_lengths": batch["lengths"][rejected],
    }
    if ref is not None:
        given |= {"ref_chosen": ref[..., chosen], "ref_rejected": ref[..., rejected]}
    elif REF_COLUMNS["pair"][0] in batch:
        names = [f"ref_{name}" for name in (*SIDES, *EXTRAS) if f"ref_{name}_logps" in batch]
        given |= {name: _by_reference(batch[f"{name}_logps"]) for name in names}
    if "prompts" in batch:
        prompts = batch["prompts"]
        given |= {"prompt": sums[prompts], "prompt_lengths": batch["lengths"][prompts]}
    for name in EXTRAS:
        if name in batch:
            given[name] = sums[batch[name]]
            given |= {} if ref is None else {f"ref_{name}": ref[..., batch[name]]}
    if "third" in batch:
        given["third_lengths"] = batch["lengths"][batch["third"]]
    return given


def _by_reference(sums: Tensor) -> Tensor:
    """A column of sums as losses take it: of several references ``(K, B)``."""
    return sums.mT if sums.dim() > 1 else sums


def _groups(batch: Batch, sums: Tensor, ref: Tensor | None) -> dict[str, Any]:
    groups = batch["groups"]
    lengths = batch["lengths"][groups]
    given = {"logps": sums[groups], "lengths": lengths, "mask": lengths > 0}
    if ref is not None:
        given["ref_logps"] = ref[..., groups]
    elif "ref_logps" in batch:
        given["ref_logps"] = batch["ref_logps"]
    return given


def _unpaired(batch: Batch, sums: Tensor, ref: Tensor | None) -> dict[str, Any]:
    size = batch["label"].shape[0]
    given = {
        "logps": sums[:size],
        "lengths": batch["lengths"][:size],
        "labels": batch["label"],
    }
    if ref is not None:
        given["ref_logps"] = ref[..., :size]
    elif "ref_logps" in batch:
        given["ref_logps"] = _by_reference(batch["ref_logps"])
    if "mismatched" in batch and not len(batch["mismatched"]):
        # No response of the batch is mismatched: KTO's reference point is 0.
        given |= {"kl_logps": sums.new_zeros(1), "ref_kl_logps": sums.new_zeros(1)}
    elif "mismatched" in batch:
        given["kl_logps"] = sums[batch["mismatched"]].detach()
        if ref is not None:
            given["ref_kl_logps"] = ref[..., batch["mismatched"]]
    return given


def ld_weights(batch: Batch, alpha: float) -> Tensor:
    """1 for the tokens within the shorter response's length, ``alpha`` for those beyond it.

    Args:
        batch: Of pairs.
        alpha: In [0, 1].

    Returns:
        Shape ``(n,)``, fp32.

    Source: Liu et al. 2024, arXiv:2409.06411 (LD-DPO).
    """
    cu_seqlens = batch["cu_seqlens"].long()
    spans = cu_seqlens.diff()
    shared = spans.clone()
    shared[batch["pairs"]] = spans[batch["pairs"]].amin(1, keepdim=True).expand(-1, 2)
    token = torch.arange(batch["response_targets"].shape[0], device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return torch.where(token - cu_seqlens[sequence] < shared[sequence], 1.0, alpha)


def _sums(logps: Tensor, batch: Batch, weights: Tensor | None) -> Tensor:
    if weights is not None:
        logps = logps * weights.to(logps.dtype)
    rows = [segment_sum(row, batch["cu_seqlens"]) for row in logps.view(-1, logps.shape[-1])]
    return torch.stack(rows) if logps.dim() > 1 else rows[0]


def _packed(name: str, logps: Tensor, batch: Batch) -> dict[str, Packed]:
    """Per-token log-probabilities of chosen and rejected responses, which lie end to end."""
    size = batch["pairs"].shape[0]
    bounds = batch["cu_seqlens"].unfold(0, size + 1, size)
    parts = torch.split(logps, batch["response_tokens"], dim=-1)
    sides = zip(SIDES, parts, bounds, strict=False)
    return {name.format(side): Packed(values, cu - cu[0]) for side, values, cu in sides}


def likelihood_tokens(batch: Batch) -> Mapping[str, Tensor]:
    """Tokens that likelihood terms of a batch are taken over, by the losses' keyword for them."""
    if "pairs" not in batch:
        return {}
    found = {"tokens_per_pair": batch["lengths"][batch["pairs"][:, 0]].sum()}
    if "prompts" in batch:
        found["prompt_tokens_per_pair"] = batch["lengths"][batch["prompts"]].sum()
    if "third" in batch:
        found["third_tokens_per_pair"] = batch["lengths"][batch["third"]].sum()
    return found


def window_of(batches: Sequence[Batch], ranks: Any, device: torch.device) -> dict[str, Any]:
    """Of an accumulation window over all ranks: examples, and likelihood tokens for each.

    Args:
        batches: The window's, of this rank.
        ranks: A :class:`fastpref.ranks.Ranks`.
        device: For the numbers.

    Returns:
        ``examples``: their number; ``rates``: tokens for each example by the losses' keyword.
    """
    found: list[dict[str, Any]] = [
        {"examples": count(batch), **likelihood_tokens(batch)} for batch in batches
    ]
    numbers = [[_on(device, n) for n in counts.values()] for counts in found]
    totals = torch.stack([torch.stack(row) for row in numbers]).sum(0).double()
    examples, *tokens = ranks.sum(totals).unbind()
    rates = zip(list(found[0])[1:], tokens, strict=True)
    return {"examples": examples, "rates": {name: n / examples for name, n in rates}}


def _on(device: torch.device, number: int | Tensor) -> Tensor:
    """The number on the device, without a copy from the host to wait for."""
    if isinstance(number, Tensor):
        return number.to(device)
    return torch.full((), number, device=device)


def weigh(
    combined: Combined,
    examples: Examples,
    ranks: Any,
    rates: Mapping[str, Any],
    update: bool,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss of each example, all weights in it, and the losses as metrics.

    Args:
        combined: The losses.
        examples: Of :func:`make_examples`.
        ranks: A :class:`fastpref.ranks.Ranks`; statistics of a batch are over all of them.
        rates: Likelihood tokens for each example of the accumulation window, by the losses'
            keyword; none: of this batch.
        update: Losses with a memory learn from the batch.

    Returns:
        Losses ``(B,)``, and by name each loss with a weight of 1.
    """
    options: dict[str, Any] = {"update": update, **rates}
    if combined.states and ranks.count > 1:
        first = getattr(examples, examples.primary)
        options["gathered"] = combined.state_batch(examples).map(ranks.gather)
        options["local"] = slice(ranks.index * len(first), (ranks.index + 1) * len(first))
    terms = combined.terms(examples, **options)
    if examples.weights is not None and not combined.aligned:
        raise ValueError(
            f"{' and '.join(combined.names)}: its numbers are of ranks in the batch, not of single "
            "pairs, so that the column 'weight' cannot weigh them: drop it"
        )
    if examples.weights is not None:
        terms = {name: value * examples.weights for name, value in terms.items()}
    weighted = zip(combined.weights, terms.values(), strict=True)
    losses = torch.stack([weight * value for weight, value in weighted]).sum(0)
    found = {"loss": losses.detach()}
    if len(terms) > 1:
        found |= {f"loss/{name}": value.detach() for name, value in terms.items()}
    return losses, {name: (value, torch.ones_like(value)) for name, value in found.items()}
