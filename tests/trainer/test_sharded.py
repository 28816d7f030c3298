"""FSDP2 over two ranks: the losses and gradient norms of one process, saved and resumed too."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref

SCRIPT = Path(__file__).with_name("sharded_run.py")


def test_two_shards_train_as_one_process(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(Path(fastpref.__file__).parents[1]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    spec = importlib.util.spec_from_file_location("sharded_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for tied in (False, True):
        one = module.run(tmp_path / f"one {tied}", tied)
        for ours, alone in zip(two[f"tied {tied}"], one, strict=True):
            assert ours == pytest.approx(alone, rel=1e-5)
    assert two["resumed"] == two["tied False"]
    # without the detour of the script Accelerate would train whole models, and say nothing
    assert two["refused"].startswith("fsdp is set, but Accelerate shards no model on a CPU")
