"""Registers, spills and shared memory of every Triton kernel, compiled here for GPUs that are not.

    python benchmarks/kernel_resources.py            # print the table
    python benchmarks/kernel_resources.py --write    # and write it to results/triton_resources.json

No GPU is needed: Triton compiles to machine code for a named architecture, and ``cuobjdump`` (both
tools come inside the Triton wheel) reads what that code uses. A row is a kernel in one variant, at
the program shape that ``fastpref.backends.triton`` launches it with.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.backends import triton as launch
from fastpref.kernels import combine, kl, rows, segments, sweep

RESULTS = Path(__file__).parent / "results" / "triton_resources.json"
COMMAND = "python benchmarks/kernel_resources.py --write"
ARCHITECTURES = (80, 90, 100)
HIDDEN = 4096


@dataclass(frozen=True)
class Case:
    """A kernel in one variant."""

    kernel: Any
    variant: str
    pointers: dict[str, str | None]
    """Element type of each pointer argument; None where the argument is None."""
    config: dict[str, Any]
    """Compile-time arguments, and ``num_warps``."""
    unaligned: tuple[str, ...] = ()
    """Pointers and strides that are not multiples of 16."""

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.kernel.fn.__name__}[{self.variant}]"


def cases() -> Iterator[Case]:
    """Every kernel: the variants that the schedules launch, and the heaviest."""
    hidden = launch.hidden_config(HIDDEN) | {"HIDDEN": HIDDEN}
    state = {"tile": "fp32", "state": "fp32", "targets": "i64"}
    for width in (8192, 16384, 32768, 29952, 65536):
        for variant, out, bias, capped, stats in (
            ("no gradient", None, False, False, False),
            ("bf16 out", "bf16", False, False, False),
            ("bf16 out, statistics", "bf16", False, False, True),
            ("bf16 out, bias, softcap", "bf16", True, True, False),
            ("in place, bias, softcap, statistics", "fp32", True, True, True),
        ):
            acc = offset = None if out is None else "fp32"
            yield Case(
                sweep.sweep_kernel,
                f"{width} wide, {variant}",
                state
                | {"out": out, "offset": offset, "acc": acc, "bias": "fp32" if bias else None},
                launch.sweep_config(width, torch.float32, capped, stats)
                | {"WIDTH": width, "HIDDEN": HIDDEN if acc else 0}
                | {"CAPPED": capped, "WITH_STATS": stats},
            )
    done = {name: "fp32" for name in ("state", "logp", "q", "coef")} | {"targets": "i64"}
    yield Case(
        combine.combine_kernel,
        "no gradient",
        done | {"acc": None, "weight": "bf16", "hidden_grad": None, "stats": None},
        hidden | {"CAPPED": False},
    )
    yield Case(
        combine.combine_kernel,
        "bf16 gradient, softcap, statistics",
        done | {"acc": "fp32", "weight": "bf16", "hidden_grad": "bf16", "stats": "fp32"},
        hidden | {"CAPPED": True},
    )
    for variant, out, bias, capped in (
        ("no gradient", None, None, False),
        ("bf16 gradient", "bf16", None, False),
        ("in place, bias, softcap", "fp32", "fp32", True),
    ):
        pointers = dict.fromkeys(("tile", "ref_tile", "state", "ref_state", "kl"), "fp32")
        yield Case(
            kl.kl_tile_kernel,
            variant,
            pointers | {"out": out, "bias": bias, "ref_bias": bias},
            launch.kl_config(128_256) | {"WIDTH": 128_256, "CAPPED": capped, "REF_CAPPED": capped},
        )
    yield Case(
        rows.scale_rows_kernel, "bf16", {"out": "bf16", "x": "bf16", "factor": "fp32"}, hidden
    )
    yield Case(
        rows.add_target_rows_kernel,
        "bf16 into fp32",
        {"out": "fp32", "x": "bf16", "sorted_targets": "i64", "order": "i64", "factor": "fp32"},
        hidden | {"BLOCK_R": launch.RUN_BLOCK},
    )
    tokens = launch.SEGMENT_CONFIG
    packed = {"cu_seqlens": "i32", "out": "fp32"}
    yield Case(segments.segment_sum_kernel, "fp32", packed | {"values": "fp32"}, tokens)
    yield Case(segments.segment_sum_backward_kernel, "fp32", packed | {"grad": "fp32"}, tokens)
    packed |= {"pairs": "i64"}
    margins = packed | {"logps": "fp32", "ref_logps": "fp32"}
    yield Case(segments.pair_margins_kernel, "fp32", margins, tokens)
    yield Case(segments.pair_margins_backward_kernel, "fp32", packed | {"grad": "fp32"}, tokens)


def compile_case(case: Case, arch: int) -> Any:
    """The kernel's compiled form for compute capability ``arch / 10``."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, p in enumerate(case.kernel.params):
        if p.is_constexpr or (p.name in case.pointers and case.pointers[p.name] is None):
            signature[p.name] = "constexpr"
            constants[(i,)] = case.config.get(p.name) if p.is_constexpr else None
            continue
        signature[p.name] = (
            f"*{case.pointers[p.name]}" if p.name in case.pointers else p.annotation_type or "i32"
        )
        fixed = p.do_not_specialize or p.do_not_specialize_on_alignment
        multiple = p.name in case.pointers or p.name.endswith("_stride")
        if multiple and not fixed and p.name not in case.unaligned:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={k: v for k, v in case.config.items() if k in ("num_warps", *launch.LEAN)},
    )


def resources(case: Case, arch: int) -> dict[str, Any]:
    """One row of the table. ``spill_bytes`` is what a thread keeps in local memory."""
    compiled = compile_case(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "kernel": case.name,
        "arch": f"sm_{arch}",
        "warps": case.config["num_warps"],
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
    }


def table(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, Any]:
    """The whole table, with what made it."""
    return {
        "command": COMMAND,
        "triton": triton.__version__,
        "rows": [resources(case, arch) for case in cases() for arch in architectures],
    }


def main() -> None:
    """Print the table; with ``--write``, commit it to ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="80, 90, 100")
    args = parser.parse_args()
    found = table(tuple(args.arch))
    for row in found["rows"]:
        print(
            f"{row['kernel']:62} {row['arch']:7} {row['warps']:3} warps {row['registers']:4} "
            f"registers {row['spill_bytes']:4} B spilled {row['shared_bytes']:6} B shared"
        )
    if args.write:
        rows = ",\n  ".join(json.dumps(row) for row in found.pop("rows"))
        head = json.dumps(found, indent=1).removesuffix("\n}")
        RESULTS.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
