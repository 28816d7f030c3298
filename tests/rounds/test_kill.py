"""kill -9 anywhere, the same command again: the same result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import fastpref

SCRIPT = Path(__file__).with_name("killed_run.py")


def start(folder: Path, kill: str) -> int:
    path = str(Path(fastpref.__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), kill], env=env, capture_output=True, timeout=180
    )
    assert done.returncode in (0, -9), done.stderr.decode()
    return done.returncode


def test_a_run_killed_at_several_stages_ends_with_the_same_weights(
    tmp_path: Path, make: Any
) -> None:
    make.policy(tmp_path / "policy")
    assert start(tmp_path / "whole", "never") == 0
    for kill in ("scoring", "saving", "renaming"):
        assert start(tmp_path / "killed", kill) == -9
    assert start(tmp_path / "killed", "never") == 0
    ends = []
    for run in ("whole", "killed"):
        folder = tmp_path / run / "round-2"
        tables = [(folder / n / "rows.jsonl").read_text() for n in ("samples", "scores", "pairs")]
        ends.append((load_file(folder / "train" / "model" / "model.safetensors"), tables))
        assert not list((tmp_path / run).rglob("*.partial"))
    assert ends[0][1] == ends[1][1]
    assert all((ends[1][0][name] == value).all() for name, value in ends[0][0].items())
