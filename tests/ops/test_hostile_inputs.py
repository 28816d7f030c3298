"""Inputs that are legal but awkward, and those that must be refused: layouts, devices, transforms,
NaN."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

from fastpref import backends, linear_token_kl, operands, smoothing
from fastpref.ops import (
    linear_cross_entropy,
    linear_logprobs,
    preference_margins,
    segment_sum,
    sequence_logprobs,
)

BACKENDS = [name for name in ("torch", "cpp") if backends.status()[name] == "ok"]
N, H, V = 6, 4, 11
TARGETS = torch.tensor([1, 2, 3, 4, 0, 10])
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


def layouts(*shape: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one shape whose rows, or entries, do not lie side by side."""
    torch.manual_seed(0)
    wide = torch.randn(*(2 * n for n in shape), dtype=dtype)
    every_other = wide[tuple(slice(None, None, 2) for _ in shape)]
    found = {
        "every other": every_other,
        "expanded": torch.randn(*shape[:-1], 1, dtype=dtype).expand(shape),
        "offset": torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 3:],
    }
    if len(shape) == 2:
        found["transposed"] = torch.randn(shape[1], shape[0], dtype=dtype).t()
        found["one row for all"] = torch.randn(1, shape[1], dtype=dtype).expand(shape)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_layout_of_any_argument_forward_and_backward(dtype, backend):
    hiddens, weights = layouts(N, H, dtype=dtype), layouts(V, H, dtype=dtype)
    plain = {"plain": torch.randn(N, H, dtype=dtype)}, {"plain": torch.randn(V, H, dtype=dtype)}
    biases = {"none": None, **layouts(V, dtype=dtype)}
    cases = [(h, plain[1]["plain"], b) for h in hiddens.values() for b in biases.values()]
    cases += [(plain[0]["plain"], w, None) for w in weights.values()]
    for hidden, weight, bias in cases:
        for budget in (None, 0):
            given = [x for x in (hidden, weight, bias) if x is not None]
            leaves = [x.detach().requires_grad_() for x in given]
            assert [x.stride() for x in leaves] == [x.stride() for x in given]
            bias_leaf = leaves[2] if bias is not None else None
            logp = linear_logprobs(
                *leaves[:2], TARGETS, bias=bias_leaf, backend=backend, memory_budget=budget
            )
            truth = [x.detach().double().requires_grad_() for x in given]
            logits = truth[0] @ truth[1].T + (truth[2] if bias is not None else 0.0)
            expected = logits.log_softmax(-1).gather(-1, TARGETS[:, None])[:, 0]
            close(logp, expected, dtype if dtype == torch.float64 else torch.float32)
            ours = torch.autograd.grad(logp.sum(), leaves)
            for got, want in zip(ours, torch.autograd.grad(expected.sum(), truth), strict=True):
                close(got, want, dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=slack, atol=slack)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_of_boundaries_and_pairs(backend):
    values, other = torch.randn(12)[::2], torch.randn(6)
    cu = torch.tensor([[0, 9], [2, 9], [6, 9]], dtype=torch.int32)[:, 0]
    pairs = torch.tensor([[0, 1], [1, 0]]).t()
    sums = torch.stack([values[:2].sum(), values[2:].sum()])
    torch.testing.assert_close(segment_sum(values, cu, backend=backend), sums)
    margins, *_ = preference_margins(values, other, cu, pairs, backend=backend)
    ratios = sums - torch.stack([other[:2].sum(), other[2:].sum()])
    torch.testing.assert_close(margins, ratios[pairs[:, 0]] - ratios[pairs[:, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, meta: preference_margins(x, meta, CU, PAIRS), "ref_logps is on meta, logps"),
        (lambda x, meta: preference_margins(x, None, CU, PAIRS), "ref_logps: expected a tensor"),
        (lambda x, meta: preference_margins([0.0], x, CU, PAIRS), "logps: expected a tensor"),
        (lambda x, meta: preference_margins(x, x, CU.to("meta"), PAIRS), "cu_seqlens is on meta"),
        (lambda x, meta: preference_margins(x, x, CU, [[0, 1]]), "pairs: expected a tensor"),
        (lambda x, meta: segment_sum(x, CU.to("meta")), "cu_seqlens is on meta, values is on cpu"),
        (lambda x, meta: segment_sum(x, None), "cu_seqlens: expected a tensor, got NoneType"),
        (
            lambda x, meta: sequence_logprobs(HIDDEN, WEIGHT, TARGETS, CU, token_weights=meta),
            "token_weights is on meta",
        ),
        (lambda x, meta: linear_logprobs(HIDDEN, WEIGHT, TARGETS, softcap=float("inf")), "finite"),
        (lambda x, meta: linear_logprobs(HIDDEN, WEIGHT, TARGETS, memory_budget=2**70), "bytes"),
        (lambda x, meta: linear_logprobs(HIDDEN, WEIGHT, TARGETS, ignore_index=None), "an int"),
        (
            lambda x, meta: linear_logprobs(HIDDEN, WEIGHT, TARGETS, process_group="x"),
            "a torch.dis",
        ),
        (
            lambda x, meta: linear_logprobs(
                HIDDEN, WEIGHT, TARGETS, scale=torch.tensor(2.0, requires_grad=True)
            ),
            "scale: it gets no gradient",
        ),
    ],
)
def test_refused_with_the_name_of_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(6), torch.empty(6, device="meta"))


