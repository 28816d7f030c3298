"""What a report says of the pairs that were trained on, and how; it is JSON whatever happens."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from fastpref import rounds
from fastpref.rounds.policies import generation_config
from fastpref.rounds.recipes.sdpo import cut
from fastpref.rounds.report import lines
from fastpref.rounds.run import Run, given_rows, policy_of, read_jsonl, write_jsonl
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.winrate import mean

Options = Callable[..., dict[str, Any]]
PAIRS = [
    {"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"},
    {"prompt": "w2", "chosen": " w3", "rejected": " w4 w5 w6 w7 w8 w9 w1"},  # cut to 6 tokens
    {"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w5 w6"},
    {"prompt": "w1 " * 20, "chosen": " w1", "rejected": " w2"},
    {"prompt": "w5", "chosen": " w1 w1", "rejected": " w2 w2 w2"},
]


def sdpo(options: Options, **given: Any) -> dict[str, Any]:
    """The report of its one stage."""
    plain = {"dataset": PAIRS, "stages": "fractions", "fractions": [1.0], "held_out": 0}
    (report,) = rounds.SDPO(**options(**{**plain, **given})).run().reports
    return report


def test_a_report_says_what_was_trained_on_and_what_was_not(options: Options) -> None:
    report = sdpo(options, training={"max_completion_length": 6})
    gaps = {"w1 w2": (4 - 2, 8 - 2), "w2": (2 - 6, 2 - 17), "w5": (3 - 4, 5 - 8)}
    order = [row["prompt"] for row in cut(PAIRS, [1.0], 0)[0] if row["prompt"] in gaps]
    tokens, characters = zip(*(gaps[prompt] for prompt in order))
    assert report["left_out"] == {"prompt longer than max_prompt_tokens": 1}
    assert report["training"]["pairs"] == 4
    assert report["trained_on"] == {
        "pairs": 3,
        "left_out": {"chosen equals rejected": 1},
        "notes": report["trained_on"]["notes"],
        "gap_tokens": pytest.approx(mean(tokens, 20)),
        "gap_characters": pytest.approx(mean(characters, 20)),
    }
    assert report["trained_on"]["notes"]["response truncated"] == 1
    shown = lines(report)
    assert ("left out of the data", "1: prompt longer than max_prompt_tokens") in shown
    assert ("trained on", "3 pairs") in shown
    assert ("  dropped", "1: chosen equals rejected") in shown
    assert any(label == "  chosen - rejected, tokens" and "-1.0 [" in v for label, v in shown)


def test_the_gap_of_a_loss_of_single_examples_is_that_of_its_pairs(
    options: Options, make: Any
) -> None:
    report = sdpo(options, dataset=make.pairs(8), loss="kto")
    gaps = [len(r["chosen"].split()) - len(r["rejected"].split()) for r in make.pairs(8)]
    assert report["trained_on"]["pairs"] == 8
    assert report["trained_on"]["gap_tokens"][0] == pytest.approx(sum(gaps) / 8)


def test_without_a_judge_length_and_kl_are_reported_and_what_is_missing_is_said(
    options: Options, make: Any
) -> None:
    report = sdpo(options, dataset=make.pairs(12), held_out=4)
    answers = read_jsonl(Path(options()["run_dir"]) / "round-1" / "answers" / "rows.jsonl")
    lengths = [len(row["responses"][0]["ids"]) for row in answers]
    assert report["held_out"]["tokens"][0] == sum(lengths) / 4
    assert report["held_out"]["kl"]["previous"][0] != 0
    assert ("win rate", "not measured: no judge is given") in lines(report)


def never(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_one_held_out_prompt_has_no_interval_and_the_report_says_so(
    options: Options, make: Any
) -> None:
    given = options(
        dataset=make.pairs(12), margins={"length": {"kind": "length"}}, weights=[0.5], held_out=1
    )
    made = rounds.MODPO(**given, reward=make.reward).run()
    for path in (made.folder / "front.jsonl", made.folder / "w-0.5-0.5/measured/rows.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line, parse_constant=never)
            assert row["tokens"][1:] == [None, None]
    text = (made.folder / "front.md").read_text()
    assert "[an interval needs at least 2 values]" in text
    report = sdpo(options, dataset=make.pairs(12), held_out=1, run_dir=str(made.folder / "sdpo"))
    text = (made.folder / "sdpo" / "round-1" / "report" / "report.json").read_text()
    assert json.loads(text, parse_constant=never) == report
    assert report["held_out"]["kl"]["start"][1:] == [None, None]
    assert any("needs at least 2" in value for _, value in lines(report))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_row_that_no_json_can_hold_is_told_and_nothing_is_written(
    number: float, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"not finite, in {'id': 3, .*no JSON can hold it"):
        write_jsonl(tmp_path / "rows.jsonl", [{"id": 2}, {"id": 3, "logps": [number]}])
    assert not list(tmp_path.iterdir())


# Limits and ends of samples


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"max_length": 20},
            r"max_prompt_tokens \+ sampling\S+ is 22, .*max_length is 20",
        ),
        (
            {"max_completion_length": 5},
            r"sampling\S+ is 6, .*max_completion_length is 5",
        ),
        ({"max_prompt_length": 15}, "max_prompt_tokens is 16, training.max_prompt_length is 15"),
    ],
)
def test_samples_that_training_would_cut_are_refused(
    options: Options, make: Any, training: dict[str, int], message: str
) -> None:
    given = options(dataset=make.prompts(4), scorer=make.reward, training=training)
    with pytest.raises(ValueError, match=message):
        rounds.ILRDPO(**given, sampling={"max_new_tokens": 6})


def test_every_sampler_stops_where_the_models_own_generation_does(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.policy(tmp_path / "policy")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(path)
    own = AutoModelForCausalLM.from_pretrained(path).generation_config
    assert generation_config(policy_of(path)).eos_token_id == own.eos_token_id == [2, 7]
    prompts = given_rows([{"id": 0, "prompt": "", "prompt_ids": [4, 5]}])
    run = Run(tmp_path / "run", tokenizer=make.tokenizer())
    many = Sampling(n=64, max_new_tokens=8)
    drawn = sample(run, "drawn", policy_of(path), prompts, many).rows[0]["responses"]
    ended = [r["ids"] for r in drawn if r["finished"]]
    assert {ids[-1] for ids in ended} == {2, 7}
    assert not any({2, 7} & set(ids[:-1]) for ids in ended)

    class Engine:  # vLLM is not here: what it is asked for
        def __init__(self, **given: Any) -> None:
            pass

        def generate(self, asked: Any, params: Any, use_tqdm: bool) -> Any:
            assert params.stop_token_ids == [2, 7]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[9, 7])] * 2)]

    vllm = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    two = Sampling(n=2, max_new_tokens=8, backend="vllm")
    (row,) = sample(run, "vllm", policy_of(path), prompts, two).rows
    assert [r["finished"] for r in row["responses"]] == [True, True]
    (Path(path) / "generation_config.json").unlink()
    assert generation_config(policy_of(path)).eos_token_id == 2
