"""Backends: who runs the row kernels of the one schedule, and who is chosen when nobody is named.

A backend is a module with the functions of :class:`RowKernels`. It supplies elementwise work on
rows only; the matrix products are the vendor's, called by ``fastpref.linear``. Adding a backend is
adding a module and its names below.
"""

from __future__ import annotations

import importlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor
from torch import device as Device
from torch import dtype as DType
from torch.cuda import get_device_name  # in here `torch` and `cuda` are backends
from torch.cuda import is_available as sees_gpu

log = logging.getLogger("fastpref")

NAMES = ("cpp", "triton", "cuda", "torch")
"""Backends of the schedule. ``"reference"`` (materialised logits) is a name of its own in
``fastpref.ops``."""

_CPU = ("cpp", "torch")
_UNMEASURED = ("triton", "cuda", "torch")
_NEVER_TIMED = "; never timed on a GPU like this one, so each was tried against plain torch first"
_MEASURED = Path(__file__).with_name("measured.json")
"""What was measured on GPUs, as ``benchmarks/auto.py`` reads it off the committed rows."""
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Dtypes as the measured rows name them."""
_DEVICES = {"cpp": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
_TOOLS = "pip install ninja pybind11 setuptools wheel &&"  # an isolated build leaves none behind
_BUILD = "FASTPREF_FORCE_BUILD=1 pip install -v --no-build-isolation --no-deps ."
REBUILD = f"{_TOOLS} {_BUILD}"
"""Compiles the native module, from a checkout."""
_REMEDY = {
    "cpp": f"install a C++ compiler and rebuild: {REBUILD}",
    "triton": 'pip install "triton>=3.4" (Linux with an NVIDIA GPU)',
    "cuda": f"install the CUDA toolkit and rebuild: {_TOOLS} FASTPREF_CUDA=1 {_BUILD}",
}
_NO_GPU = (
    "leave the choice to backend='auto', or run where torch is a CUDA build and sees an NVIDIA GPU"
)


class RowKernels(Protocol):
    """What a backend supplies. Tensors are on one device; ``c`` is the compute dtype.

    ``c`` is fp32, or float64 for float64 inputs. ``targets`` are normalised: negative = ignored
    row, at least the vocabulary size = out of range. ``state (6, n)`` in ``c`` holds a row's
    running numbers over the tiles seen so far, with z the scaled and capped logits and y the
    target:

    ====  =====================================================  =======
    row   meaning                                                starts
    ====  =====================================================  =======
    0     M, maximum of z over v != y                            -inf
    1     R, sum over v != y of exp(z - M)                       0
    2     z_y                                                    NaN
    3     sum of z                                 (statistics)  0
    4     sum over v != y of exp(z - M) (z - M)    (statistics)  0
    5     sum over v != y of exp(z - M)^2          (statistics)  0
    ====  =====================================================  =======
    """

    def available(self) -> bool:
        """Whether the kernels can run here."""
        ...

    def why_unavailable(self) -> str:
        """What is missing; empty if nothing is."""
        ...

    def sweep_(
        self,
        tile: Tensor,
        out: Tensor | None,
        state: Tensor,
        offset: Tensor | None,
        acc: Tensor | None,
        targets: Tensor,
        bias: Tensor | None,
        start: int,
        scale: float,
        softcap: float,
        with_stats: bool,
    ) -> None:
        """Fold one tile of logits into ``state`` and turn it into the operand of the gradient
        products.

        Args:
            tile: ``hidden @ weight[start:start + w].T``. Shape ``(n, w)``, dtype ``c``. May be
                overwritten, unless ``out`` is None.
            out: None, or ``tile`` itself, or a tensor ``(n, w)`` of a lower dtype. Receives
                ``G = exp(z - M) * (1 - (z / softcap)^2)``, M after this tile; 0 in the target's
                column and in ignored rows. Without softcap the second factor is 1.
            state: ``(6, n)``; rows of ignored targets are left alone.
            offset: None, or ``(n,)``; receives M, under which the row of ``out`` was stored.
            acc: None, or ``(n, H)``; a row is multiplied by ``exp(M_before - M)`` where M grew.
            targets: ``(n,)`` int64.
            bias: None, or ``(w,)`` in ``c``.
            start: Vocabulary index of the tile's first column.
            scale: Multiplies ``tile + bias``.
            softcap: ``z = softcap * tanh(z / softcap)`` if positive; 0 for none.
            with_stats: Maintain rows 3 to 5 of ``state``.
        """
        ...

    def combine_(
        self,
        state: Tensor,
        targets: Tensor,
        vocab_size: int,
        softcap: float,
        scale: float,
        acc: Tensor | None,
        weight: Tensor,
        hidden_grad: Tensor | None,
        logp: Tensor,
        q: Tensor,
        coef: Tensor,
        stats: Tensor | None,
    ) -> None:
        """Finish the rows: log-probabilities, the two factors of the gradient, statistics,
        ``dlogp/dhidden``.

        With ``a = log R + M - z_y`` and ``d_y = 1 - (z_y / softcap)^2`` (1 without softcap): ``logp
        = -softplus(a)``, ``q = sigmoid(a) d_y``, ``coef = sigmoid(a) / R``. R = 0 gives 0, 0, 0; an
        ignored row too; a target out of range gives NaN.

        Args:
            state: ``(6, n)`` after the last tile.
            targets: ``(n,)`` int64.
            vocab_size: V.
            softcap: As in :meth:`sweep_`.
            scale: As in :meth:`sweep_`.
            acc: None, or ``(n, H)`` in ``c``: ``sum_v G_v W_v`` under the final M.
            weight: ``(V, H)``, any float dtype.
            hidden_grad: None, or ``(n, H)``: receives ``scale * (q * W[y] - coef * acc)``, 0 in
                ignored rows. May be ``acc`` itself.
            logp: ``(n,)`` in ``c``.
            q: ``(n,)`` in ``c``.
            coef: ``(n,)`` in ``c``.
            stats: None, or ``(5, n)`` in ``c``: entropy, lse, top1, logit_mean, log_sum_sq_probs.
        """
        ...

    def kl_tile_(
        self,
        tile: Tensor,
        ref_tile: Tensor,
        out: Tensor | None,
        state: Tensor,
        ref_state: Tensor,
        bias: Tensor | None,
        ref_bias: Tensor | None,
        scale: float,
        softcap: float,
        ref_scale: float,
        ref_softcap: float,
        kl: Tensor,
    ) -> None:
        """Add a tile's share of KL(reference || policy) to its rows, and form its gradient.

        With p and r the probabilities of policy and reference, ``exp(z - M) / R``: ``kl += sum_v
        r_v (log r_v - log p_v)``, where ``r_v = 0`` adds 0.

        Args:
            tile: Raw products of the policy. Shape ``(n, w)``, dtype ``c``. May be overwritten.
            ref_tile: Those of the reference, of the same columns.
            out: None, or ``tile`` itself, or a tensor ``(n, w)`` of a lower dtype. Receives
                ``S (p_v - r_v) (1 - (z_v / softcap)^2)`` with ``S = min(R, R_ref)``, so that no
                entry exceeds 1.
            state: ``(6, n)``: M and R over the whole vocabulary, no column left out.
            ref_state: The same of the reference.
            bias: None, or ``(w,)`` in ``c``.
            ref_bias: None, or ``(w,)`` in ``c``.
            scale: Multiplies ``tile + bias``.
            softcap: As in :meth:`sweep_`.
            ref_scale: Multiplies ``ref_tile + ref_bias``.
            ref_softcap: As in :meth:`sweep_`.
            kl: ``(n,)`` in ``c``.
        """
        ...

    def scale_rows_(self, out: Tensor, x: Tensor, factor: Tensor) -> None:
        """``out[i] = factor[i] * x[i]``; exactly 0 where the factor is 0, whatever ``x`` holds."""
        ...

    def add_target_rows_(
        self, out: Tensor, x: Tensor, targets: Tensor, factor: Tensor, start: int
    ) -> None:
        """``out[targets[i] - start] += factor[i] * x[i]`` for targets inside ``out (w, H)``;
        deterministic."""
        ...

    def segment_sum(self, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sum of ``values (n,)`` over ``[cu_seqlens[i], cu_seqlens[i + 1])``, accumulated in
        float64."""
        ...

    def segment_sum_backward(self, grad: Tensor, cu_seqlens: Tensor, n: int) -> Tensor:
        """``grad (S,)`` repeated over its segment, ``(n,)``; 0 outside every segment."""
        ...

    def pair_margins(
        self, logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, pairs: Tensor
    ) -> Tensor:
        """``(3, P)``: margin, chosen and rejected log-ratio of ``pairs (P, 2)`` of sequences."""
        ...

    def pair_margins_backward(
        self, grad: Tensor, cu_seqlens: Tensor, pairs: Tensor, n: int
    ) -> Tensor:
        """Gradient of :meth:`pair_margins` in ``logps``, ``(n,)``."""
        ...


