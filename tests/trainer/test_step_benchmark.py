"""`benchmarks/step.py` runs, with a model and pairs of one's own, and keeps rows it believes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
ROOT = Path(__file__).parents[2]


def test_whole_steps_beside_trl(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    make.model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make.pairs(6).to_json(tmp_path / "pairs.jsonl")
    options = ["--pairs", "pairs.jsonl", "--model", "model", "--rounds", "2", "--batch", "2"]
    systems = ["--systems", "trl", "fastpref", "fastpref, cached reference"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "step.py", *options, *systems, "--out", "rows.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["system"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["trl", "fastpref", "fastpref, cached reference"]
    trl, ours, cached = rows.values()
    assert max(row["loss_difference"] for row in rows.values()) < 1e-3
    # padding and the second copy of the prompt; then the reference's pass
    tokens = [row["backbone_tokens_per_step"] for row in (trl, ours, cached)]
    assert tokens[0] > tokens[1] > tokens[2]
    assert 2 * tokens[2] == pytest.approx(tokens[1], abs=1)
    assert trl["pairs_per_second_over_trl"] == 1.0
