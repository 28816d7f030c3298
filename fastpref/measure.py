"""How ``fastpref bench`` measures: inputs, correctness gate, interleaved timing, peak memory."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import scratch
from fastpref.case import OPS, PREFERENCE, Case, Passes, System
from fastpref.costs import Head
from fastpref.peers import systems

GATE_ROWS = 1024
_GATE_FLOPS = {
    "cpu": 4e11,
    "cuda": 4e13,
}  # of the float64 truth, which is slow where it is emulated
_LOGIT_STD = 2.5  # of unplanted logits; trained heads are in the same range
_PLANTED = 2.4  # multiple of the target's weight row in every other hidden state

# Far above rounding, far below a wrong formula: nats per 1,024 tokens, relative error of a scalar,
# relative error of a gradient.
_LIMITS = {
    torch.float32: (0.05, 1e-4, 1e-3),
    torch.float16: (2.0, 1e-2, 2e-2),
    torch.bfloat16: (8.0, 2e-2, 6e-2),
}


@dataclass(frozen=True)
class Problem:
    """What a table is about; enough to make the same inputs in another process."""

    rows: int
    head: Head
    dtype: torch.dtype
    device: str
    schedule: str
    budget: int | None = None

    def case(self, seed: int = 0, rows: int | None = None, like: Case | None = None) -> Case:
        """Fresh inputs, or fresh rows on the weight of another case. Every other row is planted so
        that its target is likely; the rest are flat."""
        n, head = self.rows if rows is None else rows, self.head
        rng = torch.Generator(self.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": rng, "device": self.device}
        std = _LOGIT_STD / head.hidden_size**0.5
        if like is None:
            weight = torch.randn(head.vocab_size, head.hidden_size, dtype=self.dtype, **options)
            weight.mul_(std)
        else:
            weight = like.weight.detach()
        targets = torch.randint(head.vocab_size, (n,), **options)
        hidden = torch.randn(n, head.hidden_size, dtype=self.dtype, **options)
        hidden[::2] += _PLANTED * weight[targets[::2]]
        upstream = torch.randn(n, **options)
        hidden.requires_grad_(self.schedule != "none")
        weight.requires_grad_(self.schedule in ("trainable", "recompute"))
        return Case(hidden, weight, targets, upstream, self.schedule, head.softcap, self.budget)

    def gate_rows(self) -> int:
        """Rows of the gate's case: at most 1,024, fewer where float64 would take minutes."""
        per_row = 6 * self.head.hidden_size * self.head.vocab_size
        affordable = max(64, int(_GATE_FLOPS[self.device] / per_row))
        rows = min(self.rows, GATE_ROWS, affordable)
        return rows - rows % 2 if rows > 1 else rows


@dataclass(frozen=True)
class Truth:
    """The right answer in float64."""

    output: Tensor
    gradients: list[Tensor]


