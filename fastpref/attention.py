"""Which attention a model runs with where nobody has said: the one place that decides.

Packed rows need a mask of their own. SDPA takes it as a tensor and computes what it hides;
FlexAttention takes it by blocks and skips what is hidden, on CUDA devices alone.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpref.data.masks import block_mask, mask_mod
from fastpref.heads import causal_lm

logger = logging.getLogger("fastpref")

FLEX = "flex_attention"
VERSIONS = 64
"""Most versions of a function that are compiled. FlexAttention takes 2 for each kind of mask, with
and without gradients, and more for the checks; beyond PyTorch's own limit of 8 it would compute all
scores at once, with a mere warning."""


class Choice(NamedTuple):
    """An attention implementation of transformers, and why it is this one."""

    name: str
    why: str


def attention_of(model: Any) -> str:
    """The attention that a model has now, by transformers' name."""
    return str(causal_lm(model).config.get_text_config()._attn_implementation)


def choose_attention(model: Any, args: Any, named: str | None, device: str) -> Choice:
    """The attention that a model is to run with.

    FlexAttention where transformers would take SDPA, rows are packed, the device can train with it
    and transformers has it for this model; else what is named, or what transformers takes: eager
    for Gemma-2, whose soft cap SDPA does not know.

    Args:
        model: As loaded, under whatever wrappers.
        args: A :class:`fastpref.PreferenceConfig`.
        named: ``attn_implementation`` that somebody asked for; None: nobody did.
        device: Type of the device that the model is to run on.
    """
    inner, found = causal_lm(model), attention_of(model)
    config, name = inner.config.get_text_config(), type(inner).__name__
    if named is not None:
        return Choice(named, "as it was loaded")
    if device != "cuda":
        return Choice(found, f"FlexAttention trains on CUDA devices, and this is a {device}")
    if not args.packing:
        return Choice(found, "packing=False, so that no row needs a mask by blocks")
    if found != "sdpa":
        return Choice(found, f"what transformers takes for {name}")
    if not getattr(inner, "_supports_flex_attn", False):
        return Choice(found, f"transformers has no FlexAttention for {name}")
    if getattr(config, "attention_dropout", 0.0) and not args.disable_dropout:
        return Choice(found, "FlexAttention has no dropout, and disable_dropout=False")
    return Choice(FLEX, "it skips what the mask of packed rows hides")


def settle_attention(model: Any, args: Any, named: str | None, device: torch.device) -> None:
    """Give a model the attention that :func:`choose_attention` chooses, and log which and why.

    FlexAttention that nobody asked for is tried first, forward and backward, on a few numbers of
    the model's shape; where it fails the model keeps what it has.

    Args:
        model: As loaded.
        args: A :class:`fastpref.PreferenceConfig`.
        named: As for :func:`choose_attention`.
        device: That the model is to run on.
    """
    inner = causal_lm(model)
    config, found = inner.config.get_text_config(), attention_of(model)
    choice = choose_attention(model, args, named, device.type)
    level = logging.INFO
    if choice.name == FLEX != found:
        heads = config.num_attention_heads
        shape = (
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        if (fault := flex_fault(*shape, inner.dtype, device, precision)) is None:
            inner.set_attn_implementation(FLEX)
        else:
            choice = Choice(found, f"FlexAttention, the default, fails here: {fault}")
            level = logging.WARNING
    if choice.name == FLEX:
        from torch._dynamo import config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, VERSIONS)
    logger.log(
        level,
        "attention of %s: %s (%s). attn_implementation sets another: of from_pretrained, in "
        "model_init_kwargs, or as a flag",
        *(type(inner).__name__, choice.name, choice.why),
    )


@functools.cache
def flex_fault(
    heads: int,
    key_value_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: torch.dtype | None,
) -> str | None:
    """Why FlexAttention cannot train here, by trying; None if it can.

    What it needs depends on the card, on the shape, and on a compiler being there.

    Args:
        heads: Of the queries.
        key_value_heads: Of keys and values.
        head_dim: Numbers of a head.
        dtype: Of the weights.
        device: To run on.
        precision: Of autocast; None: without.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    try:
        # Under autocast rotary embeddings leave queries and keys in the weights' precision.
        options: Any = {"device": device, "dtype": dtype, "requires_grad": True}
        query = torch.zeros(1, heads, 256, head_dim, **options)
        key = torch.zeros(1, key_value_heads, 256, head_dim, **options)
        value = torch.zeros_like(key, dtype=precision or dtype, requires_grad=True)
        documents = torch.arange(2, dtype=torch.int32, device=device).repeat_interleave(128)[None]
        rule = mask_mod(documents, torch.zeros_like(documents))
        mask = block_mask(rule, 1, 256, device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            attend = ALL_ATTENTION_FUNCTIONS[FLEX]
            output, _ = attend(nn.Module(), query, key, value, mask, scaling=head_dim**-0.5)
        output.float().sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None
