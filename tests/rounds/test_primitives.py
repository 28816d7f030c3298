"""Selection, length penalty, replay and acquisition against worked examples and counts."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.rounds.acquire import entropy, keep, uncertainty
from fastpref.rounds.pairs import best_worst, length_debias
from fastpref.rounds.policies import log_likelihoods, response_sums
from fastpref.rounds.replay import ReplayBuffer, replay_counts, replay_mix
from fastpref.rounds.run import ChangedError, Run, given_rows, policy_of
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.winrate import length_controlled, win_rate

GOLDEN = json.loads((Path(__file__).parents[1] / "losses" / "golden.json").read_text())


def test_best_and_worst_of_the_worked_example() -> None:
    case = GOLDEN["best_worst_selection"]
    found = [best_worst(scores, random.Random(0)) for scores in case["inputs"]["scores"]]
    assert [list(pair) for pair in found if pair] == case["outputs"]["pairs"]
    assert [i for i, pair in enumerate(found) if pair is None] == case["outputs"]["dropped"]


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_length_penalty_of_the_worked_example(early_stop: bool) -> None:
    case = GOLDEN["dice_alpha_search"]
    found = length_debias(
        case["inputs"]["scores"], case["inputs"]["lengths"], early_stop=early_stop
    )
    assert found.alpha == pytest.approx(case["outputs"]["alpha_star_full_grid"])
    assert found.gap == pytest.approx(case["outputs"]["gap_full_grid"])
    assert found.gap_at_zero == pytest.approx(case["outputs"]["gap_at_0"])
    if early_stop:
        assert found.evaluated == case["outputs"]["n_evaluated"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_the_gap_never_rises_with_the_penalty(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, lengths = draw.normal(0, 20, (4, 5)).tolist(), draw.integers(1, 900, (4, 5)).tolist()
    gaps = [length_debias(scores, lengths, [alpha]).gap for alpha in np.linspace(0, 1, 30)]
    assert all(a >= b for a, b in itertools.pairwise(gaps))
    best = length_debias(scores, lengths)
    assert abs(best.gap) <= abs(best.gap_at_zero)


def test_replay_counts_of_both_conventions() -> None:
    case = GOLDEN["dice_replay_counts"]
    (expected,) = case["outputs"].values()
    found = [list(replay_counts(*c, convention="truncate")) for c in case["inputs"]["cases"]]
    assert found == expected
    assert replay_counts(10_000, 9_000, 0.9) == (1000, 9000)
    assert replay_counts(10, 10, 1.0) == (0, 10)
    assert replay_counts(10, 10, 0.0) == (10, 0)


def test_a_mix_has_its_shares_and_no_prompt_of_both_kinds() -> None:
    offline = [{"prompt": i, "kind": "old"} for i in range(20)]
    generated = [{"prompt": i, "kind": "new"} for i in range(20)]
    mixed = replay_mix(offline, generated, 0.25, seed=3)
    new = {row["prompt"] for row in mixed if row["kind"] == "new"}
    old = {row["prompt"] for row in mixed if row["kind"] == "old"}
    assert (len(new), len(old)) == replay_counts(20, 20, 0.25)
    assert not new & old
    assert {r["kind"] for r in replay_mix(offline, generated, 0.0, seed=3)} == {"new"}


def test_the_buffer_draws_as_worked_out_and_forgets_the_oldest() -> None:
    case = GOLDEN["sapo_replay_probs"]
    buffer: ReplayBuffer[int] = ReplayBuffer(4)
    buffer.load_state_dict({"items": [0, 1, 2, 3], "counts": case["inputs"]["sample_counts"]})
    assert buffer.probabilities() == pytest.approx(case["outputs"]["probabilities"])
    drawn = buffer.draw(10, random.Random(0))
    assert sum(buffer.counts) == 4 + len(drawn)
    buffer.push(4)
    assert list(buffer.items) == [1, 2, 3, 4]
    assert buffer.counts[-1] == 0


def test_acquisition_of_the_worked_example() -> None:
    case = GOLDEN["active_pref"]["outputs"]
    found = [uncertainty(a, b) for a, b in zip(case["r_a"], case["r_b"])]
    assert found == pytest.approx(case["u"])
    assert keep(found, 2, "smallest", seed=0) == case["kept_pairs_certainty"]
    logps = GOLDEN["active_pref"]["inputs"]["sampled_logps_per_prompt"]
    assert {k: entropy(v) for k, v in logps.items()} == pytest.approx(case["entropy"])


def test_likelihoods_are_those_of_the_models_own_logits(make: Any) -> None:
    model = make.model().eval()
    groups = [([1, 5, 6], [[7, 8, 2], [9]]), ([4, 4], [[3, 2]])]
    for (prompt, answers), sums in zip(groups, response_sums(model, groups)):
        for answer, value in zip(answers, sums):
            ids = torch.tensor([prompt + answer])
            logps = model(ids).logits[0].double().log_softmax(-1)
            own = sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
            assert value == pytest.approx(float(own), abs=1e-4)


def test_one_stage_in_the_place_of_several_is_a_change_that_redo_makes(tmp_path: Path) -> None:
    """As where a scorer of one part takes the place of one of several parts, and back."""
    run = Run(tmp_path)
    names = "round-1/scores/part-1", "round-1/scores"
    for inner, outer in (names, names[::-1]):
        run.redo = False
        first = run.table(inner, {"a": 1}, lambda: [{"id": 0}])
        with pytest.raises(ChangedError, match=r"(?s)scores was made with .*part-1.*--redo"):
            run.table(outer, {"b": 2}, lambda: [{"id": 1}])
        assert run.table(inner, {"a": 1}, list).rows == first.rows
        run.redo = True
        assert run.table(outer, {"b": 2}, lambda: [{"id": 1}]).rows == [{"id": 1}]
        assert not (tmp_path / inner / "rows.jsonl").exists()
        assert any((tmp_path / "replaced" / "round-1").glob("scores-*/**/rows.jsonl"))
        shutil.rmtree(tmp_path)


def test_a_stage_whose_inputs_cannot_be_read_is_made_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    folder = run.table("scores", {"a": 1}, lambda: [{"id": 0}]).path
    assert folder is not None
    (folder / "inputs.json").write_text("{")
    assert run.table("scores", {"a": 1}, lambda: [{"id": 1}]).rows == [{"id": 1}]
    assert "scores is made again: its inputs.json cannot be read" in caplog.text


def test_options_of_the_models_are_inputs_where_there_are_any(
    make: Any, policy: str, tmp_path: Path
) -> None:
    start = policy_of(policy)
    run = Run(tmp_path, tokenizer=make.tokenizer())
    row = {"id": 0, "prompt": "w1", "prompt_ids": [5]}
    prompts = given_rows([{**row, "responses": [{"text": "w2", "ids": [6], "finished": True}]}])
    rules = Sampling(n=1, max_new_tokens=2)
    stages = {
        "samples": lambda: sample(run, "samples", start, prompts, rules),
        "logps": lambda: log_likelihoods(run, "logps", start, prompts),
    }
    for name, stage in stages.items():
        run.model_options = {}
        stage()
        assert "model_options" not in json.loads((tmp_path / name / "inputs.json").read_text())
        run.model_options = {"attn_implementation": "eager"}
        with pytest.raises(ChangedError, match=r"model_options: nothing -> .*eager"):
            stage()


def test_length_control_finds_the_win_rate_of_equal_lengths() -> None:
    draw = np.random.default_rng(0)
    longer = draw.normal(30, 40, 4000)
    odds = 0.4 + 1.5 * np.tanh(longer / longer.std())
    wins = (draw.random(4000) < 1 / (1 + np.exp(-odds))).astype(float)
    assert length_controlled(wins, longer) == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.03)
    assert wins.mean() > length_controlled(wins, longer) + 0.05
    assert length_controlled(wins, np.zeros(4000)) == wins.mean()
    found = win_rate([1, 0, 0.5, 1])
    assert found.low <= found.value == 0.625 <= found.high
