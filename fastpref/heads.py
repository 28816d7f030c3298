"""The output head of any causal language model: where it is, what it multiplies, what follows it.

Adapters on the head are read as what they add to the product. What a model does to its logits
(scale, soft cap, padding cut off) is measured once, by feeding known numbers through the code
behind its head.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: ``cap(scale * (hidden @ weight.T + bias))``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def under(self, transform: LogitTransform) -> Head:
        """The head with what its model does to the logits."""
        head = replace(self, scale=transform.scale, softcap=transform.softcap)
        size = transform.vocab_size
        if size is None:
            return head
        bias = None if self.bias is None else self.bias[:size]
        return replace(head, weight=self.weight[:size], bias=bias)

    def detach(self) -> Head:
        """The same numbers without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)


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
    return Head(hidden, _whole(weight), getattr(module, "bias", None))


def _whole(weight: Tensor) -> Tensor:
    """The weight, which must be here: ZeRO-3 gathers one for its own module's forward alone."""
    if weight.dim() < 2:
        raise TypeError(
            "model: DeepSpeed ZeRO-3 has divided the output embedding, and under an adapter its "
            "parts are not gathered together. Take the head out of the adapter, or use ZeRO-2 or "
            "FSDP2."
        )
    return weight


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
    weight = torch.cat([_whole(columns) for columns in weight_columns], -1)
    return Head(torch.cat(hidden_columns, -1), weight, base.bias)


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


def assume_no_transform(model: nn.Module) -> None:
    """Take it that a model returns what its head does: of fake tensors nothing can be measured."""
    _transforms[causal_lm(model)] = LogitTransform()


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
    if not fed:
        raise ValueError(
            f"model: calling this {type(inner).__name__} does not run its own output embedding. A "
            "forward that was patched on the instance (model.forward = ...) leads a copy of the "
            "model, such as the reference, back to the original. Override forward in a subclass."
        )
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
