"""The row kernels in C++ (``csrc/cpu``): vectorised, on torch's threads, bitwise repeatable.

``fastpref.backends`` documents the signatures, which every backend shares. The ops and their
schemas are declared in ``csrc/module.cpp``; this file is how Python calls them, and what they look
like to a tracer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastpref.backends import REBUILD


@cache
def why_unavailable() -> str:
    """Why the compiled module cannot be used; empty where it can. The first call loads it."""
    try:
        importlib.import_module("fastpref._C")
    except ImportError as error:
        return f"the compiled module did not load ({error}). Build it with: {REBUILD}"
    _register_fakes()
    return ""


def available() -> bool:
    """Whether the compiled module is there and loads."""
    return not why_unavailable()


def build_info() -> dict[str, str]:
    """How the compiled module was built and what it runs as; empty where it is missing.

    Keys: ``compiler, flags, isa_variants, isa_active, torch_target, torch_built_with, cuda,
    cuda_archs``.
    """
    if not available():
        return {}
    info: dict[str, str] = importlib.import_module("fastpref._C").build_info()
    return info


def _register_fakes() -> None:
    """Shapes and dtypes of results for tracing; ops that only write into arguments return none."""

    def writes_arguments(*_: object) -> None:
        return None

    def sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return values.new_empty(cu_seqlens.numel() - 1)

    def tokens(grad: Tensor, *rest: Any) -> Tensor:
        return grad.new_empty(rest[-1])

    def margins(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
        return logps.new_empty(3, pairs.shape[0])

    fakes: dict[str, Callable[..., object]] = {
        "sweep_": writes_arguments,
        "combine_": writes_arguments,
        "kl_tile_": writes_arguments,
        "scale_rows_": writes_arguments,
        "add_target_rows_": writes_arguments,
        "segment_sum": sums,
        "segment_sum_backward": tokens,
        "pair_margins": margins,
        "pair_margins_backward": tokens,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"fastpref::{name}", fake)


def sweep_(
    tile: Tensor,
    out: Tensor | None,
    state: Tensor,
    offset: Tensor | None,
    acc: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    start: int,
    scale: float,
    softcap: float,
    with_stats: bool,
) -> None:
    """See :func:`fastpref.backends.RowKernels.sweep_`."""
    torch.ops.fastpref.sweep_(
        tile, out, state, offset, acc, targets, bias, start, scale, softcap, with_stats
    )


def combine_(
    state: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    scale: float,
    acc: Tensor | None,
    weight: Tensor,
    hidden_grad: Tensor | None,
    logp: Tensor,
    q: Tensor,
    coef: Tensor,
    stats: Tensor | None,
) -> None:
    """See :func:`fastpref.backends.RowKernels.combine_`."""
    torch.ops.fastpref.combine_(
        state, targets, vocab_size, softcap, scale, acc, weight, hidden_grad, logp, q, coef, stats
    )


def kl_tile_(
    tile: Tensor,
    ref_tile: Tensor,
    out: Tensor | None,
    state: Tensor,
    ref_state: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    kl: Tensor,
) -> None:
    """See :func:`fastpref.backends.RowKernels.kl_tile_`."""
    torch.ops.fastpref.kl_tile_(
        *(tile, ref_tile, out, state, ref_state, bias, ref_bias),
        *(scale, softcap, ref_scale, ref_softcap, kl),
    )


def scale_rows_(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """See :func:`fastpref.backends.RowKernels.scale_rows_`."""
    torch.ops.fastpref.scale_rows_(out, x, factor)


def add_target_rows_(out: Tensor, x: Tensor, targets: Tensor, factor: Tensor, start: int) -> None:
    """See :func:`fastpref.backends.RowKernels.add_target_rows_`."""
    torch.ops.fastpref.add_target_rows_(out, x, targets, factor, start)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.segment_sum`."""
    return torch.ops.fastpref.segment_sum(values, cu_seqlens)  # type: ignore[no-any-return]


def segment_sum_backward(grad: Tensor, cu_seqlens: Tensor, n: int) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.segment_sum_backward`."""
    return torch.ops.fastpref.segment_sum_backward(grad, cu_seqlens, n)  # type: ignore[no-any-return]


def pair_margins(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.pair_margins`."""
    return torch.ops.fastpref.pair_margins(logps, ref_logps, cu_seqlens, pairs)  # type: ignore[no-any-return]


def pair_margins_backward(grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.pair_margins_backward`."""
    return torch.ops.fastpref.pair_margins_backward(grad, cu_seqlens, pairs, n)  # type: ignore[no-any-return]
