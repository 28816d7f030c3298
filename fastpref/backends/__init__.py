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
from typing import Any, cast

from torch import Tensor
from torch import device as Device
from torch import dtype as DType
from torch.cuda import get_device_name  # in here `torch` and `cuda` are backends
from torch.cuda import is_available as sees_gpu

from fastpref.backends import trial
from fastpref.backends.row_kernels import RowKernels as RowKernels

log = logging.getLogger("fastpref")

NAMES = ("cpp", "triton", "cuda", "torch")
"""Backends of the schedule. ``"reference"`` (materialised logits) is a name of its own in
``fastpref.ops``."""

_CPU = ("cpp", "torch")
_UNMEASURED = ("triton", "cuda", "torch")
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
        return _UNMEASURED, ""
    here = get_device_name() if sees_gpu() else ""
    row = max(_measured(), key=lambda row: (row["device"] == here, row["dtype"] == dtype))
    return (*row["order"], "torch"), f", as measured for {row['dtype']} on {row['device']}"


@cache
def _trial(name: str, dtype: DType) -> str:
    """What goes wrong when a backend runs on this GPU; empty where nothing does."""
    return trial.disagreement(_require(name), _require("torch"), Device("cuda"), dtype)


def explain(device_type: str, dtype: DType) -> tuple[str, str]:
    """The backend that ``auto`` takes for a device and dtype, and why.

    On a GPU for which nothing was measured the first call in a process tries the kernels.
    """
    name_of_dtype = str(dtype).removeprefix("torch.")
    order, source = _order(device_type, _SHORT.get(name_of_dtype, name_of_dtype))
    untimed = device_type == "cuda" and not source
    why: list[str] = []
    for name in order:
        module = _module(name)
        wrong = module if isinstance(module, str) else ""
        if not wrong and untimed and name != "torch":
            wrong = _trial(name, dtype)
            source = "; never timed on a GPU like this one, so tried against plain torch first"
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
