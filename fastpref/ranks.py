"""Sums and joins over the processes of a run; nothing happens where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Ranks:
    """The processes of a run.

    Args:
        accelerator: accelerate's.
    """

    def __init__(self, accelerator: Any) -> None:
        """See the class."""
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all, on each."""
        total: Tensor = x if self.count == 1 else self._accelerator.reduce(x, "sum")
        return total

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all, one after the other along the last dimension; lengths may differ."""
        if self.count == 1:
            return x
        length = torch.tensor([x.shape[-1]], device=x.device)
        lengths = self._accelerator.gather(length).tolist()
        padded = nn.functional.pad(x, (0, max(lengths) - x.shape[-1]))
        parts = self._accelerator.gather(padded[None])
        return torch.cat([part[..., :n] for part, n in zip(parts, lengths, strict=True)], -1)

    def objects(self, items: list[Any]) -> list[Any]:
        """The lists of all, joined."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(items)
        return found

    def counted(self, size: int) -> Tensor | None:
        """False for this rank's examples that the last batch of an evaluation repeats, so that
        every rank has as many; None: all count.

        Args:
            size: Of this rank's batch.
        """
        state = self._accelerator.gradient_state
        if self.count == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        place = torch.arange(size, device=self._accelerator.device) + self.index * size
        counted: Tensor = place < state.remainder
        return counted
