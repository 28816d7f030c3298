"""``fastpref inspect``: what tokenisation and truncation do to a dataset, before it is trained on.

The rows that are dropped or altered and why, how long they are and what a limit cuts off, and the
tokens around the boundary of prompt and response. The exit status is 0 if every row can be trained
on, 1 if some cannot (more than ``--max_bad_rows``), 2 if the dataset cannot be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastpref.data import load_preference_dataset, tokenize_dataset
from fastpref.data.formats import response_names
from fastpref.data.report import WORDS, Issue, TokenizationReport
from fastpref.data.tokenize import token_counts
from fastpref.scoring import kind_of

Array = np.ndarray[Any, Any]
_BINS, _BAR = 10, 36
_BEFORE, _AFTER = 8, 6


def main(argv: Sequence[str]) -> int:
    """Prints what it found; 0, or 1 if too many rows cannot be trained on."""
    parser = argparse.ArgumentParser(prog="fastpref inspect", description=__doc__)
    add = parser.add_argument
    add("dataset", help="hub id, or a file or directory: json, jsonl, parquet, csv")
    add("--model", required=True, help="whose tokenizer: hub id or directory")
    add("--dataset_config", help="configuration of a hub dataset")
    add("--split", default="train", help="of the dataset, sliced if you like: train[:1000]")
    add("--unpair", action="store_true", help="make two single responses of each pair")
    add("--max_length", type=int, default=1024, help="of prompt + response, tokens; 0: no limit")
    add("--max_prompt_length", type=int, help="longest prompt; its end is kept")
    add("--max_completion_length", type=int, help="longest response; its start is kept")
    add("--truncation_mode", default="keep_start", choices=("keep_start", "keep_end"))
    add("--max_bad_rows", type=int, default=0, help="rows that may be dropped")
    add("--show", type=int, default=3, help="rows whose boundary is shown")
    add("--json", action="store_true", help="print it as JSON")
    given = parser.parse_args(argv)
    from fastpref.models import load_tokenizer

    tokenizer = load_tokenizer(given.model)
    dataset = load_preference_dataset(given.dataset, given.split, name=given.dataset_config)
    limits = {
        "max_length": given.max_length or None,
        "max_prompt_length": given.max_prompt_length,
        "max_completion_length": given.max_completion_length,
        "truncation_mode": given.truncation_mode,
    }
    found = Inspection(dataset, tokenizer, limits, unpair=given.unpair)
    if given.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        found.print(given.show)
    return 1 if found.report.bad > given.max_bad_rows else 0


class Inspection:
    """A dataset tokenised with and without limits, and what is to be said of it.

    Args:
        dataset: In any layout of :mod:`fastpref.data.formats`.
        tokenizer: Of the model.
        limits: ``max_length`` and the like, of :func:`fastpref.data.tokenize_dataset`.
        unpair: Make two single responses of each pair.

    Raises:
        ValueError: The dataset cannot be read, or no row of it can be trained on.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, limits: Mapping[str, Any], *, unpair: bool = False
    ) -> None:
        """See the class."""
        self.tokenizer, self.limits = tokenizer, dict(limits)
        self.kind = "unpaired" if unpair else kind_of(dataset.column_names)
        options: dict[str, Any] = {"kind": self.kind, "unpair": unpair}
        whole, _ = tokenize_dataset(dataset, tokenizer, max_length=None, **options)
        self.rows, self.report = tokenize_dataset(dataset, tokenizer, **limits, **options)
        self.names = response_names(self.rows.column_names, self.kind)
        self.before, self.after = self._lengths(whole), self._lengths(self.rows)
        """Tokens of every row that is read, uncut, and of every row that is kept, cut."""

    def _lengths(self, rows: Any) -> dict[str, Array]:
        columns = ["prompt_ids", *(f"{name}_ids" for name in self.names)]
        counts = token_counts(rows, columns)
        found = {name.removesuffix("_ids"): values for name, values in counts.items()}
        longest = np.max([found[name] for name in self.names], axis=0)
        return {**found, "prompt + longest response": found["prompt"] + longest}

    def ends(self) -> dict[str, int]:
        """Of the kept rows: how many prompts begin with BOS, responses hold one, or end in EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prompts, replies = self.rows["prompt_ids"], [self.rows[f"{n}_ids"] for n in self.names]
        flat = [ids for column in replies for ids in column if len(ids)]
        return {
            "prompts": len(prompts),
            "prompts that begin with BOS": sum(ids[:1] == [bos] for ids in prompts),
            "prompts that hold BOS twice": sum(ids[:2] == [bos, bos] for ids in prompts),
            "responses": len(flat),
            "responses that hold BOS": sum(bos in ids for ids in flat) if bos != eos else 0,
            "responses that end in EOS": sum(ids[-1] == eos for ids in flat),
        }

    def cut(self) -> dict[str, int]:
        """Tokens of all rows before the limits, and of the kept rows after them."""
        return {
            f"{name} tokens {when}": int(counts[name].sum())
            for name in ("prompt", *self.names)
            for when, counts in (("read", self.before), ("kept", self.after))
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts (JSON-safe)."""
        return {
            "kind": self.kind,
            "limits": self.limits,
            **self.report.to_dict(),
            "ends": self.ends(),
            "cut": self.cut(),
        }

    def boundary(self, row: int) -> list[tuple[str, list[str], list[str]]]:
        """Tokens on both sides of the boundary of a kept row: response, prompt's end, its start."""
        example = self.rows[row]
        words = self.tokenizer.convert_ids_to_tokens
        return [
            (
                name,
                words(example.get(f"{name}_prompt_ids", example["prompt_ids"])[-_BEFORE:]),
                words(example[f"{name}_ids"][:_AFTER]),
            )
            for name in self.names
        ]

    def sample(self, count: int) -> list[int]:
        """Kept rows to look at: those whose boundary moved first, then the first ones."""
        ids = list(self.rows["example_ids"])
        moved = self.report.samples.get(WORDS[Issue.BOUNDARY_MOVED], [])
        first = [ids.index(example) for example in moved if example in ids]
        return list(dict.fromkeys([*first, *range(len(ids))]))[:count]

    def print(self, show: int) -> None:
        """Print it for people."""
        from rich.console import Console
        from rich.text import Text

        console = Console()
        console.print(self.report.table())
        limit = self.limits["max_length"]
        for name, counts in self.before.items():
            total = " + " in name
            console.print(histogram(name, counts, limit if total else None))
        for name, value in (self.ends() | self.cut()).items():
            console.print(f"  {name:<28} {value:,}", highlight=False)
        for row in self.sample(show):
            example = self.rows[row]["example_ids"]
            for name, before, after in self.boundary(row):
                line = Text(f"row {example}, {name}: ", style="dim")
                line.append(" ".join(before), style="cyan")
                line.append(" | ", style="bold")
                line.append(" ".join(after), style="green")
                console.print(line, soft_wrap=True)
        console.print(verdict(self.report), highlight=False)


