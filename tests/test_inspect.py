"""`fastpref inspect`: the counts are those of the data, and every row that is lost is explained."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
from fastpref import cli
from fastpref.inspect import histogram

spec = importlib.util.spec_from_file_location(
    "makers", Path(__file__).with_name("trainer") / "conftest.py"
)
makers = importlib.util.module_from_spec(spec)
sys.modules["makers"] = makers
spec.loader.exec_module(makers)

ROWS = [
    {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"},
    {"prompt": "w1 w2 w3 w4 w5 w6", "chosen": " w7 w8", "rejected": " w9"},
    {"prompt": "w1", "chosen": " w2", "rejected": " w2"},
    {"prompt": "w1", "chosen": "", "rejected": " w2 w3"},
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    data, model = tmp_path / "pairs of mine.jsonl", tmp_path / "model"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    makers.make_tokenizer().save_pretrained(model)
    makers.make_model().config.save_pretrained(model)
    return str(data), str(model)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The status, and what was printed: the error if there was one."""
    status = cli.main(["inspect", *arguments])
    out, error = capsys.readouterr()
    return status, error if status == 2 else out


def test_what_is_counted_is_what_is_there(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = files
    status, text = inspect(capsys, data, "--model", model, "--max_length", "7", "--json")
    found = json.loads(text)
    assert found["kind"] == "pair"
    assert found["rows"] == 4
    assert found["kept"] == 2
    assert sum(found["dropped"].values()) == 2  # both responses equal, and an empty one
    # the second row: six tokens of prompt, two and an end: cut to seven
    assert found["cut"]["prompt tokens kept"] <= found["cut"]["prompt tokens read"] == 8
    assert found["ends"]["prompts"] == 2
    assert found["ends"]["responses"] == 4
    assert status == 1


def test_the_status_says_whether_all_rows_train(
    files: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, model = files
    assert inspect(capsys, data, "--model", model, "--max_bad_rows", "2")[0] == 0
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROWS[0]) + "\n")
    status, text = inspect(capsys, str(good), "--model", model)
    assert status == 0
    assert "all 1 rows can be trained on" in text
    assert "w1 w2 | w3" in " ".join(text.split())  # the boundary, in tokens


def test_responses_taken_apart(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = files
    _, text = inspect(capsys, data, "--model", model, "--unpair", "--json")
    found = json.loads(text)
    assert found["kind"] == "unpaired"
    assert found["rows"] > len(ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.jsonl",), "nothing.jsonl"),
        (("{data}", "--model", "./nowhere"), "nowhere"),
    ],
)
def test_what_is_not_there_is_named(
    files: Any, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    data, model = files
    given = [argument.format(data=data) for argument in arguments]
    given = given if "--model" in given else [*given, "--model", model]
    status, text = inspect(capsys, *given)
    assert status == 2
    assert message in text
    assert "Traceback" not in text


def test_the_histogram_holds_every_row() -> None:
    text = histogram("prompt", np.array([0, 1, 5, 40, 40, 99]), limit=50).plain
    rows = [line.removesuffix("  over max_length").split()[-1] for line in text.splitlines()[1:-1]]
    assert [int(n) for n in rows] == [3, 0, 0, 0, 2, 0, 0, 0, 0, 1]
    assert text.splitlines()[-1] == "  1 of 6 rows are longer than 50"
