"""Scorers that are models: a reward model for one response, a ranker for two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastpref.named import find
from fastpref.rounds.examples import prompt_text
from fastpref.rounds.run import Row, Run, by_length, policy_of
from fastpref.rounds.scorer import ByFunction, Score, Scorer


def reward_ids(tokenizer: Any, prompt: Any, response: str) -> list[int]:
    """What a reward model reads: prompt and response as its chat template has them, or end to end.

    Args:
        tokenizer: The reward model's.
        prompt: A string, or messages; a string, or a tokenizer without a template, is not rendered.
        response: A string.

    Returns:
        Token ids; a template writes the special tokens itself, and the tokenizer adds none to it.
    """
    plain = isinstance(prompt, str) or tokenizer.chat_template is None
    if plain:
        text = prompt_text(prompt) + response
    else:
        said = [*prompt, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(said, tokenize=False)
    return list(tokenizer(text, add_special_tokens=plain, verbose=False)["input_ids"])


class Classifier:
    """A sequence-classification model with one output, and its tokenizer."""

    def __init__(self, run: Run, model: str, max_length: int | None) -> None:
        """Load it on the run's device."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=run.dtype, use_safetensors=True
        )
        if loaded.config.num_labels != 1:
            raise ValueError(
                f"{model} has {loaded.config.num_labels} outputs; a reward model has one"
            )
        self.model = loaded.to(run.device).eval()
        config = loaded.config.get_text_config()
        self.pads = config.pad_token_id in range(config.vocab_size)
        self.size, self.max_length = run.batch_size, max_length

    @torch.no_grad()
    def __call__(self, encoded: Sequence[Sequence[int]]) -> list[float]:
        """The model's output for each sequence of token ids, by batches of like length.

        Equals ``model(ids).logits`` of each one alone.

        Raises:
            ValueError: one is longer than ``max_length``.
        """
        limit = self.max_length or getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, encoded))
        if limit is not None and longest > limit:
            raise ValueError(
                f"prompt and response have {longest} tokens, the model reads {limit}: lower "
                "sampling.max_new_tokens or max_prompt_tokens"
            )
        found = [0.0] * len(encoded)
        for batch in by_length(list(map(len, encoded)), self.size):
            own = [list(encoded[i]) for i in batch]
            pad, width = self._pad(own), max(map(len, own))
            ids = torch.tensor([one + [pad] * (width - len(one)) for one in own])
            mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in own])
            device = self.model.device
            read = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            for i, value in zip(batch, read.logits[:, 0].float().tolist(), strict=True):
                found[i] = value
        return found

    def _pad(self, batch: Sequence[Sequence[int]]) -> int:
        """The id that a batch is padded with.

        A head reads the last token that is not its model's padding. Where the model has none, that
        is the very last, an end of text too, so that what pads must not end a text.
        """
        config = self.model.config.get_text_config()
        if not self.pads:
            last = {one[-1] for one in batch if one}
            config.pad_token_id = next(i for i in count() if i not in last)
        return int(config.pad_token_id)


@dataclass
class RewardModel(Scorer):
    """A transformers sequence-classification model with one output.

    Attributes:
        model: Path or hub name.
        max_length: Most tokens it reads; None: what its config says. Longer ones are an error.
    """

    kind = "reward_model"
    model: str
    max_length: int | None = None

    @property
    def loads(self) -> bool:
        """Always."""
        return True

    def describe(self) -> dict[str, Any]:
        """The model's digest."""
        return {"kind": self.kind, "model": policy_of(self.model).digest}

    @property
    def name(self) -> str:
        """The model's."""
        return Path(self.model).name

    def open(self, run: Run) -> Score:
        """The model's outputs."""
        classify = Classifier(run, self.model, self.max_length)

        def score(groups: Sequence[Row]) -> list[list[float]]:
            read = [
                reward_ids(classify.tokenizer, group["prompt"], response["text"])
                for group in groups
                for response in group["responses"]
            ]
            found = iter(classify(read))
            return [[next(found) for _ in group["responses"]] for group in groups]

        return score


@dataclass
class Ranker(ByFunction):
    """A judge of two responses; a response's score is its mean probability to beat the others.

    Attributes:
        function: ``(prompt, first, second) -> probability that the first is better``, or where it
            is, as for :class:`Function`.
        model: Instead: a sequence-classification model with one output, the log-odds that the first
            response is better; it reads ``template`` filled in.
        template: What the model reads; ``{prompt}``, ``{first}`` and ``{second}`` are replaced.
        max_length: Most tokens the model reads.

    Each pair is judged in both orders, and the mean counts: a judge's liking for the first place
    does not.
    """

    kind = "ranker"
    probability = True
    function: Any = None
    model: str | None = None
    template: str = "{prompt}\n\nFirst answer: {first}\n\nSecond answer: {second}"
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` unless there is one of function and model."""
        if (self.function is None) == (self.model is None):
            raise ValueError("ranker: give a function or a model, and not both")

    @property
    def loads(self) -> bool:
        """Unless a function judges."""
        return self.model is not None

    def describe(self) -> dict[str, Any]:
        """The function, or the model and its template."""
        if self.model is None:
            return {"kind": self.kind, **self._described}
        return {
            "kind": self.kind,
            "model": policy_of(self.model).digest,
            "template": self.template,
        }

    @property
    def name(self) -> str:
        """Of the function or the model."""
        if self.model is None:
            return self._described["function"]
        return Path(self.model).name

    def open(self, run: Run) -> Score:
        """Mean probabilities over all pairs in both orders."""
        beats = self._judge(run)

        def score(groups: Sequence[Row]) -> list[list[float]]:
            asked = [
                (g["prompt"], a["text"], b["text"])
                for g in groups
                for a in g["responses"]
                for b in g["responses"]
                if a is not b
            ]
            probabilities = beats(asked) if asked else []
            for (prompt, first, second), p in zip(asked, probabilities, strict=True):
                if not 0 <= p <= 1:
                    raise ValueError(
                        f"{self.name} gave {p} for {first[:80]!r} against {second[:80]!r}, prompt "
                        f"{prompt!r}: a ranker returns the probability, 0 to 1, that the first "
                        "response is better"
                    )
            answers = iter(probabilities)
            found = []
            for group in groups:
                size = len(group["responses"])
                wins = [[0.5] * size for _ in range(size)]
                given = {(i, j): next(answers) for i in range(size) for j in range(size) if i != j}
                for (i, j), p in given.items():
                    wins[i][j] = (p + 1 - given[j, i]) / 2
                rest = max(size - 1, 1)
                found.append([(sum(row) - 0.5) / rest if size > 1 else 0.5 for row in wins])
            return found

        return score

    def _judge(self, run: Run) -> Callable[[Sequence[tuple[Any, str, str]]], list[float]]:
        if self.model is None:
            function = find(self.function)
            return lambda asked: [float(function(*one)) for one in asked]
        classify = Classifier(run, self.model, self.max_length)

        def judge(asked: Sequence[tuple[Any, str, str]]) -> list[float]:
            texts = [
                self.template.format(prompt=prompt_text(prompt), first=first, second=second)
                for prompt, first, second in asked
            ]
            encoded = classify.tokenizer(texts, verbose=False)["input_ids"]
            return torch.tensor(classify(encoded)).sigmoid().tolist()

        return judge
