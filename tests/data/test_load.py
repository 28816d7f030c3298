"""Datasets by path: every file type read, every mistake named."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from fastpref.data import load_preference_dataset, tokenize_dataset

ROWS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path):
    dataset = Dataset.from_list(ROWS)
    kind = path.suffix
    if kind == ".json":
        path.write_text(json.dumps(ROWS))
    elif kind in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == ".parquet":
        dataset.to_parquet(path)
    elif kind == ".csv":
        dataset.to_csv(path)
    elif kind == ".tsv":
        dataset.to_csv(path, sep="\t")
    else:
        dataset.save_to_disk(path.parent / "saved")
        next((path.parent / "saved").glob("*.arrow")).rename(path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "ndjson", "parquet", "csv", "tsv", "arrow"])
def test_files(kind, tmp_path):
    path = write(tmp_path / f"d.{kind}")
    assert load_preference_dataset(path).to_list() == ROWS
    assert load_preference_dataset(str(path), "test[:2]").to_list() == ROWS[:2]


def test_stream(tmp_path):
    dataset = load_preference_dataset(write(tmp_path / "d.jsonl"), streaming=True)
    assert isinstance(dataset, IterableDataset)
    assert list(dataset) == ROWS


def test_directories(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl")
    assert load_preference_dataset(tmp_path / "files").to_list() == ROWS
    with pytest.raises(ValueError, match="'test'"):
        load_preference_dataset(tmp_path / "files", "test")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_preference_dataset(tmp_path / "one").to_list() == ROWS
    DatasetDict(dev=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "many")
    assert list(load_preference_dataset(tmp_path / "many", "dev", streaming=True)) == ROWS
    with pytest.raises(ValueError, match="no split 'train'; found dev"):
        load_preference_dataset(tmp_path / "many")
    with pytest.raises(ValueError, match="no slices"):
        load_preference_dataset(tmp_path / "one", "train[:2]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file of a known type"):
        load_preference_dataset(tmp_path / "empty")


def test_mistakes(tmp_path):
    write(tmp_path / "data.jsonl")
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*data\.jsonl"):
        load_preference_dataset(tmp_path / "dta.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_preference_dataset("./nowhere")
    (tmp_path / "model.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown file type '\.pkl'"):
        load_preference_dataset(tmp_path / "model.pkl")
    with pytest.raises(ValueError, match="neither a local file"):
        load_preference_dataset("nobody/no-such-dataset")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", '[{"chosen": "a", "rej'),
        ("d.jsonl", '{"chosen": "a"}\n{"chos'),
        ("d.jsonl", ""),
        ("d.parquet", "not parquet"),
        ("d.arrow", "not arrow"),
        ("d.csv", ""),
    ],
)
def test_broken_files(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}, split 'train': could not be read: \w+"):
        load_preference_dataset(tmp_path / name)


def test_rows_of_several_types_are_left_to_tokenisation(tmp_path, tokenizer):
    mixed = [ROWS[0], {**ROWS[1], "chosen": True}, {**ROWS[2], "chosen": {"c": 1}}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    dataset, report = tokenize_dataset(load_preference_dataset(tmp_path / "d.jsonl"), tokenizer)
    assert dataset["example_ids"][:] == [0]
    assert report.bad == 2
