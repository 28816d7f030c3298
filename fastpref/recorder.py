"""What a run leaves beside checkpoints: ``metrics.jsonl``, ``config.yaml``, ``curves.png``."""

from __future__ import annotations

import dataclasses
import enum
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastpref.disk import write_text
from fastpref.plots import draw_curves, read_metrics


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar, with loss and margin beside it instead of every metric."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest numbers."""
        shown = {
            name: f"{logs[key]:.4f}"
            for name, key in (("loss", "loss"), ("margin", "rewards/margins"))
            if logs and key in logs
        }
        bar: Any = self.training_bar
        if bar is not None and shown:
            bar.set_postfix(shown)


def claim(directory: str | os.PathLike[str]) -> None:
    """Make the directory of a run, before anything long is done for it.

    Raises:
        OSError: it cannot be made, or not be written to.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"nothing can be written to the run's directory {os.fspath(directory)!r}: "
            f"{error.strerror}. Choose another"
        ) from error


def record(trainer: Trainer, config: dict[str, Any]) -> None:
    """Write a run's ``config.yaml``, and give its trainer the quiet progress bar.

    The trainer itself writes ``metrics.jsonl``.
    """
    if trainer.is_world_process_zero():
        directory = Path(trainer.args.output_dir or "")
        directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config, sort_keys=True, allow_unicode=True)
        write_text(directory / "config.yaml", text)
    if trainer.pop_callback(ProgressCallback) or trainer.pop_callback(PrinterCallback):
        trainer.add_callback(Progress())


def draw_run(directory: Path, *rows: dict[str, Any]) -> None:
    """Draw ``curves.png`` from the run's ``metrics.jsonl``, and from further rows."""
    metrics = directory / "metrics.jsonl"
    logged = read_metrics(metrics) if metrics.exists() else []
    draw_curves([*logged, *rows], directory / "curves.png")


def resolved(*options: Any) -> dict[str, Any]:
    """The fields of dataclasses that can be given to them, as YAML can hold them.

    Equals what ``fastpref train --config`` reads: the options of a run, defaults resolved.

    Args:
        options: Dataclass instances.

    Returns:
        Names and values; values without a plain form (open handles, objects) are left out, and so
        are secrets (``hub_token``): the file is read, copied and uploaded.
    """
    found: dict[str, Any] = {}
    for option in options:
        for field in dataclasses.fields(option):
            value = getattr(option, field.name)
            value = value.value if isinstance(value, enum.Enum) else value
            if field.init and not field.name.endswith("_token") and _plain(value):
                found[field.name] = value
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
