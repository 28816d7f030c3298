"""The C++ row kernels against plain float64 torch: values, hostile rows, repeatability, schemas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastpref.backends import cpp

pytestmark = pytest.mark.skipif(not cpp.available(), reason=cpp.why_unavailable())

INF, NAN = math.inf, math.nan
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN, in C++ too, so that an element nobody wrote shows."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def new_state(n: int, dtype: torch.dtype) -> Tensor:
    state = torch.zeros(6, n, dtype=dtype)
    state[0], state[2] = -INF, NAN
    return state


def tiles_of(vocab_size: int, width: int) -> list[tuple[int, int]]:
    return [(v, min(v + width, vocab_size)) for v in range(0, vocab_size, width)]


class Rows:
    """The schedule in small: all tiles of ``raw`` through the kernels, and what they leave."""

    def __init__(
        self,
        raw: Tensor,
        targets: Tensor,
        tiles: list[tuple[int, int]],
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float = 0.0,
        with_stats: bool = True,
    ) -> None:
        n, self.vocab_size = raw.shape
        dtype = raw.dtype
        self.state = new_state(n, dtype)
        self.stored: list[tuple[int, int, Tensor, Tensor]] = []
        if weight is None:
            weight = torch.randn(self.vocab_size, 5, dtype=dtype)
        self.acc = torch.zeros(n, weight.shape[1], dtype=dtype)
        for v0, v1 in tiles:
            tile, offset = raw[:, v0:v1].clone(), torch.empty(n, dtype=dtype)
            tile_bias = None if bias is None else bias[v0:v1]
            cpp.sweep_(
                *(tile, tile, self.state, offset, self.acc, targets, tile_bias, v0),
                *(scale, softcap, with_stats),
            )
            self.acc += tile @ weight[v0:v1]
            self.stored.append((v0, v1, tile, offset))
        self.logp, self.q, self.coef = (torch.empty(n, dtype=dtype) for _ in range(3))
        self.hidden_grad = torch.empty_like(self.acc)
        self.stats = torch.empty(5, n, dtype=dtype)
        cpp.combine_(
            *(self.state, targets, self.vocab_size, softcap, scale, self.acc, weight),
            *(self.hidden_grad, self.logp, self.q, self.coef),
            self.stats if with_stats else None,
        )

    def others(self) -> Tensor:
        """``coef * G`` of every column, from the tiles as they were stored."""
        whole = torch.empty(self.logp.numel(), self.vocab_size, dtype=torch.float64)
        for v0, v1, g, offset in self.stored:
            shrink = (offset.double() - self.state[0].double()).exp()
            whole[:, v0:v1] = g.double() * (self.coef.double() * shrink)[:, None]
        return whole


class Truth:
    """The same numbers from ``log_softmax`` in float64."""

    def __init__(
        self,
        raw: Tensor,
        targets: Tensor,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        z = scale * (raw.double() + (0.0 if bias is None else bias.double()))
        slope = torch.ones_like(z)
        if softcap > 0.0:
            t = (z / softcap).tanh()
            z, slope = softcap * t, 1.0 - t.square()
        logs = z.log_softmax(-1)
        p = logs.exp()
        at = targets[:, None]
        others = p.scatter(1, at, 0.0)
        self.logp = logs.gather(1, at)[:, 0]
        self.q = others.sum(1) * slope.gather(1, at)[:, 0]
        self.others = others * slope
        z_other = z.scatter(1, at, -INF)
        self.entropy = -(p * logs.masked_fill(p == 0.0, 0.0)).sum(1)
        self.lse = z.logsumexp(1)
        self.top1 = (z.gather(1, at)[:, 0] >= z_other.amax(1)).double()
        self.stats = torch.stack(
            [self.entropy, self.lse, self.top1, z.mean(1), p.square().sum(1).log()]
        )
        if weight is not None:
            direct = self.q[:, None] * weight.double()[targets]
            self.hidden_grad = scale * (direct - self.others @ weight.double())


def close(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    """Equal within a few roundings of ``got``'s dtype, relative to 1 or the value itself."""
    torch.testing.assert_close(
        got.double(),
        want.double(),
        rtol=factor * TOLERANCE[got.dtype],
        atol=factor * TOLERANCE[got.dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.37, 0.0), (-1.5, 4.0)])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("vocab_size", "width"), [(2, 2), (2, 1), (63, 64), (64, 64), (65, 64), (331, 97), (700, 700)]
)
def test_rows_equal_log_softmax(
    vocab_size: int, width: int, biased: bool, scale: float, softcap: float, dtype: torch.dtype
) -> None:
    n = 9
    raw = 3.0 * torch.randn(n, vocab_size, dtype=dtype)
    bias = torch.randn(vocab_size, dtype=dtype) if biased else None
    weight = torch.randn(vocab_size, 5, dtype=dtype)
    targets = torch.randint(0, vocab_size, (n,))
    targets[0], targets[1] = 0, vocab_size - 1
    raw[2, targets[2]] += 30.0  # p_y -> 1
    raw[3, targets[3]] -= 60.0  # p_y -> 1e-26
    options = {"weight": weight, "bias": bias, "scale": scale, "softcap": softcap}
    tiles = tiles_of(vocab_size, width)
    want = Truth(raw, targets, **options)
    for order in (tiles, tiles[::-1]):
        got = Rows(raw, targets, order, **options)
        close(got.logp, want.logp, 4)
        # the factors are right relative to themselves, however small
        # (but for a saturated cap, whose slope 1 - tanh^2 is no more exact than its tanh)
        slack = {"rtol": 60 * TOLERANCE[dtype], "atol": TOLERANCE[dtype] if softcap else 0.0}
        torch.testing.assert_close(got.q.double(), want.q, **slack)
        close(got.others().to(dtype), want.others, 4)
        close(got.hidden_grad, want.hidden_grad, 10)
        close(got.stats, want.stats, 10)


