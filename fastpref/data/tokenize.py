"""Datasets in any layout of ``formats`` -> token ids, with an account of every row lost or altered.

One batched ``map`` of ``rows.tokenize_batch`` flags rows; the report is counted from the flags, so
it is the same whether the map ran or came from the cache. The cache key is the data, the tokenizer,
the layout, the limits and the source of the code that ran: never a training argument.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import formats, rows, turns
from .formats import Kind, Layout
from .report import DROPS, TokenizationReport
from .rows import ISSUES, Limits

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

AnyDataset = TypeVar("AnyDataset", "Dataset", "IterableDataset")
logger = logging.getLogger("fastpref.data")


def tokenize_dataset(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    kind: Kind = "pair",
    unpair: bool = False,
    num_proc: int | None = None,
    batch_size: int = 1000,
    max_bad_rows: int | None = None,
    extra_columns: Sequence[str] = (),
    vocab_size: int | None = None,
    whole: bool = False,
    assistant_only: bool = False,
    desc: str = "Tokenising",
) -> tuple[AnyDataset, TokenizationReport]:
    """The dataset as token ids, and the report of what became of each row.

    Equals, for an ordinary row, ``prompt_ids = tokenizer(prompt)`` and ``chosen_ids =
    tokenizer(prompt + chosen + eos)[len(prompt_ids):]``; with messages, ``apply_chat_template`` in
    place of ``tokenizer`` (and no EOS added: the template's business). Ids are TRL 1.16's.

    Args:
        dataset: ``Dataset`` or ``IterableDataset`` in a layout that ``formats`` lists. A dataset
            that holds token ids is only truncated and checked.
        tokenizer: With a chat template if the data is conversational.
        max_length: Most tokens of prompt + response; None = no limit.
        truncation_mode: ``"keep_start"`` or ``"keep_end"``; ``rows`` says how each cuts.
        max_prompt_length: Most tokens of the prompt, cut at its start; None = no limit.
        max_completion_length: Most tokens of a response, cut at its end; None = no limit.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        unpair: With ``kind="unpaired"``, make two examples of each pair of a paired dataset.
        num_proc: Processes for a ``Dataset``; a fast tokenizer is already parallel in one.
        batch_size: Rows tokenised at a time.
        max_bad_rows: Most rows that may be dropped before it is an error; None = any number, as
            long as a row is left.
        extra_columns: Numeric columns to keep beyond ``formats.NUMERIC_COLUMNS``.
        vocab_size: Tokens that the model has; None = any id passes.
        whole: Drop rows that a limit would cut.
        assistant_only: Of dialogues the assistant's turns alone count; needs a fast tokenizer.
        desc: Caption of the progress bar.

    Returns:
        The dataset with ``prompt_ids`` and ``chosen_ids``, ``rejected_ids`` (``third_ids``), or
        ``completion_ids``, ``label``, or ``completion_1_ids`` and so on (empty where a group has
        fewer), ``scores``; masks and numeric columns where given; ``example_ids``, the
        row's index in ``dataset`` (kept if there already). And the report; for a stream it fills
        as the stream is read.

    Raises:
        ValueError: a column is missing, an option is out of range, the dataset is empty, the
            tokenizer has no EOS or chat template where one is needed, a token id is outside the
            vocabulary, or too many rows are bad.
        TypeError: ``dataset`` is not one of the two types.
    """
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            f"dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}"
            " (of a DatasetDict, pass one split)"
        )
    limits = Limits(
        *(max_length, truncation_mode, max_prompt_length, max_completion_length),
        *(vocab_size, whole),
    )
    dataset = dataset.with_format(None)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset has no rows")
    columns = dataset.column_names or list(first)
    renames = formats.canonical_names(columns)
    names = [renames.get(name, name) for name in columns]
    if kind == "group" and "completions" in names:
        names = list(
            formats.expand_groups({name: [] for name in names}, _group_size(dataset, first))
        )
    layout: Layout = formats.resolve_layout(names, kind, unpair=unpair, extra_columns=extra_columns)
    if assistant_only:
        layout = _masked(layout, tokenizer)
    if layout.unpair:
        logger.info("unpairing: every pair becomes one desirable and one undesirable example")
    arguments: dict[str, Any] = {
        "function": rows.tokenize_batch,
        "with_indices": True,
        "batched": True,
        "batch_size": batch_size,
        "remove_columns": columns,
        "features": _features(layout, first),
        "fn_kwargs": {"tokenizer": tokenizer, "layout": layout, "limits": limits},
    }
    ids = ("prompt_ids", *(name + "_ids" for name in layout.responses))
    if isinstance(dataset, datasets.IterableDataset):
        report = TokenizationReport(streaming=True)
        tally = _Tally(report, ids, max_bad_rows)
        flagged = dataset.map(**arguments)
        good = flagged.map(tally, batched=True, with_indices=True, remove_columns=[ISSUES])
        return good, report
    report = TokenizationReport()
    fingerprint = _fingerprint(dataset, tokenizer, layout, limits)
    flagged = dataset.map(**arguments, num_proc=num_proc, new_fingerprint=fingerprint, desc=desc)
    issues, example_ids = (np.asarray(flagged.data.column(c)) for c in (ISSUES, "example_ids"))
    report.update(issues, example_ids, token_counts(flagged, ids))
    report.check(max_bad_rows)
    good = flagged.remove_columns(ISSUES)
    if report.bad:
        good = good.select(np.flatnonzero((issues & int(DROPS)) == 0))
    return good, report


def _masked(layout: Layout, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The layout with a mask for each response, which counts the assistant's turns."""
    if layout.tokenized:
        raise ValueError(
            "assistant_only_loss finds the assistant's turns in messages, and the dataset holds "
            "token ids: give it mask columns such as 'chosen_mask' instead"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            "assistant_only_loss needs a fast tokenizer, which tells where in the text its tokens "
            f"lie; got {type(tokenizer).__name__}"
        )
    return replace(layout, masks=layout.responses, assistant_only=True)


def _group_size(dataset: AnyDataset, first: Mapping[str, Any]) -> int:
    """Responses of the largest group; of a stream, of its first row."""
    import datasets
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    if isinstance(dataset, datasets.IterableDataset):
        return len(first["completions"] or ())
    column = dataset.select_columns(["completions"]).with_format("arrow")
    sizes = [pc.max(pc.list_value_length(t["completions"])) for t in column.iter(10_000)]
    return max((size.as_py() or 0 for size in sizes), default=0)


def token_counts(dataset: Dataset, columns: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Length of each row's list, for each list column. Equals ``[len(x) for x in dataset[c]]``.

    Args:
        dataset: A ``datasets.Dataset``.
        columns: Names of columns that hold lists.

    Returns:
        int64 arrays of shape ``(rows,)`` by column, read without making Python lists.
    """
    import pyarrow.compute as pc

    counts: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in columns}
    arrow = dataset.select_columns(list(columns)).with_format("arrow")
    for table in arrow.iter(batch_size=10_000):
        for name in columns:
            lengths = pc.list_value_length(table.column(name)).to_numpy()
            counts[name].append(lengths.astype(np.int64))
    empty = np.zeros(0, dtype=np.int64)
    return {name: np.concatenate([empty, *parts]) for name, parts in counts.items()}


def _features(layout: Layout, first: Mapping[str, Any]) -> Any:
    """Types of the output columns, so that they do not depend on the rows a worker happened on."""
    from datasets import Features, List, Value

    sample = rows.normalise({name: [value] for name, value in first.items()}, layout)[0]
    number = Value("float64")
    features: dict[str, Any] = {"prompt_ids": List(Value("int32"))}
    features |= {name + "_ids": List(Value("int32")) for name in layout.responses}
    features |= {name + "_mask": List(Value("int8")) for name in layout.masks}
    for name in layout.numbers:
        features[name] = List(number) if isinstance(sample[name], list) else number
    if layout.kind == "unpaired":
        features["label"] = Value("bool")
    return Features(features | {"example_ids": Value("int64"), ISSUES: Value("int64")})


def _fingerprint(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, layout: Layout, limits: Limits
) -> str:
    from datasets.fingerprint import Hasher

    code = [inspect.getsource(module) for module in (formats, rows, turns)]
    key = [dataset._fingerprint, Hasher.hash(tokenizer), repr(layout), repr(limits), code]
    return str(Hasher.hash(key))


class _Tally:
    """The step of a stream that counts flagged rows into the report and lets good ones pass."""

    def __init__(
        self, report: TokenizationReport, columns: Sequence[str], max_bad_rows: int | None
    ) -> None:
        self.report, self.columns, self.max_bad_rows = report, columns, max_bad_rows

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        issues = np.asarray(batch[ISSUES], dtype=np.int64)
        if indices[0] >= self.report.rows:  # a later pass over the stream is not counted again
            ids = np.asarray(batch["example_ids"], dtype=np.int64)
            lengths = {c: np.asarray([len(x) for x in batch[c]]) for c in self.columns}
            self.report.update(issues, ids, lengths)
            self.report.check(self.max_bad_rows)
        good = np.flatnonzero((issues & int(DROPS)) == 0).tolist()
        return {name: [batch[name][i] for i in good] for name in batch if name != ISSUES}
