"""The ops as citizens of PyTorch: registration, compile, autocast, checkpointing, and errors for
people."""

from __future__ import annotations

import re
import threading
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpref import backends, linear, registered, schedule
from fastpref.backends import torch as plain
from fastpref.backends import trial
from fastpref.ops import (
    linear_cross_entropy,
    linear_logprobs,
    preference_margins,
    sequence_logprobs,
)

BACKENDS = [name for name in ("torch", "cpp") if backends.status()[name] == "ok"]
N, H, V = 13, 8, 50
CU = torch.tensor([0, 3, 3, 13], dtype=torch.int32)
PAIRS = torch.tensor([[0, 2], [1, 2]])


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return (
        torch.randn(N, H, requires_grad=True),
        torch.randn(V, H, requires_grad=True),
        torch.randint(0, V, (N,)),
        torch.randn(V, requires_grad=True),
    )


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(h, w) for h in (0, 1) for w in (0, 1)], ids=str)
def test_opcheck_of_the_projection(tensors, backend, needs):
    hidden, weight, targets, bias = tensors
    h, w, b = (
        x.detach().requires_grad_(bool(n))
        for x, n in zip((hidden, weight, bias), (*needs, needs[1]))
    )
    for budget in (None, 0):
        for stats in (False, True):
            options = (
                0.5,
                3.0,
                -100,
                backend,
                budget,
                bool(needs[0]),
                bool(needs[1]),
                bool(needs[1]),
                stats,
                "",
            )
            for inputs in ((None, targets), (torch.tensor([7, 0, 12]), targets[:3])):
                torch.library.opcheck(registered.linear_logprobs, (h, w, b, *inputs, *options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_other_ops(tensors, backend):
    hidden, weight, targets, bias = (x.detach() for x in tensors)
    options = (0.5, 0.0, -100, backend, None, True, True, True)
    for rows, y in ((None, targets), (torch.tensor([7, 0, 12]), targets[:3])):
        inputs = (hidden, weight, bias, rows, y)
        saved = registered.linear_logprobs(*inputs, *options, False, "")[2:]
        args = (torch.randn(len(y)), *inputs, *saved, *options, "")
        torch.library.opcheck(registered.linear_logprobs_backward, args)
    values = torch.randn(N, requires_grad=True)
    torch.library.opcheck(registered.sequence_sum, (values, CU, backend))
    torch.library.opcheck(registered.sequence_sum_backward, (torch.randn(3), CU, N, backend))
    ref = torch.randn(N, requires_grad=True)
    torch.library.opcheck(registered.preference_margins, (values, ref, CU, PAIRS, backend))
    args = (torch.randn(3, 2), CU, PAIRS, N, backend)
    torch.library.opcheck(registered.preference_margins_backward, args)


def composite(hidden, weight, targets, bias):
    logp, stats = linear_logprobs(hidden * 1.0, weight, targets, bias=bias, return_stats=True)
    margins, _, _ = preference_margins(logp, 0.9 * logp.detach(), CU, PAIRS)
    nll = linear_cross_entropy(hidden, weight, targets, linear_bias=bias, label_smoothing=0.1)
    sums = sequence_logprobs(hidden, weight, targets, CU, reduction="mean")
    return (logp * stats.entropy).sum() + margins.sum() + nll + sums.sum()


UNQUOTED = pytest.mark.skipif(
    " " in torch.__file__, reason="inductor does not quote the path of PyTorch to the compiler"
)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=UNQUOTED)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile_fullgraph(tensors, dynamic, compiler):
    hidden, weight, targets, bias = tensors
    targets[2] = -100
    leaves = [hidden, weight, bias]
    expected = composite(hidden, weight, targets, bias)
    compiled = torch.compile(composite, fullgraph=True, dynamic=dynamic, backend=compiler)
    got = compiled(hidden, weight, targets, bias)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(tensors, use_reentrant):
    hidden, weight, targets, _ = tensors

    def loss(h, w):
        return linear_logprobs(h, w, targets).square().sum()

    expected = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


def test_backward_twice_through_a_retained_graph(tensors):
    hidden, weight, targets, _ = tensors
    loss = linear_logprobs(hidden, weight, targets).sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_takes_every_input_to_its_dtype(tensors):
    hidden, weight, targets, bias = tensors
    expected = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, bias=bias.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprobs(hidden.bfloat16(), weight, targets, bias=bias)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, expected)
    logp.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("how", ["create_graph", "func"])
def test_second_derivatives_are_refused(tensors, how):
    hidden, weight, targets, _ = tensors

    def differentiate():
        if how == "func":
            return torch.func.grad(lambda h: linear_logprobs(h, weight, targets).sum())(hidden)
        loss = linear_logprobs(hidden, weight, targets).sum()
        return torch.autograd.grad(loss, hidden, create_graph=True)

    with pytest.raises(RuntimeError, match=r"twice|torch\.func"):
        differentiate()


