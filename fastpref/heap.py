"""What a process holds when malloc gives it its memory: the process's own malloc is asked.

Nobody writes to the blocks, so that they take address space and no memory. Their sizes alone do not
tell what malloc makes of them: to start a block at a multiple of 64 bytes it cuts it out of a
larger one, small objects (the nodes of autograd, the descriptions of tensors) take what is cut off,
and while they live, the hole between them is too small for the next block of the same size. So
blocks are taken and given back among such objects, while the model's code runs.
"""

from __future__ import annotations

import ctypes

ALIGNMENT = 64
"""Bytes at whose multiples PyTorch's tensors begin on a CPU."""


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of glibc, bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("heap", "a", "b", "c", "mapped", *"defgh")]


class Malloc:
    """Blocks from malloc, and what it takes from the system for them."""

    def __init__(self) -> None:
        """Start counting from here."""
        libc = ctypes.CDLL(None)
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        self._take, self._free = libc.posix_memalign, libc.free
        self._take.argtypes, self._free.argtypes = [pointer, size, size], [pointer]
        self._free.restype = None
        self._look = getattr(libc, "mallinfo2", None)  # glibc 2.33 and later
        if self._look is not None:
            self._look.restype = _Info
            libc.malloc_trim(0)  # what is free at the top would hide that the heap grows
        self._refused: dict[int, int] = {}
        self._before = self._taken()

    @property
    def held(self) -> int:
        """Bytes of the heap and of mappings that came since the start; 0 where malloc does not
        tell."""
        return self._taken() - self._before + sum(self._refused.values())

    def allocate(self, size: int) -> int:
        """A new block of ``size`` bytes; its address."""
        place = ctypes.c_void_p()
        if not self._take(ctypes.byref(place), ALIGNMENT, size) and place.value:
            return place.value
        # More than this machine could give: elsewhere a mapping of its own.
        number = min(self._refused, default=0) - 1
        self._refused[number] = size
        return number

    def free(self, address: int) -> None:
        """Give a block back."""
        if self._refused.pop(address, None) is None:
            self._free(address)

    def _taken(self) -> int:
        if self._look is None:
            return 0
        info = self._look()
        return int(info.heap + info.mapped)
