"""Dropout-NTP: the rejected response is a chosen one's first half, finished without the context.

The text-only data engine of mixed preference optimisation: what a model writes when it cannot see
what it was asked about. Wang et al. 2024, arXiv:2411.10442 (MPO), section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from fastpref.named import find
from fastpref.rounds.examples import encode_prompt, ends, prompt_text, read_examples
from fastpref.rounds.pairs import Filter, made, reasons
from fastpref.rounds.recipe import OnPolicy
from fastpref.rounds.run import Policy, Row, Rows, Run, given_rows
from fastpref.rounds.sampling import Sampling, sample
from fastpref.rounds.scorer import described
from fastpref.rounds.training import Loss, token_rows, train, uncut


@dataclass(kw_only=True)
class DropoutNTP(OnPolicy):
    """Pairs from chosen responses alone; then, with a loss, a policy trained on them.

    The dataset has prompts with a context and chosen responses; rejected ones are not read.

    Attributes:
        context: What a prompt is without its context. Two marks: all from the first to the second
            is left out, with them; a column's name: the column holds that prompt; or a function
            ``row -> prompt``, or where it is: ``"module:name"``, ``"file.py:name"``.
        keep: Share of the chosen response's tokens that the rejected one begins with, in [0, 1).
        loss: Of :mod:`fastpref.losses`; None: only the pairs are made, and no prompt is held out.
        loss_args: Hyper-parameters of the loss.
        sampling: How responses are finished, once each.
        filter: Which rejected responses count.
    """

    context: Any
    keep: float = 0.5
    loss: str | None = "mpo"
    loss_args: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1
    sampling: Any = field(default_factory=lambda: Sampling(n=1))
    filter: Any = field(default_factory=lambda: Filter(min_responses=1))

    def __post_init__(self) -> None:
        """See :class:`Recipe`."""
        super().__post_init__()
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep is a share below the whole: expected [0, 1), got {self.keep}")
        if self._sampling.n != 1:
            raise ValueError(f"sampling.n must be 1, one end a response, got {self._sampling.n}")
        self._without = without(self.context)
        self._loss = None if self.loss is None else Loss(self.loss, self.beta, self.loss_args)

    def play(self, run: Run, start: Policy) -> Policy:
        """See :meth:`Recipe.play`."""
        if self.loss is None:  # nothing to evaluate: every row makes a pair
            evaluator, limit = None, self.max_prompt_tokens
            examples = read_examples(self.dataset, run.tokenizer, ("chosen",), limit)
        else:
            examples, held_out = self.examples(run, "chosen")
            longest = self._sampling.max_new_tokens
            evaluator = self.evaluator(run, start, held_out, max_new_tokens=longest)
        policy = start
        for number, part in enumerate(self.parts(examples), 1):
            name = f"round-{number}"
            begun = self._begun(run, f"{name}/begun", part)
            samples = sample(
                run, f"{name}/samples", policy, given_rows(made(begun)), self._sampling
            )
            pairs = self._pairs(run, f"{name}/pairs", part, begun, samples)
            good = run.table(f"{name}/data", {"pairs": pairs.digest}, partial(made, pairs)).rows
            new, data = policy, examples
            if self._loss is not None:
                whole = uncut(token_rows(good), self._training)
                kept = {row["id"] for row in whole}
                data = replace(examples, left_out={**examples.left_out, **whole.left_out})
                new = train(
                    run,
                    f"{name}/train",
                    [row for row in good if row["id"] in kept],
                    start=policy,
                    reference=policy,
                    loss=self._loss,
                    training=self._training,
                )
            self.report(run, number, evaluator, policy, new, data=data, pairs=pairs)
            policy = self.made_policy(name, new)
        return policy

    def _begun(self, run: Run, name: str, part: Rows) -> Rows:
        """Prompts without context, and the beginnings of their responses, as a stage.

        Rows ``{"id", "prompt", "prompt_ids", "kept_ids"}``, the kept ids at the end of the
        prompt's, or ``{"id", "dropped": why}``.
        """
        stops = ends(run.tokenizer)

        def begin(row: Row) -> Row:
            try:
                bare = self._without(row["row"])
                if not isinstance(bare, (str, list, type(None))):
                    raise TypeError(f"expected a prompt, a string or messages, got {bare!r}")
            except Exception as error:
                raise RuntimeError(
                    f"context: row {row['id']} of the dataset: {type(error).__name__}: {error}"
                ) from error
            (response,) = row["responses"]
            body = [token for token in response["ids"] if token not in stops]
            kept = body[: int(self.keep * len(body))]
            why = None
            if bare is None or bare == row["prompt"]:
                why = "no context in the prompt"
            elif not prompt_text(bare).strip():
                why = "nothing but context in the prompt"
            elif not body or (self.keep and not kept):
                why = "the chosen response is too short"
            if why is not None:
                return {"id": row["id"], "dropped": why}
            ids = encode_prompt(run.tokenizer, {**row["row"], "prompt": bare})
            return {
                "id": row["id"],
                "prompt": bare,
                "prompt_ids": [*ids, *kept],
                "kept_ids": kept,
            }

        inputs = {"examples": part.digest, "context": describe(self.context), "keep": self.keep}
        return run.table(name, inputs, lambda: some(name, [begin(row) for row in part]))

    def _pairs(self, run: Run, name: str, part: Rows, begun: Rows, samples: Rows) -> Rows:
        """Chosen and rejected responses to the whole prompts, as a stage; or why there is none."""

        def make() -> list[Row]:
            written = {row["id"]: row["responses"][0] for row in samples}
            both = zip(part, begun, strict=True)
            return some(name, [pair(row, own, written) for row, own in both])

        def pair(row: Row, own: Row, written: Mapping[Any, Row]) -> Row:
            if own.get("dropped"):
                return own
            (chosen,), end = row["responses"], written[row["id"]]
            ids = [*own["kept_ids"], *end["ids"]]
            text = run.tokenizer.decode(ids, skip_special_tokens=True)
            why = self._filter.fault({"text": text, "finished": end["finished"]})
            if why is None and ids == chosen["ids"]:
                why = "equal to the chosen one"
            if why is not None:
                return {"id": row["id"], "dropped": f"the rejected response is {why}"}
            return {
                **{key: row[key] for key in ("id", "prompt", "prompt_ids")},
                "chosen": chosen["text"],
                "chosen_ids": chosen["ids"],
                "rejected": text,
                "rejected_ids": ids,
            }

        inputs = {
            "examples": part.digest,
            "begun": begun.digest,
            "samples": samples.digest,
            **{f"filter.{key}": value for key, value in asdict(self._filter).items()},
        }
        return run.table(name, inputs, make)


def some(name: str, rows: list[Row]) -> list[Row]:
    """The rows, if one of them was not dropped.

    Raises:
        ValueError: all were; the message says why.
    """
    if not all(row.get("dropped") for row in rows):
        return rows
    most = Counter(row["dropped"] for row in rows).most_common(1)[0][0]
    hints = {
        "no context in the prompt": "look at context",
        "the rejected response is unfinished": (
            "raise sampling.max_new_tokens, or keep them with filter.unfinished=true"
        ),
    }
    raise ValueError(
        f"{name}: no pair can be made: {reasons(rows)}"
        + (f". The remedy: {hints[most]}" if most in hints else "")
    )


def without(context: Any) -> Callable[[Row], Any]:
    """The function that gives a row's prompt without its context; None where there is none.

    Args:
        context: As in :class:`DropoutNTP`.

    Raises:
        TypeError: it is none of these.
        ValueError: it names no function.
    """
    if callable(context) or (isinstance(context, str) and ":" in context):
        return find(context)
    if isinstance(context, str):
        return lambda row: _column(row, context)
    if (
        isinstance(context, (list, tuple))
        and len(context) == 2
        and all(isinstance(mark, str) and mark for mark in context)
    ):
        return lambda row: _unmarked(row["prompt"], *context)
    raise TypeError(
        "context: expected two marks, a column's name, or a function row -> prompt (or "
        f"'module:name'), got {context!r}"
    )


def describe(context: Any) -> Any:
    """A context as a stage's input: a function by its name and source, all else as it is."""
    named = callable(context) or (isinstance(context, str) and ":" in context)
    return described(context) if named else context


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"there is no column {name!r}; found {', '.join(row)}")
    return row[name]


def _unmarked(prompt: Any, start: str, end: str) -> Any:
    """A prompt without the marked parts; a message that has nothing else goes with them."""
    if isinstance(prompt, str):
        return _cut(prompt, start, end)
    found = []
    for message in prompt:
        content = message.get("content")
        left = _cut(content, start, end) if isinstance(content, str) else content
        if left == content or left.strip():
            found.append({**message, "content": left})
    return found


def _cut(text: str, start: str, end: str) -> str:
    while (first := text.find(start)) >= 0:
        last = text.find(end, first + len(start))
        if last < 0:
            raise ValueError(f"{start!r} stands in the prompt without {end!r} after it")
        text = text[:first] + text[last + len(end) :]
    return text
