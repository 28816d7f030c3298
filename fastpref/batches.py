"""Between dataset and trainer: rows of token ids, and the batches a step is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

import torch

from fastpref.attention import FLEX, attention_of
from fastpref.data import PreferenceCollator, TokenizationReport, lengths, tokenize_dataset
from fastpref.data.formats import response_names
from fastpref.data.sampling import BY_LENGTH
from fastpref.data.tokenize import token_counts
from fastpref.policy import Batch

logger = logging.getLogger("fastpref")

Corrupt = Callable[[list[int]], list[int]]

TOKEN_COLUMN = "ref_{}_token_logps"
"""Dataset column with the reference's log-probability of each token of a response, by its name."""


class TrainerCollator:
    """A collator whose batch also holds what the trainer wants to know without asking the device.

    Adds ``response_tokens``, the number of response tokens of all chosen, all rejected, ...;
    ``num_tokens``, of prompts and responses, a prompt counted for each response;
    ``ref_token_logps``, ``(n,)`` or ``(K, n)``, where the dataset holds a reference's
    log-probabilities by token; and, if asked for, ``prompts (B,)``: sequences of their own that
    score the prompts' tokens.

    Args:
        collator: Makes the batch, sequences response by response, each in the order of the rows.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        prompts: Score prompts too.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Batch], kind: str, prompts: bool = False
    ) -> None:
        """See the class."""
        self.collator, self.kind, self.prompts = collator, kind, prompts
        self.references = 1
        """Number of references in the columns."""
        self.packed = True
        """Several sequences lie in a row."""

    def unpack(self) -> None:
        """From here on every sequence has a row of its own, for models that follow no mask."""
        self.packed = False
        if hasattr(self.collator, "prefix_sharing"):
            self.collator.prefix_sharing = False

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch."""
        batch = dict(self.collator(features))
        missing = {"response_rows", "cu_seqlens", "position_ids"} - batch.keys()
        if missing:
            raise ValueError(
                f"data_collator: the batch has no {sorted(missing)}. Expected one as "
                "fastpref.data.PreferenceCollator makes it; leave data_collator out to use that"
            )
        if self.prompts:
            _add_prompts(batch, len(features))
        if not self.packed:
            _spread(batch)
        names = response_names(features[0], self.kind)
        bounds, size = batch["cu_seqlens"].tolist(), len(features)
        groups = bounds[::size] + ([] if (len(bounds) - 1) % size == 0 else bounds[-1:])
        batch["response_tokens"] = [b - a for a, b in pairwise(groups)]
        prompts = [f.get(f"{n}_prompt_ids", f["prompt_ids"]) for f in features for n in names]
        batch["num_tokens"] = sum(map(len, prompts)) + bounds[size * len(names)]
        columns = [TOKEN_COLUMN.format(name) for name in names]
        if columns[0] in features[0]:
            values = [f[name] for name in columns for f in features]
            rows = [torch.tensor(v, dtype=torch.float32).view(self.references, -1) for v in values]
            unscored = torch.zeros(self.references, bounds[-1] - bounds[size * len(names)])
            logps = torch.cat([*rows, unscored], dim=1)
            batch["ref_token_logps"] = logps[0] if self.references == 1 else logps
        return batch


def _add_prompts(batch: dict[str, Any], size: int) -> None:
    """Append to the sequences one for each prompt: all of its tokens but the first."""
    documents = batch["document_ids"].masked_fill(batch["branch_ids"] != 0, -1).flatten()
    places = [(documents == document).nonzero()[:, 0] for document in range(size)]
    spans = torch.tensor([max(len(place) - 1, 0) for place in places])
    tokens = batch["input_ids"].flatten()
    first = len(batch["lengths"])
    batch["prompts"] = torch.arange(first, first + size)
    grown = {
        "response_rows": torch.cat([place[:-1] for place in places]),
        "response_targets": torch.cat([tokens[place[1:]] for place in places]),
        "lengths": spans,
        "cu_seqlens": batch["cu_seqlens"][-1] + spans.cumsum(0),
    }
    for name, more in grown.items():
        batch[name] = torch.cat([batch[name], more.to(batch[name].dtype)])


