"""The whole op on a GPU, by every backend: right on the heads of real models, repeatable, captured
in graphs, compiled, on any stream, without a host sync, within its memory.

With a GPU these are tests marked ``gpu``. What needs no GPU to be meaningful runs on a CPU too, in
small, so that the tests themselves are tested.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpref import (
    backends,
    linear,
    linear_cross_entropy,
    linear_logprobs,
    measure,
    operands,
    peers,
    token_kl,
)
from fastpref.bench import DTYPES
from fastpref.costs import HEADS, SCHEDULES, Head
from fastpref.ops import preference_margins, segment_sum
from fastpref.schedule import DEFAULT_BUDGET, MIB

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_CPU = [("cpu", name) for name in ("torch", "cpp")]
ON_GPU = [("cuda", name) for name in ("torch", "triton", "cuda")]


def cases(names: str, on_gpu: list[tuple], on_cpu: list[tuple] = ()) -> pytest.MarkDecorator:
    """Parameters: every GPU backend on each case, marked ``gpu``, and every CPU backend on those
    that are small enough there."""
    given = [((*place, *case), ()) for place in ON_CPU for case in on_cpu]
    given += [((*place, *case), GPU) for place in ON_GPU for case in on_gpu]
    return pytest.mark.parametrize(
        ("device", "backend", *names.split()),
        [
            pytest.param(*values, marks=marks, id="-".join(map(str, values)))
            for values, marks in given
        ],
    )


# Two roundings to the inputs' dtype, in the Frobenius norm; fp32 sums of N products in any order.
GRADIENT_LIMIT = {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
NATS_LIMIT = 0.01  # of a sequence of 1,024 tokens
LOW = (torch.float32, torch.bfloat16, torch.float16)
CAPPED_OR_NOT = ("llama-3.2-1b", "gemma-2-2b")


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _runs_here(request: pytest.FixtureRequest) -> None:
    """A backend that was not built is a skip on a CPU; on a GPU it is what the test is about."""
    device, backend = (request.getfixturevalue(name) for name in ("device", "backend"))
    if device == "cpu" and backends.status()[backend] != "ok":
        pytest.skip(backends.status()[backend])


def load(path: str) -> object:
    """Another file of tests, as a module."""
    file = Path(__file__).with_name("ops") / path
    spec = importlib.util.spec_from_file_location(f"cases_of_{file.stem}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(name: str) -> Head:
    return Head(24, 4099, HEADS[name].softcap)


hostile = load("test_linear_logprobs.py")


def moved(problem: tuple[Tensor | None, ...], device: str) -> list[Tensor | None]:
    return [None if x is None else x.to(device) for x in problem]


def checked(problem: measure.Problem, backend: str, op: str = "logprobs") -> measure.Check:
    """The op against float64, and against itself run again."""
    (system,) = (s for s in peers.systems() if (s.name, s.op) == (f"fastpref[{backend}]", op))
    case = problem.case()
    found = measure.check(system, case, measure.truth(case, op))
    assert not found.verdict
    assert found.deterministic
    assert found.error_nats_per_1024 <= NATS_LIMIT
    assert (found.relative_gradient_error or 0.0) <= GRADIENT_LIMIT[problem.dtype]
    return found


HEAD_CASES = [
    *((name, "bf16", s) for name in HEADS for s in ("none", "trainable", "recompute")),
    *((name, dtype, "trainable") for name in CAPPED_OR_NOT for dtype in ("fp16", "fp32")),
]


@cases("name dtype schedule", HEAD_CASES, [c for c in HEAD_CASES if c[0] in CAPPED_OR_NOT])
def test_heads_of_real_models(device, backend, name, dtype, schedule):
    head, rows = (HEADS[name], 1024) if device == "cuda" else (small(name), 64)
    checked(measure.Problem(rows, head, DTYPES[dtype], device, schedule), backend)


@cases("budget", [(None,), (0,), (48 << 30,)], [(None,), (0,)])
def test_more_logits_than_32_bits_count(device, backend, budget):
    """32,768 rows of Gemma's vocabulary: 8.6e9 logits, and, given the room, as many kept E."""
    rows, head = (32_768, Head(576, 262_144)) if device == "cuda" else (96, Head(24, 5003))
    checked(measure.Problem(rows, head, torch.bfloat16, device, "trainable", budget), backend)


