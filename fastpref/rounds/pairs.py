"""From samples to pairs: which responses count, which two of them make a pair, and why not.

Nothing is left out in silence: a filtered row says what its responses were dropped for, and a
prompt without a pair has a row that says why.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from fastpref.rounds.options import check_types
from fastpref.rounds.run import Row, Rows, Run, seed_of

logger = logging.getLogger("fastpref")

Choose = Callable[[Sequence[float], random.Random], tuple[int, int] | None]
"""Scores of a prompt's responses in; numbers of chosen and rejected one, or None (a tie)."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which samples count.

    Attributes:
        unfinished: Keep responses that reached ``max_new_tokens``.
        min_characters: Shortest response that counts; an empty one never does.
        max_characters: Longest; None: any.
        min_responses: Least number of responses that a prompt must have left.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    unfinished: bool = False
    min_characters: int = 1
    max_characters: int | None = None
    min_responses: int = 2

    def __post_init__(self) -> None:
        """See the class."""
        check_types(self, "filter.")
        least = {
            "min_characters": 0,
            "max_characters": max(self.min_characters, 1),
            "min_responses": 1,
        }
        for name, allowed in least.items():
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise ValueError(f"filter.{name} must be at least {allowed}, got {value}")

    def fault(self, response: Row) -> str | None:
        """Why a response does not count; None if it does."""
        length = len(response["text"])
        if not response["text"].strip():
            return "empty"
        if not (response["finished"] or self.unfinished):
            return "unfinished"
        if length < self.min_characters:
            return "too short"
        if self.max_characters is not None and length > self.max_characters:
            return "too long"
        return None


def filter_samples(run: Run, name: str, samples: Rows, rules: Filter) -> Rows:
    """The samples that count, as a stage.

    Args:
        run: The run.
        name: Of the stage.
        samples: Of :func:`fastpref.rounds.sampling.sample`.
        rules: Which count.

    Returns:
        The rows with the responses that are left (none where a prompt is dropped), and ``faults``,
        the number of responses dropped by reason, and ``dropped``, why the prompt is, or None.

    Raises:
        ValueError: no prompt is left.
    """

    def make() -> list[Row]:
        found = []
        for row in samples:
            faults = [rules.fault(response) for response in row["responses"]]
            kept = [r for r, wrong in zip(row["responses"], faults, strict=True) if wrong is None]
            dropped = None
            if len(kept) < rules.min_responses:
                dropped = "too few responses"
            elif len({response["text"] for response in kept}) == 1 and len(kept) > 1:
                dropped = "all responses equal"
            counts = Counter(wrong for wrong in faults if wrong is not None)
            left = [] if dropped else kept
            found.append({**row, "responses": left, "faults": dict(counts), "dropped": dropped})
        if all(row["dropped"] for row in found):
            raise ValueError(
                f"{name}: no prompt has responses to compare: {reasons(found)}{_hint(found)}"
            )
        return found

    return run.table(name, {"samples": samples.digest, **asdict(rules)}, make)


def reasons(rows: Sequence[Row]) -> str:
    """How many prompts and responses were dropped, and why, in words."""
    prompts = Counter(row["dropped"] for row in rows if row.get("dropped"))
    responses: Counter[str] = Counter()
    for row in rows:
        responses.update(row.get("faults") or {})
    parts = [f"{count} prompts: {why}" for why, count in prompts.most_common()]
    parts += [f"{count} responses: {why}" for why, count in responses.most_common()]
    return "; ".join(parts) or "nothing dropped"


def _hint(rows: Sequence[Row]) -> str:
    faults: Counter[str] = Counter()
    for row in rows:
        faults.update(row["faults"])
    if faults["unfinished"]:
        return (
            ". Unfinished responses reached sampling.max_new_tokens: raise it, or keep them with "
            "filter.unfinished=true"
        )
    if any(row["dropped"] == "all responses equal" for row in rows):
        return ". Equal responses: raise sampling.temperature, top_p or n"
    return ". The rules are in the config's filter"


