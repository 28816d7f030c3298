"""What a dataset gives a round: prompts to answer, and responses that it already has, as token ids.

A response here ends where a sampled one would, at its first end-of-turn token, so that responses of
both kinds can stand in one pair.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastpref.data.formats import extract_prompt, template_arguments
from fastpref.data.load import load_preference_dataset
from fastpref.rounds.run import Row, Rows, given_rows

logger = logging.getLogger("fastpref")

Prompt = Any
"""A string, or a list of messages."""


def load_dataset(source: Any, split: str = "train") -> Any:
    """A ``datasets.Dataset`` from a path, a hub id, a list of dicts, or a dataset.

    Raises:
        FileNotFoundError: ``source`` is a path that is not there.
        TypeError: ``source`` is none of these.
    """
    from datasets import Dataset

    if isinstance(source, (str, os.PathLike)):
        return load_preference_dataset(source, split)
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("the dataset has no rows")
        return Dataset.from_list(list(source))
    if not isinstance(source, Dataset):
        raise TypeError(
            f"dataset: expected a path, a hub id, a list of dicts or a datasets.Dataset, got "
            f"{type(source).__name__}"
        )
    return source


def by_name(dataset: Any, column: str) -> dict[str, list[Row]]:
    """The rows of several datasets by their names.

    Args:
        dataset: A mapping of names to what :func:`load_dataset` takes, or one dataset.
        column: Where a row of one dataset holds its name.

    Returns:
        Rows by name, in the order of the mapping, or as the names first come in the column.

    Raises:
        ValueError: a row has no such column.
    """
    if isinstance(dataset, Mapping):
        return {str(name): list(load_dataset(part)) for name, part in dataset.items()}
    found: dict[str, list[Row]] = {}
    for number, row in enumerate(load_dataset(dataset)):
        if row.get(column) is None:
            raise ValueError(
                f"row {number} of the dataset has no {column!r}: give a mapping of names to "
                f"datasets, or a column {column!r}; found {', '.join(row)}"
            )
        found.setdefault(str(row[column]), []).append(row)
    return found


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string, for people and for scorers that want one."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content") or "") for message in prompt)


def response_text(response: Any) -> str:
    """A response, a string or a list of messages, as one string."""
    return prompt_text(response)


def encode_prompt(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt as training lays it out: rendered by the chat template if it is one.

    Args:
        tokenizer: Of the policy.
        row: With ``prompt``, and what its template takes.

    Raises:
        ValueError: the prompt is a dialogue and the tokenizer has no chat template.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are dialogues but the tokenizer has no chat_template: use the tokenizer "
            "of the chat model, or plain-text prompts"
        )
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **template_arguments(row)
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ends(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids of the tokens that end a response, of the tokenizer and of a model's own generation."""
    found = [tokenizer.eos_token_id]
    own = getattr(generation_config, "eos_token_id", None)
    found += own if isinstance(own, (list, tuple)) else [own]
    return sorted({int(i) for i in found if i is not None})


