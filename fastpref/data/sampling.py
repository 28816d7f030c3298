"""The order of an epoch in which every step has nearly the same number of tokens.

A shuffled epoch is cut into windows of some steps, and the examples of a window are dealt anew: to
its micro-batches so that their tokens are even, those to its steps so that theirs are; then the
steps are shuffled. Every example comes once an epoch, and a step holds as many as it would anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

BY_LENGTH = ("even_tokens", "group_by_length", "batch_rebalance")
"""Values of ``train_sampling_strategy`` that ask for the lengths of the rows."""
WINDOW = 64
"""Steps that examples are dealt to at a time: more are hardly more even, fewer mix less."""

Indices = np.ndarray[Any, np.dtype[np.int64]]


def deal(sizes: Indices, parts: int) -> Indices:
    """Parts of equal count and nearly equal sum.

    The largest go first, as many at a time as there are parts, the largest of them to the part that
    has the least so far.

    Args:
        sizes: Shape ``(parts * k,)``.
        parts: Number of parts.

    Returns:
        Indices into ``sizes``, a row for each part, each index once. Shape ``(parts, k)``.
    """
    dealt = np.argsort(-sizes, kind="stable").reshape(-1, parts)
    sums = np.zeros(parts, dtype=np.int64)
    for row in dealt:
        emptiest = np.argsort(sums, kind="stable")
        row[emptiest] = row.copy()
        sums += sizes[row]
    return dealt.T


def even_order(
    sizes: Sequence[int],
    batch_size: int,
    batches: int,
    rng: np.random.Generator,
    window: int = WINDOW,
) -> Indices:
    """A random order of examples whose steps, and the micro-batches in them, are of even size.

    Args:
        sizes: Tokens of each example.
        batch_size: Examples of a micro-batch.
        batches: Micro-batches of a step, over all ranks. In a step the larger ones come first, so
            that those which ranks compute at the same time are alike.
        rng: Of the shuffle.
        window: Steps that examples are dealt to at a time.

    Returns:
        Each index into ``sizes`` once. What fills no step comes last, as the shuffle left it.
    """
    tokens = np.asarray(sizes, dtype=np.int64)
    step = batch_size * batches
    steps = len(tokens) // step
    order, rest = np.split(rng.permutation(len(tokens)), [steps * step])
    windows = np.array_split(order.reshape(steps, step), -(-steps // window)) if steps else []
    dealt = []
    for examples in map(np.ravel, windows):
        small = examples[deal(tokens[examples], len(examples) // batch_size)]
        whole = small[deal(tokens[small].sum(1), len(examples) // step)]
        dealt.append(rng.permutation(whole).ravel())
    return np.concatenate([*dealt, rest])


def refuse_stream(dataset: Any, strategy: str) -> None:
    """Raise ``ValueError`` for a stream whose order is to go by lengths, which it does not tell."""
    if strategy in BY_LENGTH and dataset is not None and not hasattr(dataset, "__len__"):
        raise ValueError(
            f"train_sampling_strategy={strategy!r} needs the length of every row before training, "
            "and a stream is read in its own order: read the data without streaming, or drop it"
        )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler under a loader's wrappers which epoch comes.

    Accelerate tells it through two wrappers, and where one rank of several resumes there are three.
    """
    inner = getattr(loader, "batch_sampler", None)
    while inner is not None:
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        inner = getattr(inner, "batch_sampler", getattr(inner, "sampler", None))


class EvenTokens(Sampler[int]):
    """:func:`even_order`, another one each epoch, the same on every rank.

    Args:
        sizes: Tokens of each example.
        batch_size: Examples of a micro-batch.
        batches: Micro-batches of a step, over all ranks.
        seed: Of the shuffle.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, batches: int, seed: int) -> None:
        """See the class."""
        self.sizes, self.batch_size, self.batches, self.seed = sizes, batch_size, batches, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Accelerate and transformers call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        """Indices of the epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        return iter(even_order(self.sizes, self.batch_size, self.batches, rng).tolist())
