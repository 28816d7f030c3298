"""Per-token log-probabilities of responses on disk, so that no run scores a sequence twice.

Every reference has a folder, named by all that decides its numbers: weights, precision, model
configuration, version of the arithmetic; never by an option of a run. In it lie shards, files that
appear whole, never change and belong to the process that wrote them. So any number of processes may
read and write at once, and a process killed at any moment loses what it had not yet written, no
more. Sequences are found by their token ids; a response that was cut at its end is found in the
uncut one, as no token depends on what follows it.

Nothing damaged is used: a shard whose table does not fit its checksum is left out, a sequence that
does not fit its own is not found, and both are said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastpref.assets import cache_dir
from fastpref.disk import sync
from fastpref.heads import causal_lm
from fastpref.zero import gathered

logger = logging.getLogger("fastpref")

VERSION = 1
"""Of numbers and files. Raised when the fused head rounds otherwise or shards change."""
DESCRIPTION = "reference.json"
_FLUSH_TOKENS, _FLUSH_SECONDS = 1 << 20, 30.0
_DTYPES = {
    "prompts": torch.uint8,
    "bounds": torch.int64,
    "checksums": torch.int64,
    "tokens": torch.int32,
    "logps": torch.float32,
}
_TABLE = ("prompts", "bounds", "checksums")
_IRRELEVANT = (
    "_name_or_path name_or_path transformers_version architectures use_cache dtype torch_dtype "
    "pad_token_id bos_token_id eos_token_id "
    "return_dict output_attentions output_hidden_states output_router_logits router_aux_loss_coef "
    "attention_dropout hidden_dropout embd_pdrop attn_pdrop resid_pdrop "
    "base_model_name_or_path inference_mode revision auto_mapping task_type target_modules "
    "lora_dropout init_lora_weights peft_version"
).split()

Array = np.ndarray[Any, Any]


def cache_root(given: str | os.PathLike[str] = "auto") -> Path:
    """The folder of all references: the one given, or ``reference`` in ``$FASTPREF_CACHE``."""
    return cache_dir() / "reference" if given == "auto" else Path(given).expanduser()


# What decides the numbers of a reference


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A digest of tensors by name, read one at a time and not copied where they lie on a CPU.

    Args:
        weights: Any dtypes, on any device; sharded ones (DTensor, DeepSpeed ZeRO-3) are gathered
            one by one, by all ranks together. Storage that occurs under several names is read once.

    Returns:
        32 hexadecimal digits, which do not depend on order, device or sharding.

    Raises:
        ValueError: A tensor has no values here (meta device).
    """
    known: dict[Any, str] = {}
    lines = []
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    for name in tqdm(sorted(weights), "Digest of the reference", delay=2, disable=quiet):
        with gathered(weights[name]) as weight:
            value = weight.detach()
            if value.is_meta:
                raise ValueError(
                    f"the reference's weight {name!r} is not on this process (meta device), so its "
                    "scores cannot be kept on disk: set ref_cache_dir='none'"
                )
            place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            divided = hasattr(weight, "ds_id")  # gathered in turn into the same memory
            if divided or not value.numel() or place not in known:
                known[place] = _tensor_digest(value)
            lines.append(f"{name} {known[place]}")
    return _digest("\n".join(lines).encode())


