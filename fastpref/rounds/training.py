"""A stage that trains: one policy in, the next one out, by :class:`fastpref.PreferenceTrainer`.

The trainer's checkpoints lie in the stage's folder while it is made, so a killed stage goes on from
the last of them, exactly as the trainer does; they go when the policy is written.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpref import checkpoint, losses
from fastpref.config import PreferenceConfig
from fastpref.data.rows import Limits
from fastpref.recorder import draw_run, record, resolved
from fastpref.rounds.run import Policy, Row, Rows, Run, digest, given_rows, seed_of
from fastpref.trainer import PreferenceTrainer

logger = logging.getLogger("fastpref")

MODEL, TRAINER, PAIRS = "model", "trainer", "pairs.json"

SILENT = frozenset(
    "logging_steps logging_first_step logging_strategy save_steps save_strategy save_total_limit "
    "disable_tqdm report_to run_name dataloader_num_workers dataset_num_proc".split()
)
"""Options of a trainer that do not change what it trains."""
OURS = {
    "output_dir": "a stage has a folder of the run directory",
    "loss_type": "the recipe chooses the loss",
    "loss_args": "the recipe has options for the loss",
    "beta": "set the recipe's beta",
    "seed": "set the recipe's seed",
    "use_cpu": "set the recipe's use_cpu",
    "ref_models": "the recipe chooses the reference",
    "reference_free": "the recipe chooses the reference",
    "resume_from_checkpoint": "a run goes on by itself",
}
"""Options of a trainer that a recipe sets, and what to do instead."""
COLUMNS = (
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "third_ids",
    "chosen_margins",
    "rejected_margins",
    "prior_chosen",
    "prior_rejected",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "weight",
)
"""Columns of a pair that a trainer is given."""


@dataclass(frozen=True)
class Loss:
    """What a stage minimises.

    Attributes:
        name: A loss of :mod:`fastpref.losses`.
        beta: Strength of the reference.
        arguments: More hyper-parameters.

    Raises:
        ValueError: there is no such loss, or a value is out of its range.
        TypeError: it has no such hyper-parameter.
    """

    name: str
    beta: float
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """See the class."""
        losses.combine(self.name, args={self.name: self.arguments}, beta=self.beta)


@dataclass(frozen=True)
class Training:
    """How every stage of a run trains.

    Attributes:
        options: Of a :class:`fastpref.PreferenceConfig`.
        lora: Arguments of a ``peft.LoraConfig``: a fresh adapter each stage, merged at its end; or
            None: all weights.

    Raises:
        ValueError: an option is the recipe's to set.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """See the class."""
        for name in self.options:
            if name in OURS:
                raise ValueError(f"training.{name} cannot be set: {OURS[name]}")

    def limits(self) -> Limits:
        """How long prompts and responses may be, in tokens; what is longer is cut."""
        names = {f.name for f in fields(Limits)} & {f.name for f in fields(PreferenceConfig)}
        return Limits(**{n: self.options.get(n, getattr(PreferenceConfig, n)) for n in names})

    def describe(self) -> dict[str, Any]:
        """What the trained weights depend on, as flat values."""
        given = {k: v for k, v in self.options.items() if k not in SILENT}
        found = {f"training.{name}": value for name, value in given.items()}
        return found | ({} if self.lora is None else {"lora": dict(self.lora)})


Build = Callable[..., PreferenceTrainer]
PairsOf = Callable[[Any], Iterable[Row]]
"""A trainer that has trained in; what it trained on out: rows with the ids of its responses."""


def of_dataset(trainer: PreferenceTrainer) -> Iterable[Row]:
    """The responses of a trainer's dataset, as they were cut."""
    wanted = ("chosen_ids", "rejected_ids", "completion_ids", "label")
    found = [name for name in wanted if name in trainer.train_dataset.column_names]
    rows: Iterable[Row] = trainer.train_dataset.select_columns(found)
    return rows


def train(
    run: Run,
    name: str,
    pairs: Sequence[Row],
    *,
    start: Policy,
    reference: Policy | None,
    loss: Loss,
    training: Training,
    build: Build = PreferenceTrainer,
    pairs_of: PairsOf = of_dataset,
    extra: Mapping[str, Any] | None = None,
    draw: str | None = None,
) -> Policy:
    """A policy trained on pairs, as a stage.

    Args:
        run: The run.
        name: Of the stage.
        pairs: Rows with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and whatever else the loss
            takes (:data:`COLUMNS`); or rows of a dataset as :mod:`fastpref.data.formats` reads
            them.
        start: Policy to go on from.
        reference: The reference; ``start`` itself means a frozen copy of it, and then the first
            loss must be that of a margin of 0; None: the loss needs none, or the pairs bring its
            sums.
        loss: What to minimise.
        training: How.
        build: Makes the trainer, with :class:`fastpref.PreferenceTrainer`'s arguments.
        pairs_of: Says what it trained on.
        extra: More that the result depends on.
        draw: What the seed comes from, beside the run's: stages with the same one see their pairs
            in the same order; None: the stage's name.

    Returns:
        The policy. Beside it the folder holds the trainer's metrics, curves and config, and in
        ``pairs.json`` what was trained on, for :func:`fastpref.rounds.evaluation.trained_on`.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was trained is kept.
    """
    seed = seed_of(run.seed, draw or name) % 2**31
    inputs = {
        "pairs": digest([_columns(row) for row in pairs]),
        "start": start.digest,
        "reference": None if reference is None else reference.digest,
        "loss": loss.name,
        "beta": loss.beta,
        "loss_args": dict(loss.arguments),
        "seed": seed,
        "device": run.device.type,
        **({"model_options": run.model_options} if run.model_options else {}),
        **training.describe(),
        **(extra or {}),
    }
    own = reference is not None and reference.digest == start.digest

    def make(folder: Path) -> None:
        if not (folder / MODEL).exists():  # else killed between here and the folder's renaming
            fit(folder)
        for path in (folder / TRAINER).glob("checkpoint-*"):
            shutil.rmtree(path)

    def fit(folder: Path) -> None:
        config = _config(run, folder / TRAINER, loss, training, seed)
        values = resolved(config)
        from datasets import Dataset

        trainer = build(
            start.path,
            ref_model=None if own or reference is None else reference.path,
            args=config,
            train_dataset=Dataset.from_list([_columns(row) for row in pairs]),
            processing_class=run.tokenizer,
            peft_config=_lora(training),
        )
        record(trainer, values)
        try:
            trainer.train(resume_from_checkpoint=_has_checkpoint(folder / TRAINER))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped in {name}; what was done is kept, and the same command goes on"
            ) from None
        draw_run(folder / TRAINER)
        checkpoint.write_json(folder / PAIRS, _lengths(run, trainer, pairs_of(trainer)))
        _write_policy(run, trainer, folder)

    folder = run.stage(name, inputs, make)
    manifest = checkpoint.manifest(folder) or {}
    return Policy(str(folder / MODEL), manifest["digest"])


