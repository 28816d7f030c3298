"""Two ranks take the same steps as one on the same global micro-batches, for all a loss gathers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_two_ranks_are_one(make: Any, tmp_path: Path) -> None:
    one = make.script("losses_run").run(tmp_path / "one")
    two = make.on_two_ranks("losses_run", tmp_path / "two")
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
