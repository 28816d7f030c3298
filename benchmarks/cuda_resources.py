"""Registers, spills and shared memory of every CUDA kernel, compiled here for GPUs that are not.

    python benchmarks/cuda_resources.py            # print the table
    python benchmarks/cuda_resources.py --write    # and write it to results/cuda_resources.json

No GPU is needed: ``nvcc`` compiles ``csrc/cuda/*.cu`` against the headers of the installed torch,
whichever build that is, with the flags of ``setup.py``, and its assembler says what each kernel
uses.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
RESULTS = Path(__file__).parent / "results" / "cuda_resources.json"
COMMAND = "python benchmarks/cuda_resources.py --write"
ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc")
TYPES = {"f": "float", "d": "double"}


def release() -> str:
    """Version of the compiler, such as ``13.0.88``."""
    text = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"V([\d.]+)", text.stdout)[1]


def compile_source(source: Path, arch: int) -> str:
    """What the compiler says when it builds one file for compute capability ``arch / 10``.

    Raises:
        RuntimeError: it does not compile.
    """
    setup = (ROOT / "setup.py").read_text()
    target = re.search(r'^TORCH_TARGET = "(\w+)"', setup, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(str(NVCC), "-c", source, "-o", f"{folder}/object.o"),
                *("-std=c++20", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-Wall,-Wextra"),
                f"-gencode=arch=compute_{arch},code=sm_{arch}",
                *("-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={target}", *COMMON_NVCC_FLAGS),
                *(f"-I{path}" for path in include_paths()),
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr}")
    return done.stdout + done.stderr


def kernel_name(mangled: str) -> str:
    """``sweep_kernel<float, false, true>`` of its symbol."""
    name, dtype, switches = re.search(
        r"(?<=\d)([a-z_]+_kernel)I([fd])((?:Lb[01]E)*)", mangled
    ).groups()
    flags = ["true" if bit == "1" else "false" for bit in re.findall(r"Lb([01])E", switches)]
    return f"{name}<{', '.join([TYPES[dtype], *flags])}>"


def resources(source: Path, arch: int) -> list[dict[str, Any]]:
    """A row for every kernel of a file. ``spill_bytes`` is what a thread keeps in local memory,
    ``shared_bytes`` what a block has besides what its launch asks for."""
    text = compile_source(source, arch)
    if "warning" in text:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{text}")
    rows = []
    for part in text.split("Compiling entry function '")[1:]:
        numbers = {
            key: sum(int(n) for n in re.findall(rf"(\d+) {words}", part))
            for key, words in (
                ("registers", "registers"),
                ("spill_bytes", "bytes stack frame"),
                ("shared_bytes", "bytes smem"),
            )
        }
        name = kernel_name(part.split("'")[0])
        rows.append({"kernel": name, "source": source.name, "arch": f"sm_{arch}", **numbers})
    return sorted(rows, key=lambda row: row["kernel"])


def main() -> None:
    """Print the table; with ``--write``, commit it to ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="80, 90, 100")
    args = parser.parse_args()
    rows = [row for arch in args.arch for source in SOURCES for row in resources(source, arch)]
    for row in rows:
        print(
            f"{row['kernel']:40} {row['arch']:7} {row['registers']:4} registers "
            f"{row['spill_bytes']:4} B spilled {row['shared_bytes']:6} B shared"
        )
    if args.write:
        RESULTS.write_text(
            json.dumps({"command": COMMAND, "nvcc": release(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
