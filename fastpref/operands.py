"""The matrix products of the schedule: their operands, scratch and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.schedule import Plan
from fastpref.scratch import Arena, nbytes

# A product this narrow is summed term by term by some CPU libraries (MKL on AMD): the error grows
# with the root of the number of terms. So it is made of short sums.
NARROW_ROWS, NARROW_COLUMNS, SHORT_SUM = 4, 12, 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results: float64 for float64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


class Operands:
    """The GEMMs, and the conversion of their operands where the device has no low-precision product
    with fp32 output.

    On CUDA a GEMM takes bf16 or fp16 and writes fp32. Elsewhere operands are converted, tile by
    tile, into scratch.
    """

    def __init__(self, arena: Arena, p: Plan, hidden: Tensor, weight: Tensor) -> None:
        """Takes what :meth:`size` says from ``arena``."""
        self.dtype = compute_dtype(hidden.dtype)
        self.mixed = hidden.dtype != self.dtype and hidden.device.type == "cuda"
        self.converts = hidden.dtype != self.dtype and not self.mixed
        self.gemm_dtype = hidden.dtype if self.mixed else self.dtype
        size = weight.shape[1]
        rows, tile = min(p.rows, hidden.shape[0]), min(p.tile, weight.shape[0])
        self.z = arena.take(rows * tile, dtype=self.dtype)
        self.low = arena.take(rows * tile if self.mixed else 0, dtype=hidden.dtype)
        self.row_buffer = arena.take(rows * size, dtype=self.gemm_dtype)
        self.tile_buffer = arena.take(tile * size if self.converts else 0, dtype=self.dtype)

    @staticmethod
    def size(p: Plan, hidden: Tensor, weight: Tensor) -> int:
        """Bytes of scratch for the tensors above."""
        wide = compute_dtype(hidden.dtype).itemsize
        rows, tile = min(p.rows, hidden.shape[0]), min(p.tile, weight.shape[0])
        size = weight.shape[1]
        low = rows * tile * hidden.element_size()
        return nbytes(rows * tile * wide, low, rows * size * wide, tile * size * wide)

    def rows(self, x: Tensor) -> Tensor:
        """A chunk of hidden as a GEMM operand."""
        return self._convert(x, self.row_buffer)

    def tile(self, w: Tensor) -> Tensor:
        """A tile of the weight as a GEMM operand."""
        return self._convert(w, self.tile_buffer)

    def logits(self, n: int, width: int) -> Tensor:
        """An uninitialised ``(n, width)`` tile of logits."""
        return self.z[: n * width].view(n, width)

    def low_tile(self, n: int, width: int) -> Tensor:
        """An uninitialised ``(n, width)`` tile of E in the GEMM's dtype."""
        return self.low[: n * width].view(n, width)

    def _convert(self, x: Tensor, buffer: Tensor) -> Tensor:
        if not self.converts:
            return x
        return buffer[: x.numel()].view(x.shape).copy_(x)

    def mm(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        """``out = a @ b`` or ``out += a @ b``, out in the compute dtype."""
        narrow = out.shape[0] < NARROW_ROWS or out.shape[1] < NARROW_COLUMNS
        if self.mixed and accumulate:
            torch.addmm(out, a, b, out_dtype=self.dtype, out=out)
        elif self.mixed:
            torch.mm(a, b, out_dtype=self.dtype, out=out)
        elif narrow and out.device.type == "cpu":
            if not accumulate:
                out.zero_()
            for k in range(0, a.shape[1], SHORT_SUM):
                out += a[:, k : k + SHORT_SUM] @ b[k : k + SHORT_SUM]
        elif accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
