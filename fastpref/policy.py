"""A causal language model as a source of per-token log-probabilities: its own forward, without its
logits.

The model runs unchanged but for two hooks on its output embedding: one takes the hidden states,
gives the response tokens to :func:`fastpref.ops.linear_logprobs`, and passes an empty slice on, so
that the model's own head costs nothing; the other returns empty logits that hang on those
log-probabilities. So there is no per-model code, and what DDP, FSDP and ZeRO tie to a module's
inputs and outputs still fires in the right order. What a model does to its logits (scale, soft cap,
padding cut off) is measured once, by feeding known numbers through the code behind its head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.data.masks import mask_mod, to_attention_mask
from fastpref.ops import linear_logprobs
from fastpref.reference import TokenStats

Batch = Mapping[str, Any]


class ResponseLogps(NamedTuple):
    """What one forward gives for the response tokens of a batch."""

    logps: Tensor
    """Log-probability of each response token, nats, 0 where masked. Shape ``(n,)``, fp32 (float64
    for float64)."""
    stats: TokenStats | None
    """Statistics of the same tokens, detached; None unless asked for."""


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: ``cap(scale * (hidden @ weight.T + bias))``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: ``softcap * tanh(scale * z / softcap)``, first
    ``vocab_size``."""

    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None


_transforms: weakref.WeakKeyDictionary[nn.Module, LogitTransform] = weakref.WeakKeyDictionary()


def causal_lm(model: Any) -> Any:
    """The transformers model inside DDP, ``torch.compile``, PEFT and the like; ``model`` itself if
    there is none."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def output_embedding(model: nn.Module) -> Any:
    """The module that turns hidden states into logits.

    Raises:
        TypeError: the model has none, so it is not a causal language model.
    """
    inner = causal_lm(model)
    get = getattr(inner, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        raise TypeError(
            f"model: {type(inner).__name__} has no output embedding. Expected a causal language "
            "model, such as AutoModelForCausalLM.from_pretrained(...) returns."
        )
    return head


def read_head(module: Any, hidden: Tensor) -> Head:
    """Hidden states, weight and bias whose product is what ``module`` would return, adapters
    included.

    A LoRA update ``B @ A`` of the head is carried as extra columns, ``[hidden, scaling * hidden @
    A.T] @ [W, B].T``: adding it to a bf16 weight would round a small update away.

    Args:
        module: The output embedding; may be wrapped by PEFT (LoRA, or listed in
            ``modules_to_save``).
        hidden: What it was called with. Shape ``(..., H)``.

    Raises:
        TypeError: The head is quantised, or adapted by a method other than LoRA.
    """
    if hasattr(module, "modules_to_save"):
        active = [] if module.disable_adapters else module.active_adapters
        return read_head(
            module.modules_to_save[active[0]] if active else module.original_module, hidden
        )
    if hasattr(module, "lora_A"):
        return _read_lora(module, hidden)
    if hasattr(module, "base_layer"):
        raise TypeError(
            f"model: the output embedding carries a {type(module).__name__} adapter; only LoRA is "
            "supported there. Take it out of target_modules, or put the head into modules_to_save."
        )
    weight = module.weight
    if not weight.is_floating_point():
        raise TypeError(
            f"model: the output embedding is quantised ({weight.dtype}). Keep it in floating "
            "point, for instance by llm_int8_skip_modules=['lm_head'] in BitsAndBytesConfig."
        )
    return Head(hidden, weight, getattr(module, "bias", None))


def _read_lora(module: Any, hidden: Tensor) -> Head:
    base = read_head(module.get_base_layer(), hidden)
    if module.disable_adapters or module.merged:
        return base
    active = [name for name in module.active_adapters if name in module.lora_A]
    if any(module.lora_variant.get(name) is not None or module.lora_bias[name] for name in active):
        raise TypeError(
            "model: the LoRA adapter on the output embedding uses DoRA, a bias or another variant; "
            "only plain LoRA is supported there. Take the head out of target_modules, or put it "
            "into modules_to_save."
        )
    hidden_columns, weight_columns = [base.hidden], [base.weight]
    for name in active:
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        x = module.lora_dropout[name](hidden.to(down.dtype))
        hidden_columns.append(
            (module.scaling[name] * nn.functional.linear(x, down)).to(hidden.dtype)
        )
        weight_columns.append(up.to(base.weight.dtype))
    return Head(torch.cat(hidden_columns, -1), torch.cat(weight_columns, -1), base.bias)


def logit_transform(model: nn.Module) -> LogitTransform:
    """Scale, soft cap and vocabulary size that a model applies behind its head, measured once a
    model and kept.

    Powers of two replace the head's output in a forward of one token; what the model returns for
    them tells the rest.

    Raises:
        ValueError: what the model does to its logits is neither a scale nor a soft cap.
    """
    inner = causal_lm(model)
    if inner not in _transforms:
        _transforms[inner] = _measure(model, inner)
    return _transforms[inner]


def _measure(model: nn.Module, inner: Any) -> LogitTransform:
    small, large = 2.0**-10, 2.0**20
    points = torch.tensor([small, large, *(s * 2.0**k for k in range(-6, 10) for s in (1, -1))])
    fed: list[Tensor] = []
    head_size: list[int] = []

    def feed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        vocab_size = output.shape[-1]
        head_size.append(vocab_size)
        rows = -(-len(points) // vocab_size)
        repeats = rows * vocab_size // len(points) + 1
        dtype = torch.promote_types(output.dtype, torch.float32)
        fed.append(points.to(dtype).repeat(repeats)[: rows * vocab_size])
        return fed[0].to(output.device).view(1, rows, vocab_size)

    handle = output_embedding(model).register_forward_hook(feed)
    device = inner.get_input_embeddings().weight.device
    try:
        with torch.no_grad(), evaluating(model):
            got = model(
                input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False
            ).logits
    finally:
        handle.remove()
    vocab_size = got.shape[-1]
    z = fed[0].view(1, got.shape[1], -1)[..., :vocab_size]
    got = got.to(z.dtype).cpu()
    scale = float(got[z == small][0]) / small
    cap = float(got[z == large][0])
    softcap = cap if abs(cap) < 0.5 * abs(scale) * large else None
    expected = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
    if not torch.allclose(got, expected, rtol=1e-2, atol=1e-6):
        worst = int((got - expected).abs().flatten().argmax())
        fed_in, came_out = float(z.flatten()[worst]), float(got.flatten()[worst])
        raise ValueError(
            f"model: {type(inner).__name__} changes its logits in a way that is neither a scale "
            f"nor a soft cap: {fed_in:g} becomes {came_out:g}. "
            "Such a model cannot be trained with the fused head."
        )
    return LogitTransform(scale, softcap, None if vocab_size == head_size[0] else vocab_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for the duration, each module's own mode restored after it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


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
    make = _block_mask if implementation == "flex_attention" else _dense_mask
    limits = _limits(config, positions.shape[-1])
    masks = {near: make(batch, near, implementation, inner.dtype) for near in set(limits.values())}
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {kind: masks[near] for kind, near in limits.items()}


def _dense_mask(batch: Batch, near: Near | None, implementation: str, dtype: torch.dtype) -> Tensor:
    allowed, positions = batch["attention_mask"], batch["position_ids"]
    if near is not None:
        allowed = allowed & near(positions[:, :, None], positions[:, None, :])[:, None]
    return to_attention_mask(allowed, implementation, dtype)


def _block_mask(batch: Batch, near: Near | None, implementation: str, dtype: torch.dtype) -> Any:
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    positions = batch["position_ids"]
    rule = mask_mod(batch["document_ids"], batch["branch_ids"])
    if near is not None:
        rule = and_masks(rule, lambda b, h, q, k: near(positions[b, q], positions[b, k]))
    rows, size = positions.shape
    return create_block_mask(rule, rows, None, size, size, device=str(positions.device))


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a forward over the rows of a batch."""
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": attention_mask(model, batch),
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }


