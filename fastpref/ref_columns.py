"""Columns of a dataset with a reference's log-probabilities, one sum for each response."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from fastpref.batches import columns_of, each

REF_COLUMNS = {
    "pair": ("ref_chosen_logps", "ref_rejected_logps"),
    "unpaired": ("ref_logps",),
    "group": ("ref_logps",),
}
"""Columns that stand in for a reference, with sums."""


def stand_in(columns: Collection[str], kind: str) -> bool:
    """Whether the columns of a dataset stand in for a reference.

    Args:
        columns: Their names.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.

    Raises:
        ValueError: One of two is missing.
    """
    names = REF_COLUMNS[kind]
    found = [name for name in names if name in columns]
    if found and len(found) < len(names):
        raise ValueError(
            f"the dataset has a column {found[0]!r} alone; the reference's log-probabilities need "
            f"{' and '.join(names)}. Add the other one or drop it"
        )
    return bool(found)


def references_in(kind: str, *datasets: Any) -> int:
    """Number of references whose sums the ``ref_*_logps`` columns hold; 1 where there are none.

    A row has a number for each response, or of several references a list, the base first.

    Args:
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``, whose lists are of its responses.
        datasets: As given: datasets, streams, dicts of them, or None.

    Raises:
        ValueError: Columns or datasets have different numbers of them.
    """
    names = set(REF_COLUMNS[kind]) & columns_of(*datasets)
    found: dict[int, str] = {}

    def note(dataset: Any, part: str) -> None:
        row = next(iter(dataset), None)  # of no rows others tell
        counts = {} if row is None else {name: np.asarray(row[name]).size for name in names}
        found.update({count: f"{name} {part}".strip() for name, count in counts.items()})

    for dataset in datasets if names and kind != "group" else ():
        each(note, dataset, "")
    if len(found) > 1:
        words = ", ".join(f"{count} in {name}" for count, name in found.items())
        raise ValueError(
            f"the dataset's columns hold the log-probabilities of different numbers of references: "
            f"{words}. Give every response the same, a list with a number for each reference"
        )
    return next(iter(found), 1)
