"""Kernels that were never timed on a GPU are tried on this one before ``auto`` takes them: do they
give what plain torch gives?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.backends import RowKernels
from fastpref.backends import torch as plain

TOLERANCE = 1e-4
"""Relative and absolute. Rounding stays below 1e-5; a race or a wrong index does not."""


def disagreement(kernels: RowKernels, device: torch.device) -> str:
    """What is wrong with ``kernels`` on a device; empty where they agree with plain torch.

    Takes milliseconds and what a first compilation takes, and waits for the device.

    Raises:
        RuntimeError: A CUDA graph is being captured, and the device cannot be waited for.
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
            for got, want in zip(_run(kernels, device), _run(plain, device), strict=True):
                torch.testing.assert_close(
                    got, want, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
                )
    except Exception as error:  # a compiler, a launch, a number: none of them may end the program
        return f"failed its trial on this device ({type(error).__name__}: {error})"
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)
    return ""


def _run(kernels: RowKernels, device: torch.device) -> list[Tensor]:
    """Every kernel of projection and KL on a few rows: two tiles, one row ignored, a bias and
    a cap."""
    g = torch.Generator().manual_seed(0)
    n, v, h, cut = 7, 5000, 96, 3000

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    raw, weight, hidden, bias, factor = randn(n, v), randn(v, h), randn(n, h), randn(v), randn(n)
    targets = torch.tensor([3, 4999, -1, 3, 2999, 0, 3000], device=device)
    state = torch.zeros(6, n, device=device)
    state[0], state[2] = -math.inf, math.nan
    acc, offset, found = torch.ones(n, h, device=device), randn(n), []
    for start, end in ((0, cut), (cut, v)):
        tile = raw[:, start:end].clone()
        options = (bias[start:end], start, 0.5, 9.0, True)
        kernels.sweep_(tile, tile, state, offset, acc, targets, *options)
        found += [tile, offset.clone()]
    logp, q, coef = (randn(n) for _ in range(3))
    stats, unit = randn(5, n), randn(n, h)
    kernels.combine_(*(state, targets, v, 9.0, 0.5, acc, weight, unit, logp, q, coef, stats))
    scaled, total = randn(n, h), randn(cut, h)
    kernels.scale_rows_(scaled, hidden, factor)
    kernels.add_target_rows_(total, hidden, targets, factor, 0)
    states, nobody = [], torch.full((n,), v, device=device)
    for tile in (raw, raw.flip(1)):
        whole = torch.zeros(6, n, device=device)
        whole[0] = -math.inf
        kernels.sweep_(tile, None, whole, None, None, nobody, bias, 0, 0.5, 9.0, False)
        states.append(whole)
    kl, gradient = torch.zeros(n, device=device), randn(n, v)
    kernels.kl_tile_(
        *(raw, raw.flip(1), gradient, states[0], states[1], bias, bias, 0.5, 9.0, 0.5, 9.0, kl)
    )
    found += [*states, kl, gradient]
    return [*found, state, acc, logp, q, coef, stats, unit, scaled, total]
