"""``fastpref doctor``: what is installed, which kernels will run and why, and what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fastpref

ENVIRONMENT = {
    "FASTPREF_CACHE": "cached reference log-probs, the demo's files (default ~/.cache/fastpref)",
    "FASTPREF_DEBUG": "1: full range checks on CUDA tensors, tracebacks from the command line",
    "FASTPREF_CUDA": "at build: 1 or 0, CUDA kernels or not (default: if torch and nvcc have CUDA)",
    "FASTPREF_NO_CPP": "at build: 1 compiles nothing",
    "FASTPREF_FORCE_BUILD": "at build: 1 makes a failed compilation fail the installation",
}
"""Every environment variable of its own that the project reads; the README lists the same."""

TRAIN = ("transformers", "accelerate", "datasets", "peft", "rich", "matplotlib")
PACKAGES = ("torch", "triton", *TRAIN, "gguf", "trl", "numpy")


def main(argv: Sequence[str]) -> int:
    """Prints the report; 0, or 1 if something that belongs here is missing."""
    parser = argparse.ArgumentParser(prog="fastpref doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 1 if report["missing"] else 0


def examine() -> dict[str, Any]:
    """The report: ``versions, machine, build, backends, auto, environment, missing``; JSON-safe.

    ``missing`` maps what is not here, and would be of use here, to the command that adds it.
    """
    missing: dict[str, str] = {}
    versions = {"fastpref": fastpref.__version__, "python": platform.python_version()}
    versions |= {package: _version(package) for package in PACKAGES}
    report: dict[str, Any] = {
        "versions": versions,
        "machine": _machine(),
        "build": {},
        "backends": {},
        "auto": [],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "missing": missing,
    }
    if versions["torch"] == "-":
        missing["torch"] = 'pip install "torch>=2.11"'
        return report
    report["machine"] |= _gpus()
    _kernels(report)
    if any(versions[package] == "-" for package in TRAIN):
        names = ", ".join(package for package in TRAIN if versions[package] == "-")
        missing[f"{names} (training)"] = 'pip install "fastpref[train]"'
    return report


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _machine() -> dict[str, Any]:
    compiler = os.environ.get("CXX") or "c++"
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "compiler": _first_line(compiler, "--version"),
        "nvcc": _last_line("nvcc", "--version"),
    }


def _first_line(*command: str) -> str:
    return (_output(*command) or ["-"])[0]


def _last_line(*command: str) -> str:
    return (_output(*command) or ["-"])[-1]


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()


def _gpus() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
        return {"gpu": f"none usable ({build})"}
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    text = [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in found]
    return {"gpu": "; ".join(text)}


def _kernels(report: dict[str, Any]) -> None:
    """Fill in the build, the state of each backend, and what ``auto`` takes."""
    import torch

    from fastpref import backends
    from fastpref.backends import cpp

    report["build"] = cpp.build_info()
    report["backends"] = backends.status()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            name, why = backends.explain(device, dtype)
            row = {"device": device, "dtype": str(dtype).removeprefix("torch."), "backend": name}
            report["auto"].append({**row, "why": why})
    useful = ["cpp", "triton", "cuda"] if "cuda" in devices else ["cpp"]
    for name in useful:
        shipped = importlib.util.find_spec(f"fastpref.backends.{name}") is not None
        if shipped and report["backends"][name] != "ok":
            report["missing"][f"{name} kernels"] = backends.remedy(name)


def render(report: dict[str, Any]) -> str:
    """The report as text for people."""
    build = report["build"] or {"native module": "not built"}
    sections = {
        "versions": report["versions"],
        "machine": report["machine"],
        "build of the native module": build,
        "backends": report["backends"],
        "backend='auto' takes": {
            f"{row['device']} {row['dtype']}": f"{row['backend']:<8} {row['why']}"
            for row in report["auto"]
        },
        "environment": report["environment"],
        "missing, and the command that adds it": report["missing"],
    }
    lines = []
    for title, facts in sections.items():
        lines.append(title)
        width = max((len(name) for name in facts), default=0)
        lines += [f"  {name:<{width}}  {fact}" for name, fact in facts.items()] or ["  nothing"]
    return "\n".join(lines)
