"""The token ids are TRL 1.16's, for every layout that TRL accepts and every kind of truncation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from fastpref.data import tokenize_dataset

pytest.importorskip("trl")
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "d"}}]
PLAIN = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "What colour is the sky?", "chosen": " It is blue", "rejected": " 1 2 3"},
    {"prompt": "hello wor", "chosen": "ld", "rejected": "k, bonjour"},  # merges over the boundary
    {"prompt": "", "chosen": "The sky", "rejected": "The sun is bright"},
]
CHAT = [
    {
        "prompt": [user("What colour is the sky?")],
        "chosen": [assistant("It is blue.")],
        "rejected": [assistant("It is green.")],
    },
    {
        "prompt": [user("hello"), assistant("bonjour"), user("le monde")],
        "chosen": [assistant("world")],
        "rejected": [assistant("1"), user("2"), assistant("3 4 5")],
    },
]
CASES = {
    "plain": PLAIN,
    "plain implicit": [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "hello world", "rejected": "hello monde"},
    ],
    "chat": CHAT,
    "chat implicit": [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in CHAT
    ],
    "tools": [{**row, "tools": TOOLS} for row in CHAT],
    "tools json": [{**row, "tools": json.dumps(TOOLS)} for row in CHAT],
    # the template renders an empty thought after the prompt alone, which no response has
    "template kwargs": [
        {**row, "chat_template_kwargs": {"enable_thinking": False}} for row in CHAT
    ],
}


def trl_pairs(rows, tokenizer, **options):
    args = DPOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to=[], **options)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    dataset = Dataset.from_list(rows)
    return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train"), args


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_pairs(case, bos, make_tokenizer):
    tokenizer = make_tokenizer(bos)
    theirs, _ = trl_pairs(CASES[case], tokenizer, max_length=None)
    ours, report = tokenize_dataset(Dataset.from_list(CASES[case]), tokenizer, max_length=None)
    assert report.kept == len(CASES[case])
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == theirs[column][:], column
    moved = {"plain": 1, "template kwargs": 2}.get(case, 0)
    words = "prompt/response boundary moved to their common prefix"
    assert report.notes.get(words, 0) == moved


@pytest.mark.parametrize("max_length", [6, 9, 12, 16, 24])
def test_keep_start(max_length, tokenizer):
    """What TRL's filter and collator leave of each sequence, in ids."""
    theirs, args = trl_pairs(PLAIN, tokenizer, max_length=max_length)
    ours, _ = tokenize_dataset(Dataset.from_list(PLAIN), tokenizer, max_length=max_length)
    collator = DataCollatorForPreference(0, args.max_length, "keep_start", pad_to_multiple_of=None)
    expected = {}
    for row in theirs:
        batch = collator([row])
        tensors = (batch["input_ids"], batch["attention_mask"])
        kept = [ids[mask.bool()] for ids, mask in zip(*tensors, strict=True)]
        chosen, rejected = (ids.tolist() for ids in kept)
        if chosen != rejected:  # a pair that truncation made equal: dropped here, trained on there
            expected[row["prompt"]] = (chosen, rejected)
    actual = {
        PLAIN[row["example_ids"]]["prompt"]: (
            row["prompt_ids"] + row["chosen_ids"],
            row["prompt_ids"] + row["rejected_ids"],
        )
        for row in ours
    }
    assert actual == expected


@pytest.mark.parametrize("layout", ["explicit", "paired"])
@pytest.mark.parametrize("chat", [False, True])
def test_unpaired(layout, chat, tokenizer):
    pairs = CHAT if chat else PLAIN
    rows = pairs
    if layout == "explicit":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ]
    args = KTOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to=[], max_length=None)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
    )
    theirs = KTOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    ours, _ = tokenize_dataset(
        Dataset.from_list(rows), tokenizer, max_length=None, kind="unpaired", unpair=True
    )
    for column in ("prompt_ids", "completion_ids", "label"):
        assert ours[column][:] == theirs[column][:], column
