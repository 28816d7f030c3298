"""A head sharded over 2 and 4 gloo processes equals the whole head, forward and backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpref import backends
from fastpref.ops import linear_cross_entropy, linear_logprobs

BACKENDS = [name for name in ("torch", "cpp") if backends.status()[name] == "ok"]
V, H, N = 5003, 24, 60


def problem():
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(V, H, generator=g), torch.randn(N, H, generator=g)
    bias = torch.randn(V, generator=g)
    bias[:300] = -torch.inf
    targets = torch.randint(300, V, (N,), generator=g)
    targets[7] = -100
    hidden[0] = weight[targets[0]] * 3.0
    return hidden, weight, bias, targets, torch.randn(N, generator=g)


def run(hidden, weight, bias, targets, upstream, **options):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, stats = linear_logprobs(
        *(leaves[0], leaves[1], targets), bias=leaves[2], return_stats=True, **options
    )
    return logp.detach(), stats, torch.autograd.grad((logp * upstream).sum(), leaves)


def close(a, b, what):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m: f"{what}: {m}")


def worker(rank, world, store, backend):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    hidden, weight, bias, targets, upstream = problem()
    # uneven slices; the first rank's is all -inf for a while
    cuts = [0, 301, *[301 + (V - 301) * i // (world - 1) for i in range(1, world)]]
    mine = slice(cuts[rank], cuts[rank + 1])
    for options in (
        {"backend": backend},
        {"backend": backend, "softcap": 4.0, "scale": 0.7},
        {"backend": backend, "memory_budget": 0},
    ):
        whole = run(hidden, weight, bias, targets, upstream, **options)
        part = run(
            *(hidden, weight[mine], bias[mine], targets, upstream),
            process_group=dist.group.WORLD,
            **options,
        )
        close(part[0], whole[0], "logp")
        for name, a, b in zip(part[1]._fields, part[1], whole[1], strict=True):
            close(a, b, name)
        close(part[2][0], whole[2][0], "dhidden")
        close(part[2][1], whole[2][1][mine], "dweight")
        close(part[2][2], whole[2][2][mine], "dbias")
        again = [torch.empty_like(part[0]) for _ in range(world)]
        dist.all_gather(again, part[0])
        assert all(torch.equal(a, part[0]) for a in again)
    with pytest.raises(ValueError, match=rf"\[0, {V}\)"):
        linear_logprobs(hidden, weight[mine], targets + V, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(
            hidden, weight[mine], targets, label_smoothing=0.1, process_group=dist.group.WORLD
        )
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_head_equals_whole_head(world, backend, tmp_path):
    mp.spawn(worker, args=(world, str(tmp_path / "store"), backend), nprocs=world, join=True)


NO_TRACE = """
import os, sys, torch, torch.distributed as dist, fastpref
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
h, w = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
fastpref.linear_logprobs(h, w, torch.arange(4), process_group=dist.group.WORLD).sum().backward()
fastpref.linear_token_kl(h, w, h.detach(), w).sum().backward()
during = len(os.listdir("/proc/self/task"))
dist.destroy_process_group()
print("torch._dynamo" in sys.modules, len(os.listdir("/proc/self/task")) < during)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_ops_leave_no_group_alive(tmp_path):
    """Threads of a group that outlives its destruction abort the process at its end, by chance."""
    command = [sys.executable, "-c", NO_TRACE, str(tmp_path / "store")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["False", "True"]
