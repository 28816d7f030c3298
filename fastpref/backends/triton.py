"""The row kernels in Triton (``kernels/``): how each is launched, and on what shape of program.

``fastpref.backends`` documents the signatures, which every backend shares. A launch runs on the
tensors' device and stream, waits for nothing, and is skipped where there is nothing to do. Program
shapes are pure functions of the sizes: nothing is tuned, cached or measured at run time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from fastpref.kernels.combine import combine_kernel
from fastpref.kernels.kl import kl_tile_kernel
from fastpref.kernels.rows import add_target_rows_kernel, scale_rows_kernel
from fastpref.kernels.segments import (
    pair_margins_backward_kernel,
    pair_margins_kernel,
    segment_sum_backward_kernel,
    segment_sum_kernel,
)
from fastpref.kernels.sweep import sweep_kernel

WIDEST_HELD = 32768
"""Columns of an fp32 row that fit the registers of one program; wider rows are walked twice."""
UNFUSED = {"enable_fp_fusion": False}
"""No ``a * b + c`` becomes one instruction unless it is written so: the compiler would choose
differently in each variant of a kernel, and log-probabilities would differ in their last bit
between a policy, which wants gradients and statistics, and its reference, which wants neither."""
LEAN = UNFUSED | {"maxnreg": 64}
"""Registers that a thread may take. Left to itself the assembler aims at fewer in some variants and
spills one of them."""
RUN_BLOCK = 4
"""Rows with the same target that are read at once."""
SEGMENT_CONFIG = {"BLOCK": 1024, "num_warps": 4} | LEAN
"""Program shape of the segment and pair kernels: tokens, or pairs, taken at a time."""


def why_unavailable() -> str:
    """What is missing for Triton kernels to run here; empty if nothing is."""
    if triton.knobs.runtime.interpret:
        return ""
    if torch.version.hip is not None:
        return "the program shapes count on warps of 32 threads, which ROCm devices do not have"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def available() -> bool:
    """Whether Triton kernels can run here: on a CUDA device, or interpreted."""
    return not why_unavailable()


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, where a launch goes; nothing on CPU, for the
    interpreter."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def sweep_config(width: int, dtype: torch.dtype, capped: bool, with_stats: bool) -> dict[str, int]:
    """Program shape of the sweep over rows of ``width`` columns.

    32 columns a thread, 64 of the widest rows that are held, taken 4 at a time. CHUNK and num_warps
    decide the order of the sums, so they follow from the width alone; HELD only decides where a row
    waits between its maximum and its exponentials. Softcap and statistics leave no registers for 64
    columns.
    """
    warps = min(max(triton.next_power_of_2(width) // 1024, 1), 16)
    widest = WIDEST_HELD // 2 if capped or with_stats else WIDEST_HELD
    held = dtype == torch.float32 and width <= widest
    return {"CHUNK": 128 * warps, "HELD": held, "num_warps": warps} | (UNFUSED if held else LEAN)


def hidden_config(hidden_size: int) -> dict[str, int]:
    """Program shape of the kernels over rows of ``hidden_size`` columns, 8 a thread."""
    block = min(max(triton.next_power_of_2(hidden_size), 256), 1024)
    return {"BLOCK_H": block, "num_warps": block // 256} | LEAN


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
    n, width = tile.shape
    if n == 0:
        return
    with _device_of(tile):
        sweep_kernel[(n,)](
            tile,
            out,
            state,
            offset,
            acc,
            targets,
            bias,
            tile.stride(0),
            0 if out is None else out.stride(0),
            0 if acc is None else acc.stride(0),
            state.stride(0),
            start,
            scale,
            softcap,
            WIDTH=width,
            HIDDEN=0 if acc is None else acc.shape[1],
            CAPPED=softcap > 0.0,
            WITH_STATS=with_stats,
            **sweep_config(width, tile.dtype, softcap > 0.0, with_stats),
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
    n, hidden = targets.numel(), weight.shape[1]
    if n == 0:
        return
    with _device_of(state):
        combine_kernel[(n,)](
            state,
            targets,
            acc,
            weight,
            hidden_grad,
            logp,
            q,
            coef,
            stats,
            state.stride(0),
            0 if acc is None else acc.stride(0),
            weight.stride(0),
            0 if hidden_grad is None else hidden_grad.stride(0),
            0 if stats is None else stats.stride(0),
            vocab_size,
            scale,
            softcap,
            HIDDEN=hidden,
            CAPPED=softcap > 0.0,
            **hidden_config(hidden),
        )


def kl_config(width: int) -> dict[str, int]:
    """Program shape of the KL over rows of ``width`` columns, 4 a thread at a time."""
    warps = min(max(triton.next_power_of_2(width) // 1024, 1), 8)
    return {"CHUNK": 128 * warps, "num_warps": warps} | LEAN


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
    n, width = tile.shape
    if tile.numel() == 0:
        return
    with _device_of(tile):
        kl_tile_kernel[(n,)](
            tile,
            ref_tile,
            out,
            state,
            ref_state,
            bias,
            ref_bias,
            kl,
            tile.stride(0),
            ref_tile.stride(0),
            0 if out is None else out.stride(0),
            state.stride(0),
            ref_state.stride(0),
            scale,
            softcap,
            ref_scale,
            ref_softcap,
            WIDTH=width,
            CAPPED=softcap > 0.0,
            REF_CAPPED=ref_softcap > 0.0,
            **kl_config(width),
        )


def scale_rows_(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """See :func:`fastpref.backends.RowKernels.scale_rows_`."""
    if out.numel() == 0:
        return
    n, hidden = out.shape
    config = hidden_config(hidden)
    with _device_of(out):
        scale_rows_kernel[(n, triton.cdiv(hidden, config["BLOCK_H"]))](
            out, x, factor, out.stride(0), x.stride(0), HIDDEN=hidden, **config
        )


def add_target_rows_(out: Tensor, x: Tensor, targets: Tensor, factor: Tensor, start: int) -> None:
    """See :func:`fastpref.backends.RowKernels.add_target_rows_`."""
    n, hidden = x.shape
    if n == 0 or out.numel() == 0:
        return
    sorted_targets, order = torch.sort(targets, stable=True)
    config = hidden_config(hidden)
    with _device_of(out):
        add_target_rows_kernel[(n, triton.cdiv(hidden, config["BLOCK_H"]))](
            out,
            x,
            sorted_targets,
            order,
            factor,
            out.stride(0),
            x.stride(0),
            n,
            start,
            out.shape[0],
            HIDDEN=hidden,
            BLOCK_R=RUN_BLOCK,
            **config,
        )


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.segment_sum`."""
    num_segments = cu_seqlens.numel() - 1
    out = values.new_empty(num_segments)
    if num_segments:
        with _device_of(values):
            segment_sum_kernel[(num_segments,)](
                values.contiguous(), cu_seqlens, out, values.numel(), **SEGMENT_CONFIG
            )
    return out


