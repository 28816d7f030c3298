"""Preferences of people: a file of pairs that is filled in by hand and read back."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.rounds.run import Row, Rows, Run, digest, seed_of, write_jsonl
from fastpref.rounds.scorer import Scorer

LABELS = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""What a person may write, and the probability it stands for that ``a`` is the better one."""
SHOWN = 10  # faults of a file that a message lists


class LabelsWanted(RuntimeError):
    """A run cannot go on before people have filled in a file; the message says which."""


@dataclass
class People(Scorer):
    """People who say which of two responses is better, in a file of JSON lines.

    The first time, the pairs are written to ``labels/`` in the run directory and the run stops;
    with every ``label`` set to ``"a"``, ``"b"`` or ``"tie"``, the same command reads them and goes
    on. Which response is ``a`` is drawn at random, so that the place says nothing. Equal responses
    are a tie and are not asked about.
    """

    kind = "people"
    probability = True

    def describe(self) -> dict[str, Any]:
        """The kind; the labels themselves are an input of the stage."""
        return {"kind": self.kind}

    def score(self, run: Run, name: str, groups: Rows) -> Rows:
        """See :meth:`Scorer.score`: 1 for the better response, 0 for the other, 0.5 for a tie.

        Raises:
            LabelsWanted: there are labels to fill in; the message says where and how.
            ValueError: the file is not what was written with labels filled in; the message lists
                the lines. Or a prompt has not two responses.
        """
        for row in groups:
            if len(row["responses"]) not in (0, 2):
                raise ValueError(
                    f"people compare two responses; prompt {row['id']} has "
                    f"{len(row['responses'])}: set sampling.n to 2"
                )
        flipped = {row["id"]: _coin(run.seed, name, row["id"]) for row in groups}
        asked = [_question(row, flipped[row["id"]]) for row in groups if _differ(row)]
        path = run.folder / "labels" / f"{name.replace('/', '-')}-{groups.digest[:8]}.jsonl"
        labels = _ask(path, asked) if asked else {}

        def make() -> list[Row]:
            found = []
            for row in groups:
                first = labels.get(row["id"], 0.5)
                first = 1 - first if flipped[row["id"]] else first
                scores = [first, 1 - first] if row["responses"] else []
                found.append({"id": row["id"], "scores": scores})
            return found

        given = digest(sorted(labels.items()))
        inputs = {"scorer": self.describe(), "responses": groups.digest, "labels": given}
        return run.table(name, inputs, make)


def _coin(*parts: Any) -> bool:
    return random.Random(seed_of(*parts)).random() < 0.5


def _differ(row: Row) -> bool:
    return len({response["text"] for response in row["responses"]}) > 1


def _question(row: Row, flipped: bool) -> Row:
    a, b = (response["text"] for response in row["responses"])
    a, b = (b, a) if flipped else (a, b)
    return {"id": row["id"], "prompt": row["prompt"], "a": a, "b": b, "label": None}


def _ask(path: Path, asked: Sequence[Row]) -> dict[Any, float]:
    """The labels in ``path`` by pair, the file written first if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, asked)
    labels = read_labels(path, asked)
    open_ids = [row["id"] for row in asked if labels[row["id"]] is None]
    if open_ids:
        raise LabelsWanted(
            f"{len(open_ids)} of {len(asked)} pairs wait for a label in {path} (next: id "
            f'{open_ids[0]}). Set "label" in each line to "a" or "b", whichever is the better '
            'answer to the prompt, or to "tie", leave the rest as it is, and start the same '
            "command again"
        )
    return {pair: value for pair, value in labels.items() if value is not None}


def read_labels(path: Path, asked: Sequence[Row]) -> dict[Any, float | None]:
    """The labels of a file that people have filled in.

    Args:
        path: The file.
        asked: Its rows as they were written.

    Returns:
        For each pair's id the probability that ``a`` is better; None: not labelled yet.

    Raises:
        ValueError: the file is not these rows with labels; the message lists what is wrong.
    """
    wanted = {row["id"]: row for row in asked}
    found: dict[Any, float | None] = {}
    faults = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # texts may hold other line breaks
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        wrong = _fault(line, wanted, found)
        if wrong is not None:
            faults.append(f"  line {number}: {wrong}")
    if not faults:
        faults = [f"  pair {pair} is missing" for pair in wanted if pair not in found]
    if faults:
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise ValueError(
            "\n".join([f"{path} cannot be read as labels:", *faults[:SHOWN], *more])
            + "\nMend these lines; or move the file away, and the same command writes it anew"
        )
    return found


def _fault(line: str, wanted: dict[Any, Row], found: dict[Any, float | None]) -> str | None:
    """What is wrong with a line; if nothing is, its label is put into ``found``."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict) or "id" not in row:
        return 'expected {"id": ..., "prompt": ..., "a": ..., "b": ..., "label": ...}'
    pair = row["id"]
    if isinstance(pair, (list, dict)) or pair not in wanted:
        return f"id {pair!r} is none of the pairs that were asked about"
    if pair in found:
        return f"id {pair!r} for the second time"
    for name in ("prompt", "a", "b"):
        if row.get(name) != wanted[pair][name]:
            return f"{name!r} is not what was written; only 'label' is to be changed"
    label = row.get("label")
    word = label.strip().lower() if isinstance(label, str) else label
    if word is None or word == "":
        found[pair] = None
        return None
    if not isinstance(word, str) or word not in LABELS:
        return f"label {label!r}; expected {', '.join(map(repr, LABELS))}"
    found[pair] = LABELS[word]
    return None
