"""`linear_logprobs` against a float64 truth: values, statistics and every gradient, on hostile
inputs.

The rule: elementwise, the error is no larger than plain PyTorch's own in the same dtype plus a
small stated epsilon.
"""

from __future__ import annotations

import pytest
import torch

from fastpref import backends, linear, operands, reference
from fastpref.operands import mm
from fastpref.ops import linear_logprobs

BACKENDS = [name for name in ("torch", "cpp") if backends.status()[name] == "ok"]
# Beyond torch's own error: nats for log-probabilities, a share of the largest entry for gradients.
LOGP_EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-12}
GRAD_EPS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
# N, H, V: ragged everything, one and two classes, vocabularies of SmolLM2 and Qwen3, no rows, a row
# more than a chunk
SHAPES = [
    (1, 1, 1),
    (5, 3, 1),
    (6, 9, 2),
    (37, 33, 1000),
    (130, 17, 2049),
    (0, 8, 300),
    (1, 64, 4096),
    (9, 24, 49152),
    (3, 16, 151669),
    (4097, 6, 257),
]


def make(n, h, v, dtype, *, bias=False, seed=0, ignore=True):
    """Correlated rows, so that the softmax is not flat, with peaked and hopeless targets
    planted."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=g) * 0.5
    hidden = torch.randn(n, h, generator=g)
    targets = torch.randint(0, v, (n,), generator=g)
    if n >= 6 and v > 1:
        norm = weight[targets[0]].square().sum().clamp(min=1e-3)
        hidden[0] = weight[targets[0]] * (40.0 / norm)  # p_y -> 1
        hidden[1] = weight[targets[1]] * (-70.0 / weight[targets[1]].square().sum().clamp(min=1e-3))
        hidden[2] = 0.0  # flat
    if ignore and n >= 4:
        targets[3] = -100
    b = (torch.randn(v, generator=g)).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, b


def run(fn, hidden, weight, targets, bias, upstream, **options):
    """Value, statistics and gradients of one implementation."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    b = leaves[2] if bias is not None else None
    logp, stats = fn(leaves[0], leaves[1], targets, bias=b, **options)
    grads = torch.autograd.grad((logp * upstream.to(logp.dtype)).sum(), leaves)
    return logp.detach(), stats, grads


def fused(*args, **kwargs):
    return linear_logprobs(*args, return_stats=True, **kwargs)


def assert_no_worse(ours, plain, truth, eps, what):
    truth = truth.double()
    err, allowed = (ours.double() - truth).abs(), (plain.double() - truth).abs() + eps
    worse = ~((err <= allowed) | (ours.double() == truth) | (ours.isnan() & truth.isnan()))
    if worse.any():
        i = tuple(worse.nonzero()[(err - allowed)[worse].argmax()].tolist())
        raise AssertionError(
            f"{what}{list(i)}: got {ours[i].item()!r}, truth {truth[i].item()!r}, "
            f"plain torch {plain[i].item()!r}"
        )