def cut_at_end(ids: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """Token ids up to and with the first end token, and whether there was one."""
    for i, token in enumerate(ids):
        if token in ends:
            return list(ids[: i + 1]), True
    return list(ids), False


def read_examples(
    dataset: Any,
    tokenizer: Any,
    responses: Sequence[str] = (),
    max_prompt_tokens: int | None = None,
) -> Rows:
    """The rows of a dataset as prompts with token ids, and responses if asked for.

    Args:
        dataset: As for :func:`load_dataset`; it needs a column ``prompt``, or whole dialogues in
            ``chosen`` and ``rejected`` that begin alike.
        tokenizer: Of the policy.
        responses: Response columns to read: of ``chosen``, ``rejected``.
        max_prompt_tokens: Rows with a longer prompt are left out; the log says how many, and
            ``left_out`` of the result.

    Returns:
        Rows ``{"id", "prompt", "prompt_ids", "responses": [{"text", "ids", "finished"}, ...]}`` in
        the order of the dataset; ``id`` is the row's number there. Other columns stay, under
        ``row``.

    Raises:
        ValueError: a column is missing, or no row is left.
    """
    from tqdm.auto import tqdm

    found: list[Row] = []
    stops, too_long = ends(tokenizer), 0
    rows = tqdm(load_dataset(dataset), desc="reading the dataset", delay=2)
    for number, source in enumerate(rows):
        row = extract_prompt(source)
        for name in ("prompt", *responses):
            if row.get(name) is None:
                raise ValueError(
                    f"row {number} of the dataset has no {name!r}; found "
                    f"{', '.join(map(repr, source))}"
                )
        ids = encode_prompt(tokenizer, row)
        if not ids:
            raise ValueError(f"row {number} of the dataset has an empty prompt: nothing to answer")
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            too_long += 1
            continue
        own = [_encode_response(tokenizer, row, ids, row[name], stops) for name in responses]
        found.append(
            {"id": number, "prompt": row["prompt"], "prompt_ids": ids, "responses": own, "row": row}
        )
    if not found and too_long:
        raise ValueError(
            f"the dataset has no prompt of at most {max_prompt_tokens} tokens: raise "
            "max_prompt_tokens"
        )
    if not found:
        raise ValueError("the dataset has no rows")
    if too_long:
        logger.warning(
            "%d prompts have more than %s tokens (max_prompt_tokens) and are left out, %d remain",
            too_long,
            max_prompt_tokens,
            len(found),
        )
    return given_rows(found, {"prompt longer than max_prompt_tokens": too_long})


def _encode_response(
    tokenizer: Any, row: Mapping[str, Any], prompt_ids: list[int], response: Any, stops: list[int]
) -> Row:
    text = response_text(response)
    if isinstance(row["prompt"], str):
        whole = row["prompt"] + text + (tokenizer.eos_token or "")
        ids = list(tokenizer(whole)["input_ids"])
    else:
        said = response
        if isinstance(response, str):
            said = [{"role": "assistant", "content": response}]
        rendered = tokenizer.apply_chat_template(
            [*row["prompt"], *said], tokenize=False, **template_arguments(row)
        )
        ids = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    if ids[: len(prompt_ids)] != prompt_ids:
        # Tokens merge across the boundary: the response as it would be sampled, on its own.
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*prompt_ids, *tokenizer(text, add_special_tokens=False)["input_ids"], *end]
    cut, finished = cut_at_end(ids[len(prompt_ids) :], stops)
    return {"text": text, "ids": cut, "finished": finished}


def split_prompts(examples: Rows, held_out: int, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and ``held_out`` others, no prompt in both; repeatable.

    Raises:
        ValueError: fewer than half of the prompts would be left to train on.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in examples:
        by_prompt.setdefault(repr(row["prompt"]), []).append(row)
    prompts = sorted(by_prompt)
    if held_out > len(prompts) // 2:
        raise ValueError(
            f"held_out={held_out} of {len(prompts)} different prompts leaves too few to train on: "
            "lower held_out, or give the held-out prompts as eval_dataset"
        )
    random.Random(seed).shuffle(prompts)
    kept = set(prompts[:held_out])
    train = [row for row in examples if repr(row["prompt"]) not in kept]
    test = [by_prompt[prompt][0] for prompt in prompts[:held_out]]
    return given_rows(train, examples.left_out), given_rows(test)


def one_each(examples: Rows) -> Rows:
    """The rows with a prompt once each; of several rows with one prompt, the last."""
    return given_rows(list({repr(row["prompt"]): row for row in examples}.values()))


def split_rounds(examples: Rows, rounds: int, seed: int, size: int | None = None) -> list[Rows]:
    """The rows of each round, shuffled; no row in two rounds.

    Args:
        examples: Rows.
        rounds: Number of rounds.
        seed: Of the shuffling.
        size: Rows of each round; None: all rows in parts of equal size (to one). With a size, more
            rounds leave the first ones as they were.

    Raises:
        ValueError: there are too few rows.
    """
    rows = list(examples)
    if len(rows) < rounds * (size or 1):
        raise ValueError(
            f"{len(rows)} prompts are too few for {rounds} rounds"
            + ("" if size is None else f" of {size}: lower rounds or prompts_per_round")
        )
    random.Random(seed).shuffle(rows)
    bounds = [len(rows) * k // rounds if size is None else size * k for k in range(rounds + 1)]
    return [given_rows(rows[bounds[k] : bounds[k + 1]]) for k in range(rounds)]
