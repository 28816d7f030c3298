"""References with a tokenizer of their own: they score the same texts, each as its own token ids.

What can be compared over tokenizers is the sum over a response. So these references score the data
before training, and each example keeps a sum for each. In the cache their scores lie token by
token, under the ids of their own tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref import selfcheck
from fastpref.batches import TOKEN_COLUMN, TrainerCollator, make_collator
from fastpref.data import tokenize_dataset
from fastpref.data.formats import response_names
from fastpref.models import vocab_size
from fastpref.ref_columns import REF_COLUMNS
from fastpref.reference_cache import ReferenceCache
from fastpref.reference_policy import Frozen
from fastpref.scoring import score_dataset

logger = logging.getLogger("fastpref")


def add_texts(rows: Any, dataset: Any, reference: Any, kind: str, args: Any, name: str) -> Any:
    """The rows with the ids that each reference's own tokenizer makes of the same texts.

    Args:
        rows: ``dataset`` as the policy's token ids, no row cut.
        dataset: In any layout of :mod:`fastpref.data.formats` that holds text.
        reference: A :class:`fastpref.reference_policy.Frozen`.
        kind: ``"pair"`` or ``"unpaired"``.
        args: A :class:`fastpref.PreferenceConfig`.
        name: What the data is to people: ``"train"``.

    Returns:
        Rows that every tokenizer could read, with ``ref1_prompt_ids``, ``ref1_chosen_ids`` and so
        on for the references that have their own, counted from 1.

    Raises:
        ValueError: The data is a stream, holds token ids or twice the same ``example_ids``, or no
            row is left.
    """
    from datasets import concatenate_datasets

    stream = not hasattr(rows, "__len__")
    if stream or "prompt_ids" in dataset.column_names:
        raise ValueError(
            "a reference has another tokenizer than the policy, so it scores the texts before "
            f"training, and the {name} data is {'a stream' if stream else 'token ids'}: give it as "
            "text and without streaming, or choose references with the policy's tokenizer"
        )
    keys, parts = _keys(rows), []
    if len(set(keys)) < len(keys):
        raise ValueError(
            f"the column example_ids of the {name} data names rows twice, which are to be found "
            "again as other token ids: make them unique, or drop the column"
        )
    for k, tokenizer in enumerate(reference.tokenizers, 1):
        if tokenizer is None:
            continue
        with args.main_process_first(desc=f"tokenising {name}"):
            texts, report = tokenize_dataset(
                dataset,
                tokenizer,
                max_length=None,
                kind=kind,  # type: ignore[arg-type]
                unpair=kind == "unpaired",
                num_proc=args.dataset_num_proc,
                max_bad_rows=args.max_bad_rows,
                vocab_size=vocab_size(reference.models[k - 1]),
                assistant_only=args.assistant_only_loss,
                desc=f"Tokenising {name} for reference {k}",
            )
        if report.bad and args.should_log:
            report.print()
        places = {key: i for i, key in enumerate(_keys(texts))}
        texts = texts.select_columns([c for c in texts.column_names if _of_tokens(c)])
        parts.append((places, texts.rename_columns({c: f"ref{k}_{c}" for c in texts.column_names})))
    shared = [i for i, key in enumerate(keys) if all(key in places for places, _ in parts)]
    if not shared:
        raise ValueError(f"no row of the {name} data can be read by every reference's tokenizer")
    if len(shared) < len(keys):
        logger.warning(
            "%s: %d of %d rows are left out, which not every reference's tokenizer can read",
            *(name, len(keys) - len(shared), len(keys)),
        )
    aligned = [texts.select([places[keys[i]] for i in shared]) for places, texts in parts]
    return concatenate_datasets([rows.select(shared), *aligned], axis=1)


def _keys(rows: Any) -> list[Any]:
    """What tells a row from the others: its place in the source, and of a pair's two its label."""
    ids = list(rows["example_ids"])
    return list(zip(ids, rows["label"], strict=True)) if "label" in rows.column_names else ids


def _of_tokens(column: str) -> bool:
    return column.endswith(("_ids", "_mask")) and column != "example_ids"


def score_texts(
    reference: Frozen,
    policy: Any,
    rows: Any,
    tokenizer: Any,
    args: Any,
    combined: Any,
    *,
    kind: str,
    description: str,
    caches: Sequence[ReferenceCache] = (),
    **options: Any,
) -> Any:
    """The rows with ``ref_chosen_logps`` and so on: a sum for each reference, a list of several.

    Args:
        reference: Placed.
        policy: The model that trains.
        rows: Of :func:`add_texts`.
        tokenizer: Of the policy.
        args: A :class:`fastpref.PreferenceConfig`.
        combined: The losses.
        kind: ``"pair"`` or ``"unpaired"``.
        description: What the rows are to people.
        caches: One for each reference, or none.
        **options: ``batch_size`` and ``accelerator``, as for :func:`score_dataset`.

    Raises:
        FloatingPointError: A log-probability is not finite.
        RuntimeError: A reference's self-check failed.
    """
    from datasets import Dataset, concatenate_datasets

    names = response_names(rows.column_names, kind)
    texts = [c for c in rows.column_names if _of_tokens(c) and c.startswith("ref")]
    plain = rows.remove_columns(texts)
    sums: list[list[list[float]]] = []
    for k, one in enumerate(reference.each(), 1):
        own, mine = (
            plain,
            {c: c.removeprefix(f"ref{k}_") for c in texts if c.startswith(f"ref{k}_")},
        )
        if mine:
            kept = {"label", "example_ids"} & set(rows.column_names)
            own = rows.select_columns([*mine, *kept]).rename_columns(mine)
        model, reads = one.models[0], reference.tokenizers[k - 1] or tokenizer
        collator = TrainerCollator(make_collator(args, reads, combined, model), kind)
        if args.self_check:
            selfcheck.check_rows(
                *(model, own, collator, options["accelerator"], kind), **one.options
            )
        scored = score_dataset(
            one,
            policy,
            own,
            collator,
            kind=kind,
            description=f"{description}, reference {k}",
            caches=caches[k - 1 : k],
            **options,
        )
        sums.append([_sums(scored[TOKEN_COLUMN.format(n)]) for n in names])
    columns = {}
    for response, found in zip(names, zip(*sums, strict=True), strict=True):
        column = REF_COLUMNS[kind][0] if kind == "unpaired" else f"ref_{response}_logps"
        columns[column] = found[0] if len(found) == 1 else np.stack(found, 1).tolist()
    return concatenate_datasets([plain, Dataset.from_dict(columns)], axis=1)


def _sums(column: Any) -> list[float]:
    return [float(np.asarray(values, np.float64).sum()) for values in column]
