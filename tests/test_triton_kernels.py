"""The Triton row kernels against plain float64 torch: values, hostile rows, repeatability.

The same cases run twice. Without a GPU, through Triton's interpreter on CPU tensors: it has to be on
before triton is imported, so one test starts this file again in a process of its own. With a GPU,
compiled, as tests marked ``gpu``.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

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


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_all_kernels_through_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    print(run.stdout.strip().splitlines()[-1])


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


def new_state(n: int, dtype: torch.dtype, device: str) -> Tensor:
    state = torch.zeros(6, n, dtype=dtype, device=device)
    state[0], state[2] = -INF, NAN
    return state


def cut(width: int, *points: int) -> list[tuple[int, int]]:
    """Tiles of ``width`` columns that end at the given points."""
    return list(itertools.pairwise((0, *points, width)))


class Rows:
    """The schedule in small: all tiles of ``raw`` through the kernels, and what they leave."""

    def __init__(
        self, kernels, raw, targets, tiles, *,
        bias=None, scale=1.0, softcap=0.0, with_stats=True, out="in place", gradient=True,
    ):  # fmt: skip
        n, vocab_size = raw.shape
        new = raw.new_empty
        weight = torch.randn(vocab_size, 5, dtype=raw.dtype, device=raw.device)
        self.weight = weight.to(out) if isinstance(out, torch.dtype) else weight
        self.state = new_state(n, raw.dtype, raw.device)
        self.stored = []
        acc = raw.new_zeros(n, 5)
        for v0, v1 in tiles:
            tile = raw.new_full((n, v1 - v0 + 3), NAN)[:, : v1 - v0].copy_(raw[:, v0:v1])
            g = {"in place": tile, "none": None}.get(out, NAN)
            if isinstance(out, torch.dtype):
                g = new((n, v1 - v0 + 2), dtype=out)[:, : v1 - v0]
            offset = None if g is None else new(n)
            kernels.sweep_(
                *(tile, g, self.state, offset, acc if gradient else None, targets),
                *(None if bias is None else bias[v0:v1], v0, scale, softcap, with_stats),
            )
            if gradient:
                acc += g.to(acc.dtype) @ self.weight[v0:v1].to(acc.dtype)
            self.stored.append((v0, v1, g, offset))
        self.logp, self.q, self.coef = new(n), new(n), new(n)
        self.hidden_grad = new(n, 5) if gradient else None
        self.stats = new(5, n) if with_stats else None
        kernels.combine_(
            *(self.state, targets, vocab_size, softcap, scale, acc if gradient else None),
            *(self.weight, self.hidden_grad, self.logp, self.q, self.coef, self.stats),
        )


class Truth:
    """The same in float64, all logits at once. With z detached from nothing: gradients by
    autograd."""

    def __init__(self, raw, targets, weight, *, bias=None, scale=1.0, softcap=0.0):
        raw = raw.double().clone().requires_grad_()
        n, vocab_size = raw.shape
        rows, y = torch.arange(n, device=raw.device), targets.clamp(0, vocab_size - 1)
        z = scale * (raw + (0.0 if bias is None else bias.double()))
        z = softcap * torch.tanh(z / softcap) if softcap else z
        all_logps = z.log_softmax(-1)
        logp = all_logps[rows, y]
        draw = torch.autograd.grad(logp.sum(), raw)[0]
        self.z = z.detach()
        ignored, outside = targets < 0, targets >= vocab_size
        blank = torch.where(outside, NAN, 0.0)
        self.logp = (logp.detach() + blank).masked_fill(ignored, 0.0)
        others = self.z.clone().index_put_((rows, y), torch.tensor(-INF, dtype=z.dtype))
        self.maximum = others.amax(1)
        lse = self.z.logsumexp(-1)
        slope = 1.0 - (self.z[rows, y] / softcap) ** 2 if softcap else torch.ones_like(lse)
        self.q = (torch.exp(others.logsumexp(-1) - lse) * slope + blank).masked_fill(ignored, 0.0)
        self.flat = float(softcap > 0)
        hidden = draw @ weight.double()
        self.hidden_grad = (hidden + blank[:, None]).masked_fill(ignored[:, None], 0.0)
        p = all_logps.detach().exp()
        stats = torch.stack(
            [
                torch.special.entr(p).sum(-1),
                lse,
                (self.z[rows, y] >= self.z.amax(-1)).double(),
                self.z.mean(-1),
                (2 * all_logps.detach()).logsumexp(-1),
            ]
        )
        self.stats = stats.masked_fill(ignored, 0.0)


def assert_close(got, truth, relative, absolute, what: str) -> None:
    got, truth = got.double(), truth.double().expand_as(got)
    same = (got == truth) | (got.isnan() & truth.isnan())
    wrong = ~(same | ((got - truth).abs() <= relative * truth.abs() + absolute))
    if wrong.any():
        i = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}{list(i)}: got {got[i].item()!r}, truth {truth[i].item()!r}")


def check(kernels, raw, targets, tiles, **options) -> Rows:
    """All results of the kernels for one set of logits, against the truth."""
    got = Rows(kernels, raw, targets, tiles, **options)
    low = options.get("out") if isinstance(options.get("out"), torch.dtype) else None
    plain = {k: options[k] for k in ("bias", "scale", "softcap") if k in options}
    truth = Truth(raw, targets, got.weight, **plain)
    wide = raw.dtype == torch.float64
    eps = 1e-14 if wide else 2.5e-7
    size = 1.0 + truth.z.abs().nan_to_num(0, 0, 0).amax(1)  # of the logits whose difference counts
    assert_close(got.logp, truth.logp, 2 * eps, eps, "logp")
    a = (size * eps)[:, None]
    # the slope of the cap, 1 - t^2, keeps the absolute precision of t
    assert_close(got.q, truth.q, 0.0, 2 * a[:, 0] * truth.q.abs() + truth.flat * 4 * eps, "q")
    rounded = eps if low is None else ROUNDING * torch.finfo(low).eps
    if got.hidden_grad is not None:
        largest = got.weight.double().abs().max() * (1.0 if low is None else 2.0)
        assert_close(
            got.hidden_grad, truth.hidden_grad, 0.0, (rounded * 8 + a) * largest, "dhidden"
        )
    if got.stats is not None:
        for i, name in enumerate(("entropy", "lse", "top1", "logit_mean", "log_sum_sq_probs")):
            assert_close(got.stats[i], truth.stats[i], 4 * eps, 8 * eps * size.max(), name)
    counts, local = targets >= 0, torch.arange(raw.shape[1], device=raw.device)
    for v0, v1, g, offset in got.stored:
        if g is None:
            continue
        e = torch.exp(truth.z[:, v0:v1] - offset.double()[:, None])
        e = torch.where(truth.z[:, v0:v1] == -INF, 0.0, e)
        e = torch.where((local[v0:v1] == targets[:, None]) | ~counts[:, None], 0.0, e)
        allowed = (a + 4 * eps * truth.flat) * e + (6e-8 if low == torch.float16 else 1e-38)
        if options.get("softcap"):
            e = e * (1.0 - (truth.z[:, v0:v1] / options["softcap"]) ** 2)
        assert_close(g, e, rounded, allowed, f"G of {v0}:{v1}")
    assert_close(got.state[0][counts], truth.maximum[counts], 2 * eps, eps, "M")
    return got


def problem(n: int, vocab_size: int, device: str, dtype=torch.float32, spread: float = 4.0):
    """Raw dot products with planted extremes, and targets."""
    raw = torch.randn(n, vocab_size, dtype=torch.float64) * spread
    targets = torch.randint(0, vocab_size, (n,))
    if n >= 6 and vocab_size > 1:
        raw[0, targets[0]] += 60.0  # p_y -> 1, and 1 - p_y far below the eps of fp32
        raw[1, targets[1]] -= 70.0  # p_y -> 1e-30
        raw[2] = 0.25  # flat
        raw[3] += 1e4  # a shift that fp32 has to carry
        targets[4] = -1
        raw[5, -1] += 30.0  # M grows late
    return raw.to(dtype).to(device), targets.to(device)


@on_device
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (7, 2), (7, 3), (6, 127), (7, 300), (6, 2500)])
def test_shapes(kernels, device, shape):
    n, v = shape
    raw, targets = problem(n, v, device)
    check(kernels, raw, targets, cut(v, *[v // 3, v // 2][: v - 1]) if v > 3 else cut(v))


@on_device
def test_every_column_a_tile(kernels, device):
    raw, targets = problem(6, 9, device)
    check(kernels, raw, targets, cut(9, *range(1, 9)))


@on_device
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("out", ["in place", torch.bfloat16, torch.float16], ids=str)
def test_options(kernels, device, softcap, bias, scale, out):
    raw, targets = problem(7, 333, device, spread=3.0)
    raw[3] -= 1e4
    b = torch.randn(333, device=device) if bias else None
    check(
        *(kernels, raw, targets, cut(333, 128, 256)),
        bias=b, scale=scale, softcap=softcap, out=out,
    )  # fmt: skip


@on_device
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_float64(kernels, device, softcap):
    raw, targets = problem(7, 333, device, torch.float64, spread=3.0)
    check(kernels, raw, targets, cut(333, 100), softcap=softcap, scale=0.5)


@on_device
def test_softcap_is_exact_for_small_and_large_logits(kernels, device):
    """Elementwise: tanh keeps its relative precision, and its slope where it saturates."""
    x = torch.logspace(-6, 2, 400, dtype=torch.float64)
    raw = torch.cat([x, -x])[None].float().to(device)
    raw = torch.cat([raw, torch.tensor([[INF, -INF, 0.0]], device=device)], 1)
    for sign in (0, 400):  # the target's logit is stored as it is: walk it over the row
        for j in range(0, 400, 37):
            state = new_state(1, torch.float32, device)
            target = torch.tensor([sign + j], device=device)
            tile = raw.clone()
            kernels.sweep_(tile, None, state, None, None, target, None, 0, 1.0, 10.0, False)
            truth = 10.0 * torch.tanh(raw[0, sign + j].double() / 10.0)
            assert_close(state[2], truth[None], 4e-7, 0.0, f"cap({raw[0, sign + j].item()})")


@on_device
def test_rows_wider_than_registers_hold(kernels, device):
    v = 40_000
    raw, targets = problem(2, v, device)
    assert not kernels.sweep_config(v, torch.float32, False, False)["HELD"]
    check(kernels, raw, targets, cut(v))


@on_device
def test_the_sums_do_not_depend_on_what_else_is_asked_for(kernels, device):
    v = 20_000
    raw, targets = problem(6, v, device)
    full = {"softcap": 30.0, "with_stats": True}
    assert not kernels.sweep_config(v, torch.float32, True, True)["HELD"]
    first = Rows(kernels, raw, targets, cut(v), **full)
    for other in (
        {"out": "none", "gradient": False},
        {"out": torch.bfloat16},
        {"with_stats": False},
        {"with_stats": False, "out": "none", "gradient": False},
    ):
        again = Rows(kernels, raw, targets, cut(v), **(full | other))
        for name in ("logp", "q", "coef"):
            assert torch.equal(getattr(first, name), getattr(again, name)), (name, other)


@on_device
def test_tiles_of_minus_infinity(kernels, device):
    raw, targets = problem(6, 60, device)
    raw[:, :20] = -INF
    raw[0, :40] = -INF
    raw[1, 41:] = -INF
    raw[2] = -INF  # only the target is possible: certain
    raw[2, 30] = 1.0
    targets[:] = torch.tensor([45, 40, 30, 5, -1, 59])
    got = check(kernels, raw, targets, cut(60, 10, 20, 40))
    assert got.logp[2] == 0.0
    assert got.q[2] == 0.0
    assert got.coef[2] == 0.0
    assert got.logp[3] == -INF  # an impossible target
    assert got.stats[2].tolist()[2] == 1.0


@on_device
def test_everything_impossible_is_nan(kernels, device):
    raw = torch.full((1, 40), -INF, device=device)
    got = Rows(kernels, raw, torch.tensor([3], device=device), cut(40, 20))
    assert got.logp.isnan().all()


@on_device
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("at_target", [False, True])
def test_a_bad_logit_poisons_its_row_only(kernels, device, bad, at_target):
    raw, targets = problem(7, 90, device)
    clean = Rows(kernels, raw, targets, cut(90, 40, 80))
    targets[5] = 50
    raw[5, 50 if at_target else 45] = bad
    torch.manual_seed(0)
    problem(7, 90, device)
    got = Rows(kernels, raw, targets, cut(90, 40, 80))
    for name in ("logp", "q", "coef"):
        assert getattr(got, name)[5].isnan(), name
    rest = torch.tensor([0, 1, 2, 3, 4, 6], device=device)
    for name in ("logp", "q", "coef", "hidden_grad"):
        assert torch.equal(getattr(got, name)[rest], getattr(clean, name)[rest]), name
    assert got.hidden_grad[5].isnan().all()


@on_device
def test_ignored_and_out_of_range_targets(kernels, device):
    raw, targets = problem(6, 50, device)
    raw[1] = NAN  # not read
    targets[:] = torch.tensor([50, -1, 10**12, 7, -(10**12), 49])
    got = Rows(kernels, raw, targets, cut(50, 30))
    for name in ("logp", "q", "coef"):
        values = getattr(got, name)
        assert values[[0, 2]].isnan().all(), name
        assert (values[[1, 4]] == 0.0).all(), name
        assert values[[3, 5]].isfinite().all(), name
    assert (got.hidden_grad[[1, 4]] == 0.0).all()
    assert got.hidden_grad[[0, 2]].isnan().all()
    assert (got.stats[:, [1, 4]] == 0.0).all()
    start = new_state(6, torch.float32, device)
    assert torch.equal(got.state[:, [1, 4]].nan_to_num(7), start[:, [1, 4]].nan_to_num(7))
    for _, _, g, _ in got.stored:
        assert (g[[1, 4]] == 0.0).all()


@on_device
def test_hidden_gradient_may_take_the_place_of_acc(kernels, device):
    n, v, h = 5, 40, 1500
    raw, targets = torch.randn(n, v, device=device), torch.arange(n, device=device) - 1
    weight = torch.randn(v, h, device=device)
    results = []
    for dtype in (None, torch.float32, torch.bfloat16):
        tile, state = raw.clone(), new_state(n, torch.float32, device)
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
def test_acc_is_rescaled_only_where_the_maximum_grew(kernels, device):
    n, h = 4, 1300
    state = new_state(n, torch.float32, device)
    acc = torch.randn(n, h, device=device)
    before = acc.clone()
    targets = torch.zeros(n, dtype=torch.long, device=device)
    tiles = [[0.0, 1.0], [3.0, 1.0], [0.5, 0.5]]
    offsets = torch.empty(3, n, device=device)
    for t, values in enumerate(tiles):
        tile = torch.tensor(values, device=device).expand(n, 2).contiguous()
        tile[0] = 0.0
        a = acc if t else None
        kernels.sweep_(tile, tile, state, offsets[t], a, targets, None, 2 + t, 1.0, 0.0, False)
    assert torch.equal(acc[0], before[0])
    assert_close(acc[1:], before[1:].double() * math.exp(-2.0), 3e-7, 0.0, "acc")
    assert offsets[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert offsets[:, 1].tolist() == [1.0, 3.0, 3.0]
    assert_close(
        state[1, 1:], torch.tensor(math.exp(-3) + math.exp(-2) + 1 + math.exp(-2) + 2 * math.exp(-2.5)),
        3e-7, 0.0, "R",
    )  # fmt: skip


@on_device
def test_runs_are_bitwise_equal(kernels, device):
    raw, targets = problem(6, 700, device)
    x, factor = torch.randn(6, 40, device=device), torch.randn(6, device=device)
    targets[:3] = 5

    def once() -> list[Tensor]:
        torch.manual_seed(1)
        rows = Rows(kernels, raw, targets, cut(700, 333))
        out = torch.ones(700, 40, device=device)
        kernels.add_target_rows_(out, x, targets, factor, 0)
        return [rows.logp, rows.q, rows.coef, rows.hidden_grad, rows.stats, rows.state, out]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


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
    kernels.add_target_rows_(out, x, targets, factor, start)
    eps = 1e-14 if dtype == torch.float64 else 1e-6
    assert_close(out, truth, eps, 10 * eps, "out")


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
    values = torch.ones(5, device=device)
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
    state, rows = new_state(0, torch.float32, device), torch.empty(3, 0, device=device)
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
