"""Each recipe does what it must, and bad input is told in words with nothing lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from fastpref import PreferenceConfig, PreferenceTrainer, rounds
from fastpref.rounds.command import main, read_config
from fastpref.rounds.recipes.sdpo import cut, hold_out
from fastpref.rounds.run import given_rows, read_jsonl, seed_of

Options = Callable[..., dict[str, Any]]
SAMPLING = {"n": 4, "max_new_tokens": 6}


def ilr(options: Options, make: Any, **given: Any) -> Any:
    plain = {
        "dataset": make.prompts(12),
        "scorer": make.reward,
        "sampling": SAMPLING,
        "filter": {"unfinished": True},
        "rounds": 1,
        "held_out": 0,
    }
    return rounds.ILRDPO(**options(**{**plain, **given}))


def test_ilr_dpo_reports_each_round_and_makes_nothing_twice(options: Options, make: Any) -> None:
    calls = []

    def reward(prompt: str, response: str) -> float:
        calls.append((prompt, response))
        return float(sum(map(ord, response)))

    made = ilr(options, make, scorer=rounds.Function(reward), held_out=4).run()
    folder = made.folder / "round-1"
    (report,) = made.reports
    assert report["pairs"]["prompts"] == 8
    assert report["pairs"]["made"] + sum(report["pairs"]["dropped"].values()) == 8
    assert {"reward", "win_rate", "lc_win_rate", "kl", "tokens"} <= set(report["held_out"])
    assert (folder / "report" / "report.png").stat().st_size > 1000
    for row in read_jsonl(folder / "pairs" / "rows.jsonl"):
        assert "dropped" in row or row["chosen_score"] > row["rejected_score"]
    before = len(calls)
    again = ilr(options, make, scorer=rounds.Function(reward), held_out=4).run()
    assert len(calls) == before
    assert again.policy == made.policy


def test_a_round_begins_where_the_reference_is(options: Options, make: Any) -> None:
    """Without a price on length every round starts at ln 2, its reference the policy itself."""
    made = ilr(options, make, rounds=2, alpha=0.0).run()
    for policy in made.policies.values():
        logged = read_jsonl(Path(policy.path).parent / "trainer" / "metrics.jsonl")
        assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_sdpo_starts_each_stage_at_ln_2_and_ignores_stored_references(
    options: Options, make: Any
) -> None:
    stored = {"ref_chosen_logps": -50.0, "ref_rejected_logps": -1.0}
    data = [{**row, **stored} for row in make.pairs(20)]
    made = rounds.SDPO(**options(dataset=data, stages="fractions")).run()
    for report in made.reports:
        assert report["training"]["first loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert "gamma_ref is of" not in report["training"]
        assert {"kl", "tokens"} <= set(report["held_out"])
    assert [r["training"]["pairs"] for r in made.reports] == [8, 8]


def test_one_stage_of_sdpo_is_dpo(options: Options, make: Any, tmp_path: Path) -> None:
    given = options(dataset=make.pairs(12), stages="fractions", fractions=[1.0], held_out=0)
    made = rounds.SDPO(**given).run()
    plain = PreferenceTrainer(
        given["model"],
        args=PreferenceConfig(
            **given["training"],
            output_dir=str(tmp_path / "plain"),
            loss_type="dpo",
            beta=0.1,
            seed=seed_of(0, "round-1/train") % 2**31,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(cut(make.pairs(12), [1.0], 0)[0]),
        processing_class=make.tokenizer(),
    )
    plain.train()
    assert made.reports[0]["training"]["gamma_ref is of"] == "training pairs"
    found = load_file(Path(made.policy.path) / "model.safetensors")
    own = plain.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in found.items())


def test_a_prompt_held_out_of_one_stage_is_out_of_all() -> None:
    def rows(source: str) -> Any:
        return given_rows(
            [{"prompt": f"p{i}", "chosen": source, "rejected": "b"} for i in range(6)], {"long": 2}
        )

    left, out = hold_out([("a", rows("a")), ("b", rows("b"))], 3, seed=1)
    prompts = {row["prompt"] for row in out}
    assert len(out) == 3
    assert not prompts & {row["prompt"] for _, own in left for row in own}
    assert [len(own) for _, own in left] == [6 - len(prompts)] * 2
    assert [own.left_out for _, own in left] == [{"long": 2}] * 2


def test_where_prompt_and_response_are_one_dialogue_what_they_share_is_held_out(
    options: Options, make: Any, tmp_path: Path
) -> None:
    tokenizer = make.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' </s>' }}{% endfor %}"
    path = make.policy(tmp_path / "policy")
    tokenizer.save_pretrained(path)

    def dialogue(row: dict[str, str], side: str) -> list[dict[str, str]]:
        parts = zip(("user", "assistant"), (row["prompt"], row[side]))
        return [{"role": role, "content": content} for role, content in parts]

    sides = ("chosen", "rejected")
    data = [{side: dialogue(row, side) for side in sides} for row in make.pairs(6)]
    made = rounds.SDPO(
        **options(dataset={"a": data, "b": data}, model=path, held_out=2, stages="source")
    ).run()
    assert [r["training"]["pairs"] for r in made.reports] == [4, 4]


def test_dice_closes_the_gap_and_mixes_as_asked(
    options: Options, make: Any, other_policy: str
) -> None:
    made = rounds.DICE(
        **options(
            dataset=make.pairs(12),
            initial_reference=other_policy,
            sampling=SAMPLING,
            filter={"unfinished": True, "min_responses": 2},
            rounds=1,
            held_out=0,
        )
    ).run()
    (report,) = made.reports
    shown = report["training"]
    without, gap = shown["gap without it, characters"], shown["gap with it, characters"]
    assert abs(gap) <= abs(without)
    assert report["pairs"]["gap_characters"][0] == pytest.approx(gap, abs=2.0)
    assert report["trained_on"]["pairs"] == 12


def test_options_that_are_left_out_are_the_recipes_own(
    options: Options, make: Any, other_policy: str
) -> None:
    made = rounds.DICE(
        **options(
            dataset=make.pairs(12),
            initial_reference=other_policy,
            sampling={"max_new_tokens": 6},
            filter={"min_responses": 2},
        )
    )
    assert made._sampling == rounds.Sampling(n=16, temperature=0.9, max_new_tokens=6)
    assert made._filter == rounds.Filter(min_characters=4, max_characters=6699, min_responses=2)


def test_selm_ranks_three_and_explores_with_the_third(options: Options, make: Any) -> None:
    made = rounds.SELM(
        **options(
            dataset=make.pairs(12),
            scorer=make.reward,
            sampling={"n": 1, "temperature": 0.0, "max_new_tokens": 6},
            filter={"unfinished": True, "min_responses": 1},
            rounds=1,
            held_out=0,
        )
    ).run()
    found = read_jsonl(made.folder / "round-1" / "candidates" / "rows.jsonl")
    assert {len(row["responses"]) for row in found} <= {0, 3}
    assert made.reports[0]["pairs"]["made"] > 0


def test_a_judge_that_fails_half_way_loses_nothing(options: Options, make: Any) -> None:
    calls = []

    def reward(prompt: str, response: str) -> float:
        calls.append(response)
        if len(calls) == 20:
            raise ConnectionError("the judge is gone")
        return float(len(response))

    with pytest.raises(RuntimeError, match=r"reward failed .*the judge is gone.*are kept"):
        ilr(options, make, scorer=rounds.Function(reward)).run()
    before = len(calls)
    ilr(options, make, scorer=rounds.Function(reward)).run()
    assert len(calls) - before < 48


def nan(prompt: str, response: str) -> float:
    return float("nan")


def constant(prompt: str, response: str) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scorer": nan}, "score nan .*must be a finite number"),
        ({"scorer": constant}, "same score, 0.5.*Look at the scorer"),
        ({"filter": {}, "sampling": {"n": 2, "max_new_tokens": 1}}, "max_new_tokens: raise it"),
        ({"sampling": {"n": 2, "top_k": 1, "max_new_tokens": 6}}, "all responses equal"),
    ],
)
def test_bad_scores_and_samples_are_told_in_words(
    options: Options, make: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ilr(options, make, **given).run()


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("SDPO", {"dataset": {"a": []}, "stages": "fractions"}, "cuts one dataset.*is a mapping"),
        ("SDPO", {"probe": 0}, "probe must be at least 1, got 0"),
        ("DICE", {"penalty_step": 0.0}, "penalty_step must be above 0"),
        ("DICE", {"penalty_limit": -1.0}, "penalty_limit must be above 0"),
        ("DICE", {"penalty": math.inf}, "penalty must be a finite number, got inf"),
        ("DICE", {"prompts_per_round": 0}, "prompts_per_round must be at least 1, or None"),
    ],
)
def test_options_out_of_range_are_told_in_words(
    options: Options, make: Any, recipe: str, given: dict[str, Any], message: str
) -> None:
    plain = {"dataset": make.pairs(4), **({"initial_reference": "a"} if recipe == "DICE" else {})}
    if recipe == "DICE":
        plain["sampling"] = SAMPLING
    with pytest.raises(ValueError, match=message):
        getattr(rounds, recipe)(**options(**{**plain, **given}))


def test_a_scorer_of_another_kind_is_a_change_that_redo_makes(options: Options, make: Any) -> None:
    ilr(options, make, scorer=make.reward).run()
    several = [{"kind": "function", "function": make.reward}, {"kind": "length"}]
    for scorer in (several, make.reward):
        with pytest.raises(rounds.ChangedError, match=r"(?s)scores was made with.*--redo"):
            ilr(options, make, scorer=scorer).run()
        ilr(options, make, scorer=scorer, redo=True).run()


def test_a_changed_option_says_what_changed_and_redo_keeps_the_old(
    options: Options, make: Any
) -> None:
    first = ilr(options, make).run()
    with pytest.raises(rounds.ChangedError, match=r"(?s)beta: 0.1 -> 0.5.*--redo"):
        ilr(options, make, beta=0.5).run()
    assert Path(first.policy.path).exists()
    second = ilr(options, make, beta=0.5, redo=True).run()
    assert second.policy.digest != first.policy.digest
    assert list((first.folder / "replaced").rglob("model.safetensors"))


def test_the_command_reads_yaml_and_names_the_nearest(
    options: Options, make: Any, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make.pairs(10)))
    given = options(dataset=str(data), stages="fractions", held_out=2)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(given))
    assert main(["sdpo", "--config", str(tmp_path / "x.yaml"), "--cpu"]) == 0
    (tmp_path / "y.yaml").write_text("modell: a\nbeta: 1e-2\n")
    assert read_config(tmp_path / "y.yaml")["beta"] == 0.01
    with pytest.raises(TypeError, match="Did you mean 'model'"):
        main(["sdpo", "--config", str(tmp_path / "y.yaml")])
    with pytest.raises(ValueError, match="did you mean 'sdpo'"):
        main(["sdp", "--config", "y.yaml"])


@pytest.mark.parametrize("name", sorted(rounds.RECIPES))
def test_every_recipe_has_an_example_and_a_page(name: str) -> None:
    root = Path(__file__).parents[2]
    given = read_config(root / "examples" / "rounds" / f"{name}.yaml")
    getattr(rounds, rounds.RECIPES[name][0]).from_options(given)
    assert (root / "docs" / "recipes" / f"{name}.md").exists()
