"""Two ranks of two pairs do what one rank of four does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def two(make: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks report."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPREF_CACHE", str(folder / "cache"))
        found: dict[str, Any] = make.on_two_ranks("ranks_run", folder / "two")
    return found


def test_two_ranks_train_as_one(make: Any, tmp_path: Path, two: dict[str, Any]) -> None:
    one = make.script("ranks_run").run(tmp_path / "one")
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    # Quantiles and reward shift are of a micro-batch over all ranks: another in the evaluation.
    coupled = {"eval_loss", "eval_loss/aot", "eval_loss/bco_pair"}
    for ours, alone in zip(two["logs"], one["logs"], strict=True):
        for key in set(alone) - coupled:
            if not any(word in key for word in ("time", "mem/", "per_s")):
                assert ours[key] == pytest.approx(alone[key], rel=1e-6, abs=1e-9), key
    assert max(two["sharded"]) < 1e-4
    assert two["files"] == ["fastpref.json", "fastpref_rank0.json", "fastpref_rank1.json"]


def test_one_update_is_the_same(make: Any, tmp_path: Path, two: dict[str, Any]) -> None:
    """For a batch of 8, 4 x 2, and 2 ranks x 2 x 2; packed, without prefix sharing, or not.

    But for rounding: Llama's norms are fp32 inside, whatever the dtype.
    """
    found = make.script("ranks_run").updates(tmp_path) | two["updates"]
    assert len(found) == 9
    first = next(iter(found.values()))
    for how, update in found.items():
        assert update == pytest.approx(first, rel=0, abs=1e-6 * first[0]), how