def _lengths(run: Run, trainer: PreferenceTrainer, rows: Iterable[Row]) -> Row:
    """Lengths of the responses that were trained on, and what became of the others."""
    paired, ids = True, {"chosen": list[list[int]](), "rejected": list[list[int]]()}
    for row in rows:
        if "label" in row:  # a loss of single examples, which came in pairs
            paired = False
            ids["chosen" if row["label"] else "rejected"].append(row["completion_ids"])
        else:
            for side, found in ids.items():
                found.append(row[f"{side}_ids"])
    report = trainer.data_reports["train"]
    decode = partial(run.tokenizer.batch_decode, skip_special_tokens=True)
    return {
        "paired": paired,
        "left_out": report.dropped,
        "notes": report.notes,
        "tokens": {side: list(map(len, found)) for side, found in ids.items()},
        "characters": {side: list(map(len, decode(found))) for side, found in ids.items()},
    }


def _columns(row: Row) -> Row:
    if "chosen_ids" not in row:
        return row
    return {name: row[name] for name in COLUMNS if name in row}


def _config(run: Run, folder: Path, loss: Loss, training: Training, seed: int) -> PreferenceConfig:
    options = {
        "logging_first_step": True,
        "save_steps": 200,
        "save_total_limit": 1,
        "dataloader_pin_memory": run.device.type == "cuda",
        **training.options,
        "output_dir": str(folder),
        "loss_type": loss.name,
        "loss_args": dict(loss.arguments),
        "beta": loss.beta,
        "seed": seed,
        "use_cpu": run.device.type == "cpu",
    }
    if run.model_options:
        options["model_init_kwargs"] = {
            **run.model_options,
            **(options.get("model_init_kwargs") or {}),
        }
    return PreferenceConfig(**options)


def _lora(training: Training) -> Any:
    if training.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **training.lora)


def _has_checkpoint(folder: Path) -> bool:
    return any(checkpoint.fault(path) is None for path in folder.glob("checkpoint-*"))


def _write_policy(run: Run, trainer: PreferenceTrainer, folder: Path) -> None:
    """Write the model, adapters merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    writing = folder / f"{MODEL}.writing"
    shutil.rmtree(writing, ignore_errors=True)
    model.save_pretrained(writing)
    run.tokenizer.save_pretrained(writing)
    writing.replace(folder / MODEL)


def first_loss(policy: Policy) -> float | None:
    """The loss of a trained policy's first logged step; None if nothing was logged."""
    path = Path(policy.path).parent / TRAINER / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        row = json.loads(line)
        if "loss" in row:
            return float(row["loss"])
    return None


def token_rows(pairs: Sequence[Row]) -> Rows:
    """Pairs as groups of two responses, chosen first, for scorers and likelihoods."""
    return given_rows(
        [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "prompt_ids": row["prompt_ids"],
                "responses": [
                    {"text": row[side], "ids": row[f"{side}_ids"], "finished": True}
                    for side in ("chosen", "rejected")
                ],
            }
            for row in pairs
        ]
    )


def uncut(examples: Rows, training: Training) -> Rows:
    """The rows that training does not cut: numbers taken from whole responses are right for them.

    Args:
        examples: Rows with ``prompt_ids`` and ``responses``.
        training: How they are trained on.

    Returns:
        The rows left; the log says how many are not, and ``left_out`` of the result.

    Raises:
        ValueError: none is left.
    """
    limits = training.limits()

    def whole(row: Row) -> bool:
        prompt, lengths = len(row["prompt_ids"]), [len(r["ids"]) for r in row["responses"]]
        kept = (slice(0, prompt), [slice(0, length) for length in lengths])
        return limits.cuts(prompt, lengths) == kept

    kept = [row for row in examples if whole(row)]
    if not kept:
        raise ValueError(
            f"all {len(examples)} pairs are longer than training reads: raise training.max_length"
        )
    if len(kept) < len(examples):
        logger.warning(
            "%d pairs are longer than training reads (training.max_length and the like) and are "
            "left out, %d remain",
            len(examples) - len(kept),
            len(kept),
        )
    cut = {"longer than training reads": len(examples) - len(kept)}
    return given_rows(kept, {**examples.left_out, **cut})


def pick_device(use_cpu: bool) -> torch.device:
    """The accelerator, or the CPU where there is none or it is asked for."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else found
