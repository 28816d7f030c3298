"""What the bench measures: a problem's tensors, what is computed of them, a system that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpref import losses
from fastpref.costs import SCHEDULES

BETA, GAMMA = 0.1, 0.05


@dataclass(frozen=True)
class Case:
    """One problem: what is given to every system."""

    hidden: Tensor
    """``(N, H)``; requires a gradient unless the schedule is ``none``."""
    weight: Tensor
    """``(V, H)``; requires a gradient where the head is trained."""
    targets: Tensor
    """``(N,)`` int64."""
    upstream: Tensor
    """``(N,)`` fp32: gradient that arrives at the per-token log-probabilities."""
    schedule: str
    softcap: float | None = None
    budget: int | None = None
    """``memory_budget`` of the op."""

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.hidden.device.type

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that are differentiated."""
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def pairs_of(rows: int) -> int:
    """Preference pairs that ``rows`` rows hold in a preference loss: responses of 512 tokens, at
    least one pair."""
    return max(1, rows // 1024)


def uneven(case: Case) -> str:
    """Why the rows are no whole pairs; empty if they are."""
    rows = case.targets.numel()
    return "needs rows that make whole pairs" if rows % (2 * pairs_of(rows)) else ""


PREFERENCE = {
    "dpo": {"beta": BETA},
    "simpo": {"beta": BETA, "gamma": GAMMA},
    "orpo": {"beta": BETA},
}
"""Preference losses of the bench, and what they are called with. References are 0."""


def preference_loss(name: str, logps: Tensor) -> Tensor:
    """Mean loss of the pairs; the first half of ``logps`` is the chosen responses', all as long."""
    chosen, rejected = logps.view(2, pairs_of(logps.numel()), -1).sum(-1)
    zero = torch.zeros_like(chosen)
    lengths = torch.full_like(chosen, logps.numel() // (2 * chosen.numel()))
    batch = losses.PairLogps(chosen, rejected, zero, zero, lengths, lengths)
    return losses.get(name)(batch, **PREFERENCE[name]).mean()


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "logprobs": lambda logps: logps,
    "statistics": lambda logps: logps,
    "cross_entropy": lambda logps: -logps.sum(),
    **{name: partial(preference_loss, name) for name in PREFERENCE},
}
"""What a system computes, from the per-token log-probabilities. ``logprobs`` takes any upstream
gradient per token, ``statistics`` is the same with the tokens' statistics asked for too; the others
are scalars, which some peers offer only."""


@dataclass(frozen=True)
class Passes:
    """A system, ready to run on a case: two closures, timed apart."""

    forward: Callable[[], Any]
    backward: Callable[[Any], tuple[Tensor, ...]]


def _runs(case: Case) -> str:
    return ""


@dataclass(frozen=True)
class System:
    """Something to measure."""

    name: str
    op: str
    start: Callable[[Case], Passes]
    """Prepares the passes; whatever it does once is not timed."""
    why_not: Callable[[Case], str] = _runs
    """Why the system cannot run on a case; empty if it can."""
    package: str = ""
    """Distribution whose version belongs into the row, besides torch and this one."""
    schedules: tuple[str, ...] = field(default=SCHEDULES[:3])
    """Schedules that it is measured in; a peer knows no memory budget of 0."""


def differentiable(case: Case, function: Callable[[Tensor, Tensor], Tensor]) -> Passes:
    """Passes of ``function(hidden, weight)`` through autograd; it returns log-probs or a scalar."""
    inputs = case.inputs

    def forward() -> Tensor:
        with torch.set_grad_enabled(bool(inputs)):
            return function(case.hidden, case.weight)

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        if not inputs:
            return ()
        grad = case.upstream.to(output.dtype) if output.dim() else torch.ones_like(output)
        return torch.autograd.grad(output, inputs, grad)

    return Passes(forward, backward)
