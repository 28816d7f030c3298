"""`linear_cross_entropy`, `sequence_logprobs`, `segment_sum` and `preference_margins` against plain
torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import backends, reference
from fastpref.ops import (
    linear_cross_entropy,
    linear_logprobs,
    preference_margins,
    segment_sum,
    sequence_logprobs,
)

BACKENDS = [name for name in ("torch", "cpp") if backends.status()[name] == "ok"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_cross_entropy_equals_torch(backend, reduction, smoothing, softcap):
    torch.manual_seed(1)
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 9, 6), (5001, 6), (5001,))
    ]
    target = torch.randint(0, 5001, (3, 9))
    target[1, 4:] = -100
    ours = linear_cross_entropy(
        *(leaves[0], leaves[1], target),
        **{"linear_bias": leaves[2], "reduction": reduction, "label_smoothing": smoothing},
        **{"softcap": softcap, "scale": 0.6, "backend": backend},
    )
    z = 0.6 * F.linear(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    truth = F.cross_entropy(
        z.flatten(0, 1), target.flatten(), reduction=reduction, label_smoothing=smoothing
    )
    truth = truth.view_as(ours)
    torch.testing.assert_close(ours, truth)
    upstream = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(truth, leaves, upstream)
    ):
        torch.testing.assert_close(a, b)


def test_smoothing_under_autocast_keeps_fp32_sums():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 64), torch.randn(301, 64)
    target = torch.randint(0, 301, (5,))
    expected = linear_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), target, label_smoothing=0.3
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, label_smoothing=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_cross_entropy_of_ignored_rows_alone_is_zero():
    hidden = torch.randn(4, 3, requires_grad=True)
    for smoothing in (0.0, 0.1):
        loss = linear_cross_entropy(
            hidden, torch.randn(7, 3), torch.full((4,), -100), label_smoothing=smoothing
        )
        loss.backward()
        assert loss.item() == 0.0
        assert not hidden.grad.any()


def test_cross_entropy_over_listed_rows_only():
    hidden, weight, target = torch.randn(6, 3), torch.randn(7, 3), torch.randint(0, 7, (6,))
    rows = torch.tensor([4, 1])
    listed = linear_cross_entropy(hidden, weight, target, rows=rows, label_smoothing=0.1)
    alone = linear_cross_entropy(hidden[rows], weight, target[rows], label_smoothing=0.1)
    torch.testing.assert_close(listed, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": "avg"}, "reduction"), ({"label_smoothing": 1.1}, "label_smoothing")],
)
def test_cross_entropy_errors(options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([1, 2]), **options)


LENGTHS = [[], [0], [5], [0, 0, 4, 1, 0], [1024, 1, 0, 333]]


def boundaries(lengths):
    return torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum(backend, lengths, dtype):
    cu = boundaries(lengths)
    values = (-torch.rand(sum(lengths), dtype=dtype) * 10).requires_grad_()
    total = segment_sum(values, cu, backend=backend)
    truth = torch.stack(
        [values.detach()[a:b].double().sum() for a, b in pairwise(cu)]
        or [torch.zeros((), dtype=torch.float64)]
    )[: len(lengths)]
    assert total.dtype == dtype
    wide = backend != "reference" and dtype == torch.float32  # accumulated in float64
    eps = torch.finfo(dtype).eps * (1 if wide else 64)
    torch.testing.assert_close(total.detach().double(), truth, rtol=eps, atol=0)
    upstream = torch.randn(len(lengths), dtype=dtype)
    if lengths:
        total.backward(upstream)
        assert torch.equal(values.grad, upstream.repeat_interleave(torch.tensor(lengths)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_poisoned_sequence_leaves_the_others_alone(backend):
    values = torch.ones(6)
    values[1] = torch.nan
    total = segment_sum(values, boundaries([3, 0, 3]), backend=backend)
    assert total[0].isnan()
    assert total[1:].tolist() == [0.0, 3.0]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sequence_logprobs(backend, reduction):
    torch.manual_seed(0)
    lengths = [4, 0, 7, 1]
    hidden = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 5, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 33, (12,)), torch.rand(12, dtype=torch.float64)
    targets[5] = -100
    targets[11] = -100  # a sequence whose only token is ignored
    ours = sequence_logprobs(
        *(hidden, weight, targets, boundaries(lengths)),
        **{"reduction": reduction, "token_weights": weights, "backend": backend},
    )
    token = weights * reference.linear_logprobs(hidden, weight, targets)[0]
    parts, counts = token.split(lengths), (targets != -100).split(lengths)
    truth = torch.stack(
        [
            p.sum() / (max(1, int(c.sum())) if reduction == "mean" else 1)
            for p, c in zip(parts, counts)
        ]
    )
    torch.testing.assert_close(ours, truth)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), [hidden, weight]),
        torch.autograd.grad(truth.square().sum(), [hidden, weight]),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_preference_margins(backend):
    torch.manual_seed(0)
    cu = boundaries([3, 4, 0, 5])
    pairs = torch.tensor([[0, 1], [3, 2], [3, 1]])  # a sequence in two pairs, an empty sequence
    logps, ref = (torch.randn(12, requires_grad=True) for _ in range(2))
    ours = preference_margins(logps, ref, cu, pairs, backend=backend)
    truth = reference.preference_margins(logps.double(), ref.double(), cu, pairs)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    upstream = [torch.randn(3) for _ in range(3)]
    got = torch.autograd.grad(ours, [logps, ref], upstream)
    expected = torch.autograd.grad(truth, [logps, ref], [u.double() for u in upstream])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    same = preference_margins(logps, logps.detach().clone(), cu, pairs, backend=backend)
    assert not same[0].any()


def test_policy_equal_to_reference_has_margin_exactly_zero():
    hidden, weight = torch.randn(40, 16), torch.randn(3000, 16)
    targets, cu = torch.randint(0, 3000, (40,)), boundaries([25, 15])
    policy = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    with torch.no_grad():
        ref = linear_logprobs(hidden, weight, targets)
    assert preference_margins(policy, ref, cu, torch.tensor([[0, 1]]))[0].item() == 0.0


LOGPS = torch.zeros(4)
CU = boundaries([2, 2])
PAIR = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGPS.bfloat16(), LOGPS, CU, PAIR), TypeError, "logps: expected a 1-D fp32"),
        ((LOGPS, LOGPS[:3], CU, PAIR), ValueError, "ref_logps: expected"),
        ((LOGPS, LOGPS, CU.long(), PAIR), TypeError, "cu_seqlens: expected an int32"),
        ((LOGPS, LOGPS, CU[:2], PAIR), ValueError, "end at the number of tokens 4"),
        ((LOGPS, LOGPS, CU, PAIR[0]), ValueError, r"pairs: expected shape \(P, 2\)"),
        ((LOGPS, LOGPS, CU, PAIR + 1), ValueError, r"sequence indices in \[0, 2\)"),
        ((LOGPS, LOGPS, CU, PAIR.int()), TypeError, "pairs: expected int64"),
    ],
)
def test_margin_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        preference_margins(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "none"}, ValueError, "reduction"),
        ({"token_weights": torch.ones(3)}, ValueError, "token_weights"),
        ({"return_stats": True}, TypeError, "return_stats"),
        ({"tempreature": 1.0}, TypeError, "tempreature"),
    ],
)
def test_sequence_errors(options, error, message):
    with pytest.raises(error, match=message):
        sequence_logprobs(
            torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3]), CU, **options
        )


def test_autocast_converts_the_weight_once():
    converted = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                converted.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    input, weight, target = torch.randn(6, 4), torch.randn(11, 4), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        linear_cross_entropy(input, weight, target)
    assert converted.count((11, 4)) == 1
