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


class Operands:
    """The GEMMs, and the conversion of their operands where the device has no low-precision product
    with fp32 output.

    On CUDA a GEMM takes bf16 or fp16 and writes fp32. Elsewhere operands are converted, tile by
    tile, into scratch.
    """

    def __init__(self, arena: Arena, p: Plan, hidden: Tensor, weight: Tensor) -> None:
        """Takes what :meth:`size` says from ``arena``."""
        self.dtype = compute_dtype(hidden.dtype)
        self.mixed = multiplies_low(hidden.dtype, hidden.device)
        self.converts = hidden.dtype != self.dtype and not self.mixed
        self.z, self.low, self.row_buffer, self.tile_buffer = (
            arena.take(count, dtype=dtype) for count, dtype in self._buffers(p, hidden, weight)
        )

    @staticmethod
    def _buffers(p: Plan, hidden: Tensor, weight: Tensor) -> list[tuple[int, torch.dtype]]:
        """Elements and dtype of: a tile of logits, its E, a chunk of hidden, a tile of the
        weight."""
        wide, mixed = compute_dtype(hidden.dtype), multiplies_low(hidden.dtype, hidden.device)
        converts = hidden.dtype != wide and not mixed
        rows, tile = min(p.rows, hidden.shape[0]), min(p.tile, weight.shape[0])
        size = weight.shape[1]
        return [
            (rows * tile, wide),
            (rows * tile if mixed else 0, hidden.dtype),
            (rows * size, hidden.dtype if mixed else wide),
            (tile * size if converts else 0, wide),
        ]

    @classmethod
    def size(cls, p: Plan, hidden: Tensor, weight: Tensor) -> int:
        """Bytes of scratch for the tensors above."""
        return nbytes(*(n * dtype.itemsize for n, dtype in cls._buffers(p, hidden, weight)))

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
