"""Scratch memory for logits tiles: one reused slab per device on CPU, the caching allocator
elsewhere.

On CPU the page faults of fresh buffers cost more than the sweep over them, so slabs are kept and
reused. Nothing of a call's result ever lives here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGN = 64
# Slabs not in use. append and pop are atomic, so concurrent calls take different slabs and share
# none.
_free_cpu_slabs: list[Tensor] = []


class Arena:
    """Cuts aligned tensors out of one slab of bytes; they die with the ``scratch`` block."""

    def __init__(self, slab: Tensor) -> None:
        """Start at the beginning of ``slab``, a 1-D uint8 tensor."""
        self._slab = slab
        self._used = 0

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of ``shape``."""
        size = math.prod(shape) * dtype.itemsize
        start = self._used
        self._used += nbytes(size)
        return self._slab[start : start + size].view(dtype).view(shape)


def nbytes(*sizes: int) -> int:
    """Bytes of a slab from which blocks of ``sizes`` bytes can be taken."""
    return sum(-(-size // _ALIGN) * _ALIGN for size in sizes)


@contextmanager
def scratch(device: torch.device, size: int) -> Iterator[Arena]:
    """Lend an arena of ``size`` bytes on ``device``."""
    if device.type != "cpu":
        yield Arena(torch.empty(size, dtype=torch.uint8, device=device))
        return
    try:
        slab = _free_cpu_slabs.pop()
    except IndexError:
        slab = torch.empty(0, dtype=torch.uint8)
    if slab.numel() < size:
        slab = torch.empty(size, dtype=torch.uint8)
    try:
        yield Arena(slab)
    finally:
        _free_cpu_slabs.append(slab)


def release() -> None:
    """Give the idle CPU slabs back to the allocator."""
    _free_cpu_slabs.clear()
