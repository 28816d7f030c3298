"""The fused op in an existing TRL script: ``patch(trainer)``, one line, same losses.

TRL 1.16 gives a trainer's models a forward that projects hidden states through a chunked function
of its own. ``patch`` makes that forward, for the trainer's models alone, call ``linear_logprobs``,
on the scored positions only. Everything else in TRL runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastpref.ops import linear_logprobs
from fastpref.reference import TokenStats

T = TypeVar("T")

_head: ContextVar[dict[str, Any] | None] = ContextVar("fastpref_trl_head", default=None)
_NAMES = ("_ChunkedLogProbFunction", "_use_triton")


class _Projection:
    """Stands where TRL's chunked function stands; passes on to it outside a patched forward."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """TRL's five per-token outputs, None where not asked for."""
        options = _head.get()
        if options is None:
            result: tuple[Tensor | None, ...] = self.original.apply(
                hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs
            )
            return result
        if temperature != 1.0:
            raise ValueError(
                f"fastpref.integrations.trl: temperature {temperature} is not supported; DPO and "
                "KTO use 1.0"
            )
        scored = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            scale=scale,
            softcap=softcap,
            return_stats=True,
            **options,
        )
        logps, stats = cast("tuple[Tensor, TokenStats]", scored)
        found = {
            "log_probs": logps,
            "entropy": stats.entropy,
            "log_sum_sq_probs": stats.log_sum_sq_probs,
            "mean_logits": stats.logit_mean,
            "is_top1": stats.top1,
        }
        return tuple(x if name in outputs else None for name, x in found.items())


def _install() -> None:
    """Put the pass-through in TRL's module, once."""
    from trl.trainer import utils

    missing = [name for name in _NAMES if not hasattr(utils, name)]
    if missing:
        import trl

        raise RuntimeError(
            f"fastpref.integrations.trl supports TRL 1.16; trl {trl.__version__} has no {missing}. "
            'Try: pip install "trl==1.16.*"'
        )
    if isinstance(utils._ChunkedLogProbFunction, _Projection):
        return
    utils._ChunkedLogProbFunction = _Projection(utils._ChunkedLogProbFunction)
    compacts: Callable[[torch.device], bool] = utils._use_triton
    # TRL then selects the scored positions before the head, on every device
    utils._use_triton = lambda device: _head.get() is not None or compacts(device)


def _patched(forward: Callable[..., T], options: dict[str, Any]) -> Callable[..., T]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> T:
        token = _head.set(options)
        try:
            return forward(*args, **kwargs)
        finally:
            _head.reset(token)

    call._fastpref = True  # type: ignore[attr-defined]
    return call


def patch(trainer: T, *, backend: str = "auto", memory_budget: int | None = None) -> T:
    """The same trainer, its models' head computed by :func:`fastpref.linear_logprobs`.

    Args:
        trainer: A ``trl.DPOTrainer`` or ``trl.KTOTrainer`` of TRL 1.16, before ``train()``.
        backend: As in :func:`fastpref.linear_logprobs`.
        memory_budget: As in :func:`fastpref.linear_logprobs`.

    Returns:
        ``trainer``. Patching twice changes nothing.

    Raises:
        TypeError: Not a DPO or KTO trainer of TRL.
        RuntimeError: A TRL whose internals are not known.

    Numerics:
        Logits are fp32 where TRL rounds them to the model's dtype. Entropy carries no gradient;
        DPO and KTO only log it.
    """
    from trl import DPOTrainer, KTOTrainer

    if not isinstance(trainer, (DPOTrainer, KTOTrainer)):
        raise TypeError(
            f"trainer: expected a trl.DPOTrainer or trl.KTOTrainer, got {type(trainer).__name__}"
        )
    _install()
    options = {"backend": backend, "memory_budget": memory_budget}
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        if not getattr(inner.forward, "_fastpref", False):
            inner.forward = _patched(inner.forward, options)
    return trainer
