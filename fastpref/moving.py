"""A reference model that follows the policy, and what a run that goes on needs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = "reference.safetensors"


def _weights(model: nn.Module) -> dict[str, Any]:
    """Weights by name, which share memory with the model's; of FSDP2 this rank's DTensors: a
    forward without a backward leaves some parameters whole, and ``state_dict`` divides them."""
    found = model.state_dict()
    return {name: found[name] for name, _ in model.named_parameters()}


def _local(weight: Any) -> Tensor:
    """This rank's part of a weight, or all of it."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part


@torch.no_grad()
def move_towards(model: nn.Module, policy: nn.Module, share: float) -> None:
    """Replace each weight ``w`` by ``share * policy's w + (1 - share) * w`` (TR-DPO).

    Args:
        model: The reference.
        policy: The model that trains, divided over the ranks as the reference is.
        share: In [0, 1].

    Source: Gorbatovski et al. 2024, arXiv:2404.09656.
    """
    sources = _weights(policy)
    for name, weight in _weights(model).items():
        _local(weight).lerp_(_local(sources[name]).to(weight.dtype), share)


@torch.no_grad()
def save(model: nn.Module, folder: Path, writes: bool = True) -> None:
    """Write the weights of a reference into a checkpoint; all ranks gather them, one ``writes``."""
    from safetensors.torch import save_file

    whole = {}
    for name, weight in _weights(model).items():
        full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        if writes:
            whole[name] = full.cpu().contiguous()
    if writes:
        save_file(whole, folder / FILE)


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Read back what :func:`save` wrote, on all ranks."""
    from safetensors import safe_open
    from torch.distributed.tensor import distribute_tensor

    with safe_open(folder / FILE, "pt") as file:
        for name, weight in _weights(model).items():
            saved = file.get_tensor(name).to(weight.device)
            if hasattr(weight, "device_mesh"):
                saved = distribute_tensor(saved, weight.device_mesh, weight.placements)
            _local(weight).copy_(_local(saved))
