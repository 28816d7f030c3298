"""What tokenisation did to a dataset: every issue by name, and one report that counts them.

An issue either drops its row (the row cannot be trained on) or is a note (the row stays, the reader
should know). The tokenizer flags rows; only this module counts, words and prints.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger("fastpref.data")


class Issue(enum.IntFlag):
    """What can be wrong with a dataset row, or worth knowing of it; values combine with ``|``."""

    NOT_TEXT = enum.auto()
    BAD_MESSAGES = enum.auto()
    TEMPLATE_ERROR = enum.auto()
    BAD_LABEL = enum.auto()
    BAD_NUMBER = enum.auto()
    BAD_MASK = enum.auto()
    BAD_GROUP = enum.auto()
    PROMPT_TOO_LONG = enum.auto()
    NOT_WHOLE = enum.auto()
    EMPTY_RESPONSE = enum.auto()
    IDENTICAL = enum.auto()
    IDENTICAL_TRUNCATED = enum.auto()
    PROMPT_TRUNCATED = enum.auto()
    RESPONSE_TRUNCATED = enum.auto()
    BOUNDARY_MOVED = enum.auto()
    DOUBLE_BOS = enum.auto()
    NO_EOS = enum.auto()
    EMPTY_PROMPT = enum.auto()


WORDS: dict[Issue, str] = {
    Issue.NOT_TEXT: "missing value or wrong type",
    Issue.BAD_MESSAGES: "malformed messages",
    Issue.TEMPLATE_ERROR: "chat template failed",
    Issue.BAD_LABEL: "label is neither true nor false",
    Issue.BAD_NUMBER: "missing or non-finite number",
    Issue.BAD_MASK: "mask and tokens differ in length",
    Issue.BAD_GROUP: "fewer than two responses",
    Issue.PROMPT_TOO_LONG: "prompt fills max_length",
    Issue.NOT_WHOLE: "longer than a limit, and references with other tokenizers score whole texts",
    Issue.EMPTY_RESPONSE: "empty response",
    Issue.IDENTICAL: "chosen equals rejected",
    Issue.IDENTICAL_TRUNCATED: "chosen equals rejected once truncated",
    Issue.PROMPT_TRUNCATED: "prompt truncated",
    Issue.RESPONSE_TRUNCATED: "response truncated",
    Issue.BOUNDARY_MOVED: "prompt/response boundary moved to their common prefix",
    Issue.DOUBLE_BOS: "double BOS removed",
    Issue.NO_EOS: "response without EOS",
    Issue.EMPTY_PROMPT: "empty prompt (nothing predicts the first response token)",
}
DROPS = (
    Issue.NOT_TEXT
    | Issue.BAD_MESSAGES
    | Issue.TEMPLATE_ERROR
    | Issue.BAD_LABEL
    | Issue.BAD_NUMBER
    | Issue.BAD_MASK
    | Issue.BAD_GROUP
    | Issue.PROMPT_TOO_LONG
    | Issue.NOT_WHOLE
    | Issue.EMPTY_RESPONSE
    | Issue.IDENTICAL
    | Issue.IDENTICAL_TRUNCATED
)
_SAMPLES = 3


class BadRow(Exception):
    """Raised while one row is read; carries the issue that drops it."""

    def __init__(self, issue: Issue, detail: str = "") -> None:
        """Of ``issue``, with a detail for the log."""
        super().__init__(detail or WORDS[issue])
        self.issue = issue


@dataclass
class TokenizationReport:
    """Counts of rows read, kept, dropped and altered, with reasons and token lengths.

    Attributes:
        rows: Rows examined (after unpairing, where that was asked for).
        kept: Rows that are left.
        dropped: Number of rows by what dropped them; a row counts under its first reason.
        notes: Number of kept rows by what was done to them; a row may count several times.
        samples: The first few ``example_ids`` of each reason and note.
        histograms: For the prompt and each response, ``histogram[n]`` = kept rows with n tokens.
        streaming: The dataset is a stream: the numbers are those of the part read so far, in this
            process, on the first pass.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[int]] = field(default_factory=dict)
    histograms: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    streaming: bool = False

    @property
    def bad(self) -> int:
        """Number of rows dropped."""
        return self.rows - self.kept

    def update(
        self,
        issues: np.ndarray[Any, Any],
        example_ids: np.ndarray[Any, Any],
        lengths: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        """Add rows to the counts.

        Args:
            issues: ``Issue`` bits of each row. Shape ``(rows,)``, int64.
            example_ids: Index of each row in the dataset as given. Shape ``(rows,)``, int64.
            lengths: Tokens of each row's prompt and responses, by name. Shapes ``(rows,)``.
        """
        kept = (issues & int(DROPS)) == 0
        self.rows += len(issues)
        self.kept += int(kept.sum())
        lowest = issues & -issues
        for issue, words in WORDS.items():
            drops = issue in DROPS
            # Enum order is severity order, so the lowest bit of a dropped row is its reason.
            hit = (lowest == int(issue)) if drops else kept & ((issues & int(issue)) != 0)
            if not hit.any():
                continue
            counts = self.dropped if drops else self.notes
            counts[words] = counts.get(words, 0) + int(hit.sum())
            samples = self.samples.setdefault(words, [])
            samples += [int(i) for i in example_ids[hit][: _SAMPLES - len(samples)]]
        for name, values in lengths.items():
            new = np.bincount(values[kept])
            old = self.histograms.get(name, np.zeros(0, dtype=np.int64))
            total = np.zeros(max(len(new), len(old)), dtype=np.int64)
            total[: len(new)] += new
            total[: len(old)] += old
            self.histograms[name] = total

    def check(self, max_bad_rows: int | None, ended: bool = False) -> None:
        """Raise ``ValueError`` if more than ``max_bad_rows`` rows were dropped, or all were.

        Args:
            max_bad_rows: Number of dropped rows that is still acceptable; None = any number.
            ended: Of a stream: no row is left to read.
        """
        reasons = ", ".join(
            f"{count} {words} (first: {self.samples[words]})"
            for words, count in self.dropped.items()
        )
        if max_bad_rows is not None and self.bad > max_bad_rows:
            raise ValueError(
                f"{self.bad} of {self.rows} rows cannot be trained on, more than "
                f"max_bad_rows={max_bad_rows}: {reasons}. Repair the rows or raise max_bad_rows."
            )
        if self.rows and not self.kept and (ended or not self.streaming):
            raise ValueError(f"none of the {self.rows} rows can be trained on: {reasons}")

    def lengths(self) -> dict[str, dict[str, float]]:
        """Token counts of kept rows: mean, min, p50, p90, p99, max and total, by column."""
        return {name: _summary(histogram) for name, histogram in self.histograms.items()}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain numbers, strings, lists and dicts (JSON-safe)."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "samples": {words: list(ids) for words, ids in self.samples.items()},
            "lengths": self.lengths(),
            "streaming": self.streaming,
        }

    def table(self) -> Any:
        """The report as one ``rich.table.Table``."""
        from rich.table import Table

        so_far = ", so far" if self.streaming else ""
        table = Table(title=f"Tokenisation: {self.kept:,} of {self.rows:,} rows kept{so_far}")
        table.add_column("what")
        table.add_column("rows", justify="right")
        table.add_column("detail")
        for prefix, counts in (("dropped: ", self.dropped), ("", self.notes)):
            for words, count in sorted(counts.items(), key=lambda item: -item[1]):
                first = ", ".join(map(str, self.samples[words]))
                table.add_row(
                    prefix + words, f"{count:,} ({count / self.rows:.1%})", f"e.g. {first}"
                )
        table.add_section()
        for name, stats in self.lengths().items():
            detail = "  ".join(f"{key} {stats[key]:,.0f}" for key in ("p50", "p90", "p99", "max"))
            table.add_row(f"{name} tokens", f"{stats['total']:,.0f}", detail)
        return table

    def print(self) -> None:
        """Print the table to the terminal, and one line of it to the log."""
        from rich.console import Console

        Console().print(self.table())
        logger.info(
            "tokenised %d rows, kept %d, dropped %s, notes %s",
            self.rows,
            self.kept,
            self.dropped,
            self.notes,
        )


def _summary(histogram: np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean, extremes and nearest-rank percentiles of a histogram over 0, 1, 2, ..."""
    rows = int(histogram.sum())
    if not rows:
        return dict.fromkeys(("mean", "min", "p50", "p90", "p99", "max", "total"), 0.0)
    total = float(np.arange(len(histogram)) @ histogram)
    ranks = [1, *(max(1, int(np.ceil(q * rows))) for q in (0.5, 0.9, 0.99)), rows]
    low, p50, p90, p99, high = np.searchsorted(np.cumsum(histogram), ranks).tolist()
    return {
        "mean": total / rows,
        "min": low,
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": high,
        "total": total,
    }
