"""Layouts: what is accepted, what is refused and how, one row at a time."""

from __future__ import annotations

import pytest

from fastpref.data.formats import (
    canonical_names,
    extract_prompt,
    read_example,
    resolve_layout,
    template_arguments,
    unpair_batch,
)
from fastpref.data.report import BadRow, Issue


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = ("chosen", "rejected")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("abc", "abd", "ab"),
        ("same", "same", "sam"),
        ("abc", "abcd", "ab"),
        ("x", "y", ""),
        ("", "y", ""),
        ([user("a"), assistant("b")], [user("a"), assistant("c")], [user("a")]),
        ([user("a")], [user("b")], []),
    ],
)
def test_extract_prompt(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected, "id": 4}
    out = extract_prompt(row)
    assert out["prompt"] == prompt
    assert out["prompt"] + out["chosen"] == chosen
    assert out["prompt"] + out["rejected"] == rejected
    assert out["id"] == 4
    assert "prompt" not in row


@pytest.mark.parametrize("pair", [("The sky is blue.", "The sky is green."), ("ab c", "ab cd")])
def test_extract_prompt_as_trl(pair):
    trl = pytest.importorskip("trl")
    row = dict(zip(PAIR, pair, strict=True))
    assert extract_prompt(row) == trl.extract_prompt(row)


def test_extract_prompt_leaves_alone():
    explicit = {"prompt": "p", "chosen": "pa", "rejected": "pb"}
    assert extract_prompt(explicit) == explicit
    for odd in ({"chosen": None, "rejected": "a"}, {"chosen": ["a"], "rejected": "a"}, {"x": 1}):
        assert extract_prompt(odd) == odd


def test_third_response_loses_the_prompt_too():
    row = {"chosen": "p: a", "rejected": "p: b", "third": "p: c"}
    assert extract_prompt(row) == {
        "prompt": "p:",
        "chosen": " a",
        "rejected": " b",
        "third": " c",
    }


def test_string_prompt_beside_dialogues():
    whole = {
        "prompt": "hi",
        "chosen": [user("hi"), assistant("a")],
        "rejected": [user("hi"), assistant("b")],
    }
    turn = {"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    text = {"prompt": [user("hi")], "chosen": "a", "rejected": "b"}
    expected = ([user("hi")], [[assistant("a")], [assistant("b")]])
    for row in (whole, turn, text):
        assert read_example(row, PAIR) == expected


@pytest.mark.parametrize(
    ("row", "issue"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "b"}, Issue.NOT_TEXT),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, Issue.NOT_TEXT),
        ({"prompt": "a", "chosen": True, "rejected": "b"}, Issue.NOT_TEXT),
        ({"prompt": "a", "chosen": {"content": "a"}, "rejected": "b"}, Issue.NOT_TEXT),
        ({"chosen": 1, "rejected": 2}, Issue.NOT_TEXT),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, Issue.EMPTY_RESPONSE),
        ({"prompt": "a", "chosen": " \n", "rejected": "b"}, Issue.EMPTY_RESPONSE),
        ({"prompt": [user("a")], "chosen": [], "rejected": "b"}, Issue.EMPTY_RESPONSE),
        (
            {"prompt": [user("a")], "chosen": [assistant(" ")], "rejected": [assistant("b")]},
            Issue.EMPTY_RESPONSE,
        ),
        (
            {"prompt": [user("a")], "chosen": [assistant(None)], "rejected": "b"},
            Issue.EMPTY_RESPONSE,
        ),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, Issue.BAD_MESSAGES),
        ({"prompt": ["a"], "chosen": "a", "rejected": "b"}, Issue.BAD_MESSAGES),
        ({"prompt": [{"content": "a"}], "chosen": "a", "rejected": "b"}, Issue.BAD_MESSAGES),
        ({"prompt": [user(3)], "chosen": "a", "rejected": "b"}, Issue.BAD_MESSAGES),
        (
            {"prompt": [user([{"type": "image"}])], "chosen": "a", "rejected": "b"},
            Issue.BAD_MESSAGES,
        ),
        ({"prompt": [user(["hi"])], "chosen": "a", "rejected": "b"}, Issue.BAD_MESSAGES),
    ],
)
def test_bad_rows(row, issue):
    with pytest.raises(BadRow) as error:
        read_example(row, PAIR)
    assert error.value.issue == issue


