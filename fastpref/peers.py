"""The systems that ``fastpref bench`` sets side by side: this package, the floor, and its peers.

A peer is an optional import, called through its public entry point and never copied. One that
cannot run on a device says why, so that a table never drops a system in silence. Other packages add
systems by the entry point group ``fastpref.bench`` or by ``--plugin module:function``: a function
that takes nothing and returns a list of :class:`System`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref import backends, linear, ops
from fastpref.case import OPS, PREFERENCE, Case, Passes, System, differentiable, pairs_of, uneven
from fastpref.costs import SCHEDULES
from fastpref.operands import compute_dtype, mm, multiplies_low


def _fastpref(backend: str, op: str = "logprobs") -> System:
    def start(case: Case) -> Passes:
        budget = 0 if case.schedule == "recompute" else case.budget

        def function(hidden: Tensor, weight: Tensor) -> Tensor:
            out = ops.linear_logprobs(
                *(hidden, weight, case.targets),
                softcap=case.softcap,
                return_stats=op == "statistics",
                backend=backend,
                memory_budget=budget,
            )
            return OPS[op](out if isinstance(out, Tensor) else out[0])

        return differentiable(case, function)

    def why_not(case: Case) -> str:
        try:
            backends.resolve(backend, case.device, case.hidden.dtype)
        except RuntimeError as error:
            return str(error)
        return uneven(case) if op in PREFERENCE else ""

    return System(f"fastpref[{backend}]", op, start, why_not, schedules=SCHEDULES)


def _gemms(case: Case) -> Passes:
    """The floor: the matrix products of the schedule and nothing else, tile by tile, into buffers
    that are reused. Operands are in the dtype in which this package multiplies."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    n, v = hidden.shape[0], weight.shape[0]
    p = linear.plan_for(n, weight, 0 if case.schedule == "recompute" else case.budget)
    wide = compute_dtype(hidden.dtype)
    on_gpu = multiplies_low(hidden.dtype, hidden.device)
    low = hidden.dtype if on_gpu else wide
    hidden, weight = hidden.to(low), weight.to(low)
    trained = case.schedule in ("trainable", "recompute")
    kept_tiles = p.kept_tiles if trained else 0
    z = hidden.new_zeros((min(p.rows, n), min(p.tile, v)), dtype=wide)
    # random, as data is: a GPU multiplies zeros faster
    e = torch.rand_like(z, dtype=low) if on_gpu else z
    kept = hidden.new_empty(n * min(kept_tiles * p.tile, v)).uniform_()
    acc = torch.zeros_like(hidden, dtype=wide)
    dweight = torch.zeros_like(weight if trained else weight[:0], dtype=wide)

    def tile_of(buffer: Tensor, r0: int, r1: int, v0: int, v1: int) -> Tensor:
        return buffer.view(-1)[: (r1 - r0) * (v1 - v0)].view(r1 - r0, v1 - v0)

    def kept_of(r0: int, r1: int, v0: int, v1: int) -> Tensor:
        start = r0 * min(kept_tiles * p.tile, v) + (r1 - r0) * v0
        return kept[start : start + (r1 - r0) * (v1 - v0)].view(r1 - r0, v1 - v0)

    def forward() -> None:
        for r0, r1 in p.chunks(n):
            for t, (v0, v1) in enumerate(p.tiles(v)):
                where = (r0, r1, v0, v1)
                operand = kept_of(*where) if t < kept_tiles else tile_of(e, *where)
                product = tile_of(z, *where) if on_gpu or t >= kept_tiles else operand
                mm(product, hidden[r0:r1], weight[v0:v1].t(), False)
                if case.schedule != "none":
                    mm(acc[r0:r1], operand, weight[v0:v1], t > 0)

    def backward(_: Any) -> tuple[Tensor, ...]:
        for t, (v0, v1) in enumerate(p.tiles(v) if trained else []):
            for r0, r1 in p.chunks(n):
                where = (r0, r1, v0, v1)
                if t >= kept_tiles:
                    mm(tile_of(z, *where), hidden[r0:r1], weight[v0:v1].t(), False)
                operand = kept_of(*where) if t < kept_tiles else tile_of(e, *where)
                mm(dweight[v0:v1], operand.t(), hidden[r0:r1], r0 > 0)
        return ()

    return Passes(forward, backward)


