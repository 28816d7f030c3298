"""Tokenisation of whole datasets: every issue counted, nothing lost, the cache exact."""

from __future__ import annotations

import json
import os

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import tokenize_dataset
from fastpref.data.report import WORDS, Issue, TokenizationReport
from fastpref.data.rows import Limits

GOOD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


def run(rows, tokenizer, **options):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return tokenize_dataset(dataset, tokenizer, **options)


def test_every_reason_is_counted(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    rows = [
        GOOD,
        {**GOOD, "chosen": None},
        {**GOOD, "chosen": ""},
        {**GOOD, "prompt": "The sky " * 40},
        {**GOOD, "rejected": GOOD["chosen"]},
        {**GOOD, "rejected": "<|im_end|>"},
        {**GOOD, "chosen": " blue" * 60, "rejected": " blue" * 70},
        {**GOOD, "chosen": " blue" * 60},
        {**GOOD, "prompt": "<s>The sky is"},
        {**GOOD, "prompt": "The sk", "chosen": "y is blue"},
        GOOD,
    ]
    for row in rows:
        row["weight"] = 1.0
    rows[-1] = {**rows[-1], "weight": float("nan")}
    dataset, report = run(rows, tokenizer, max_length=48)
    assert report.dropped == {
        WORDS[Issue.NOT_TEXT]: 1,
        WORDS[Issue.EMPTY_RESPONSE]: 1,
        WORDS[Issue.PROMPT_TOO_LONG]: 1,
        WORDS[Issue.IDENTICAL]: 1,
        WORDS[Issue.IDENTICAL_TRUNCATED]: 1,
        WORDS[Issue.BAD_NUMBER]: 1,
    }
    assert report.notes == {
        WORDS[Issue.RESPONSE_TRUNCATED]: 1,
        WORDS[Issue.DOUBLE_BOS]: 1,
        WORDS[Issue.BOUNDARY_MOVED]: 1,
    }
    assert report.samples[WORDS[Issue.IDENTICAL]] == [4]
    assert dataset["example_ids"][:] == [0, 5, 7, 8, 9]
    assert (report.rows, report.kept, report.bad) == (11, 5, 6)
    assert sum(report.dropped.values()) == report.bad
    assert "_issues" not in dataset.column_names
    assert max(len(r["prompt_ids"]) + len(r["chosen_ids"]) for r in dataset) == 48


def test_a_prompt_of_exactly_max_length(tokenizer):
    size = len(tokenizer(GOOD["prompt"])["input_ids"])
    _, report = run([GOOD, {**GOOD, "prompt": ""}], tokenizer, max_length=size)
    assert report.dropped[WORDS[Issue.PROMPT_TOO_LONG]] == 1
    _, report = run([GOOD], tokenizer, max_length=size + 1)
    assert report.kept == 1


def test_no_response_token_is_lost_at_the_boundary(tokenizer):
    row = {"prompt": "The sk", "chosen": "y is blue", "rejected": "ate"}
    dataset, _ = run([row], tokenizer)
    for name in ("chosen", "rejected"):
        whole = dataset[0]["prompt_ids"] + dataset[0][name + "_ids"]
        assert tokenizer.decode(whole) == row["prompt"] + row[name] + "<|im_end|>"
        assert whole == tokenizer(row["prompt"] + row[name] + "<|im_end|>")["input_ids"]


def test_double_bos_is_single(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    dataset, _ = run([{**GOOD, "prompt": "<s>The sky is"}, GOOD], tokenizer)
    assert dataset[0]["prompt_ids"] == dataset[1]["prompt_ids"]
    assert dataset[0]["chosen_ids"] == dataset[1]["chosen_ids"]


def test_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [GOOD, {**GOOD, "chosen": " blue.<|im_end|>"}]
    dataset, _ = run(rows, tokenizer)
    assert dataset[0]["chosen_ids"] == dataset[1]["chosen_ids"]
    assert dataset[0]["chosen_ids"].count(tokenizer.eos_token_id) == 1
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chat = {
        "prompt": [{"role": "user", "content": "The"}],
        "chosen": [{"role": "assistant", "content": "sky"}],
        "rejected": [{"role": "assistant", "content": "sun"}],
    }
    _, report = run([chat], tokenizer)
    assert report.notes[WORDS[Issue.NO_EOS]] == 1
    tokenizer.eos_token = None
    run([chat], tokenizer)
    with pytest.raises(ValueError, match="no eos_token"):
        run([GOOD], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat_template"):
        run([chat], tokenizer)


def test_a_failing_template_drops_the_row_only(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('who?') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    row = {"prompt": [{"role": "user", "content": "The"}], "chosen": "sky", "rejected": "sun"}
    alien = {**row, "prompt": [{"role": "alien", "content": "The"}]}
    dataset, report = run([row, alien, {**row, "chosen": "grass"}], tokenizer)
    assert report.dropped == {WORDS[Issue.TEMPLATE_ERROR]: 1}
    assert dataset["example_ids"][:] == [0, 2]


def test_tokens_given(tokenizer):
    rows = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": []},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": None},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [11, 2], "rejected_ids": [12]},
    ]
    extra = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5, "prior_chosen": [1.0, 2.0]}
    dataset, report = run([{**row, **extra} for row in rows], tokenizer, max_length=5)
    assert dataset["chosen_ids"][:] == [[8, 9], [11, 2]]
    assert dataset["ref_chosen_logps"][:] == [-1.5, -1.5]
    assert dataset["prior_chosen"][:] == [[1.0, 2.0]] * 2
    assert report.notes == {WORDS[Issue.RESPONSE_TRUNCATED]: 1, WORDS[Issue.NO_EOS]: 1}
    again, _ = run(dataset, tokenizer, max_length=5)
    assert again[:] == dataset[:], "tokenising twice changes nothing, example_ids included"


