"""The base of the recipes: options that all of them have, and how a run begins and ends."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from fastpref.config import PreferenceConfig
from fastpref.disk import write_text
from fastpref.models import load_tokenizer
from fastpref.recorder import resolved
from fastpref.rounds.evaluation import Evaluator, describe_pairs, trained_on
from fastpref.rounds.examples import read_examples, split_prompts, split_rounds
from fastpref.rounds.options import Options, as_options, build, check_types
from fastpref.rounds.pairs import Filter
from fastpref.rounds.report import report
from fastpref.rounds.run import Policy, Row, Rows, Run, policy_of
from fastpref.rounds.sampling import Sampling
from fastpref.rounds.scorer import Scorer
from fastpref.rounds.scorers import make_scorer
from fastpref.rounds.training import Training, pick_device
from fastpref.rounds.winrate import RESAMPLES

LEAST = {
    "held_out": 0,
    "resamples": 1,
    "batch_size": 1,
    "max_new_tokens": 1,
    "max_prompt_tokens": 1,
}
"""Least values of options that are numbers."""


@dataclass
class Outcome:
    """What a run made.

    Attributes:
        policy: The last policy.
        policies: Every policy, by the name of its stage.
        reports: A dict for each round: what its table shows.
        folder: The run directory.
    """

    policy: Policy
    policies: dict[str, Policy]
    reports: list[Row]
    folder: Path


@dataclass(kw_only=True)
class Recipe:
    """Options that every recipe has; ``run()`` does all rounds that are not done yet.

    Attributes:
        model: The policy to start from: a folder or hub name; safetensors.
        run_dir: Where every stage's result goes. The same again goes on where it stopped.
        dataset: A path, hub id, list of dicts or ``datasets.Dataset``.
        eval_dataset: Held-out prompts; None: ``held_out`` of those of ``dataset``.
        held_out: Prompts kept for evaluation, where there is no ``eval_dataset``; 0: none.
        judge: Compares answers to held-out prompts; a scorer as ``make_scorer`` takes it. None: the
            recipe's scorer.
        resamples: Bootstrap draws behind each interval.
        max_new_tokens: Longest answer to a held-out prompt; None: as in sampling, or 256.
        max_prompt_tokens: Rows with longer prompts are left out; None: none are.
        training: Options of :class:`fastpref.PreferenceConfig` for each training stage.
        lora: Arguments of ``peft.LoraConfig``: train an adapter each round, merged at its end.
        beta: Strength of the reference.
        seed: Of everything drawn at random.
        batch_size: Sequences at a time where models sample or score; a prompt's are never parted.
        dtype: Of models that sample or score.
        use_cpu: Leave a GPU alone.
        redo: Make stages anew whose inputs have changed, instead of stopping.
        model_options: More arguments of ``from_pretrained`` for policies.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """

    model: str
    run_dir: str
    dataset: Any
    eval_dataset: Any = None
    held_out: int = 32
    judge: Any = None
    resamples: int = RESAMPLES
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = 512
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    beta: float = 0.1
    seed: int = 0
    batch_size: int = 8
    dtype: str = "float32"
    use_cpu: bool = False
    redo: bool = False
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """See the class."""
        check_types(self)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must be float32, bfloat16 or the like, got {self.dtype!r}")
        if unknown := set(self.training) - {f.name for f in fields(PreferenceConfig) if f.init}:
            PreferenceConfig(
                **{name: self.training[name] for name in unknown}
            )  # raises, with hints
        self._judge: Scorer | None = None if self.judge is None else make_scorer(self.judge)
        self._training = Training(self.training, self.lora)
        self._reports: list[Row] = []
        self._policies: dict[str, Policy] = {}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Recipe:
        """The recipe with the options of a YAML file.

        Raises:
            TypeError: an option is missing or does not exist; the message names the nearest.
        """
        return build(cls, options, cls.__name__)

    def play(self, run: Run, start: Policy) -> Policy:
        """Do all rounds; the last policy. Each recipe's own."""
        raise NotImplementedError

    def run(self) -> Outcome:
        """Do what is not done yet, and return what the run made.

        Raises:
            ChangedError: a finished stage was made with other options; the message says which.
            RuntimeError: another process is at work in ``run_dir``, or several ranks were started.
            ModuleNotFoundError: what the reports are made with is not installed.
            KeyboardInterrupt: Ctrl-C; what was done is kept.
        """
        check_installed()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                "rounds run in one process: start it without torchrun or accelerate launch, and "
                "show it one GPU"
            )
        start = policy_of(self.model)
        run = Run(
            folder=Path(self.run_dir),
            tokenizer=load_tokenizer(start.path),
            device=pick_device(self.use_cpu),
            dtype=getattr(torch, self.dtype),
            seed=self.seed,
            batch_size=self.batch_size,
            redo=self.redo,
            model_options=dict(self.model_options),
        )
        self._reports, self._policies = [], {}
        with run.locked():
            path = run.folder / "config.yaml"
            if not path.exists():
                self._write_config(path)
            policy = self.play(run, start)
            self._write_config(path)
        return Outcome(policy, dict(self._policies), list(self._reports), run.folder)

    def closing(self, outcome: Outcome) -> str:
        """What the command says when all is done: where it is."""
        return f"the policy is in {outcome.policy.path}"

    def _write_config(self, path: Path) -> None:
        """Write the options as YAML, which runs again; it names those that YAML cannot hold."""
        written = copy.copy(self)
        for option in fields(self):
            setattr(written, option.name, as_yaml(getattr(self, option.name)))
        values = {name: value for name, value in resolved(written).items() if name != "redo"}
        lost = [f.name for f in fields(self) if f.name not in values and f.name != "redo"]
        note = f"# given in Python, and nothing that YAML can hold: {', '.join(lost)}\n"
        text = yaml.safe_dump({"recipe": type(self).__name__, **values}, sort_keys=False)
        write_text(path, (note if lost else "") + text)

    # What recipes share

    def _options(self, cls: type[Options], name: str) -> Options:
        """An option that holds options: what a mapping leaves out is as the recipe has it."""
        factory: Any = {f.name: f.default_factory for f in fields(self)}[name]
        default: Options = factory()
        return as_options(cls, getattr(self, name), name, default)

    def made_policy(self, name: str, policy: Policy) -> Policy:
        """Note a policy under its name, and return it."""
        self._policies[name] = policy
        return policy

    def examples(self, run: Run, *responses: str) -> tuple[Rows, Rows | None]:
        """Rows to train on and rows held out (None: evaluation is off), of no common prompt."""
        limit = self.max_prompt_tokens
        found = read_examples(self.dataset, run.tokenizer, responses, limit)
        if self.eval_dataset is not None:
            return found, read_examples(self.eval_dataset, run.tokenizer, responses, limit)
        if not self.held_out:
            return found, None
        return split_prompts(found, self.held_out, self.seed)

    def evaluator(
        self,
        run: Run,
        start: Policy,
        held_out: Rows | None,
        scorer: Scorer | None = None,
        max_new_tokens: int = 256,
    ) -> Evaluator | None:
        """What measures each round's policy on held-out prompts; None if there are none."""
        if held_out is None:
            return None
        return Evaluator(
            run,
            held_out,
            start,
            self.max_new_tokens or max_new_tokens,
            judge=self._judge or scorer,
            reward=None if scorer is None or scorer.comparative else scorer,
            resamples=self.resamples,
        )

    def report(
        self,
        run: Run,
        number: int,
        evaluator: Evaluator | None,
        before: Policy,
        after: Policy,
        *,
        data: Rows,
        pairs: Rows | None = None,
        filtered: Rows | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Write and print the report of a round.

        Args:
            run: The run.
            number: Of the round.
            evaluator: Measures the policies; None: nothing is held out.
            before: What the round began with.
            after: What it made; where it is another, its training stage knows the pairs.
            data: The rows of the dataset that the round draws on; it knows what was left out.
            pairs: Pairs made in the round, if any were.
            filtered: The samples that they were made of.
            training: What else the recipe has to show: values by name.
        """

        def content() -> Row:
            found: Row = {"policy": after.digest, "left_out": data.left_out}
            if pairs is not None:
                found["pairs"] = describe_pairs(pairs, filtered, self.resamples)
            if after.digest != before.digest:
                found["trained_on"] = trained_on(after, self.resamples)
            if training:
                found["training"] = dict(training)
            if evaluator is not None:
                found["held_out"] = evaluator.compare(f"round-{number}", before, after)
            return found

        inputs = {
            "before": before.digest,
            "after": after.digest,
            "left_out": data.left_out,
            "pairs": None if pairs is None else pairs.digest,
            "resamples": self.resamples,
            "training": dict(training or {}),
            "evaluation": None if evaluator is None else evaluator.describe(),
        }
        self._reports.append(report(run, number, inputs, content))


@dataclass(kw_only=True)
class Sampled(Recipe):
    """Options of recipes that sample from the policy.

    Attributes:
        sampling: How responses are drawn: a :class:`~fastpref.rounds.sampling.Sampling`, or a dict.
        filter: Which of them count: a :class:`~fastpref.rounds.pairs.Filter`, or a dict.
    """

    sampling: Any = field(default_factory=Sampling)
    filter: Any = field(default_factory=Filter)

    def __post_init__(self) -> None:
        """See the class."""
        super().__post_init__()
        self._sampling = self._options(Sampling, "sampling")
        self._filter = self._options(Filter, "filter")
        limits, new = self._training.limits(), self._sampling.max_new_tokens
        prompt = self.max_prompt_tokens or 0
        for option, limit, longest, what in (
            ("max_length", limits.max_length, prompt + new, "max_prompt_tokens + sampling.{}"),
            ("max_completion_length", limits.max_completion_length, new, "sampling.{}"),
            ("max_prompt_length", limits.max_prompt_length, prompt, "max_prompt_tokens"),
        ):
            if limit is not None and longest > limit:
                raise ValueError(
                    f"{what.format('max_new_tokens')} is {longest}, training.{option} is {limit}: "
                    "samples would be cut before they are trained on. Lower the former, or raise "
                    f"training.{option}"
                )


@dataclass(kw_only=True)
class OnPolicy(Sampled):
    """Options of recipes that sample in each round.

    Attributes:
        rounds: How many.
        prompts_per_round: Prompts of each round; None: all, in equal parts.
    """

    rounds: int = 3
    prompts_per_round: int | None = None

    def __post_init__(self) -> None:
        """See the class."""
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.prompts_per_round is not None and self.prompts_per_round < 1:
            raise ValueError(
                f"prompts_per_round must be at least 1, or None for all, got "
                f"{self.prompts_per_round}"
            )

    def parts(self, prompts: Rows) -> list[Rows]:
        """The prompts of each round."""
        return split_rounds(prompts, self.rounds, self.seed, self.prompts_per_round)


def as_yaml(value: Any) -> Any:
    """Options that are objects as their options, and tuples as lists, which YAML reads back."""
    if isinstance(value, (Sampling, Filter)):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: as_yaml(item) for name, item in value.items()}
    return [as_yaml(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_installed() -> None:
    """Raise ``ModuleNotFoundError`` now, and not after a training, if a report cannot be made."""
    try:
        import scipy.stats  # noqa: F401
        import sklearn.linear_model  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the reports of rounds need {error.name}, which is not installed; this adds it: pip "
            'install "fastpref[rounds]"',
            name=error.name,
        ) from error
