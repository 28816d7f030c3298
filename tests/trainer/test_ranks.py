"""Two ranks of two pairs do what one rank of four does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_two_ranks_make_the_same_update(make: Any, tmp_path: Path) -> None:
    one = make.script("ranks_run").run(tmp_path / "one")
    two = make.on_two_ranks("ranks_run", tmp_path / "two")
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    # Quantiles and reward shift are of a micro-batch over all ranks: another in the evaluation.
    coupled = {"eval_loss", "eval_loss/aot", "eval_loss/bco_pair"}
    for ours, alone in zip(two["logs"], one["logs"], strict=True):
        for key in set(alone) - coupled:
            if not any(word in key for word in ("time", "mem/", "per_s")):
                assert ours[key] == pytest.approx(alone[key], rel=1e-6, abs=1e-9), key
    assert max(two["sharded"]) < 1e-4
    assert two["files"] == ["fastpref.json", "fastpref_rank0.json", "fastpref_rank1.json"]
