"""`linear_token_kl`: KL(reference || policy) per token over the vocabulary, a chunk of rows at a
time.

The gradient in the policy's logits is ``p_policy - p_reference``, so ``dKL/dhidden`` is formed in
the forward while the chunk's logits are there; the backward scales it, and recomputes chunks for
the gradient of a trainable head. The products are those of ``fastpref.linear``; the row kernels see
one head and are of no use here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import checks
from fastpref.library import differentiable, fake, op
from fastpref.operands import compute_dtype, mm, multiplies_low
from fastpref.registered import refuse_second_derivative
from fastpref.schedule import DEFAULT_BUDGET

REF_NAMES = checks.Names("ref_hidden", "ref_weight", "hidden's rows", "ref_bias")
_SLICE = 4096
# Chunk-sized fp32 buffers alive at once: logits, both log-softmaxes, and what a KL makes of them.
_BUFFERS = 7


def _rows(vocab_size: int, dtype: torch.dtype, device: str, memory_budget: int | None) -> int:
    """Rows of a chunk whose logits fit the budget."""
    budget = DEFAULT_BUDGET["cpu" if device == "cpu" else "cuda"]
    budget = budget if memory_budget is None else memory_budget
    return max(16, budget // (_BUFFERS * vocab_size * compute_dtype(dtype).itemsize))


def _operand(x: Tensor) -> Tensor:
    """As the products take it: on a CPU converted to fp32 (float64)."""
    return x if multiplies_low(x.dtype, x.device) else x.to(compute_dtype(x.dtype))


def _slices(weight: Tensor) -> list[slice]:
    """Parts of the vocabulary that are converted, and multiplied, at a time."""
    size = weight.shape[0] if _operand(weight[:0]).dtype == weight.dtype else _SLICE
    return [slice(v, v + size) for v in range(0, weight.shape[0], size)]


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float) -> Tensor:
    x = _operand(x)
    z = x.new_empty((x.shape[0], weight.shape[0]), dtype=compute_dtype(x.dtype))
    for part in _slices(weight):
        mm(z[:, part], x, _operand(weight[part]).t())
    z = (z if bias is None else z.add_(bias)).mul_(scale)
    return z.div_(cap).tanh_().mul_(cap) if cap else z


def _chunk(
    policy: tuple[Tensor, Tensor, Tensor | None, float, float],
    reference: tuple[Tensor, Tensor, Tensor | None, float, float],
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """KL of a chunk of rows, and its gradient in the raw product ``hidden @ weight.T + bias``."""
    z = _logits(*policy)
    log_p, log_r = z.log_softmax(-1), _logits(*reference).log_softmax(-1)
    r = log_r.exp()
    # a token the reference rules out adds nothing, whatever the policy thinks of it
    kl = torch.where(r == 0.0, 0.0, r * (log_r - log_p)).sum(-1)
    if not with_grad:
        return kl, kl
    grad = log_p.exp().sub_(r)
    *_, scale, cap = policy
    if cap:
        grad.mul_(z.div_(cap).square_().neg_().add_(1.0))
    return kl, grad.mul_(scale)


@op("linear_token_kl")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    memory_budget: int | None,
    need_hidden_grad: bool,
) -> tuple[Tensor, Tensor]:
    n, wide = hidden.shape[0], compute_dtype(hidden.dtype)
    kl = hidden.new_empty((n,), dtype=wide)
    unit = hidden.new_empty((n if need_hidden_grad else 0, hidden.shape[1]))
    step = _rows(weight.shape[0], hidden.dtype, hidden.device.type, memory_budget)
    for a in range(0, n, step):
        rows = slice(a, a + step)
        policy = (hidden[rows], weight, bias, scale, softcap)
        reference = (ref_hidden[rows], ref_weight, ref_bias, ref_scale, ref_softcap)
        kl[rows], grad = _chunk(policy, reference, need_hidden_grad)
        if need_hidden_grad:
            total = grad.new_empty((grad.shape[0], hidden.shape[1]))
            for i, part in enumerate(_slices(weight)):
                w = _operand(weight[part])
                mm(total, grad[:, part].to(w.dtype), w, accumulate=i > 0)
            unit[rows] = total
    return kl, unit


@fake(_forward)
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    return (
        hidden.new_empty((n,), dtype=compute_dtype(hidden.dtype)),
        hidden.new_empty((n if rest[-1] else 0, hidden.shape[1])),
    )


@op("linear_token_kl_backward")
def _head_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor]:
    n, wide = hidden.shape[0], compute_dtype(hidden.dtype)
    dweight = hidden.new_empty(weight.shape, dtype=wide)
    dbias = dweight.new_zeros(weight.shape[0])
    step = _rows(weight.shape[0], hidden.dtype, hidden.device.type, memory_budget)
    for a in range(0, n, step):
        rows = slice(a, a + step)
        policy = (hidden[rows], weight, bias, scale, softcap)
        reference = (ref_hidden[rows], ref_weight, ref_bias, ref_scale, ref_softcap)
        _, dz = _chunk(policy, reference, True)
        dz.mul_(grad[rows, None])
        h = _operand(hidden[rows])
        mm(dweight, dz.t().to(h.dtype), h, accumulate=a > 0)
        dbias.add_(dz.sum(0))
    if n == 0:
        dweight.zero_()
    return dweight.to(weight.dtype), dbias.to(weight.dtype)


@fake(_head_gradients)
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty((weight.shape[0],))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.options = inputs[6:-1]


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_token_kl")
    *inputs, unit = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    dhidden = (unit * grad[:, None]).to(unit.dtype) if need_hidden else None
    dweight = dbias = None
    if need_weight or need_bias:
        dweight, dbias = _head_gradients(grad, *inputs, *ctx.options)
    return dhidden, dweight if need_weight else None, dbias if need_bias else None, *(None,) * 9


differentiable(_forward, _differentiate, _save)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_scale: float | None = None,
    ref_softcap: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """KL(reference || policy) of the next-token distributions, in nats, without ``[tokens,
    vocab]``.

    Equals, with ``log_p`` and ``log_r`` the log-softmax of the policy's and the reference's logits,
    ``(log_r.exp() * (log_r - log_p)).sum(-1)``.

    Args:
        hidden: The policy's last hidden states. Shape ``(..., H)``; fp32, bf16, fp16 or float64.
        weight: The policy's head. Shape ``(V, H)``.
        ref_hidden: The reference's hidden states. Shape ``(..., H_ref)``, leading shape of
            ``hidden``.
        ref_weight: The reference's head. Shape ``(V, H_ref)``.
        bias: The policy's bias. Shape ``(V,)``.
        ref_bias: The reference's bias. Shape ``(V,)``.
        scale: Multiplies the policy's logits.
        softcap: Soft cap of the policy's logits, or None.
        ref_scale: Multiplies the reference's logits; None takes ``scale``.
        ref_softcap: Soft cap of the reference's logits; None takes ``softcap``.
        memory_budget: Bytes for the logits of a chunk of rows. Default 1 GiB on CUDA, 256 MiB on
            CPU.

    Returns:
        Shape ``(...)``, fp32 (float64 for float64), each >= 0 up to rounding. Differentiable in
        ``hidden``, ``weight`` and ``bias``; the reference gets no gradient.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: Wrong or mixed dtypes.
        RuntimeError: The result is differentiated twice.

    Numerics:
        Logits are fp32. Equal policy and reference give exactly 0. ``dKL/dhidden`` is held until
        the backward; a trainable head recomputes its chunks there.

    Source:
        Zeng et al., Token-level Direct Preference Optimization, arXiv:2404.11999, equation 6.
    """
    token = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    hidden, weight, bias = checks.projection(hidden, weight, token, bias)
    ref_hidden, ref_weight, ref_bias = checks.projection(
        ref_hidden, ref_weight, token, ref_bias, names=REF_NAMES
    )
    for cap in (softcap, ref_softcap):
        checks.check_options(cap, memory_budget)
    checks.no_tangents(hidden, weight, bias)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected {weight.shape[0]} rows as weight, got {ref_weight.shape[0]}: "
            "the two models must share a vocabulary"
        )
    kl, _ = _forward(
        *(hidden.reshape(-1, hidden.shape[-1]), weight, bias),
        *(ref_hidden.reshape(-1, ref_hidden.shape[-1]), ref_weight, ref_bias),
        *(float(scale), float(softcap or 0.0)),
        float(scale if ref_scale is None else ref_scale),
        float((softcap if ref_softcap is None else ref_softcap) or 0.0),
        memory_budget,
        hidden.requires_grad and torch.is_grad_enabled(),
    )
    result: Tensor = kl.view(hidden.shape[:-1])
    return result
