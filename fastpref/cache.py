"""``fastpref cache``: the reference log-probabilities kept on disk, filled and looked after."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fastpref.reference_cache import DESCRIPTION, DamagedShardError, Shard, cache_root, open_shards

_ABANDONED_SECONDS = 3600.0
"""Age at which a temporary file is one whose writer was killed."""


def main(argv: Sequence[str]) -> int:
    """Does what the first argument names; 0, or 1 if ``verify`` found damage."""
    if argv[:1] == ["build"]:
        return build(argv[1:])
    parser = argparse.ArgumentParser(prog="fastpref cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "build", help="score a dataset, with the options of fastpref train", add_help=False
    )
    listing = commands.add_parser("list", help="what is kept, one line a reference")
    listing.add_argument("--json", action="store_true", help="print it as JSON")
    checking = commands.add_parser("verify", help="read everything and compare checksums")
    checking.add_argument(
        "--remove",
        action="store_true",
        help="remove damaged files, and what killed processes left; their rows are scored again",
    )
    clearing = commands.add_parser("clear", help="remove what is kept")
    clearing.add_argument("reference", nargs="*", help="names from the list, or their beginnings")
    clearing.add_argument("--all", action="store_true", help="remove every reference")
    for command in (listing, checking, clearing):
        command.add_argument(
            "--dir", default="auto", help="folder; default: reference in $FASTPREF_CACHE"
        )
    given = parser.parse_args(argv)
    root = cache_root(given.dir)
    if given.command == "list":
        return show(root, given.json)
    if given.command == "verify":
        return verify(root, given.remove)
    return clear(root, given.reference, given.all)


def build(argv: Sequence[str]) -> int:
    """Score the data of a run that ``fastpref train`` would start from the same options; 0."""
    from fastpref.options import parse
    from fastpref.reference_policy import Stored
    from fastpref.train import make_trainer

    data, model, config = parse(argv)
    if config.ref_cache_dir == "none":
        raise ValueError("ref_cache_dir='none' keeps nothing: give a folder, or leave it out")
    config.precompute_ref_log_probs = True
    with tempfile.TemporaryDirectory() as config.output_dir:
        trainer = make_trainer(data, model, config)
    if not isinstance(trainer.reference, Stored) or not trainer.caches:
        raise ValueError(
            f"there is nothing to score: {', '.join(trainer.combined.names)} needs no reference, "
            "or the dataset brings its log-probabilities"
        )
    for cache in trainer.caches:
        print(f"{cache.scored:,} sequences scored, {cache.hits:,} were there: {cache.folder}")
    return 0


@dataclass
class Kept:
    """What a folder holds of one reference."""

    folder: Path
    name: str = ""
    model: str = ""
    dtype: str = ""
    sequences: int = 0
    tokens: int = 0
    size: int = 0
    """Bytes."""
    written: float = 0.0
    """When last, seconds since the epoch."""
    damage: list[str] = field(default_factory=list)


def kept(root: Path) -> list[Kept]:
    """What is kept of each reference, the last written first; tables are checked, rows not."""
    found = []
    for folder in _folders(root):
        item = Kept(folder)
        try:
            content = json.loads((folder / DESCRIPTION).read_text())
            of = content["identity"]
            item.name, item.model, item.dtype = content["name"], of["class"], of["dtype"]
        except (OSError, ValueError, KeyError, TypeError):
            item.damage.append(f"{folder / DESCRIPTION} cannot be read")
        shards, errors = open_shards(folder)
        item.damage += map(str, errors)
        item.sequences = sum(map(len, shards))
        item.tokens = sum(len(shard.tokens) for shard in shards)
        stats = [path.stat() for path in folder.iterdir()]
        item.size = sum(stat.st_size for stat in stats)
        item.written = max((stat.st_mtime for stat in stats), default=0.0)
        found.append(item)
    return sorted(found, key=lambda item: -item.written)


def _folders(root: Path) -> Iterator[Path]:
    """Folders of references: by their name, so that nothing else is ever touched."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and len(path.name) == 32 and not set(path.name) - set("0123456789abcdef"):
            yield path


def show(root: Path, as_json: bool = False) -> int:
    """Print what is kept; 0."""
    found = kept(root)
    if as_json:
        rows = [{**vars(item), "folder": str(item.folder)} for item in found]
        print(json.dumps(rows, indent=2))
        return 0
    if not found:
        print(f"nothing is kept in {root}")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Reference log-probs in {root}")
    table.add_column("reference", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("dtype")
    for column in ("sequences", "tokens", "MB", "written"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in found:
        table.add_row(
            item.folder.name[:12],
            item.name or item.model,
            item.dtype,
            f"{item.sequences:,}",
            f"{item.tokens:,}",
            f"{item.size / 1e6:,.1f}",
            f"{datetime.fromtimestamp(item.written):%Y-%m-%d %H:%M}",
        )
    Console().print(table)
    for line in (line for item in found for line in item.damage):
        print(f"damaged: {line}")
    return 0


def verify(root: Path, remove: bool = False) -> int:
    """Compare every sequence with its checksum; 0, or 1 if something is damaged."""
    from tqdm.auto import tqdm

    paths = [p for folder in _folders(root) for p in sorted(folder.glob("*.safetensors"))]
    damaged: dict[Path, str] = {}
    sequences = 0
    for path in tqdm(paths, desc="Verifying", unit="file"):
        try:
            shard = Shard(path, path.parent.name)
            for i in range(len(shard)):
                shard.sequence(i)
            sequences += len(shard)
        except DamagedShardError as error:
            damaged[path] = str(error)
    print(f"{len(paths) - len(damaged):,} files with {sequences:,} sequences are whole")
    for path, words in damaged.items():
        print(f"damaged: {words}")
        if remove:
            path.unlink()
    left = [p for folder in _folders(root) for p in folder.glob("*.tmp") if _abandoned(p)]
    for path in left if remove else ():
        path.unlink(missing_ok=True)
    if damaged or left:
        print(
            f"removed {len(damaged)} damaged and {len(left)} unfinished files"
            if remove
            else f"{len(damaged)} damaged, {len(left)} unfinished files: nothing of them is used; "
            "fastpref cache verify --remove removes them"
        )
    return 1 if damaged else 0


def _abandoned(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS


def clear(root: Path, names: Sequence[str], everything: bool) -> int:
    """Remove references; 0.

    Raises:
        ValueError: None is named, or a name fits none or several.
    """
    folders = list(_folders(root))
    if bool(names) == everything:
        raise ValueError("name the references to remove (fastpref cache list), or give --all")
    chosen: list[Any] = folders if everything else []
    for name in names:
        fitting = [folder for folder in folders if folder.name.startswith(name)]
        if len(fitting) != 1:
            raise ValueError(f"{name!r} fits {len(fitting)} references in {root}; expected one")
        chosen += fitting
    for folder in chosen:
        shutil.rmtree(folder)
    print(f"removed {len(chosen)} references from {root}")
    return 0
