"""Two rounds of a recipe on SmolLM2-135M-Instruct with real prompts, rewarded for friendly words.

    python benchmarks/recipes/real.py dpo                  # round 0 of DICE; made once
    python benchmarks/recipes/real.py ilr_dpo --seed 0     # minutes; the same again goes on
    python benchmarks/recipes/real.py dice --seed 0
    python benchmarks/recipes/real_table.py                # rows and table of what is finished

Model, prompts and pairs are those of ``fastpref demo``. The reward is transparent, not learned: the
compound score of VADER (Hutto and Gilbert 2014), a lexicon of how positive words are, in [-1, 1];
``pip install vaderSentiment==3.3.2``. iLR-DPO is trained on it; DICE is only measured with it.
The held-out prompts are the same for every seed, and were not looked at to choose the settings:
those come from ``--dry`` runs, which hold out other prompts. A run writes ``row.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastpref import assets, checkpoint, rounds
from fastpref.demo import split_by_prompt
from fastpref.models import load_tokenizer
from fastpref.provenance import commit, device_name, versions
from fastpref.rounds.examples import read_examples
from fastpref.rounds.run import read_jsonl

RUNS = Path("runs/real")
ROUNDS, PROMPTS, HELD_OUT = 2, 28, 24
PROMPT_TOKENS, NEW_TOKENS = 128, 48

Pairs = list[dict[str, Any]]
Reward = Callable[[Any, str], float]


@functools.cache
def analyzer() -> Any:
    """VADER.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("the reward is VADER's: pip install vaderSentiment==3.3.2") from error
    return SentimentIntensityAnalyzer()


def friendly(prompt: Any, response: str) -> float:
    """VADER's compound score of a response, in [-1, 1]; 0 for one without a word of its lexicon."""
    return float(analyzer().polarity_scores(response)["compound"])


def data(model: str, dry: bool) -> tuple[Pairs, Pairs]:
    """The packaged pairs with short prompts: those to train on, and others held out.

    Args:
        model: Its tokenizer counts.
        dry: Hold out some of the training pairs; the held-out ones are not touched.
    """
    rows = assets.demo_pairs()
    short = read_examples(rows, load_tokenizer(model), max_prompt_tokens=PROMPT_TOKENS)
    train, held_out = split_by_prompt([rows[row["id"]] for row in short], HELD_OUT)
    return split_by_prompt(train, HELD_OUT, seed=1) if dry else (train, held_out)


def options(model: str, run_dir: Path, seed: int, train: Pairs, held_out: Pairs) -> dict[str, Any]:
    """What all recipes here share."""
    return {
        "model": model,
        "run_dir": str(run_dir),
        "seed": seed,
        "dataset": train,
        "eval_dataset": held_out,
        "max_prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": NEW_TOKENS,
        "batch_size": 24,
        "resamples": 2000,
        "use_cpu": True,
        "training": {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant",
            "max_length": PROMPT_TOKENS + NEW_TOKENS,
            "max_completion_length": NEW_TOKENS,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
        },
    }


def sampled(temperature: float) -> dict[str, Any]:
    """What both recipes that sample share: short answers, cut off rather than finished."""
    return {
        "rounds": ROUNDS,
        "prompts_per_round": PROMPTS,
        "sampling": {"n": 4, "temperature": temperature, "max_new_tokens": NEW_TOKENS},
        "filter": {"unfinished": True, "min_responses": 2},
    }


def recipe(name: str, tuned: str, reward: Reward, given: dict[str, Any]) -> rounds.Recipe:
    """The recipe: ``dpo``, ``ilr_dpo`` or ``dice``.

    Args:
        name: Of the recipe.
        tuned: Where ``dpo`` puts the policy that DICE starts from.
        reward: Of single responses.
        given: Of :func:`options`.
    """
    if name == "dpo":
        return rounds.SDPO(stages="fractions", fractions=(1.0,), probe=4, **given)
    if name == "ilr_dpo":
        # as many steps a round as DICE has, which trains on as many offline pairs again
        given = {**given, "training": {**given["training"], "per_device_train_batch_size": 2}}
        return rounds.ILRDPO(scorer=rounds.Function(reward), **sampled(1.0), **given)
    start = {**given, "model": tuned, "initial_reference": given["model"]}
    return rounds.DICE(judge=rounds.Function(reward), **sampled(0.9), **start)


def row(name: str, seed: int, dry: bool, outcome: rounds.Outcome, command: str) -> dict[str, Any]:
    """A finished run as a row: its reports, and each held-out answer's reward and length."""
    folder = outcome.folder

    def of_each(stage: str, value: Callable[[dict[str, Any]], float]) -> list[list[float]]:
        """By round, the start first: a number for each held-out prompt."""
        paths = [folder / f"round-{k}" / stage / "rows.jsonl" for k in range(ROUNDS + 1)]
        return [[value(one) for one in read_jsonl(path)] for path in paths]

    stages = [checkpoint.manifest(path.parent) or {} for path in folder.rglob(checkpoint.MANIFEST)]
    return {
        "recipe": name,
        "seed": seed,
        "dry": dry,
        "model": "SmolLM2-135M-Instruct",
        "rounds": [{k: v for k, v in r.items() if k != "policy"} for r in outcome.reports],
        "rewards": of_each("rewards", lambda one: one["scores"][0]),
        "characters": of_each("answers", lambda one: len(one["responses"][0]["text"])),
        # a report's time is that of the stages made for it
        "seconds": sum(s["seconds"] for s in stages if not s["stage"].endswith("/report")),
        "device": device_name("wall"),
        "measured": True,
        "versions": versions("cpu", "transformers", "vaderSentiment"),
        "commit": commit(),
        "command": command,
    }


def main(argv: Sequence[str]) -> int:
    """Runs a recipe; 0."""
    parser = argparse.ArgumentParser(prog="real.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", choices=("dpo", "ilr_dpo", "dice"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help=f"default {RUNS}/RECIPE-SEED")
    parser.add_argument("--dry", action="store_true", help="hold out other prompts")
    given = parser.parse_args(argv)
    name = "dpo" if given.recipe == "dpo" else f"{given.recipe}-{given.seed}"
    home = RUNS / "dry" if given.dry else RUNS
    run_dir = given.run_dir or home / name
    analyzer()
    model = str(assets.demo_model())
    tuned = home / "dpo" / "round-1" / "train" / "model"
    if given.recipe == "dice" and not tuned.exists():
        raise FileNotFoundError(f"{tuned} is not there: run real.py dpo first")
    shared = options(model, run_dir, given.seed, *data(model, given.dry))
    outcome = recipe(given.recipe, str(tuned), friendly, shared).run()
    if given.recipe != "dpo":
        command = shlex.join(["python", "benchmarks/recipes/real.py", *argv])
        found = row(given.recipe, given.seed, given.dry, outcome, command)
        checkpoint.write_json(run_dir / "row.json", found)
        print(json.dumps(found["rounds"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