def histogram(name: str, counts: Array, limit: int | None = None) -> Any:
    """Lengths as bars, a ``rich.text.Text``; what is longer than ``limit`` is marked as cut.

    Args:
        name: What was counted.
        counts: Tokens of each row. Shape ``(rows,)``.
        limit: Longest that stays whole.
    """
    from rich.text import Text

    top = int(counts.max(initial=1))
    width = -(-(top + 1) // _BINS)
    bins = np.bincount(counts // width, minlength=1)
    text = Text(f"{name}, tokens\n", style="bold")
    digits = len(f"{top:,}")
    for k, rows in enumerate(bins.tolist()):
        low, high = k * width, min((k + 1) * width - 1, top)
        beyond = limit is not None and low > limit
        bar = "█" * max(round(_BAR * rows / int(bins.max())), 1 if rows else 0)
        text.append(f"  {low:>{digits},} - {high:>{digits},}  ", style="dim")
        text.append(f"{bar:<{_BAR}} ", style="red" if beyond else "blue")
        text.append(f"{rows:,}" + ("  over max_length\n" if beyond and rows else "\n"), style="")
    over = int((counts > limit).sum()) if limit is not None else 0
    if over:
        text.append(f"  {over:,} of {len(counts):,} rows are longer than {limit:,}\n", style="red")
    return text


def verdict(report: TokenizationReport) -> str:
    """One line: can it be trained on?"""
    if not report.bad:
        return f"all {report.rows:,} rows can be trained on"
    return f"{report.bad:,} of {report.rows:,} rows cannot be trained on: they are dropped"
