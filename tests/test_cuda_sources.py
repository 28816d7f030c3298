"""The CUDA sources compiled for GPUs that are not here: no warnings, no spills, the known table.

``benchmarks/results/cuda_resources.json`` is checked against a fresh compile for sm_90; with the
slow tests for sm_80 and sm_100 as well. What the kernels compute is in ``test_cuda_kernels.py``.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from fastpref import backends
from fastpref.backends import cpp, cuda

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "cuda_resources", ROOT / "benchmarks" / "cuda_resources.py"
)
cuda_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_resources)

REMEDY = f"run: {cuda_resources.COMMAND}"
COMMITTED = json.loads(cuda_resources.RESULTS.read_text())
THREADS = {"sweep_kernel": 512}  # of the largest block; 256 elsewhere
needs_nvcc = pytest.mark.skipif(cuda_resources.NVCC is None, reason="nvcc is not on the PATH")


def check_launchable(row: dict) -> None:
    name = row["kernel"].split("<")[0]
    assert row["registers"] * THREADS.get(name, 256) <= 65536, row
    assert row["shared_bytes"] <= 4096, row  # what the sweep leaves beside its rows
    assert row["spill_bytes"] == 0, row


def test_the_committed_table_is_whole_and_without_spills():
    kernels = [row["kernel"] for row in COMMITTED["rows"] if row["arch"] == "sm_90"]
    written = {name for source in cuda_resources.SOURCES for name in kernels_of(source)}
    assert {name.split("<")[0] for name in kernels} == written, REMEDY
    for arch in cuda_resources.ARCHITECTURES:
        here = [row["kernel"] for row in COMMITTED["rows"] if row["arch"] == f"sm_{arch}"]
        assert here == kernels, REMEDY
    for row in COMMITTED["rows"]:
        check_launchable(row)


def kernels_of(source: Path) -> list[str]:
    return re.findall(r"^\s*(?:__global__ .*)?\b(\w+_kernel)\(", source.read_text(), re.MULTILINE)


@needs_nvcc
@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[] if a == 90 else pytest.mark.slow) for a in (80, 90, 100)],
)
@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=lambda path: path.name)
def test_a_fresh_compile_is_silent_spills_nothing_and_matches_the_table(source, arch):
    rows = cuda_resources.resources(source, arch)
    for row in rows:
        check_launchable(row)
    if cuda_resources.release() == COMMITTED["nvcc"]:
        here = (source.name, f"sm_{arch}")
        assert rows == [r for r in COMMITTED["rows"] if (r["source"], r["arch"]) == here], REMEDY


SAID = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN8fastpref4_GLOBAL__N__1_8_sweep_cu_2_312sweep_kernel\
IfLb1ELb0EEEvNS0_5SweepIT_EE' for 'sm_90'
    24 bytes stack frame, 28 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 264 bytes smem
"""


def test_a_spill_and_a_warning_would_be_seen(monkeypatch):
    source = Path("sweep.cu")
    monkeypatch.setattr(cuda_resources, "compile_source", lambda *_: SAID)
    (row,) = cuda_resources.resources(source, 90)
    assert row == {
        **{"kernel": "sweep_kernel<float, true, false>", "source": "sweep.cu", "arch": "sm_90"},
        **{"registers": 40, "spill_bytes": 24, "shared_bytes": 264},
    }
    with pytest.raises(AssertionError):
        check_launchable(row)
    monkeypatch.setattr(cuda_resources, "compile_source", lambda *_: "warning #177-D: x" + SAID)
    with pytest.raises(RuntimeError, match="177-D"):
        cuda_resources.resources(source, 90)


def test_every_op_has_a_cuda_implementation_and_every_source_is_built():
    text = "".join(source.read_text() for source in cuda_resources.SOURCES)
    declared = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "module.cpp").read_text())
    assert sorted(re.findall(r'm\.impl\("(\w+)"', text)) == sorted(declared)
    built = re.search(r"^CUDA, .* = (\[.*?\]),", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    assert sorted(json.loads(built)) == [source.stem for source in cuda_resources.SOURCES]


@pytest.mark.parametrize(
    ("built_with", "torch_cuda", "gpu", "why"),
    [
        ("none", "13.0", True, "built without CUDA"),
        ("13.0", None, False, "no GPU: torch .* is a build without CUDA"),
        ("13.0", "13.0", False, "no GPU: torch sees no CUDA device"),
        ("13.0", "13.0", True, ""),
    ],
)
def test_why_it_is_unavailable(monkeypatch, built_with, torch_cuda, gpu, why):
    monkeypatch.setattr(cpp, "available", lambda: True)
    monkeypatch.setattr(cpp, "build_info", lambda: {"cuda": built_with})
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert re.match(why, cuda.why_unavailable())
    assert cuda.available() == (why == "")


def test_without_the_module_the_reason_is_the_modules(monkeypatch):
    monkeypatch.setattr(cpp, "available", lambda: False)
    monkeypatch.setattr(cpp, "why_unavailable", lambda: "did not load")
    assert cuda.why_unavailable() == "did not load"


def test_it_has_the_functions_of_the_seam():
    functions = {name for name in vars(backends.RowKernels) if not name.startswith("_")}
    assert functions == set(cuda.__all__)