def test_concurrent_calls_share_no_scratch(tensors):
    _, weight, _, _ = tensors
    inputs = [(torch.randn(400, H), torch.randint(0, V, (400,))) for _ in range(4)]
    expected = [linear_logprobs(h, weight, t) for h, t in inputs]
    results: dict[int, list[torch.Tensor]] = {}

    def work(i):
        results[i] = [linear_logprobs(inputs[i][0], weight, inputs[i][1]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, got in results.items():
        assert all(torch.equal(x, expected[i]) for x in got)


WRONG = {
    "targets out of range": (
        ValueError,
        r"row 0 holds 50.*\[0, 50\)",
        {"targets": torch.full((N,), V)},
    ),
    "negative target": (ValueError, "row 0 holds -1", {"targets": torch.full((N,), -1)}),
    "targets int32": (
        TypeError,
        "targets: expected int64",
        {"targets": torch.zeros(N, dtype=torch.int32)},
    ),
    "targets shape": (
        ValueError,
        r"targets: expected shape \(13,\)",
        {"targets": torch.zeros(4, dtype=torch.int64)},
    ),
    "hidden size": (
        ValueError,
        r"hidden: expected shape \(..., 8\)",
        {"hidden": torch.randn(N, 9)},
    ),
    "weight dims": (ValueError, r"weight: expected shape \(V, H\)", {"weight": torch.randn(H)}),
    "empty weight": (ValueError, "at least one row", {"weight": torch.randn(0, H)}),
    "mixed dtypes": (TypeError, "autocast", {"weight": torch.randn(V, H).bfloat16()}),
    "integer hidden": (
        TypeError,
        "hidden: expected fp32",
        {"hidden": torch.zeros(N, H, dtype=torch.int64)},
    ),
    "bias shape": (ValueError, r"bias: expected shape \(50,\)", {"bias": torch.randn(3)}),
    "mixed devices": (
        ValueError,
        "weight is on meta",
        {"weight": torch.randn(V, H, device="meta")},
    ),
    "not a tensor": (TypeError, "targets: expected a tensor, got list", {"targets": [1] * N}),
    "softcap": (ValueError, "softcap: expected a positive", {"softcap": 0.0}),
    "budget as text": (TypeError, "memory_budget: expected bytes", {"memory_budget": "1GiB"}),
    "budget": (ValueError, "memory_budget", {"memory_budget": -1}),
    "rows range": (
        ValueError,
        r"rows: an index is out of range: expected \[0, 13\), got \[13, 13\]",
        {"rows": torch.tensor([13])},
    ),
    "rows twice": (ValueError, "occurs twice", {"rows": torch.tensor([1, 1])}),
    "rows dtype": (TypeError, "rows: expected int64", {"rows": torch.tensor([1.0])}),
    "backend": (ValueError, "backend='quick': expected one of", {"backend": "quick"}),
    "backend for the device": (RuntimeError, "backend='cuda'", {"backend": "cuda"}),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_errors_name_the_argument(tensors, case):
    error, message, change = WRONG[case]
    arguments = dict(zip(("hidden", "weight", "targets", "bias"), tensors, strict=True)) | change
    with pytest.raises(error, match=message):
        linear_logprobs(**arguments)


CROSS_ENTROPY = {
    "input": (torch.randn(N, 9), r"input: expected shape \(..., 8\) to match linear_weight"),
    "linear_weight": (torch.randn(V, H).half(), "linear_weight is torch.float16, input is"),
    "target": (torch.zeros(4, dtype=torch.int64), r"target: expected shape \(13,\) to match input"),
    "linear_bias": (torch.randn(3), r"linear_bias: expected shape \(50,\)"),
}


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_cross_entropy_names_its_own_arguments(tensors, name):
    """Those of torch's function, never those of the op beneath."""
    value, message = CROSS_ENTROPY[name]
    given = dict(zip(CROSS_ENTROPY, tensors, strict=True))
    for wrong, said in ((value, message), ([1.0], rf"{name}: expected a tensor, got list")):
        with pytest.raises((TypeError, ValueError), match=said) as raised:
            linear_cross_entropy(**given | {name: wrong})
        assert not re.findall(r"\b(hidden|weight|targets|bias)\b", str(raised.value))


COMPILED = {
    "rows": [
        (torch.tensor([13]), "rows: an index is out of range"),
        (torch.tensor([-1, 2]), "rows: an index is out of range"),
        (torch.tensor([1, 1]), "rows: an index occurs twice"),
    ],
    "cu_seqlens": [
        (torch.tensor([0, 3, 3, 12], dtype=torch.int32), "cu_seqlens: .* no boundaries"),
        (torch.tensor([0, 9, 3, 13], dtype=torch.int32), "cu_seqlens: .* no boundaries"),
    ],
    "pairs": [
        (torch.tensor([[0, 3]]), "pairs: a sequence index is out of range"),
        (torch.tensor([[-1, 2]]), "pairs: a sequence index is out of range"),
    ],
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_graph_checks_indices_as_it_runs(tensors, compiler, name):
    """Compiled on good values, it refuses bad ones in the same words, without the numbers."""

    def loss(hidden, weight, targets, rows, cu_seqlens, pairs):
        logps = linear_logprobs(hidden, weight, targets, rows=rows)
        margins, _, _ = preference_margins(logps, 0.5 * logps.detach(), cu_seqlens, pairs)
        return margins.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    good = {"rows": torch.arange(3, 11), "cu_seqlens": CU, "pairs": PAIRS}
    assert torch.isfinite(compiled(*tensors[:3], **good))
    for bad, message in COMPILED[name]:
        with pytest.raises(RuntimeError, match=message):
            compiled(*tensors[:3], **good | {name: bad})


def test_missing_backend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backends, "_module", lambda name: "no compiler was found")
    with pytest.raises(RuntimeError, match=r"'cpp' is not available: no compiler.*pip install"):
        backends.resolve("cpp", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "gpu", "message"),
    [
        (
            "cuda",
            True,
            r"built without CUDA.* install the CUDA toolkit and rebuild: .* && FASTPREF_CUDA=1",
        ),
        ("cuda", False, r"built without CUDA.* backend='auto', or run where .* sees an NVIDIA GPU"),
        ("triton", False, r"backend='auto', or run where .* sees an NVIDIA GPU"),
    ],
)
def test_a_machine_without_a_gpu_is_not_told_to_rebuild(monkeypatch, name, gpu, message):
    why = "built without CUDA: the compiled module holds the CPU kernels only"
    monkeypatch.setattr(backends, "_module", lambda name: why)
    monkeypatch.setattr(backends, "sees_gpu", lambda: gpu)
    with pytest.raises(RuntimeError, match=message):
        backends.resolve(name, "cuda", torch.float32)


def test_auto_falls_to_plain_torch_without_a_compiler(monkeypatch):
    real = backends._module
    monkeypatch.setattr(backends, "_module", lambda n: "no compiler" if n == "cpp" else real(n))
    name, why = backends.explain("cpu", torch.float32)
    assert name == "torch"
    assert "no compiler" in why


@pytest.mark.parametrize(
    ("missing", "failing", "expected"),
    [
        ((), (), "triton"),
        ((), ("triton",), "cuda"),
        (("triton",), ("cuda",), "torch"),
        (("triton", "cuda"), (), "torch"),
    ],
)
def test_auto_tries_what_was_never_timed(monkeypatch, missing, failing, expected):
    assert "timed" not in backends.explain("cpu", torch.float32)[1]
    monkeypatch.setattr(backends, "_measured", list)
    module = backends._module("torch")
    monkeypatch.setattr(backends, "_module", lambda n: "not built" if n in missing else module)
    monkeypatch.setattr(backends, "_trial", lambda n, _: "wrong numbers" if n in failing else "")
    name, why = backends.explain("cuda", torch.bfloat16)
    assert name == expected
    assert ("never timed on a GPU" in why) == (len(missing) < 2)
    assert all(f"{name} is unavailable: not built" in why for name in missing)
    assert all(f"{name} is unavailable: wrong numbers" in why for name in failing)


class Broken:
    """Plain torch with one kernel that is off."""

    def __init__(self, name, wrong):
        self.name, self.wrong = name, wrong

    def __getattr__(self, name):
        function = getattr(plain, name)
        return self.wrong(function) if name == self.name else function


def off_by_a_twentieth(position):
    def wrong(function):
        def run(*arguments):
            function(*arguments)
            if arguments[position] is not None:
                arguments[position].mul_(1.05)

        return run

    return wrong


def off_in_the_result(function):
    return lambda *arguments: function(*arguments) + 0.01


def not_launched(function):
    def run(*_):
        raise RuntimeError("no kernel image")

    return run


def full(function):
    def run(*_):
        raise torch.OutOfMemoryError("the device is full")

    return run


WRITE = [
    *(("sweep_", i) for i in (1, 2, 3, 4)),
    *(("combine_", i) for i in (7, 8, 9, 10, 11)),
    *(("kl_tile_", 2), ("kl_tile_", 11), ("scale_rows_", 0), ("add_target_rows_", 0)),
]
RETURN = ("segment_sum", "segment_sum_backward", "pair_margins", "pair_margins_backward")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_of_a_backend(dtype):
    here = torch.device("cpu")
    state = torch.random.get_rng_state()
    if backends.status()["cpp"] == "ok":
        assert trial.disagreement(backends._module("cpp"), plain, here, dtype) == ""
    wrongs = [(name, off_by_a_twentieth(i)) for name, i in WRITE]
    for name, wrong in [*wrongs, *((name, off_in_the_result) for name in RETURN)]:
        found = trial.disagreement(Broken(name, wrong), plain, here, dtype)
        assert "AssertionError" in found, (name, wrong)
    for name in {name for name, _ in WRITE}.union(RETURN):
        found = trial.disagreement(Broken(name, not_launched), plain, here, dtype)
        assert "no kernel image" in found
    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        trial.disagreement(Broken("sweep_", full), plain, here, dtype)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_trial_does_not_depend_on_defaults():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = trial.disagreement(plain, plain, torch.device("cpu"), torch.float32)
            assert found == ""
    finally:
        torch.set_default_dtype(dtype)


MEASURED = [
    {"device": "NVIDIA A100", "dtype": "bf16", "order": ["cuda", "triton", "torch"]},
    {"device": "NVIDIA H200", "dtype": "bf16", "order": ["triton", "cuda", "torch"]},
    {"device": "NVIDIA H200", "dtype": "fp32", "order": ["cuda"]},
]


@pytest.mark.parametrize(
    ("gpu", "dtype", "missing", "expected", "source"),
    [
        ("NVIDIA A100", torch.bfloat16, (), "cuda", "bf16 on NVIDIA A100"),
        ("NVIDIA H200", torch.bfloat16, (), "triton", "bf16 on NVIDIA H200"),
        ("NVIDIA H200", torch.bfloat16, ("triton",), "cuda", "bf16 on NVIDIA H200"),
        ("NVIDIA H200", torch.bfloat16, ("triton", "cuda"), "torch", "bf16 on NVIDIA H200"),
        ("NVIDIA H200", torch.float32, (), "cuda", "fp32 on NVIDIA H200"),
        ("NVIDIA H200", torch.float32, ("cuda",), "torch", "fp32 on NVIDIA H200"),
        ("NVIDIA H200", torch.float16, (), "triton", "bf16 on NVIDIA H200"),
        ("NVIDIA L4", torch.float32, (), "cuda", "fp32 on NVIDIA H200"),
    ],
)
def test_auto_takes_what_was_measured_faster(monkeypatch, gpu, dtype, missing, expected, source):
    monkeypatch.setattr(backends, "_measured", lambda: MEASURED)
    monkeypatch.setattr(backends, "sees_gpu", lambda: True)
    monkeypatch.setattr(backends, "get_device_name", lambda: gpu)
    module = backends._module("torch")
    monkeypatch.setattr(backends, "_module", lambda n: "not built" if n in missing else module)
    name, why = backends.explain("cuda", dtype)
    assert name == expected
    assert why.endswith(f"as measured for {source}")
    assert all(f"{name} is unavailable: not built" in why for name in missing)


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_a_rebuild_brings_its_tools(monkeypatch, name):
    """An isolated installation leaves no build tools behind."""
    monkeypatch.setattr(backends, "sees_gpu", lambda: True)
    tools, build = backends.remedy(name).split(" && ")
    assert tools.endswith("pip install ninja pybind11 setuptools wheel")
    assert ("FASTPREF_CUDA=1" in build) == (name == "cuda")
    assert build.endswith("FASTPREF_FORCE_BUILD=1 pip install -v --no-build-isolation --no-deps .")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("budget", [None, 0, 64 << 20, 4 << 30])
@pytest.mark.parametrize("n", [0, 1, 4097, 65536])
@pytest.mark.parametrize("v", [1, 49152, 262_144, 1_000_003])
def test_plan_covers_the_plane_and_keeps_to_the_budget(device, itemsize, budget, n, v):
    p = schedule.plan(n, v, 576, itemsize, device, budget)
    tiles, chunks = p.tiles(v), p.chunks(n)
    assert tiles[0][0] == 0
    assert tiles[-1][1] == v
    assert len(tiles) == p.num_tiles
    assert all(a[1] == b[0] for a, b in pairwise(tiles))
    assert sum(b - a for a, b in chunks) == n
    kept = p.kept_tiles * p.tile * n * itemsize
    allowed = schedule.DEFAULT_BUDGET[device] if budget is None else budget
    assert p.kept_tiles == 0 or kept <= allowed
    if budget == 0:
        assert p.kept_tiles == 0


def test_plan_does_not_depend_on_what_needs_gradients():
    import inspect

    assert not {"need", "grad"} & set(inspect.signature(schedule.plan).parameters)
    assert not {"problem"} & set(inspect.signature(linear.plan_for).parameters)
