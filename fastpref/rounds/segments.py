"""What self-play with segments is made of: where a segment lies, how it is replaced, an average.

Source: Yin et al. 2024, arXiv:2405.20830 (SAPO), section 3 and its released code.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from fastpref.rounds.examples import cut_at_end

MARGIN = 3
"""Tokens at a response's end that a segment leaves alone where it can: its end of turn."""


def choose_segment(length: int, longest: int, draw: random.Random) -> tuple[int, int]:
    """Start and length of the segment of a response that is written anew.

    Args:
        length: Tokens of the response.
        longest: Most tokens of a segment.
        draw: Draws the start, evenly from ``0`` to ``length - MARGIN - min(longest, length)``.

    Returns:
        Start and length, in tokens. A response of at most ``longest`` tokens is one segment.
    """
    size = min(longest, length)
    return draw.randint(0, max(length - MARGIN - size, 0)), size


def splice(
    response: Sequence[int], new: Sequence[int], start: int, length: int, ends: Collection[int]
) -> list[int]:
    """A response with new tokens in the place of a segment; it ends where the new tokens do.

    Equals ``response[:start] + new + response[start + length:]``, cut after the first end token of
    ``new``, if there is one.

    Args:
        response: Token ids.
        new: Token ids; those beyond ``length`` are not used.
        start: Where the segment begins.
        length: Tokens of the segment.
        ends: Ids of the tokens that end a response.

    Raises:
        ValueError: the segment lies outside the response, or ``new`` is shorter and does not end.
    """
    if not 0 <= start <= start + length <= len(response):
        raise ValueError(
            f"splice: a segment of {length} tokens at {start} is not within a response of "
            f"{len(response)}"
        )
    written, ended = cut_at_end(new[:length], ends)
    if ended:
        return [*response[:start], *written]
    if len(written) < length:
        raise ValueError(
            f"splice: {len(written)} new tokens without an end token for a segment of {length}"
        )
    return [*response[:start], *written, *response[start + length :]]


@torch.no_grad()
def ema_update(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Replace each average ``a`` by ``decay * a + (1 - decay) * w``, in place.

    Args:
        average: Tensors.
        weights: As many, of the same shapes.
        decay: In [0, 1]; 0 copies the weights bit by bit, 1 changes nothing.
    """
    for mean, weight in zip(average, weights, strict=True):
        mean.lerp_(weight.to(mean), 1 - decay)
