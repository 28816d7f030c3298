"""What a model of a sweep does on held-out pairs, beside the reference; what it answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpref.demo import bootstrap, wins
from fastpref.sweep_report import START, Row

ANSWERS = "answers.jsonl"
"""A model's greedy answers, in the layout of the answers of ``fastpref rounds``."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Measure:
    """Held-out pairs with the reference's log-probs, and how a model does on them.

    Args:
        trainer: Of a loss on pairs, whose reference scored its ``eval_dataset``.
        tokenizer: Of its models.
        rows: The pairs of that dataset, as they were given.
        settings: Of the sweep.
    """

    def __init__(self, trainer: Any, tokenizer: Any, rows: Sequence[Row], settings: Any) -> None:
        """See the class."""
        self.rows: list[Row] = list(trainer.eval_dataset)
        self.prompts = {row.get("example_ids", i): row["prompt"] for i, row in enumerate(rows)}
        self.collate = trainer.data_collator
        self.accelerator, self.options = trainer.accelerator, trainer.head_options
        self.tokenizer, self.settings = tokenizer, settings

    @torch.no_grad()
    def __call__(self, model: nn.Module, folder: Path) -> Row:
        """Accuracy and margin with their intervals, KL estimate, and length of the answers.

        The answers themselves are ``folder/answers.jsonl``.
        """
        from fastpref.heads import evaluating
        from fastpref.ops import segment_sum
        from fastpref.policy import response_logps
        from fastpref.rounds.run import write_jsonl

        size, device = self.settings.batch_size, self.accelerator.device
        margins, divergence, tokens = [], 0.0, 0
        with evaluating(model), self.accelerator.autocast():
            for start in range(0, len(self.rows), size):
                made = self.collate(self.rows[start : start + size])
                batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in made.items()}
                logps = response_logps(model, batch, **self.options).logps
                ratios = logps - batch["ref_token_logps"]
                sums = segment_sum(ratios, batch["cu_seqlens"])[batch["pairs"]]
                margins.append(sums[:, 0] - sums[:, 1])
                # Schulman's k2. His k3 has exp(-ratio), which one token that the model has all but
                # ruled out blows up: these responses are not samples of the model.
                divergence += float(ratios.double().square().sum()) / 2
                tokens += int(batch["lengths"].sum())
            margin = torch.cat(margins)
            answers = self._answers(model) if self.settings.new_tokens else []
        found = {
            "pairs": len(margin),
            "accuracy": asdict(bootstrap(wins(margin))),
            "margin": asdict(bootstrap(margin)),
            "kl": divergence / tokens,
        }
        if answers:
            write_jsonl(folder / ANSWERS, answers)
            own = [row["responses"][0] for row in answers]
            found["answers"] = len(own)
            found["length"] = sum(len(answer["ids"]) for answer in own) / len(own)
            found["ended"] = sum(answer["finished"] for answer in own) / len(own)
        return found

    def _answers(self, model: Any) -> list[Row]:
        """The greedy answers to the first of the held-out prompts, up to where they end."""
        limit, size = self.settings.new_tokens, self.settings.batch_size
        known = getattr(model.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        asked, found = self.rows[: self.settings.answers], []
        for start in range(0, len(asked), size):
            rows = asked[start : start + size]
            prompts = [row["prompt_ids"] for row in rows]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            made = model.generate(
                input_ids=ids.to(self.accelerator.device),
                attention_mask=mask.to(self.accelerator.device),
                max_new_tokens=limit,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
            for row, new in zip(rows, made[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(new) if token in ends), None)
                own = new if end is None else new[: end + 1]
                text = self.tokenizer.decode(own, skip_special_tokens=True)
                found.append(
                    {
                        "id": row["example_ids"],
                        "prompt": self.prompts[row["example_ids"]],
                        "prompt_ids": row["prompt_ids"],
                        "responses": [{"text": text, "ids": own, "finished": end is not None}],
                    }
                )
        return found


def make_judge(given: str) -> Any:
    """The judge that ``--judge`` names, as a scorer of :mod:`fastpref.rounds`.

    Args:
        given: ``"module:name"`` or ``"file.py:name"`` of a function: of ``(prompt, answer, other)``
            it gives the probability that the answer is the better one, of ``(prompt, answer)`` a
            score. Or a scorer's kind and options, as YAML: ``{kind: reward_model, model: PATH}``.

    Raises:
        ValueError: There is no such function or scorer, or it takes other arguments.
    """
    import yaml

    from fastpref.named import find
    from fastpref.rounds import make_scorer

    if given.lstrip().startswith("{"):
        return make_scorer(yaml.safe_load(given))
    wanted = [
        each.name
        for each in inspect.signature(find(given)).parameters.values()
        if each.default is each.empty and each.kind in _POSITIONAL
    ]
    kinds = {3: "ranker", 2: "function"}
    if len(wanted) not in kinds:
        raise ValueError(
            f"--judge {given} takes ({', '.join(wanted)}); a judge takes (prompt, answer, other) "
            "and gives a probability, or (prompt, answer) and gives a score"
        )
    return make_scorer({"kind": kinds[len(wanted)], "function": given})


def win_rates(
    judge: Any,
    run_dir: Path,
    names: Sequence[str],
    tokenizer: Any,
    device: torch.device,
    batch_size: int,
) -> dict[str, Row]:
    """How often the judge prefers each cell's answers to those of the start, with its interval.

    A judge of two answers sees them in both orders. What it said is kept in ``run_dir/judge``.

    Args:
        judge: Of :func:`make_judge`.
        run_dir: Of the sweep.
        names: Folders of the cells.
        tokenizer: Of the models.
        device: For a judge that is a model.
        batch_size: The same.

    Returns:
        By name: mean, low and high; a tie counts 1/2.
    """
    from fastpref.rounds.run import Run, given_rows, read_jsonl

    run = Run(run_dir / "judge", tokenizer, device, batch_size=batch_size, redo=True)
    first = read_jsonl(run_dir / START / ANSWERS)
    found = {}
    for name in names:
        both = [
            {**mine, "responses": [*mine["responses"], *base["responses"]]}
            for mine, base in zip(read_jsonl(run_dir / name / ANSWERS), first, strict=True)
        ]
        judged = [row["scores"] for row in judge.score(run, name, given_rows(both))]
        scores = torch.tensor(judged, dtype=torch.float64)
        preferred = scores[:, 0] if judge.probability else wins(scores[:, 0] - scores[:, 1])
        found[name] = asdict(bootstrap(preferred))
    return found
