"""The public ops: check the arguments, choose the backend, call one registered op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import checks, reference, registered
from fastpref.projection import checked_logprobs
from fastpref.reference import TokenStats
from fastpref.smoothing import target_minus_mean_logit

TORCH_NAMES = checks.Names("input", "linear_weight", "target", "linear_bias")
"""What ``torch.nn.functional.linear_cross_entropy`` calls the arguments of a projection."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    rows: Tensor | None = None,
    return_stats: bool = False,
    backend: str = "auto",
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Log-probability, in nats, that a language-model head gives to each target, without storing
    the logits.

    Equals, with ``cap(z) = softcap * tanh(z / softcap)``::

        z = cap(scale * (hidden @ weight.T + bias)).float()
        z.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Args:
        hidden: Last hidden states. Shape ``(..., H)``; fp32, bf16, fp16 or float64.
        weight: The head. Shape ``(V, H)``, dtype of ``hidden``; may be the tied embedding.
        targets: Token ids in ``[0, V)`` or ``ignore_index``. Shape ``(...)``, int64.
        bias: Added to the product. Shape ``(V,)``, dtype of ``hidden``.
        scale: Multiplies the product and bias (logit scale, inverse temperature).
        softcap: Soft cap of the logits, positive (Gemma 2: 30); None for none.
        ignore_index: A target that is not scored: result 0, gradient 0.
        rows: Index of the rows to project, out of the flattened leading dimensions; the others give
            0. Shape ``(n,)``, int64, each at most once. Saves finding them on the device.
        return_stats: Also return :class:`TokenStats`, from the same pass.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"``, ``"torch"``, or ``"reference"``,
            which materialises the logits.
        memory_budget: Bytes for tiles of logits and for E kept for the backward of a trainable
            head. Default 1 GiB on CUDA, 256 MiB on CPU; 0 takes the smallest tiles and recomputes
            everything.
        process_group: A ``torch.distributed`` group over which the head is sharded: ``weight`` and
            ``bias`` are this rank's slice of the vocabulary, in rank order; hidden, targets (global
            ids) and the result are the same on every rank. Two collectives per chunk of rows; one a
            pass for the sizes of the slices, which the host reads.

    Returns:
        Log-probabilities of the shape of ``targets``, each <= 0; fp32, float64 for float64 inputs.
        With ``return_stats`` a tuple of them and the statistics.

    Raises:
        ValueError: Shapes or devices disagree, or (on CPU) a target or row is out of range. On CUDA
            such a target gives NaN in its row alone; with ``FASTPREF_DEBUG=1`` a device assertion.
            Under ``torch.compile`` ``rows`` are checked as the graph runs: a ``RuntimeError``.
        TypeError: Wrong dtype. Outside autocast mixed dtypes are an error; under autocast all go to
            its dtype.
        RuntimeError: The backend is missing; or the result is differentiated twice.

    Numerics:
        Logits and sums are fp32 for every input dtype. The target's column is kept out of the sum,
        so that ``1 - p`` of a confident token is exact to fp32 rounding. Deterministic. A trainable
        head holds ``dlogp/dhidden`` and what fits the budget of E until its backward; without
        gradients nothing is held.

    Source:
        The online softmax is Milakov and Gimelshein, arXiv:1805.02867; the schedule is described in
        ``docs/decisions.md``.
    """
    hidden, weight, bias = checks.projection(hidden, weight, targets, bias, rows)
    checks.check_options(softcap, memory_budget, process_group, backend, scale, ignore_index)
    logp, stats = checked_logprobs(
        *(hidden, weight, targets, bias, rows, scale, softcap, ignore_index),
        *(return_stats, backend, memory_budget, process_group),
    )
    return logp if stats is None else (logp, stats)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    rows: Tensor | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """Cross-entropy of a linear head, in nats, without storing the logits.

    Equals ``F.cross_entropy(cap(scale * F.linear(input, linear_weight,
    linear_bias)).float().flatten(0, -2), target.flatten(), ignore_index=..., reduction=...,
    label_smoothing=...)``, except that the mean over no rows is 0, not NaN.

    Args:
        input: As ``hidden`` of :func:`linear_logprobs`. Shape ``(..., H)``.
        linear_weight: Shape ``(V, H)``.
        target: Shape ``(...)``, int64.
        linear_bias: Shape ``(V,)``.
        scale: Multiplies the logits.
        softcap: Soft cap of the logits, or None.
        ignore_index: A target that is left out of loss and mean.
        reduction: ``"mean"`` over rows that count, ``"sum"``, or ``"none"`` (shape of ``target``).
        label_smoothing: Weight in [0, 1] of the uniform distribution. Costs one product with the
            mean of the weight; with a softcap a further pass over the vocabulary.
        rows: As in :func:`linear_logprobs`.
        backend: As in :func:`linear_logprobs`.
        memory_budget: As in :func:`linear_logprobs`.
        process_group: As in :func:`linear_logprobs`.

    Returns:
        fp32 (float64 for float64): a scalar, or the shape of ``target`` with 0 in ignored rows.

    Raises:
        ValueError: Unknown reduction, ``label_smoothing`` outside [0, 1], or as
            :func:`linear_logprobs`.
        TypeError: As :func:`linear_logprobs`.

    Numerics:
        With label smoothing the loss is ``-logp + label_smoothing * (z_y - mean(z))``; both terms
        fp32.

    Source:
        Signature of ``torch.nn.functional.linear_cross_entropy``; smoothing: Szegedy et al.,
        arXiv:1512.00567.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if label_smoothing and process_group is not None:
        raise ValueError("label_smoothing needs the whole weight: pass process_group=None, or 0")
    hidden, weight, bias = checks.projection(
        input, linear_weight, target, linear_bias, rows, TORCH_NAMES
    )
    checks.check_options(softcap, memory_budget, process_group, backend, scale, ignore_index)
    logp, _ = checked_logprobs(
        *(hidden, weight, target, bias, rows, scale, softcap, ignore_index),
        *(False, backend, memory_budget, process_group),
    )
    loss = -logp
    counted = _counted(target, ignore_index, rows)
    if label_smoothing:
        gap = target_minus_mean_logit(
            *(hidden, weight, bias, target.masked_fill(~counted, -1), scale, softcap, memory_budget)
        )
        loss = loss + label_smoothing * gap
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / counted.sum().clamp(min=1) if reduction == "mean" else total


