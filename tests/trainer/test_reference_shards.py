"""The files of the reference cache: nothing damaged is used, many may write, nothing is lost."""

from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastpref.reference_cache import ReferenceCache

HERE = Path(__file__).parent
OF = {"weights": "some"}


@pytest.fixture(autouse=True)
def _propagate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fastpref")


def stored(root: Path, count: int = 5) -> Path:
    cache = ReferenceCache(root, OF)
    for i in range(count):
        cache.put([1, i], [5, 6, i], None, np.array([-0.5, -1.0, -float(i)]))
    cache.flush()
    (path,) = cache.folder.glob("*.safetensors")
    return path


def test_no_flipped_byte_is_ever_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every byte of a shard in turn: what is given is right, and what is not given is said."""
    path = stored(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        cache = ReferenceCache(tmp_path, OF)
        lost = 0
        for i in range(5):
            found = cache.get([1, i], [5, 6, i])
            lost += found is None
            assert found is None or found.tolist() == [-0.5, -1.0, -float(i)]
        assert lost == 0 or cache.damage, place
    assert "what it held is computed again" in caplog.text


def test_a_shard_cut_at_any_length_is_left_out(tmp_path: Path) -> None:
    path = stored(tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        cache = ReferenceCache(tmp_path, OF)
        assert all(cache.get([1, i], [5, 6, i]) is None for i in range(5))
        assert len(cache.damage) == 1


def test_a_shard_of_another_reference_is_not_taken(tmp_path: Path) -> None:
    path = stored(tmp_path)
    other = ReferenceCache(tmp_path, {"weights": "others"})
    other.folder.mkdir()
    path.rename(other.folder / path.name)
    other = ReferenceCache(tmp_path, {"weights": "others"})
    assert other.get([1, 0], [5, 6, 0]) is None
    assert "of another reference" in other.damage[0]


# Many processes, killed at any time

WRITER = """
import sys, numpy as np
from pathlib import Path
from fastpref.reference_cache import ReferenceCache
root, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache = ReferenceCache(root, {"weights": "some"}, flush_seconds=0)
print("ready", flush=True)
for i in range(first, first + count):
    cache.put([1], [i, 2], None, np.array([-i, -0.5]))
"""


def writer(root: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(root), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1])


def test_writers_at_once_and_one_that_is_killed(tmp_path: Path) -> None:
    steady, killed = writer(tmp_path, 0, 60), writer(tmp_path, 1000, 10**6)
    for process in (steady, killed):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert steady.wait() == 0
    while len(list(tmp_path.glob("*/*.safetensors"))) < 90:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for process in (steady, killed):
        assert process.stdout is not None
        process.stdout.close()
    cache = ReferenceCache(tmp_path, OF)
    assert not cache.damage
    assert all(cache.get([1], [i, 2]).tolist() == [-i, -0.5] for i in range(60))
    i = 1000
    while (found := cache.get([1], [i, 2])) is not None:
        assert found.tolist() == [-i, -0.5]
        i += 1
    assert i - 1000 >= 20
    files = len(list(tmp_path.glob("*/*.safetensors")))
    assert files == 60 + i - 1000
    assert json.loads((cache.folder / "reference.json").read_text())["identity"] == OF


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    stored(tmp_path)
    cache = ReferenceCache(tmp_path, OF)
    cache.put([1], [2] * 4000, None, np.zeros(4000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list(cache.folder.iterdir())) == 2
    cache.flush()
    cache = ReferenceCache(tmp_path, OF)
    assert cache.get([1, 4], [5, 6, 4]) is not None
    assert cache.get([1], [2] * 4000) is not None
