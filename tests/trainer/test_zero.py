"""DeepSpeed ZeRO-2 and 3 over two ranks: the losses and gradient norms of one process.

Runs where DeepSpeed is installed, on CPU too; it is no dependency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_two_ranks_under_zero_train_as_one_process(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    script = make.script("zero_run")
    script.save(tmp_path)
    two = make.on_two_ranks("zero_run", tmp_path / "two")
    for name, case in script.CASES.items():
        one = script.run(tmp_path / name, tmp_path, **case)
        for ours, alone in zip(two[name]["losses"], one["losses"], strict=True):
            assert ours == pytest.approx(alone, rel=1e-4), name
        assert two[name]["caches"] == one["caches"]  # the same weights, divided or not
    assert two["head"].startswith("model: DeepSpeed ZeRO-3 has divided the output embedding")
