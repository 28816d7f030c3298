"""Preference datasets by name: a hub id, a local file, or a local directory.

Everything is read by ``datasets.load_dataset`` (or ``load_from_disk`` for a directory that
``save_to_disk`` wrote); this module only decides which, and words the errors. No format that can
run code is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.paths import located

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}


def load_preference_dataset(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    name: str | None = None,
    streaming: bool = False,
    **files: str | list[str],
) -> Dataset | IterableDataset:
    """The dataset that ``source`` names: ``datasets.load_dataset`` with the right reader.

    Args:
        source: A file (json, jsonl, ndjson, parquet, arrow, csv, tsv), a directory of such files or
            one written by ``save_to_disk``, or the id of a dataset on the hub. What exists on disk
            is taken from disk.
        split: Split, with ``datasets``' slicing (``"train[:100]"``). A single file is whatever
            split is asked for.
        name: Configuration of a hub dataset.
        streaming: Return an ``IterableDataset`` that reads as it goes.
        **files: ``data_dir`` or ``data_files`` of ``load_dataset``; ``source`` may then be the name
            of a reader (``"json"``).

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: ``source`` looks like a path and is not there.
        ValueError: the file type is not known, the split does not exist, reading failed, or a
            configuration is asked of what is on disk.
    """
    import datasets

    path = Path(source).expanduser()
    if name is not None and path.exists():
        raise ValueError(
            f"{path} is on disk and has no configurations, which are for datasets on the hub; got "
            f"{name!r}"
        )
    if path.is_file() and files:
        raise ValueError(f"{path} is a file: it takes no {' or '.join(files)}")
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise ValueError(
                f"{path}: unknown file type {path.suffix!r}; known: {', '.join(READERS)}"
            )
        options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        options["data_files"] = {split.split("[")[0]: str(path)}
        return _read(str(path), reader, split, streaming, **options)
    if path.is_dir():
        if files:
            return _read(str(path), str(path), split, streaming, **files)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _from_disk(path, split, streaming)
        types = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
        if not types & set(READERS):
            raise ValueError(f"{path}: no file of a known type inside ({', '.join(READERS)})")
        return _read(str(path), str(path), split, streaming)
    text = located(source, READERS)
    try:
        return _read(text, text, split, streaming, name=name, **files)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{text!r} is neither a local file or directory nor a dataset that could be reached on "
            f"the hub ({error}). Check the name, the network and your access."
        ) from error


def _read(
    label: str, reader: str, split: str, streaming: bool, **options: Any
) -> Dataset | IterableDataset:
    import datasets

    try:
        return datasets.load_dataset(reader, split=split, streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError) as error:
        cause = error.__cause__ or error
        detail = str(cause) or "the file is empty"
        raise ValueError(f"{label}, split {split!r}: could not be read: {detail}") from error


def _from_disk(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    import datasets

    if "[" in split:
        raise ValueError(
            f"{path}: written by save_to_disk, which has no slices; got split {split!r}"
        )
    stored = datasets.load_from_disk(str(path))
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise ValueError(f"{path}: no split {split!r}; found {', '.join(stored)}")
        stored = stored[split]
    return stored.to_iterable_dataset() if streaming else stored
