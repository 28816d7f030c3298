"""An order of the data in which steps and micro-batches are of even size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.sampling import WINDOW, EvenTokens, deal, even_order, refuse_stream


def lengths(count: int, seed: int = 0) -> Any:
    """Log-normal, with a tail that is cut at 2,048 tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(400), 0.6, count)
    return np.clip(drawn.astype(np.int64), 16, 2048)


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=60), parts=st.integers(1, 12))
def test_parts_differ_by_less_than_two_examples_do(sizes: list[int], parts: int) -> None:
    tokens = np.array(sizes[: len(sizes) // parts * parts], dtype=np.int64)
    dealt = deal(tokens, parts)
    assert dealt.shape == (parts, len(tokens) // parts)
    assert sorted(dealt.ravel()) == list(range(len(tokens)))
    if len(tokens):
        sums = tokens[dealt].sum(1)
        assert sums.max() - sums.min() <= tokens.max() - tokens.min()


def test_dealing_by_hand() -> None:
    """9 8 7 go one each; then 1 5 6 from the emptiest part on: 7 + 6, 8 + 5, 9 + 1."""
    sizes = np.array([1, 9, 5, 8, 6, 7])
    assert sorted(map(sorted, sizes[deal(sizes, 3)].tolist())) == [[1, 9], [5, 8], [6, 7]]


@settings(max_examples=50)
@given(
    count=st.integers(0, 200),
    batch_size=st.integers(1, 5),
    batches=st.integers(1, 4),
    window=st.integers(1, 9),
)
def test_every_example_once(count: int, batch_size: int, batches: int, window: int) -> None:
    order = even_order(lengths(count), batch_size, batches, np.random.default_rng(0), window=window)
    assert sorted(order) == list(range(count))


@pytest.mark.parametrize(("batch_size", "batches"), [(8, 1), (4, 4), (1, 16)])
def test_steps_and_micro_batches_are_evener_than_shuffled(batch_size: int, batches: int) -> None:
    tokens = lengths(4000)
    even = even_order(tokens, batch_size, batches, np.random.default_rng(1))
    mixed = np.random.default_rng(1).permutation(len(tokens))

    def spread(order: Any, size: int) -> float:
        whole = order[: len(order) // (batch_size * batches) * batch_size * batches]
        sums = tokens[whole].reshape(-1, size).sum(1)
        return float(sums.std() / sums.mean())

    assert spread(even, batch_size * batches) < 0.35 * spread(mixed, batch_size * batches)
    if batch_size > 1:
        assert spread(even, batch_size) < 0.4 * spread(mixed, batch_size)


def test_what_ranks_compute_together_is_alike() -> None:
    """Micro-batches go to ranks in turn: in a step their sizes fall."""
    tokens = lengths(960)
    order = even_order(tokens, 2, 6, np.random.default_rng(0))
    sizes = tokens[order].reshape(-1, 6, 2).sum(2)
    assert (np.diff(sizes, axis=1) <= 0).all()


def test_lengths_do_not_fall_over_an_epoch_and_neighbours_change() -> None:
    """Steps are shuffled, and another epoch puts other examples together."""
    sampler = EvenTokens(lengths(2000).tolist(), 4, 2, seed=3)
    first = list(sampler)
    assert first == list(sampler)
    assert first == list(EvenTokens(lengths(2000).tolist(), 4, 2, seed=3))
    assert first != list(EvenTokens(lengths(2000).tolist(), 4, 2, seed=4))
    sampler.set_epoch(1)
    second = list(sampler)
    pairs = [
        {frozenset(step) for step in np.array(order).reshape(-1, 8).tolist()}
        for order in (first, second)
    ]
    assert len(pairs[0] & pairs[1]) < 5
    tokens = lengths(8 * WINDOW)  # dealt, the step with the longest example is the window's first
    steps = np.array(list(EvenTokens(tokens.tolist(), 4, 2, seed=3))).reshape(-1, 8)
    longest = tokens[steps].max(1)
    assert abs(np.corrcoef(np.arange(len(steps)), longest)[0, 1]) < 0.4


@pytest.mark.parametrize("strategy", ["even_tokens", "group_by_length", "batch_rebalance"])
def test_a_stream_has_no_lengths(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"'{strategy}' needs the length of every row .* stream"):
        refuse_stream(iter([]), strategy)
    refuse_stream([1, 2], strategy)
    refuse_stream(iter([]), "random")
    refuse_stream(None, strategy)
