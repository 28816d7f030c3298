"""Dropout-NTP: halves finished without the context, by a greedy loop as the truth; drops; MPO."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpref import PreferenceConfig, PreferenceTrainer, rounds
from fastpref.rounds import sampling
from fastpref.rounds.recipes.dropout_ntp import without
from fastpref.rounds.run import read_jsonl

Options = Callable[..., dict[str, Any]]
START, STOP = "w10", "w11"
"""Marks of the context in these prompts."""
GREEDY = {"n": 1, "temperature": 0.0, "max_new_tokens": 5}


def documents(count: int) -> list[dict[str, Any]]:
    """Prompts with a marked context, and responses of 2 to 7 words."""
    found = []
    for i in range(count):
        words = " ".join(f"w{(i * 3 + k * 5) % 9}" for k in range(2 + i % 6))
        prompt = f"w{i % 9} {START} w{i % 7} w{i % 5} {STOP} w{i % 4}"
        found.append({"prompt": prompt, "chosen": f" {words}", "bare": f"w{i % 9}  w{i % 4}"})
    return found


def recipe(options: Options, **given: Any) -> rounds.DropoutNTP:
    plain = {
        "dataset": documents(8),
        "context": [START, STOP],
        "sampling": GREEDY,
        "filter": {"unfinished": True},
        "held_out": 0,
    }
    return rounds.DropoutNTP(**options(**{**plain, **given}))


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_jsonl(folder / "round-1" / name / "rows.jsonl")


def greedy(model: Any, ids: list[int], most: int) -> list[int]:
    new: list[int] = []
    while len(new) < most and 2 not in new:
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.75])
def test_the_rejected_response_is_a_beginning_finished_without_the_context(
    keep: float, options: Options, make: Any, policy: str
) -> None:
    """With nothing kept, it is the policy's own answer to the prompt without its context."""
    made = recipe(options, keep=keep, loss=None).run()
    assert made.policy.path == policy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), make.tokenizer()
    pairs = table(made.folder, "pairs")
    assert sorted(row["id"] for row in pairs) == list(range(8))
    for row in pairs:
        given = documents(8)[row["id"]]
        ids = tokenizer(given["chosen"])["input_ids"]
        kept = ids[: math.floor(keep * len(ids))]
        bare = tokenizer(given["bare"])["input_ids"]
        assert row["prompt"] == given["prompt"]
        assert row["prompt_ids"] == tokenizer(given["prompt"])["input_ids"]
        assert row["chosen_ids"] == [*ids, 2]
        assert row["rejected_ids"] == kept + greedy(model, bare + kept, 5)


def columns(row: dict[str, Any]) -> Any:
    return row["bare"]


def test_marks_a_column_and_a_function_drop_the_same(options: Options, tmp_path: Path) -> None:
    found = []
    for number, context in enumerate(([START, STOP], "bare", columns)):
        folder = str(tmp_path / str(number))
        made = recipe(options, context=context, loss=None, run_dir=folder).run()
        found.append(table(made.folder, "pairs"))
    assert found[0] == found[1] == found[2]


def test_marks_are_left_out_of_every_message_and_an_empty_one_goes() -> None:
    drop = without(["<d>", "</d>"])
    prompt = [
        {"role": "system", "content": "<d>all\nof it</d> "},
        {"role": "user", "content": "a <d>x</d>b<d></d> c"},
        {"role": "user", "content": ""},
    ]
    assert drop({"prompt": prompt}) == [{"role": "user", "content": "a b c"}, prompt[2]]
    assert drop({"prompt": "<d>x</d>"}) == ""
    assert drop({"prompt": "no mark </d>"}) == "no mark </d>"
    with pytest.raises(ValueError, match=r"'<d>' stands in the prompt without '</d>' after it"):
        drop({"prompt": "</d> <d>x"})


def test_every_row_is_a_pair_or_counted_by_its_reason(options: Options) -> None:
    prompt = f"w1 {START} w2 {STOP} w3"
    data = [
        *documents(8),
        {"prompt": "w1 w2", "chosen": " w3 w4", "bare": ""},
        {"prompt": f"{START} w2 {STOP} \n", "chosen": " w3 w4", "bare": ""},
        {"prompt": prompt, "chosen": " w3", "bare": ""},
        {"prompt": prompt, "chosen": "", "bare": ""},
    ]
    made = recipe(options, dataset=data, loss=None, filter={}, held_out=4).run()
    (report,) = made.reports
    shown, rows = report["pairs"], table(made.folder, "pairs")
    assert len(rows) == shown["prompts"] == 12
    assert {row["id"]: row["dropped"] for row in rows if row["id"] > 7} == {
        8: "no context in the prompt",
        9: "nothing but context in the prompt",
        10: "the chosen response is too short",
        11: "the chosen response is too short",
    }
    samples = table(made.folder, "samples")
    assert sorted(row["id"] for row in samples) == list(range(8))
    unfinished = sum(not row["responses"][0]["finished"] for row in samples)
    assert shown["dropped"] == {
        "no context in the prompt": 1,
        "nothing but context in the prompt": 1,
        "the chosen response is too short": 2,
        "the rejected response is unfinished": unfinished,
    }
    assert shown["made"] == 8 - unfinished > 0
    assert table(made.folder, "data") == [row for row in rows if "dropped" not in row]


