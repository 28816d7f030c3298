"""The batch dict: every key, and every kind of column that may come along."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from datasets import Dataset

from fastpref.data import PreferenceCollator, dense_mask, lengths

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "example_ids": 7},
    {"prompt_ids": [8], "chosen_ids": [9], "rejected_ids": [10, 11, 12], "example_ids": 3},
]
SINGLES = [
    {"prompt_ids": [1, 2], "completion_ids": [3], "label": True},
    {"prompt_ids": [4], "completion_ids": [5, 6], "label": False},
    {"prompt_ids": [7, 8], "completion_ids": [9, 10, 11], "label": True},
]


def sequences(batch):
    """prompt-end token, targets of every sequence: all a loss needs to know of the layout."""
    flat, bounds = batch["input_ids"].flatten(), batch["cu_seqlens"].tolist()
    return [
        (
            flat[batch["response_rows"][a:b]].tolist()[:1],
            batch["response_targets"][a:b].tolist(),
        )
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_pairs(prefix_sharing):
    batch = PreferenceCollator(0, prefix_sharing=prefix_sharing)(PAIRS)
    assert sequences(batch) == [([3], [4, 5]), ([8], [9]), ([3], [6]), ([8], [10, 11, 12])]
    assert batch["pairs"].tolist() == [[0, 2], [1, 3]]
    assert batch["lengths"].tolist() == [2, 1, 1, 3]
    assert batch["example_ids"].tolist() == [7, 3]
    tokens = 11 if prefix_sharing else 15
    assert int((batch["document_ids"] >= 0).sum()) == tokens
    rows, width = batch["input_ids"].shape
    assert batch["attention_mask"].shape == (rows, 1, width, width)
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "document_ids": torch.int32,
        "branch_ids": torch.int32,
        "attention_mask": torch.bool,
        "response_rows": torch.int64,
        "response_targets": torch.int64,
        "cu_seqlens": torch.int32,
        "lengths": torch.int64,
        "pairs": torch.int64,
        "example_ids": torch.int64,
    }


def test_mask_can_be_left_to_the_model_side():
    full = PreferenceCollator(0)(PAIRS)
    lean = PreferenceCollator(0, dense_mask=False, pad_to_multiple_of=1)(PAIRS)
    assert "attention_mask" not in lean
    mask = dense_mask(lean["document_ids"], lean["branch_ids"])
    assert torch.equal(mask, full["attention_mask"])


def test_numeric_columns_and_third_response():
    extra = {"weight": 2.0, "chosen_score": 1, "ref_chosen_logps": -3.5, "chosen_margins": [1, 2]}
    rows = [{**row, **extra, "third_ids": [13, 14], "my_number": 5, "text": "x"} for row in PAIRS]
    batch = PreferenceCollator(0, extra_columns=["my_number"])(rows)
    assert batch["weight"].tolist() == [2.0, 2.0]
    assert batch["ref_chosen_logps"].dtype == torch.float32
    assert batch["chosen_margins"].shape == (2, 2)
    assert batch["my_number"].tolist() == [5.0, 5.0]
    assert "text" not in batch
    assert batch["third"].tolist() == [4, 5]
    assert batch["pairs"].tolist() == [[0, 2], [1, 3]]
    assert sequences(batch)[4:] == [([3], [13, 14]), ([8], [13, 14])]


def test_completion_masks():
    rows = [{**row, "chosen_mask": [0] * (len(row["chosen_ids"]) - 1) + [1]} for row in PAIRS]
    batch = PreferenceCollator(0)(rows)
    assert batch["response_targets"].tolist() == [-100, 5, 9, 6, 10, 11, 12]
    assert batch["lengths"].tolist() == [1, 1, 1, 3]


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_mismatched(prefix_sharing):
    others = [[9, 10, 11], [], [5, 6]]
    rows = [{**row, "mismatched_ids": ids} for row, ids in zip(SINGLES, others, strict=True)]
    batch = PreferenceCollator(0, "unpaired", prefix_sharing=prefix_sharing)(rows)
    prompts, responses = [[2], [4], [8]], [[3], [5, 6], [9, 10, 11]]
    found = sequences(batch)
    assert found[:3] == list(zip(prompts, responses, strict=True))
    assert [found[3], found[5]] == [([2], others[0]), ([8], others[2])]
    assert batch["mismatched"].tolist() == [3, 5]  # where there is none, it does not count
    assert batch["label"].tolist() == [True, False, True]


def test_pickles_and_repeats():
    collator = pickle.loads(pickle.dumps(PreferenceCollator(0, row_tokens=16)))
    first, second = collator(PAIRS), collator(PAIRS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_array_rows():
    rows = Dataset.from_list([{**row, "weight": 1.5, "prior_chosen": [1.0, 2.0]} for row in PAIRS])
    plain = PreferenceCollator(0)(list(rows))
    assert plain["prior_chosen"].shape == (2, 2)
    for kind in ("numpy", "torch"):
        batch = PreferenceCollator(0)(list(rows.with_format(kind)))
        assert all(torch.equal(plain[name], batch[name]) for name in plain)


def test_lengths_and_the_length_grouped_sampler():
    from transformers.trainer_pt_utils import LengthGroupedSampler

    rows = Dataset.from_list(PAIRS * 20)
    assert lengths(rows)[:2] == [6, 5]
    assert lengths(rows, prefix_sharing=False)[:2] == [9, 6]
    assert lengths(Dataset.from_list(SINGLES)) == [3, 3, 5]
    assert lengths(rows.select([1, 0])) == [5, 6]
    assert len(list(LengthGroupedSampler(4, lengths=lengths(rows)))) == 40


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"kind": "triple"}, None, "kind must be"),
        ({}, [], "empty batch"),
        ({}, [{"prompt_ids": [1]}], "remove_unused_columns"),
        ({"kind": "unpaired"}, [{"prompt_ids": [1], "completion_ids": [2]}], "label"),
        ({}, [{**PAIRS[0], "weight": None}], "'weight' must hold a number"),
        ({}, [{**PAIRS[0], "weight": [1]}, {**PAIRS[1], "weight": [1, 2]}], "'weight'"),
    ],
)
def test_refusals(options, rows, message):
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(0, **options)(rows)
