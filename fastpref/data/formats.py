"""The dataset layouts that preference data comes in, read into one: a prompt and its responses.

Accepted, as in TRL 1.16 (``prompt`` and responses are strings, or lists of ``{role, content}``):

========  ==============================================================================
paired    ``chosen``, ``rejected`` and ``prompt``; without ``prompt``, both carry the whole
          dialogue and their common prefix is the prompt
unpaired  ``prompt``, ``completion``, ``label`` (true = desirable)
group     ``prompt``, ``completions`` (a list, two or more) and ``scores`` (a list, as long)
tokens    ``prompt_ids`` with ``chosen_ids``, ``rejected_ids``, or ``completion_ids``, ``label``,
          or ``completion_1_ids``, ``completion_2_ids``, ... (empty where a group has fewer);
          optionally 0/1 masks ``chosen_mask``, ``rejected_mask``, ``completion_mask``, ...
========  ==============================================================================

Beside them: ``third`` (or TRL's name ``reference``), one more response for losses that take it;
``tools`` (list or JSON), ``chat_template_kwargs``; and numbers per row, ``NUMERIC_COLUMNS``.
Nothing here tokenises, and nothing here knows a model.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .report import BadRow, Issue

Kind = Literal["pair", "unpaired", "group"]
Messages = list[dict[str, Any]]

RESPONSES: dict[str, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "unpaired": ("completion",),
    "group": ("completion_1", "completion_2"),
}
"""The responses that a row of each kind has at least."""
EXTRA_RESPONSES: dict[str, str] = {
    "pair": "third|corrupted",
    "unpaired": "mismatched",
    "group": r"completion_[1-9]\d*",
}
"""Pattern of the names of further responses."""
MADE = ("corrupted", "mismatched")
"""Responses that no dataset brings: the trainer makes them of the others' tokens."""
NUMERIC_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "pair": (
        "weight",
        "chosen_score",
        "rejected_score",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "ref_third_logps",
        "ref_corrupted_logps",
        "chosen_margins",
        "rejected_margins",
        "prior_chosen",
        "prior_rejected",
        "chosen_aux",
        "rejected_aux",
        "values",
    ),
    "unpaired": ("weight", "score", "ref_logps", "values", "aux"),
    "group": ("weight", "scores", "ref_logps"),
}
ALIASES = {
    "score_chosen": "chosen_score",
    "score_rejected": "rejected_score",
    "reward": "score",
    "reference": "third",
}
# What a pair's two columns become when each response stands alone.
_UNPAIRED_NAMES = {
    "completion": ("chosen", "rejected"),
    "completion_ids": ("chosen_ids", "rejected_ids"),
    "completion_mask": ("chosen_mask", "rejected_mask"),
    "score": ("chosen_score", "rejected_score"),
    "ref_logps": ("ref_chosen_logps", "ref_rejected_logps"),
    "aux": ("chosen_aux", "rejected_aux"),
}
_NEEDED = {
    "pair": "'chosen' and 'rejected' (with 'prompt', or carrying the whole dialogue), "
    "or 'prompt_ids', 'chosen_ids' and 'rejected_ids'",
    "unpaired": "'prompt', 'completion' and 'label', or 'prompt_ids', 'completion_ids' and 'label'",
    "group": "'prompt', 'completions' and 'scores', or 'prompt_ids', 'completion_1_ids', "
    "'completion_2_ids', ... and 'scores'",
}


@dataclass(frozen=True)
class Layout:
    """Which columns of a dataset hold what, under canonical names.

    Attributes:
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``: what the rows are once read.
        unpair: The source is paired and every pair is to become two unpaired rows.
        tokenized: Responses are token ids already.
        responses: Names of the responses, in order: chosen, rejected[, third][, corrupted];
            completion; or completion_1, completion_2, ...
        masks: Those of the responses that come with a 0/1 mask over their tokens.
        numbers: Numeric columns passed through.
        assistant_only: The masks are made here: of dialogues the assistant's turns count.
    """

    kind: Kind
    unpair: bool
    tokenized: bool
    responses: tuple[str, ...]
    masks: tuple[str, ...]
    numbers: tuple[str, ...]
    assistant_only: bool = False


def canonical_names(columns: Iterable[str]) -> dict[str, str]:
    """Renames, old to new, of the columns known under another name (``score_chosen``, ...)."""
    present = set(columns)
    return {old: new for old, new in ALIASES.items() if old in present and new not in present}


def response_names(columns: Iterable[str], kind: str, suffix: str = "_ids") -> tuple[str, ...]:
    """Names of the responses that a dataset has, in the order of a batch's sequences.

    Args:
        columns: Column names.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        suffix: What the columns are called beyond the names.

    Returns:
        ``RESPONSES[kind]``, there or not, and the further ones that are there.
    """
    least, more = RESPONSES[kind], re.compile(EXTRA_RESPONSES[kind])
    stems = {name.removesuffix(suffix) for name in columns if name.endswith(suffix)}
    found = [name for name in stems if more.fullmatch(name) and name not in least]
    # third before corrupted, completion_9 before completion_10
    return (*least, *sorted(found, key=lambda name: (name == "corrupted", len(name), name)))


