"""The layout: prompts and responses -> rows of tokens without padding between them.

A document is a prompt and the responses to it. With prefix sharing it lies in a row once::

    tokens     p0 p1 p2 | c0 c1 c2 | r0 r1 | next document ...
    document    d  d  d    d  d  d    d  d
    branch      0  0  0    1  1  1    2  2
    position    0  1  2    3  4  5    3  4

so every response continues from the prompt's end and (``masks``) sees the prompt and itself only.
The hidden state at p2 predicts both c0 and r0. Without prefix sharing each prompt + response is a
document of its own. Rows end in pads, to the longest row's length.

Rows are filled first-fit-decreasing, then evened out: what costs is rows x longest row, so with
the number of rows fixed, each document in turn goes to the emptiest row if that ends shorter.
Pure functions of lists of ints: no dataset, model or device; same input, same output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .masks import PAD_DOCUMENT, PROMPT_BRANCH

IGNORE_INDEX = -100
# SDPA with a dense mask computes all T x T scores, so a row of T tokens costs about T * (C + T):
# per layer 24*H*H flops a token in the projections, 4*T*H in attention, C = 6*H. Measured forward +
# backward on CPU: C = 1,500 at H = 256, 2,400 at H = 576. In between serves both.
DENSE_BREAK_EVEN = 2048
_SHORTEST_ROW = 256
BLOCK = 128
"""Side of the blocks of FlexAttention's mask. Rows that end in a whole one come in fewer lengths,
for each of which something may be compiled."""
_SCALES = (1, 1.25, 1.5, 2, 3, 4)


@dataclass(frozen=True)
class Document:
    """A prompt and the responses to it, as token ids.

    Attributes:
        prompt: Token ids; may be empty, and then nothing predicts a response's first token, which
            is laid out but not scored.
        responses: Token ids of each response.
        masks: Per response None, or 0/1 for each of its tokens: 0 = no loss on it.
        first: Place of the first response among an example's responses: not 0 where they answer
            several prompts, each a document of its own.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    masks: Sequence[Sequence[int] | None] | None = None
    first: int = 0