def test_nothing_predicts_the_first_token_after_an_empty_prompt(tokenizer):
    row = {"prompt_ids": [], "chosen_ids": [5, 6], "rejected_ids": [7, 8], "chosen_mask": [0, 1]}
    one_token = {**row, "rejected_ids": [7]}
    only_the_first_counts = {**row, "chosen_mask": [1, 0]}
    _, report = run([row, one_token, only_the_first_counts], tokenizer)
    assert report.kept == report.notes[WORDS[Issue.EMPTY_PROMPT]] == 1
    assert report.dropped == {WORDS[Issue.EMPTY_RESPONSE]: 2}


def test_masks(tokenizer):
    row = {
        "prompt_ids": [5, 6],
        "chosen_ids": [7, 8, 9],
        "chosen_mask": [0, 1, 1],
        "rejected_ids": [7],
        "rejected_mask": [1],
    }
    unequal = {**row, "chosen_mask": [1]}
    nothing_left = {**row, "chosen_mask": [0, 0, 1]}
    dataset, report = run([row, unequal, nothing_left], tokenizer, max_length=4)
    assert report.dropped == {WORDS[Issue.BAD_MASK]: 1, WORDS[Issue.EMPTY_RESPONSE]: 1}
    assert dataset["chosen_ids"][:] == [[7, 8]]
    assert dataset["chosen_mask"][:] == [[0, 1]]
    unpaired, _ = run([row], tokenizer, kind="unpaired", unpair=True)
    assert unpaired["completion_mask"][:] == [[0, 1, 1], [1]]


def test_unpaired(tokenizer):
    rows = [
        {"prompt": "The sky is", "completion": " blue", "label": 1, "reward": 0.5},
        {"prompt": "The sky is", "completion": " green", "label": 0, "reward": 0.1},
        {"prompt": "The sky is", "completion": " green", "label": 3, "reward": 0.1},
        {"prompt": "The sky is", "completion": " green", "label": None, "reward": 0.1},
    ]
    dataset, report = run(rows, tokenizer, kind="unpaired")
    assert dataset["label"][:] == [True, False]
    assert dataset["score"][:] == [0.5, 0.1]
    assert report.dropped == {WORDS[Issue.BAD_LABEL]: 2}


def test_unpairing_keeps_the_pair_index(tokenizer):
    pair = {"chosen": "The sky is blue", "rejected": "The sky is green"}
    rows = [{**pair, "chosen_score": i, "rejected_score": -i} for i in range(3)]
    rows[1]["chosen"] = None
    dataset, report = run(rows, tokenizer, kind="unpaired", unpair=True)
    assert dataset["example_ids"][:] == [0, 2, 0, 2]
    assert dataset["label"][:] == [True, True, False, False]
    assert dataset["score"][:] == [0, 2, 0, -2]
    assert (report.rows, report.kept) == (6, 4)


def test_third_response(tokenizer):
    dataset, _ = run([{**GOOD, "reference": " black at night"}], tokenizer)
    assert tokenizer.decode(dataset[0]["third_ids"]) == " black at night<|im_end|>"


def test_max_bad_rows(tokenizer):
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "chosen": None}]
    run(rows, tokenizer, max_bad_rows=2)
    with pytest.raises(ValueError, match=r"2 of 3 rows.*max_bad_rows=1.*empty response"):
        run(rows, tokenizer, max_bad_rows=1)
    with pytest.raises(ValueError, match="none of the 2 rows"):
        run(rows[1:], tokenizer)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_workers_and_batches_do_not_matter(num_proc, tokenizer):
    rows = [{**GOOD, "chosen": " blue" * (i % 5)} for i in range(40)]
    expected, report = run(rows, tokenizer)
    dataset, other = run(rows, tokenizer, num_proc=num_proc, batch_size=7)
    assert dataset[:] == expected[:]
    assert other.to_dict() == report.to_dict()


