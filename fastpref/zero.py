"""DeepSpeed ZeRO-3, which divides every weight over the ranks and gathers it where it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_KEPT = ("bf16", "fp16", "communication_data_type")


def divided(model: nn.Module) -> bool:
    """Whether a model's weights lie divided over the ranks."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


@contextmanager
def gathered(weight: Tensor) -> Iterator[Tensor]:
    """A weight with all its values for the duration; of one that is divided, by all ranks."""
    if not hasattr(weight, "ds_id"):
        yield weight
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield weight


def frozen_engine(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A model that never trains, divided over the ranks; its layers are gathered one by one.

    Args:
        model: Whole, or divided as it was loaded.
        config: DeepSpeed's, of the policy.
    """
    import deepspeed

    def set_here(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value != "auto"}

    zero = set_here(config["zero_optimization"])
    zero.pop("offload_optimizer", None)
    own = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    for name in set(_KEPT) & set(config):
        value = config[name]
        own[name] = set_here(value) if isinstance(value, Mapping) else value
    engine, *_ = deepspeed.initialize(model=model, config=own)
    engine.eval()
    frozen: nn.Module = engine
    return frozen
