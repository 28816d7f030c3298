"""A run directory: stages that are made once, are whole or not there, and are found again.

A stage is a folder made by a function from named inputs: plain values, and digests of the stages it
builds on. It grows in ``NAME.partial`` and is renamed to ``NAME`` when it is whole, so a killed run
that is started again finds what was finished, goes on inside what was not, and makes the same.
A stage's digest is that of its inputs: whatever depends on a changed input is another stage.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpref import checkpoint
from fastpref.disk import write_text
from fastpref.paths import located
from fastpref.provenance import versions

logger = logging.getLogger("fastpref")

Row = dict[str, Any]

INPUTS, TABLE, PROGRESS = "inputs.json", "rows.jsonl", "progress.jsonl"

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Endings of the files that a model and its tokenizer are in."""


class ChangedError(ValueError):
    """A stage of the run was made from other inputs than it would be made from now."""


@dataclass
class Rows:
    """A table that a stage made, or that the run was given.

    Attributes:
        rows: One dict a row.
        digest: Tells it from tables made from other inputs.
        path: Its folder; None if it was given.
        left_out: Rows that were there and are not among these, by reason.
    """

    rows: list[Row]
    digest: str
    path: Path | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows."""
        return iter(self.rows)


@dataclass(frozen=True)
class Policy:
    """A model on disk, or on the hub: its path or name, and a digest of what it is."""

    path: str
    digest: str


def digest(value: Any) -> str:
    """A short digest of anything that JSON can hold; the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(*parts: Any) -> int:
    """A seed in ``[0, 2**63)`` for these values, the same in every process."""
    return int(digest(list(parts)), 16) >> 1


def given_rows(rows: Sequence[Row], left_out: Mapping[str, int] | None = None) -> Rows:
    """A table that no stage made.

    Args:
        rows: Its rows.
        left_out: As in :class:`Rows`; a reason with no rows is none.
    """
    reasons = {why: count for why, count in (left_out or {}).items() if count}
    return Rows(list(rows), digest(list(rows)), left_out=reasons)


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, up to a last line that a killed process cut short."""
    rows: list[Row] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            rows.append(json.loads(line))
    return rows


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, flushed to disk, all of them or none."""
    write_text(path, "".join(map(_line, rows)))


def _line(row: Row) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(
            f"a number that is not finite, in {str(row)[:400]}: no JSON can hold it. What made it "
            "(a model in fp16 out of its range, say) is to be mended; what was made before is kept"
        ) from error