def compare(problem, dtype, counts=None, **options):
    """Against float64 and plain PyTorch; ``counts`` masks the upstream gradient."""
    hidden, weight, targets, bias = problem
    kernel = {k: options.pop(k) for k in ("backend", "memory_budget") if k in options}
    upstream = torch.randn(targets.shape, generator=torch.Generator().manual_seed(7))
    upstream = (upstream if counts is None else upstream * counts).to(targets.device)
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    truth = run(reference.linear_logprobs, wide[0], wide[1], targets, wide[2], upstream, **options)
    plain = run(reference.linear_logprobs, hidden, weight, targets, bias, upstream, **options)
    ours = run(fused, hidden, weight, targets, bias, upstream, **options, **kernel)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    eps = LOGP_EPS[dtype]
    scale = 1.0 + truth[0].abs().nan_to_num(0, 0, 0)
    assert_no_worse(ours[0], plain[0], truth[0], eps * scale, "logp")
    for name, a, p, t in zip(truth[1]._fields, ours[1], plain[1], truth[1], strict=True):
        if name == "top1":
            assert torch.equal(a, t), name
        else:
            size = 1.0 + t.abs().nan_to_num(0, 0, 0)
            assert_no_worse(a, p, t, 10 * eps * size, name)
    for name, a, p, t in zip(("dhidden", "dweight", "dbias"), ours[2], plain[2], truth[2]):
        assert a.dtype == dtype
        largest = t.abs().max() if t.numel() else 0.0
        rounding = t.abs() * torch.finfo(dtype).eps  # two roundings to the input's dtype
        assert_no_worse(a, p, t, GRAD_EPS[dtype] * largest + rounding, name)
    return ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradients(backend, shape, dtype):
    compare(make(*shape, dtype), dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [0, 100_000, None])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_options(backend, budget, softcap, bias, dtype):
    problem = make(23, 18, 3000, dtype, bias=bias, seed=3)
    compare(
        problem,
        dtype,
        backend=backend,
        memory_budget=budget,
        softcap=softcap,
        scale=0.5,
        ignore_index=-100,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_partly_kept_e_over_several_chunks_of_rows(backend):
    # 5,000 rows are two chunks; the budget keeps some of the tiles and recomputes the others
    problem = make(5000, 8, 5003, torch.float32, bias=True)
    kept = compare(problem, torch.float32, backend=backend, memory_budget=120 << 20)
    recomputed = compare(problem, torch.float32, backend=backend, memory_budget=0)
    for a, b in zip(kept[2], recomputed[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


COUNTS = {
    "none": torch.zeros(4500),
    "few": (torch.arange(4500) % 100 == 3).float(),
    "most": (torch.arange(4500) % 100 != 3).float(),
    "one chunk": (torch.arange(4500) // 4096 == 1).float(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [0, 29_000_000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", COUNTS)
def test_rows_without_a_gradient(backend, budget, dtype, which):
    problem = make(4500, 5, 1100, dtype, bias=True, seed=4)
    compare(problem, dtype, COUNTS[which], backend=backend, memory_budget=budget)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [0, 29_000_000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["few", "most", "all"])
@pytest.mark.parametrize("n", [7500, 300])
def test_rows_are_gathered_where_they_are_used(monkeypatch, backend, budget, dtype, which, n):
    """Six in ten, over two chunks and in one; a block of them at a time, of 50 rows here."""
    monkeypatch.setitem(operands._GATHERED, "cpu", 50 * 5 * dtype.itemsize)
    hidden, weight, targets, bias = make(n, 5, 1100, dtype, bias=True, seed=4)
    targets[torch.arange(n) % 5 > 2] = -100
    counts = torch.ones(n) if which == "all" else COUNTS[which].repeat(2)[:n]
    options = {"backend": backend, "memory_budget": budget}
    ours = compare((hidden, weight, targets, bias), dtype, counts, **options)
    rows = (targets != -100).nonzero()[:, 0].flip(0)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(7)) * counts
    listed = run(fused, hidden, weight, targets, bias, upstream, rows=rows, **options)
    assert torch.equal(ours[0], listed[0])
    for a, b in zip(ours[2], listed[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("budget", [0, None])
def test_rows_without_a_gradient_are_left_out_of_the_products(monkeypatch, budget):
    """On a CPU the backward of the head multiplies the others only."""
    hidden, weight, targets, _ = make(600, 8, 4000, torch.float32, ignore=False)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logp = linear_logprobs(*leaves, targets, memory_budget=budget)
    flops = []

    def counted(out, a, b, accumulate=False):
        flops.append(2 * out.numel() * a.shape[1])
        mm(out, a, b, accumulate)

    monkeypatch.setattr(linear, "mm", counted)
    (logp * (torch.arange(600) % 4 == 0)).sum().backward()
    products = 1 if budget is None else 2  # dW, and the logits again
    assert sum(flops) == products * 2 * (600 // 4) * 8 * 4000


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_token_has_exact_complement(backend):
    # 1 - p_y = (V - 1) e^-60: lost entirely by 1 - exp(logp), and by z_y - lse in fp32
    weight = torch.zeros(5, 2)
    weight[3, 0] = 1.0
    hidden = torch.tensor([[60.0, 1.0]], requires_grad=True)
    logp = linear_logprobs(hidden, weight, torch.tensor([3]), backend=backend)
    logp.sum().backward()
    expected = 4 * torch.exp(torch.tensor(-60.0, dtype=torch.float64))
    assert logp.item() == pytest.approx(-expected.item(), rel=1e-5)
    assert hidden.grad[0, 0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias_grad", [False, True])
def test_minus_infinity_logits(backend, with_bias_grad):
    hidden, weight, targets, _ = make(8, 5, 6000, torch.float32)
    bias = torch.zeros(6000)
    bias[:2500] = -torch.inf  # the first tile is all -inf
    bias[5000:] = -torch.inf
    targets[:] = torch.tensor([3000, 3001, 10, 4000, 2999, 5999, 2500, 4999])
    bias.requires_grad_(with_bias_grad)
    logp = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend)
    truth, _ = reference.linear_logprobs(
        hidden.double(), weight.double(), targets, bias=bias.double()
    )
    finite = truth.isfinite()
    assert torch.equal(finite, logp.isfinite())
    assert torch.equal(logp[~finite], truth[~finite].float())
    torch.testing.assert_close(logp[finite].double(), truth[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["target +inf", "other +inf", "all -inf", "target -inf"])
def test_infinite_logits_as_log_softmax(backend, case):
    hidden, weight, targets, _ = make(4, 5, 2100, torch.float32, ignore=False)
    targets[:] = 2070
    bias = torch.zeros(2100)
    if case == "all -inf":
        bias[:] = -torch.inf
    else:
        column = 3 if case.startswith("other") else 2070
        bias[column] = -torch.inf if case.endswith("-inf") else torch.inf
    truth, _ = reference.linear_logprobs(hidden, weight, targets, bias=bias)
    logp = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend)
    assert torch.equal(logp.isnan(), truth.isnan())
    torch.testing.assert_close(logp, truth, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_target_is_possible(backend):
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(2500, 4, requires_grad=True)
    bias = torch.full((2500,), -torch.inf)
    bias[2100] = 0.0
    logp = linear_logprobs(hidden, weight, torch.full((3,), 2100), bias=bias, backend=backend)
    logp.sum().backward()
    assert torch.equal(logp.detach(), torch.zeros(3))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_row_poisons_itself_only(backend, poison):
    hidden, weight, targets, _ = make(20, 6, 3001, torch.float32, ignore=False)
    clean = linear_logprobs(hidden, weight, targets, backend=backend)
    hidden[7] = poison
    hidden.requires_grad_()
    logp, stats = linear_logprobs(hidden, weight, targets, backend=backend, return_stats=True)
    (dhidden,) = torch.autograd.grad(logp.sum(), hidden)
    others = torch.arange(20) != 7
    assert logp[7].isnan()
    assert stats.entropy[7].isnan()
    assert dhidden[7].isnan().all()
    assert torch.equal(logp[others], clean[others])
    assert dhidden[others].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_is_silent_even_if_its_hidden_state_is_not_finite(backend):
    hidden, weight, targets, _ = make(20, 6, 3001, torch.float32, ignore=False)
    targets[7] = -100
    clean = [x.clone().requires_grad_() for x in (hidden, weight)]
    hidden[7] = torch.nan
    dirty = [x.clone().requires_grad_() for x in (hidden, weight)]
    results = []
    for h, w in (clean, dirty):
        rows = torch.arange(20)  # keeps the ignored row in the product
        logp = linear_logprobs(h, w, targets, rows=rows, backend=backend)
        results.append((logp, *torch.autograd.grad(logp.sum(), [h, w])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[1][0][7] == 0.0


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_arrives_at_an_ignored_row_is_nobodys(backend, poison):
    """``torch.where(mask, log(1 - exp(logp)), 0)`` sends NaN to rows that the mask leaves out."""
    hidden, weight, targets, bias = make(9, 6, 40, torch.float32, bias=True, ignore=False)
    targets[[2, 5]] = -100
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"rows": torch.arange(9), "backend": backend}  # so that no row is dropped before
    upstream = torch.randn(9)
    clean = run(fused, *leaves[:2], targets, bias, upstream, **options)[2]
    upstream[[2, 5]] = torch.tensor([poison, -poison])
    for got, want in zip(run(fused, *leaves[:2], targets, bias, upstream, **options)[2], clean):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 16, 3000), (40, 16, 5)], ids=str)
def test_narrow_products_keep_their_precision_under_autocast(backend, shape):
    """Its inputs are rounded, its products are not."""
    hidden, weight, targets, _ = make(*shape, torch.float32)
    low = [x.bfloat16() for x in (hidden, weight)]
    upstream = torch.randn(shape[0])
    expected = run(fused, *low, targets, None, upstream, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_logprobs(hidden, weight, targets, backend=backend)
    assert torch.equal(logp, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored(backend):
    hidden, weight, _, _ = make(6, 5, 40, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    logp = linear_logprobs(hidden, weight, torch.full((6,), 7), ignore_index=7, backend=backend)
    logp.sum().backward()
    assert not logp.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_leading_dimensions_and_rows(backend):
    base = torch.randn(3, 11, 2, 8)
    hidden = base[:, 1:, 1]  # (3, 10, 8), offset and strided
    weight = torch.randn(2 * 77, 9)[::2, 1:]
    targets = torch.randint(0, 77, (10, 3)).t()
    plain, _ = reference.linear_logprobs(hidden, weight, targets)
    logp = linear_logprobs(hidden, weight, targets, backend=backend)
    assert logp.shape == (3, 10)
    torch.testing.assert_close(logp, plain, rtol=1e-5, atol=1e-5)
    column_major = linear_logprobs(hidden, weight.t().contiguous().t(), targets, backend=backend)
    assert torch.equal(column_major, logp)
    rows = torch.tensor([29, 0, 4])
    some = linear_logprobs(hidden, weight, targets, rows=rows, backend=backend)
    expected = torch.zeros(30).index_copy(0, rows, plain.reshape(-1)[rows]).view(3, 10)
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weight_sums_both_gradients(backend):
    embedding = torch.randn(300, 12, requires_grad=True)
    tokens, targets = torch.randint(0, 300, (2, 9)), torch.randint(0, 300, (2, 9))

    def loss(fn):
        return fn(torch.tanh(embedding[tokens]), embedding, targets)

    (ours,) = torch.autograd.grad(
        loss(lambda *a: linear_logprobs(*a, backend=backend)).sum(), embedding
    )
    (plain,) = torch.autograd.grad(
        loss(lambda *a: reference.linear_logprobs(*a)[0]).sum(), embedding
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_run_to_run_and_policy_to_reference(backend, dtype):
    hidden, weight, targets, bias = make(50, 32, 5000, dtype, bias=True)
    upstream = torch.randn(50)
    first = run(fused, hidden, weight, targets, bias, upstream, backend=backend)
    again = run(fused, hidden, weight, targets, bias, upstream, backend=backend)
    with torch.no_grad():
        reference_logp = fused(hidden, weight, targets, bias=bias, backend=backend)[0]
    frozen = fused(hidden.requires_grad_(), weight, targets, bias=bias, backend=backend)[0]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0], reference_logp)
    assert torch.equal(first[0], frozen)
    for a, b in zip(first[2], again[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_every_subset_of_inputs_can_need_a_gradient(backend, need):
    tensors = list(make(14, 7, 2100, torch.float32, bias=True))
    targets = tensors.pop(2)
    upstream = torch.randn(14)
    everything = run(fused, *tensors[:2], targets, tensors[2], upstream, backend=backend)[2]
    leaves = [x.requires_grad_(i in need) for i, x in enumerate(tensors)]
    logp = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], backend=backend)
    (logp * upstream).sum().backward()
    for i, leaf in enumerate(leaves):
        if i in need:
            assert torch.equal(leaf.grad, everything[i])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_sequence_log_probability_within_a_hundredth_of_a_nat(backend):
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(1024, 256, generator=g)).bfloat16()
    weight = (torch.randn(8192, 256, generator=g) * 0.15).bfloat16()
    targets = torch.randint(0, 8192, (1024,), generator=g)
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets)[0].sum()
    ours = linear_logprobs(hidden, weight, targets, backend=backend).double().sum()
    plain = reference.linear_logprobs(hidden, weight, targets)[0].double().sum()
    assert (ours - truth).abs() < 1e-3
    assert (plain - truth).abs() > (ours - truth).abs()  # bf16 logits are visibly worse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(backend, softcap):
    hidden, weight, targets, bias = make(5, 4, 9, torch.float64, bias=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def f(h, w, b):
        return linear_logprobs(h, w, targets, bias=b, softcap=softcap, scale=1.3, backend=backend)

    torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend):
    # under this flag torch fills every fresh allocation with NaN, scratch slabs included
    from fastpref import scratch

    hidden, weight, targets, bias = make(40, 9, 2500, torch.bfloat16, bias=True)
    expected = run(fused, hidden, weight, targets, bias, torch.ones(40), backend=backend)
    scratch.release()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        poisoned = run(fused, hidden, weight, targets, bias, torch.ones(40), backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(expected[0], poisoned[0])
    for a, b in zip(expected[2], poisoned[2], strict=True):
        assert torch.equal(a, b)