@cache
def _module(name: str) -> RowKernels | str:
    """The backend's module, or why it cannot be used."""
    try:
        module = cast(RowKernels, importlib.import_module(f"fastpref.backends.{name}"))
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except ImportError as error:
        return f"does not import ({error})"
    return module if module.available() else module.why_unavailable()


def status() -> dict[str, str]:
    """Per backend, ``"ok"`` or what is missing."""
    found = {name: _module(name) for name in NAMES}
    return {name: m if isinstance(m, str) else "ok" for name, m in found.items()}


def remedy(name: str) -> str:
    """What makes a missing backend available; empty for the built-in one.

    That is a command, unless what is missing is the device that the backend runs on.
    """
    needs_gpu = "cuda" in _DEVICES.get(name, ())
    return _NO_GPU if needs_gpu and not sees_gpu() else _REMEDY.get(name, "")


@cache
def _measured() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", json.loads(_MEASURED.read_text()))


def _order(device_type: str, dtype: str) -> tuple[tuple[str, ...], str]:
    """Backends for a device in the order in which ``auto`` tries them, and where the order is from.

    On a GPU that is the measured order of this model of GPU and dtype, or of the nearest that were
    measured; where none was, the compiled kernels, which :func:`explain` then tries first.
    """
    if device_type == "cpu":
        return _CPU, ""
    if device_type != "cuda":
        return ("torch",), ""
    if not _measured():
        return _UNMEASURED, _NEVER_TIMED
    here = get_device_name() if sees_gpu() else ""
    row = max(_measured(), key=lambda row: (row["device"] == here, row["dtype"] == dtype))
    return (*row["order"], "torch"), f", as measured for {row['dtype']} on {row['device']}"


