"""Several datasets as one, each with its share."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .load import load_preference_dataset

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture; the fields are those of TRL's ``datasets:`` in YAML.

    Attributes:
        path: As the source of :func:`fastpref.data.load_preference_dataset`.
        name: Configuration of a hub dataset.
        data_dir: Folder within a hub dataset.
        data_files: Files within a hub dataset, or of a reader (``path: json``).
        split: Split, sliced if you like.
        columns: Columns to keep; None: all.
        fraction: Share of the mixture; for all parts or none.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None

    def load(self, streaming: bool) -> Dataset | IterableDataset:
        """The dataset.

        Raises:
            ValueError: It cannot be read, or a column is missing.
            FileNotFoundError: The path is not there.
        """
        files = {"data_dir": self.data_dir, "data_files": self.data_files}
        found = load_preference_dataset(
            self.path,
            self.split,
            name=self.name,
            streaming=streaming,
            **{key: value for key, value in files.items() if value is not None},
        )
        from datasets import Value

        present = found.column_names
        for column in self.columns or () if present is not None else ():
            if column not in present:
                raise ValueError(f"{self.path}: no column {column!r}; found {', '.join(present)}")
        found = found if self.columns is None else found.select_columns(self.columns)
        # What one reader calls string, another calls large_string.
        for column, feature in (found.features or {}).items():
            if getattr(feature, "dtype", None) == "large_string":
                found = found.cast_column(column, Value("string"))
        return found


def parts_of(given: str | Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts of a mixture, from a config's list of dicts or its JSON.

    Raises:
        ValueError: It is no such list, or a fraction is out of range or missing.
        TypeError: A part has an unknown key.
    """
    try:
        listed: Any = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"datasets: {given!r} is not JSON: {error}") from error
    if not isinstance(listed, Sequence) or not listed:
        raise ValueError(f"datasets: expected a list of parts with a path each, got {given!r}")
    known, parts = [f.name for f in fields(Part)], []
    for part in listed:
        if not isinstance(part, Mapping) or "path" not in part:
            raise ValueError(f"datasets: expected a part like {{'path': ...}}, got {part!r}")
        for key in part:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}"
                raise TypeError(f"datasets: a part has no key {key!r}.{hint}")
        parts.append(Part(**part))
    shares = [part.fraction for part in parts]
    if any(share is not None for share in shares):
        for part, share in zip(parts, shares, strict=True):
            if share is None or not share > 0:
                raise ValueError(
                    f"datasets: {part.path} has fraction {share}; give every part a positive one, "
                    "or none"
                )
    return parts


def load_mixture(
    parts: Sequence[Part], *, streaming: bool = False, seed: int = 0
) -> Dataset | IterableDataset:
    """The datasets as one: end to end, or by their shares.

    With fractions, as in TRL: they are scaled to sum to 1, and the mixture is the largest in which
    no row occurs twice, made of each dataset's first rows. Streams are drawn from at random by
    their shares until the first one ends.

    Args:
        parts: Of :func:`parts_of`.
        streaming: Read as it goes.
        seed: Of the draws from streams.

    Returns:
        The rows of all parts; a column that a part lacks is None there.

    Raises:
        ValueError: A part cannot be read, or has another type of column than the others.
    """
    import datasets

    loaded = [part.load(streaming) for part in parts]
    shares = [part.fraction for part in parts if part.fraction is not None]
    weights = [share / sum(shares) for share in shares]
    try:
        if weights and streaming:
            return datasets.interleave_datasets(loaded, probabilities=weights, seed=seed)
        if weights:
            total = min(len(d) / weight for d, weight in zip(loaded, weights, strict=True))
            counts = [round(weight * total) for weight in weights]
            loaded = [d.select(range(n)) for d, n in zip(loaded, counts, strict=True)]
        return datasets.concatenate_datasets(loaded)
    except ValueError as error:
        columns = "; ".join(
            f"{p.path}: {d.column_names}" for p, d in zip(parts, loaded, strict=True)
        )
        raise ValueError(
            f"datasets: the parts do not fit together ({error}). Their columns are {columns}; "
            "choose the same ones by 'columns'"
        ) from error
