"""`fastpref inspect`: the counts are those of the data and of training, and every row that is lost
is explained."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("transformers")
from fastpref import cli
from fastpref.inspect import bins, histogram
from fastpref.train import make_trainer, parse

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
CHAT = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model, its tokenizer and chat template."""
    path = tmp_path_factory.mktemp("a model")
    tokenizer = makers.make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    makers.make_model().save_pretrained(path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path, model: str) -> tuple[str, str]:
    return write(tmp_path / "pairs of mine.jsonl", ROWS), model


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
    assert found["cut"] == {
        **{"prompt tokens read": 8, "prompt tokens kept": 8},
        **{"chosen tokens read": 5, "chosen tokens kept": 3},
        **{"rejected tokens read": 5, "rejected tokens kept": 4},
    }
    assert found["ends"]["prompts"] == 2
    assert found["ends"]["responses"] == 4
    assert found["vocabulary"] == {"tokens of the tokenizer": 97, "tokens of the model": 97}
    assert status == 1


def test_the_status_says_whether_all_rows_train(
    files: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, model = files
    assert inspect(capsys, data, "--model", model, "--max_bad_rows", "2")[0] == 0
    assert inspect(capsys, data, "--model", model, "--max_bad_rows", "1")[0] == 1
    assert inspect(capsys, data, "--model", model, "--split", "train[:2]")[0] == 0
    good = write(tmp_path / "good.jsonl", ROWS[:1])
    status, text = inspect(capsys, good, "--model", model)
    assert status == 0
    assert "all 1 rows can be trained on" in text
    elsewhere = ["--activation_offloading", "true"]  # for the GPU that training is meant for
    assert inspect(capsys, good, "--model", model, *elsewhere)[0] == 0
    assert "w1 w2 | w3" in " ".join(text.split())  # the boundary, in tokens


def test_the_loss_says_what_a_row_is(
    files: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, model = files
    _, text = inspect(capsys, data, "--model", model, "--loss", "kto", "--json")
    found = json.loads(text)
    assert found["kind"] == "unpaired"
    assert found["rows"] == 2 * len(ROWS)
    single = [{"prompt": "w1", "completion": " w2", "label": True}]
    status, text = inspect(capsys, write(tmp_path / "one.jsonl", single), "--model", model)
    assert status == 2
    assert "choose a loss for those, such as kto" in text


def test_a_yaml_file_is_read_as_training_reads_it(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A mixture of dialogues, the assistant's turns alone: what is counted is what trains."""
    draw = random.Random(0)

    def says(role: str) -> dict[str, str]:
        words = (f"w{draw.randrange(93)}" for _ in range(draw.randint(1, 6)))
        return {"role": role, "content": " ".join(words)}

    def turns() -> list[dict[str, str]]:
        return [says("assistant"), says("user"), says("assistant")]

    parts = [
        write(
            tmp_path / f"part {name}.jsonl",
            ({"prompt": [says("user")], "chosen": turns(), "rejected": turns()} for _ in range(30)),
        )
        for name in "ab"
    ]
    options = {
        "model": model,
        "datasets": [
            {"path": parts[0], "fraction": 0.25},
            {"path": parts[1], "fraction": 0.75},
        ],
        "assistant_only_loss": True,
        "max_length": 24,
        "max_prompt_length": 6,
        "output_dir": str(tmp_path / "run"),
        "self_check": False,
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options))
    _, text = inspect(capsys, "--config", str(config), "--json")
    found = json.loads(text)
    assert found["rows"] == 40  # all 30 of the larger share, and a third of that
    trainer = make_trainer(*parse(["--config", str(config), "--use_cpu", "true"]))
    rows = trainer.train_dataset
    assert found["kept"] == len(rows)
    for name in ("prompt", "chosen", "rejected"):
        lengths = [len(ids) for ids in rows[f"{name}_ids"]]
        assert found["cut"][f"{name} tokens kept"] == sum(lengths)
        assert found["lengths"][f"{name}_ids"]["max"] == max(lengths)
    for name in ("chosen", "rejected"):
        counted = sum(sum(mask) for mask in rows[f"{name}_mask"])
        assert 0 < counted == found["cut"][f"{name} tokens that count"]
        assert counted < found["cut"][f"{name} tokens kept"]


def test_tokens_that_the_model_lacks(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the data: an error, as in training. In the tokenizer alone: it is said."""
    makers.make_tokenizer().save_pretrained(tmp_path)
    makers.make_model(vocab_size=94).config.save_pretrained(tmp_path)
    fits = write(tmp_path / "fits.jsonl", ROWS)
    flags = ("--model", str(tmp_path), "--max_bad_rows", "2")
    status, text = inspect(capsys, fits, *flags)
    assert status == 0
    assert "3 tokens of the tokenizer are none of the model's (w90, w91, w92)" in text
    told = dict(
        line.strip().rsplit("  ", 1)
        for line in text.splitlines()
        if "tokens of the" in line and "none" not in line
    )
    assert {key.strip(): value.strip() for key, value in told.items()} == {
        "tokens of the tokenizer": "97",
        "tokens of the model": "94",
    }
    assert "are none of the model's" not in inspect(capsys, fits, "--model", model)[1]
    row = {"prompt": "w1", "chosen": " w92", "rejected": " w2"}
    status, text = inspect(capsys, write(tmp_path / "none.jsonl", [*ROWS, row]), *flags)
    assert status == 2
    assert "example 4: token id 96 is outside the model's vocabulary of 94" in text


def test_a_reference_with_another_tokenizer_scores_whole_texts(
    files: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, model = files
    other = makers.make_tokenizer()
    other.add_tokens(["w1 w2"])
    vocabulary = other.get_vocab()
    assert vocabulary
    other.backend_tokenizer.model = makers.models.WordLevel(
        {word: i for i, word in enumerate(reversed(makers.VOCAB))}, unk_token="<unk>"
    )
    other.save_pretrained(tmp_path)
    makers.make_model().config.save_pretrained(tmp_path)
    given = (data, "--model", model, "--max_length", "7", "--json")
    plain = json.loads(inspect(capsys, *given)[1])
    whole = json.loads(inspect(capsys, *given, "--ref_models", str(tmp_path))[1])
    free = json.loads(inspect(capsys, *given, "--ref_models", str(tmp_path), "--loss", "simpo")[1])
    assert (plain["kept"], whole["kept"], free["kept"]) == (2, 1, 2)
    assert sum(n for words, n in whole["dropped"].items() if "longer than a limit" in words) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.jsonl",), "nothing.jsonl"),
        (("{data}", "--model", "./nowhere"), "nowhere"),
        (("--show", "1"), "the dataset is missing. Usage: fastpref inspect DATASET --model MODEL"),
        (("{data}", "--max_lenght", "7"), "there is no option 'max_lenght'. Did you mean 'max_le"),
        (("{data}", "--max_length", "1"), "max_length must be at least 2, or None, got 1"),
        (("{data}", "--dataset_streaming", "true"), "a stream has no end to count to"),
    ],
)
def test_what_cannot_be_read_is_named(
    files: Any, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    data, model = files
    given = [argument.format(data=data) for argument in arguments]
    given = given if "--model" in given else [*given, "--model", model]
    status, text = inspect(capsys, *given)
    assert status == 2
    assert message in text
    assert "Traceback" not in text
    assert "--model is missing" in inspect(capsys, data)[1]


def test_every_row_is_in_one_bin() -> None:
    """Bins follow one another, and each holds the rows between its ends, which are exact."""
    draw = np.random.default_rng(0)
    for high in (1, 2, 9, 70, 300, 5_000, 200_000):
        counts = draw.integers(0, high, size=50)
        limit = int(draw.integers(1, high + 2)) if high > 2 else int(counts.min())
        found = bins(counts, limit)
        assert len(found) <= 20
        assert (found[0][0], found[-1][1]) == (counts.min(), counts.max())
        assert [low for low, *_ in found[1:]] == [end + 1 for _, end, _ in found[:-1]]
        for low, end, rows in found:
            assert low <= end
            assert rows == sum(low <= n <= end for n in counts.tolist())
        over = sum(rows for low, _, rows in found if low > limit)
        assert over == sum(n > limit for n in counts.tolist())


def test_odd_rows_do_not_flatten_the_histogram() -> None:
    usual = np.random.default_rng(1).integers(65, 257, size=1000)
    plain = bins(usual)
    assert len(plain) == 16  # two doublings, in eighths
    assert max(rows for *_, rows in plain) < 200
    odd = bins(np.append(usual, [3, 60_000]))
    assert odd[0] == (3, 64, 1)
    assert odd[-1] == (257, 60_000, 1)
    assert [row[2] for row in odd[1:-1]] == [row[2] for row in plain]
    few = bins(np.append(usual[:20], 60_000))  # so few that one is more than a hundredth
    assert max(rows for *_, rows in few) < 15


def test_the_histogram_says_what_a_limit_cuts() -> None:
    text = histogram("prompt", np.array([0, 1, 5, 40, 40, 99]), limit=50).plain
    lines = text.splitlines()
    assert lines[0] == "prompt, tokens"
    assert sum(int(line.removesuffix("  over max_length").split()[-1]) for line in lines[1:-1]) == 6
    beyond = [line for line in lines if line.endswith("over max_length")]
    assert len(beyond) == 1
    assert beyond[0].split()[-3] == "1"
    assert lines[-1] == "  1 of 6 rows are longer than 50"