def _tensor_digest(value: Tensor) -> str:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    raw = value.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return _digest(f"{value.dtype} {tuple(value.shape)} ".encode(), raw)


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def identity(
    model: nn.Module, precision: str, adapters: Collection[str] | None = None
) -> dict[str, Any]:
    """All that decides the log-probabilities of a model, JSON-safe.

    Args:
        model: A transformers causal language model, under PEFT or not.
        precision: Of autocast: ``"no"``, ``"bf16"``, ``"fp16"``.
        adapters: Names of the adapters in force; None: all there are. A model with its adapters
            off is the same as one that never had any.
    """
    inner = causal_lm(model)
    known = getattr(model, "peft_config", None) or {}
    used = set(known if adapters is None else adapters)
    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    weights = {}
    for name, value in inner.state_dict(keep_vars=True).items():
        parts = name.split(".")
        added = "modules_to_save" in parts or any(part.startswith(prefix) for part in parts)
        if known and added and not used.intersection(parts):
            continue
        weights[".".join(p for p in parts if p not in ("base_layer", "original_module"))] = value
    return {
        "version": VERSION,
        "class": type(inner).__name__,
        "attention": inner.config.get_text_config()._attn_implementation,
        "config": _relevant(inner.config.to_dict()),
        "adapters": {name: _relevant(known[name].to_dict()) for name in sorted(used) if known},
        "dtype": str(inner.dtype).removeprefix("torch."),
        "precision": precision,
        "weights": weights_digest(weights),
    }


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    text = json.dumps(kept, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    found: dict[str, Any] = json.loads(text)
    return found


# Shards


class DamagedShardError(ValueError):
    """A shard, or a sequence in one, is not what was written."""


class Shard:
    """A file of sequences and their log-probabilities, memory-mapped.

    Args:
        path: The file.
        reference: Name of the reference's folder, as the file must say too.

    Raises:
        DamagedShardError: It is cut short, or its table is not what was written.
    """

    def __init__(self, path: Path, reference: str) -> None:
        """See the class."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise DamagedShardError(f"{path} cannot be read: {error}") from error
        if {name: tensor.dtype for name, tensor in found.items()} != _DTYPES:
            raise DamagedShardError(f"{path}: its table is damaged")
        arrays = {name: tensor.numpy() for name, tensor in found.items()}
        expected = _digest(reference.encode(), *(arrays[name].tobytes() for name in _TABLE))
        if metadata.get("table") != expected:
            raise DamagedShardError(f"{path}: its table is damaged, or of another reference")
        self.prompts, self.bounds, self.checksums = (arrays[name] for name in _TABLE)
        self.tokens, self.logps = arrays["tokens"], arrays["logps"]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.checksums)

    def sequence(self, i: int) -> tuple[Array, Array]:
        """Tokens and log-probabilities of a sequence, ``(n,)`` each.

        Raises:
            DamagedShardError: They are not what was written.
        """
        span = slice(int(self.bounds[i]), int(self.bounds[i + 1]))
        tokens, logps = self.tokens[span], self.logps[span]
        if _checksum(tokens, logps) != self.checksums[i]:
            raise DamagedShardError(f"{self.path}: sequence {i} is damaged")
        return tokens, logps


def _checksum(tokens: Array, logps: Array) -> int:
    return zlib.crc32(logps.tobytes(), zlib.crc32(tokens.tobytes()))


def _write_shard(folder: Path, pending: Sequence[tuple[bytes, Array, Array]]) -> None:
    from safetensors.numpy import save

    keys, tokens, logps = zip(*pending, strict=True)
    arrays: dict[str, Array] = {
        "prompts": np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
        "bounds": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        "checksums": np.asarray([*map(_checksum, tokens, logps)], np.int64),
        "tokens": np.concatenate(tokens),
        "logps": np.concatenate(logps),
    }
    table = _digest(folder.name.encode(), *(arrays[name].tobytes() for name in _TABLE))
    path = folder / f"{time.time_ns()}-{uuid.uuid4().hex}.safetensors"
    _write(path, save(arrays, {"table": table}))


def _write(path: Path, content: bytes) -> None:
    """Make ``path`` a file that is whole or not there; others may be doing the same."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


# The cache of one reference


class ReferenceCache:
    """The log-probabilities that one reference gave so far.

    Sequences that other processes write after this was opened are not seen.

    Args:
        root: Folder of all references, :func:`cache_root`.
        of: :func:`identity` of the reference.
        name: What people call it; only shown.
        flush_seconds: Longest time that what :meth:`put` took stays in memory alone, as long as
            more comes.
    """

    def __init__(
        self,
        root: Path,
        of: Mapping[str, Any],
        name: str = "",
        flush_seconds: float = _FLUSH_SECONDS,
    ) -> None:
        """See the class."""
        self.folder = root / _digest(json.dumps(of, sort_keys=True).encode())
        self.content = {"name": name, "identity": dict(of)}
        self.flush_seconds = flush_seconds
        self.damage: list[str] = []
        """What was found damaged, in words."""
        self.hits = 0
        """Sequences that were asked for and known."""
        self.scored = 0
        """Sequences that were added."""
        self._index: dict[bytes, list[tuple[Shard, int]]] = {}
        self._unread: dict[bytes, list[tuple[Shard, int]]] = {}
        self._pending: list[tuple[bytes, Array, Array]] = []
        self._pending_tokens = 0
        self._flushed = time.monotonic()
        shards, errors = open_shards(self.folder)
        for error in errors:
            self._report(error)
        for shard in shards:
            for i, prompt in enumerate(shard.prompts):
                first = shard.tokens[shard.bounds[i] : shard.bounds[i + 1]][:1]
                place = prompt.tobytes() + first.tobytes()
                self._index.setdefault(place, []).append((shard, i))
                self._unread.setdefault(prompt.tobytes(), []).append((shard, i))

    def get(
        self, prompt: Sequence[int], response: Sequence[int], mask: Sequence[int] | None = None
    ) -> Array | None:
        """Log-probabilities of a response's tokens, if they are known.

        Args:
            prompt: Token ids.
            response: Token ids.
            mask: 0 for tokens without loss, whose log-probability is 0; None: all count.

        Returns:
            fp32, one for each token (of an empty prompt, none for the first), or None.
        """
        key, tokens = _key(prompt, response, mask)
        if not len(tokens):
            return np.empty(0, np.float32)
        place = key + tokens[:1].tobytes()  # many have the same prompt
        for shard, i in self._index.get(place, ()):
            try:
                stored, logps = shard.sequence(i)
            except DamagedShardError as error:
                self._index[place] = [entry for entry in self._index[place] if entry != (shard, i)]
                self._report(error)
                continue
            if np.array_equal(stored[: len(tokens)], tokens):
                self.hits += 1
                return logps[: len(tokens)].copy()
        # not under its first token: that may be what is damaged, which is looked at once a prompt
        for shard, i in self._unread.pop(key, ()):
            try:
                shard.sequence(i)
            except DamagedShardError as error:
                if str(error) not in self.damage:
                    self._report(error)
        return None

    def put(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        mask: Sequence[int] | None,
        logps: Array,
    ) -> None:
        """Take the log-probabilities of a response; :meth:`flush` writes them at the latest.

        Args:
            prompt: As in :meth:`get`.
            response: As in :meth:`get`.
            mask: As in :meth:`get`.
            logps: As :meth:`get` returns them.

        Raises:
            ValueError: Tokens and log-probabilities differ in number.
        """
        key, tokens = _key(prompt, response, mask)
        if len(logps) != len(tokens):
            raise ValueError(f"logps: expected {len(tokens)} numbers, got {len(logps)}")
        self._pending.append((key, tokens, np.array(logps, np.float32)))
        self._pending_tokens += len(tokens)
        self.scored += 1
        waited = time.monotonic() - self._flushed
        if self._pending_tokens >= _FLUSH_TOKENS or waited >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory alone, as one shard.

        Raises:
            OSError: The folder cannot be written to, or the disk is full.
        """
        if self._pending:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / DESCRIPTION).exists():
                text = json.dumps(self.content, indent=2)
                _write(self.folder / DESCRIPTION, text.encode())
            _write_shard(self.folder, self._pending)
            self._pending, self._pending_tokens = [], 0
        self._flushed = time.monotonic()

    def _report(self, error: DamagedShardError) -> None:
        self.damage.append(str(error))
        logger.warning("reference cache: %s; what it held is computed again", error)


def open_shards(folder: Path) -> tuple[list[Shard], list[DamagedShardError]]:
    """The shards of a reference that can be read, and what is wrong with the others."""
    shards, errors = [], []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            shards.append(Shard(path, folder.name))
        except DamagedShardError as error:
            errors.append(error)
    return shards, errors


def _key(
    prompt: Sequence[int], response: Sequence[int], mask: Sequence[int] | None
) -> tuple[bytes, Array]:
    """Digest of the prompt, and the response's ids, complemented where the mask is 0."""
    before, tokens = np.asarray(prompt, np.int32), np.asarray(response, np.int32)
    if not len(before):  # the first token is not predicted, so it is what the others follow
        before, tokens, mask = tokens[:1], tokens[1:], None if mask is None else mask[1:]
    if mask is not None:
        tokens = np.where(np.asarray(mask, bool), tokens, ~tokens)
    return hashlib.blake2b(before.tobytes(), digest_size=16).digest(), tokens