@dataclass(frozen=True)
class PackedRows:
    """Rows of tokens, and where in them each response is predicted.

    Sequences are ordered response-major: the first response of every example in the order given,
    then the second of every example that has one, and so on.

    Attributes:
        input_ids: ``(R, T)`` int64.
        position_ids: ``(R, T)`` int64; restarts at every document, branches continue the prompt.
        document_ids: ``(R, T)`` int32; unique to a document (without prefix sharing, a sequence).
        branch_ids: ``(R, T)`` int32; 0 = prompt, k = the k-th response.
        response_rows: ``(n,)`` int64, index into the flattened ``(R * T)`` of the position whose
            hidden state predicts each response token.
        response_targets: ``(n,)`` int64, the token predicted, or -100 where masked out.
        cu_seqlens: ``(S + 1,)`` int32, where each sequence starts in the two fields above.
        lengths: ``(S,)`` int64, response tokens that count.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    branch_ids: Tensor
    response_rows: Tensor
    response_targets: Tensor
    cu_seqlens: Tensor
    lengths: Tensor


def row_capacity(
    documents: Sequence[int], *, row_tokens: int | None = None, dense_mask: bool = True
) -> int:
    """Most tokens to lay in a row: the one place that decides.

    Args:
        documents: Tokens of each document.
        row_tokens: An explicit choice (the trainer's ``max_tokens_per_batch``); None = by the mask.
        dense_mask: With a dense mask attention costs the square of a row, padding costs a token for
            a token: of a few capacities from the longest document up, the one whose rows cost
            least. With a block mask what is masked is skipped, and one row holds everything.

    Returns:
        The capacity; the longest document at least, since a document is never cut.

    Raises:
        ValueError: ``row_tokens`` is not positive.
    """
    if row_tokens is not None and row_tokens < 1:
        raise ValueError(f"row_tokens must be positive or None, got {row_tokens}")
    longest = max(documents, default=0)
    if row_tokens is not None:
        return max(longest, row_tokens)
    if not dense_mask:
        return max(sum(documents), 1)

    def cost(capacity: int) -> int:
        rows = assign_rows(documents, capacity)
        width = max(sum(documents[i] for i in row) for row in rows)
        return len(rows) * width * (DENSE_BREAK_EVEN + width)

    return min((int(max(longest, _SHORTEST_ROW) * scale) for scale in _SCALES), key=cost)


def assign_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Documents of each row: first-fit-decreasing, evened out over the same number of rows.

    Args:
        lengths: Tokens of each document.
        capacity: Most tokens of a row; a longer document gets a row of its own.

    Returns:
        Indices into ``lengths`` by row, each index once, no row empty. Any two rows of the
        first-fit stage hold more than ``capacity`` together.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    used: list[int] = []
    for i in order:
        fits = (row for row, tokens in enumerate(used) if tokens + lengths[i] <= capacity)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(i)
        used[row] += lengths[i]
    even: list[list[int]] = [[] for _ in rows]
    even_used = [0] * len(rows)
    for i in order:
        row = even_used.index(min(even_used))
        even[row].append(i)
        even_used[row] += lengths[i]
    return even if max(even_used, default=0) < max(used, default=0) else rows


def pack(
    documents: Sequence[Document],
    *,
    row_tokens: int | None = None,
    prefix_sharing: bool = True,
    dense_mask: bool = True,
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
) -> PackedRows:
    """Documents laid out in rows.

    Args:
        documents: At least one, each with at least one response.
        row_tokens: Capacity of a row; None = ``row_capacity`` decides.
        prefix_sharing: Lay a prompt out once for all its responses, instead of once for each.
        dense_mask: What kind of mask the rows are for, dense or by blocks.
        pad_token_id: Token at the end of short rows. Nothing attends it.
        pad_to_multiple_of: Round the rows' length up to a multiple of this; None: to whole blocks
            of a block mask, with a dense one not at all.

    Returns:
        The rows, on CPU.

    Raises:
        ValueError: no documents, a document without responses, a mask whose length is not its
            response's, or an option out of range.
    """
    if pad_to_multiple_of is None:
        pad_to_multiple_of = 1 if dense_mask else BLOCK
    _check(documents, pad_to_multiple_of)
    sequences = [(d, k) for d, doc in enumerate(documents) for k in range(len(doc.responses))]
    sequences.sort(key=lambda place: (documents[place[0]].first + place[1], place[0]))
    if prefix_sharing:
        units = [(d, list(range(len(doc.responses)))) for d, doc in enumerate(documents)]
    else:
        units = [(d, [k]) for d, k in sequences]
    sizes = [
        len(documents[d].prompt) + sum(len(documents[d].responses[k]) for k in branches)
        for d, branches in units
    ]
    capacity = row_capacity(sizes, row_tokens=row_tokens, dense_mask=dense_mask)
    rows = assign_rows(sizes, capacity)
    longest = max(sum(sizes[u] for u in row) for row in rows)
    width = -(-max(longest, 1) // pad_to_multiple_of) * pad_to_multiple_of

    shape = (len(rows), width)
    tokens = np.full(shape, pad_token_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    document_ids = np.full(shape, PAD_DOCUMENT, dtype=np.int32)
    branch_ids = np.full(shape, PROMPT_BRANCH, dtype=np.int32)
    predictors: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    for r, row in enumerate(rows):
        start = 0
        for unit in row:
            d, branches = units[unit]
            document_ids[r, start : start + sizes[unit]] = unit
            prompt = documents[d].prompt
            fork = start + len(prompt)
            tokens[r, start:fork] = prompt
            positions[r, start:fork] = np.arange(len(prompt))
            end = fork
            for k in branches:
                response = documents[d].responses[k]
                begin, end = end, end + len(response)
                tokens[r, begin:end] = response
                positions[r, begin:end] = np.arange(len(prompt), len(prompt) + len(response))
                branch_ids[r, begin:end] = k + 1
                before = np.arange(begin - 1, end - 1)
                before[:1] = fork - 1
                predictors[d, k] = before + r * width
            start = end
    grids = (tokens, positions, document_ids, branch_ids)
    return _gather(documents, sequences, predictors, grids)


def _gather(
    documents: Sequence[Document],
    sequences: Sequence[tuple[int, int]],
    predictors: dict[tuple[int, int], np.ndarray[Any, Any]],
    grids: tuple[np.ndarray[Any, Any], ...],
) -> PackedRows:
    """Response rows and targets in the order of the sequences, everything as tensors."""
    rows, targets = [], []
    for d, k in sequences:
        document = documents[d]
        target = np.asarray(document.responses[k], dtype=np.int64)
        mask = document.masks[k] if document.masks is not None else None
        if mask is not None:
            target = np.where(np.asarray(mask, dtype=bool), target, IGNORE_INDEX)
        scored = slice(0 if len(document.prompt) else 1, None)
        rows.append(predictors[d, k][scored])
        targets.append(target[scored])
    counts = [len(target) for target in targets]
    lengths = [int((target != IGNORE_INDEX).sum()) for target in targets]
    input_ids, position_ids, document_ids, branch_ids = map(torch.from_numpy, grids)
    return PackedRows(
        input_ids=input_ids,
        position_ids=position_ids,
        document_ids=document_ids,
        branch_ids=branch_ids,
        response_rows=torch.from_numpy(np.concatenate(rows)),
        response_targets=torch.from_numpy(np.concatenate(targets)),
        cu_seqlens=torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int64),
    )


def _check(documents: Sequence[Document], pad_to_multiple_of: int) -> None:
    if not documents:
        raise ValueError("nothing to pack: documents is empty")
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    for d, document in enumerate(documents):
        if not document.responses:
            raise ValueError(f"document {d} has no responses")
        masks = document.masks
        if masks is None:
            continue
        expected = [len(response) for response in document.responses]
        given = [n if m is None else len(m) for m, n in zip(masks, expected, strict=False)]
        if given != expected or len(masks) != len(expected):
            raise ValueError(f"document {d}: masks of lengths {given}, responses of {expected}")
