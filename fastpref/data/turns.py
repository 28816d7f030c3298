"""Which characters of a rendered dialogue are the assistant's, and which tokens hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .report import BadRow, Issue

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]


def assistant_spans(
    render: Callable[[Messages, bool], str], prompt: Messages, response: Messages
) -> Spans:
    """Where, in ``render(prompt + response, False)``, the assistant's messages of the response lie.

    A message lies between what stands there when it is asked for, and when it is over.

    Args:
        render: Text of messages; the second argument says whether the assistant is asked to go on.
        prompt: Messages before the response.
        response: Messages.

    Returns:
        First and last character (exclusive) of each of the assistant's messages.

    Raises:
        BadRow: The template renders the beginning of a dialogue otherwise than the whole.
    """
    messages = prompt + response
    whole = render(messages, False)
    spans = []
    for i in range(len(prompt), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        before, after = render(messages[:i], True), render(messages[: i + 1], False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise BadRow(
                Issue.TEMPLATE_ERROR,
                "assistant_only_loss: the chat template renders a dialogue's turns otherwise when "
                "more follow",
            )
        spans.append((len(before), len(after)))
    return spans


def mask_of(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[int]:
    """1 for each token that ends within a span, 0 for the others."""
    return [int(any(first < end <= last for first, last in spans)) for _, end in offsets]
