"""Peak memory of the op, as growth of peak RSS in a fresh process, and the reuse of scratch
slabs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastpref import linear, scratch
from fastpref.ops import linear_logprobs

CPU = torch.device("cpu")

MEASURE = """
import sys
import torch
from fastpref.ops import linear_logprobs
n, h, v, budget, case = 8192, 576, 151936, 256 << 20, sys.argv[1]
grads = {"none": (False, False), "frozen": (True, False), "trainable": (True, True)}[case]
hidden, weight = torch.full((n, h), 0.01), torch.full((v, h), 0.02)
targets = torch.arange(n)
# inputs, outputs and gradients are resident before the peak is read
held = [torch.zeros_like(x) for x, need in zip((hidden, weight), grads) if need] + [torch.zeros(n)]
# of this program alone: what getrusage tells begins with the peak of the process that started it
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = lambda: int(status()["VmHWM"].split()[0]) * 1024
warm = linear_logprobs(hidden[:8], weight[:64], targets[:8]).sum()
before = peak()
del held
hidden.requires_grad_(grads[0]); weight.requires_grad_(grads[1])
logp = linear_logprobs(hidden, weight, targets, memory_budget=budget)
if any(grads):
    logp.sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["none", "frozen", "trainable"])
def test_peak_is_bounded_where_the_logits_would_take_five_gigabytes(case):
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, case], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) <= 600 << 20


def test_a_lent_tensor_is_nobody_elses_until_it_dies():
    scratch.release()
    first = scratch.lend(1000, dtype=torch.float32, device=CPU)
    address = first.data_ptr()
    first.fill_(1.0)
    view = first[10:20]
    del first
    second = scratch.lend(1000, dtype=torch.float32, device=CPU).fill_(2.0)
    assert second.data_ptr() != address
    assert view.tolist() == [1.0] * 10
    del view
    third = scratch.lend(900, dtype=torch.float32, device=CPU)
    assert third.data_ptr() == address
    assert second.unique().tolist() == [2.0]


def test_slabs_do_not_pile_up():
    scratch.release()
    for size in (100, 1000, 10_000, 50):
        with scratch.scratch(torch.device("cpu"), size) as arena:
            assert arena.take(size // 4, dtype=torch.float32).numel() == size // 4
    assert [slab.numel() for slab in scratch._free_cpu_slabs] == [10_000]


def test_the_gradient_of_a_tied_weight_is_added_to_in_place(monkeypatch):
    """The dense gradient of the embedding goes into the head's: no third buffer of that size."""
    lent: list[tuple[int, ...]] = []
    lend = scratch.lend

    def watch(*shape: int, **options: object) -> torch.Tensor:
        made = lend(*shape, **options)
        lent.append((made.data_ptr(), *shape))
        return made

    monkeypatch.setattr(linear, "lend", watch)
    weight, ids = torch.nn.Parameter(torch.randn(5000, 8)), torch.arange(6)
    hidden = torch.nn.functional.embedding(ids, weight) * 2
    linear_logprobs(hidden, weight, ids).sum().backward()
    assert (weight.grad.data_ptr(), 5000, 8) in lent
    truth = weight.detach().double().requires_grad_()
    logits = torch.nn.functional.embedding(ids, truth) * 2 @ truth.T
    logits.log_softmax(-1).gather(-1, ids[:, None]).sum().backward()
    torch.testing.assert_close(weight.grad.double(), truth.grad, rtol=1e-4, atol=1e-4)
