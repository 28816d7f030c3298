"""`linear_token_kl` against plain torch in float64: value, gradients, chunking, hostile logits."""

from __future__ import annotations

import pytest
import torch

from fastpref import backends, reference, token_kl
from fastpref.token_kl import linear_token_kl


def plain(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, scale, softcap):
    log_p = reference.logits(hidden, weight, bias, scale, softcap).log_softmax(-1)
    log_r = reference.logits(ref_hidden, ref_weight, ref_bias, scale, softcap).log_softmax(-1)
    return torch.nn.functional.kl_div(log_p, log_r, reduction="none", log_target=True).sum(-1)


def make(dtype=torch.float64, n=40, v=301):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return [
        *(randn(2, n // 2, 12), randn(v, 12), randn(2, n // 2, 7), randn(v, 7)),
        *(randn(v), randn(v)),
    ]


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_value_and_gradients(backend, budget, softcap, dtype, tolerance):
    runs_here(backend)
    if backend == "reference" and dtype == torch.bfloat16:
        pytest.skip("its logits are rounded")
    inputs = make(dtype)
    leaves = [inputs[i].requires_grad_() for i in (0, 1, 4)]
    kl = linear_token_kl(
        *inputs[:4],
        bias=inputs[4],
        ref_bias=inputs[5],
        scale=0.6,
        softcap=softcap,
        memory_budget=budget,
        backend=backend,
    )
    wide = [x.detach().double() for x in inputs]
    truth_leaves = [wide[i].requires_grad_() for i in (0, 1, 4)]
    truth = plain(*wide, 0.6, softcap)
    upstream = torch.randn(kl.shape, dtype=torch.float64)
    assert kl.shape == (2, 20)
    assert kl.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(kl.double(), truth, rtol=max(tolerance / 50, 1e-10), atol=tolerance)
    got = torch.autograd.grad((kl * upstream.to(kl.dtype)).sum(), leaves)
    expected = torch.autograd.grad((truth * upstream).sum(), truth_leaves)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def runs_here(backend):
    if backends.status().get(backend, "ok") != "ok":
        pytest.skip(backends.status()[backend])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_distributions_give_exactly_zero(backend, dtype):
    runs_here(backend)
    hidden, weight = make(dtype)[:2]
    hidden.requires_grad_()
    kl = linear_token_kl(hidden, weight, hidden.detach(), weight, softcap=9.0, backend=backend)
    (grad,) = torch.autograd.grad(kl.sum(), hidden)
    assert not kl.any()
    assert not grad.any()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_are_close(backend, dtype):
    """The gradient is a difference of nearly equal probabilities: no worse than plain torch's."""
    runs_here(backend)
    hidden, weight = make(dtype, v=3001)[:2]
    near = (weight.float() + 1e-2 * torch.randn(weight.shape)).to(dtype)
    hidden.requires_grad_()
    found = {}
    for name in (backend, "reference"):
        kl = linear_token_kl(hidden, near, hidden.detach(), weight, backend=name)
        found[name] = (kl, torch.autograd.grad(kl.sum(), hidden)[0])
    wide = hidden.detach().double().requires_grad_()
    other, start = near.double(), weight.double()
    truth = linear_token_kl(wide, other, wide.detach(), start, backend="reference")
    (gradient,) = torch.autograd.grad(truth.sum(), wide)
    assert (found[backend][0].double() - truth).abs().max() <= 1e-6
    error, plain = (
        float((found[name][1].double() - gradient).norm() / gradient.norm())
        for name in (backend, "reference")
    )
    assert error <= 1.1 * plain + (2e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_any_layout_and_a_row_that_is_not_a_number(backend):
    runs_here(backend)
    h, w, rh, rw, b, rb = make(torch.float32)
    expected = linear_token_kl(h, w, rh, rw, bias=b, ref_bias=rb, backend=backend)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (h, w, rh, rw)]
    turned[0] = h.transpose(0, 2).contiguous().transpose(0, 2)
    strided = [x[:, None].expand(-1, 2).contiguous()[:, 0] for x in (b, rb)]
    got = linear_token_kl(*turned, bias=strided[0], ref_bias=strided[1], backend=backend)
    assert torch.equal(got, expected)
    rh[0, 3] = torch.nan
    got = linear_token_kl(h, w, rh, rw, bias=b, ref_bias=rb, backend=backend)
    keep = torch.ones_like(got, dtype=torch.bool)
    keep[0, 3] = False
    assert got[0, 3].isnan()
    assert torch.equal(got[keep], expected[keep])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 0])
