"""Two ranks take the same steps as one on the same global micro-batches, for all a loss gathers."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref

SCRIPT = Path(__file__).with_name("losses_run.py")


def test_two_ranks_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(Path(fastpref.__file__).parents[1])
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    spec = importlib.util.spec_from_file_location("losses_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one = module.run(tmp_path / "one")
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    two = json.loads((tmp_path / "result.json").read_text())
    for name, alone in one["trained"].items():
        found = two["trained"][name]
        assert found["weights"] == pytest.approx(alone["weights"], rel=1e-9), name
        assert found["memory"].keys() == alone["memory"].keys(), name
        for loss, memory in alone["memory"].items():
            assert found["memory"][loss] == pytest.approx(memory, rel=1e-9), name
        for ours, theirs in zip(found["logs"], alone["logs"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6), name
    assert {name for name, x in one["trained"].items() if x["memory"]} >= {"bco", "mpo", "beta_dpo"}
    for name, gradient in one["split"].items():
        assert two["split"][name] == pytest.approx(gradient, rel=1e-9), name
