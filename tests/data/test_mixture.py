"""Mixtures: shares, streams, and what does not fit together."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, IterableDataset
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from fastpref.data import load_mixture, parts_of


@pytest.fixture
def files(tmp_path):
    """Three files of 10, 20 and 60 rows that say where they come from, in three formats."""
    found = {}
    for name, size, suffix in (("a", 10, "jsonl"), ("b", 20, "parquet"), ("c", 60, "csv")):
        rows = [{"prompt": f"{name}{i}", "chosen": "x", "rejected": "y"} for i in range(size)]
        found[name] = str(tmp_path / f"{name}.{suffix}")
        write = {"jsonl": "to_json", "parquet": "to_parquet", "csv": "to_csv"}[suffix]
        getattr(Dataset.from_list(rows), write)(found[name])
    return found


def counts(dataset):
    prompts = [row["prompt"][0] for row in dataset]
    return {name: prompts.count(name) for name in "abc"}


def test_without_fractions_all_rows_end_to_end(files):
    for streaming in (False, True):
        mixed = load_mixture(
            parts_of([{"path": files["a"]}, {"path": files["b"], "split": "train"}]),
            streaming=streaming,
        )
        assert isinstance(mixed, IterableDataset) == streaming
        expected = [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(20)]
        assert [row["prompt"] for row in mixed] == expected


def test_fractions_are_trls(files):
    """The largest mixture of these shares in which no row occurs twice."""
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    given = [{"path": files[name], "fraction": share} for name, share in shares.items()]
    assert counts(load_mixture(parts_of(given))) == {"a": 10, "b": 5, "c": 5}
    assert counts(load_mixture(parts_of(json.dumps(given)))) == {"a": 10, "b": 5, "c": 5}
    for part in given:
        part["fraction"] *= 3  # scaled to sum to 1
    assert counts(load_mixture(parts_of(given))) == {"a": 10, "b": 5, "c": 5}
    # Theirs cannot mix csv with json or parquet, whose strings are of another type.
    readers, shares = {"a": "json", "b": "parquet"}, {"a": 0.1, "b": 0.7}
    theirs = get_dataset(
        DatasetMixtureConfig(
            datasets=[
                DatasetConfig(path=readers[n], data_files=files[n], fraction=share)
                for n, share in shares.items()
            ]
        )
    )["train"]
    ours = [{"path": readers[n], "data_files": files[n], "fraction": s} for n, s in shares.items()]
    assert load_mixture(parts_of(ours)).to_list() == theirs.to_list()


def test_streams_are_drawn_by_their_shares(files):
    given = [{"path": files["b"], "fraction": 1}, {"path": files["c"], "fraction": 3}]
    mixed = load_mixture(parts_of(given), streaming=True, seed=1)
    rows = [row["prompt"] for row in mixed]
    assert rows == [row["prompt"] for row in load_mixture(parts_of(given), streaming=True, seed=1)]
    assert [p for p in rows if p[0] == "b"] == [f"b{i}" for i in range(counts(mixed)["b"])]
    assert len(set(rows)) == len(rows)
    assert 2 < counts(mixed)["c"] / counts(mixed)["b"] < 4.5


def test_columns_and_slices(files):
    parts = parts_of(
        [
            {"path": files["a"], "split": "train[:3]", "columns": ["prompt", "chosen"]},
            {"path": files["b"], "split": "train[-2:]"},
        ]
    )
    rows = load_mixture(parts).to_list()
    assert [row["prompt"] for row in rows] == ["a0", "a1", "a2", "b18", "b19"]
    assert [row["rejected"] for row in rows] == [None] * 3 + ["y"] * 2


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([], ValueError, "expected a list of parts"),
        ("[", ValueError, "is not JSON"),
        ([{"name": "x"}], ValueError, r"expected a part like \{'path'"),
        ([{"path": "a", "fractoin": 1}], TypeError, "no key 'fractoin'. Did you mean 'fraction'"),
        ([{"path": "a", "fraction": 1}, {"path": "b"}], ValueError, "b has fraction None; give"),
        ([{"path": "a", "fraction": -1}], ValueError, "a has fraction -1"),
    ],
)
def test_what_is_no_mixture(given, error, said):
    with pytest.raises(error, match=said):
        parts_of(given)


def test_parts_that_do_not_fit(files, tmp_path):
    with pytest.raises(ValueError, match="no column 'nothing'; found prompt, chosen, rejected"):
        load_mixture(parts_of([{"path": files["a"], "columns": ["nothing"]}]))
    other = tmp_path / "d.jsonl"
    other.write_text(json.dumps({"prompt": [{"role": "user", "content": "x"}], "chosen": "x"}))
    with pytest.raises(ValueError, match=r"do not fit together .* choose the same ones by 'colum"):
        load_mixture(parts_of([{"path": files["a"]}, {"path": str(other)}]))
    with pytest.raises(ValueError, match="is a file: it takes no data_files"):
        load_mixture(parts_of([{"path": files["a"], "data_files": "x.json"}]))
