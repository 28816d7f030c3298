"""Before training: is what the fused head and the packed rows give what the model itself gives?

Three comparisons on a few tokens of the first examples: the fused log-probabilities with those from
the model's own logits, in fp32; packed rows with one sequence at a time; and, where the reference
is the policy's own start, policy with reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.data.formats import response_names
from fastpref.heads import causal_lm, evaluating
from fastpref.policy import Batch, model_inputs, response_logps
from fastpref.reference_policy import Reference

logger = logging.getLogger("fastpref")

PROMPT_TOKENS, RESPONSE_TOKENS = 48, 16
PACKED_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.03}
"""Mean difference, nats, that another order of summation may make; else 0.15 (bf16)."""


def shorten(example: Mapping[str, Any], responses: Sequence[str]) -> dict[str, Any]:
    """The example with the end of its prompt, the beginning of its responses, and no scores."""
    short = {name: value for name, value in example.items() if not name.startswith("ref_")}
    for name in ("prompt_ids", *(f"{name}_prompt_ids" for name in responses)):
        if name in short:
            short[name] = short[name][-PROMPT_TOKENS:]
    for name in responses:
        for column in (f"{name}_ids", f"{name}_mask"):
            if column in short:
                short[column] = short[column][:RESPONSE_TOKENS]
    return short


class PackingError(RuntimeError):
    """A model gives other numbers, or none, to packed rows."""


def check_or_unpack(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Batch],
    responses: Sequence[str],
    collator: Any,
    **options: Any,
) -> None:
    """:func:`check_policy`; a model that cannot read packed rows gets, from here on, a row for each
    sequence.

    Args:
        model: As in :func:`check_policy`.
        examples: As in :func:`check_policy`.
        collate: As in :func:`check_policy`.
        responses: As in :func:`check_policy`.
        collator: The :class:`fastpref.batches.TrainerCollator` behind ``collate``.
        **options: As in :func:`check_policy`.

    Raises:
        FloatingPointError: As :func:`check_policy`.
        RuntimeError: As :func:`check_policy`.
    """
    try:
        check_policy(model, examples, collate, responses, **options)
    except PackingError as error:
        if not collator.packed:
            raise
        logger.warning("%s Each sequence gets a row of its own.", error)
        collator.unpack()
        check_policy(model, examples, collate, responses, **options)


def check_rows(
    model: nn.Module, rows: Any, collator: Any, accelerator: Any, kind: str, **options: Any
) -> None:
    """:func:`check_or_unpack` on the first rows of a dataset of token ids.

    Args:
        model: On its device.
        rows: A ``datasets.Dataset``.
        collator: A :class:`fastpref.batches.TrainerCollator`.
        accelerator: accelerate's.
        kind: Of the rows.
        **options: As in :func:`check_policy`.

    Raises:
        FloatingPointError: As :func:`check_policy`.
        RuntimeError: As :func:`check_policy`.
    """
    names = response_names(rows.column_names, kind)
    examples = [shorten(row, names) for row in rows.select(range(min(2, len(rows))))]

    def collate(rows: list[Any]) -> Any:
        batch = collator(rows)
        return {k: v.to(accelerator.device) if hasattr(v, "to") else v for k, v in batch.items()}

    with accelerator.autocast():
        check_or_unpack(model, examples, collate, names, collator, **options)


@torch.no_grad()
def check_policy(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], Batch],
    responses: Sequence[str],
    **options: Any,
) -> None:
    """Compare the fused log-probabilities of a few examples with the model's own.

    Args:
        model: As wrapped for training.
        examples: Rows of token ids; short ones (:func:`shorten`).
        collate: The collator, its batch moved to the model's device.
        responses: Names of the responses, in the order of the batch's sequences.
        **options: ``backend`` and ``memory_budget`` of the head.

    Raises:
        FloatingPointError: The model's own numbers are not finite.
        RuntimeError: They differ by more than rounding; the message shows both numbers.
        PackingError: They differ because the model does not follow the mask of packed rows.
    """
    batch = collate(list(examples))
    targets = batch["response_targets"]
    name = type(causal_lm(model)).__name__
    layers = getattr(causal_lm(model).config, "attention_layers", None) or ()
    mask = batch.get("attention_mask")
    if "local" in layers and (mask is None or mask.dim() != 2):
        # GPT-Neo's: by the place in the row, which the check's short rows would not show
        raise PackingError(f"self-check: {name} has windows that cannot follow packed rows")
    with evaluating(model):
        try:
            logits = model(**model_inputs(model, batch)).logits
        except Exception as error:
            raise PackingError(f"self-check: {name} cannot read packed rows: {error}") from error
        fused = response_logps(model, batch, **options).logps
        own = _gather(logits.flatten(0, -2)[batch["response_rows"]], targets)
        one_by_one = [
            _alone(model, e.get(f"{r}_prompt_ids", e["prompt_ids"]), e[f"{r}_ids"], batch)
            for r in responses
            for e in examples
        ]
    dtype, words = _dtype(logits), _Words(targets, fused)
    if not own.isfinite().all():
        raise FloatingPointError(_not_finite(model, targets, own, dtype))
    allowed = 2e-4 + 2 * _epsilon(logits) * float(logits.abs().max())
    difference = (fused - own).abs()
    if not float(difference.max()) <= allowed:
        raise RuntimeError(
            f"self-check: the fused head does not give what {name} itself gives. "
            f"{words(difference, own, 'from the model itself', 'fused')}; they may differ by "
            f"{allowed:.6f} in {dtype}. Something between the last hidden state and the logits is "
            "not a plain linear layer with a scale or a soft cap: a custom head, a hook, a patched "
            "forward. Remove it, or train this model with another library; self_check=False only "
            "silences this message."
        )
    alone = torch.cat(one_by_one)  # without prompts, which may come last
    difference = (fused[: len(alone)] - alone).abs() * (targets[: len(alone)] >= 0)
    allowed = max(PACKED_TOLERANCE.get(dtype, 0.15), 10 * _epsilon(logits))
    if not float(difference.mean()) <= allowed:
        raise PackingError(
            f"self-check: {name} gives other numbers to packed rows than to one sequence at a "
            f"time. {words(difference, alone, 'alone', 'packed')}; the mean difference is "
            f"{float(difference.mean()):.6f}, allowed {allowed:.6f} in {dtype}. Some of its layers "
            "do not follow an attention mask or position ids (state space, linear attention, "
            "ALiBi). Try attn_implementation='sdpa' or 'eager', or packing=False."
        )


def _not_finite(model: nn.Module, targets: Tensor, own: Tensor, dtype: torch.dtype) -> str:
    """What to say of a model that gives no numbers."""
    name = type(causal_lm(model)).__name__
    worst = int((~own.isfinite()).nonzero()[0])
    found = f"token id {int(targets[worst])} gets the log-probability {float(own[worst])}"
    bad = [
        f"{key} ({int((~weight.isfinite()).sum())} of {weight.numel()})"
        for key, weight in model.named_parameters()
        if not weight.isfinite().all()
    ]
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        return (
            f"self-check: the weights of {name} are not finite before training: there is NaN or "
            f"inf in {', '.join(bad[:3])}{more}; {found}. The checkpoint is damaged, or its "
            "training diverged, or it overflowed when it was converted: load another one."
        )
    return (
        f"self-check: all weights of {name} are finite, but in {dtype} its log-probabilities are "
        f"not: {found}. Something overflows on the way, or the model rules this token out: try "
        "float32 or bfloat16, and check that the tokenizer is the model's."
    )


class _Words:
    """The token where two numbers differ most, in words."""

    def __init__(self, targets: Tensor, ours: Tensor) -> None:
        """See the class."""
        self.targets, self.ours = targets, ours

    def __call__(self, difference: Tensor, theirs: Tensor, source: str, our_source: str) -> str:
        worst = int(difference.nan_to_num(nan=torch.inf).argmax())
        return (
            f"Log-probability of token id {int(self.targets[worst])}: {float(theirs[worst]):.6f} "
            f"{source}, {float(self.ours[worst]):.6f} {our_source}"
        )


def _alone(model: nn.Module, prompt: list[int], response: list[int], batch: Batch) -> Tensor:
    """Log-probabilities of a response from an ordinary forward of its sequence."""
    ids = torch.tensor([[*prompt, *response]], device=batch["input_ids"].device)
    first = max(len(prompt), 1)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return _gather(logits[first - 1 : -1], ids[0, first:])


def _gather(logits: Tensor, targets: Tensor) -> Tensor:
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    found = logps.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return found.where(targets >= 0, 0.0)


def _dtype(logits: Tensor) -> torch.dtype:
    """The precision that logits were computed in."""
    if logits.dtype == torch.float32 and torch.is_autocast_enabled(logits.device.type):
        return torch.get_autocast_dtype(logits.device.type)
    return logits.dtype


def _epsilon(logits: Tensor) -> float:
    epsilon = torch.finfo(_dtype(logits)).eps
    tf32 = logits.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return max(epsilon, 2.0**-10) if tf32 else epsilon


@torch.no_grad()
def check_reference(
    model: nn.Module, reference: Reference, batch: Batch, *, start: bool, **options: Any
) -> None:
    """Look at the reference's numbers, and compare them with the policy's where they should be one.

    Args:
        model: As wrapped for training.
        reference: One that is run beside the policy.
        batch: A few short examples.
        start: The reference is the policy as it is now: before the first step.
        **options: ``backend`` and ``memory_budget`` of the head.

    Raises:
        FloatingPointError: The reference's numbers are not finite.
        RuntimeError: They differ from the policy's; the message shows both numbers.
    """
    scored = reference.score(model, batch)
    assert scored is not None
    other = scored.logps
    if not other.isfinite().all():
        raise FloatingPointError(
            "self-check: the reference gives log-probabilities that are not finite: its weights "
            "are broken, or its precision is too low. Load another ref_model."
        )
    if not start:
        return
    with evaluating(model):
        policy = response_logps(model, batch, **options).logps
    difference = (policy - other).abs()
    low = causal_lm(model).dtype in (torch.bfloat16, torch.float16)
    low = low or torch.is_autocast_enabled(policy.device.type)
    allowed = 0.05 if low else 1e-4
    if not float(difference.max()) <= allowed:
        words = _Words(batch["response_targets"], policy)
        raise RuntimeError(
            "self-check: the reference is meant to be the policy as it starts, but they differ. "
            f"{words(difference, other, 'by the reference', 'by the policy')}; they may differ by "
            f"{allowed:g}. A fresh adapter must change nothing (LoRA's B is 0: check "
            "init_lora_weights), and the model must be deterministic in eval mode. If the "
            "reference is meant to be another model, pass it as ref_model."
        )
