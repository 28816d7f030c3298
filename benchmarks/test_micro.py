"""Microbenchmarks of the row kernels and of the op at small shapes.

    pytest benchmarks --benchmark-only

They are quick and meant for comparing two versions on one machine (``--benchmark-compare``); the
numbers that the project quotes come from ``fastpref bench``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import backends, ops

ROWS, HIDDEN, VOCAB, TILE = 256, 256, 4096, 2048
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _runs(backend: str, device: str) -> bool:
    try:
        backends.resolve(backend, device, torch.float32)
    except RuntimeError:
        return False
    return True


USABLE = [(name, device) for device in DEVICES for name in backends.NAMES if _runs(name, device)]


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(params=USABLE, ids=["-".join(pair) for pair in USABLE])
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend and a device that it runs on."""
    pair: tuple[str, str] = request.param
    return pair


@pytest.mark.parametrize("with_stats", [False, True], ids=["plain", "statistics"])
@pytest.mark.parametrize("softcap", [0.0, 30.0], ids=["uncapped", "capped"])
def test_sweep(benchmark: Any, target: tuple[str, str], with_stats: bool, softcap: float) -> None:
    """One tile folded into the state, E written over the logits."""
    backend, device = target
    z = torch.randn(ROWS, TILE, device=device)
    kernels = backends.select(backend, z)
    targets = torch.randint(VOCAB, (ROWS,), device=device)

    def sweep(tile: Tensor, state: Tensor) -> None:
        kernels.sweep_(
            *(tile, tile, state, None, None, targets, None, 0), *(1.0, softcap, with_stats)
        )
        _sync(device)

    def fresh() -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        state = z.new_zeros(6, ROWS)
        state[0], state[2] = -math.inf, math.nan
        return (z.clone(), state), {}

    benchmark.extra_info["elements"] = ROWS * TILE
    benchmark.pedantic(sweep, setup=fresh, rounds=30, warmup_rounds=3)


def test_scale_rows(benchmark: Any, target: tuple[str, str]) -> None:
    """A row scaling, as the backward of a frozen head."""
    backend, device = target
    x = torch.randn(ROWS, HIDDEN, device=device)
    out, factor = torch.empty_like(x), torch.randn(ROWS, device=device)
    kernels = backends.select(backend, x)

    def scale() -> None:
        kernels.scale_rows_(out, x, factor)
        _sync(device)

    benchmark(scale)


def test_add_target_rows(benchmark: Any, target: tuple[str, str]) -> None:
    """The scatter of the target terms into a slice of dW."""
    backend, device = target
    x = torch.randn(ROWS, HIDDEN, device=device)
    out, factor = torch.zeros(TILE, HIDDEN, device=device), torch.randn(ROWS, device=device)
    targets = torch.randint(VOCAB, (ROWS,), device=device)
    kernels = backends.select(backend, x)

    def add() -> None:
        kernels.add_target_rows_(out, x, targets, factor, 0)
        _sync(device)

    benchmark(add)


@pytest.mark.parametrize("schedule", ["none", "frozen", "trainable"])
def test_op(benchmark: Any, target: tuple[str, str], schedule: str) -> None:
    """Forward, and backward where something needs a gradient."""
    backend, device = target
    hidden = torch.randn(ROWS, HIDDEN, device=device, requires_grad=schedule != "none")
    weight = torch.randn(VOCAB, HIDDEN, device=device, requires_grad=schedule == "trainable")
    targets = torch.randint(VOCAB, (ROWS,), device=device)
    upstream = torch.randn(ROWS, device=device)
    inputs = [x for x in (hidden, weight) if x.requires_grad]

    def run() -> None:
        logps = ops.linear_logprobs(hidden, weight, targets, backend=backend)
        assert isinstance(logps, Tensor)
        if inputs:
            torch.autograd.grad(logps, inputs, upstream)
        _sync(device)

    benchmark(run)
