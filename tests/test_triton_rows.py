"""The row, segment and pair kernels in Triton against plain torch, and the whole op on top of them.

``test_triton_kernels.py`` says how these run without a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=GPU)]
)
INF, NAN = math.inf, math.nan
# The interpreter cuts fp32 to bf16 where hardware rounds.
ROUNDING = 1.0 if INTERPRETED else 0.5


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels():
    from fastpref.backends import triton

    return triton


def assert_close(got, truth, relative, absolute, what: str) -> None:
    got, truth = got.double().cpu(), truth.double().cpu().expand_as(got)
    same = (got == truth) | (got.isnan() & truth.isnan())
    wrong = ~(same | ((got - truth).abs() <= relative * truth.abs() + absolute))
    if wrong.any():
        i = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}{list(i)}: got {got[i].item()!r}, truth {truth[i].item()!r}")


@on_device
def test_hidden_gradient_may_take_the_place_of_acc(kernels, device):
    n, v, h = 5, 40, 1500
    raw, targets = torch.randn(n, v, device=device), torch.arange(n, device=device) - 1
    weight = torch.randn(v, h, device=device)
    results = []
    for dtype in (None, torch.float32, torch.bfloat16):
        tile, state = raw.clone(), torch.zeros(6, n, device=device)
        state[0], state[2] = -INF, NAN
        kernels.sweep_(tile, tile, state, None, None, targets, None, 0, 1.0, 0.0, False)
        acc = tile @ weight
        acc[0] = NAN  # an ignored row is written, not multiplied
        grad = acc if dtype is None else acc.new_empty(n, h, dtype=dtype)
        rows = torch.empty(3, n, device=device)
        kernels.combine_(state, targets, v, 0.0, 0.5, acc, weight, grad, *rows, None)
        results.append(grad)
    truth = torch.zeros(n, h, dtype=torch.float64, device=device)
    p = raw.double().softmax(-1)
    truth[1:] = 0.5 * (weight.double()[targets[1:]] - p[1:] @ weight.double())
    for grad, eps in zip(results, (2e-6, 2e-6, 1e-2), strict=True):
        assert_close(grad, truth, eps, eps, "hidden_grad")


@on_device
@pytest.mark.parametrize("hidden", [1, 5, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_rows(kernels, device, hidden, dtype):
    x = torch.randn(6, hidden + 3, device=device).to(dtype)[:, :hidden]
    factor = torch.randn(6, device=device).to(torch.promote_types(dtype, torch.float32))
    x[2], factor[2] = INF, 0.0
    x[3], factor[3] = NAN, -0.0
    factor[4] = NAN
    for out_dtype in {dtype, factor.dtype}:
        out = torch.empty(6, hidden, dtype=out_dtype, device=device)
        kernels.scale_rows_(out, x, factor)
        truth = factor[:, None] * x.to(factor.dtype)
        truth[2:4] = 0.0
        eps = 0.0 if out_dtype == factor.dtype else ROUNDING * torch.finfo(dtype).eps
        assert_close(out, truth, eps, 0.0, "out")


@on_device
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_add_target_rows(kernels, device, start, dtype):
    """Runs of equal targets longer than a block, rows outside, ignored rows, rows of factor 0."""
    n, width, hidden = 40, 6, 1100
    targets = torch.randint(-1, 14, (n,))
    targets[5:18] = 5
    targets[20], targets[21] = 10**12, -(10**12)
    targets = targets.to(device)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, hidden, device=device).to(dtype)
    factor = torch.randn(n, device=device).to(wide)
    x[7], factor[7] = NAN, 0.0
    out = torch.randn(width, hidden, device=device).to(wide)
    truth = out.double().clone()
    for i, t in enumerate(targets.tolist()):
        if start <= t < start + width and factor[i] != 0.0:
            truth[t - start] += factor[i].double() * x[i].double()
    again = out.clone()
    kernels.add_target_rows_(out, x, targets, factor, start)
    eps = 1e-14 if dtype == torch.float64 else 1e-6
    assert_close(out, truth, eps, 10 * eps, "out")
    kernels.add_target_rows_(again, x, targets, factor, start)
    assert torch.equal(again, out)


CU_SEQLENS = [[0], [0, 0], [0, 3], [0, 2, 2, 2500, 2501], [4, 9, 9, 1500]]


@on_device
@pytest.mark.parametrize("bounds", CU_SEQLENS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_segment_sum(kernels, device, bounds, dtype):
    n = bounds[-1] + 5
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    values = (-10.0 * torch.rand(2 * n, dtype=dtype, device=device))[::2]
    got = kernels.segment_sum(values, cu)
    truth = [values[a:b].double().sum() for a, b in itertools.pairwise(bounds)]
    assert got.dtype == dtype
    assert_close(got, torch.tensor(truth, dtype=torch.float64).to(dtype), 1e-15, 0.0, "sums")
    grad = torch.randn(len(bounds) - 1, dtype=dtype, device=device)
    back = torch.zeros(n, dtype=dtype, device=device)
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        back[a:b] = grad[i]
    assert torch.equal(kernels.segment_sum_backward(grad, cu, n), back)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pair_margins(kernels, device, dtype):
    """Sequences of no token, in no pair, in several, and on both sides of one."""
    bounds = [3, 8, 8, 2000, 2030]
    n = bounds[-1] + 4
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    pairs = torch.tensor([[0, 2], [2, 1], [0, 3], [0, 0], [3, 2]], device=device)
    logps, ref = -9 * torch.rand(2, n, dtype=dtype, device=device)
    got = kernels.pair_margins(logps, ref, cu, pairs)
    ratio = logps.double() - ref.double()
    sums = torch.stack([ratio[a:b].sum() for a, b in itertools.pairwise(bounds)])
    chosen, rejected = sums[pairs[:, 0]], sums[pairs[:, 1]]
    truth = torch.stack([chosen - rejected, chosen, rejected])
    assert got.dtype == dtype
    eps = 1e-13 if dtype == torch.float64 else 1.2e-7
    assert_close(got, truth, eps, eps, "margins")
    assert (kernels.pair_margins(logps, logps, cu, pairs) == 0.0).all()

    grad = torch.randn(3, 5, dtype=dtype, device=device)
    leaf = logps.double().clone().requires_grad_()
    ratio = leaf - ref.double()
    sums = torch.stack([ratio[a:b].sum() for a, b in itertools.pairwise(bounds)])
    chosen, rejected = sums[pairs[:, 0]], sums[pairs[:, 1]]
    margins = torch.stack([chosen - rejected, chosen, rejected])
    truth = torch.autograd.grad((margins * grad.double()).sum(), leaf)[0]
    back = kernels.pair_margins_backward(grad, cu, pairs, n)
    assert_close(back, truth, 2 * eps, 2 * eps, "dlogps")
    spread = grad[:, :1].expand(3, 5)  # what autograd hands over after a sum
    assert torch.equal(
        kernels.pair_margins_backward(spread, cu, pairs, n),
        kernels.pair_margins_backward(spread.contiguous(), cu, pairs, n),
    )
    none = pairs[:0]
    assert kernels.pair_margins(logps, ref, cu, none).shape == (3, 0)
    assert (kernels.pair_margins_backward(grad[:, :0], cu, none, n) == 0.0).all()


@on_device
def test_a_sequence_outside_the_tokens_is_nan_not_a_wild_read(kernels, device):
    cu = torch.tensor([0, 2, 9], dtype=torch.int32, device=device)
    values = torch.ones(20, device=device)[:5]  # a read past the end would find a 1
    pairs = torch.tensor([[0, 1], [0, 2], [0, -1], [0, 0]], device=device)
    sums = kernels.segment_sum(values, cu)
    assert sums[0] == 2.0
    assert sums[1].isnan()
    margins = kernels.pair_margins(values, values * 2, cu, pairs)[0]
    assert margins[:3].isnan().all()
    assert margins[3] == 0.0
    assert kernels.segment_sum_backward(torch.ones(2, device=device), cu, 5).tolist() == [1.0] * 5


@on_device
def test_nothing_to_do(kernels, device):
    empty, none = torch.empty(0, 7, device=device), torch.empty(0, dtype=torch.long, device=device)
    state, rows = torch.empty(6, 0, device=device), torch.empty(3, 0, device=device)
    kernels.sweep_(empty, empty, state, None, None, none, None, 0, 1.0, 0.0, True)
    kernels.combine_(state, none, 7, 0.0, 1.0, None, torch.ones(7, 4), None, *rows, None)
    kernels.scale_rows_(empty, empty, rows[0])
    out = torch.ones(3, 7, device=device)
    kernels.add_target_rows_(out, empty, none, rows[0], 0)
    assert (out == 1.0).all()


@on_device
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_op_on_these_kernels(kernels, device, monkeypatch, softcap, bias, budget, dtype):
    """The public op and its gradients, with this backend under it, against materialised logits."""
    from fastpref import backends, ops, reference

    monkeypatch.setattr(backends, "_DEVICES", {})
    weight = torch.randn(70, 12, device=device).to(dtype)
    hidden, targets = torch.randn(9, 12, device=device).to(dtype), torch.arange(9, device=device)
    targets[3], targets[5] = -100, 2
    b = torch.randn(70, device=device).to(dtype) if bias else None
    upstream = torch.randn(9, dtype=torch.float64, device=device)
    upstream[1] = 0.0

    def both(function, dtype, **extra):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, b) if x is not None]
        logp, stats = function(
            *(leaves[0], leaves[1], targets),
            bias=leaves[2] if bias else None, scale=0.5, softcap=softcap, **extra,
        )  # fmt: skip
        loss = (logp * upstream.to(logp.dtype)).sum()
        return [logp, *stats, *torch.autograd.grad(loss, leaves)]

    options = {"return_stats": True, "backend": "triton", "memory_budget": budget}
    got = both(ops.linear_logprobs, dtype, **options)
    truth = both(reference.linear_logprobs, torch.float64)
    names = ("logp", "entropy", "lse", "top1", "logit_mean", "log_sum_sq", "dh", "dw", "db")
    for i, (name, a, t) in enumerate(zip(names, got, truth, strict=False)):
        eps = 5e-6 if dtype == torch.float32 or i < 6 else 1.2e-2
        assert_close(a, t, eps, eps * float(t.abs().max()) if i >= 6 else eps, name)


def kl_case(kernels, z, r, *, dtype=None, bias=None, ref_bias=None, cap=0.0, ref_cap=0.0):
    """KL, gradient and S of whole rows in two tiles, as the op calls the kernels."""
    n, width = z.shape
    states, nobody = [], torch.full((n,), width, device=z.device)
    for raw, b, scale, softcap in ((z, bias, 0.5, cap), (r, ref_bias, 0.7, ref_cap)):
        state = torch.zeros(6, n, dtype=raw.dtype, device=raw.device)
        state[0], state[2] = -INF, NAN
        before = raw.clone()
        kernels.sweep_(raw, None, state, None, None, nobody, b, 0, scale, softcap, False)
        torch.testing.assert_close(
            raw, before, rtol=0, atol=0, equal_nan=True
        )  # it is needed again
        states.append(state)
    kl, grads = z.new_zeros(n), []
    for first, last in itertools.pairwise((0, width // 3, width)):
        part = slice(first, last)
        tile = z.new_full((n, last - first + 3), NAN)[:, : last - first].copy_(z[:, part])
        out = tile if dtype is None else torch.full_like(tile, NAN, dtype=dtype)
        b, c = (None if x is None else x[part] for x in (bias, ref_bias))
        kernels.kl_tile_(tile, r[:, part], out, *states, b, c, 0.5, cap, 0.7, ref_cap, kl)
        grads.append(out)
    shared = torch.minimum(states[0][1], states[1][1])
    return kl, torch.cat(grads, 1), shared


def kl_truth(z, r, *, bias=None, ref_bias=None, cap=0.0, ref_cap=0.0):
    logits, slope = [], 1.0
    for raw, b, scale, softcap in ((r, ref_bias, 0.7, ref_cap), (z, bias, 0.5, cap)):
        x = scale * (raw.double() + (0.0 if b is None else b.double()))
        slope = 1.0 / (x / softcap).cosh() ** 2 if softcap else 1.0
        logits.append(softcap * (x / softcap).tanh() if softcap else x)
    log_r, log_p = (x.log_softmax(1) for x in logits)
    r = log_r.exp()
    kl = torch.where(r == 0.0, 0.0, r * (log_r - log_p)).sum(1)
    return kl, (log_p.exp() - r) * slope


@on_device
@pytest.mark.parametrize("width", [7, 900, 4099])
@pytest.mark.parametrize(("cap", "ref_cap"), [(0.0, 0.0), (20.0, 0.0), (3.0, 9.0)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_kl_of_a_tile(kernels, device, width, cap, ref_cap, dtype):
    z, r = (torch.randn(5, width, device=device) * s for s in (3.0, 2.0))
    r[1] = z[1] * 0.5 / 0.7 + 1e-3 * torch.randn(width, device=device)  # close
    z[2, 3] = 60.0  # both peaked, at different tokens
    r[2, 5] = 60.0
    options = {"cap": cap, "ref_cap": ref_cap}
    if width == 900:
        options |= {"bias": torch.randn(width, device=device)}
    if width == 4099:
        options |= {"ref_bias": torch.randn(width, device=device)}
    kl, out, shared = kl_case(kernels, z, r, dtype=dtype, **options)
    true_kl, truth = kl_truth(z, r, **options)
    assert_close(kl, true_kl, 3e-6, 3e-6, "kl")
    assert (out.abs() <= 1.0).all()
    rounding = {None: 2e-6, torch.bfloat16: 2**-7 * ROUNDING, torch.float16: 2**-10 * ROUNDING}
    absolute = 2e-6 if dtype is not torch.float16 else 3e-6
    # entries near 0 are differences of probabilities that are good to a few ulp
    assert_close(out, truth * shared[:, None].double(), rounding[dtype], absolute, "gradient")


@on_device
def test_kl_of_equal_and_hostile_rows(kernels, device):
    z = torch.randn(6, 300, device=device)
    z[1, 7] = -INF
    kl, out, _ = kl_case(kernels, z, z * (0.5 / 0.7))
    assert kl.abs().max() < 1e-5  # the scales differ: equal only up to rounding
    r = z * (0.5 / 0.7)
    r[0, 4] = -INF  # ruled out by the reference alone
    z[2, 9] = -INF  # by the policy alone
    z[3, 11], r[4, 0] = NAN, NAN
    z[5] = -INF
    kl, out, shared = kl_case(kernels, z, r)
    true_kl, truth = kl_truth(z, r)
    assert kl[2] == INF
    assert kl[3:].isnan().all()
    assert_close(kl, true_kl, 3e-6, 3e-6, "kl")
    assert_close(out[:3], (truth * shared[:, None].double())[:3], 2e-6, 2e-6, "gradient")