PAIRS = torch.tensor([[0, 1]])
HIDDEN, WEIGHT = torch.randn(N, H), torch.randn(V, H)


def test_forward_mode_is_refused_and_the_reference_does_it():
    with fwAD.dual_level():
        dual = fwAD.make_dual(HIDDEN, torch.ones_like(HIDDEN))
        for call in (
            lambda: linear_logprobs(dual, WEIGHT, TARGETS),
            lambda: linear_token_kl(dual, WEIGHT, HIDDEN, WEIGHT),
            lambda: segment_sum(dual[:, 0], CU),
            lambda: preference_margins(dual[:, 0], HIDDEN[:, 0], CU, PAIRS),
        ):
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                call()
        logp = linear_logprobs(dual, WEIGHT, TARGETS, backend="reference")
        assert fwAD.unpack_dual(logp).tangent is not None


@pytest.mark.parametrize("op", [segment_sum, lambda x, cu: preference_margins(x, x, cu, PAIRS)[0]])
def test_every_op_refuses_function_transforms(op):
    with pytest.raises(RuntimeError, match=r"do not run under torch\.func transforms"):
        torch.func.grad(lambda x: op(x, CU).sum())(torch.randn(6))


def test_a_mean_counts_the_listed_rows():
    rows = torch.tensor([0, 3, 4])
    found = sequence_logprobs(HIDDEN, WEIGHT, TARGETS, CU, rows=rows, reduction="mean")
    logp = (HIDDEN @ WEIGHT.T).log_softmax(-1).gather(-1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found, torch.stack([logp[0], (logp[3] + logp[4]) / 2]))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_in_an_ignored_row_stays_there_under_label_smoothing(softcap):
    hidden, targets = HIDDEN.clone(), TARGETS.clone()
    hidden[1], targets[1] = torch.nan, -100
    hidden.requires_grad_()
    weight = WEIGHT.clone().requires_grad_()
    options = {"softcap": softcap, "label_smoothing": 0.1}
    linear_cross_entropy(hidden, weight, targets, **options).backward()
    kept = [0, 2, 3, 4, 5]
    again = WEIGHT.clone().requires_grad_()
    linear_cross_entropy(HIDDEN[kept], again, TARGETS[kept], **options).backward()
    torch.testing.assert_close(weight.grad, again.grad)
    assert (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("budget", "softcap"), [(None, 5.0), (0, 5.0), (None, None)])
def test_label_smoothing_against_float64(monkeypatch, with_bias, budget, softcap):
    """Over several tiles and chunks of rows, and blocks of 50 rows."""
    monkeypatch.setitem(operands._GATHERED, "cpu", 50 * 5 * 4)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2500, 5), torch.randn(2300, 5), torch.randn(2300)
    targets = torch.randint(2300, (2500,))
    given = [hidden, weight, bias][: 3 if with_bias else 2]

    def grads(dtype: torch.dtype, loss) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in given]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def truth(h, w, b=None):
        z = 0.7 * (h @ w.T + (0.0 if b is None else b))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z, targets, label_smoothing=0.2)

    def ours(h, w, b=None):
        options = {"scale": 0.7, "softcap": softcap, "label_smoothing": 0.2}
        options["memory_budget"] = budget
        return linear_cross_entropy(h, w, targets, linear_bias=b, **options)

    for got, want in zip(grads(torch.float32, ours), grads(torch.float64, truth), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-8)