def expand_groups(columns: Mapping[str, list[Any]], size: int) -> dict[str, list[Any]]:
    """Columns of groups with ``completions`` taken apart into ``completion_1``, ``completion_2``...

    Args:
        columns: Columns of equal length.
        size: Number of responses to make room for. A row that has fewer ends in None, its lists of
            numbers in 0; a list of numbers that does not fit its responses becomes None.

    Returns:
        The columns.

    Raises:
        ValueError: A row has more responses than there is room for.
    """
    columns = dict(columns)
    texts = columns.pop("completions", None)
    if texts is not None:
        texts = [row if isinstance(row, list) else [] for row in texts]
        if (most := max(map(len, texts), default=0)) > size:
            raise ValueError(
                f"a row has {most} completions, the first row of the stream has {size}: pad the "
                "first row's lists to the largest number with None and 0"
            )
        for k in range(size):
            columns[f"completion_{k + 1}"] = [row[k] if k < len(row) else None for row in texts]
    for name in ("scores", "ref_logps"):
        if name in columns:
            wanted = [size] * len(columns[name]) if texts is None else [len(row) for row in texts]
            columns[name] = [
                [*row, *[0.0] * (size - n)] if isinstance(row, list) and len(row) == n else None
                for row, n in zip(columns[name], wanted, strict=True)
            ]
    return columns


def resolve_layout(
    columns: Sequence[str], kind: Kind, *, unpair: bool = False, extra_columns: Sequence[str] = ()
) -> Layout:
    """The layout of a dataset with these (canonical) columns.

    Args:
        columns: Column names of the dataset.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        unpair: Accept a paired dataset where ``kind="unpaired"``, and make two rows of each pair.
        extra_columns: Numeric columns to pass through beyond ``NUMERIC_COLUMNS[kind]``.

    Returns:
        The layout.

    Raises:
        ValueError: a column is missing (named, with what was found and the nearest name), the
            dataset is paired where unpaired was asked for, or it has images.
    """
    if kind not in RESPONSES:
        raise ValueError(f"kind must be 'pair', 'unpaired' or 'group', got {kind!r}")
    present = set(columns)
    if images := present & {"image", "images", "video", "videos", "audio"}:
        raise ValueError(
            f"column {sorted(images)[0]!r}: multimodal data is not supported yet. If the column is "
            "unused, drop it with dataset.remove_columns(...)"
        )
    tokenized = "prompt_ids" in present
    suffix = "_ids" if tokenized else ""
    paired = {"chosen" + suffix, "rejected" + suffix} <= present
    unpair = kind == "unpaired" and unpair and paired
    if kind == "unpaired" and paired and not unpair and "completion" + suffix not in present:
        raise ValueError(
            "the dataset is paired ('chosen', 'rejected') but the loss takes unpaired examples. "
            "Pass unpair=True to make two examples of every pair, or choose a paired loss."
        )
    source: Kind = "pair" if unpair else kind
    needed = [name + suffix for name in RESPONSES[source]]
    if source != "pair":
        needed += [{"unpaired": "label", "group": "scores"}[source]]
        needed += [] if tokenized else ["prompt"]
    for name in needed:
        if name not in present:
            raise ValueError(_missing(name, columns, source))
    if unpair:
        present = set(unpair_batch({name: [] for name in columns}))
    responses = tuple(r for r in response_names(present, kind, suffix) if r not in MADE)
    masks = tuple(name for name in responses if name + "_mask" in present)
    if masks and not tokenized:
        raise ValueError(
            f"column '{masks[0]}_mask' is a mask over tokens and needs the tokens: give "
            f"'prompt_ids' and '{masks[0]}_ids' too, or drop the mask"
        )
    for name in extra_columns:
        if name not in present:
            raise ValueError(_missing(name, columns, source))
    numbers = tuple(name for name in NUMERIC_COLUMNS[kind] if name in present)
    extra = tuple(name for name in extra_columns if name not in numbers)
    return Layout(kind, unpair, tokenized, responses, masks, numbers + extra)


def _missing(name: str, columns: Sequence[str], kind: Kind) -> str:
    found = ", ".join(repr(column) for column in columns) or "no columns"
    nearest = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    if kind == "pair" and {"completion", "label"} <= set(columns):
        hint = " These are single responses with a label: choose a loss for those, such as kto."
    elif nearest:
        hint = f" Nearest is {nearest[0]!r}: dataset.rename_column({nearest[0]!r}, {name!r})?"
    else:
        hint = ""
    return f"column {name!r} is missing; found {found}.{hint} A {kind} dataset has {_NEEDED[kind]}."