def _materialised(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """What a model's own head and a trainer do: logits in the inputs' dtype, softmax in fp32."""

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        return -F.cross_entropy(logits.float(), case.targets, reduction="none")

    return function


def _compiled(case: Case) -> Passes:
    return differentiable(case, torch.compile(_materialised(case), dynamic=False))


def _torch_chunked(op: str) -> Callable[[Case], Passes]:
    def start(case: Case) -> Passes:
        options = torch.nn.LinearCrossEntropyOptions()
        reduction, sign = ("none", -1.0) if op == "logprobs" else ("sum", 1.0)

        def function(hidden: Tensor, weight: Tensor) -> Tensor:
            loss = F.linear_cross_entropy(
                hidden, weight, case.targets, reduction=reduction, options=options
            )
            return sign * loss

        return differentiable(case, function)

    return start


def _trl(case: Case) -> Passes:
    kernels = importlib.import_module("trl.kernels")
    tile = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        # log-probabilities alone: its trainers ask for entropy, mean logit and top-1 on top
        arguments = (hidden, weight, None, case.targets, 1.0, tile, case.softcap, 1.0, ())
        logps: Tensor = kernels.ChunkedLogProbFunction.apply(*arguments)[0]
        return logps

    return differentiable(case, function)


def _liger(case: Case) -> Passes:
    liger = importlib.import_module("liger_kernel.transformers.functional")

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = liger.liger_fused_linear_cross_entropy(
            hidden, weight, case.targets, reduction="none", softcap=case.softcap
        )
        return -loss

    return differentiable(case, function)


LIGER = {
    "dpo": ("LigerFusedLinearDPOLoss", {"use_ref_model": False}),
    "simpo": ("LigerFusedLinearSimPOLoss", {"compute_nll_loss": False}),
    "orpo": ("LigerFusedLinearORPOLoss", {}),
}


def _liger_preference(op: str, case: Case) -> Passes:
    name, options = LIGER[op]
    module = importlib.import_module("liger_kernel.chunked_loss")
    loss = getattr(module, name)(**PREFERENCE[op], **options)
    sequences = 2 * pairs_of(case.targets.numel())
    targets = case.targets.view(sequences, -1)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = loss(weight, hidden.view(sequences, -1, hidden.shape[1]), targets)[0]
        return value

    return differentiable(case, function)


def _cce(case: Case) -> Passes:
    cce = importlib.import_module("cut_cross_entropy")

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = cce.linear_cross_entropy(
            hidden, weight, case.targets, softcap=case.softcap, reduction="none", impl="cce"
        )
        return -loss

    return differentiable(case, function)


def _quack(case: Case) -> Passes:
    quack = importlib.import_module("quack.linear_cross_entropy")

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = quack.chunked_linear_cross_entropy(
            hidden, weight, case.targets, reduction="sum"
        )
        return loss

    return differentiable(case, function)


BENCH_EXTRA = "pip install 'fastpref[bench]'"


def _needs(
    module: str, *, gpu: bool = False, low: bool = False, softcap: bool = True, even: bool = False
) -> Callable[[Case], str]:
    """A ``why_not``: the module must be there; and what a peer asks of device, dtype and shape."""

    def why_not(case: Case) -> str:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"{module.partition('.')[0]} is not installed: {BENCH_EXTRA}"
        if gpu and case.device != "cuda":
            return "needs a CUDA device"
        if low and case.hidden.dtype == torch.float32:
            return "needs bf16 or fp16"
        if not softcap and case.softcap is not None:
            return "has no softcap"
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's import may fail in any way it likes
            return f"does not import: {type(error).__name__}: {error}"
        return uneven(case) if even else ""

    return why_not


def _plain(op: str) -> Callable[[Case], Passes]:
    def start(case: Case) -> Passes:
        function = _materialised(case)
        return differentiable(case, lambda hidden, weight: OPS[op](function(hidden, weight)))

    return start


def systems(plugins: list[str] | None = None) -> list[System]:
    """Every system there is to measure, whether it can run here or not.

    Args:
        plugins: ``"module:function"`` of further systems, besides the installed entry points.
    """
    no_cap = _needs("torch", softcap=False)
    liger_losses = _needs("liger_kernel.chunked_loss", softcap=False, even=True)
    found = [
        System("gemms", "gemms", _gemms, schedules=SCHEDULES),
        *(_fastpref(name, op) for op in ("logprobs", "statistics") for name in backends.NAMES),
        System("torch", "logprobs", _plain("logprobs"), schedules=SCHEDULES),
        System("torch.compile", "logprobs", _compiled),
        System("torch.linear_cross_entropy", "logprobs", _torch_chunked("logprobs"), no_cap),
        System("trl", "logprobs", _trl, _needs("trl.kernels"), "trl"),
        System("liger", "logprobs", _liger, _needs("liger_kernel.ops", gpu=True), "liger-kernel"),
        System(
            *("cut-cross-entropy", "logprobs", _cce),
            _needs("cut_cross_entropy", gpu=True, low=True),
            "cut-cross-entropy",
        ),
        System("torch.linear_cross_entropy", "cross_entropy", _torch_chunked("sum"), no_cap),
        System(
            *("quack", "cross_entropy", _quack),
            _needs("quack.linear_cross_entropy", gpu=True, low=True, softcap=False),
            "quack-kernels",
        ),
        *(_fastpref("auto", loss) for loss in PREFERENCE),
        *(System("torch", loss, _plain(loss), uneven) for loss in PREFERENCE),
        *(
            System("liger", loss, partial(_liger_preference, loss), liger_losses, "liger-kernel")
            for loss in PREFERENCE
        ),
    ]
    for entry in entry_points(group="fastpref.bench"):
        found += entry.load()()
    for plugin in plugins or []:
        module, _, function = plugin.partition(":")
        if not function:
            raise ValueError(f"--plugin {plugin!r}: expected module:function")
        found += getattr(importlib.import_module(module), function)()
    return found