def test_factors_keep_their_precision_when_the_target_is_certain() -> None:
    raw = torch.randn(4, 50)
    targets = torch.tensor([0, 7, 30, 49])
    raw[range(4), targets] += torch.tensor([10.0, 20.0, 40.0, 70.0])
    got, want = Rows(raw, targets, tiles_of(50, 20)), Truth(raw.double(), targets)
    q = want.others.sum(1)  # 1 - p cancels even in float64
    assert q[-1] < 1e-27
    torch.testing.assert_close(got.q.double(), q, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(got.logp.double(), (-q).log1p(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(got.others(), want.others, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_lower_dtype_receives_the_same_numbers_rounded(stored: torch.dtype, softcap: float) -> None:
    raw, targets = torch.randn(6, 130) * 4, torch.tensor([0, 129, 64, -1, 5, 500])
    raw[1, 3], raw[4, 0] = NAN, -INF

    def sweep(out: Tensor | None) -> Tensor:
        state = new_state(6, torch.float32)
        cpp.sweep_(raw.clone(), out, state, None, None, targets, None, 0, 1.0, softcap, True)
        return state

    exact, low = torch.empty(6, 130), torch.empty(6, 130, dtype=stored)
    states = [sweep(exact), sweep(low), sweep(None)]
    assert torch.equal(low.nan_to_num(7.0), exact.to(stored).nan_to_num(7.0))
    assert low.isnan().sum() == 1
    for state in states[1:]:
        assert torch.equal(state.nan_to_num(7.0), states[0].nan_to_num(7.0))


def test_strided_tiles_and_slices_touch_nothing_else() -> None:
    whole = torch.randn(7, 200)
    before, view = whole.clone(), whole[:, 33:150]
    store = torch.full((7, 160), 9.0)
    state, offset = new_state(21, torch.float32)[:, 7:14], torch.zeros(3, 7)
    targets = torch.randint(0, 200, (7,))
    cpp.sweep_(view, view, state, offset[1], None, targets, None, 33, 1.0, 0.0, True)
    fresh, again = new_state(7, torch.float32), before[:, 33:150].contiguous()
    cpp.sweep_(again, store[:, 11:128], fresh, None, None, targets, None, 33, 1.0, 0.0, True)
    assert torch.equal(whole[:, 33:150], store[:, 11:128])
    assert torch.equal(state.nan_to_num(7.0), fresh.nan_to_num(7.0))
    assert torch.equal(offset[1], state[0])
    assert torch.equal(whole[:, :33], before[:, :33])
    assert torch.equal(whole[:, 150:], before[:, 150:])
    assert (store[:, :11] == 9.0).all()
    assert (store[:, 128:] == 9.0).all()


def test_acc_is_rescaled_only_where_the_maximum_grew() -> None:
    targets = torch.tensor([100, 100, -1])
    state, acc = new_state(3, torch.float32), torch.rand(3, 10) + 1.0
    state[0], state[1] = torch.tensor([2.0, 2.0, -INF]), torch.tensor([3.0, 3.0, 0.0])
    before = acc.clone()
    tile = torch.tensor([[1.0, -1.0], [5.0, 0.0], [9.0, 9.0]])
    cpp.sweep_(tile, tile, state, None, acc, targets, None, 0, 1.0, 0.0, False)
    assert torch.equal(acc[0], before[0])
    assert torch.equal(acc[2], before[2])
    close(acc[1], before[1].double() * math.exp(-3.0))
    close(state[1, 1], torch.tensor(3.0 * math.exp(-3.0) + 1.0 + math.exp(-5.0)))
    assert state[0].tolist() == [2.0, 5.0, -INF]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_maximum_in_a_late_tile(dtype: torch.dtype) -> None:
    raw = torch.randn(4, 90, dtype=dtype)
    raw[0, 85], raw[1, 50], raw[2, 89] = 40.0, 200.0, 90.0
    targets = torch.tensor([3, 3, 89, 10])
    weight = torch.randn(90, 5, dtype=dtype)
    want = Truth(raw, targets, weight=weight)
    for order in itertools.permutations(tiles_of(90, 30)):
        got = Rows(raw, targets, list(order), weight=weight)
        close(got.logp, want.logp, 4)
        close(got.hidden_grad, want.hidden_grad, 10)
        close(got.stats, want.stats, 10)


def test_masked_vocabulary() -> None:
    raw = torch.randn(5, 60)
    raw[:, :20] = -INF  # the first tile
    raw[1, 20:] = -INF  # everything
    raw[2, 20:] = -INF  # everything but the target
    raw[2, 33] = 1.5
    raw[3, 33] = -INF  # the target alone
    targets = torch.tensor([33, 33, 33, 33, 2])
    got, want = Rows(raw, targets, tiles_of(60, 20)), Truth(raw, targets)
    keep = [0, 2, 3, 4]
    close(got.logp[keep], want.logp[keep], 4)
    close(got.q[keep], want.q[keep], 4)
    close(got.others()[[0, 3, 4]].float(), want.others[[0, 3, 4]], 4)
    close(got.stats[:, keep], want.stats[:, keep], 4)
    assert (got.logp[2], got.q[2], got.coef[2]) == (0.0, 0.0, 0.0)
    assert got.logp[1].isnan()  # as log_softmax of nothing but -inf
    assert (got.hidden_grad[2] == 0.0).all()
    for _, _, g, _ in got.stored:
        assert g.isfinite().all()


def test_one_word_vocabulary() -> None:
    got = Rows(torch.tensor([[3.0], [-80.0], [INF]]), torch.zeros(3, dtype=torch.long), [(0, 1)])
    assert got.logp[:2].tolist() == got.q[:2].tolist() == got.coef[:2].tolist() == [0.0, 0.0]
    assert got.stats[:, 0].tolist() == [0.0, 3.0, 1.0, 3.0, 0.0]
    assert got.logp[2].isnan()
    assert (got.hidden_grad[:2] == 0.0).all()


# a cap makes infinities finite
@pytest.mark.parametrize(("bad", "softcap"), [(NAN, 0.0), (NAN, 5.0), (INF, 0.0)])
@pytest.mark.parametrize("where", [5, 17, 33], ids=["first tile", "target", "last tile"])
def test_a_bad_logit_poisons_its_row_alone(bad: float, where: int, softcap: float) -> None:
    raw, targets = torch.randn(3, 40), torch.tensor([17, 17, 17])
    weight = torch.randn(40, 5)
    clean = Rows(raw, targets, tiles_of(40, 15), weight=weight, softcap=softcap)
    raw[1, where] = bad
    if where == 33:
        raw[1, :30] = -INF  # nothing finite before it
        raw[1, 17] = 0.0
    got = Rows(raw, targets, tiles_of(40, 15), weight=weight, softcap=softcap)
    for name in ("logp", "q", "coef"):
        assert getattr(got, name)[1].isnan(), name
        assert torch.equal(getattr(got, name)[[0, 2]], getattr(clean, name)[[0, 2]])
    assert got.hidden_grad[1].isnan().all()
    assert torch.equal(got.hidden_grad[[0, 2]], clean.hidden_grad[[0, 2]])
    assert torch.equal(got.stats[:, [0, 2]], clean.stats[:, [0, 2]])


def test_ignored_and_out_of_range_targets() -> None:
    raw, targets = torch.randn(4, 30), torch.tensor([-1, 30, -7, 4])
    raw[0, 3], raw[2] = NAN, INF
    weight = torch.randn(30, 5)
    got = Rows(raw, targets, tiles_of(30, 11), weight=weight)
    ignored = [0, 2]
    for result in (got.logp, got.q, got.coef, got.hidden_grad, got.stats.T):
        assert (result[ignored] == 0.0).all()
        assert result[3].isfinite().all()
    for result in (got.logp, got.q, got.coef):
        assert result[1].isnan()
    assert got.hidden_grad[1].isnan().all()
    assert got.stats[[0, 1, 4], 1].isnan().all()
    untouched = new_state(4, torch.float32)
    assert torch.equal(got.state[:, ignored].nan_to_num(7.0), untouched[:, ignored].nan_to_num(7.0))
    for _, _, g, _ in got.stored:
        assert (g[ignored] == 0.0).all()
    # whatever acc holds
    dirty = torch.full((4, 5), NAN)
    cpp.combine_(
        *(got.state, targets, 30, 0.0, 1.0, dirty, weight, dirty),
        *(got.logp, got.q, got.coef, None),
    )
    assert (dirty[ignored] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hidden_gradient_in_every_dtype(dtype: torch.dtype) -> None:
    c = torch.promote_types(dtype, torch.float32)
    raw, targets = torch.randn(5, 40, dtype=c), torch.randint(0, 40, (5,))
    weight, acc = torch.randn(40, 11).to(dtype), torch.randn(5, 11, dtype=c)
    rows = Rows(raw, targets, [(0, 40)])
    out = torch.empty(5, 11, dtype=dtype)
    cpp.combine_(
        *(rows.state, targets, 40, 0.0, 0.5, acc, weight, out),
        *(rows.logp, rows.q, rows.coef, None),
    )
    want = rows.q[:, None] * weight.double()[targets] - rows.coef[:, None] * acc.double()
    slack = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 4 * TOLERANCE[c])
    torch.testing.assert_close(out.double(), 0.5 * want.double(), rtol=slack, atol=1e-6)


def test_exp_and_tanh_are_accurate() -> None:
    """Within 1.1 and 2.5 ulp; a denormal exponential is 0."""
    x = torch.cat([-torch.rand(20000) * s for s in (1e-3, 1.0, 20.0, 104.0)])
    x = torch.cat([x, torch.tensor([0.0, -87.4, -103.9, -104.1, -1e30, -INF])])
    tile = torch.cat([torch.zeros(1), x])[None]
    state = new_state(1, torch.float32)
    cpp.sweep_(tile, tile, state, None, None, torch.tensor([10**6]), None, 0, 1.0, 0.0, False)
    want = x.double().exp()
    close_in_ulp(tile[0, 1:], want.where(want >= torch.finfo(torch.float32).tiny, 0.0), 1.1)

    x = torch.cat([torch.randn(20000) * s for s in (1e-6, 1e-2, 1.0, 5.0)])
    n = x.numel()
    state, column = new_state(n, torch.float32), x[:, None].clone()
    zeros = torch.zeros(n, dtype=torch.long)
    cpp.sweep_(column, None, state, None, None, zeros, None, 0, 1.0, 1.0, False)
    close_in_ulp(state[2], x.double().tanh(), 2.5)


def close_in_ulp(got: Tensor, want: Tensor, ulps: float) -> None:
    size = want.float().abs()
    ulp = torch.nextafter(size, torch.tensor(INF)).double() - size.double()
    worst = ((got.double() - want) / ulp).abs().max().item()
    assert worst <= ulps, f"{worst:.2f} ulp"


@pytest.mark.parametrize("softcap", [0.0, 6.0])
def test_bitwise_repeatable_for_any_number_of_threads(softcap: float) -> None:
    raw, targets = torch.randn(300, 700) * 3, torch.randint(-1, 700, (300,))
    weight, x = torch.randn(700, 64), torch.randn(300, 900)
    cu = torch.arange(0, 301, 3, dtype=torch.int32) * 1000
    values = torch.randn(300_000)

    def everything() -> list[Tensor]:
        got = Rows(raw, targets, tiles_of(700, 256), weight=weight, softcap=softcap)
        out, scaled = torch.zeros(700, 900), torch.empty(300, 900)
        cpp.add_target_rows_(out, x, targets % 5, got.q, 0)
        cpp.scale_rows_(scaled, x, got.q)
        sums = cpp.segment_sum(values, cu)
        numbers = [got.logp, got.hidden_grad, got.stats, got.state, out, scaled, sums]
        return numbers + [g for _, _, g, _ in got.stored]

    runs = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(everything())
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