def test_a_rejected_response_equal_to_the_chosen_one_is_dropped(
    options: Options, policy: str, make: Any
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), make.tokenizer()
    words = [f"w{i}" for i in range(9)]
    found = (
        (left, right, first, end)
        for left, right, first in itertools.product(words, words, words)
        for end in [greedy(model, tokenizer(f"{left} {right} {first}")["input_ids"], 3)]
        if end[-1] == 2 and len(end) > 1
    )
    left, right, first, end = next(found)
    prompt = f"{left} {START} w1 {STOP} {right}"
    same = {"prompt": prompt, "chosen": f" {first} {tokenizer.decode(end[:-1])}", "bare": ""}
    made = recipe(options, dataset=[*documents(7), same], loss=None).run()
    why = "the rejected response is equal to the chosen one"
    assert made.reports[0]["pairs"]["dropped"] == {why: 1}
    assert {row["id"] for row in table(made.folder, "pairs") if "dropped" in row} == {7}


def test_pairs_that_are_all_unfinished_say_what_to_do(
    options: Options, policy: str, make: Any
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), make.tokenizer()
    long = []
    for row in documents(8):
        kept = tokenizer(row["chosen"])["input_ids"]
        ids = tokenizer(row["bare"])["input_ids"] + kept[: len(kept) // 2]
        long += [row] if greedy(model, ids, 1) != [2] else []
    once = {"sampling": {**GREEDY, "max_new_tokens": 1}, "filter": {}}
    message = f"{len(long)} prompts: the rejected response is unfinished.*max_new_tokens, or keep"
    with pytest.raises(ValueError, match=message):
        recipe(options, dataset=long, **once).run()


def test_mpo_starts_where_it_must(options: Options, policy: str) -> None:
    """At the start the loss is 1.2 ln 2 and the chosen tokens' mean negative log-likelihood."""
    made = recipe(options, training={"per_device_train_batch_size": 8, "max_steps": 1}).run()
    model = AutoModelForCausalLM.from_pretrained(policy).double()
    total, count = 0.0, 0
    for row in table(made.folder, "data"):
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        logps = model(ids).logits[0].log_softmax(-1).detach()
        start = len(row["prompt_ids"])
        total -= sum(float(logps[k - 1, ids[0, k]]) for k in range(start, ids.shape[1]))
        count += len(row["chosen_ids"])
    (first, *_) = read_jsonl(made.folder / "round-1" / "train" / "trainer" / "metrics.jsonl")
    expected = (0.8 + 2 * 0.2) * math.log(2) + total / count
    assert first["loss"] == pytest.approx(expected, rel=1e-6)


def test_with_the_preference_alone_it_is_dpo_on_the_pairs(
    options: Options, make: Any, tmp_path: Path
) -> None:
    alone = {"preference_weight": 1.0, "quality_weight": 0.0, "generation_weight": 0.0}
    found = []
    for name, loss, arguments in (("a", "mpo", alone), ("b", "dpo", {})):
        folder = str(tmp_path / name)
        made = recipe(options, loss=loss, loss_args=arguments, run_dir=folder).run()
        found.append(load_file(Path(made.policy.path) / "model.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6)
    data = Dataset.from_json(str(tmp_path / "a" / "round-1" / "data" / "rows.jsonl"))
    trainer = PreferenceTrainer(
        make.model(),
        args=PreferenceConfig(output_dir=str(tmp_path / "c"), use_cpu=True, max_length=64),
        train_dataset=data,
        processing_class=make.tokenizer(),
    )
    assert trainer.train_dataset["rejected_ids"] == data["rejected_ids"]


def number(row: dict[str, Any]) -> Any:
    return 7


def broken(row: dict[str, Any]) -> Any:
    return row["nothing"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"context": 3}, TypeError, "expected two marks, a column's name, or a function"),
        ({"context": ["<d>", ""]}, TypeError, "expected two marks"),
        ({"context": "nowhere:function"}, ValueError, "names no function"),
        ({"keep": 1.0}, ValueError, r"keep is a share below the whole: expected \[0, 1\), got 1.0"),
        (
            {"sampling": {"n": 2, "max_new_tokens": 5}},
            ValueError,
            "sampling.n must be 1, one end a response, got 2",
        ),
    ],
)
def test_options_out_of_range_are_told_in_words(
    options: Options, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recipe(options, **given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"context": ["<d>", "</d>"]}, ValueError, "8 prompts: no context in .*look at context"),
        ({"context": "question"}, RuntimeError, r"row \d .*no column 'question'; found prompt"),
        ({"context": number}, RuntimeError, r"row \d .*a string or messages, got 7"),
        ({"context": broken}, RuntimeError, r"row \d of the dataset: KeyError: 'nothing'"),
        ({"context": [START, "w8"]}, RuntimeError, "'w10' stands in the prompt without 'w8'"),
    ],
)
def test_data_without_pairs_is_told_in_words(
    options: Options, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recipe(options, **given).run()


def test_a_run_that_stops_half_way_samples_nothing_twice(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    open_backend = sampling.BACKENDS["transformers"]

    def failing(*arguments: Any) -> Any:
        generate, stops = open_backend(*arguments)

        def counted(prompts: Any, seed: int) -> Any:
            if len(asked) == 4:
                asked.append(0)
                raise MemoryError("the machine is full")
            asked.extend(map(len, prompts))
            return generate(prompts, seed)

        return counted, stops

    drawn = {"sampling": {**GREEDY, "temperature": 1.0}, "batch_size": 2}
    whole = recipe(options, **drawn, run_dir=str(tmp_path / "whole")).run()
    monkeypatch.setitem(sampling.BACKENDS, "transformers", failing)
    with pytest.raises(MemoryError):
        recipe(options, **drawn).run()
    made = recipe(options, **drawn).run()
    assert len(asked) == 1 + 8
    assert table(made.folder, "pairs") == table(whole.folder, "pairs")
    ends = [load_file(Path(run.policy.path) / "model.safetensors") for run in (made, whole)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    with pytest.raises(rounds.ChangedError, match=r"keep: 0\.5 -> 0\.25"):
        recipe(options, **drawn, keep=0.25).run()
