"""A learned reward: a language model with a scalar head, fitted to pairs, for the recipes to use.

    python examples/learned_reward.py
    python examples/learned_reward.py --model smollm2 --pairs pairs.jsonl --out models/reward

Without arguments the model is tiny and the pairs are made up, so that it runs anywhere in seconds.
``--model`` takes a path, a name or ``smollm2``, the model of ``fastpref demo``; ``--pairs`` JSON
lines with prompt, chosen and rejected, by default the pairs of the demo. What comes out goes into a
recipe as ``scorer: {kind: reward_model, model: models/reward}``. It is measured by that very scorer
on pairs whose prompts it never saw, beside the rule that the longer response is the better one: a
reward that is no better than length has learned length.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastpref import assets, rounds
from fastpref.demo import bootstrap, split_by_prompt, tiny_model, tiny_pairs, wins
from fastpref.rounds.examples import load_dataset, response_text
from fastpref.rounds.reward_models import reward_ids
from fastpref.rounds.run import Run, given_rows

Pair = dict[str, Any]


class RewardTrainer(Trainer):
    """Bradley and Terry's model: the chosen response wins with ``sigmoid(r_chosen - r_rejected)``.

    A batch holds the chosen texts, then the rejected ones.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """Mean of ``-log sigmoid(r_chosen - r_rejected)``."""
        chosen, rejected = model(**inputs).logits[:, 0].float().chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


def ids(tokenizer: Any, pairs: list[Pair], side: str) -> list[list[int]]:
    """What the model reads: prompt and response, laid out as the scorer lays them out."""
    return [reward_ids(tokenizer, pair["prompt"], response_text(pair[side])) for pair in pairs]


def accuracies(folder: str, pairs: list[Pair], batch_size: int) -> dict[str, Tensor]:
    """For each pair 1 where the chosen response is preferred, 1/2 for a tie: reward and length."""
    groups = [
        {
            "id": number,
            "prompt": pair["prompt"],
            "responses": [{"text": response_text(pair[side])} for side in ("chosen", "rejected")],
        }
        for number, pair in enumerate(pairs)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        scorer = rounds.make_scorer({"kind": "reward_model", "model": folder})
        scores = scorer.score(Run(Path(scratch), batch_size=batch_size), "", given_rows(groups))
    lengths = [[len(r["text"]) for r in group["responses"]] for group in groups]
    rewards = [row["scores"] for row in scores]
    found = {"reward": rewards, "longer wins": lengths}
    return {name: wins(-torch.tensor(v).double().diff(dim=1)[:, 0]) for name, v in found.items()}


def main() -> None:
    """Fit a reward and print its loss and how often it is right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="path, name or smollm2; without it a tiny random model")
    add("--pairs", type=Path, help="JSON lines with prompt, chosen, rejected")
    add("--out", type=Path, help="where the reward model goes; without it nowhere")
    add("--train", type=int, help="most pairs to train on; all by default")
    add("--held-out", type=int, default=40, help="pairs to measure on (default 40)")
    add("--max-length", type=int, default=256, help="pairs with more tokens are left out")
    add("--learning-rate", type=float, help="default 5e-5; 1e-3 for the tiny model")
    add("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, pairs = given.model, tiny_pairs(120)
        if model is None:
            model = scratch
            for part in tiny_model():
                part.save_pretrained(scratch)
        elif model == "smollm2":
            model = str(assets.demo_model())
        if given.pairs is not None:
            pairs = list(load_dataset(str(given.pairs)))
        elif given.model is not None:
            pairs = assets.demo_pairs()
        fit(model, pairs, given, Path(scratch))


def fit(start: str, pairs: list[Pair], given: argparse.Namespace, scratch: Path) -> None:
    """Train on most pairs, measure on the others, and save."""
    set_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, dtype=torch.float32
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    tokens = [list(map(len, ids(tokenizer, pairs, side))) for side in ("chosen", "rejected")]
    short = [p for p, a, b in zip(pairs, *tokens, strict=True) if max(a, b) <= given.max_length]
    train, held_out = split_by_prompt(short, given.held_out)
    train = train[: given.train]
    print(
        f"{len(train)} pairs to train on, {len(held_out)} held out; "
        f"{len(pairs) - len(short)} of {len(pairs)} have more than {given.max_length} tokens"
    )

    def collate(rows: list[Pair]) -> Any:
        both = {"input_ids": ids(tokenizer, rows, "chosen") + ids(tokenizer, rows, "rejected")}
        return tokenizer.pad(both, padding_side="right", return_tensors="pt")

    trainer = RewardTrainer(
        model,
        TrainingArguments(
            output_dir=str(scratch / "trainer"),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=given.learning_rate or (5e-5 if given.model else 1e-3),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=given.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,  # type: ignore[arg-type]
        data_collator=collate,
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "loss" in row:
            print(f"step {row['step']:3d}  loss {row['loss']:.4f}")

    out = str(given.out or scratch / "reward")
    trainer.save_model(out)
    tokenizer.save_pretrained(out)
    found = accuracies(out, held_out, 8)
    print(f"right on {len(held_out)} held-out pairs, 95 % bootstrap intervals:")
    for name, right in found.items():
        print(f"  {name:<12} {bootstrap(right)}")
    print(f"  difference   {bootstrap(found['reward'] - found['longer wins'])}")
    if given.out is not None:
        print(f"scorer: {{kind: reward_model, model: {given.out}}}")


if __name__ == "__main__":
    main()
