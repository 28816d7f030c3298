"""Time spent in a part of a step, without waiting for a device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Adds up the time between :meth:`start` and :meth:`stop`, on the tensors' own device.

    On CUDA by events, which are read once they have happened; elsewhere by the clock.
    """

    def __init__(self) -> None:
        """At 0."""
        self._seconds = 0.0
        self._began: Any = None
        self._running: list[tuple[Any, Any]] = []

    def start(self, x: Tensor) -> None:
        """Begin, where ``x`` lies."""
        self._began = _now(x)

    def stop(self, x: Tensor) -> None:
        """End what :meth:`start` began; without it, nothing."""
        began, self._began = self._began, None
        if began is None:
            return
        ended = _now(x)
        if isinstance(ended, float):
            self._seconds += ended - began
        else:
            self._running.append((began, ended))

    def around_backward(self, hidden: Tensor, result: Tensor) -> None:
        """Add the time from the gradient of ``result`` to that of ``hidden``, which it is made of.

        What autograd does with the weight's gradient after that is not in it.
        """
        if hidden.requires_grad and result.requires_grad:
            result.register_hook(self.start)  # type: ignore[no-untyped-call]
            hidden.register_hook(self.stop)  # type: ignore[no-untyped-call]

    def take(self) -> float:
        """Seconds since the last call; what the device has not done yet comes with the next."""
        running = []
        for began, ended in self._running:
            if ended.query():
                self._seconds += began.elapsed_time(ended) / 1e3
            else:
                running.append((began, ended))
        found, self._seconds, self._running = self._seconds, 0.0, running
        return found


def _now(x: Tensor) -> Any:
    if x.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
