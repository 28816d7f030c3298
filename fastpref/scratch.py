"""Reused memory for tiles of logits and kept E: slabs on CPU, the caching allocator elsewhere.

On CPU the page faults of fresh buffers cost more than the sweep over them, so slabs are kept and
reused: held while a ``scratch`` block runs, or until a ``lend``-ed tensor dies.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGN = 64
# Slabs not in use. append and pop are atomic, so concurrent calls never share one.
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


def _take_slab(size: int) -> Tensor:
    """The smallest idle slab that suffices, or a new one in place of the largest too small."""
    idle: list[Tensor] = []
    while _free_cpu_slabs:
        try:
            idle.append(_free_cpu_slabs.pop())
        except IndexError:
            break
    idle.sort(key=Tensor.numel)
    fits = [i for i, slab in enumerate(idle) if slab.numel() >= size]
    slab = idle.pop(fits[0]) if fits else torch.empty(size, dtype=torch.uint8)
    if not fits and idle:
        idle.pop()
    _free_cpu_slabs.extend(idle)
    return slab


@contextmanager
def scratch(device: torch.device, size: int) -> Iterator[Arena]:
    """Lend an arena of ``size`` bytes on ``device``."""
    if device.type != "cpu":
        yield Arena(torch.empty(size, dtype=torch.uint8, device=device))
        return
    slab = _take_slab(size)
    try:
        yield Arena(slab)
    finally:
        _free_cpu_slabs.append(slab)


def lend(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor whose memory goes back to the slabs when the last user
    drops it."""
    count = math.prod(shape)
    if device.type != "cpu" or not count:
        return torch.empty(shape, dtype=dtype, device=device)
    slab = _take_slab(count * dtype.itemsize)
    # torch holds on to the buffer it was made from, and with it to the finalizer
    block = (ctypes.c_uint8 * slab.numel()).from_address(slab.data_ptr())
    weakref.finalize(block, _free_cpu_slabs.append, slab)
    # Shaped in place: the base of a view would keep autograd from adding to the view in place.
    return torch.frombuffer(block, dtype=dtype, count=count).resize_(shape)


def release() -> None:
    """Give the idle CPU slabs back to the allocator."""
    _free_cpu_slabs.clear()
