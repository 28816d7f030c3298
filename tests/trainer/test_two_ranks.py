"""Two ranks: what a log costs, checkpoints one of them lacks, a sharded reference that moves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def two(make: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two ranks reports."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPREF_CACHE", str(folder / "cache"))
        found: dict[str, Any] = make.on_two_ranks("two_ranks_run", folder / "two")
    return found


def test_a_log_adds_one_reduction_and_one_read(two: dict[str, Any]) -> None:
    """A step has two reductions, the window's examples and the stop flags, and reads the latter;
    the other ``tolist`` is of the collator, on the host."""
    costs = {int(step): Counter(cost) for step, cost in two["costs"].items()}
    plain, logged = costs[2], costs[3]
    assert plain == {"all_reduce": 2, "tolist": 2}
    assert costs[4] == costs[5] == plain
    assert costs[6] == logged
    assert logged - plain == {"all_reduce": 1, "tolist": 1}


def test_ranks_that_find_different_checkpoints_say_so(two: dict[str, Any]) -> None:
    said = two["refused"]
    assert "rank 0: checkpoint-7; rank 1: there is no complete checkpoint in" in said
    assert "save_on_each_node=True" in said


def test_one_rank_speaks_for_the_command(two: dict[str, Any]) -> None:
    first, second = two["said"]
    assert first.count("drawn") == 1
    assert first.count("the model and metrics.jsonl, config.yaml are in") == 1
    assert "drawn" not in second
    assert "are in" not in second


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_reference_moves_and_is_resumed(
    make: Any, two: dict[str, Any], tmp_path: Path, tied: bool
) -> None:
    whole = make.script("two_ranks_run").moved(tmp_path, tied)
    for ours, alone in zip(two[f"moved {tied}"], whole, strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)
    assert two[f"resumed {tied}"] == two[f"moved {tied}"]
