"""FSDP2 over two ranks: the losses and gradient norms of one process, saved and resumed too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_two_shards_train_as_one_process(make: Any, tmp_path: Path) -> None:
    two = make.on_two_ranks("sharded_run", tmp_path / "two")
    script = make.script("sharded_run")
    for tied in (False, True):
        one = script.run(tmp_path / f"one {tied}", tied)
        for ours, alone in zip(two[f"tied {tied}"], one, strict=True):
            assert ours == pytest.approx(alone, rel=1e-5)
    assert two["resumed"] == two["tied False"]
    # without the detour of the script Accelerate would train whole models, and say nothing
    assert two["refused"].startswith("fsdp is set, but Accelerate shards no model on a CPU")
