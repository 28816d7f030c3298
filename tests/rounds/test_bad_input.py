"""Bad samples, judges and configs: told in words, nothing lost, and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref import rounds
from fastpref.rounds.run import Run, given_rows, read_jsonl

Options = Callable[..., dict[str, Any]]


def ilr(options: Options, make: Any, **given: Any) -> Any:
    plain = {
        "dataset": make.prompts(12),
        "scorer": make.reward,
        "sampling": {"n": 4, "max_new_tokens": 6},
        "filter": {"unfinished": True},
        "rounds": 1,
        "held_out": 0,
    }
    return rounds.ILRDPO(**options(**{**plain, **given}))


def samples(*texts: list[str]) -> Any:
    def response(text: str) -> dict[str, Any]:
        return {"text": text, "ids": [0] * len(text), "finished": not text.endswith("...")}

    return given_rows(
        [
            {"id": i, "prompt": "w1", "prompt_ids": [5], "responses": list(map(response, own))}
            for i, own in enumerate(texts)
        ]
    )


def test_prompts_with_empty_equal_or_cut_samples_are_counted_and_the_rest_stays(
    tmp_path: Path,
) -> None:
    given = samples(["", " ", "a"], ["b", "b"], ["c...", "d", "e"], ["f", "g", ""])
    rules = rounds.Filter()
    kept = rounds.filter_samples(Run(tmp_path), "kept", given, rules)
    dropped = ["too few responses", "all responses equal", None, None]
    assert [row["dropped"] for row in kept] == dropped
    assert [row["faults"] for row in kept] == [{"empty": 2}, {}, {"unfinished": 1}, {"empty": 1}]
    left = ["".join(r["text"] for r in row["responses"]) for row in kept]
    assert left == ["", "", "de", "fg"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", "  "], "2 prompts: too few responses; 4 responses: empty.*config's filter"),
        (["a", "a"], "2 prompts: all responses equal.*raise sampling.temperature"),
        (["a...", "b..."], ".*4 responses: unfinished.*max_new_tokens: raise it"),
    ],
)
def test_samples_that_leave_nothing_to_compare_stop_the_run(
    tmp_path: Path, texts: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"no prompt has responses to compare: {message}"):
        rounds.filter_samples(Run(tmp_path), "kept", samples(texts, texts), rounds.Filter())


def test_a_judge_of_held_out_answers_that_fails_half_way_costs_no_training(
    options: Options, make: Any
) -> None:
    asked: list[str] = []

    def better(prompt: str, first: str, second: str) -> float:
        asked.append(first)
        if len(asked) == 5:
            raise TimeoutError("the judge is asleep")
        return 0.5 + 0.5 * ((first > second) - (first < second))

    judge = rounds.Ranker(function=better)
    given = {"judge": judge, "held_out": 4, "batch_size": 2}
    with pytest.raises(RuntimeError, match=r"better failed in round-1/judged, after 2 of 4 .*kept"):
        ilr(options, make, **given).run()
    folder = Path(options()["run_dir"]) / "round-1"
    trained = (folder / "train" / "model" / "model.safetensors").stat().st_mtime_ns
    made = ilr(options, make, **given).run()
    assert (folder / "train" / "model" / "model.safetensors").stat().st_mtime_ns == trained
    assert len(asked) == 5 + 4  # two prompts in both orders; the first two were not asked again
    assert 0 <= made.reports[0]["held_out"]["win_rate"][0] <= 1


def test_a_config_changed_half_way_through_a_stage_is_told_and_the_old_one_goes_on(
    options: Options, make: Any
) -> None:
    calls: list[str] = []

    def reward(prompt: str, response: str) -> float:
        calls.append(response)
        if len(calls) == 9:
            raise ConnectionError("gone")
        return float(len(response))

    def other(prompt: str, response: str) -> float:
        return 1.0 * len(response)

    with pytest.raises(RuntimeError, match="gone"):
        ilr(options, make, scorer=rounds.Function(reward)).run()
    part = Path(options()["run_dir"]) / "round-1" / "scores.partial"
    kept = len(read_jsonl(part / "progress.jsonl"))
    assert kept > 0
    with pytest.raises(rounds.ChangedError, match=r"(?s)scores.partial was made.*scorer: .*other"):
        ilr(options, make, scorer=rounds.Function(other)).run()
    sampling = {"n": 3, "max_new_tokens": 6}
    with pytest.raises(rounds.ChangedError, match=r"sampling.n: 4 -> 3"):
        ilr(options, make, sampling=sampling).run()
    with pytest.raises(rounds.ChangedError, match=r"seed: 0 -> 1"):
        ilr(options, make, seed=1).run()
    assert len(read_jsonl(part / "progress.jsonl")) == kept
    ilr(options, make, scorer=rounds.Function(reward)).run()
    scores = read_jsonl(part.with_suffix("") / "rows.jsonl")
    pairs = read_jsonl(part.with_name("pairs") / "rows.jsonl")
    assert len(scores) == len(pairs) == 12
    assert json.loads((part.with_suffix("") / "inputs.json").read_text())["scorer"]
