"""Invariants of the layout and of the masks, over arbitrary documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import (
    Document,
    dense_mask,
    mask_mod,
    pack,
    row_capacity,
    to_attention_mask,
)
from fastpref.data.packing import IGNORE_INDEX, assign_rows

TOKENS = st.integers(1, 9)


@st.composite
def a_document(draw):
    prompt = draw(st.lists(TOKENS, max_size=12))
    responses = draw(st.lists(st.lists(TOKENS, max_size=8), min_size=1, max_size=4))
    masks = [
        draw(st.none() | st.lists(st.booleans(), min_size=len(r), max_size=len(r)))
        for r in responses
    ]
    return Document(prompt, responses, draw(st.sampled_from([None, masks])))


DOCUMENTS = st.lists(a_document(), min_size=1, max_size=8)
OPTIONS = st.fixed_dictionaries(
    {
        "row_tokens": st.none() | st.integers(1, 60),
        "prefix_sharing": st.booleans(),
        "pad_to_multiple_of": st.sampled_from([1, 8]),
    }
)


def response_major(documents):
    most = max(len(document.responses) for document in documents)
    return [
        (document, k) for k in range(most) for document in documents if k < len(document.responses)
    ]


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, OPTIONS)
def test_every_sequence_can_be_read_back(documents, options):
    """Walk each sequence back through the grid: its tokens, positions, branch, targets, order."""
    rows = pack(documents, pad_token_id=77, **options)
    width = rows.input_ids.shape[1]
    grid = [
        getattr(rows, name).flatten().tolist()
        for name in ("input_ids", "position_ids", "document_ids", "branch_ids")
    ]
    tokens, positions, owners, branches = grid
    bounds = rows.cu_seqlens.tolist()
    sequences = response_major(documents)
    assert len(bounds) == len(sequences) + 1
    assert bounds[-1] == len(rows.response_rows) == len(rows.response_targets)
    for s, (document, k) in enumerate(sequences):
        prompt, response = document.prompt, document.responses[k]
        scored = response[0 if prompt else 1 :]
        mask = document.masks[k] if document.masks and document.masks[k] is not None else None
        mask = [True] * len(response) if mask is None else mask
        kept = mask[0 if prompt else 1 :]
        targets = rows.response_targets[bounds[s] : bounds[s + 1]].tolist()
        assert targets == [t if m else IGNORE_INDEX for t, m in zip(scored, kept, strict=True)]
        assert int(rows.lengths[s]) == sum(kept)
        at = rows.response_rows[bounds[s] : bounds[s + 1]].tolist()
        assert [positions[i] for i in at] == [max(len(prompt), 1) - 1 + j for j in range(len(at))]
        context = [*prompt, *response]
        assert [tokens[i] for i in at] == context[max(len(prompt), 1) - 1 :][: len(at)]
        assert len({owners[i] for i in at}) <= 1
        assert len({i // width for i in at}) <= 1
        allowed = {0, k + 1} if prompt else {k + 1}
        assert {branches[i] for i in at} <= allowed


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, OPTIONS)
def test_rows_hold_every_token_once_and_little_else(documents, options):
    rows = pack(documents, pad_token_id=77, **options)
    real = rows.document_ids >= 0
    assert torch.equal(real, rows.input_ids != 77)
    shared = options["prefix_sharing"]
    expected = sorted(
        token
        for document in documents
        for token in [
            *list(document.prompt) * (1 if shared else len(document.responses)),
            *(t for response in document.responses for t in response),
        ]
    )
    assert sorted(rows.input_ids[real].tolist()) == expected
    # pads only at the tail, and the longest row is full up to the rounding
    assert bool((real[:, :-1] >= real[:, 1:]).all())
    counts = real.sum(1)
    width = rows.input_ids.shape[1]
    assert width % options["pad_to_multiple_of"] == 0
    assert width - max(int(counts.max()), 1) < options["pad_to_multiple_of"]
    sizes = torch.bincount(rows.document_ids[real].long()) if bool(real.any()) else torch.zeros(1)
    capacity = row_capacity([int(n) for n in sizes], row_tokens=options["row_tokens"])
    assert int(counts.max()) <= capacity
    # no half-empty rows: all but one could not have been merged
    assert len(counts) == 1 or 2 * int(counts.sum()) > len(counts) * capacity
    assert bool((rows.position_ids[~real] == 0).all())


def slow_mask(rows):
    """The rule, token by token, from what the tokens are and not from how the mask is built."""
    height, width = rows.input_ids.shape
    mask = torch.zeros(height, 1, width, width, dtype=torch.bool)
    for r in range(height):
        documents, branches = rows.document_ids[r].tolist(), rows.branch_ids[r].tolist()
        for q in range(width):
            for k in range(q + 1):
                same = documents[q] == documents[k] >= 0 and branches[k] in (0, branches[q])
                mask[r, 0, q, k] = same or q == k
    return mask


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, OPTIONS)
def test_dense_mask(documents, options):
    rows = pack(documents[:3], **options)
    mask = dense_mask(rows.document_ids, rows.branch_ids)
    assert torch.equal(mask, slow_mask(rows))
    # what a query sees is exactly its own sequence up to itself: as many keys as its position + 1,
    # and a pad itself, since a query without a key is NaN in a softmax
    assert torch.equal(mask.sum(-1)[:, 0], rows.position_ids + 1)


def test_flex_attention_sees_the_same_mask():
    from torch.nn.attention.flex_attention import create_mask

    rows = pack([Document([1, 2, 3], [[4, 5], [6]]), Document([7], [[8], [9, 9]])], row_tokens=12)
    height, width = rows.input_ids.shape
    rule = mask_mod(rows.document_ids, rows.branch_ids)
    assert torch.equal(
        create_mask(rule, height, 1, width, width, device="cpu"),
        dense_mask(rows.document_ids, rows.branch_ids),
    )


def test_a_layout_by_hand():
    rows = pack([Document([1, 2], [[3, 4, 5], [6, 7]])], pad_to_multiple_of=8, pad_token_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert rows.branch_ids.tolist() == [[0, 0, 1, 1, 1, 2, 2, 0]]
    assert rows.document_ids.tolist() == [[0, 0, 0, 0, 0, 0, 0, -1]]
    assert rows.response_rows.tolist() == [1, 2, 3, 1, 5]
    assert rows.response_targets.tolist() == [3, 4, 5, 6, 7]
    assert rows.cu_seqlens.tolist() == [0, 3, 5]
    dtypes = (rows.input_ids.dtype, rows.response_rows.dtype, rows.cu_seqlens.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_assign_rows(lengths, capacity):
    rows = assign_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(rows)
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= max(capacity, *lengths)
    fitting = capacity >= max(lengths)
    assert not fitting or len(rows) == 1 or 2 * sum(lengths) > len(rows) * capacity
    assert rows == assign_rows(list(lengths), capacity)


def test_rows_are_filled():
    assert len(assign_rows([3, 3], 6)) == 1
    assert len(assign_rows([4, 4, 4, 6, 6, 6], 10)) == 3, "largest first"


def test_rows_are_evened_out():
    """Eleven documents of 100 in rows of 1024: 600 + 500 computes less than 1000 + 100."""
    rows = assign_rows([100] * 11, 1024)
    assert sorted(len(row) for row in rows) == [5, 6]


def test_row_capacity():
    assert row_capacity([10, 20]) == 256
    assert row_capacity([3000, 2900]) == 3000, "a row of two would waste more on attention"
    assert row_capacity([300] + [160] * 4) > 320, "two to a row, not four rows half empty"
    assert row_capacity([100] * 1000) == 256, "longer rows would save no pads"
    assert row_capacity([10, 20], dense_mask=False) == 30
    assert row_capacity([10, 20], row_tokens=25, dense_mask=False) == 25
    assert row_capacity([10, 20], row_tokens=5) == 20
    with pytest.raises(ValueError, match="row_tokens must be positive"):
        row_capacity([1], row_tokens=0)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "documents is empty"),
        ([Document([1], [])], {}, "document 0 has no responses"),
        ([Document([1], [[2]], [[1, 1]])], {}, "masks of lengths"),
        ([Document([1], [[2], [3]], [None])], {}, "masks of lengths"),
        ([Document([1], [[2]])], {"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ],
)
def test_refusals(documents, options, message):
    with pytest.raises(ValueError, match=message):
        pack(documents, **options)


def test_mask_arguments():
    rows = pack([Document([1], [[2]])])
    mask = dense_mask(rows.document_ids, rows.branch_ids)
    assert to_attention_mask(mask, "sdpa", torch.bfloat16) is mask
    added = to_attention_mask(mask, "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, mask)
    with pytest.raises(ValueError, match="flash_attention_2"):
        to_attention_mask(mask, "flash_attention_2", torch.bfloat16)