def test_rows_whose_gradient_is_zero_take_no_part(backend, dtype, budget):
    runs_here(backend)
    h, w, rh, rw, b, rb = make(dtype, n=80)
    counts = (torch.arange(80) % 3 == 0).view(2, 40)
    upstream = torch.randn(2, 40).masked_fill(~counts, 0.0)
    some = [x[counts] for x in (h, rh)]
    h[~counts] = torch.nan  # left out on a CPU, where they are more than one in ten

    def gradients(hidden, ref_hidden, grad):
        leaves = [x.clone().requires_grad_() for x in (hidden, w, b)]
        options = {"bias": leaves[2], "ref_bias": rb, "memory_budget": budget, "backend": backend}
        linear_token_kl(*leaves[:2], ref_hidden, rw, **options).backward(grad)
        return [x.grad for x in leaves]

    dhidden, *head = gradients(h, rh, upstream)
    expected, *expected_head = gradients(*some, upstream[counts])
    assert not dhidden[~counts].any()
    torch.testing.assert_close(dhidden[counts], expected)
    for got, want in zip(head, expected_head, strict=True):
        torch.testing.assert_close(got, want)


def test_an_unknown_backend():
    h, w, rh, rw, _, _ = make(torch.float32)
    with pytest.raises(ValueError, match="expected one of"):
        linear_token_kl(h, w, rh, rw, backend="cupy")


def test_a_token_the_reference_rules_out():
    hidden, weight, ref_hidden, ref_weight, bias, ref_bias = make()
    ref_bias[5] = -torch.inf
    bias[5] = -torch.inf
    kl = linear_token_kl(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias)
    keep = torch.arange(301) != 5
    truth = plain(
        hidden, weight[keep], ref_hidden, ref_weight[keep], bias[keep], ref_bias[keep], 1.0, None
    )
    torch.testing.assert_close(kl, truth)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_each_input_alone(needs):
    hidden, weight, ref_hidden, ref_weight, bias, ref_bias = make()
    leaves = [hidden, weight, bias]
    full = [x.clone().requires_grad_() for x in leaves]
    some = [x.clone().requires_grad_(i in needs) for i, x in enumerate(leaves)]
    for h, w, b in (full, some):
        kl = linear_token_kl(h, w, ref_hidden, ref_weight, bias=b, ref_bias=ref_bias)
        kl.sum().backward()
    for i, (a, b) in enumerate(zip(some, full, strict=True)):
        assert torch.equal(a.grad, b.grad) if i in needs else a.grad is None


def test_opcheck_and_compile():
    h, w, rh, rw, b, rb = make(torch.float32)
    h, rh = h[0].requires_grad_(), rh[0]
    w.requires_grad_()
    args = (h, w, b, rh, rw, rb, 0.5, 0.0, 0.5, 0.0, "auto", None, True)
    torch.library.opcheck(token_kl._forward, args)
    inputs = [x.detach() for x in args[:6]]
    for unit, need_head in ((h.detach(), True), (h.detach(), False), (h.detach()[:0], True)):
        args = (torch.randn(20), unit, *inputs, 0.5, 0.0, 0.5, 0.0, "auto", None, need_head)
        torch.library.opcheck(token_kl._backward, args)
    torch._dynamo.reset()
    compiled = torch.compile(linear_token_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, w, rh, rw), linear_token_kl(h, w, rh, rw))


def test_autocast_takes_every_input_to_its_dtype():
    h, w, rh, rw, _, _ = make(torch.float32)
    expected = linear_token_kl(*(x.bfloat16() for x in (h, w, rh, rw)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_token_kl(h, w, rh.bfloat16(), rw), expected)


def test_errors():
    h, w, rh, rw, b, _ = make(torch.float32)
    with pytest.raises(ValueError, match="share a vocabulary"):
        linear_token_kl(h, w, rh, rw[:-1])
    with pytest.raises(ValueError, match="hidden: expected shape"):
        linear_token_kl(h, w, rh[..., :-1], rw)
    with pytest.raises(TypeError, match="bias is"):
        linear_token_kl(h, w, rh, rw, bias=b.double())
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(
            linear_token_kl(h.requires_grad_(), w, rh, rw).sum(), h, create_graph=True
        )
