"""A causal language model as a source of per-token log-probabilities: its own forward, without its
logits.

The model runs unchanged but for two hooks on its output embedding: one takes the hidden states,
gives the response tokens to :func:`fastpref.linear_logprobs`, and passes an empty slice on, so that
the model's own head costs nothing; the other returns empty logits that hang on those
log-probabilities. So there is no per-model code, and what DDP, FSDP and ZeRO tie to a module's
inputs and outputs still fires in the right order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.attention import FLEX
from fastpref.data.masks import (
    PAD_DOCUMENT,
    block_mask,
    dense_mask,
    mask_mod,
    to_attention_mask,
)
from fastpref.heads import Head, causal_lm, logit_transform, output_embedding, read_head
from fastpref.ops import linear_logprobs
from fastpref.reference import TokenStats
from fastpref.stopwatch import Stopwatch

Batch = Mapping[str, Any]


class ResponseLogps(NamedTuple):
    """What one forward gives for the response tokens of a batch."""

    logps: Tensor
    """Log-probability of each response token, nats, 0 where masked. Shape ``(n,)``, fp32 (float64
    for float64)."""
    stats: TokenStats | None = None
    """Statistics of the same tokens, detached; None unless asked for."""
    extra: Any = None
    """What ``inspect`` returned."""
    aux_loss: Tensor | None = None
    """Load-balancing loss of a mixture of experts; None unless asked for."""


Near = Callable[[Tensor, Tensor], Tensor]


def _limits(config: Any, size: int) -> dict[str, Near | None]:
    """By kind of layer: whether a query position sees a key position; None: all before it.

    Rows no longer than a window or chunk have no limit.
    """
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    known: dict[str, Near] = {}
    if window and size > window:
        known["sliding_attention"] = lambda query, key: query - key < window
    if chunk and size > chunk:
        known["chunked_attention"] = lambda query, key: query // chunk == key // chunk
    default = ["sliding_attention"] if window else ["full_attention"]
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or default)
    return {kind: known.get(kind) for kind in kinds}


def attention_mask(model: nn.Module, batch: Batch) -> Any:
    """The mask of a batch as this model's attention wants it.

    Boolean for SDPA, additive for eager attention, blocks for FlexAttention. Layers that see a
    window or a chunk of the sequence get a mask of their own once a row is longer than that;
    distances are between positions, so they hold within each packed sequence.

    Raises:
        ValueError: the model's attention implementation takes no mask of its own.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    implementation, positions = config._attn_implementation, batch["position_ids"]
    make = _block_mask if implementation == FLEX else _dense_mask
    limits = _limits(config, positions.shape[-1])
    masks = {near: make(batch, near, implementation, inner.dtype) for near in set(limits.values())}
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {kind: masks[near] for kind, near in limits.items()}


def _dense_mask(batch: Batch, near: Near | None, implementation: str, dtype: torch.dtype) -> Tensor:
    allowed, positions = batch.get("attention_mask"), batch["position_ids"]
    if allowed is None:  # the policy beside which this model runs takes blocks
        allowed = dense_mask(batch["document_ids"], batch["branch_ids"])
    if near is not None:
        allowed = allowed & near(positions[:, :, None], positions[:, None, :])[:, None]
    return to_attention_mask(allowed, implementation, dtype)


