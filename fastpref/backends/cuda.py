"""The row kernels in CUDA C++ (``csrc/cuda``): the ops of ``fastpref.backends.cpp`` for CUDA
tensors.

``fastpref.backends`` documents the signatures, which every backend shares. Both devices have one
schema each in ``csrc/module.cpp``, and torch dispatches by where the tensors are, so the calls are
the same; what differs is whether they can run.
"""

from __future__ import annotations

import torch

from fastpref.backends import cpp
from fastpref.backends.cpp import (
    add_target_rows_,
    combine_,
    kl_tile_,
    pair_margins,
    pair_margins_backward,
    scale_rows_,
    segment_sum,
    segment_sum_backward,
    sweep_,
)

__all__ = [
    "add_target_rows_",
    "available",
    "combine_",
    "kl_tile_",
    "pair_margins",
    "pair_margins_backward",
    "scale_rows_",
    "segment_sum",
    "segment_sum_backward",
    "sweep_",
    "why_unavailable",
]


def why_unavailable() -> str:
    """Why the kernels cannot run; empty where they can. A build without CUDA is told apart from a
    machine without a GPU."""
    if not cpp.available():
        return cpp.why_unavailable()
    if cpp.build_info()["cuda"] == "none":
        return "built without CUDA: the compiled module holds the CPU kernels only"
    if torch.version.cuda is None:
        return f"no GPU: torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "no GPU: torch sees no CUDA device"
    return ""


def available() -> bool:
    """Whether the module was built with CUDA and a GPU is there."""
    return not why_unavailable()