def truth(case: Case, op: str) -> Truth:
    """Output and gradients of ``op`` in float64, from logits materialised a few rows at a time."""
    weight = case.weight.detach().double()
    block = max(1, (1 << 26) // weight.shape[0])
    spans = [slice(i, i + block) for i in range(0, case.targets.numel(), block)]

    def logits(rows: slice) -> tuple[Tensor, Tensor]:
        z = case.hidden[rows].detach().double() @ weight.t()
        slope = torch.ones((), dtype=z.dtype, device=z.device)
        if case.softcap is not None:
            t = torch.tanh(z / case.softcap)
            z, slope = case.softcap * t, 1.0 - t * t
        return z.log_softmax(-1), slope

    picked = [logits(s)[0].gather(1, case.targets[s, None])[:, 0] for s in spans]
    logps = torch.cat(picked).requires_grad_()
    output = OPS[op](logps)
    if not case.inputs:
        return Truth(output.detach(), [])
    arriving = case.upstream.double() if output.dim() else torch.ones_like(output)
    (upstream,) = torch.autograd.grad(output, logps, arriving)
    dhidden, dweight = [], torch.zeros_like(weight if case.weight.requires_grad else weight[:0])
    for s in spans:
        logp, slope = logits(s)
        g = upstream[s, None]
        dz = logp.exp_().mul_(-g)
        dz.scatter_add_(1, case.targets[s, None], g)
        dz.mul_(slope)
        dhidden.append(dz @ weight)
        if len(dweight):
            dweight.addmm_(dz.t(), case.hidden[s].detach().double())
    return Truth(output.detach(), [torch.cat(dhidden), dweight][: len(case.inputs)])


@dataclass(frozen=True)
class Check:
    """What the gate found."""

    error_nats_per_1024: float | None = None
    relative_gradient_error: float | None = None
    deterministic: bool | None = None
    verdict: str = ""
    """Empty, or why the system gets no speed."""


def _relative_error(got: Tensor, want: Tensor) -> float:
    """In the Frobenius norm; in blocks of rows, as a head's float64 copy is large."""
    off = size = torch.zeros((), dtype=torch.float64, device=want.device)
    for i in range(0, want.shape[0], 1 << 14):
        a, b = got[i : i + (1 << 14)].double(), want[i : i + (1 << 14)]
        off, size = off + (a - b).square().sum(), size + b.square().sum()
    return float((off / size).sqrt())


def check(system: System, case: Case, right: Truth) -> Check:
    """Compare a system with the truth, and with itself run again.

    The error of log-probabilities is that of a 1,024-token sequence: the absolute value of the sum
    of the rows' errors, scaled to 1,024 rows. A gradient's is relative in the Frobenius norm, the
    worst of hidden and weight.
    """
    passes = system.start(case)
    results: list[tuple[Tensor, ...]] = []
    for _ in range(2):
        output = passes.forward()
        results.append((output.detach().clone(), *(g.clone() for g in passes.backward(output))))
    first, again = results
    deterministic = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    nats_limit, scalar_limit, gradient_limit = _LIMITS[case.hidden.dtype]
    off = first[0].double() - right.output
    error = float(off.sum().abs()) * GATE_ROWS / case.targets.numel()
    if right.output.dim():
        # errors that cancel in the sum, as of rows in another order, do not in their squares
        apart = float(off.square().mean().sqrt()) * GATE_ROWS**0.5
        wrong = not max(error, apart) <= nats_limit
    else:
        wrong = not float(off.abs()) <= scalar_limit * max(1.0, float(right.output.abs()))
    pairs = zip(first[1:], right.gradients, strict=True)
    gradient = max((_relative_error(got, want) for got, want in pairs), default=0.0)
    verdict = ""
    if wrong:
        verdict = f"wrong: off by {error:.3g} nats per 1,024 tokens"
    elif not gradient <= gradient_limit:
        verdict = f"wrong: gradient off by {gradient:.3g}"
    has_gradient = bool(right.gradients)
    return Check(
        None if system.op in PREFERENCE else error,
        gradient if has_gradient else None,
        deterministic,
        verdict,
    )


CLOCKS = ("wall", "cpu", "device")
"""Wall time; CPU time of the process, for a machine that does other work too (with one thread, as
waiting threads spin); events on a CUDA device."""


def _clock(name: str) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """``stamp()`` and ``milliseconds(earlier, later)`` of a clock."""
    if name != "device":
        read = time.perf_counter if name == "wall" else time.process_time
        return read, lambda a, b: 1e3 * (b - a)

    def stamp() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def milliseconds(a: Any, b: Any) -> float:
        b.synchronize()
        return float(a.elapsed_time(b))

    return stamp, milliseconds


def once(passes: Passes, clock: str) -> tuple[float, float]:
    """Milliseconds of one forward and one backward."""
    stamp, milliseconds = _clock(clock)
    if clock == "device":
        torch.cuda.synchronize()
    start = stamp()
    output = passes.forward()
    middle = stamp()
    gradients = passes.backward(output)
    end = stamp()
    del output, gradients
    return milliseconds(start, middle), milliseconds(middle, end)


Times = list[tuple[float, float]]


def race(entries: list[Passes], rounds: int, clock: str, tick: Callable[[], None]) -> list[Times]:
    """Milliseconds of forward and backward, per entry and round.

    The entries take turns within a round, another one first each time, so that what disturbs the
    machine disturbs them alike. Each has run before. ``tick`` is called after each turn.
    """
    times: list[Times] = [[] for _ in entries]
    for r in range(rounds):
        for i in range(len(entries)):
            turn = (r + i) % len(entries)
            times[turn].append(once(entries[turn], clock))
            tick()
    return times


def peak_extra_bytes(problem: Problem, system: System, plugins: list[str]) -> int | None:
    """The most memory that one forward and backward held beyond inputs and gradients.

    On CUDA the allocator's peak; on CPU the growth of the peak resident size of a fresh process
    that has run the system once before and given everything back. None where the platform cannot
    tell.
    """
    if problem.device == "cuda":
        return _peak_on_cuda(problem, system)
    request = asdict(problem) | {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "system": [system.name, system.op],
        "plugins": plugins,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "fastpref.measure", json.dumps(request)]
    scratch.release()  # the other process needs the memory
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    answer: int | None = json.loads(done.stdout.splitlines()[-1])
    return answer


def _gradient_bytes(case: Case) -> int:
    return sum(x.numel() * x.element_size() for x in case.inputs)


def _run(passes: Passes) -> None:
    passes.backward(passes.forward())


def _peak_on_cuda(problem: Problem, system: System) -> int:
    case = problem.case()
    passes = system.start(case)
    _run(passes)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run(passes)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _gradient_bytes(case)


def _peak_on_cpu(problem: Problem, system: System) -> int | None:
    """Of this process; it should have done nothing else."""
    case = problem.case()
    passes = system.start(case)
    _run(passes)
    scratch.release()
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts again from what is resident now

    def kilobytes(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
        return int(found[1]) if found else 0

    before = kilobytes("VmRSS")
    _run(passes)
    return max(0, 1024 * (kilobytes("VmHWM") - before) - _gradient_bytes(case))


def _probe(request: dict[str, Any]) -> int | None:
    torch.set_num_threads(request.pop("threads"))
    name, op = request.pop("system")
    found = [s for s in systems(request.pop("plugins")) if (s.name, s.op) == (name, op)]
    request["head"] = Head(**request["head"])
    request["dtype"] = getattr(torch, request["dtype"])
    return _peak_on_cpu(Problem(**request), found[0])


if __name__ == "__main__":
    print(json.dumps(_probe(json.loads(sys.argv[1]))))