def _block_mask(batch: Batch, near: Near | None, implementation: str, dtype: torch.dtype) -> Any:
    from torch.nn.attention.flex_attention import and_masks

    positions = batch["position_ids"]
    rule = mask_mod(batch["document_ids"], batch["branch_ids"])
    if near is not None:
        rule = and_masks(rule, lambda b, h, q, k: near(positions[b, q], positions[b, k]))
    rows, tokens = positions.shape
    return block_mask(rule, rows, tokens, positions.device)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a forward over the rows of a batch."""
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:  # one sequence a row, padded at its end
        return inputs | {"attention_mask": mask}
    mask = attention_mask(model, batch)
    return inputs | {"attention_mask": mask, "position_ids": batch["position_ids"]}


@contextmanager
def _balancing_over(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Have a mixture of experts balance over the tokens of packed rows.

    transformers' balancing loss reads the attention mask as one flag a token, which a packed row's
    mask is not.
    """
    module = sys.modules[type(causal_lm(model)).__module__]
    balance = module.load_balancing_loss_func
    tokens = batch["document_ids"] != PAD_DOCUMENT

    def over_tokens(gates: Any, experts: Any = None, top_k: int = 2, mask: Any = None) -> Any:
        return balance(gates, experts, top_k, tokens)

    module.load_balancing_loss_func = over_tokens  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.load_balancing_loss_func = balance  # type: ignore[attr-defined]


def response_logps(
    model: nn.Module,
    batch: Batch,
    *,
    return_stats: bool = False,
    inspect: Callable[[Head], Any] | None = None,
    balance_experts: bool = False,
    watch: Stopwatch | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> ResponseLogps:
    """Log-probability of every response token of a batch, from one forward of the model.

    Equals ``model(**inputs).logits.float().log_softmax(-1)`` taken at ``response_rows`` and
    ``response_targets``, but the logits are never stored.

    Args:
        model: A transformers causal language model, wrapped (PEFT, DDP, FSDP) or not.
        batch: What :class:`fastpref.data.PreferenceCollator` returns, on the model's device:
            ``input_ids (R, T)``, ``position_ids (R, T)``, ``attention_mask (R, 1, T, T)`` bool (or
            ``(R, T)``: one sequence a row), ``response_rows (n,)``, ``response_targets (n,)``.
        return_stats: Also return entropy, top-1 and the like, from the same pass.
        inspect: Called with the head and the hidden states of the response tokens, while a sharded
            head is gathered; what it returns comes back as ``extra``.
        balance_experts: Also return the load-balancing loss of a mixture of experts.
        watch: Takes the time that the head's forward and backward need.
        backend: As in :func:`fastpref.linear_logprobs`.
        memory_budget: As in :func:`fastpref.linear_logprobs`.

    Returns:
        Log-probabilities in nats, differentiable in every trainable parameter, and what else was
        asked for.

    Raises:
        TypeError: The model has no output embedding, or one that cannot be read.
        ValueError: The model changes its logits in an unknown way.

    Numerics:
        As :func:`fastpref.linear_logprobs`: fp32 logits and sums whatever the model's dtype.
    """
    watch = watch or Stopwatch()
    head_module, transform = output_embedding(model), logit_transform(model)
    result: list[ResponseLogps] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].flatten(0, -2).index_select(0, batch["response_rows"])
        head = read_head(module, hidden).under(transform)
        watch.start(hidden)
        found = linear_logprobs(
            head.hidden,
            head.weight,
            batch["response_targets"],
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            return_stats=return_stats,
            backend=backend,
            memory_budget=memory_budget,
        )
        logps, stats = found if isinstance(found, tuple) else (found, None)
        watch.stop(hidden)
        watch.around_backward(hidden, logps)
        result.append(ResponseLogps(logps, stats, None if inspect is None else inspect(head)))
        return (args[0][:, :0], *args[1:])

    def anchor(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return result[0].logps[:0].to(output.dtype).view(1, 0, 1).expand(output.shape).clone()

    inputs = model_inputs(model, batch)
    if balance_experts:
        inputs["output_router_logits"] = True
    handles = [
        head_module.register_forward_pre_hook(take),
        head_module.register_forward_hook(anchor, prepend=True),
    ]
    try:
        with _balancing_over(model, batch) if balance_experts else nullcontext():
            output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    # An empty sum adds exactly 0, and makes the model's output part of the graph: the hooks that
    # gather a sharded head for the backward run before the op's own backward can.
    logps = result[0].logps + output.logits.sum()
    return result[0]._replace(logps=logps, aux_loss=getattr(output, "aux_loss", None))
