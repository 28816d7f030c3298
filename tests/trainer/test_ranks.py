"""Two ranks of two pairs do what one rank of four does."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastpref

SCRIPT = Path(__file__).with_name("ranks_run.py")


def test_two_ranks_make_the_same_update(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(Path(fastpref.__file__).parents[1])
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    (tmp_path / "two").mkdir()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "two")]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    spec = importlib.util.spec_from_file_location("ranks_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one = module.run(tmp_path / "one")
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    two: dict[str, Any] = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    # Quantiles and reward shift are of a micro-batch over all ranks: another in the evaluation.
    coupled = {"eval_loss", "eval_loss/aot", "eval_loss/bco_pair"}
    for ours, alone in zip(two["logs"], one["logs"], strict=True):
        for key in set(alone) - coupled:
            if not any(word in key for word in ("time", "mem/", "per_s")):
                assert ours[key] == pytest.approx(alone[key], rel=1e-6, abs=1e-9), key
    assert max(two["sharded"]) < 1e-4
    assert two["files"] == ["fastpref.json", "fastpref_rank0.json", "fastpref_rank1.json"]
