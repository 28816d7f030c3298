"""A whole dataset scored by a reference: log-probabilities by token, as columns.

What a cache on disk holds is not computed again, and what is computed goes there as it comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpref.batches import TOKEN_COLUMN
from fastpref.data.formats import Kind, response_names
from fastpref.heads import causal_lm
from fastpref.policy import Batch
from fastpref.reference_cache import Array, ReferenceCache, cache_root
from fastpref.reference_policy import Reference

logger = logging.getLogger("fastpref")


def kind_of(columns: Sequence[str]) -> Kind:
    """What rows with these columns are: pairs, groups, or single responses."""
    if {"completions", "completion_1_ids"} & set(columns):
        return "group"
    return "unpaired" if {"completion", "completion_ids"} & set(columns) else "pair"


def caches_of(
    reference: Reference, policy: nn.Module, args: Any, accelerator: Any
) -> list[ReferenceCache]:
    """The caches on disk of a reference's models; none where ``ref_cache_dir`` says so.

    Args:
        reference: Not yet placed.
        policy: The model that trains, before it has.
        args: A :class:`fastpref.PreferenceConfig`.
        accelerator: accelerate's; what its first process finds counts.
    """
    if args.ref_cache_dir == "none":
        return []
    identities = reference.identities(policy, accelerator.mixed_precision)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(identities)
    names = [causal_lm(m).config._name_or_path for m in reference.models or [policy]]
    root = cache_root(args.ref_cache_dir)
    return [ReferenceCache(root, of, name) for of, name in zip(identities, names, strict=True)]


def score_dataset(
    reference: Reference,
    policy: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], Batch],
    *,
    batch_size: int,
    accelerator: Any,
    kind: str,
    description: str,
    caption: str = "Reference log-probs",
    scorer: str = "the reference",
    caches: Sequence[ReferenceCache] = (),
) -> Any:
    """The dataset with the reference's log-probabilities as columns, ``TOKEN_COLUMN`` by name.

    Args:
        reference: Scores the responses.
        policy: The model whose adapters it may switch.
        dataset: A ``datasets.Dataset`` of token ids.
        collator: As in training.
        batch_size: Examples at a time on each rank.
        accelerator: accelerate's; ranks share the work.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        description: What the dataset is to people: ``"train"``.
        caption: Of the progress bar.
        scorer: What the reference is to people.
        caches: One for each of the reference's models, or none: what they hold is not computed,
            what is computed goes into them as it comes.

    Returns:
        A dataset with the same rows and these columns more.

    Raises:
        ValueError: The dataset is a stream.
        FloatingPointError: A log-probability is not finite.
    """
    from datasets import Dataset, Features, List, Value, concatenate_datasets
    from tqdm.auto import tqdm

    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"precompute_ref_log_probs: the {description} data is a stream, which cannot be scored "
            "beforehand. Load it without streaming, or set precompute_ref_log_probs=False"
        )
    names = response_names(dataset.column_names, kind)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    quiet = not accelerator.is_local_main_process
    looked = tqdm(dataset, f"Known scores, {description}", delay=2, disable=quiet) if caches else ()
    found = {i: _stored(row, names, caches) for i, row in enumerate(looked)}
    missing = [i for i in range(len(dataset)) if found.get(i) is None]
    if ranks > 1:
        from accelerate.utils import gather_object

        # Of machines with a disk each, what one lacks is computed by all. Every rank makes as many
        # forwards, which a sharded reference needs.
        missing = sorted(set(gather_object(missing)))
        missing += missing[:1] * (-len(missing) % ranks)
    if caches:
        logger.info("%s: %d of %d rows to score", description, len(missing), len(dataset))
    mine = missing[rank::ranks]
    scored: list[tuple[int, list[Array]]] = []
    starts = range(0, len(mine), batch_size)
    with on_device(reference, policy, accelerator.device):
        for start in tqdm(starts, f"{caption}, {description}", disable=quiet):
            indices = mine[start : start + batch_size]
            rows = [dataset[i] for i in indices]
            logps = _scores(reference, policy, collator(rows), accelerator)
            for index, row, spans in zip(indices, rows, _by_row(logps, len(rows)), strict=True):
                scored.append((index, [span.flatten() for span in spans[: len(names)]]))
                if not all(np.isfinite(span).all() for span in spans):
                    place = row.get("example_ids", index)
                    raise FloatingPointError(
                        f"{scorer} gives a log-probability that is not finite to row {place} of "
                        f"the {description} data (rank {rank}): its weights are broken, or its "
                        "precision is too low"
                    )
                for k, cache in enumerate(caches):
                    for name, span in zip(names, spans, strict=False):
                        cache.put(*_sequence(row, name), span[k])
    for cache in caches:
        cache.flush()
    if ranks > 1:
        scored = gather_object(scored)
    found.update(scored)
    columns: dict[str, list[Array]] = {TOKEN_COLUMN.format(name): [] for name in names}
    for i in range(len(dataset)):
        for column, span in zip(columns.values(), found[i] or (), strict=True):
            column.append(span)
    features = Features({name: List(Value("float32")) for name in columns})
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=features)], axis=1)


@contextmanager
def on_device(reference: Reference, policy: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the policy is on the device if it is the reference too; after, where it was.

    What shards a policy for training takes it from the CPU, and so it is still there before.
    """
    home = next(policy.parameters()).device
    moves = not reference.models and home.type != device.type
    if moves:
        policy.to(device)
    try:
        yield
    finally:
        if moves:
            policy.to(home)


def _sequence(row: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    """Prompt, response and mask of a response, as a cache wants them."""
    prompt = row.get(f"{name}_prompt_ids", row["prompt_ids"])
    return prompt, row[f"{name}_ids"], row.get(f"{name}_mask")


def _stored(
    row: Mapping[str, Any], names: Sequence[str], caches: Sequence[ReferenceCache]
) -> list[Array] | None:
    """Log-probabilities ``(K * n,)`` of each response, if every cache knows every one."""
    found = []
    for name in names:
        parts = [cache.get(*_sequence(row, name)) for cache in caches]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        found.append(np.concatenate(known))
    return found


def _scores(reference: Reference, policy: nn.Module, batch: Batch, accelerator: Any) -> list[Array]:
    """Log-probabilities ``(K, n)`` of each sequence of a batch."""
    bounds = batch["cu_seqlens"].tolist()
    moved = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with accelerator.autocast():
        scored = reference.score(policy, moved)
    assert scored is not None
    logps = scored.logps.float().cpu().view(reference.count, -1).numpy()
    return [logps[:, a:b] for a, b in pairwise(bounds)]


def _by_row(sequences: Sequence[Array], size: int) -> list[Sequence[Array]]:
    """Sequences by example, of a batch that lists them response by response."""
    return [sequences[i::size] for i in range(size)]
