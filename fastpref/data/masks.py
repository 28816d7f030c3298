"""Who may attend whom in a packed row: one rule, for dense masks and for FlexAttention.

A query attends a key iff the key does not come later in the row, belongs to the same document, and
is part of the prompt or of the query's own response. A pad attends itself, so that no softmax row
is empty. Works on any device and never waits for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PAD_DOCUMENT = -1
PROMPT_BRANCH = 0

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(document_ids: Tensor, branch_ids: Tensor) -> MaskMod:
    """The attention rule as a function of indices, as ``create_block_mask`` of FlexAttention wants.

    Equals ``lambda b, h, q, k: (k <= q) & (doc[q] == doc[k]) & ((branch[k] == 0) |
    (branch[k] == branch[q]))``, and ``q == k`` for pads.

    Args:
        document_ids: Document of each token, -1 for a pad. Shape ``(R, T)``, integer.
        branch_ids: 0 for a prompt token, k for a token of the document's k-th response. ``(R, T)``.

    Returns:
        ``f(b, h, q, k) -> bool tensor``, for index tensors that broadcast. Layers that see less
        (a window, a chunk) take its conjunction with a rule on ``position_ids``.
    """

    def may_attend(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        document, branch = document_ids[b, q], branch_ids[b, k]
        same = (document == document_ids[b, k]) & (document != PAD_DOCUMENT)
        visible = (branch == PROMPT_BRANCH) | (branch == branch_ids[b, q])
        return ((k <= q) & same & visible) | (q == k)

    return may_attend


def dense_mask(document_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """The attention rule as a tensor: equals ``mask_mod(...)`` at every (row, query, key).

    Args:
        document_ids: As for ``mask_mod``.
        branch_ids: As for ``mask_mod``.

    Returns:
        bool, shape ``(R, 1, T, T)``, true = may attend, on the device of ``document_ids``.
    """
    rows, tokens = document_ids.shape
    device = document_ids.device
    b = torch.arange(rows, device=device).view(-1, 1, 1, 1)
    q = torch.arange(tokens, device=device).view(-1, 1)
    k = torch.arange(tokens, device=device).view(1, -1)
    return mask_mod(document_ids, branch_ids)(b, b, q, k)


def block_mask(rule: MaskMod, rows: int, tokens: int, device: torch.device) -> Any:
    """An attention rule by blocks of 128 x 128, as FlexAttention wants it.

    Args:
        rule: What ``mask_mod`` returns, or its conjunction with more.
        rows: R.
        tokens: T.
        device: Of what the rule reads.

    Returns:
        A ``torch.nn.attention.flex_attention.BlockMask`` of ``(R, 1, T, T)``.
    """
    return _create_block_mask(device.type)(rule, rows, None, tokens, tokens, device=str(device))


@functools.cache
def _create_block_mask(device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it never stores the (R, T, T) that it counts, several times over.
    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask


def to_attention_mask(mask: Tensor, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    """The mask in the form that a transformers attention implementation reads.

    transformers (5.23) hands a 4-D mask to the attention function as it is. ``sdpa`` reads bool
    as may/may not attend; ``eager`` adds the mask to the scores, so that a bool one would add 1
    to what may be attended and hide nothing, silently.

    Args:
        mask: bool, ``(R, 1, T, T)``, true = may attend.
        attn_implementation: ``config._attn_implementation`` of the model.
        dtype: dtype of the model's hidden states.

    Returns:
        ``mask`` itself for ``"sdpa"``; for ``"eager"``, 0 where true and ``dtype``'s lowest number
        where false.

    Raises:
        ValueError: any other implementation: it does not take a dense mask.
    """
    if attn_implementation == "sdpa":
        return mask
    if attn_implementation == "eager":
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    raise ValueError(
        f"attn_implementation={attn_implementation!r} takes no dense mask; load the model with "
        "attn_implementation='sdpa' or 'eager', or build a block mask from mask_mod"
    )