def test_messages_that_are_fine():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    parts = user([{"type": "text", "text": "hi"}])
    row = {"prompt": [parts], "chosen": [call], "rejected": [assistant("b")]}
    assert read_example(row, PAIR) == ([parts], [[call], [assistant("b")]])


def test_template_arguments():
    assert template_arguments({}) == {"tools": None}
    assert template_arguments({"tools": "[1]"}) == {"tools": [1]}
    assert template_arguments({"tools": []}) == {"tools": None}
    options = {"enable_thinking": False, "arrow_filled_this": None}
    assert template_arguments({"chat_template_kwargs": options}) == {
        "tools": None,
        "enable_thinking": False,
    }
    for bad in ({"tools": "[1"}, {"chat_template_kwargs": "x"}):
        with pytest.raises(BadRow):
            template_arguments(bad)


def test_unpair_batch():
    batch = {
        "prompt": ["p", "q"],
        "chosen": ["a", "b"],
        "rejected": ["c", "d"],
        "chosen_score": [1, 2],
        "rejected_score": [3, 4],
        "ref_chosen_logps": [5, 6],
        "ref_rejected_logps": [7, 8],
        "weight": [0.5, 1.0],
        "third": ["e", "f"],
    }
    assert unpair_batch(batch) == {
        "completion": ["a", "b", "c", "d"],
        "label": [True, True, False, False],
        "prompt": ["p", "q", "p", "q"],
        "score": [1, 2, 3, 4],
        "ref_logps": [5, 6, 7, 8],
        "weight": [0.5, 1.0, 0.5, 1.0],
    }


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        (["chosen", "rejected"], "pair", ("chosen", "rejected")),
        (["prompt", "chosen", "rejected", "third"], "pair", ("chosen", "rejected", "third")),
        (["prompt_ids", "chosen_ids", "rejected_ids"], "pair", ("chosen", "rejected")),
        (["prompt", "completion", "label"], "unpaired", ("completion",)),
        (["prompt_ids", "completion_ids", "label", "x"], "unpaired", ("completion",)),
    ],
)
def test_layouts(columns, kind, expected):
    layout = resolve_layout(columns, kind)
    assert layout.responses == expected
    assert layout.tokenized == ("prompt_ids" in columns)
    assert not layout.unpair


def test_unpairing_layout():
    columns = ["chosen", "rejected", "chosen_score", "rejected_score", "weight"]
    layout = resolve_layout(columns, "unpaired", unpair=True)
    assert layout.unpair
    assert layout.responses == ("completion",)
    assert layout.numbers == ("weight", "score")
    # unpair=True is a permission, so an unpaired dataset stays as it is
    assert not resolve_layout(["prompt", "completion", "label"], "unpaired", unpair=True).unpair


def test_aliases():
    names = ["score_chosen", "score_rejected", "rejected_score", "reference", "reward"]
    assert canonical_names(names) == {
        "score_chosen": "chosen_score",
        "reference": "third",
        "reward": "score",
    }


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["chosen", "reject"], {}, r"'rejected' is missing; found 'chosen', 'reject'.*'reject'"),
        (["prompt", "completion", "label"], {}, "'chosen' is missing"),
        (["prompt_ids", "chosen", "rejected"], {}, "'chosen_ids' is missing"),
        ([], {}, "found no columns"),
        (["chosen", "rejected"], {"kind": "unpaired"}, "unpair=True"),
        (["prompt", "completion"], {"kind": "unpaired"}, "'label' is missing"),
        (["completion", "label"], {"kind": "unpaired"}, "'prompt' is missing"),
        (["chosen", "rejected", "images"], {}, "not supported yet"),
        (["chosen", "rejected", "chosen_mask"], {}, "needs the tokens"),
        (["chosen", "rejected"], {"extra_columns": ["mine"]}, "'mine' is missing"),
        (["chosen", "rejected"], {"kind": "both"}, "kind must be"),
    ],
)
def test_refusals(columns, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_layout(columns, **{"kind": "pair", **options})
