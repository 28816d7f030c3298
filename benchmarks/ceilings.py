"""Measures a GPU's two ceilings: a large device-to-device copy and a large bf16 matrix product.

python benchmarks/ceilings.py [FILE.json]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

COPY_BYTES = 4 << 30
SIDE = 8192


def milliseconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median time of ``run`` by device events, after three runs that do not count."""
    times = []
    for i in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    """Print, and write, bytes per second (read plus written) and flops per second."""
    source, target = torch.randint(256, (2, COPY_BYTES), dtype=torch.uint8, device="cuda")
    copy = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    wide = milliseconds(lambda: torch.mm(a, b, out_dtype=torch.float32))
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": 2 * COPY_BYTES / copy * 1e3,
        "bf16_matmul_flops_per_second": 2 * SIDE**3 / product * 1e3,
        "bf16_matmul_fp32_out_flops_per_second": 2 * SIDE**3 / wide * 1e3,
    }
    text = json.dumps(found, indent=2)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
