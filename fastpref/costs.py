"""What the op must do and move, kernel by kernel, and the time that a given machine then needs.

Used by ``fastpref bench --explain`` and by ``benchmarks/model.py``. Predictions are kept apart from
measurements: a time computed here is never written to ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastpref.schedule import Plan, plan

SCHEDULES = ("none", "frozen", "trainable", "recompute")
"""No gradient; hidden alone needs one; head too; head too with a memory budget of 0."""

UNITS = {"none": 2, "frozen": 4, "trainable": 6, "recompute": 8}
"""Matrix-product flops of the schedule, in units of N*H*V, where E of all tiles is kept. One
multiply-add is 2 flops."""


@dataclass(frozen=True)
class Head:
    """The head of a model: sizes, and what its configuration does to the logits."""

    hidden_size: int
    vocab_size: int
    softcap: float | None = None


HEADS = {
    "smollm2-135m": Head(576, 49_152),
    "qwen2.5-0.5b": Head(896, 151_936),
    "llama-3.2-1b": Head(2048, 128_256),
    "gemma-2-2b": Head(2304, 256_000, softcap=30.0),
    "llama-3-8b": Head(4096, 128_256),
    "qwen3-8b": Head(4096, 151_936),
    "qwen2.5-32b": Head(5120, 152_064),
    "gemma-3-27b": Head(5376, 262_144),
}
"""Heads of real models, by name."""


@dataclass(frozen=True)
class Machine:
    """A device's stated peaks, and the part of them that is expected."""

    name: str
    bandwidth: float
    """Stated peak, bytes per second."""
    matmul: dict[int, float]
    """Stated dense peak without sparsity, flops per second, by bytes of an operand's element."""
    memory_share: float = 0.90
    """Part of the bandwidth that a plain row kernel reaches."""
    matmul_share: float = 0.73
    """Part of the matmul peak that large vendor GEMMs reach at the board's power limit."""
    launch: float = 3e-6
    """Seconds from one kernel's end to the next one's start."""


MACHINES = {
    "a100": Machine("A100 80GB SXM", 2.039e12, {2: 312e12, 4: 19.5e12}, matmul_share=0.85),
    "h100": Machine("H100 80GB SXM", 3.35e12, {2: 989e12, 4: 67e12}),
    "h200": Machine("H200 141GB SXM", 4.80e12, {2: 989e12, 4: 67e12}),
}


@dataclass(frozen=True)
class Kernel:
    """One launch: what it computes, and the least it moves through device memory."""

    name: str
    backward: bool
    flops: int
    bytes: int

    @property
    def is_gemm(self) -> bool:
        """Whether the launch is a vendor matrix product, and so part of the floor."""
        return self.flops > 0

    def seconds(self, machine: Machine, itemsize: int) -> float:
        """The larger of arithmetic time and memory time, and the launch."""
        moving = self.bytes / (machine.bandwidth * machine.memory_share)
        computing = self.flops / (machine.matmul[itemsize] * machine.matmul_share)
        return max(moving, computing) + machine.launch


def plan_of(
    schedule: str, n: int, head: Head, itemsize: int, device: str, budget: int | None = None
) -> Plan:
    """The plan of a schedule; ``recompute`` is a budget of 0."""
    budget = 0 if schedule == "recompute" else budget
    return plan(n, head.vocab_size, head.hidden_size, itemsize, device, budget)


