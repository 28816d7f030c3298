"""Where a measured number comes from: machine, versions and commit, as every row says."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def device_name(clock: str) -> str:
    """The device as rows name it; it says so where the time is CPU time.

    Args:
        clock: ``"device"`` (CUDA), ``"wall"`` or ``"cpu"``.
    """
    if clock == "device":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    isa = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    name = f"{model}, {isa}, {threads} thread{'s' * (threads > 1)}"
    return f"{name}, CPU time" if clock == "cpu" else name


def versions(device: str, *packages: str) -> dict[str, str]:
    """Versions of Python, torch, fastpref, Triton and of ``packages`` that are installed; on
    ``"cuda"`` also of CUDA and the driver."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in filter(None, ("fastpref", "triton", *packages)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        found["cuda"] = torch.version.cuda or "-"
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = _output(asked, Path.cwd()) or "-"
    return found


def _output(command: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checkout's commit, with ``-dirty`` if it was edited since, measured rows aside;
    ``unknown`` outside a checkout."""
    here = Path(__file__).parent
    name = _output(["git", "rev-parse", "--short=12", "HEAD"], here)
    edited = ["git", "status", "--porcelain", "--untracked-files=no", "--"]
    dirty = _output([*edited, ":/", ":(top,exclude)benchmarks/results"], here)
    return f"{name}{'-dirty' if dirty else ''}" if name else "unknown"
