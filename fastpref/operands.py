"""The matrix products of the schedule: their operands, scratch and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.schedule import MIB, Plan
from fastpref.scratch import Arena, nbytes

# A product this narrow is summed term by term by some CPU libraries (MKL on AMD): the error grows
# with the root of the number of terms. So it is made of short sums.
NARROW_ROWS, NARROW_COLUMNS, SHORT_SUM = 4, 12, 256

# Bytes of rows that are gathered at a time where a kernel reads them once.
_GATHERED = {"cpu": MIB, "cuda": 32 * MIB}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results: float64 for float64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def multiplies_low(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products take operands of this dtype as they are and write fp32: on CUDA they do."""
    return dtype != compute_dtype(dtype) and device.type == "cuda"


def mm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, out in the compute dtype of the operands."""
    narrow = out.shape[0] < NARROW_ROWS or out.shape[1] < NARROW_COLUMNS
    if a.dtype != out.dtype and accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif narrow and out.device.type == "cpu":
        if not accumulate:
            out.zero_()
        # in place, which autocast leaves alone
        for k in range(0, a.shape[1], SHORT_SUM):
            part = torch.mm(
                a[:, k : k + SHORT_SUM], b[k : k + SHORT_SUM], out=torch.empty_like(out)
            )
            out += part
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def row_slices(num_rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """``num_rows`` rows in order, as many at a time as may be copied."""
    most = _GATHERED["cpu" if device.type == "cpu" else "cuda"]
    step = max(most // max(row_bytes, 1), 1)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


@dataclass(frozen=True)
class Rows:
    """The rows ``x[index]`` of a matrix, gathered where they are used; all of ``x`` without an
    index."""

    x: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        """How many."""
        return len(self.x if self.index is None else self.index)

    def cut(self, start: int, end: int) -> Rows:
        """The rows from ``start`` to ``end``."""
        if self.index is None:
            return Rows(self.x[start:end])
        return Rows(self.x, self.index[start:end])

    def pick(self, chosen: Tensor) -> Rows:
        """Those of the rows that ``chosen`` lists."""
        return Rows(self.x, chosen if self.index is None else self.index[chosen])

    def parts(self) -> Iterator[slice]:
        """The rows in order, as many at a time as may be copied; without an index all at once."""
        if self.index is not None:
            row_bytes = self.x.shape[1] * self.x.element_size()
            yield from row_slices(len(self), row_bytes, self.x.device)
        elif len(self):
            yield slice(0, len(self))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The parts, each with its rows: a copy, or ``x`` itself without an index."""
        for part in self.parts():
            yield part, self.x if self.index is None else self.x.index_select(0, self.index[part])

    def operand(self, buffer: Tensor, converts: bool) -> Tensor:
        """The rows as a matrix: ``x`` itself, or in a flat buffer where they have to be gathered or
        converted to its dtype."""
        if self.index is None and not converts:
            return self.x
        out = buffer[: len(self) * self.x.shape[1]].view(len(self), self.x.shape[1])
        if self.index is not None and out.dtype == self.x.dtype:
            return torch.index_select(self.x, 0, self.index, out=out)
        for part, block in self.blocks():
            out[part] = block
        return out


class Operands:
    """The GEMMs, and the conversion of their operands where the device has no low-precision product
    with fp32 output.

    On CUDA a GEMM takes bf16 or fp16 and writes fp32. Elsewhere operands are converted, tile by
    tile, into scratch.
    """

    def __init__(self, arena: Arena, p: Plan, hidden: Rows, weight: Tensor) -> None:
        """Takes what :meth:`size` says from ``arena``."""
        self.dtype = compute_dtype(weight.dtype)
        self.mixed = multiplies_low(weight.dtype, weight.device)
        self.converts = weight.dtype != self.dtype and not self.mixed
        self.z, self.low, self.row_buffer, self.tile_buffer = (
            arena.take(count, dtype=dtype) for count, dtype in self._buffers(p, hidden, weight)
        )

    @staticmethod
    def _buffers(p: Plan, hidden: Rows, weight: Tensor) -> list[tuple[int, torch.dtype]]:
        """Elements and dtype of: a tile of logits, its E, a chunk of hidden, a tile of the
        weight."""
        wide, mixed = compute_dtype(weight.dtype), multiplies_low(weight.dtype, weight.device)
        converts = weight.dtype != wide and not mixed
        rows, tile = min(p.rows, len(hidden)), min(p.tile, weight.shape[0])
        size = weight.shape[1]
        return [
            (rows * tile, wide),
            (rows * tile if mixed else 0, weight.dtype),
            (rows * size, weight.dtype if mixed else wide),
            (tile * size if converts else 0, wide),
        ]

    @classmethod
    def size(cls, p: Plan, hidden: Rows, weight: Tensor) -> int:
        """Bytes of scratch for the tensors above."""
        return nbytes(*(n * dtype.itemsize for n, dtype in cls._buffers(p, hidden, weight)))

    def rows(self, x: Rows) -> Tensor:
        """A chunk of hidden as a GEMM operand."""
        return x.operand(self.row_buffer, self.converts)

    def tile(self, w: Tensor) -> Tensor:
        """A tile of the weight as a GEMM operand."""
        return Rows(w).operand(self.tile_buffer, self.converts)

    def logits(self, n: int, width: int) -> Tensor:
        """An uninitialised ``(n, width)`` tile of logits."""
        return self.z[: n * width].view(n, width)

    def low_tile(self, n: int, width: int) -> Tensor:
        """An uninitialised ``(n, width)`` tile of E in the GEMM's dtype."""
        return self.low[: n * width].view(n, width)
