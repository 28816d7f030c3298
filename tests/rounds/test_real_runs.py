"""The driver of the real runs, on a tiny model with another reward; what its tables work out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref.demo import split_by_prompt, tiny_model, tiny_pairs
from fastpref.rounds.winrate import length_controlled_win_rate, mean, win_rate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "recipes"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


real, real_table = load("real"), load("real_table")
DRAWS = real_table.RESAMPLES = 50  # of the bootstrap, instead of 2000
real.PROMPTS, real.HELD_OUT = 8, 8


def vowels(prompt: Any, response: str) -> float:
    return float(sum(letter in "aeiou" for letter in response))


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of DICE with the driver's own settings, on a model of two layers."""
    folder = tmp_path_factory.mktemp("real")
    for part in tiny_model():
        part.save_pretrained(folder / "model")
    train, held_out = split_by_prompt(tiny_pairs(24), real.HELD_OUT)
    given = real.options(str(folder / "model"), folder / "dpo", 0, train, held_out)
    given["resamples"] = DRAWS
    tuned = real.recipe("dpo", "", vowels, given).run().policy.path
    given["run_dir"] = str(folder / "dice")
    outcome = real.recipe("dice", tuned, vowels, given).run()
    return json.loads(json.dumps(real.row("dice", 0, False, outcome, "python real.py dice")))


def test_a_row_holds_what_the_reports_say(row: dict[str, Any]) -> None:
    assert [len(part) for part in row["rewards"]] == [real.HELD_OUT] * (real.ROUNDS + 1)
    for number, report in enumerate(row["rounds"], 1):
        assert report["held_out"]["reward"] == list(mean(row["rewards"][number], DRAWS))
        assert report["held_out"]["reward_before"][0] == mean(row["rewards"][number - 1]).value
        assert report["trained_on"]["pairs"] > report["pairs"]["made"] // 2
    assert row["seconds"] > 0
    assert {"device", "versions", "commit", "command"} <= set(row)
    assert "| dice | 0 | 2 |" in real_table.by_round([row])


def test_pooled_over_one_seed_equals_the_run_itself(row: dict[str, Any]) -> None:
    found = real_table.pooled([row])
    start, end = row["rewards"][0], row["rewards"][-1]
    wins = [0.5 + 0.5 * ((b > a) - (b < a)) for a, b in zip(start, end)]
    longer = [b - a for a, b in zip(row["characters"][0], row["characters"][-1])]
    assert found["reward, end"] == pytest.approx(mean(end, DRAWS))
    assert found["win rate against the start"].value == win_rate(wins).value
    controlled = length_controlled_win_rate(wins, longer).value
    assert found["length-controlled"].value == pytest.approx(controlled)


def test_seeds_of_one_prompt_are_drawn_together(row: dict[str, Any]) -> None:
    """The same run three times over has the interval of one: no prompts were added."""
    once, thrice = real_table.pooled([row]), real_table.pooled([row] * 3)
    assert all(once[name] == pytest.approx(thrice[name]) for name in ("change", "reward, end"))


def test_a_newer_row_takes_the_place_of_the_older_and_dry_runs_are_refused(
    row: dict[str, Any], tmp_path: Path
) -> None:
    newer = {**row, "seconds": -1.0}
    other = {**row, "recipe": "ilr_dpo"}
    assert real_table.merged([row], [newer, other]) == [other, newer]
    (tmp_path / "row.json").write_text(json.dumps({**row, "dry": True}))
    with pytest.raises(ValueError, match="a dry run is no result"):
        real_table.main([str(tmp_path)])


def test_without_vader_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    real.analyzer.cache_clear()
    with pytest.raises(ImportError, match=r"pip install vaderSentiment==3.3.2"):
        real.friendly("", "lovely")
