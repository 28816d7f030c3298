"""``fastpref inspect``: what tokenisation and truncation do to a dataset, before it is trained on.

Takes the options of ``fastpref train``, as flags or YAML, and tokenises by the same call. Told are
the rows that are dropped or altered and why, how long they are and what a limit cuts off, whether
the tokenizer is the model's, and the tokens around the boundary of prompt and response. Nothing is
run and no weights are read. The exit status is 0 if every row can be trained on, 1 if some cannot
(more than ``--max_bad_rows``), 2 if the dataset cannot be read.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.batches import tokenised
from fastpref.config import PreferenceConfig
from fastpref.data.formats import Kind, response_names
from fastpref.data.report import WORDS, Issue, TokenizationReport
from fastpref.data.tokenize import token_counts
from fastpref.keys import as_list
from fastpref.models import load_config, load_tokenizer
from fastpref.objective import FROM_REFERENCE, make_losses
from fastpref.options import parse_options
from fastpref.ref_tokenizers import tokenizers_of
from fastpref.train import load_data

USAGE = "fastpref inspect DATASET --model MODEL [--show 3] [options of fastpref train]"

Array = np.ndarray[Any, Any]
_BINS, _BAR = 16, 36
_BEFORE, _AFTER = 8, 6
_LIMITS = ("max_length", "max_prompt_length", "max_completion_length")


def main(argv: Sequence[str]) -> int:
    """Prints what it found; 0, or 1 if too many rows cannot be trained on."""
    found, allowed, own = parse(argv)
    if own.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        found.print(own.show)
    return 1 if found.report.bad > allowed else 0


def _own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("inspect")
    add = group.add_argument
    add("--split", help="short for --dataset_train_split; sliced if you like: train[:1000]")
    add("--show", type=int, default=3, help="rows whose boundary is shown")
    add("--json", action="store_true", help="print it as JSON")
    return parser


def parse(argv: Sequence[str]) -> tuple[Inspection, int, argparse.Namespace]:
    """What flags, and the YAML file that ``--config`` names, describe, inspected.

    Args:
        argv: Flags; the dataset may come first without one.

    Returns:
        What was found, the number of rows that may be dropped, and the command's own flags.

    Raises:
        ValueError: A value is missing, out of range, or contradicts another; the dataset cannot
            be read, no row of it can be trained on, or its tokens are not the model's.
        TypeError: An option does not exist; the message names the nearest.
        FileNotFoundError: Model or dataset is a path that is not there.
    """
    named = bool(argv) and not argv[0].startswith("-")
    # nothing is run, so it must not matter whether there is the GPU that training is meant for
    flags = [*(["--dataset"] if named else []), *argv, "--use_cpu", "true"]
    data, model, config, own = parse_options(flags, USAGE, [_own_flags()])
    name = model.model_name_or_path
    if name is None:
        raise ValueError(f"--model is missing. Usage: {USAGE}")
    if not (data.dataset_name or data.datasets):
        raise ValueError(f"the dataset is missing. Usage: {USAGE}")
    if data.dataset_streaming:
        raise ValueError(
            "dataset_streaming: a stream has no end to count to. Read it whole by "
            "--dataset_streaming false, or a part of it by --split 'train[:1000]' as well"
        )
    data.dataset_train_split = own.split or data.dataset_train_split
    combined = make_losses(config)
    kind: Any = combined.kind
    dataset, _ = load_data(data, config)
    given: Any = config.model_init_kwargs or {}
    revision = given.get("revision", model.model_revision)
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code, revision=revision)
    known = load_config(name, config, revision=revision).get_text_config()
    references = as_list(model.ref_model_name_or_path or config.ref_models or [])
    asked = references if combined.needs & FROM_REFERENCE else []
    own_tokenizers = tokenizers_of(asked, None, tokenizer, config)
    found = Inspection(
        *(dataset, tokenizer, config, kind),
        vocab_size=getattr(known, "vocab_size", None),
        whole=any(one is not None for one in own_tokenizers),
    )
    return found, config.max_bad_rows or 0, own


class Inspection:
    """A dataset tokenised with and without limits, and what is to be said of it.

    Args:
        dataset: In any layout of :mod:`fastpref.data.formats`.
        tokenizer: Of the model.
        config: Limits and ``assistant_only_loss``; any number of rows may be bad.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        vocab_size: Tokens that the model has; None = any id passes.
        whole: Drop rows that a limit would cut, as where a reference reads texts.

    Raises:
        ValueError: The dataset cannot be read, no row of it can be trained on, or a token of it is
            none of the model's.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        config: PreferenceConfig,
        kind: Kind,
        *,
        vocab_size: int | None = None,
        whole: bool = False,
    ) -> None:
        """See the class."""
        self.tokenizer, self.kind, self.vocab_size = tokenizer, kind, vocab_size
        self.limits = {name: getattr(config, name) for name in (*_LIMITS, "truncation_mode")}
        self.assistant_only = config.assistant_only_loss
        cut, uncut = copy.copy(config), copy.copy(config)
        cut.max_bad_rows = uncut.max_bad_rows = None
        for name in _LIMITS:
            setattr(uncut, name, None)
        options: dict[str, Any] = {"vocab_size": vocab_size, "whole": whole}
        every, _ = tokenised(dataset, tokenizer, uncut, kind, **options)
        self.rows, self.report = tokenised(dataset, tokenizer, cut, kind, **options)
        self.names = response_names(self.rows.column_names, kind)
        self.before, self.after = self._lengths(every), self._lengths(self.rows)
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
        """Tokens of all rows before the limits, and of the kept rows after them; of responses with
        masks also those that count in the loss."""
        found = {}
        for name in ("prompt", *self.names):
            found[f"{name} tokens read"] = int(self.before[name].sum())
            found[f"{name} tokens kept"] = int(self.after[name].sum())
            if f"{name}_mask" in self.rows.column_names:
                counted = sum(sum(mask) for mask in self.rows[f"{name}_mask"])
                found[f"{name} tokens that count"] = counted
        return found

    def vocabulary(self) -> dict[str, int | None]:
        """Number of tokens by the tokenizer's highest id, and of the model."""
        ids = self.tokenizer.get_vocab().values()
        return {
            "tokens of the tokenizer": max(ids, default=-1) + 1,
            "tokens of the model": self.vocab_size,
        }

    def foreign(self) -> str:
        """What to say of ids of the tokenizer that the model lacks; empty if there are none."""
        size = self.vocab_size
        more = [] if size is None else [i for i in self.tokenizer.get_vocab().values() if i >= size]
        if not more:
            return ""
        words = self.tokenizer.convert_ids_to_tokens(sorted(more)[:3])
        return (
            f"{len(more):,} tokens of the tokenizer are none of the model's ({', '.join(words)}"
            f"{', ...' if len(more) > 3 else ''}); this data holds none of them. Add them by "
            "model.resize_token_embeddings(len(tokenizer)), or take the model's own tokenizer"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts (JSON-safe)."""
        return {
            "kind": self.kind,
            "limits": self.limits,
            "assistant_only_loss": self.assistant_only,
            **self.report.to_dict(),
            "vocabulary": self.vocabulary(),
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
        for name, value in (self.ends() | self.cut() | self.vocabulary()).items():
            told = "unknown" if value is None else f"{value:,}"
            console.print(f"  {name:<28} {told}", highlight=False)
        if foreign := self.foreign():
            console.print(Text(foreign, style="red"), soft_wrap=True)
        for row in self.sample(show):
            example = self.rows[row]["example_ids"]
            for name, before, after in self.boundary(row):
                line = Text(f"row {example}, {name}: ", style="dim")
                line.append(" ".join(before), style="cyan")
                line.append(" | ", style="bold")
                line.append(" ".join(after), style="green")
                console.print(line, soft_wrap=True)
        console.print(verdict(self.report), highlight=False)


def bins(counts: Array, limit: int | None = None) -> list[tuple[int, int, int]]:
    """Lengths in bins that grow in proportion: first and last length, and number of rows.

    The bins end at powers of two and, where that leaves few, at lengths between them in equal
    proportion. The shortest and the longest hundredth have a bin each where they lie apart, so that
    a few odd rows do not coarsen the others. A limit is the end of a bin too.

    Args:
        counts: Tokens of each row, one row at least. Shape ``(rows,)``.
        limit: Longest that stays whole.
    """
    shares = [0.0, 0.01, 0.99, 1.0]
    least, low, high, most = np.quantile(counts, shares, method="nearest").tolist()
    for parts in (8, 4, 2, 1):
        steps = np.arange(parts * (high.bit_length() + 1))
        ends = np.unique([0, *np.rint(2.0 ** (steps / parts)).astype(np.int64)])
        first, last = np.searchsorted(ends, [low, high]).tolist()
        if last - first < _BINS:
            break
    inner = [*ends[max(first - 1, 0) : last + 1], *([] if limit is None else [limit])]
    ends = np.unique([most, *(end for end in inner if least <= end < most)])
    rows = np.bincount(np.searchsorted(ends, counts), minlength=len(ends)).tolist()
    starts = [least, *(ends[:-1] + 1).tolist()]
    return list(zip(starts, ends.tolist(), rows, strict=True))


def histogram(name: str, counts: Array, limit: int | None = None) -> Any:
    """Lengths as bars, a ``rich.text.Text``; what is longer than ``limit`` is marked as cut.

    Args:
        name: What was counted.
        counts: Tokens of each row, one row at least. Shape ``(rows,)``.
        limit: Longest that stays whole.
    """
    from rich.text import Text

    text = Text(f"{name}, tokens\n", style="bold")
    found = bins(counts, limit)
    digits = len(f"{found[-1][1]:,}")
    most = max(rows for *_, rows in found)
    for low, high, rows in found:
        beyond = limit is not None and low > limit
        bar = "█" * max(round(_BAR * rows / most), 1 if rows else 0)
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