def best_worst(scores: Sequence[float], draw: random.Random) -> tuple[int, int] | None:
    """The first of the highest and the first of the lowest; None if all are equal."""
    best, worst = max(scores), min(scores)
    return None if best == worst else (scores.index(best), scores.index(worst))


def best_random(scores: Sequence[float], draw: random.Random) -> tuple[int, int] | None:
    """The first of the highest and any one that is lower; None if all are equal."""
    best = max(scores)
    lower = [i for i, score in enumerate(scores) if score < best]
    return (scores.index(best), draw.choice(lower)) if lower else None


RULES: dict[str, Choose] = {"best_worst": best_worst, "best_random": best_random}
"""Rules that make a pair of scored responses, by name."""


def check_rule(rule: str) -> None:
    """Raise ``ValueError`` unless it is one of :data:`RULES`."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


def build_pairs(
    run: Run,
    name: str,
    groups: Rows,
    scores: Rows,
    rule: str = "best_worst",
    *,
    may_be_empty: bool = False,
) -> Rows:
    """A pair for each prompt whose responses' scores differ, as a stage.

    Args:
        run: The run.
        name: Of the stage.
        groups: Rows with ``responses``, and ``dropped`` where they were filtered.
        scores: Of the same rows.
        rule: Of :data:`RULES`.
        may_be_empty: Take it that all scores are ties, where there are pairs of rounds before.

    Returns:
        For each prompt ``{"id", "prompt", "prompt_ids", "chosen", "chosen_ids", "chosen_score",
        "rejected", ...}``, or ``{"id", "dropped": why}``.

    Raises:
        ValueError: no pair could be made; all scores are the same, say.
    """
    check_rule(rule)

    def make() -> list[Row]:
        draw = random.Random(seed_of(run.seed, name))
        found = []
        for group, scored in zip(groups, scores, strict=True):
            if group.get("dropped"):
                found.append({"id": group["id"], "dropped": group["dropped"]})
                continue
            own = scored["scores"]
            chosen = RULES[rule](own, draw)
            if chosen is None:
                found.append({"id": group["id"], "dropped": "tie: all scores equal"})
            else:
                found.append(pair_row(group, *chosen, own))
        return found if may_be_empty else _some(found, scores, name)

    inputs = {
        "responses": groups.digest,
        "scores": scores.digest,
        "rule": rule,
        "seed": run.seed,
    }
    return run.table(name, inputs, make)


def pair_row(group: Row, chosen: int, rejected: int, scores: Sequence[float] | None = None) -> Row:
    """A pair of two responses of a group, by their numbers."""
    row = {name: group[name] for name in ("id", "prompt", "prompt_ids")}
    for side, number in (("chosen", chosen), ("rejected", rejected)):
        response = group["responses"][number]
        row |= {side: response["text"], f"{side}_ids": response["ids"]}
        if scores is not None:
            row[f"{side}_score"] = scores[number]
    return row


def _some(rows: list[Row], scores: Rows, name: str) -> list[Row]:
    if not all(row.get("dropped") for row in rows):
        return rows
    values = {value for row in scores for value in row["scores"]}
    if len(values) == 1:
        raise ValueError(
            f"{name}: the scorer gave every response the same score, {values.pop()}: nothing is "
            "preferred, and no pair can be made. Look at the scorer"
        )
    ties = any(str(row["dropped"]).startswith("tie") for row in rows)
    hint = ". Ties prefer nothing: ask for more prompts or answers, or look at the scorer"
    raise ValueError(f"{name}: no pair could be made: {reasons(rows)}{hint if ties else ''}")


def made(pairs: Rows) -> list[Row]:
    """The pairs among the rows of :func:`build_pairs`."""
    return [row for row in pairs if not row.get("dropped")]


class Debias(NamedTuple):
    """Result of :func:`length_debias`."""

    alpha: float
    """Penalty for each unit of length, in units of the score."""
    gap: float
    """Mean length of chosen minus rejected responses under it."""
    gap_at_zero: float
    """The same without a penalty."""
    evaluated: int
    """Number of penalties tried."""


def length_debias(
    scores: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    penalties: Sequence[float] | None = None,
    *,
    early_stop: bool = True,
) -> Debias:
    """The length penalty under which chosen and rejected responses are equally long on average.

    The gap does not rise with the penalty (each prompt's chosen response gets shorter, its rejected
    one longer), so its size falls to a minimum and rises again, and the first rise ends the search.

    Args:
        scores: Of each prompt's responses.
        lengths: Of the same, in characters for DICE.
        penalties: To try, rising; None: 0, 0.001, ... below 1.
        early_stop: Stop at the first rise; without, all are tried, with the same result.

    Returns:
        The smallest of the best penalties, and the gaps.

    Raises:
        ValueError: there are no prompts, or scores and lengths differ in number.

    Source: Chen et al. 2024, arXiv:2406.09760 (DICE), section 4.
    """
    if not scores or [len(s) for s in scores] != [len(n) for n in lengths]:
        raise ValueError("length_debias: expected a length for each score, and a prompt at least")
    width = max(map(len, scores))
    r = np.array([[*s, *[np.nan] * (width - len(s))] for s in scores], dtype=np.float64)
    n = np.array([[*s, *[0] * (width - len(s))] for s in lengths], dtype=np.float64)
    prompts = np.arange(len(scores))

    def gap(alpha: float) -> float:
        value = r - alpha * n
        chosen = np.where(np.isnan(value), -np.inf, value).argmax(1)
        rejected = np.where(np.isnan(value), np.inf, value).argmin(1)
        return float((n[prompts, chosen] - n[prompts, rejected]).mean())

    tried: list[tuple[float, float]] = []
    best = 0
    for alpha in np.arange(0.0, 1.0, 0.001).tolist() if penalties is None else penalties:
        tried.append((alpha, gap(alpha)))
        if abs(tried[-1][1]) < abs(tried[best][1]):
            best = len(tried) - 1
        elif early_stop and abs(tried[-1][1]) > abs(tried[best][1]):
            break
    return Debias(*tried[best], gap(0.0), len(tried))


def penalised(groups: Rows, scores: Rows, alpha: float) -> list[Row]:
    """Scores minus ``alpha`` for each character of the response; rows as of a scorer."""
    return [
        {
            "id": scored["id"],
            "scores": [
                score - alpha * len(response["text"])
                for score, response in zip(scored["scores"], group["responses"], strict=True)
            ],
        }
        for group, scored in zip(groups, scores, strict=True)
    ]


def debiased_scores(
    run: Run, name: str, groups: Rows, scores: Rows, penalties: Sequence[float]
) -> Rows:
    """Scores under the penalty of :func:`length_debias`, as a stage; rows have ``alpha``, too."""

    def make() -> list[Row]:
        kept = [
            (scored["scores"], [len(r["text"]) for r in group["responses"]])
            for group, scored in zip(groups, scores, strict=True)
            if group["responses"]
        ]
        found = length_debias([own for own, _ in kept], [n for _, n in kept], penalties)
        if len(penalties) > 1 and found.alpha == penalties[-1]:
            logger.warning(
                "%s: the largest length penalty that was tried, %s, still leaves a gap of %.1f "
                "characters: raise penalty_limit",
                name,
                found.alpha,
                found.gap,
            )
        rows = penalised(groups, scores, found.alpha)
        return [{**row, **found._asdict()} for row in rows]

    grid = [penalties[0], penalties[-1], len(penalties)]
    inputs = {"responses": groups.digest, "scores": scores.digest, "penalties": grid}
    return run.table(name, inputs, make)
