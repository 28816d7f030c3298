"""What is logged: TRL's keys and a few more, summed on the device, read back once a log.

Every metric is a number for each example and what it is averaged over, so batches, accumulation
steps and ranks of any size add up to the same mean.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.disk import write_text
from fastpref.losses import GroupLogps, PairLogps, UnpairedLogps
from fastpref.losses.combine import Combined
from fastpref.losses.maths import log1mexp
from fastpref.ops import segment_sum
from fastpref.policy import Batch, ResponseLogps
from fastpref.stopwatch import Stopwatch

BY_LENGTH = "rewards/accuracies/len_"
"""How the keys of :func:`accuracy_by_length` begin."""
Rows = Mapping[str, tuple[Tensor, Tensor]]
"""By key: for each example a number, and its share of what the mean is taken over. Shapes (B,)."""


@torch.no_grad()
def example_rows(
    examples: PairLogps | UnpairedLogps | GroupLogps,
    batch: Batch,
    policy: ResponseLogps,
    reference: Tensor | None,
    combined: Combined,
) -> Rows:
    """The metrics of a batch; ``policy`` with statistics.

    Args:
        examples: What the losses took.
        batch: Of the collator.
        policy: Of :func:`fastpref.policy.response_logps`.
        reference: Log-probabilities of the tokens, ``(n,)`` or ``(K, n)``, if there are any.
        combined: The losses, which say what the rewards are.
    """
    stats = policy.stats
    assert stats is not None
    cu_seqlens, lengths = batch["cu_seqlens"], batch["lengths"].double()
    numbers = {"entropy": stats.entropy, "logits": stats.logit_mean, "top1": stats.top1}
    if reference is not None:
        # How far they are apart (Schulman's k2). His k3 estimates a KL from samples of the policy,
        # and explodes on tokens of others that the policy has all but ruled out.
        numbers["kl"] = (policy.logps - reference.view(-1, reference.shape[-1])[0]).square() / 2
    summed = {
        name: segment_sum(x.to(policy.logps.dtype), cu_seqlens) for name, x in numbers.items()
    }
    if isinstance(examples, UnpairedLogps):
        return _unpaired_rows(examples, lengths, summed, combined.beta)
    if isinstance(examples, GroupLogps):
        places = _best_and_worst(examples)
        pairs = _pair_of(examples, places)
        return _pair_rows(pairs, batch["groups"].gather(1, places), lengths, summed, combined)
    return _pair_rows(examples, batch["pairs"], lengths, summed, combined)


def _best_and_worst(groups: GroupLogps) -> Tensor:
    """Places of the responses with the highest and the lowest score. Shape ``(B, 2)``."""
    best = groups.scores.masked_fill(~groups.valid, -torch.inf).argmax(1)
    worst = groups.scores.masked_fill(~groups.valid, torch.inf).argmin(1)
    return torch.stack([best, worst], 1)


def _pair_of(groups: GroupLogps, places: Tensor) -> PairLogps:
    numbers: dict[str, Tensor | None] = {"": groups.logps, "ref_": groups.ref_logps}
    fields: dict[str, Any] = {
        prefix + side: x.gather(1, places)[:, i]
        for prefix, x in numbers.items()
        if x is not None
        for i, side in enumerate(("chosen", "rejected"))
    }
    return PairLogps(**fields)


def _pair_rows(
    pairs: PairLogps,
    places: Tensor,
    lengths: Tensor,
    summed: Mapping[str, Tensor],
    combined: Combined,
) -> Rows:
    chosen, rejected = places.unbind(1)
    rewards_chosen = combined.beta * _ratio(pairs.chosen, pairs.ref_chosen)
    rewards_rejected = combined.beta * _ratio(pairs.rejected, pairs.ref_rejected)
    if combined.mean_reward:
        rewards_chosen = rewards_chosen / lengths[chosen].clamp(min=1)
        rewards_rejected = rewards_rejected / lengths[rejected].clamp(min=1)
    one = torch.ones_like(lengths[chosen])
    both = lengths[chosen] + lengths[rejected]
    rows = {
        "entropy": (summed["entropy"][chosen] + summed["entropy"][rejected], both),
        "logits/chosen": (summed["logits"][chosen], lengths[chosen]),
        "logits/rejected": (summed["logits"][rejected], lengths[rejected]),
        "mean_token_accuracy": (summed["top1"][chosen], lengths[chosen]),
        "rewards/chosen": (rewards_chosen, one),
        "rewards/rejected": (rewards_rejected, one),
        "rewards/accuracies": ((rewards_chosen > rewards_rejected).double(), one),
        "rewards/margins": (rewards_chosen - rewards_rejected, one),
        "logps/chosen": (pairs.chosen, one),
        "logps/rejected": (pairs.rejected, one),
        "len/chosen": (lengths[chosen], one),
        "len/rejected": (lengths[rejected], one),
        "nll_loss": (-pairs.chosen, lengths[chosen]),
    }
    if pairs.prompt is not None:  # the likelihood counts it too
        tokens = lengths[chosen] + pairs.prompt_lengths
        rows["nll_loss"] = (-pairs.chosen - pairs.prompt, tokens)
    if "kl" in summed:
        rows["kl"] = (summed["kl"][chosen] + summed["kl"][rejected], both)
    if "orpo" in combined.names:
        good = pairs.chosen / lengths[chosen].clamp(min=1)
        bad = pairs.rejected / lengths[rejected].clamp(min=1)
        odds = (good - bad) - (log1mexp(good) - log1mexp(bad))
        rows |= {"log_odds_chosen": (odds, one), "log_odds_ratio": (logsigmoid(odds), one)}
    return rows


def _unpaired_rows(
    singles: UnpairedLogps, lengths: Tensor, summed: Mapping[str, Tensor], beta: float
) -> Rows:
    size = singles.logps.shape[0]
    lengths = lengths[:size]
    rewards = beta * _ratio(singles.logps, singles.ref_logps)
    rows = {"entropy": (summed["entropy"][:size], lengths)}
    for side, good in (("chosen", singles.labels), ("rejected", ~singles.labels)):
        share = good.double()
        rows |= {
            f"rewards/{side}": (rewards * share, share),
            f"logps/{side}": (singles.logps * share, share),
            f"logits/{side}": (summed["logits"][:size] * share, lengths * share),
            f"len/{side}": (lengths * share, share),
        }
    good = singles.labels.double()
    rows["mean_token_accuracy"] = (summed["top1"][:size] * good, lengths * good)
    if singles.kl_logps is not None:
        point = _ratio(singles.kl_logps, singles.ref_kl_logps).mean().clamp(min=0)
        rows["kl"] = (point.expand(size), torch.ones_like(lengths))
    return rows


def accuracy_by_length(rows: Rows) -> Rows:
    """The accuracy of pairs apart by the tokens of their longer response; of single ones, nothing.

    Args:
        rows: Of :func:`example_rows`.

    Returns:
        ``rewards/accuracies/len_1-32``, ``..._33-64`` and so on, doubling.
    """
    if "rewards/accuracies" not in rows:
        return {}
    wins, _ = rows["rewards/accuracies"]
    longer = torch.maximum(rows["len/chosen"][0], rows["len/rejected"][0])
    found = {}
    for low, high in pairwise([0, *(2**k for k in range(5, 15)), torch.inf]):
        inside = ((longer > low) & (longer <= high)).double()
        name = f"{low + 1}-{high}" if high < torch.inf else f"{low + 1}-"
        found[BY_LENGTH + name] = (wins * inside, inside)
    return found


def _ratio(logps: Tensor, ref: Tensor | None) -> Tensor:
    """Log-ratio to the reference, of several to the first, of none to 0."""
    return logps if ref is None else logps - ref.view(-1, ref.shape[-1])[0]


class Meter:
    """Running sums of the metrics of many batches, in one tensor on the device."""

    def __init__(self) -> None:
        """Empty."""
        self._keys: list[str] = []
        self._totals: Tensor | None = None
        self._examples, self._tokens = 0, 0
        self._step = 0
        """Tokens laid out in rows since the optimiser step began."""
        self._steps = (0, 0, 0)
        """Of the optimiser steps: their number, such tokens, and the sum of their squares."""
        self.tokens_seen = 0
        """Tokens of all batches of the run that were read back, over all ranks."""
        self.head = Stopwatch()
        """Runs while the policy's head does."""
        self._since = time.perf_counter()

    @torch.no_grad()
    def add(
        self, rows: Rows, tokens: int = 0, counts: Tensor | None = None, laid_out: int = 0
    ) -> None:
        """Add a batch; no host sync.

        Args:
            rows: Of :func:`example_rows`.
            tokens: Tokens in it, a prompt counted for each response.
            counts: Bool, ``(B,)``: the examples that count; None: all.
            laid_out: Tokens that went through the model, padding included.
        """
        pairs = list(rows.values())
        stacked = torch.stack([x.double() for x, _ in pairs] + [n.double() for _, n in pairs])
        if counts is not None:
            stacked = stacked.where(counts, 0.0)
        total = stacked.sum(1)
        self._keys = list(rows)
        self._totals = total if self._totals is None else self._totals + total
        self._examples += stacked.shape[1]
        self._tokens += tokens
        self._step += laid_out

    def end_step(self) -> None:
        """An optimiser step ends here."""
        steps, total, squares = self._steps
        self._steps = (steps + 1, total + self._step, squares + self._step**2)
        self._step = 0

    def tokens_so_far(self, sum: Callable[[Tensor], Tensor], device: torch.device) -> float:
        """Tokens of all batches of the run, over all ranks; ``sum`` adds up a tensor over them."""
        return self.tokens_seen + float(sum(torch.tensor(self._tokens, device=device)))

    def read(
        self,
        reduce: Callable[[Tensor], Tensor] | None = None,
        rates: bool = True,
        beside: Mapping[str, Tensor | float] | None = None,
    ) -> dict[str, float]:
        """The means since the last call, by key; one host sync, and the sums start anew.

        Args:
            reduce: Sums a tensor over ranks; None: one rank.
            rates: Also tokens and examples a second, seconds in all and in the policy's head, mean
                and spread of the tokens of a step, and peak memory. Times are of the mean rank,
                memory is this rank's.
            beside: Further numbers of this rank, whose mean over the ranks is found with the rest.

        Returns:
            NaN where nothing was there to take a mean over, such as KTO's rejected responses of a
            log that saw none; but accuracies by length only of lengths that occurred.
        """
        if self._totals is None:
            return {}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        own = (self._examples, self._tokens, *self._steps, seconds, self.head.take(), 1)
        more = [
            torch.as_tensor(x, dtype=self._totals.dtype, device=self._totals.device).view(1)
            for x in (beside or {}).values()
        ]
        packed = torch.cat([self._totals, *more, self._totals.new_tensor(own)])
        found = (packed if reduce is None else reduce(packed)).tolist()
        numbers, (examples, tokens, steps, laid_out, squares, total, head, ranks) = (
            found[: -len(own)],
            found[-len(own) :],
        )
        size = len(self._keys)
        result = {
            key: x / n if n else math.nan
            for key, x, n in zip(self._keys, numbers, numbers[size:], strict=False)
            if n or not key.startswith(BY_LENGTH)
        }
        totals = zip(beside or {}, numbers[2 * size :], strict=True)
        result |= {key: x / ranks for key, x in totals}
        if {"rewards/chosen", "rewards/rejected"} <= result.keys():
            margin = result["rewards/chosen"] - result["rewards/rejected"]
            result.setdefault("rewards/margins", margin)
        self.tokens_seen += int(tokens)
        result["num_tokens"] = float(self.tokens_seen)
        if rates:
            result |= {
                "time/tokens_per_second": tokens / seconds,
                "time/pairs_per_second": examples / seconds,
                "time/seconds": total / ranks,
                "time/head_seconds": head / ranks,
                "mem/peak_bytes": float(peak_memory(packed.device)),
            }
        if rates and steps:
            mean = laid_out / steps
            result |= {
                "len/tokens_per_step": mean,
                "len/tokens_per_step_std": max(squares / steps - mean**2, 0.0) ** 0.5,
            }
        self._totals, self._examples, self._tokens, self._steps = None, 0, 0, (0, 0, 0)
        self._since = time.perf_counter()
        return result

    def restart(self) -> None:
        """Start the clock of the rates."""
        self._since = time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Leave time out of the rates: an evaluation, a checkpoint."""
        self._since += seconds

    def state_dict(self) -> dict[str, Any]:
        """What to save; a host sync."""
        return {
            "keys": self._keys,
            "totals": None if self._totals is None else self._totals.tolist(),
            "examples": self._examples,
            "tokens": self._tokens,
            "steps": self._steps,
            "tokens_seen": self.tokens_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from a saved state."""
        self._keys, totals = list(state["keys"]), state["totals"]
        self._totals = (
            None if totals is None else torch.tensor(totals, dtype=torch.float64, device=device)
        )
        self._examples, self._tokens = state["examples"], state["tokens"]
        self._step, self._steps = 0, tuple(state.get("steps", (0, 0, 0)))
        self.tokens_seen = state["tokens_seen"]
        self._since = time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resident := _resident_peak():
        return resident
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident_peak() -> int:
    """Linux's own count; 0 elsewhere. What ``getrusage`` tells begins with the parent's peak."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "", re.M)
    return int(found[1]) * 1024 if found else 0


class MetricsFile:
    """``metrics.jsonl``: a line for each log, on disk at once, no step twice.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        """See the class."""
        self.path = path

    def begin(self, step: int) -> None:
        """Prepare for a run that goes on after ``step``; 0 is a new run, an old file is set aside.

        What an interrupted run wrote after its checkpoint, and a line cut short, are taken out: the
        resumed run writes them again.
        """
        if not self.path.exists():
            return
        if step == 0:
            taken = sum(1 for _ in self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))
            self.path.rename(self.path.with_suffix(f".{taken + 1}{self.path.suffix}"))
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("step", 0) <= step and "train_runtime" not in record:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, with null for what is not a number."""
        plain = {key: None if x != x else x for key, x in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")
            file.flush()
            os.fsync(file.fileno())
