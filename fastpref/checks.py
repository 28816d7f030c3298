"""What can be wrong with the arguments of the ops, said so that a person can mend it.

Nothing here reads device memory: values are checked on CPU, where it costs no sync, and not while
compiling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(hidden: Any, **others: Any) -> None:
    """Tensors, on one device; ``bias`` and ``rows`` may be None."""
    for name, x in {"hidden": hidden, **others}.items():
        if x is None and name in ("bias", "rows"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device != hidden.device:
            raise ValueError(
                f"{name} is on {x.device}, hidden is on {hidden.device}: move both to one device"
            )


def check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None
) -> None:
    """Dtypes and shapes."""
    if hidden.dtype not in FLOATS:
        raise TypeError(f"hidden: expected fp32, bf16, fp16 or float64, got {hidden.dtype}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, hidden is {hidden.dtype}: convert one of them, or run under "
                "torch.autocast"
            )
    for name, x in (("targets", targets), ("rows", rows)):
        if x is not None and x.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {x.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (V, H), got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected shape (..., {weight.shape[1]}) to match weight "
            f"{tuple(weight.shape)}, "
            f"got {tuple(hidden.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected at least one row and column, got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {tuple(hidden.shape[:-1])} to match hidden "
            f"{tuple(hidden.shape)}, "
            f"got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if rows is not None and rows.dim() != 1:
        raise ValueError(f"rows: expected a 1-D index, got shape {tuple(rows.shape)}")


def check_options(
    softcap: float | None, memory_budget: int | None, process_group: Any, backend: str
) -> None:
    """Options that are not tensors, and transforms that cannot be served."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fastpref ops do not run under torch.func transforms (grad, vmap, jvp, ...): call "
            "backward() or torch.autograd.grad instead"
        )
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if memory_budget is not None and not isinstance(memory_budget, (int, torch.SymInt)):
        raise TypeError(f"memory_budget: expected bytes as an int, got {memory_budget!r}")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget: expected bytes >= 0 or None, got {memory_budget}")
    if process_group is not None and backend == "reference":
        raise ValueError("process_group: backend='reference' needs the whole weight")


def check_rows(rows: Tensor, num_rows: int) -> None:
    """Range and uniqueness of ``rows``, on CPU, where it costs no sync."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or not rows.numel():
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= num_rows:
        raise ValueError(f"rows: expected indices in [0, {num_rows}), got [{low}, {high}]")
    if torch.unique(rows).numel() != rows.numel():
        raise ValueError("rows: an index occurs twice; gather hidden and targets yourself instead")


def check_cu_seqlens(cu_seqlens: Tensor, n: int) -> None:
    """Boundaries of packed sequences that cover ``n`` tokens."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens: expected shape (num_sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens: expected to start at 0, never fall, and end at the number of tokens {n}; "
            f"got {cu_seqlens.tolist()[:8]}..., ending at {int(cu_seqlens[-1])}"
        )


def check_margins(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> None:
    """The arguments of ``preference_margins``."""
    for name, x in (("logps", logps), ("ref_logps", ref_logps)):
        if x.dtype not in (torch.float32, torch.float64) or x.dim() != 1:
            raise TypeError(
                f"{name}: expected a 1-D fp32 or float64 tensor, got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
    if ref_logps.shape != logps.shape or ref_logps.dtype != logps.dtype:
        raise ValueError(
            f"ref_logps: expected {tuple(logps.shape)} {logps.dtype} as logps, "
            f"got {tuple(ref_logps.shape)} {ref_logps.dtype}"
        )
    if pairs.dtype != torch.int64:
        raise TypeError(f"pairs: expected int64, got {pairs.dtype}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs: expected shape (P, 2), got {tuple(pairs.shape)}")
    check_cu_seqlens(cu_seqlens, logps.shape[0])
    num_sequences = cu_seqlens.numel() - 1
    if pairs.device.type == "cpu" and pairs.numel() and not torch.compiler.is_compiling():
        low, high = int(pairs.min()), int(pairs.max())
        if low < 0 or high >= num_sequences:
            raise ValueError(
                f"pairs: expected sequence indices in [0, {num_sequences}), got [{low}, {high}]"
            )