def test_stream(tokenizer):
    rows = [{**GOOD, "chosen": " blue" * (i % 5), "weight": 2.0} for i in range(40)]
    expected, counted = run(rows, tokenizer)
    stream, report = run(
        IterableDataset.from_generator(lambda: iter(rows)), tokenizer, batch_size=8
    )
    assert report.rows == 0
    assert list(stream) == list(expected)
    assert {**report.to_dict(), "streaming": False} == counted.to_dict()
    assert list(stream) == list(expected)
    assert report.rows == 40, "a second pass is not counted again"
    assert "so far" in str(report.table().title)
    strict, _ = run(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, max_bad_rows=3)
    with pytest.raises(ValueError, match="max_bad_rows=3"):
        list(strict)


def test_cache_is_reused_and_never_stale(tmp_path, make_tokenizer):
    Dataset.from_list([GOOD] * 20).to_parquet(tmp_path / "d.parquet")

    def tokenise(tokenizer, **options):
        dataset = Dataset.from_parquet(str(tmp_path / "d.parquet"), cache_dir=str(tmp_path))
        out, report = tokenize_dataset(dataset, tokenizer, **options)
        assert report.rows == 20
        return out.cache_files[0]["filename"]

    tokenizer = make_tokenizer()
    first = tokenise(tokenizer)
    written = os.stat(first).st_mtime_ns
    tokenizer("some other use", padding="max_length", max_length=4, truncation=True)
    assert tokenise(tokenizer, max_bad_rows=3) == first
    assert os.stat(first).st_mtime_ns == written
    assert tokenise(tokenizer, max_length=8) != first
    assert tokenise(make_tokenizer(bos=True)) != first
    tokenizer.chat_template += " "
    assert tokenise(tokenizer) != first


def test_report_prints_and_serialises(tokenizer, capsys):
    rows = [{**GOOD, "chosen": " blue" * i} for i in range(4)]
    _, report = run(rows, tokenizer)
    report.print()
    printed = capsys.readouterr().out
    assert "3 of 4 rows kept" in printed
    assert "empty response" in printed
    told = json.loads(json.dumps(report.to_dict()))
    assert told["dropped"] == {"empty response": 1}
    assert told["lengths"]["chosen_ids"]["max"] == 4
    assert told["lengths"]["chosen_ids"]["total"] == 9


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_percentiles(values):
    import numpy as np

    report = TokenizationReport()
    array = np.asarray(values)
    half = len(values) // 2
    for part in (array[:half], array[half:]):
        report.update(np.zeros(len(part), dtype=np.int64), part, {"x": part})
    stats = report.lengths()["x"]
    assert stats["mean"] == pytest.approx(array.mean())
    assert (stats["min"], stats["max"]) == (array.min(), array.max())
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert stats[name] == np.quantile(array, q, method="inverted_cdf")


LENGTH = st.integers(0, 30)


@given(
    LENGTH,
    st.lists(LENGTH, min_size=1, max_size=3),
    st.none() | st.integers(2, 40),
    st.sampled_from(["keep_start", "keep_end"]),
    st.none() | st.integers(1, 20),
    st.none() | st.integers(1, 20),
)
def test_limits(prompt, responses, max_length, mode, max_prompt, max_completion):
    limits = Limits(max_length, mode, max_prompt, max_completion)
    cut, cuts = limits.cuts(prompt, responses)
    kept = len(range(prompt)[cut])
    lengths = [len(range(n)[c]) for n, c in zip(responses, cuts, strict=True)]
    whole = min(prompt, max_prompt or prompt)
    capped = [min(n, max_completion or n) for n in responses]
    assert kept <= whole
    assert all(a <= b for a, b in zip(lengths, capped, strict=True))
    assert kept == 0 or range(prompt)[cut][-1] == prompt - 1, "the prompt keeps its end"
    for n, most, c in zip(responses, capped, cuts, strict=True):
        left = list(range(n)[c])
        last = max_length is not None and mode == "keep_end"
        assert left == (list(range(most))[most - len(left) :] if last else list(range(len(left))))
    if max_length is None:
        assert (kept, lengths) == (whole, capped)
    elif mode == "keep_start":
        assert kept == whole
        assert lengths == [max(0, min(n, max_length - kept)) for n in capped]
    else:
        assert kept + max(lengths) <= max_length
        assert kept >= min(whole, 1)
        if whole + max(capped) > max_length:
            assert kept + max(lengths) == max_length or max(capped) == 0
        room = max_length - min(whole, 1)
        assert lengths == [min(n, max(room, max_length - kept)) for n in capped]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_mode": "middle"}, "truncation_mode must be"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1"),
    ],
)
def test_bad_options(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        run([GOOD], tokenizer, **options)


def test_bad_datasets(tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        run(Dataset.from_dict({"chosen": [], "rejected": []}), tokenizer)
    with pytest.raises(TypeError, match="got dict"):
        tokenize_dataset({"train": Dataset.from_list([GOOD])}, tokenizer)
