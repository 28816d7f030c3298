"""Calls every row kernel of a GPU backend once, on one ragged shape: what a sanitizer should watch.

    compute-sanitizer --tool memcheck python benchmarks/one_of_each.py cuda

No vendor matrix product is launched, so whatever a tool reports is about this project's kernels.
"""

from __future__ import annotations

import argparse
import math

import torch

from fastpref import backends

ROWS, TILE, HIDDEN, VOCAB = 37, 1000, 136, 3001
START = 1000


def row_kernels(backend: str, dtype: torch.dtype) -> None:
    """Sweep with everything on, combine, row scaling, target rows, and KL of two tiles."""
    like = torch.empty(0, device="cuda", dtype=dtype)
    kernels = backends.select(backend, like)
    make = {"device": "cuda", "dtype": torch.float32}
    targets = torch.arange(ROWS, device="cuda") * 80
    targets[5] = -1  # ignored
    state = torch.zeros(6, ROWS, **make)
    state[0], state[2] = -math.inf, math.nan
    acc = torch.randn(ROWS, HIDDEN, **make)
    weight = torch.randn(VOCAB, HIDDEN, device="cuda").to(dtype)
    offset = torch.empty(ROWS, **make)
    for start in range(0, VOCAB, TILE):
        width = min(TILE, VOCAB - start)
        tile = torch.randn(ROWS, width, **make)
        out = tile if dtype == torch.float32 else torch.empty_like(tile, dtype=dtype)
        bias = torch.randn(width, **make)
        kernels.sweep_(tile, out, state, offset, acc, targets, bias, start, 1.5, 30.0, True)
        plain = torch.randn(ROWS, width, **make)
        spare = state.clone()
        kernels.sweep_(plain, None, spare, None, None, targets, None, start, 1.0, 0.0, False)
    logp, q, coef = torch.empty(3, ROWS, **make)
    stats = torch.empty(5, ROWS, **make)
    unit = torch.empty(ROWS, HIDDEN, device="cuda", dtype=dtype)
    kernels.combine_(*(state, targets, VOCAB, 30.0, 1.5, acc, weight, unit, logp, q, coef, stats))
    scaled = torch.empty(ROWS, HIDDEN, device="cuda", dtype=dtype)
    kernels.scale_rows_(scaled, unit, coef)
    total = torch.zeros(TILE, HIDDEN, **make)
    kernels.add_target_rows_(total, unit, targets, q, START)
    tile, other = torch.randn(2, ROWS, TILE, **make)
    out = tile if dtype == torch.float32 else torch.empty_like(tile, dtype=dtype)
    bias, kl = torch.randn(TILE, **make), torch.zeros(ROWS, **make)
    kernels.kl_tile_(tile, other, out, state, state, bias, None, 1.5, 30.0, 1.0, 0.0, kl)


def sequences(backend: str) -> None:
    """Sums over sequences and margins of pairs, both ways."""
    values = torch.randn(500, device="cuda")
    kernels = backends.select(backend, values)
    bounds = torch.tensor([0, 3, 3, 200, 500], device="cuda", dtype=torch.int32)
    pairs = torch.tensor([[0, 1], [2, 3]], device="cuda")
    total = kernels.segment_sum(values, bounds)
    kernels.segment_sum_backward(total, bounds, 500)
    margins = kernels.pair_margins(values, values.flip(0), bounds, pairs)
    kernels.pair_margins_backward(margins.contiguous(), bounds, pairs, 500)


def main() -> None:
    """Run the kernels of the backend that was named, or of each that is available."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="*", choices=("triton", "cuda", "torch", []))
    asked = parser.parse_args()
    names = asked.backend or [n for n in ("triton", "cuda") if backends.status()[n] == "ok"]
    if not names:
        raise SystemExit(f"no GPU backend is available: {backends.status()}")
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            row_kernels(name, dtype)
        sequences(name)
        torch.cuda.synchronize()
        print(f"{name}: every kernel ran")


if __name__ == "__main__":
    main()
