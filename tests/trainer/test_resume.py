"""A run that was killed goes on as if it had not been; a checkpoint is whole or not there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpref
from fastpref import checkpoint

SCRIPT = Path(__file__).with_name("killed_run.py")
TIMES = ("time/", "mem/", "train_", "eval_runtime", "eval_samples", "eval_steps", "total_flos")


@pytest.fixture(scope="module")
def run(make: Any) -> Callable[..., None]:
    found: Callable[..., None] = make.script("killed_run").run
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    kept = [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in records]
    return [r for r in kept if r.keys() - {"step", "epoch"}]


@pytest.fixture(scope="module")
def whole(run: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    assert [r["step"] for r in metrics(folder)] == [2, 4, 4, 6, 8, 8]
    return folder


def test_a_run_killed_while_saving_goes_on_with_the_same_losses(
    run: Callable[..., None], whole: Path, tmp_path: Path
) -> None:
    """kill -9 while checkpoint 6 is being written; checkpoint 3, between two logs, is the last."""
    path = str(Path(fastpref.__file__).parents[1])
    # as many threads as the uninterrupted run, which rounds alike only then
    threads = str(torch.get_num_threads())
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    options = json.dumps({"kill_in_save": 6, "save_total_limit": 1})
    command = [sys.executable, str(SCRIPT), str(tmp_path), options]
    killed = subprocess.run(command, env=env, timeout=120, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert checkpoint.last_complete(tmp_path).name == "checkpoint-3"
    assert (tmp_path / checkpoint.STAGING / "checkpoint-6" / "model.safetensors").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "st')  # as if killed while writing
    run(tmp_path, resume=True, save_total_limit=1)
    assert metrics(tmp_path) == metrics(whole)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-8"}
    assert not (tmp_path / checkpoint.STAGING).exists()


def test_ctrl_c_saves_and_says_how_to_go_on(
    run: Callable[..., None], whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        KeyboardInterrupt, match=r"after step 5 and saved.*resume_from_checkpoint=True"
    ):
        run(tmp_path, interrupt_at=4)
    assert checkpoint.last_complete(tmp_path).name == "checkpoint-5"
    run(tmp_path, resume=True)
    assert metrics(tmp_path) == metrics(whole)


def make(folder: Path, step: int, saved_at: float, **files: str) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    sizes = {name: len(text) for name, text in files.items()}
    content = {"run": "r", "step": step, "saved_at": saved_at, "files": sizes, "losses": {}}
    (path / checkpoint.MANIFEST).write_text(json.dumps(content))
    return path


def test_damaged_checkpoints_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make(tmp_path, 10, 1.0, weights="abc")
    short = make(tmp_path, 20, 2.0, weights="abc")
    (short / "weights").write_text("ab")
    missing = make(tmp_path, 30, 3.0, weights="abc")
    (missing / "weights").unlink()
    torn = make(tmp_path, 40, 4.0, weights="abc")
    (torn / checkpoint.MANIFEST).write_text('{"run": "r", "st')
    (tmp_path / "checkpoint-50").mkdir()
    with caplog.at_level(logging.WARNING, "fastpref"):
        assert checkpoint.last_complete(tmp_path) == good
    assert "weights has 2 bytes, expected 3" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-30 is damaged: weights is missing"):
        checkpoint.verify(missing)
    with pytest.raises(ValueError, match="there is no folder"):
        checkpoint.verify(tmp_path / "checkpoint-60")
    good.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"no complete checkpoint .* checkpoint-20 \(weights has 2"
    ):
        checkpoint.last_complete(tmp_path)


def test_the_last_is_the_one_written_last(tmp_path: Path) -> None:
    """An older run went further in the same folder."""
    make(tmp_path, 30, 1.0, weights="old")
    newer = make(tmp_path, 10, 2.0, weights="new")
    assert checkpoint.last_complete(tmp_path) == newer


def stage(folder: Path, fail: bool = False) -> None:
    with checkpoint.staged(
        folder,
        "checkpoint-1",
        {"run": "r", "step": 1},
        writes=True,
        cleans=True,
        barrier=lambda: None,
    ) as path:
        (path / "sub").mkdir()
        (path / "sub" / "weights").write_text("new")
        assert not (folder / "checkpoint-1" / "sub").exists()
        if fail:
            raise OSError(28, "No space left on device")


def test_staging(tmp_path: Path) -> None:
    old = make(tmp_path, 1, 1.0, weights="old")
    message = r"checkpoint-1 could not be saved in .*No space left.*MiB are free there.*resume_from"
    with pytest.raises(OSError, match=message):
        stage(tmp_path, fail=True)
    assert checkpoint.fault(old) is None
    assert (old / "weights").read_text() == "old"
    stage(tmp_path)
    assert checkpoint.fault(old) is None
    assert (old / "sub" / "weights").read_text() == "new"
    assert not (old / "weights").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