@dataclass
class Run:
    """What every stage of a run shares.

    Attributes:
        folder: The run directory.
        tokenizer: Of all its policies.
        device: Where models run.
        dtype: Of models that sample or score.
        seed: Of everything drawn at random.
        batch_size: Sequences at a time where models sample or score; a prompt's are never parted.
        redo: Make stages anew whose inputs have changed, instead of raising.
        model_options: More arguments of ``from_pretrained`` for policies.
        scored: Scorers and their tables by a digest of what was asked; the scorers keep them.
    """

    folder: Path
    tokenizer: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    batch_size: int = 8
    redo: bool = False
    model_options: dict[str, Any] = field(default_factory=dict)
    scored: dict[str, tuple[Any, Rows]] = field(default_factory=dict, repr=False)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the directory; a killed process keeps nobody out.

        Raises:
            RuntimeError: another process is at work in it.
        """
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"{self.folder}: another process is at work in this run directory. Wait for it, "
                "or give another run_dir"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of a stage; ``make(folder)`` fills it unless it is whole already.

        Args:
            name: Folder name in the run directory; may hold slashes.
            inputs: All that the result depends on: plain values, digests of other stages.
            make: Fills the folder it is given. After a kill it is called again with the same
                folder, and what it had written.

        Raises:
            ChangedError: the stage was made from other inputs, or as several stages (or was part of
                one) where a scorer of another kind was, and ``redo`` is false.
        """
        final = self.folder / name
        staging = final.with_name(final.name + ".partial")
        wanted = json.loads(json.dumps(dict(inputs), default=str))
        for outer in list(final.relative_to(self.folder).parents)[:-1]:
            made = _json(self.folder / outer / INPUTS)
            if made is not None:  # one stage where several are to be
                self._replace(str(outer), self.folder / outer, made, {"parts": [final.name]})
        for place in (final, staging):
            made = _json(place / INPUTS)
            if made is not None and made != wanted:
                self._replace(name, place, made, wanted)
            elif made is None and (parts := _parts(place)):  # several stages where one is to be
                self._replace(name, place, {"parts": parts}, wanted)
            elif made is None and place.exists():
                if (place / checkpoint.MANIFEST).exists():
                    logger.warning("%s is made again: its %s cannot be read", place, INPUTS)
                shutil.rmtree(place)  # else killed before it had begun
        if final.exists():
            wrong = checkpoint.fault(final)
            if wrong is None:
                self._note_versions(name, final)
                return final
            logger.warning("%s is made again: %s", final, wrong)
            shutil.rmtree(final)
        if not (staging / checkpoint.MANIFEST).exists():
            staging.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(staging / INPUTS, wanted)
            started = time.perf_counter()
            make(staging)
            for left in staging.glob("*.tmp"):
                left.unlink()
            seconds = time.perf_counter() - started
            content = {
                "stage": name,
                "digest": digest(wanted),
                "versions": versions("cpu", "transformers"),
            }
            checkpoint.seal(staging, {**content, "seconds": seconds})
        checkpoint.publish(staging, final)
        return final

    def _replace(self, name: str, place: Path, made: Row, wanted: Row) -> None:
        """Move a stage made from other inputs out of the way, or say what has changed."""
        changes = [
            f"  {key}: {_short(made.get(key))} -> {_short(wanted.get(key))}"
            for key in sorted({*made, *wanted})
            if made.get(key) != wanted.get(key)
        ]
        if not self.redo:
            raise ChangedError(
                "\n".join(
                    [
                        f"{place} was made with other settings or inputs:",
                        *changes,
                        "Take the old settings back to go on with this run, give another run_dir "
                        "to start a new one, or say redo (--redo) to make this stage and what "
                        "depends on it anew; the old result is then kept under replaced/",
                    ]
                )
            )
        target = self.folder / "replaced" / f"{place.relative_to(self.folder)}-{digest(made)}"
        logger.warning("%s is made anew, the old one is in %s:\n%s", name, target, *changes[:1])
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        place.replace(target)

    def _note_versions(self, name: str, folder: Path) -> None:
        made = (checkpoint.manifest(folder) or {}).get("versions", {})
        now = versions("cpu", "transformers")
        changed = [f"{k} {made[k]} (now {now[k]})" for k in now if made.get(k, now[k]) != now[k]]
        if changed:
            logger.warning("%s is kept, though made with %s", name, ", ".join(changed))

    def table(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[], Sequence[Row]]
    ) -> Rows:
        """A table that is quickly made, as a stage."""
        folder = self.stage(name, inputs, lambda into: write_jsonl(into / TABLE, make()))
        return self._table(folder)

    def batches(
        self,
        name: str,
        inputs: Mapping[str, Any],
        batches: Sequence[Sequence[int]],
        open: Callable[[], Callable[[int, Sequence[int]], Sequence[Row]]],
        doing: str,
    ) -> Rows:
        """A table made batch by batch, as a stage that loses at most one batch to a kill.

        Args:
            name: As for :meth:`stage`.
            inputs: As for :meth:`stage`.
            batches: Numbers of the rows that each batch makes; every number in ``range(n)`` once.
            open: Loads what the work needs, and returns the work: the number of a batch and its
                row numbers in, a row for each out. Only called if there is work left.
            doing: Caption of the progress bar.

        Returns:
            The rows in the order of their numbers.
        """
        folder = self.stage(name, inputs, lambda into: _by_batch(into, name, batches, open, doing))
        return self._table(folder)

    def _table(self, folder: Path) -> Rows:
        manifest = checkpoint.manifest(folder) or {}
        return Rows(read_jsonl(folder / TABLE), manifest["digest"], folder)


def _by_batch(
    folder: Path,
    name: str,
    batches: Sequence[Sequence[int]],
    open: Callable[[], Callable[[int, Sequence[int]], Sequence[Row]]],
    doing: str,
) -> None:
    from tqdm.auto import tqdm

    progress = folder / PROGRESS
    if (folder / TABLE).exists():  # killed between here and the renaming of the folder
        progress.unlink(missing_ok=True)
        return
    done = read_jsonl(progress) if progress.exists() else []
    whole = 0  # batches all of whose rows were written
    count = 0
    while whole < len(batches) and count + len(batches[whole]) <= len(done):
        count += len(batches[whole])
        whole += 1
    write_jsonl(progress, done[:count])
    found = done[:count]
    if whole < len(batches):
        work = open()
        with progress.open("a", encoding="utf-8") as file:
            bar = tqdm(total=sum(map(len, batches)), initial=count, desc=f"{doing}, {name}")
            for number in range(whole, len(batches)):
                rows = list(work(number, batches[number]))
                file.write("".join(map(_line, rows)))
                file.flush()
                os.fsync(file.fileno())
                found += rows
                bar.update(len(rows))
            bar.close()
    numbers = [number for batch in batches for number in batch]
    ordered = sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])
    write_jsonl(folder / TABLE, [row for _, row in ordered])
    progress.unlink()


def _json(path: Path) -> Row | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _parts(place: Path) -> list[str]:
    """Names of the folders in ``place`` that are stages or hold some."""
    return sorted({p.relative_to(place).parts[0] for p in place.glob(f"*/**/{INPUTS}")})


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of ``lengths`` in batches of at most ``size`` with neighbours of like length.

    Longest first, so that a batch that does not fit into memory is met at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def file_digest(path: Path) -> str:
    """Digest of a file's content, which is read once as long as the file stays as it is."""
    state = path.stat()
    return _file_digest(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, inode: int, size: int, changed: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()[:16]


def policy_of(model: str) -> Policy:
    """A model by path or hub name, with a digest: of its files, or of its commit.

    Raises:
        FileNotFoundError: nothing on disk has this name, and it is no id of the hub.
    """
    path = Path(located(model))
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in MODEL_FILES)
        return Policy(str(path), digest({p.name: file_digest(p) for p in files}))
    from transformers import AutoConfig

    commit = getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
    return Policy(model, digest([model, commit]))