def segment_sum_backward(grad: Tensor, cu_seqlens: Tensor, n: int) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.segment_sum_backward`."""
    out = grad.new_empty(n)
    if n:
        num_segments = cu_seqlens.numel() - 1
        with _device_of(grad):
            segment_sum_backward_kernel[(num_segments + 1,)](
                grad.contiguous(), cu_seqlens, out, num_segments, n, **SEGMENT_CONFIG
            )
    return out


def pair_margins(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.pair_margins`."""
    num_pairs = pairs.shape[0]
    out = logps.new_empty(3, num_pairs)
    if num_pairs:
        with _device_of(logps):
            pair_margins_kernel[(num_pairs,)](
                logps.contiguous(),
                ref_logps.contiguous(),
                cu_seqlens,
                pairs.contiguous(),
                out,
                cu_seqlens.numel() - 1,
                num_pairs,
                logps.numel(),
                **SEGMENT_CONFIG,
            )
    return out


def pair_margins_backward(grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int) -> Tensor:
    """See :func:`fastpref.backends.RowKernels.pair_margins_backward`."""
    out = grad.new_empty(n)
    if n:
        num_segments = cu_seqlens.numel() - 1
        with _device_of(grad):
            pair_margins_backward_kernel[(num_segments + 1,)](
                grad.contiguous(),
                cu_seqlens,
                pairs.contiguous(),
                out,
                num_segments,
                pairs.shape[0],
                n,
                **SEGMENT_CONFIG,
            )
    return out
