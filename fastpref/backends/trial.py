"""Kernels that were never timed on a GPU are tried on this one before ``auto`` takes them: do they
give what plain torch gives?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.backends.row_kernels import RowKernels

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of low-precision results, relative to an entry and to the largest; ``_WIDE`` of the others."""
_WIDE = 1e-4
_WIDEST = 32_768


def disagreement(
    kernels: RowKernels, plain: RowKernels, device: torch.device, dtype: torch.dtype
) -> str:
    """What is wrong with ``kernels`` on a device for inputs of a dtype; empty where they agree with
    ``plain``.

    Takes milliseconds and what a first compilation takes, and waits for the device. A kernel that
    breaks the CUDA context (an illegal address) breaks it for the whole process: then plain torch
    cannot run either, and the error is CUDA's.

    Raises:
        RuntimeError: A CUDA graph is being captured, and the device cannot be waited for.
        torch.OutOfMemoryError: The device is full, which says nothing about the kernels.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend='auto' has to try its kernels once, which a CUDA graph cannot capture: call "
            "the op once before the capture, or name the backend"
        )
    mode = torch.cuda.get_sync_debug_mode() if on_gpu else 0
    try:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        with torch.no_grad():
            found, expected = (_run(k, device, dtype) for k in (kernels, plain))
            for got, want in zip(found, expected, strict=True):
                bound = TOLERANCE.get(want.dtype, _WIDE)
                largest = float(want.nan_to_num(0.0, 0.0, 0.0).abs().max())
                torch.testing.assert_close(
                    got, want, rtol=bound, atol=bound * largest, equal_nan=True
                )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a launch, a number: none of them may end the program
        return f"failed its trial on this device ({type(error).__name__}: {error})"
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)
    return ""


def _run(kernels: RowKernels, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Every kernel on a few rows of inputs of a dtype: two tiles, one row ignored, statistics, a
    bias and a cap; and the sweep over a tile as wide as a GPU's, with these and without."""
    g = torch.Generator().manual_seed(0)
    n, v, h, cut, cap = 7, 5000, 1024, 3000, 9.0
    wide = torch.promote_types(dtype, torch.float32)

    def randn(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(*shape, generator=g, device="cpu", dtype=torch.float32).to(device, dtype)

    def filled(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=device, dtype=wide)

    def fresh(rows: int) -> Tensor:
        state = filled(0.0, 6, rows)
        state[0], state[2] = -math.inf, math.nan
        return state

    def indices(*values: int) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.int64)

    raw, bias, factor = randn(n, v), randn(v), randn(n)
    weight, hidden = randn(v, h, dtype=dtype), randn(n, h, dtype=dtype)
    targets = indices(3, 4999, -1, 3, 2999, 0, 3000)
    state, acc, offset, found = fresh(n), randn(n, h), randn(n), []
    for start, end in ((0, cut), (cut, v)):
        tile = raw[:, start:end].clone()
        out = tile if dtype == wide else randn(n, end - start, dtype=dtype)
        options = (bias[start:end], start, 0.5, cap, True)
        kernels.sweep_(tile, out, state, offset, acc, targets, *options)
        found += [out, offset.clone()]
    logp, q, coef = (randn(n) for _ in range(3))
    stats, unit = randn(5, n), randn(n, h, dtype=dtype)
    kernels.combine_(*(state, targets, v, cap, 0.5, acc, weight, unit, logp, q, coef, stats))
    scaled, total = randn(n, h, dtype=dtype), randn(cut, h)
    kernels.scale_rows_(scaled, hidden, factor)
    kernels.add_target_rows_(total, hidden, targets, factor, 0)
    states, nobody = [], torch.full_like(targets, v)
    for tile in (raw, raw.flip(1)):
        whole = fresh(n)
        kernels.sweep_(tile, None, whole, None, None, nobody, bias, 0, 0.5, cap, False)
        states.append(whole)
    kl, gradient = filled(0.0, n), randn(n, v, dtype=dtype)
    kernels.kl_tile_(
        *(raw, raw.flip(1), gradient, states[0], states[1], bias, bias, 0.5, cap, 0.5, cap, kl)
    )
    bounds, pairs = indices(0, 3, 3, 7).int(), indices(0, 2, 1, 0).view(2, 2)
    sums, margins = kernels.segment_sum(q, bounds), kernels.pair_margins(q, coef, bounds, pairs)
    found += [sums, kernels.segment_sum_backward(sums, bounds, n), margins]
    found += [kernels.pair_margins_backward(margins, bounds, pairs, n), kl, gradient]
    for softcap, with_stats in ((0.0, False), (cap, True)):
        tile, ends = randn(2, _WIDEST), fresh(2)
        out = tile if dtype == wide else randn(2, _WIDEST, dtype=dtype)
        kernels.sweep_(
            *(tile, out, ends, randn(2), None, indices(5, _WIDEST - 1), None, 0),
            *(1.0, softcap, with_stats),
        )
        states.append(ends)
        found.append(out)
    for rows in (*states, state, stats):
        found += rows.unbind(0)
    return [*found, acc, logp, q, coef, unit, scaled, total]
