"""The C++ ops beside the sweep: row scaling, target rows, segments, pairs; schemas and refusals."""

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


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN, in C++ too, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def new_state(n: int) -> Tensor:
    state = torch.zeros(6, n)
    state[0], state[2] = -INF, NAN
    return state


def close(got: Tensor, want: Tensor) -> None:
    slack = 8e-6 if got.dtype == torch.float32 else 4e-13
    torch.testing.assert_close(got.double(), want.double(), rtol=slack, atol=slack)


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lower", [False, True], ids=["out in c", "out as x"])
def test_scale_rows(dtype: torch.dtype, lower: bool) -> None:
    c = torch.promote_types(dtype, torch.float32)
    x, factor = torch.randn(4, 77).to(dtype), torch.tensor([0.3, 0.0, -2.0, 0.0], dtype=c)
    x[1], x[3, 5] = INF, NAN
    out = torch.full((4, 90), 9.0, dtype=dtype if lower else c)
    cpp.scale_rows_(out[:, 3:80], x, factor)
    want = (factor[:, None] * x.to(c)).nan_to_num(0.0, 0.0, 0.0).to(out.dtype)
    assert torch.equal(out[:, 3:80], want)
    assert (out[:, :3] == 9.0).all()
    assert (out[:, 80:] == 9.0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_target_rows(dtype: torch.dtype) -> None:
    c = torch.promote_types(dtype, torch.float32)
    x = torch.randn(50, 130).to(dtype)
    targets = torch.randint(-3, 40, (50,))
    targets[:5] = 12  # several rows on one target
    targets[5], x[5], factor = 15, torch.tensor(INF), torch.randn(50, dtype=c)
    factor[5] = 0.0
    out = torch.randn(20, 130, dtype=c)
    want = out.double()
    for i, y in enumerate(targets.tolist()):
        if 10 <= y < 30 and factor[i] != 0.0:
            want[y - 10] += factor[i].double() * x[i].double()
    cpp.add_target_rows_(out, x, targets, factor, 10)
    close(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_segment_sum_and_its_gradient(dtype: torch.dtype) -> None:
    values = torch.randn(100, dtype=dtype) * 1e4
    cu = torch.tensor([3, 3, 40, 40, 41, 97], dtype=torch.int32)
    want = torch.stack([values[a:b].double().sum() for a, b in itertools.pairwise(cu.tolist())])
    close(cpp.segment_sum(values, cu), want)
    grad = torch.randn(5, dtype=dtype)
    back = torch.zeros(100, dtype=dtype)
    back[3:97] = grad.repeat_interleave(cu.diff())
    assert torch.equal(cpp.segment_sum_backward(grad, cu, 100), back)
    nothing = torch.zeros(1, dtype=torch.int32)
    assert cpp.segment_sum(values, nothing).shape == (0,)
    assert (cpp.segment_sum_backward(grad[:0], nothing, 4) == 0.0).all()


def test_long_sums_are_double() -> None:
    values = torch.full((1_000_000,), 0.1)
    total = cpp.segment_sum(values, torch.tensor([0, 1_000_000], dtype=torch.int32))
    assert total == values.double().sum().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_pair_margins_and_their_gradient(dtype: torch.dtype) -> None:
    logps = (-10.0 * torch.rand(60, dtype=dtype)).requires_grad_()
    ref = -10.0 * torch.rand(60, dtype=dtype)
    cu = torch.tensor([0, 10, 10, 35, 60], dtype=torch.int32)
    pairs = torch.tensor([[0, 2], [3, 1], [0, 3], [2, 2]])  # sequences in several pairs, one empty
    bounds = itertools.pairwise(cu.tolist())
    ratio = torch.stack([(logps[a:b].double() - ref[a:b].double()).sum() for a, b in bounds])
    chosen, rejected = ratio[pairs[:, 0]], ratio[pairs[:, 1]]
    want = torch.stack([chosen - rejected, chosen, rejected])
    close(cpp.pair_margins(logps.detach(), ref, cu, pairs), want.detach())
    grad = torch.randn(3, 4, dtype=dtype)
    (want * grad.double()).sum().backward()
    close(cpp.pair_margins_backward(grad, cu, pairs, 60), logps.grad)
    assert (cpp.pair_margins(ref, ref, cu, pairs) == 0.0).all()


@pytest.mark.parametrize("bounds", [[0, 11], [-1, 4], [0, 6, 5]])
def test_bad_bounds_are_refused(bounds: list[int]) -> None:
    cu = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        cpp.segment_sum(torch.randn(10), cu)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        cpp.segment_sum_backward(torch.randn(len(bounds) - 1), cu, 10)


def test_bad_tensors_are_refused() -> None:
    state, y = new_state(3), torch.zeros(3, dtype=torch.long)
    tile = torch.randn(3, 8)
    rest = (1.0, 0.0, False)
    with pytest.raises(RuntimeError, match="state"):
        cpp.sweep_(tile, None, state[:, :2], None, None, y, None, 0, *rest)
    with pytest.raises(RuntimeError, match="tile: its rows"):
        cpp.sweep_(torch.randn(8, 3).T, None, state, None, None, y, None, 0, *rest)
    with pytest.raises(RuntimeError, match="targets: wrong dtype"):
        cpp.sweep_(tile, None, state, None, None, y.int(), None, 0, *rest)
    with pytest.raises(RuntimeError, match="dtype of tile"):
        cpp.sweep_(tile.double(), None, state, None, None, y, None, 0, *rest)
    with pytest.raises(RuntimeError, match="pairs"):
        cpp.pair_margins(*[torch.randn(4)] * 2, torch.tensor([0, 4]).int(), torch.tensor([[0, 1]]))


def test_no_rows() -> None:
    out, acc, row = torch.randn(4, 3), torch.empty(0, 3), torch.empty(0)
    before, none = out.clone(), torch.empty(0, dtype=torch.long)
    tile, state = torch.empty(0, 8), new_state(0)
    cpp.sweep_(tile, tile, state, row, acc, none, None, 0, 1.0, 0.0, True)
    cpp.combine_(state, none, 8, 0.0, 1.0, acc, out, acc, row, row, row, torch.empty(5, 0))
    cpp.add_target_rows_(out, torch.empty(0, 3), none, torch.empty(0), 0)
    cpp.scale_rows_(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0))
    assert torch.equal(out, before)
    cu = torch.zeros(3, dtype=torch.int32)
    assert cpp.segment_sum(torch.empty(0), cu).tolist() == [0.0, 0.0]
    empty = cpp.pair_margins(torch.empty(0), torch.empty(0), cu, torch.empty(0, 2).long())
    assert empty.shape == (3, 0)


def op_arguments() -> dict[str, tuple[object, ...]]:
    n, v, h = 4, 24, 6
    state, y = new_state(n), torch.tensor([0, 3, -1, 50])
    tile, acc, weight = torch.randn(n, v), torch.randn(n, h), torch.randn(v, h)
    logp, q, coef = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    state[2] = 0.5
    pairs, cu = torch.tensor([[0, 1], [1, 0], [0, 0]]), torch.tensor([0, 2, 4]).int()
    offset, low = torch.zeros(n), torch.zeros(n, v, dtype=torch.bfloat16)
    stats = torch.zeros(5, n)
    return {
        "sweep_": (tile, low, state, offset, acc, y, torch.randn(v), 0, 0.5, 5.0, True),
        "sweep_ (least)": (tile, None, state, None, None, y, None, 0, 1.0, 0.0, False),
        "combine_": (state, y, v, 0.0, 1.0, acc, weight, acc.clone(), logp, q, coef, stats),
        "combine_ (least)": (state, y, v, 0.0, 1.0, None, weight, None, logp, q, coef, None),
        "scale_rows_": (torch.empty(n, h), acc, q + 1.0),
        "add_target_rows_": (weight, acc, y, q + 1.0, 0),
        "segment_sum": (q, cu),
        "segment_sum_backward": (torch.randn(2), cu, 4),
        "pair_margins": (torch.randn(4), q, cu, pairs),
        "pair_margins_backward": (torch.randn(3, 3), cu, pairs, 4),
    }


@pytest.mark.parametrize("name", list(op_arguments()))
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.fastpref, name.split()[0]).default
    torch.library.opcheck(op, op_arguments()[name])


def test_build_info() -> None:
    info = cpp.build_info()
    assert info["torch_target"].startswith("0x020a")
    assert info["isa_active"] in info["isa_variants"].split(",")
    assert "C++" in info["compiler"]
