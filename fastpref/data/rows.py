"""One batch of dataset rows -> token ids: read, render, tokenise, truncate, flag. No dataset here.

The boundary. The prompt is tokenised alone, as at inference, and with each response. The prompt is
what all of these begin with; where tokens merge across the boundary, or a template renders the
prompt otherwise alone, the rest of prompt + response goes to the response, so that prompt +
response is always what the tokenizer makes of the whole. Such rows are flagged.

Truncation. First the prompt to its last ``max_prompt_length`` tokens and each response to its first
``max_completion_length``. Then, to ``max_length``: ``keep_start`` cuts responses at their end, and
drops rows whose prompt alone is that long; ``keep_end`` cuts the prompt at its start, by the same
amount for every response of the row, since they answer one prompt, and leaves at least one token of
it; then responses at their start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import formats
from .formats import Layout
from .report import DROPS, BadRow, Issue
from .turns import Spans, assistant_spans, mask_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fastpref.data")
ISSUES = "_issues"
NO_ISSUE = Issue(0)


@dataclass(frozen=True)
class Limits:
    """How long prompts and responses may be, in tokens, and their ids; None = no limit.

    Attributes:
        max_length: Most tokens of prompt + response.
        truncation_mode: ``"keep_start"`` or ``"keep_end"``; the module's text says how each cuts.
        max_prompt_length: Most tokens of the prompt, cut at its start.
        max_completion_length: Most tokens of a response, cut at its end.
        vocab_size: Every token id is below it.
        whole: Drop a row that would be cut.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    vocab_size: int | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an option out of range."""
        mode = self.truncation_mode
        if mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end', got {mode!r}")
        least = {"max_length": 2, "max_prompt_length": 1, "max_completion_length": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, or None, got {value}")

    def cuts(self, prompt: int, responses: Sequence[int]) -> tuple[slice, list[slice]]:
        """What to keep of a prompt and its responses, given their numbers of tokens.

        Args:
            prompt: Tokens of the prompt.
            responses: Tokens of each response.

        Returns:
            The slice of the prompt, and one for each response. Under ``"keep_start"`` a prompt
            that fills ``max_length`` leaves empty responses.
        """
        start = max(0, prompt - (self.max_prompt_length or prompt))
        kept = [min(length, self.max_completion_length or length) for length in responses]
        if self.max_length is None:
            return slice(start, prompt), [slice(0, length) for length in kept]
        if self.truncation_mode == "keep_start":
            room = max(0, self.max_length - (prompt - start))
            return slice(start, prompt), [slice(0, min(length, room)) for length in kept]
        start = max(start, prompt - max(1, self.max_length - max(kept)))
        room = self.max_length - (prompt - start)
        return slice(start, prompt), [slice(max(0, length - room), length) for length in kept]


@dataclass
class Row:
    """Token ids of one example, its flags, and the texts they come from while not yet tokenised."""

    issues: Issue = NO_ISSUE
    prompt: Sequence[int] = ()
    responses: Sequence[Sequence[int]] = ()
    masks: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    spans: Sequence[Spans] = ()
    conversational: bool = False


def normalise(columns: Mapping[str, list[Any]], layout: Layout) -> list[dict[str, Any]]:
    """The rows of a batch under canonical column names, unpaired where the layout says so.

    Args:
        columns: Columns of equal length.
        layout: What they hold.

    Returns:
        One dict per row.
    """
    renames = formats.canonical_names(columns)
    columns = {renames.get(name, name): values for name, values in columns.items()}
    if layout.unpair:
        if not layout.tokenized:
            explicit = [formats.extract_prompt(row) for row in _rows(columns)]
            columns = {
                name: [row.get(name) for row in explicit] for name in {**columns, "prompt": 0}
            }
        columns = formats.unpair_batch(columns)
    if layout.kind == "group":
        columns = formats.expand_groups(columns, len(layout.responses))
    return _rows(columns)


def tokenize_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    limits: Limits,
) -> dict[str, list[Any]]:
    """Token columns of a batch, with the flags of each row; a dropped row keeps its place.

    Args:
        batch: Columns of equal length.
        indices: Index of each row, which becomes ``example_ids`` unless there is such a column.
        tokenizer: With a chat template if the rows are conversational.
        layout: What the columns hold.
        limits: Where to truncate.

    Returns:
        The output columns of ``tokenize_dataset`` and ``ISSUES``, the bits of ``Issue``. Lists of
        a dropped row are empty: it is only there to be counted.

    Raises:
        ValueError: the tokenizer lacks the EOS or the chat template that the rows need, or a token
            id is outside the vocabulary.
    """
    sources = normalise({"example_ids": indices, **batch}, layout)
    read = _read_ids if layout.tokenized else _read_text
    rows = [read(source, tokenizer, layout) for source in sources]
    for conversational in (False, True):
        some = [r for r in rows if r.texts and r.conversational == conversational]
        _encode(some, tokenizer, layout.assistant_only)
    for row, source in zip(rows, sources, strict=True):
        if not row.issues & DROPS:
            absent = len(layout.responses) - len(row.responses)
            row.responses = [*row.responses, *([] for _ in range(absent))]
            row.masks = [*row.masks, *([] for _ in layout.masks[len(row.masks) :])]
            _truncate(row, layout, limits)
            _check(row, source, layout)
            if limits.vocab_size is not None:
                _check_ids(row, source, layout, limits.vocab_size)
    return _columns(rows, sources, layout)


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_text(
    source: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> Row:
    """Texts to tokenise: the prompt alone, then prompt + response for each response."""
    try:
        names = list(layout.responses)
        while layout.kind == "group" and names and source[names[-1]] is None:
            names.pop()
        if layout.kind == "group" and len(names) < 2:
            raise BadRow(Issue.BAD_GROUP)
        prompt, responses = formats.read_example(source, names)
        if isinstance(prompt, str):
            eos = tokenizer.eos_token
            if eos is None:
                raise ValueError(
                    "the tokenizer has no eos_token, so a plain-text response would have no end: "
                    "set tokenizer.eos_token (conversational data does not need one)"
                )
            ended = [text if text.endswith(eos) else text + eos for text in responses]
            texts = [prompt, *(prompt + text for text in ended)]
            return Row(texts=texts, spans=[[(0, len(text))] for text in texts[1:]])
        if tokenizer.chat_template is None:
            raise ValueError(
                "the data is conversational but the tokenizer has no chat_template: set "
                "tokenizer.chat_template, or use the tokenizer of the chat model"
            )
        arguments = formats.template_arguments(source)

        def render(messages: formats.Messages, ask: bool) -> str:
            return _render(tokenizer, messages, add_generation_prompt=ask, **arguments)

        texts = [render(prompt, True), *(render(prompt + text, False) for text in responses)]
        turns = responses if layout.assistant_only else ()
        spans = [assistant_spans(render, prompt, response) for response in turns]
        return Row(texts=texts, spans=spans, conversational=True)
    except BadRow as error:
        logger.debug("row %s dropped: %s", source["example_ids"], error)
        return Row(error.issue)


def _render(tokenizer: PreTrainedTokenizerBase, messages: formats.Messages, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program; whatever it raises, the row is to blame
        raise BadRow(Issue.TEMPLATE_ERROR, f"chat template: {error}") from error


def _encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, masked: bool) -> None:
    """Replace the texts of rows of one kind by token ids, split at the boundary; ``masked``: with a
    mask of the spans that count."""
    if not rows:
        return
    encoded = tokenizer(
        [text for row in rows for text in row.texts],
        add_special_tokens=not rows[0].conversational,
        return_attention_mask=False,
        return_offsets_mapping=masked,
        verbose=False,
    )
    ids, offsets = iter(encoded["input_ids"]), iter(encoded.get("offset_mapping", ()))
    for row in rows:
        alone, *whole = (_single_bos(next(ids), tokenizer, row) for _ in row.texts)
        boundary = min(_common_prefix(alone, tokens) for tokens in whole)
        if boundary < len(alone):
            row.issues |= Issue.BOUNDARY_MOVED
        row.prompt, row.responses = alone[:boundary], [tokens[boundary:] for tokens in whole]
        if masked:
            places = [next(offsets) for _ in row.texts][1:]
            masks = (mask_of(p, spans) for p, spans in zip(places, row.spans, strict=True))
            pairs = zip(masks, row.responses, strict=True)
            row.masks = [mask[len(mask) - len(tokens) :] for mask, tokens in pairs]
        _note_eos(row, tokenizer)


def _read_ids(source: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, layout: Layout) -> Row:
    """The token ids and masks that a tokenised row holds."""
    prompt = source["prompt_ids"]
    responses = [source[name + "_ids"] for name in layout.responses]
    masks = [source[name + "_mask"] for name in layout.masks]
    if not all(isinstance(ids, list) for ids in (prompt, *responses, *masks)):
        return Row(Issue.NOT_TEXT)
    masked = [responses[layout.responses.index(name)] for name in layout.masks]
    if any(len(mask) != len(ids) for mask, ids in zip(masks, masked, strict=True)):
        return Row(Issue.BAD_MASK)
    row = Row(responses=responses, masks=masks)
    row.prompt = _single_bos(prompt, tokenizer, row)
    _note_eos(row, tokenizer)
    return row


def _single_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Token ids with a doubled BOS made single: text that already begins with BOS gets another."""
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
        row.issues |= Issue.DOUBLE_BOS
    return ids


