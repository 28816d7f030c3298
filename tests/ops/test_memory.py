"""Peak memory of the op, as growth of peak RSS in a fresh process, and the reuse of scratch
slabs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastpref import linear, operands, schedule, scratch
from fastpref.ops import linear_logprobs

CPU = torch.device("cpu")

MEASURE = """
import sys
import torch
from fastpref.ops import linear_logprobs
case, dtype = sys.argv[1], getattr(torch, sys.argv[2])
n, h, v, budget, every = map(int, sys.argv[3:])
grads = {"none": (False, False), "frozen": (True, False), "trainable": (True, True)}[case]
hidden, weight = torch.full((n, h), 0.01, dtype=dtype), torch.full((v, h), 0.02, dtype=dtype)
targets = torch.arange(n) % v
targets[torch.arange(n) % every != 0] = -100
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


MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "shape", "budget", "every"),
    [
        ("none", torch.float32, (8192, 192, 151_936), 256 * MIB, 1),
        ("frozen", torch.float32, (8192, 192, 151_936), 256 * MIB, 1),
        ("trainable", torch.float32, (8192, 192, 151_936), 256 * MIB, 1),
        ("trainable", torch.float32, (2048, 5376, 4000), 0, 1),
        ("trainable", torch.bfloat16, (2048, 5376, 4000), 0, 1),
        ("none", torch.float32, (32_768, 2304, 2000), 0, 2),
        ("frozen", torch.bfloat16, (32_768, 2304, 2000), 0, 2),
        ("trainable", torch.float32, (32_768, 2304, 2000), 64 * MIB, 2),
    ],
    ids=str,
)
def test_peak_is_the_budget_and_64_mib(case, dtype, shape, budget, every):
    """Beyond inputs and gradients, ``dlogp/dhidden`` among these; the logits would take 5 GB at the
    first shape, and the rows that count of the last three 151 MB."""
    arguments = [case, str(dtype).removeprefix("torch."), *map(str, (*shape, budget, every))]
    command = [sys.executable, "-c", MEASURE, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    unit = shape[0] // every * shape[1] * dtype.itemsize if case != "none" else 0
    assert int(out.stdout) <= budget + 64 * MIB + unit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("budget", [0, None])
def test_scratch_is_what_is_taken_from_it(monkeypatch, dtype, on_gpu, budget):
    """Bytes that are asked for and not used are bytes of a GPU all the same."""
    low = on_gpu and dtype == torch.bfloat16
    monkeypatch.setattr(operands, "multiplies_low", lambda *_: low)
    hidden, weight = (torch.empty(n, 640, dtype=dtype, device="meta") for n in (9000, 49_152))
    device = "cuda" if on_gpu else "cpu"
    p = schedule.plan(9000, 49_152, 640, dtype.itemsize, device, budget)
    rows = operands.Rows(hidden)
    size = operands.Operands.size(p, rows, weight)
    arena = scratch.Arena(torch.empty(size, dtype=torch.uint8, device="meta"))
    operands.Operands(arena, p, rows, weight)
    assert arena._used == size


@pytest.mark.parametrize("ignored", [False, True])
def test_a_frozen_head_holds_the_gradient_and_not_hidden(ignored):
    hidden, weight = torch.randn(64, 100, requires_grad=True), torch.randn(30, 100)
    targets, held = torch.arange(64) % 30, {}
    if ignored:
        targets[::2] = -100

    def note(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        logp = linear_logprobs(hidden * 1.0, weight, targets)
    held.pop(weight.data_ptr())
    assert sum(held.values()) < 1.2 * (32 if ignored else 64) * 100 * 4
    (found,) = torch.autograd.grad(logp.sum(), hidden)
    logits = hidden.double() @ weight.double().T
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected,) = torch.autograd.grad(-loss, hidden)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


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