def is_conversational(value: object) -> bool:
    """True if ``value`` is a list (of messages), not a string."""
    return isinstance(value, list)


def extract_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its prompt explicit: equals ``{prompt: p, chosen: p + c, rejected: p + r}``
    taken apart, p the longest common prefix in characters or messages.

    The prompt is implicit where there is no ``prompt`` column, or where ``prompt`` is a string
    and the responses are dialogues that begin alike. A space before the boundary goes to the
    responses. At least one character or message is left to each response.

    Args:
        row: Values of one example by column.

    Returns:
        A new dict; an explicit row, or one whose values cannot be compared, comes back as it was.
    """
    row = dict(row)
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    comparable = isinstance(chosen, (str, list)) and type(chosen) is type(rejected)
    plain_beside_dialogues = isinstance(row.get("prompt"), str) and is_conversational(chosen)
    if not comparable or ("prompt" in row and not plain_beside_dialogues):
        return row
    limit = max(min(len(chosen), len(rejected)) - 1, 0)
    end = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if end and chosen[end - 1] == " " and chosen[end] != rejected[end]:
        end -= 1
    if plain_beside_dialogues and not end:
        return row
    prompt = row["prompt"] = chosen[:end]
    for name in ("chosen", "rejected", "third"):
        if isinstance(row.get(name), type(prompt)) and row[name][:end] == prompt:
            row[name] = row[name][end:]
    return row


def unpair_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Two unpaired rows for every pair: all chosen (label true), then all rejected (false).

    Scores, reference log-probs and masks follow their response; other columns are repeated.

    Args:
        batch: Columns of equal length, the prompt explicit.

    Returns:
        Columns of twice the length.
    """
    out: dict[str, list[Any]] = {}
    used = {"chosen", "rejected", "third", "third_ids"}
    for name, (chosen, rejected) in _UNPAIRED_NAMES.items():
        if chosen in batch and rejected in batch:
            out[name] = list(batch[chosen]) + list(batch[rejected])
            used |= {chosen, rejected}
    for name, values in batch.items():
        if name not in used:
            out[name] = list(values) * 2
    pairs = len(next(iter(batch.values()), []))
    out["label"] = [True] * pairs + [False] * pairs
    return out


def read_example(
    row: Mapping[str, Any], responses: Sequence[str]
) -> tuple[str | Messages, list[Any]]:
    """Prompt and responses of a row: all strings, or all message lists.

    A string among messages becomes a message: the prompt a user's, a response the assistant's.

    Args:
        row: Values of one example by canonical column; an implicit prompt is extracted.
        responses: Names of the response columns.

    Returns:
        The prompt, and the responses, of the prompt's type, in the order of ``responses``.

    Raises:
        BadRow: a value has the wrong type, a message is malformed, or a response is empty.
    """
    row = extract_prompt(row)
    prompt: Any = row.get("prompt")
    texts: list[Any] = [row.get(name) for name in responses]
    if not all(isinstance(value, (str, list)) for value in (prompt, *texts)):
        raise BadRow(Issue.NOT_TEXT)
    if all(isinstance(value, str) for value in (prompt, *texts)):
        if not all(text.strip() for text in texts):
            raise BadRow(Issue.EMPTY_RESPONSE)
        return prompt, texts
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    dialogues: list[Messages] = [
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for text in texts
    ]
    for message in [*prompt, *(message for dialogue in dialogues for message in dialogue)]:
        _check_message(message)
    if not prompt:
        raise BadRow(Issue.BAD_MESSAGES, "the prompt has no message")
    if not all(any(_has_content(message) for message in dialogue) for dialogue in dialogues):
        raise BadRow(Issue.EMPTY_RESPONSE)
    return prompt, dialogues


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``apply_chat_template`` from ``tools`` and ``chat_template_kwargs``.

    Args:
        row: Values of one example by column.

    Returns:
        ``tools`` (a list or None) and whatever ``chat_template_kwargs`` sets to other than None.

    Raises:
        BadRow: ``tools`` is not valid JSON, or ``chat_template_kwargs`` is not a dict.
    """
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise BadRow(Issue.TEMPLATE_ERROR, f"tools is not valid JSON: {error}") from error
    if not isinstance(options, dict):
        raise BadRow(Issue.TEMPLATE_ERROR, "chat_template_kwargs is not a dict")
    # Arrow fills keys that other rows have with None.
    options = {key: value for key, value in options.items() if value is not None}
    return {"tools": tools or None, **options}


def _check_message(message: object) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow(Issue.BAD_MESSAGES, f"a message is a dict with a role, got {message!r}")
    content = message.get("content")
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds - {"text"}:
            raise BadRow(Issue.BAD_MESSAGES, f"content parts other than text: {kinds!r}")
    elif content is not None and not isinstance(content, str):
        raise BadRow(Issue.BAD_MESSAGES, f"content is text, got {type(content).__name__}")


def _has_content(message: dict[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return bool((content or "").strip() or message.get("tool_calls"))