@cases(
    "shape dtype", list(itertools.product(hostile.SHAPES, LOW)), [((37, 33, 1000), torch.float16)]
)
def test_hostile_shapes(device, backend, shape, dtype):
    hostile.compare(moved(hostile.make(*shape, dtype), device), dtype, backend=backend)


OPTIONS = list(itertools.product((None, 0), (None, 5.0), (False, True), (torch.float64, *LOW)))


@cases("budget softcap bias dtype", OPTIONS, OPTIONS[-1:])
def test_options(device, backend, budget, softcap, bias, dtype):
    problem = moved(hostile.make(23, 18, 3000, dtype, bias=bias, seed=3), device)
    options = {"backend": backend, "memory_budget": budget, "softcap": softcap, "scale": 0.5}
    hostile.compare(problem, dtype, **options)


def as_on_a_gpu(out, a, b, accumulate=False):
    """The matrix products of a GPU: operands of two bytes, E among them, sums in fp32."""
    assert a.dtype == b.dtype in LOW[1:]
    assert out.dtype == torch.float32
    out.copy_(a.float() @ b.float() + (out if accumulate else 0.0))


@pytest.mark.parametrize(("device", "backend"), ON_CPU)
@pytest.mark.parametrize("budget", [None, 0, 200_000])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_the_schedule_with_the_products_of_a_gpu(
    monkeypatch, device, backend, budget, softcap, dtype
):
    monkeypatch.setattr(operands, "multiplies_low", lambda dtype, device: dtype in LOW[1:])
    monkeypatch.setattr(linear, "mm", as_on_a_gpu)
    problem = hostile.make(37, 18, 5003, dtype, bias=True, seed=3)
    options = {"backend": backend, "memory_budget": budget, "softcap": softcap}
    hostile.compare(problem, dtype, **options)


@pytest.mark.parametrize(("device", "backend"), ON_CPU)
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_token_kl_with_the_products_of_a_gpu(monkeypatch, device, backend, budget, dtype):
    monkeypatch.setattr(token_kl, "multiplies_low", lambda dtype, device: dtype in LOW[1:])
    monkeypatch.setattr(token_kl, "mm", as_on_a_gpu)
    check_token_kl(device, backend, dtype, budget, 5.0)


@cases("dtype budget softcap", list(itertools.product(LOW, (None, 0), (None, 5.0))))
def test_token_kl(device, backend, dtype, budget, softcap):
    check_token_kl(device, backend, dtype, budget, softcap)


def check_token_kl(device, backend, dtype, budget, softcap):
    """Value and gradients against materialised float64."""
    h, w, rh, rw = (
        torch.randn(*shape, device=device).to(dtype)
        for shape in ((60, 24), (3001, 24), (60, 32), (3001, 32))
    )
    bias = torch.randn(3001, device=device).to(dtype)
    leaves, results = [h, w, bias], []
    upstream = torch.randn(60, device=device)
    for name, wide in ((backend, False), ("reference", True)):
        mine = [x.double() if wide else x.clone() for x in leaves]
        mine = [x.requires_grad_() for x in mine]
        other = [x.double() if wide else x for x in (rh, rw)]
        kl = token_kl.linear_token_kl(
            *(*mine[:2], *other),
            bias=mine[2],
            scale=0.3,
            softcap=softcap,
            memory_budget=budget,
            backend=name,
        )
        results.append([kl, *torch.autograd.grad((kl * upstream).sum(), mine)])
    (kl, *gradients), (truth, *true_gradients) = results
    torch.testing.assert_close(kl.double(), truth, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, true_gradients, strict=True):
        assert float((got.double() - want).norm() / want.norm()) <= GRADIENT_LIMIT[dtype]


def inputs(device: str, n: int = 300, h: int = 64, v: int = 9001) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16)
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), device=device)


