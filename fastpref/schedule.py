"""The one place that decides: tile shapes, what is kept, what is recomputed.

A plan depends on shapes, dtype, device type and budget alone, never on which input needs a
gradient, so that a policy and its reference are rounded alike. Nothing here touches a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
DEFAULT_BUDGET = {"cpu": 256 * MIB, "cuda": 1024 * MIB}


@dataclass(frozen=True)
class Plan:
    """How one call walks the ``[num_rows, vocab]`` plane.

    Rows are cut into chunks, the vocabulary into tiles; the logits of one chunk x one tile exist at
    a time.
    """

    rows: int
    """Rows of a chunk."""
    tile: int
    """Vocabulary entries of a tile."""
    num_tiles: int
    """Tiles that cover the vocabulary."""
    kept_tiles: int
    """Tiles, from the first, whose E a trainable head keeps for its backward; the others are
    recomputed."""

    def tiles(self, vocab_size: int) -> list[tuple[int, int]]:
        """(start, end) of every vocabulary tile."""
        return [(s, min(s + self.tile, vocab_size)) for s in range(0, vocab_size, self.tile)]

    def chunks(self, num_rows: int) -> list[tuple[int, int]]:
        """(start, end) of every chunk of rows."""
        return [(s, min(s + self.rows, num_rows)) for s in range(0, num_rows, self.rows)]


# Measured on CPU: tiles of 1,024 to 4,096 are equal, wider ones leave the cache. On a GPU a 32k
# fp32 row fits the registers of one thread block, and wide tiles keep the vendor matmul at full
# rate.
_TILE = {"cpu": 2048, "cuda": 32768}
_SMALL_TILE = {"cpu": 1024, "cuda": 8192}
_ROWS = {"cpu": 4096, "cuda": 4096}
# The smallest chunk that still amortises one read of the weight tile.
_SMALL_ROWS = 2048
# What a budget below that may take all the same. Wide heads get smaller chunks for it.
_LEAST = {"cpu": 48 * MIB, "cuda": 256 * MIB}


def plan(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    itemsize: int,
    device_type: str,
    memory_budget: int | None,
) -> Plan:
    """Choose the tile shape and how much of E fits in ``memory_budget`` bytes.

    Args:
        num_rows: Rows to project.
        vocab_size: Rows of the head's weight.
        hidden_size: Columns of the head's weight.
        itemsize: Bytes of an element of the inputs.
        device_type: ``"cpu"`` or ``"cuda"``; others follow ``"cuda"``.
        memory_budget: Bytes for logits tiles and kept E; ``None`` takes the device's default; 0
            takes the smallest tiles and recomputes everything.

    Returns:
        The plan. Scratch (a tile of logits in fp32, its E in the inputs' dtype, converted operands)
        is counted first; E is kept in what remains.
    """
    device = "cpu" if device_type == "cpu" else "cuda"
    budget = DEFAULT_BUDGET[device] if memory_budget is None else memory_budget
    compute = max(itemsize, 4)
    tile, rows = min(_TILE[device], vocab_size), min(_ROWS[device], num_rows)

    def scratch() -> int:
        low = itemsize if itemsize < compute else 0
        convert = (compute * (tile + rows) * hidden_size) if device == "cpu" and low else 0
        return rows * tile * (compute + low) + convert + compute * (rows + tile) * hidden_size

    while scratch() > budget // 2 and (rows > _SMALL_ROWS or tile > _SMALL_TILE[device]):
        if tile > _SMALL_TILE[device]:
            tile = max(_SMALL_TILE[device], tile // 2)
        else:
            rows = max(_SMALL_ROWS, rows // 2)
    while scratch() > max(_LEAST[device], budget // 2) and rows > 256:
        rows //= 2
    num_tiles = -(-vocab_size // tile) if vocab_size else 0
    tile_bytes = num_rows * tile * itemsize
    kept = min(num_tiles, max(0, budget - scratch()) // tile_bytes) if tile_bytes else 0
    return Plan(rows=max(rows, 1), tile=max(tile, 1), num_tiles=num_tiles, kept_tiles=kept)
