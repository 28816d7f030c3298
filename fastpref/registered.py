"""The registered ops: schema, implementation, fake and autograd of each; nothing here checks
arguments for people.

Each forward's gradient is one registered op that has no gradient of its own, so that
differentiating twice is an error and never a wrong number.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastpref import backends, linear
from fastpref.library import differentiable, fake, op
from fastpref.linear import Problem, Saved
from fastpref.operands import Rows, compute_dtype
from fastpref.parallel import Shard


def _debug() -> bool:
    return os.environ.get("FASTPREF_DEBUG") == "1"


def check_range(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Reject targets outside the vocabulary: always on CPU, by a device assertion on CUDA if
    debugging."""
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if targets.device.type == "cpu":
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"target out of range: of the rows that are projected, row {row} holds "
                f"{int(targets[row])}, expected an index in [0, {vocab_size}) or "
                f"ignore_index={ignore_index}. Check the tokenizer against the rows of the weight."
            )
    elif _debug():
        torch._assert_async(~bad.any(), "fastpref: a target is outside the vocabulary")


@op("linear_logprobs")
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
    memory_budget: int | None,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
    with_stats: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, statistics, and the four tensors of :class:`fastpref.linear.Saved`, of
    the rows of hidden that ``rows`` lists, or of all; ``targets`` are theirs."""
    shard = Shard.of(group, weight)
    check_range(targets, shard.vocab_size if shard else weight.shape[0], ignore_index)
    problem = Problem(
        *(scale, softcap, ignore_index, backend, memory_budget),
        *(need_hidden_grad, need_weight_grad, need_bias_grad, with_stats, group),
    )
    logp, stats, saved = linear.forward(Rows(hidden, rows), weight, bias, targets, problem)
    return (logp, stats, *saved)


@fake(linear_logprobs)
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
    memory_budget: int | None,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
    with_stats: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(
        *(scale, softcap, ignore_index, backend, memory_budget),
        *(need_hidden_grad, need_weight_grad, need_bias_grad, with_stats, group),
    )
    n, dtype = targets.shape[0], compute_dtype(hidden.dtype)
    p = linear.plan_for(n, weight, memory_budget)
    shapes = linear.saved_shapes(n, weight.shape[0], weight.shape[1], p, problem)
    unit, factors, offsets, kept = shapes
    return (
        hidden.new_empty((n,), dtype=dtype),
        hidden.new_empty((5, n if with_stats else 0), dtype=dtype),
        hidden.new_empty(unit),
        hidden.new_empty(factors, dtype=dtype),
        hidden.new_empty(offsets, dtype=dtype),
        hidden.new_empty(kept),
    )


@op("linear_logprobs_backward")
def linear_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    unit_grad: Tensor,
    factors: Tensor,
    offsets: Tensor,
    kept: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
    memory_budget: int | None,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all of hidden, weight and bias; an empty tensor where none is needed."""
    problem = Problem(
        *(scale, softcap, ignore_index, backend, memory_budget),
        *(need_hidden_grad, need_weight_grad, need_bias_grad, False, group),
    )
    saved = Saved(unit_grad, factors, offsets, kept)
    return linear.backward(grad, Rows(hidden, rows), weight, bias, targets, saved, problem)


@fake(linear_logprobs_backward)
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    targets: Tensor,
    unit_grad: Tensor,
    factors: Tensor,
    offsets: Tensor,
    kept: Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
    memory_budget: int | None,
    need_hidden_grad: bool,
    need_weight_grad: bool,
    need_bias_grad: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    v, size = weight.shape
    return (
        hidden.new_empty((hidden if need_hidden_grad else unit_grad).shape),
        weight.new_empty((v if need_weight_grad else 0, size)),
        weight.new_empty((v if need_bias_grad else 0,)),
    )


def refuse_second_derivative(name: str) -> None:
    """Raise if a backward runs for the sake of a second derivative."""
    # The engine enables grad mode in a backward only for create_graph=True.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"fastpref.{name} cannot be differentiated twice: create_graph=True, double backward "
            "and torch.func.grad are not supported. Use backend='reference' where second "
            "derivatives are needed."
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, rows, targets, *options = inputs
    *_, need_weight_grad, need_bias_grad, _, _ = options
    if not need_weight_grad and not need_bias_grad:
        hidden = hidden.new_empty(1).expand(hidden.shape)  # of it the backward needs the shape
    _, stats, *saved = output
    ctx.mark_non_differentiable(stats, *saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, rows, targets, *saved)
    *ctx.options, _, ctx.group = options


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_logprobs")
    needs = ctx.options[-3:]
    none = (None,) * (5 + len(ctx.options) + 2)
    if grad is None:
        return none
    gradients = linear_logprobs_backward(grad, *ctx.saved_tensors, *ctx.options, ctx.group)
    picked = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*picked, *none[3:])


differentiable(linear_logprobs, _differentiate, _save)


# --- sums over sequences
# ---------------------------------------------------------------------------------------------


@op("sequence_sum")
def sequence_sum(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    """Sum of ``values (n,)`` over each ``[cu_seqlens[i], cu_seqlens[i + 1])``."""
    return backends.select(backend, values).segment_sum(values.contiguous(), cu_seqlens)


@fake(sequence_sum)
def _(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return values.new_empty((cu_seqlens.shape[0] - 1,))


@op("sequence_sum_backward")
def sequence_sum_backward(grad: Tensor, cu_seqlens: Tensor, n: int, backend: str) -> Tensor:
    """``grad (S,)`` repeated over its sequence."""
    kernels = backends.select(backend, grad)
    return kernels.segment_sum_backward(grad.contiguous(), cu_seqlens, n)


@fake(sequence_sum_backward)
def _(grad: Tensor, cu_seqlens: Tensor, n: int, backend: str) -> Tensor:
    return grad.new_empty((n,))


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens, ctx.backend = inputs
    ctx.n = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _differentiate_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("sequence_logprobs")
    (cu_seqlens,) = ctx.saved_tensors
    return sequence_sum_backward(grad, cu_seqlens, ctx.n, ctx.backend), None, None


differentiable(sequence_sum, _differentiate_sum, _save_sum)


@op("preference_margins")
def preference_margins(
    logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor, backend: str
) -> Tensor:
    """``(3, P)``: margin, chosen log-ratio, rejected log-ratio."""
    kernels = backends.select(backend, logps)
    return kernels.pair_margins(logps.contiguous(), ref_logps.contiguous(), cu_seqlens, pairs)


@fake(preference_margins)
def _(logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor, backend: str) -> Tensor:
    return logps.new_empty((3, pairs.shape[0]))


@op("preference_margins_backward")
def preference_margins_backward(
    grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int, backend: str
) -> Tensor:
    """Gradient of the margins in ``logps``, ``(n,)``."""
    kernels = backends.select(backend, grad)
    return kernels.pair_margins_backward(grad.contiguous(), cu_seqlens, pairs, n)


@fake(preference_margins_backward)
def _(grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int, backend: str) -> Tensor:
    return grad.new_empty((n,))


def _save_margins(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logps, _, cu_seqlens, pairs, ctx.backend = inputs
    ctx.n = logps.shape[0]
    ctx.save_for_backward(cu_seqlens, pairs)


def _differentiate_margins(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("preference_margins")
    cu_seqlens, pairs = ctx.saved_tensors
    dlogps = preference_margins_backward(grad, cu_seqlens, pairs, ctx.n, ctx.backend)
    return dlogps, -dlogps if ctx.needs_input_grad[1] else None, None, None, None


differentiable(preference_margins, _differentiate_margins, _save_margins)