@cache
def _trial(name: str) -> str:
    """What goes wrong when a backend runs on this GPU; empty where nothing does."""
    from fastpref.backends.trial import disagreement

    return disagreement(_require(name), Device("cuda"))


def explain(device_type: str, dtype: DType) -> tuple[str, str]:
    """The backend that ``auto`` takes for a device and dtype, and why.

    On a GPU for which nothing was measured the first call in a process tries the kernels.
    """
    name_of_dtype = str(dtype).removeprefix("torch.")
    order, source = _order(device_type, _SHORT.get(name_of_dtype, name_of_dtype))
    why: list[str] = []
    for name in order:
        module = _module(name)
        wrong = module if isinstance(module, str) else ""
        if not wrong and source == _NEVER_TIMED and name != "torch":
            wrong = _trial(name)
        if not wrong:
            first = "the first choice" if not why else "; ".join(why)
            return name, f"{first} for {name_of_dtype} on {device_type}{source}"
        why.append(f"{name} is unavailable: {wrong}")
    raise AssertionError("plain torch is always available")


@cache
def _auto(device_type: str, dtype: DType) -> str:
    name, reason = explain(device_type, dtype)
    log.info("fastpref backend for %s %s: %s (%s)", device_type, dtype, name, reason)
    return name


def _require(name: str) -> RowKernels:
    kernels = _module(name)
    if isinstance(kernels, str):
        raise RuntimeError(f"backend={name!r} is not available: {kernels}. To help: {remedy(name)}")
    return kernels


def resolve(name: str, device_type: str, dtype: DType) -> str:
    """The name of the backend to run, with ``"auto"`` decided.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend that was asked for is missing, or does not serve the device.
    """
    if name == "auto":
        return _auto(device_type, dtype)
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: expected one of {['auto', *NAMES, 'reference']}")
    _require(name)
    devices = _DEVICES.get(name)
    if devices and device_type not in devices:
        raise RuntimeError(
            f"backend={name!r} runs on {' and '.join(devices)} tensors, got tensors on "
            f"{device_type}. Use backend='auto', or move the tensors."
        )
    return name


def select(name: str, like: Tensor) -> RowKernels:
    """The row kernels for tensors such as ``like``; :func:`resolve` says what can go wrong."""
    return _require(resolve(name, like.device.type, like.dtype))
