"""Several responses to a prompt, with scores: read, padded, counted, and laid out in rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from fastpref.data import PreferenceCollator, tokenize_dataset
from fastpref.data.report import WORDS, Issue

ROWS = [
    {
        "prompt": "The sky is",
        "completions": [" blue.", " very blue.", " red."],
        "scores": [3, 2, 1],
    },
    {"prompt": "Grass is", "completions": [" green.", " tall."], "scores": [1, 5]},
    {"prompt": "One", "completions": [" alone."], "scores": [1]},
    {"prompt": "None", "completions": None, "scores": []},
    {"prompt": "A gap", "completions": [" a", "", " c"], "scores": [1, 2, 3]},
    {"prompt": "Scores", "completions": [" a", " b"], "scores": [1, 2, 3]},
]


def tokenised(rows, tokenizer, **options):
    return tokenize_dataset(Dataset.from_list(rows), tokenizer, kind="group", **options)


def test_groups_of_several_sizes(make_tokenizer):
    tokenizer = make_tokenizer()
    dataset, report = tokenised(ROWS, tokenizer)
    assert report.dropped == {
        WORDS[Issue.BAD_GROUP]: 2,
        WORDS[Issue.EMPTY_RESPONSE]: 1,
        WORDS[Issue.BAD_NUMBER]: 1,
    }
    assert dataset["example_ids"][:] == [0, 1]
    assert dataset["scores"][:] == [[3, 2, 1], [1, 5, 0]]
    assert dataset["completion_3_ids"][1] == []
    whole = tokenizer("Grass is tall." + tokenizer.eos_token)["input_ids"]
    assert dataset["prompt_ids"][1] + dataset["completion_2_ids"][1] == whole
    again, report = tokenize_dataset(dataset, tokenizer, kind="group")
    assert again.to_list() == dataset.to_list()
    assert not report.bad


@pytest.mark.parametrize("sharing", [True, False])
def test_a_batch_of_groups(make_tokenizer, sharing):
    rows = tokenised(ROWS, make_tokenizer())[0].to_list()
    batch = PreferenceCollator(pad_token_id=0, kind="group", prefix_sharing=sharing)(rows)
    sizes = [[len(row[f"completion_{k}_ids"]) for k in (1, 2, 3)] for row in rows]
    assert batch["lengths"][batch["groups"]].tolist() == sizes
    assert batch["scores"].tolist() == [[3, 2, 1], [1, 5, 0]]
    for i, row in enumerate(rows):
        for k, sequence in enumerate(batch["groups"][i].tolist()):
            span = slice(*batch["cu_seqlens"][sequence : sequence + 2].tolist())
            assert batch["response_targets"][span].tolist() == row[f"completion_{k + 1}_ids"]
    if sharing:
        tokens = sum(
            len(ids)
            for row in rows
            for name, ids in row.items()
            if name.endswith("_ids") and name != "example_ids"
        )
        assert int((batch["document_ids"] >= 0).sum()) == tokens


def test_a_response_with_a_prompt_of_its_own():
    """It comes after all others of the batch, and its prompt is what it follows."""
    rows = [
        {
            "prompt_ids": [10 + i],
            "chosen_ids": [1, 2],
            "rejected_ids": [3],
            "third_ids": [4],
            "corrupted_ids": [1, 2],
            "corrupted_prompt_ids": [20 + i, 30],
        }
        for i in range(2)
    ]
    for sharing in (True, False):
        batch = PreferenceCollator(pad_token_id=0, prefix_sharing=sharing)(rows)
        assert batch["third"].tolist() == [4, 5]
        assert batch["corrupted"].tolist() == [6, 7]
        tokens = batch["input_ids"].flatten()
        places = batch["response_rows"].split(batch["cu_seqlens"].diff().tolist())
        assert [int(tokens[place[0]]) for place in places] == [10, 11] * 3 + [30, 30]
        assert torch.equal(batch["lengths"], torch.tensor([2, 2, 1, 1, 1, 1, 2, 2]))


def test_a_stream_of_groups_has_room_for_its_first_row(make_tokenizer):
    rows = [{"prompt": "a", "completions": [" b", " c"], "scores": [1.0, 2.0]}, ROWS[0]]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="a row has 3 completions, the first row of the stream ha"):
        list(tokenize_dataset(stream, make_tokenizer(), kind="group")[0])
    rows[0] |= {"completions": [" b", " c", None], "scores": [1.0, 2.0, 0.0]}
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert len(list(tokenize_dataset(stream, make_tokenizer(), kind="group")[0])) == 2


def test_a_missing_score_column_is_named(make_tokenizer):
    rows = [{"prompt": "a", "completions": [" b", " c"], "score": [1.0, 2.0]}]
    with pytest.raises(ValueError, match=r"column 'scores' is missing.*Nearest is 'score'"):
        tokenised(rows, make_tokenizer())