def test_opcheck_of_the_smoothing_ops():
    options = (0.7, 5.0, 0)
    leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, torch.randn(V))]
    torch.library.opcheck(smoothing._mean_capped_logit, (*leaves, *options))
    tensors = [x.detach() for x in leaves]
    torch.library.opcheck(smoothing._gradients, (torch.randn(N), *tensors, *options, True))
    targets = torch.randint(V, (N,))
    targets[0] = -1
    for minus_mean in (True, False):
        args = (*leaves, targets, 0.7, minus_mean)
        torch.library.opcheck(smoothing._target_logit, args)
        args = (torch.randn(N), *tensors, targets, 0.7, minus_mean)
        for need_head in (True, False):
            torch.library.opcheck(smoothing._target_logit_backward, (*args, need_head))


SMOOTHING_PEAK = """
import sys
import torch
from fastpref import linear_cross_entropy
h, v, softcap = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) or None
hidden, weight = torch.randn(16384, h, requires_grad=True), torch.randn(v, h)
targets, options = torch.randint(v, (16384,)), {"label_smoothing": 0.1, "softcap": softcap}
# of this program alone: what getrusage tells begins with the peak of the process that started it
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = lambda: int(status()["VmHWM"].split()[0]) * 1024
linear_cross_entropy(hidden[:8], weight, targets[:8], **options).backward()
before = peak()
linear_cross_entropy(hidden, weight, targets, memory_budget=64 << 20, **options).backward()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("h", "v", "softcap", "mib"), [(16, 8192, 30.0, 128), (1024, 500, 0.0, 256)]
)
def test_label_smoothing_stays_within_the_budget(h, v, softcap, mib):
    """The first logits would take 512 MiB. The second hidden states take 64 MiB: ``dlogp/dhidden``
    and the gradients of two terms, no copy of hidden."""
    command = [sys.executable, "-c", SMOOTHING_PEAK, str(h), str(v), str(softcap)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < mib << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_logits_have_no_slope(backend):
    """At the cap the derivative of the cap is 0 exactly, as in plain PyTorch."""
    weight = torch.tensor([[1e4], [1e4], [-1e4]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    for softcap in (1.5, 3.3, 30.0):
        logp = linear_logprobs(hidden, weight, torch.tensor([0]), softcap=softcap, backend=backend)
        for gradient in torch.autograd.grad(logp.sum(), (hidden, weight)):
            assert (gradient == 0.0).all()


@pytest.mark.parametrize(
    ("backend", "spread"),
    # the plain backend takes the slope from the capped logit, which is rounded
    [(name, spread) for name in BACKENDS for spread in (0.5, 2.0, 4.0)[: 2 + (name == "cpp")]],
)
def test_gradients_under_a_cap_are_as_good_as_plain_pytorch(backend, spread):
    """Logits up to four times the cap, where the slope of the cap is small or nearly 0."""
    cap, worst = 30.0, {"ours": [], "plain": []}
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(8, 16, generator=generator)
        weight = torch.randn(500, 16, generator=generator) * cap * spread / 4
        targets = torch.randint(500, (8,), generator=generator)

        def plain(h, w, targets=targets):
            logits = cap * torch.tanh(h @ w.T / cap)
            return logits.log_softmax(-1).gather(-1, targets[:, None]).sum()

        def ours(h, w, targets=targets):
            return linear_logprobs(h, w, targets, softcap=cap, backend=backend).sum()

        def gradients(loss, dtype, given=(hidden, weight)):
            leaves = [x.to(dtype).requires_grad_() for x in given]
            return torch.autograd.grad(loss(*leaves), leaves)

        truth = gradients(plain, torch.float64)
        for name, loss in (("ours", ours), ("plain", plain)):
            pairs = zip(gradients(loss, torch.float32), truth, strict=True)
            worst[name].append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs))
    assert sorted(worst["ours"])[5] <= 1.2 * sorted(worst["plain"])[5]
    assert max(worst["ours"]) <= 2.0 * max(worst["plain"])