@cases("softcap", [(None,), (5.0,)], [(None,), (5.0,)])
def test_policy_and_reference_agree_to_the_bit(device, backend, softcap):
    """Whatever needs a gradient, and whatever statistics are asked for."""
    hidden, weight, targets = inputs(device)
    options = {"softcap": softcap, "backend": backend}
    first = linear_logprobs(hidden, weight, targets, **options)
    for h, w in ((hidden, weight.detach()), (hidden.detach(), weight.detach())):
        assert torch.equal(first, linear_logprobs(h, w, targets, **options))
        again, _ = linear_logprobs(h, w, targets, return_stats=True, **options)
        assert torch.equal(first, again)


class Step:
    """What a training step asks of the ops, and its gradients. ``run`` takes nothing and reads the
    tensors here, as a captured graph does."""

    def __init__(self, device: str, backend: str, n: int = 300) -> None:
        self.backend = backend
        self.hidden, self.weight, self.targets = inputs(device, n)
        self.rows = torch.arange(7, n - 9, device=device)
        bounds, pairs = [0, n // 3, n // 2, n], [[0, 2], [1, 0]]
        self.bounds = torch.tensor(bounds, device=device, dtype=torch.int32)
        self.pairs = torch.tensor(pairs, device=device)

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        logps = linear_logprobs(hidden, weight, targets, rows=rows, backend=self.backend)
        margins, *_ = preference_margins(
            *(logps, 0.9 * logps.detach(), self.bounds, self.pairs), backend=self.backend
        )
        sums = segment_sum(logps, self.bounds, backend=self.backend)
        nll = linear_cross_entropy(hidden, weight, targets, backend=self.backend)
        return margins.sum() + sums.square().mean() + nll

    def run(self) -> list[Tensor]:
        leaves = self.hidden, self.weight
        loss = self.loss(*leaves, self.targets, self.rows)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@cases("", [()], [()])
def test_a_step_repeats_to_the_bit(device, backend):
    step = Step(device, backend)
    assert_same_bits(step.run(), step.run())


@cases("", [()])
def test_compile_fullgraph(device, backend):
    step = Step(device, backend)
    expected = step.run()
    torch._dynamo.reset()
    step.loss = torch.compile(step.loss, fullgraph=True)
    got = step.run()
    torch._dynamo.reset()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert float((a - b).double().norm() / b.double().norm()) < 5e-3  # bf16, added in any order


@cases("", [()])
def test_no_host_sync(device, backend):
    step = Step(device, backend)
    expected = step.run()  # kernels are compiled and loaded here
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(again, expected)


@cases("", [()])
def test_a_captured_graph_replays_on_new_inputs(device, backend):
    step = Step(device, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for mine, new in zip((step.hidden, step.weight, step.targets), inputs(device)):
                mine.copy_(new)
        graph.replay()
        assert_same_bits(captured, step.run())


@cases("", [()])
def test_kernels_run_on_the_current_stream(device, backend):
    """A slow producer on a side stream: kernels on any other would read what was there before."""
    step = Step(device, backend)
    fresh = step.hidden.detach().clone()
    expected = step.run()
    side = torch.cuda.Stream()
    with torch.no_grad():
        step.hidden.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            step.hidden.copy_(fresh)
        found = step.run()
    side.synchronize()
    assert_same_bits(found, expected)


@cases("", [()])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_tensors_device(device, backend):
    step = Step("cuda:1", backend)
    assert torch.cuda.current_device() == 0
    assert_same_bits(step.run(), step.run())


PEAKS = itertools.product(("qwen2.5-0.5b", "llama-3-8b", "gemma-3-27b"), SCHEDULES)


@cases("name schedule", list(PEAKS))
def test_peak_memory(device, backend, name, schedule):
    """Beyond inputs, gradients, and ``dlogp/dhidden`` in the place of a second gradient."""
    if backend == "torch":
        pytest.skip("plain torch has temporaries of a tile's size")
    problem = measure.Problem(16_384, HEADS[name], torch.bfloat16, device, schedule)
    (system,) = (
        s for s in peers.systems() if (s.name, s.op) == (f"fastpref[{backend}]", "logprobs")
    )
    unit = 2 * problem.rows * problem.head.hidden_size if schedule != "none" else 0
    allowed = 300 * MIB if schedule == "recompute" else DEFAULT_BUDGET["cuda"] + 64 * MIB
    assert measure.peak_extra_bytes(problem, system, []) - unit <= allowed
