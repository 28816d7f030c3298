"""What malloc holds: asked with blocks that nobody writes to."""

from __future__ import annotations

import platform
import subprocess
import sys

import psutil
import pytest

from fastpref.heap import Malloc

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
MIB = 1 << 20


def test_blocks_take_address_space_and_no_memory() -> None:
    process = psutil.Process()
    malloc = Malloc()
    before = process.memory_info().rss
    block = malloc.allocate(512 * MIB)
    assert 512 * MIB <= malloc.held < 513 * MIB
    assert process.memory_info().rss - before < 8 * MIB
    assert block % 64 == 0
    malloc.free(block)
    assert malloc.held < MIB


HOLES = """
from fastpref.heap import Malloc
MIB = 1 << 20
malloc = Malloc()
malloc.free(malloc.allocate(31 * MIB))  # from here on what is smaller is in the heap
blocks = [malloc.allocate(MIB) for _ in range(200)]
whole = malloc.held
for block in blocks[::2]:
    malloc.free(block)
assert malloc.held == whole > 199 * MIB, (malloc.held, whole)
again = [malloc.allocate(MIB // 2) for _ in range(100)]  # these fit into the holes
assert malloc.held < whole + MIB, (malloc.held, whole)
"""


def test_a_heap_with_holes_does_not_shrink() -> None:
    """In a process of its own, whose heap has no holes from before."""
    done = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_block_that_no_machine_has_counts() -> None:
    malloc = Malloc()
    blocks = [malloc.allocate(1 << 60), malloc.allocate(1 << 59)]
    assert malloc.held >= (1 << 60) + (1 << 59)
    malloc.free(blocks[0])
    third = malloc.allocate(1 << 58)
    assert (1 << 58) + (1 << 59) <= malloc.held < 1 << 60
    for block in (blocks[1], third):
        malloc.free(block)
    assert malloc.held < MIB


STEPS = """
import os
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from fastpref.footprint import Layout, count_step, faked
from fastpref.heap import Malloc
from fastpref.policy import response_logps

layout = Layout(2, 640, 200)
config = LlamaConfig(
    vocab_size=997, hidden_size=256, intermediate_size=704, num_hidden_layers=5,
    num_attention_heads=8, num_key_value_heads=4,
)


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), fused=True)


def planned():
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with faked(model):
        return count_step(
            model, layout, head_options={}, precision=None, make_optimizer=make_optimizer,
            micro_batches=1, on_cpu=True,
        ).total()


class Peak(TorchDispatchMode):
    def __init__(self, malloc):
        super().__init__()
        self.malloc, self.held = malloc, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.held = max(self.held, self.malloc.held)
        return out


def real():
    model = LlamaForCausalLM(config).train()
    rows, tokens, scored = layout
    with Peak(Malloc()) as peak:
        optimizer = make_optimizer(model)
        masks = [torch.ones(layout.mask_shape, dtype=torch.bool).tril() for _ in range(2)]
        batch = {
            "input_ids": torch.randint(997, (rows, tokens)),
            "position_ids": torch.arange(tokens).repeat(rows, 1),
            "attention_mask": masks[0],
            "response_rows": torch.arange(scored),
            "response_targets": torch.randint(997, (scored,)),
        }
        for _ in range(2):
            response_logps(model, batch, return_stats=True).logps.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return peak.held


# each in a process of its own, with the same heap to begin with
for task in (planned, real):
    if os.fork() == 0:
        print(task(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_real_step_takes_from_malloc_what_is_planned() -> None:
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, real = map(int, done.stdout.split())
    assert planned == pytest.approx(real, rel=0.15)
