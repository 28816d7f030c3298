"""From checked arguments to the registered op: which rows are projected, and by what backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import checks, reference, registered
from fastpref.linear import WORTH_GATHERING
from fastpref.reference import TokenStats


def _needs_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def checked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    return_stats: bool,
    backend: str,
    memory_budget: int | None,
    process_group: Any,
) -> tuple[Tensor, TokenStats | None]:
    """``fastpref.linear_logprobs`` of arguments that were checked, in autocast's dtype: rows
    are chosen, layouts mended, statistics None unless asked for."""
    shape, num_rows = targets.shape, targets.numel()
    flat, flat_targets = hidden.reshape(num_rows, hidden.shape[-1]), targets.reshape(num_rows)
    flat, weight = whole_rows(flat), whole_rows(weight)
    bias = None if bias is None else bias.contiguous()
    if rows is None and targets.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = flat_targets != ignore_index
        # a few ignored rows cost less than gathering the others
        if not counted.all() and counted.sum() < WORTH_GATHERING * num_rows:
            rows = counted.nonzero()[:, 0]
    if rows is not None:
        flat_targets = flat_targets.index_select(0, rows)
    logp, stats = _project(
        *(flat, weight, bias, rows, flat_targets, scale, softcap, ignore_index),
        *(return_stats, backend, memory_budget),
        "" if process_group is None else process_group.group_name,
    )

    def place(x: Tensor) -> Tensor:
        if rows is not None:
            x = x.new_zeros(num_rows).index_copy(0, rows, x)
        return x.view(shape)

    return place(logp), stats and TokenStats(*(place(s) for s in stats))


def whole_rows(x: Tensor) -> Tensor:
    """``x``, or a copy if the entries of a row are not side by side, as kernels read them."""
    return x if x.stride(1) == 1 else x.contiguous()


def _project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    with_stats: bool,
    backend: str,
    memory_budget: int | None,
    group: str,
) -> tuple[Tensor, TokenStats | None]:
    """The op on flat rows, by the backend asked for."""
    if backend == "reference":
        registered.check_range(targets, weight.shape[0], ignore_index)
        logp, stats = reference.linear_logprobs(
            hidden if rows is None else hidden.index_select(0, rows),
            weight,
            targets,
            bias=bias,
            scale=scale,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        return logp, stats if with_stats else None
    checks.no_tangents(hidden, weight, bias)
    outputs = registered.linear_logprobs(
        *(hidden, weight, bias, rows, targets, float(scale), float(softcap or 0.0), ignore_index),
        *(backend, memory_budget),
        *(_needs_grad(hidden), _needs_grad(weight), _needs_grad(bias), with_stats),
        group,
    )
    if not with_stats:
        return outputs[0], None
    entropy, lse, top1, logit_mean, log_sum_sq = outputs[1].unbind(0)
    return outputs[0], TokenStats(entropy, lse, top1 > 0.5, logit_mean, log_sum_sq)
