"""Responses of several turns: the assistant's alone count."""

from __future__ import annotations

import pytest
from datasets import Dataset

from fastpref.data import PreferenceCollator, tokenize_dataset


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PROMPT = [user("What colour is the sky?")]
TURNS = [assistant("It is blue."), user("And at night?"), assistant("black")]
PAIR = {"prompt": PROMPT, "chosen": TURNS, "rejected": [assistant("green")]}


def counted(tokenizer, row, name):
    """Text of a response's tokens that count, and of those that do not."""
    ids, mask = row[f"{name}_ids"], row[f"{name}_mask"]
    return [
        tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m == kept])
        for kept in (1, 0)
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_what_the_user_says_in_between_does_not_count(make_tokenizer, bos):
    tokenizer = make_tokenizer(bos)
    data = Dataset.from_list([PAIR, {**PAIR, "rejected": [*TURNS[:2], assistant("0 1")]}])
    rows, _ = tokenize_dataset(data, tokenizer, assistant_only=True)
    plain, _ = tokenize_dataset(data, tokenizer)
    assert rows["chosen_ids"] == plain["chosen_ids"]
    said, unsaid = counted(tokenizer, rows[0], "chosen")
    assert said == "It is blue.<|im_end|>\nblack<|im_end|>\n"
    assert unsaid == "<|im_start|>user\nAnd at night?<|im_end|>\n<|im_start|>assistant\n"
    assert counted(tokenizer, rows[0], "rejected") == ["green<|im_end|>\n", ""]
    assert counted(tokenizer, rows[1], "rejected")[0] == "It is blue.<|im_end|>\n0 1<|im_end|>\n"
    batch = PreferenceCollator(pad_token_id=0)(list(rows))
    assert batch["lengths"].tolist() == [
        sum(rows[i][f"{name}_mask"]) for name in ("chosen", "rejected") for i in range(2)
    ]


def test_plain_text_unpaired_rows_groups_and_truncation(make_tokenizer):
    tokenizer = make_tokenizer()
    text = {"prompt": "The sky", "chosen": " is blue", "rejected": " is green"}
    rows, _ = tokenize_dataset(Dataset.from_list([text]), tokenizer, assistant_only=True)
    assert rows[0]["chosen_mask"] == [1] * len(rows[0]["chosen_ids"])
    rows, _ = tokenize_dataset(
        Dataset.from_list([PAIR]), tokenizer, kind="unpaired", unpair=True, assistant_only=True
    )
    assert counted(tokenizer, rows[0], "completion")[0].endswith("black<|im_end|>\n")
    group = {"prompt": PROMPT, "completions": [TURNS, TURNS[:1]], "scores": [1.0, 0.0]}
    wide = {**group, "completions": [TURNS, TURNS[:1], [assistant("0")]], "scores": [1.0, 0.0, 2]}
    rows, _ = tokenize_dataset(
        Dataset.from_list([group, wide]), tokenizer, kind="group", assistant_only=True
    )
    assert rows[0]["completion_3_mask"] == []
    assert counted(tokenizer, rows[1], "completion_3")[0] == "0<|im_end|>\n"
    whole, _ = tokenize_dataset(Dataset.from_list([PAIR]), tokenizer, assistant_only=True)
    cut, _ = tokenize_dataset(
        Dataset.from_list([PAIR]), tokenizer, assistant_only=True, max_completion_length=7
    )
    assert cut[0]["chosen_mask"] == whole[0]["chosen_mask"][:7]


def test_rows_that_cannot_be_masked_are_dropped_and_counted(make_tokenizer):
    """No turn of the assistant; and a template that leaves earlier turns' thoughts out."""
    tokenizer = make_tokenizer()
    silent = {**PAIR, "chosen": [user("hello")]}
    _, report = tokenize_dataset(Dataset.from_list([PAIR, silent]), tokenizer, assistant_only=True)
    assert report.dropped == {"empty response": 1}
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else 'hello' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    short = {**PAIR, "chosen": TURNS[:1]}
    _, report = tokenize_dataset(Dataset.from_list([PAIR, short]), tokenizer, assistant_only=True)
    assert report.dropped == {"chat template failed": 1}


def test_token_ids_bring_their_own_masks(make_tokenizer):
    ids = {"prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}
    with pytest.raises(ValueError, match="give it mask columns such as 'chosen_mask'"):
        tokenize_dataset(Dataset.from_list([ids]), make_tokenizer(), assistant_only=True)