def _counted(targets: Tensor, ignore_index: int, rows: Tensor | None) -> Tensor:
    """Which targets are scored: not ignored, and listed where rows are."""
    counted = targets != ignore_index
    if rows is None:
        return counted
    listed = torch.zeros_like(targets, dtype=torch.bool).view(-1).index_fill(0, rows, True)
    return counted & listed.view(targets.shape)


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum of ``values`` over each sequence of a packed batch.

    Equals ``torch.stack([values[a:b].sum() for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])])``.

    Args:
        values: Per-token numbers. Shape ``(n,)``; fp32 or float64.
        cu_seqlens: Sequence boundaries from 0 to n. Shape ``(num_sequences + 1,)``, int32.
        backend: As in :func:`linear_logprobs`.

    Returns:
        Shape ``(num_sequences,)``, dtype of ``values``; an empty sequence gives 0. Differentiable
        in ``values``.

    Raises:
        ValueError: ``cu_seqlens`` does not cover ``values`` (checked on CPU; by a compiled graph as
            it runs: a ``RuntimeError``).
        TypeError: Wrong dtype.

    Numerics:
        Accumulates in float64; deterministic; no host sync on CUDA.
    """
    checks.tensors(values=values, cu_seqlens=cu_seqlens)
    if values.dtype not in (torch.float32, torch.float64) or values.dim() != 1:
        raise TypeError(
            f"values: expected a 1-D fp32 or float64 tensor, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    checks.check_cu_seqlens(cu_seqlens, values.shape[0])
    if backend == "reference":
        return reference.segment_sum(values, cu_seqlens)
    checks.no_tangents(values)
    total: Tensor = registered.sequence_sum(values, cu_seqlens.contiguous(), backend)
    return total


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: str = "sum",
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Log-probability of each sequence of a packed batch, in nats.

    Equals ``segment_sum(token_weights * linear_logprobs(hidden, weight, targets), cu_seqlens)``;
    with ``reduction="mean"`` divided by the sequence's number of targets that are scored: not
    ``ignore_index``, and listed in ``rows`` if given.

    Args:
        hidden: Shape ``(n, H)``: the tokens of all sequences, one after the other.
        weight: Shape ``(V, H)``.
        targets: Shape ``(n,)``, int64.
        cu_seqlens: Sequence boundaries from 0 to n. Shape ``(num_sequences + 1,)``, int32.
        reduction: ``"sum"`` or ``"mean"``.
        token_weights: Multiplies each token's log-probability; not part of the mean's denominator.
            Shape ``(n,)``.
        ignore_index: As in :func:`linear_logprobs`.
        backend: As in :func:`linear_logprobs`.
        **options: ``bias``, ``scale``, ``softcap``, ``rows``, ``memory_budget`` of
        :func:`linear_logprobs`.

    Returns:
        Shape ``(num_sequences,)``, fp32 (float64 for float64); an empty sequence gives 0.

    Raises:
        ValueError: Unknown reduction, shapes disagree, or as :func:`linear_logprobs`.
        TypeError: As :func:`linear_logprobs`, or an option it does not know.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: expected 'sum' or 'mean'")
    if "return_stats" in options:
        raise TypeError(
            "sequence_logprobs has no return_stats; call linear_logprobs and segment_sum"
        )
    checks.tensors(targets=targets, cu_seqlens=cu_seqlens)
    if targets.dim() != 1:
        raise ValueError(f"targets: expected shape (n,), got {tuple(targets.shape)}")
    checks.check_cu_seqlens(cu_seqlens, targets.shape[0])
    logps = linear_logprobs(
        hidden, weight, targets, ignore_index=ignore_index, backend=backend, **options
    )
    assert isinstance(logps, Tensor)
    if token_weights is not None:
        checks.check_token_weights(token_weights, targets)
        logps = logps * token_weights.to(logps.dtype)
    total = segment_sum(logps, cu_seqlens, backend=backend)
    if reduction == "sum":
        return total
    counted = _counted(targets, ignore_index, options.get("rows")).to(total.dtype)
    return total / segment_sum(counted, cu_seqlens, backend=backend).clamp(min=1.0)


def preference_margins(
    logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Margin and log-ratios of preference pairs, from the per-token log-probabilities of policy and
    reference.

    Equals, with ``ratios = segment_sum(logps - ref_logps, cu_seqlens)``:
    ``ratios[pairs[:, 0]] - ratios[pairs[:, 1]], ratios[pairs[:, 0]], ratios[pairs[:, 1]]``.

    Args:
        logps: Policy. Shape ``(n_tokens,)``; fp32 or float64.
        ref_logps: Reference. Shape and dtype of ``logps``.
        cu_seqlens: Sequence boundaries from 0 to n_tokens. Shape ``(num_sequences + 1,)``, int32.
        pairs: Sequence index of chosen and rejected; a sequence may be in several pairs. Shape
            ``(P, 2)``, int64.
        backend: As in :func:`linear_logprobs`.

    Returns:
        Margins, chosen log-ratios and rejected log-ratios, each ``(P,)``, dtype of ``logps``.

    Raises:
        ValueError: Shapes disagree, or (on CPU; by a compiled graph as it runs: a
            ``RuntimeError``) an index is out of range.
        TypeError: Wrong dtype.

    Numerics:
        Differences and sums are taken in float64, so that equal log-probabilities give a margin of
        exactly 0. Deterministic; one kernel forward and one backward.

    Source:
        The implicit reward of Rafailov et al., arXiv:2305.18290, equation 5, divided by beta.
    """
    checks.check_margins(logps, ref_logps, cu_seqlens, pairs)
    if backend == "reference":
        return reference.preference_margins(logps, ref_logps, cu_seqlens, pairs)
    checks.no_tangents(logps, ref_logps)
    margins, chosen, rejected = registered.preference_margins(
        logps, ref_logps, cu_seqlens.contiguous(), pairs.contiguous(), backend
    ).unbind(0)
    return margins, chosen, rejected
