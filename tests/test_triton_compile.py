"""The Triton kernels compiled to machine code without a GPU: what they use, and what they must not.

The committed table ``benchmarks/results/triton_resources.json`` is checked against a fresh compile
for sm_90; it covers sm_80 and sm_100 as well.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import torch
import triton

from fastpref.backends import triton as launch

SOURCE = Path(__file__).parents[1] / "benchmarks" / "kernel_resources.py"
spec = importlib.util.spec_from_file_location("kernel_resources", SOURCE)
kernel_resources = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernel_resources  # dataclasses look their module up
spec.loader.exec_module(kernel_resources)

CASES = {case.name: case for case in kernel_resources.cases()}
REMEDY = f"run: {kernel_resources.COMMAND}"


@pytest.fixture(scope="module")
def committed():
    return json.loads(kernel_resources.RESULTS.read_text())


def test_the_committed_table_is_whole_and_without_spills(committed):
    expected = {(name, f"sm_{a}") for name in CASES for a in kernel_resources.ARCHITECTURES}
    assert {(row["kernel"], row["arch"]) for row in committed["rows"]} == expected, REMEDY
    for row in committed["rows"]:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] * row["warps"] * 32 <= 65536, row  # else it cannot be launched


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_compile_spills_nothing_and_matches_the_table(name, committed):
    row = kernel_resources.resources(CASES[name], 90)
    assert row["spill_bytes"] == 0, row
    assert row["registers"] * row["warps"] * 32 <= 65536, row
    if triton.__version__ == committed["triton"]:
        assert row in committed["rows"], f"{row} is not in the table; {REMEDY}"


@pytest.mark.parametrize("name", CASES)
def test_no_atomics_no_local_memory_and_16_byte_reads(name):
    ptx = kernel_resources.compile_case(CASES[name], 90).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert not re.search(r"\b(ld|st)\.local", ptx)
    if name.startswith("sweep"):
        wide = re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)
        chunk, width = (CASES[name].config[k] for k in ("CHUNK", "WIDTH"))
        assert len(wide) >= (width // chunk if CASES[name].config["HELD"] else 2)


def reductions(case) -> set[tuple[str, ...]]:
    """(length, type, layout) of every sum and maximum over a row."""
    ir = kernel_resources.compile_case(case, 90).asm["ttgir"]
    layouts = dict(re.findall(r"^#(\w+) = (#ttg\.blocked<.*)$", ir, re.MULTILINE))
    found = re.findall(r"\}\) : \(tensor<(\d+)x(\w+), #(\w+)>\) -> \w+", ir)
    assert found
    return {(length, kind, layouts[name]) for length, kind, name in found}


@pytest.mark.parametrize("width", [8192, 32768, 65536])
@pytest.mark.parametrize("bias", [None, "fp32"])
@pytest.mark.parametrize("unaligned", [(), ("out",), ("tile_stride", "out_stride")], ids=str)
def test_every_variant_of_a_width_sums_in_the_same_order(width, bias, unaligned):
    """Asking a head for a gradient or statistics must not change a bit of R."""
    sweeps = [case for case in CASES.values() if case.config.get("WIDTH") == width]
    sweeps = [case for case in sweeps if case.pointers["bias"] == bias]
    assert len(sweeps) > 1
    orders = set().union(*(reductions(replace(case, unaligned=unaligned)) for case in sweeps))
    assert len(orders) == 1, orders
    for key in ("num_warps", "CHUNK", "enable_fp_fusion"):
        assert len({case.config[key] for case in sweeps}) == 1, key
    assert not sweeps[0].config["enable_fp_fusion"]


def test_a_spill_would_be_seen():
    """The tool reads spills: fewer registers than a held row takes."""
    case = CASES["sweep_kernel[8192 wide, in place, bias, softcap, statistics]"]
    assert case.config["HELD"]
    crowded = replace(case, config=case.config | {"maxnreg": 40})
    assert kernel_resources.resources(crowded, 90)["spill_bytes"] > 0


@pytest.mark.parametrize("width", [1, 2, 127, 1024, 1025, 8192, 17489, 32768, 32769, 262144])
def test_program_shapes_follow_from_the_width(width):
    """A shape that can be launched, and one order of the sums whatever else is asked for."""
    shapes = [
        launch.sweep_config(width, torch.float32, capped, stats)
        for capped, stats in itertools.product((False, True), repeat=2)
    ]
    assert len({(shape["CHUNK"], shape["num_warps"]) for shape in shapes}) == 1
    for shape in shapes:
        assert shape["num_warps"] in (1, 2, 4, 8, 16, 32)
        assert shape["CHUNK"] == 4 * 32 * shape["num_warps"]  # 16 bytes of fp32 a thread
        assert not shape["HELD"] or width <= 16 * shape["CHUNK"]
    assert not launch.sweep_config(width, torch.float64, False, False)["HELD"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_so():
    assert not launch.available()
    assert "CUDA" in launch.why_unavailable()