def _spread(batch: dict[str, Any]) -> None:
    """Give each document a row of its own, with a mask of one flag a token."""
    documents, positions = batch["document_ids"].flatten(), batch["position_ids"].flatten()
    real = documents >= 0
    shape = (int(documents.max()) + 1, int(positions.max()) + 1)
    place = documents.long() * shape[1] + positions
    for name, fill in (
        ("input_ids", 0),
        ("position_ids", 0),
        ("branch_ids", 0),
        ("document_ids", -1),
    ):
        spread = batch[name].new_full((shape[0] * shape[1],), fill)
        spread[place[real]] = batch[name].flatten()[real]
        batch[name] = spread.view(shape)
    batch["response_rows"] = place[batch["response_rows"]]
    batch["attention_mask"] = (batch["document_ids"] >= 0).long()


def make_collator(args: Any, tokenizer: Any, combined: Any, model: Any) -> PreferenceCollator:
    """The collator that a :class:`fastpref.PreferenceConfig`, its losses and a model ask for."""
    pad = tokenizer.pad_token_id
    return PreferenceCollator(
        pad_token_id=(tokenizer.eos_token_id or 0) if pad is None else pad,
        kind=combined.kind,
        prefix_sharing=args.prefix_sharing,
        row_tokens=args.max_tokens_per_batch,
        dense_mask=attention_of(model) != FLEX,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


def count(batch: Batch) -> int:
    """Number of examples in a batch."""
    return len(next(batch[name] for name in ("pairs", "groups", "label") if name in batch))


def tokenised(dataset: Any, tokenizer: Any, args: Any, kind: str, **more: Any) -> Any:
    """:func:`fastpref.data.tokenize_dataset` with the options of a config: rows and report.

    Args:
        dataset: As for :func:`prepare_dataset`.
        tokenizer: Of the model.
        args: A :class:`fastpref.PreferenceConfig`.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        **more: What no config holds.
    """
    return tokenize_dataset(
        dataset,
        tokenizer,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        kind=kind,  # type: ignore[arg-type]
        unpair=kind == "unpaired",
        num_proc=args.dataset_num_proc,
        max_bad_rows=args.max_bad_rows,
        assistant_only=args.assistant_only_loss,
        **more,
    )


def prepare_dataset(
    dataset: Any,
    tokenizer: Any,
    args: Any,
    kind: str,
    name: str,
    extend: Callable[[Any], Any] = lambda dataset: dataset,
    vocab_size: int | None = None,
    whole: bool = False,
) -> tuple[Any, TokenizationReport]:
    """The dataset as token ids, and its report, printed if there is something to say.

    Args:
        dataset: ``Dataset`` or ``IterableDataset`` in a layout of :mod:`fastpref.data.formats`.
        tokenizer: Of the model.
        args: A :class:`fastpref.PreferenceConfig`.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        name: For the progress bar.
        extend: Adds the responses that are made of the others: :func:`extend_dataset`.
        vocab_size: Tokens that the model has; None = any id passes.
        whole: Drop rows that a limit would cut.
    """
    with args.main_process_first(desc=f"tokenising {name}"):
        desc = f"Tokenising {name}"
        more = {"vocab_size": vocab_size, "whole": whole, "desc": desc}
        dataset, report = tokenised(dataset, tokenizer, args, kind, **more)
        dataset = extend(dataset)
    if report.streaming and next(iter(dataset), None) is None:
        report.check(args.max_bad_rows, ended=True)
    if args.should_log and not report.streaming and (report.bad or report.notes):
        report.print()
    grouped = args.train_sampling_strategy in BY_LENGTH
    if grouped and not report.streaming and args.length_column_name not in dataset.column_names:
        counts = lengths(dataset, prefix_sharing=args.prefix_sharing)
        dataset = dataset.add_column(args.length_column_name, counts)
    return dataset, report


def extend_dataset(
    dataset: Any, needs: Collection[str], args: Any, corrupt: Corrupt | None = None
) -> Any:
    """The dataset with the responses that losses want and no dataset brings.

    ``corrupted``: the chosen response, with the prompt that ``corrupt`` makes of the prompt's token
    ids. ``mismatched``: the response to an earlier prompt, of as many as there are in a micro-batch
    of all ranks, so that they do not depend on how it is split.

    Args:
        dataset: Of token ids.
        needs: Of the losses.
        args: A :class:`fastpref.PreferenceConfig`.
        corrupt: See above; None: no such response.

    Raises:
        ValueError: ``corrupt`` gives something else than token ids, or no loss wants it.
    """
    if corrupt is not None and "corrupted" not in needs:
        raise ValueError(f"corrupt_context has no effect on {', '.join(args.loss_type)}: drop it")
    if corrupt is not None:
        dataset = dataset.map(_corrupted, fn_kwargs={"corrupt": corrupt})
    if "mismatched" not in needs:
        return dataset
    size = args.per_device_train_batch_size * args.world_size
    if size == 1:
        logger.warning(
            "per_device_train_batch_size=1: %s takes its reference point from responses to the "
            "other prompts of a batch, of which there are none, so that it stays 0. Use 2 or more; "
            "gradient_accumulation_steps does not help.",
            ", ".join(args.loss_type),
        )
    features = dataset.features
    if features is not None:
        names = [name for name in features if name in ("completion_ids", "completion_mask")]
        added = {name.replace("completion", "mismatched"): features[name] for name in names}
        features = type(features)({**features, **added})
    return dataset.map(
        _mismatched,
        batched=True,
        batch_size=size * max(1, 1000 // size),
        features=features,
        fn_kwargs={"size": size},
    )


def _corrupted(row: Mapping[str, Any], corrupt: Corrupt) -> dict[str, Any]:
    prompt = list(corrupt(list(row["prompt_ids"])))
    if not prompt or not all(isinstance(token, int) for token in prompt):
        raise ValueError(
            f"corrupt_context must give a list of token ids, one at least; of example "
            f"{row['example_ids']} it gave {prompt!r}"
        )
    chosen = {f"corrupted_{x}": row[f"chosen_{x}"] for x in ("ids", "mask") if f"chosen_{x}" in row}
    return {**chosen, "corrupted_prompt_ids": prompt}


def _mismatched(rows: Mapping[str, list[Any]], size: int) -> dict[str, list[Any]]:
    """For each prompt of every ``size`` the nearest earlier response to another one, from their end
    on at their start; where all prompts are the same, an empty one."""
    prompts = rows["prompt_ids"]
    places = []
    for i, prompt in enumerate(prompts):
        first = i - i % size
        last = min(first + size, len(prompts))
        earlier = [*range(i - 1, first - 1, -1), *range(last - 1, i, -1)]
        places.append(next((j for j in earlier if prompts[j] != prompt), None))
    return {
        f"mismatched_{part}": [[] if j is None else rows[f"completion_{part}"][j] for j in places]
        for part in ("ids", "mask")
        if f"completion_{part}" in rows
    }


def likelihood_rates(dataset: Any, kind: str, prompts: bool) -> dict[str, float]:
    """Likelihood tokens for each example of a dataset, by the losses' keyword for them.

    With them an evaluation does not depend on how the data falls into batches. Nothing for streams.
    """
    if kind != "pair" or not hasattr(dataset, "__len__"):
        return {}

    def total(column: str) -> int:
        if f"{column}_mask" in dataset.column_names:
            return sum(map(sum, dataset[f"{column}_mask"]))
        return int(token_counts(dataset, [f"{column}_ids"])[f"{column}_ids"].sum())

    size = max(len(dataset), 1)
    found = {"tokens_per_pair": total("chosen") / size}
    if prompts:
        found["prompt_tokens_per_pair"] = (total("prompt") - size) / size
    if "third_ids" in dataset.column_names:
        found["third_tokens_per_pair"] = total("third") / size
    return found


def columns_of(*datasets: Any) -> set[str]:
    """Names of the columns that all of these have: datasets, streams, dicts of them, or None."""
    found: list[set[str]] = []

    def note(dataset: Any, name: str) -> None:
        found.append(set(getattr(dataset, "column_names", None) or next(iter(dataset))))

    for dataset in datasets:
        each(note, dataset, "")
    return set.intersection(*found)


def refuse_splits(dataset: Any, name: str) -> None:
    """Raise ``TypeError`` for several datasets by name where one is expected: argument ``name``."""
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset)) or "none"
        first = next(iter(dataset), "train")
        raise TypeError(
            f"{name}: expected one dataset, got a {type(dataset).__name__} with the splits {names}"
            f". Pass one of them: {name}=dataset[{first!r}]"
        )


def each(change: Callable[[Any, str], Any], dataset: Any, name: str) -> Any:
    """``change(dataset, name)``; of a dict of datasets, each by its key; of None, None."""
    if isinstance(dataset, Mapping):
        return {key: change(value, key) for key, value in dataset.items()}
    return None if dataset is None else change(dataset, name)
