"""The extra term of label smoothing: how far the target's logit lies above the mean logit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref.backends.torch import add_target_rows_
from fastpref.library import differentiable, fake, op
from fastpref.linear import plan_for
from fastpref.operands import compute_dtype, row_slices
from fastpref.registered import refuse_second_derivative

# Tiles of logits alive at once: the product, its cap, and what the backward makes of them.
_BUFFERS = 4


def target_minus_mean_logit(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
) -> Tensor:
    """``z_y - mean_v(z_v)`` per token, differentiable, fp32 (float64 for float64), shape of
    ``targets``; 0 where the target is negative.

    Without a softcap the mean of the logits is one product with the mean of the weight. With one,
    the vocabulary is walked in tiles, again in the backward.
    """
    counted = targets >= 0
    rows, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if softcap is None:
        gap: Tensor = _target_logit(rows, weight, bias, y, float(scale), True)
        return gap.view(targets.shape)
    with torch.autocast(hidden.device.type, enabled=False):
        # nothing of the rows that do not count, NaN least of all
        rows = rows.masked_fill(~counted.reshape(-1, 1), 0.0)
        z_target: Tensor = _target_logit(rows, weight, bias, y, float(scale), False)
        mean: Tensor = _mean_capped_logit(
            *(rows.to(compute_dtype(rows.dtype)), weight, bias),
            *(float(scale), float(softcap), memory_budget),
        )
        gap = softcap * torch.tanh(z_target / softcap) - mean
        return gap.view(targets.shape).masked_fill(~counted, 0.0)


def _minus_mean(x: Tensor, minus_mean: bool) -> Tensor | float:
    """The mean over the vocabulary, in the compute dtype, if it is to be taken off; else 0."""
    return x.mean(0, dtype=compute_dtype(x.dtype)) if minus_mean else 0.0


@op("target_logit")
def _target_logit(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    minus_mean: bool,
) -> Tensor:
    """``scale * (hidden @ weight.T + bias)`` at the targets, less its mean over the vocabulary if
    asked for; 0 where the target is negative."""
    wide, y = compute_dtype(hidden.dtype), targets.clamp(min=0)
    center = _minus_mean(weight, minus_mean)
    z = hidden.new_empty(len(y), dtype=wide)
    for part in row_slices(len(y), hidden.shape[1] * wide.itemsize, hidden.device):
        z[part] = (weight[y[part]].to(wide) - center).mul_(hidden[part]).sum(1)
    if bias is not None:
        z += bias[y].to(wide) - _minus_mean(bias, minus_mean)
    return z.mul_(scale).masked_fill_(targets < 0, 0.0)


@fake(_target_logit)
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty((hidden.shape[0],), dtype=compute_dtype(hidden.dtype))


@op("target_logit_backward")
def _target_logit_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    minus_mean: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, and of weight and bias, which are empty where the head is frozen."""
    wide, y, v = grad.dtype, targets.clamp(min=0), weight.shape[0]
    factor = (scale * grad).masked_fill(targets < 0, 0.0)
    center = _minus_mean(weight, minus_mean)
    dhidden = hidden.new_empty(hidden.shape)
    dweight = weight.new_zeros((v if need_head else 0, weight.shape[1]), dtype=wide)
    for part in row_slices(len(y), hidden.shape[1] * wide.itemsize, hidden.device):
        rows = (weight[y[part]].to(wide) - center).mul_(factor[part, None])
        dhidden[part] = rows.masked_fill_((factor[part] == 0.0)[:, None], 0.0)
        if need_head:
            add_target_rows_(dweight, hidden[part], targets[part], factor[part], 0)
    dbias = factor.new_zeros(len(dweight))
    if need_head:
        dbias.index_put_((y,), factor, accumulate=True)
        if minus_mean:  # what the rows above were given, of every row of the head alike
            dweight -= dweight.sum(0).div_(v)
            dbias -= dbias.sum().div_(v)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


@fake(_target_logit_backward)
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    head = weight.shape if options[-1] else (0, weight.shape[1])
    return hidden.new_empty(hidden.shape), weight.new_empty(head), weight.new_empty(head[:1])


def _save_target(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.minus_mean = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_target(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_cross_entropy")
    needs = ctx.needs_input_grad[:3]
    found = _target_logit_backward(
        grad, *ctx.saved_tensors, ctx.scale, ctx.minus_mean, needs[1] or needs[2]
    )
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None, None


differentiable(_target_logit, _differentiate_target, _save_target)


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float, budget: Any
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, columns, the tile of the weight, and ``tanh(z / softcap)``: tile after tile."""
    p = plan_for(len(hidden), weight, None if budget is None else budget // _BUFFERS)
    for v0, v1 in p.tiles(weight.shape[0]):
        w = weight[v0:v1].to(hidden.dtype)
        for r0, r1 in p.chunks(hidden.shape[0]):
            z = hidden[r0:r1] @ w.t()
            if bias is not None:
                z += bias[v0:v1]
            yield slice(r0, r1), slice(v0, v1), w, z.mul_(scale / softcap).tanh_()


@op("mean_capped_logit")
def _mean_capped_logit(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    memory_budget: int | None,
) -> Tensor:
    """``(softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)).mean(1)``; hidden is fp32 or
    float64."""
    total = hidden.new_zeros(hidden.shape[0])
    for rows, _, _, t in _tiles(hidden, weight, bias, scale, softcap, memory_budget):
        total[rows] += t.sum(1)
    return total.mul_(softcap / weight.shape[0])


@fake(_mean_capped_logit)
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty((hidden.shape[0],))


@op("mean_capped_logit_backward")
def _gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    memory_budget: int | None,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, and of weight and bias, which are empty where the head is frozen."""
    head = weight.shape if need_head else (0, weight.shape[1])
    dhidden, dweight, dbias = (hidden.new_zeros(s) for s in (hidden.shape, head, head[:1]))
    factor = (grad * (scale / weight.shape[0]))[:, None]
    for rows, columns, w, t in _tiles(hidden, weight, bias, scale, softcap, memory_budget):
        slope = t.square_().neg_().add_(1.0).mul_(factor[rows])
        dhidden[rows].addmm_(slope, w)
        if need_head:
            dweight[columns].addmm_(slope.t(), hidden[rows])
            dbias[columns] += slope.sum(0)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


@fake(_gradients)
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    head = weight.shape if options[-1] else (0, weight.shape[1])
    return torch.empty_like(hidden), weight.new_empty(head), weight.new_empty(head[:1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_cross_entropy")
    _, need_weight, need_bias, *_ = ctx.needs_input_grad
    need_head = need_weight or need_bias
    dhidden, dweight, dbias = _gradients(grad, *ctx.saved_tensors, *ctx.options, need_head)
    head = (dweight if need_weight else None, dbias if need_bias else None)
    return dhidden, *head, None, None, None


differentiable(_mean_capped_logit, _differentiate, _save)