def response_logps(
    model: nn.Module,
    batch: Batch,
    *,
    return_stats: bool = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> ResponseLogps:
    """Log-probability of every response token of a batch, from one forward of the model.

    Equals ``model(**inputs).logits.float().log_softmax(-1)`` taken at ``response_rows`` and
    ``response_targets``, but the logits are never stored.

    Args:
        model: A transformers causal language model, wrapped (PEFT, DDP, FSDP) or not.
        batch: What :class:`fastpref.data.PreferenceCollator` returns, on the model's device:
            ``input_ids (R, T)``, ``position_ids (R, T)``, ``attention_mask (R, 1, T, T)`` bool,
            ``response_rows (n,)``, ``response_targets (n,)``.
        return_stats: Also return entropy, top-1 and the like, from the same pass.
        backend: As in :func:`fastpref.linear_logprobs`.
        memory_budget: As in :func:`fastpref.linear_logprobs`.

    Returns:
        Log-probabilities in nats, differentiable in every trainable parameter, and the statistics.

    Raises:
        TypeError: The model has no output embedding, or one that cannot be read.
        ValueError: The model changes its logits in an unknown way.

    Numerics:
        As :func:`fastpref.linear_logprobs`: fp32 logits and sums whatever the model's dtype.
    """
    head_module = output_embedding(model)
    transform = logit_transform(model)
    result: list[ResponseLogps] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].flatten(0, -2).index_select(0, batch["response_rows"])
        head = read_head(module, hidden)
        size = transform.vocab_size
        logps = linear_logprobs(
            head.hidden,
            head.weight if size is None else head.weight[:size],
            batch["response_targets"],
            bias=head.bias if size is None or head.bias is None else head.bias[:size],
            scale=transform.scale,
            softcap=transform.softcap,
            return_stats=return_stats,
            backend=backend,
            memory_budget=memory_budget,
        )
        result.append(
            ResponseLogps(*logps) if isinstance(logps, tuple) else ResponseLogps(logps, None)
        )
        return (args[0][:, :0], *args[1:])

    def anchor(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return result[0].logps[:0].to(output.dtype).view(1, 0, 1).expand(output.shape)

    handles = [
        head_module.register_forward_pre_hook(take),
        head_module.register_forward_hook(anchor, prepend=True),
    ]
    try:
        output = model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    logps, stats = result[0]
    # An empty sum adds exactly 0, and makes the model's output part of the graph: the hooks that
    # gather a sharded head for the backward run before the op's own backward can.
    return ResponseLogps(logps + output.logits.sum(), stats)
