"""The memory beside a loss: what depends on history, or on the batch of all ranks together.

Losses are pure. ``state.kwargs(batch)`` returns the keywords they want; the trainer gathers the
batch over ranks, calls it, and saves it with ``state_dict``. Numbers stay on the device of the
batch: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpref.losses.batch import View
from fastpref.losses.parameters import nearest


class State:
    """Base of the states, those with a history and those that only look at all ranks at once.

    A subclass names the fields it ``reads``, the numbers it ``keeps``, and implements ``compute``;
    its ``__init__`` takes options by keyword.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of the batch it reads: the only ones that have to be gathered."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers it remembers."""

    def __init__(self) -> None:
        """Take the options the class lists."""
        self._numbers: dict[str, Tensor] = {}
        self.reader = type(self).__name__
        """Who needs the fields, for messages."""

    def kwargs(self, batch: Any, local: slice = slice(None), update: bool = True) -> dict[str, Any]:
        """Keywords for the loss.

        Args:
            batch: The micro-batch of all ranks, detached; only the fields in ``reads`` are needed.
            local: The part of ``batch`` this rank holds; per-example keywords are cut to it.
            update: Remember what was seen; false for evaluation.
        """
        before = dict(self._numbers)
        keywords = self.compute(View(batch, self.reader), local)
        if not update:
            self._numbers = before
        return keywords

    @property
    def moves(self) -> bool:
        """The keywords follow the batches: an update depends on how its batch is cut."""
        return True

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """The keywords, after remembering what ``batch`` shows."""
        raise NotImplementedError

    def remember(self, name: str, value: Tensor) -> Tensor:
        """Store a number under ``name`` and return it."""
        self._numbers[name] = value.detach().double()
        return self._numbers[name]

    def recall(self, name: str) -> Tensor | None:
        """The number stored under ``name``, if any."""
        return self._numbers.get(name)

    def average(
        self, name: str, value: Tensor, momentum: float, start: float | None = None
    ) -> Tensor:
        """Exponential moving average: ``momentum * past + (1 - momentum) * value``.

        Without a past the average is ``value`` itself, or begins at ``start``.
        """
        past = self.recall(name)
        if past is None and start is not None:
            past = torch.full_like(value, start)
        return self.remember(
            name, value if past is None else past + (1 - momentum) * (value - past)
        )

    def state_dict(self) -> dict[str, float]:
        """What to save: plain numbers."""
        return {name: value.item() for name, value in self._numbers.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it holds a number this state does not keep.
        """
        for name in state:
            if name not in self.keeps:
                known = nearest(name, self.keeps)
                raise ValueError(f"{type(self).__name__} keeps no {name!r}{known}")
        self._numbers = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()
        }


class RewardShift(State):
    """Running mean of the implicit rewards: the ``delta`` of BCO and MPO.

    Args:
        beta: Scale of the rewards.
        delta_mode: ``"zero"``, ``"batch_means"`` (each batch's mean weighs one), ``"elements"``
            (each reward weighs one), ``"ema"``. The batch is counted before its own loss.
        momentum: Share of the past under ``"ema"``.
    """

    reads: ClassVar[tuple[str, ...]] = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    keeps = ("delta", "count")

    def __init__(
        self, *, beta: float = 0.1, delta_mode: str = "zero", momentum: float = 0.99
    ) -> None:
        """Take the options the class lists."""
        super().__init__()
        self.beta, self.delta_mode, self.momentum = beta, delta_mode, momentum

    @property
    def moves(self) -> bool:
        """Unless ``delta`` stays 0."""
        return self.delta_mode != "zero"

    def logratios(self, batch: Any) -> Tensor:
        """All log-ratios of the batch."""
        return torch.cat(batch.logratios)

    def compute(self, batch: Any, local: slice) -> dict[str, Any]:
        """``delta``."""
        if self.delta_mode == "zero":
            return {"delta": 0.0}
        rewards = self.beta * self.logratios(batch).double()
        if self.delta_mode == "ema":
            return {"delta": self.average("delta", rewards.mean(), self.momentum)}
        weight = 1.0 if self.delta_mode == "batch_means" else float(rewards.numel())
        count, past = self.recall("count"), self.recall("delta")
        total = rewards.new_tensor(weight) if count is None else count + weight
        mean = rewards.mean()
        self.remember("count", total)
        return {
            "delta": self.remember(
                "delta", mean if past is None else past + (mean - past) * (weight / total)
            )
        }


class BatchMeansShift(RewardShift):
    """Running mean of the implicit rewards, of batch means unless told otherwise."""

    def __init__(
        self, *, beta: float = 0.1, delta_mode: str = "batch_means", momentum: float = 0.99
    ) -> None:
        """Take the options the class lists."""
        super().__init__(beta=beta, delta_mode=delta_mode, momentum=momentum)


class UnpairedShift(RewardShift):
    """Running mean of the implicit rewards of single examples, each weighing one unless told
    otherwise."""

    reads = ("logps", "ref_logps")

    def __init__(
        self, *, beta: float = 0.1, delta_mode: str = "elements", momentum: float = 0.99
    ) -> None:
        """Take the options the class lists."""
        super().__init__(beta=beta, delta_mode=delta_mode, momentum=momentum)

    def logratios(self, batch: Any) -> Tensor:
        """All log-ratios of the batch."""
        ratios: Tensor = batch.logratios
        return ratios
