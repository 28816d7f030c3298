"""Checkpoints that are whole or not there: written beside, flushed to disk, renamed into place.

A folder called ``checkpoint-N`` has always been written to its end. Its ``fastpref.json`` lists the
files and their sizes, so that a copy that was cut short later is told from a whole one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastpref.disk import sync, write_text

logger = logging.getLogger("fastpref")

MANIFEST = "fastpref.json"
STAGING = ".saving"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that ``path`` holds either all of it or what it held before."""
    write_text(path, json.dumps(content))


def manifest(folder: Path) -> dict[str, Any] | None:
    """The contents of a checkpoint's ``fastpref.json``; None if there is none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    content = manifest(folder)
    if content is None:
        return f"it has no readable {MANIFEST}"
    for name, size in content["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def last_complete(run_dir: str | os.PathLike[str]) -> Path:
    """The whole checkpoint in a run's folder that was written last.

    One that was whole but not yet in its place when its writer was killed is put there first.

    Raises:
        ValueError: there is none; the message says what was found.
    """
    for made in Path(run_dir, STAGING).glob("checkpoint-*"):
        place = Path(run_dir, made.name)
        with suppress(OSError):  # another rank was faster
            if not place.exists() and fault(made) is None:
                made.replace(place)
    folders = [p for p in Path(run_dir).glob("checkpoint-*") if p.is_dir()]
    faults = {p: fault(p) for p in folders}
    for path, wrong in faults.items():
        if wrong is not None:
            logger.warning("ignoring %s: %s", path, wrong)
    whole = {p: manifest(p) or {} for p, wrong in faults.items() if wrong is None}
    if not whole:
        found = ", ".join(f"{p.name} ({wrong})" for p, wrong in sorted(faults.items()))
        raise ValueError(
            f"there is no complete checkpoint in {run_dir} to resume from; found "
            f"{found or 'no checkpoint at all'}. Start afresh without resume_from_checkpoint, or "
            "give the path of another checkpoint."
        )
    # The last written, not the highest step: an older run may have got further in the same folder.
    return max(whole, key=lambda p: (whole[p]["saved_at"], whole[p]["step"]))


def verify(path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint that was asked for by name.

    Raises:
        ValueError: it is not there, or it was written by this library and is not whole.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {folder}")
    wrong = fault(folder)
    if wrong is None:
        return folder
    if (folder / MANIFEST).exists():
        raise ValueError(
            f"checkpoint {folder} is damaged: {wrong}. Resume from another one; "
            "resume_from_checkpoint=True takes the last that is whole."
        )
    logger.warning("%s was not written by fastpref: the loss's own state is not in it", folder)
    return folder


def check_state(folder: Path) -> None:
    """Raise ``ValueError`` unless a checkpoint holds what a run goes on from, beside the model."""
    if not (folder / "trainer_state.json").is_file():
        raise ValueError(
            f"{folder} has no trainer_state.json, so that a run cannot go on from it: resume from "
            "another one. Where machines have a disk each, save with save_on_each_node=True"
        )
    if not any(any(folder.glob(name)) for name in ("optimizer*", "global_step*")):
        raise ValueError(
            f"{folder} holds the model alone (save_only_model=True): optimiser, schedule and "
            "random numbers would start anew. Resume from another one, or start a run of its own "
            "from it, as its model"
        )


@contextmanager
def staged(
    run_dir: Path,
    name: str,
    content: dict[str, Any],
    *,
    writes: bool,
    cleans: bool,
    barrier: Callable[[], None],
) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes ``run_dir/name`` when the block ends.

    All ranks enter and leave together. If the block fails, nothing of it stays, and what was
    ``run_dir/name`` before is untouched.

    Args:
        run_dir: Where the run keeps its checkpoints.
        name: ``checkpoint-N``.
        content: Goes into the manifest beside the list of files.
        writes: This rank writes the files that exist once.
        cleans: This rank is the first of its machine.
        barrier: Waits for all ranks.

    Raises:
        OSError: The block failed, or the disk is full.
    """
    staging = run_dir / STAGING
    if cleans:
        shutil.rmtree(staging, ignore_errors=True)
    barrier()
    folder = staging / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        barrier()
        if writes:
            seal(folder, content)
            publish(folder, run_dir / name)
        barrier()
        # A machine with a disk of its own still has what its ranks wrote.
        if cleans and folder.is_dir():
            seal(folder, content)
            publish(folder, run_dir / name)
    except Exception as error:  # torch, safetensors and Python each word a full disk in their way
        raise OSError(
            f"{name} could not be saved in {run_dir}: {error}. "
            f"{shutil.disk_usage(run_dir).free / 2**20:,.1f} MiB are free there. Checkpoints saved "
            "before are whole: mend what is wrong, and go on from the last one with "
            "resume_from_checkpoint=True."
        ) from error
    finally:
        if cleans:
            shutil.rmtree(staging, ignore_errors=True)


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Flush a folder to disk, and write its manifest: ``content`` and the list of its files."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
    for path in files:
        sync(path)
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        sync(path)
    write_json(folder / MANIFEST, {**content, "saved_at": time.time(), "files": sizes})


def publish(folder: Path, target: Path) -> None:
    """Rename a sealed folder into its place; what was there is left beside it, as ``replaced``."""
    if target.exists():
        target.replace(folder.with_name("replaced"))
    folder.replace(target)
    sync(target.parent)


def merge(made: Path, folder: Path) -> None:
    """Move the files of a folder into another one that stays, each in one go. Weights there of
    other names go, which would be loaded in the place of the new ones."""
    weights = {path.name for path in made.glob("model*")}
    for old in folder.glob("model*.safetensors*") if weights else ():
        if old.name not in weights:
            old.unlink()
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        sync(path)
        target = folder / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    sync(folder)
    shutil.rmtree(made, ignore_errors=True)
    with suppress(OSError):
        made.parent.rmdir()


class Interrupt:
    """Ctrl-C, or SIGTERM, as a wish to stop after the step that runs; the second time, at once."""

    asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within; elsewhere than in the main thread they stay as they are."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            logger.warning("stopping: this step is finished and saved first; again to stop at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