def _note_eos(row: Row, tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    if eos is not None and not all(eos in ids for ids in row.responses if ids):
        row.issues |= Issue.NO_EOS


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    if right[: len(left)] == left:
        return len(left)
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _truncate(row: Row, layout: Layout, limits: Limits) -> None:
    prompt_cut, cuts = limits.cuts(len(row.prompt), [len(ids) for ids in row.responses])
    prompt, responses = row.prompt, row.responses
    row.prompt = prompt[prompt_cut]
    row.responses = [ids[cut] for ids, cut in zip(responses, cuts, strict=True)]
    by_name = dict(zip(layout.responses, cuts, strict=True))
    row.masks = [mask[by_name[n]] for n, mask in zip(layout.masks, row.masks, strict=True)]
    if len(row.prompt) < len(prompt):
        row.issues |= Issue.PROMPT_TRUNCATED
    if limits.max_length is not None and len(row.prompt) >= limits.max_length:
        row.issues |= Issue.PROMPT_TOO_LONG
    if any(len(a) < len(b) for a, b in zip(row.responses, responses, strict=True)):
        row.issues |= Issue.RESPONSE_TRUNCATED
    if limits.whole and row.issues & (Issue.PROMPT_TRUNCATED | Issue.RESPONSE_TRUNCATED):
        row.issues |= Issue.NOT_WHOLE


def _check(row: Row, source: Mapping[str, Any], layout: Layout) -> None:
    """Flag what is wrong with a truncated row."""
    unpredicted = 0 if row.prompt else 1
    if unpredicted:
        row.issues |= Issue.EMPTY_PROMPT
    masks = dict(zip(layout.masks, row.masks, strict=True))
    scored = [
        len(ids) > unpredicted and any(masks.get(name, [1, 1])[unpredicted:])
        for name, ids in zip(layout.responses, row.responses, strict=True)
        if ids or layout.kind != "group"
    ]
    if layout.kind == "group" and len(scored) < 2:
        row.issues |= Issue.BAD_GROUP
    if not all(scored):
        row.issues |= Issue.EMPTY_RESPONSE
    if layout.kind == "pair" and row.responses[0] == row.responses[1]:
        truncated = row.issues & Issue.RESPONSE_TRUNCATED
        row.issues |= Issue.IDENTICAL_TRUNCATED if truncated else Issue.IDENTICAL
    if layout.kind == "unpaired" and source["label"] not in (True, False):
        row.issues |= Issue.BAD_LABEL
    if not all(_is_finite(source[name]) for name in layout.numbers):
        row.issues |= Issue.BAD_NUMBER


def _check_ids(row: Row, source: Mapping[str, Any], layout: Layout, vocab_size: int) -> None:
    """Raise ``ValueError`` for a token id that the model does not have."""
    for name, ids in zip(("prompt", *layout.responses), (row.prompt, *row.responses), strict=True):
        wrong = [i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < vocab_size]
        if wrong:
            column = f"{name}_ids" if layout.tokenized else name
            raise ValueError(
                f"column {column!r}, example {source['example_ids']}: token id {wrong[0]} is "
                f"outside the model's vocabulary of {vocab_size}. The ids come from another "
                "model's tokenizer, or tokens were added to it: then call "
                "model.resize_token_embeddings(len(tokenizer)) first."
            )


def _is_finite(value: object) -> bool:
    try:
        return bool(np.isfinite(np.asarray(value, dtype=np.float64)).all())
    except (TypeError, ValueError):
        return False


def _columns(
    rows: Sequence[Row], sources: Sequence[Mapping[str, Any]], layout: Layout
) -> dict[str, list[Any]]:
    triples = [(r, source, not r.issues & DROPS) for r, source in zip(rows, sources, strict=True)]
    out: dict[str, list[Any]] = {"prompt_ids": [row.prompt if ok else [] for row, _, ok in triples]}
    for i, name in enumerate(layout.responses):
        out[name + "_ids"] = [row.responses[i] if ok else [] for row, _, ok in triples]
    for i, name in enumerate(layout.masks):
        out[name + "_mask"] = [row.masks[i] if ok else [] for row, _, ok in triples]
    for name in layout.numbers:
        out[name] = [source[name] if ok else None for _, source, ok in triples]
    if layout.kind == "unpaired":
        out["label"] = [bool(source["label"]) if ok else None for _, source, ok in triples]
    out["example_ids"] = [source["example_ids"] for source in sources]
    out[ISSUES] = [int(row.issues) for row in rows]
    return out
