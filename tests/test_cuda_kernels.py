"""The CUDA row kernels against plain float64 torch, through the cases of the Triton ones.

Every case runs twice. Without a GPU on the host: ``cuda_on_host.h`` lets a C++ compiler build the
CUDA sources as they are, with a fiber for each thread of a block, for CPU tensors. With a GPU in
the package as it is installed, as tests marked ``gpu``.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from fastpref import backends
from fastpref.backends import cuda

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SLICE = 8192  # the widest fp32 row that a block holds with the shared memory of cuda_on_host.h
CXX = shutil.which("g++")


class Kernels:
    """A backend as its callers see it: they hand over contiguous tokens."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        function = getattr(self._module, name)
        if name.startswith(("segment", "pair")):
            return lambda tokens, *rest: function(tokens.contiguous(), *rest)
        return function


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The CUDA sources compiled for CPU tensors, as ops of a library of their own."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for header in ("cuda_runtime.h", "cuda_pipeline_primitives.h"):
        (folder / header).write_text('#include "cuda_on_host.h"\n')
    includes = ["cuda_on_host.h", *map(str, SOURCES)]
    (folder / "all.cpp").write_text("".join(f'#include "{name}"\n' for name in includes))
    done = subprocess.run(
        [
            *(str(CXX), "-std=c++20", "-O1", "-shared", "-fPIC", "-DUSE_CUDA"),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *(f"-I{path}" for path in (folder, ROOT / "tests", *include_paths())),
            *(str(folder / "all.cpp"), "-o", str(folder / "all.so")),
            *(f"-L{path}" for path in library_paths()),
            *("-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    library = torch.library.Library("fastpref_on_host", "DEF")
    schemas = re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', (ROOT / "csrc/module.cpp").read_text())
    for parts in schemas:
        library.define("".join(re.findall(r'"([^"]*)"', parts)))
    torch.ops.load_library(str(folder / "all.so"))
    kernels = Kernels(torch.ops.fastpref_on_host)
    kernels.library = library  # the schemas live as long as this
    return kernels


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(CXX is None, reason="needs g++"), id="host"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not cuda.available(), reason=cuda.why_unavailable()),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(
    device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Kernels:
    """Also what the public op runs on, whatever backend is asked for."""
    found = request.getfixturevalue("on_host") if device == "cpu" else Kernels(cuda)
    monkeypatch.setattr(backends, "_module", lambda name: found)
    return found


def shared_cases(name: str) -> types.ModuleType:
    """A file of cases for the row kernels. Its tests come here, for the devices of this file."""
    spec = importlib.util.spec_from_file_location(f"cases_of_{name}", ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROUNDING = 0.5
    for test in list(vars(module).values()):
        code = getattr(test, "__code__", None)
        of_any_backend = code and "kernels" in code.co_varnames[: code.co_argcount]
        if of_any_backend and code.co_name[:5] == "test_" and "sweep_config" not in code.co_names:
            copy = types.FunctionType(code, vars(module), code.co_name, test.__defaults__)
            marks = [mark for mark in test.pytestmark if mark.args[:1] != ("device",)]
            copy.pytestmark = marks
            globals()[code.co_name] = copy
    return module


cases = shared_cases("test_triton_kernels")
shared_cases("test_triton_rows")
_poisoned_allocations = cases._poisoned_allocations


def sweep(kernels: Kernels, tile: Tensor, out: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """State and offsets after one tile in which every third row is ignored."""
    n, width = tile.shape
    state = cases.new_state(n, torch.float32, tile.device)
    offset, acc = state.new_empty(n), state.new_ones(n, 37)
    targets = torch.arange(n, device=tile.device) * width // n
    targets[::3] = -1
    kernels.sweep_(tile, out, state, offset, acc, targets, bias, 0, 0.5, 9.0, True)
    return [state.nan_to_num(7.0), offset, acc]


@pytest.mark.parametrize("width", [SLICE - 1, SLICE + 1, 2 * SLICE + 300])
def test_tiles_of_several_slices(kernels, device, width):
    raw, targets = cases.problem(7, width, device, spread=2.0)
    bias = torch.randn(width, device=device)
    cases.check(kernels, raw, targets, cases.cut(width), bias=bias, softcap=20.0)
    cases.check(kernels, raw, targets, cases.cut(width, 100), out=torch.bfloat16)


@pytest.mark.parametrize("width", [700, SLICE + 1])
def test_the_sums_do_not_depend_on_what_else_is_asked_for(kernels, device, width):
    raw, targets = cases.problem(7, width, device)
    tiles = cases.cut(width, width // 3)
    for softcap in (0.0, 30.0):
        first = cases.Rows(kernels, raw, targets, tiles, softcap=softcap)
        for other in (
            {"out": "none", "gradient": False},
            {"out": torch.bfloat16},
            {"with_stats": False},
            {"with_stats": False, "out": "none", "gradient": False},
        ):
            again = cases.Rows(kernels, raw, targets, tiles, softcap=softcap, **other)
            for name in ("logp", "q", "coef"):
                assert torch.equal(getattr(first, name), getattr(again, name)), (name, other)


@pytest.mark.parametrize("width", [4096, 3001])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_alignment_does_not_change_a_bit(kernels, device, width, out):
    """Rows that are read and written 16 bytes at a time, and the same rows an element further."""
    raw, bias = torch.randn(8, width, device=device) * 4, torch.randn(width + 1, device=device)
    results = []
    for shift in (0, 1):
        room = raw.new_full((8, 4104), 3.0)
        tile = room[:, shift : width + shift].copy_(raw)
        stored = torch.full_like(room, 5.0, dtype=out)
        g = stored[:, shift : width + shift]
        part = bias.roll(shift)[shift : width + shift]
        results.append([*sweep(kernels, tile, g, part), g.clone()])
        stored[:, shift : width + shift] = 5.0
        assert (stored == 5.0).all()
        assert (room[:, width + shift :] == 3.0).all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [300, 2 * SLICE + 300])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
def test_out_may_start_at_the_bytes_of_its_row(kernels, device, width, out):
    raw = torch.randn(25, width, device=device) * 4
    apart, tile = torch.empty_like(raw, dtype=out), raw.clone()
    within = tile.view(out)[:, :width]
    first = sweep(kernels, raw.clone(), apart, None)
    second = sweep(kernels, tile, within, None)
    for a, b in zip([*first, apart], [*second, within], strict=True):
        assert torch.equal(a, b)


def test_many_rows_with_one_target_add_in_order(kernels, device):
    n, hidden = 700, 2100
    targets = torch.randint(0, 3, (n,), device=device) * 4
    x, factor = torch.randn(n, hidden, device=device), torch.randn(n, device=device)
    out = torch.randn(9, hidden, device=device)
    truth = out.double().clone()
    truth.index_add_(0, targets, x.double() * factor.double()[:, None])
    kernels.add_target_rows_(out, x, targets, factor, 0)
    cases.assert_close(out, truth, 1e-6, 1e-4, "out")