def kernels(
    schedule: str, n: int, head: Head, itemsize: int, device: str, budget: int | None = None
) -> Iterator[Kernel]:
    """Every launch of the schedule, in order.

    Args:
        schedule: One of :data:`SCHEDULES`.
        n: Rows.
        head: Sizes.
        itemsize: Bytes of an element of hidden and weight; sums are in at least 4 bytes.
        device: ``"cpu"`` or ``"cuda"``.
        budget: As ``memory_budget`` of the op.

    Yields:
        The launches. Each input of a launch is counted as read once and each output as written
        once, so reuse between launches in a cache makes a device faster than predicted.
    """
    p = plan_of(schedule, n, head, itemsize, device, budget)
    h, s, c = head.hidden_size, itemsize, max(itemsize, 4)
    gradient, trained = schedule != "none", schedule in ("trainable", "recompute")
    chunks = [end - start for start, end in p.chunks(n)]
    tiles = [end - start for start, end in p.tiles(head.vocab_size)]

    def logits(rows: int, width: int, backward: bool) -> Kernel:
        # reads hidden and the weight's tile, writes logits
        moved = rows * h * s + width * h * s + rows * width * c
        return Kernel("logits", backward, 2 * rows * width * h, moved)

    for rows in chunks:
        for width in tiles:
            yield logits(rows, width, False)
            # reads logits, writes E where somebody multiplies with it
            yield Kernel("sweep", False, 0, rows * width * (c + (s if gradient else 0)))
            if gradient:  # acc += E @ W: reads E, the tile and acc, writes acc
                moved = rows * width * s + width * h * s + 2 * rows * h * c
                yield Kernel("acc", False, 2 * rows * width * h, moved)
        # reads acc and the targets' rows of the weight, writes dlogp/dhidden
        yield Kernel("combine", False, 0, rows * h * (c + 2 * s) if gradient else rows * 6 * c)
    if not gradient:
        return
    yield Kernel("scale", True, 0, 2 * n * h * s)
    if not trained:
        return
    for t, width in enumerate(tiles):
        for i, rows in enumerate(chunks):
            if t >= p.kept_tiles:
                yield logits(rows, width, True)
                yield Kernel("sweep", True, 0, rows * width * (c + s))
            yield Kernel("scale", True, 0, 2 * rows * h * s)
            # reads E and the scaled rows, writes the slice of dW, and reads it after the first
            moved = rows * width * s + rows * h * s + width * h * c * (2 if i else 1)
            yield Kernel("dweight", True, 2 * rows * width * h, moved)
            yield Kernel("targets", True, 0, rows * 8 + rows * h * (s + 2 * c) // len(tiles))
        if c != s:
            yield Kernel("round", True, 0, width * h * (c + s))


@dataclass(frozen=True)
class Prediction:
    """Milliseconds that the model gives."""

    forward: float
    backward: float
    gemms: float
    """The vendor GEMMs alone: the floor."""

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def floor_ratio(self) -> float:
        """Total over the floor."""
        return self.total / self.gemms


def predict(
    machine: Machine, schedule: str, n: int, head: Head, itemsize: int, budget: int | None = None
) -> Prediction:
    """The time of a schedule on a GPU: launches one after the other, none overlapping."""
    spent = [0.0, 0.0]
    gemms = 0.0
    for kernel in kernels(schedule, n, head, itemsize, "cuda", budget):
        milliseconds = 1e3 * kernel.seconds(machine, itemsize)
        spent[kernel.backward] += milliseconds
        gemms += milliseconds if kernel.is_gemm else 0.0
    return Prediction(spent[0], spent[1], gemms)


def scratch_bytes(p: Plan, n: int, head: Head, itemsize: int, device: str) -> tuple[int, int]:
    """Bytes of a plan's working tiles, and of the E that a trainable head keeps."""
    c = max(itemsize, 4)
    rows, width = min(p.rows, n), min(p.tile, head.vocab_size)
    low = itemsize if itemsize < c else 0
    converted = c * width * head.hidden_size if device == "cpu" and low else 0
    working = rows * width * (c + low) + c * (rows + width) * head.hidden_size + converted
    kept = n * min(p.kept_tiles * p.tile, head.vocab_size) * itemsize
    return working, kept


def explain(
    schedule: str, n: int, head: Head, itemsize: int, device: str, budget: int | None
) -> str:
    """A schedule in words: tiles, what is kept, scratch, work, and predicted times on GPUs."""
    p = plan_of(schedule, n, head, itemsize, device, budget)
    work = list(kernels(schedule, n, head, itemsize, device, budget))
    flops, moved = sum(k.flops for k in work), sum(k.bytes for k in work)
    working, kept = scratch_bytes(p, n, head, itemsize, device)
    trained = schedule in ("trainable", "recompute")
    unit = n * head.hidden_size * head.vocab_size
    lines = [
        f"{schedule}: {len(p.chunks(n))} chunks of {p.rows} rows x {p.num_tiles} tiles of {p.tile}",
        f"  work      {flops / 1e12:.3f} TFLOP in GEMMs ({flops / max(unit, 1):.2f} N*H*V), "
        f"{moved / 1e9:.2f} GB moved, {len(work)} launches",
        f"  scratch   {working / 2**20:.0f} MiB",
    ]
    if trained:
        lines.append(
            f"  kept E    {p.kept_tiles} of {p.num_tiles} tiles, {kept / 2**20:.0f} MiB; "
            f"{p.num_tiles - p.kept_tiles} recomputed"
        )
    if device != "cuda":
        return "\n".join(lines)
    for machine in MACHINES.values():
        t = predict(machine, schedule, n, head, itemsize, budget)
        lines.append(
            f"  predicted {machine.name}: {t.forward:.2f} + {t.backward:.2f} = {t.total:.2f} ms, "
            f"{t.floor_ratio:.3f}x its GEMMs"
        )
    return "\n".join(lines)
