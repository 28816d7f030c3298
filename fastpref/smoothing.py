"""The extra term of label smoothing: how far the target's logit lies above the mean logit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_TILE = 4096


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def target_minus_mean_logit(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``z_y - mean_v(z_v)`` per token, differentiable, fp32 (float64 for float64), shape of
    ``targets``.

    Without a softcap the mean of the logits is one product with the mean of the weight. With one,
    the vocabulary is walked in tiles that are recomputed in the backward.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _gap(hidden, weight, bias, targets, scale, softcap)


def _gap(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    h = hidden.to(wide)
    z_target = (h * weight[targets].to(wide)).sum(-1)
    if bias is not None:
        z_target = z_target + bias[targets].to(wide)
    z_target = _cap(scale * z_target, softcap)
    if softcap is None:
        mean = h @ weight.mean(0, dtype=wide)
        if bias is not None:
            mean = mean + bias.mean(dtype=wide)
        return z_target - scale * mean

    def tile_sum(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = torch.nn.functional.linear(h, w.to(wide), None if b is None else b.to(wide))
        return _cap(scale * z, softcap).sum(-1)

    total = torch.zeros_like(z_target)
    for start in range(0, weight.shape[0], _TILE):
        end = start + _TILE
        tile_bias = None if bias is None else bias[start:end]
        part = checkpoint(tile_sum, h, weight[start:end], tile_bias, use_reentrant=False)
        assert isinstance(part, Tensor)
        total = total + part
    return z_target - total / weight.shape[0]
