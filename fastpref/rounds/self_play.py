"""A trainer that writes its own negatives: a segment of each chosen response by its own average.

Every draw is seeded by the seed and the step, so there is no random state beside the buffer's
counts: a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpref import checkpoint
from fastpref.batches import count
from fastpref.config import PreferenceConfig
from fastpref.loop import Loop
from fastpref.reference_policy import AdapterOff, Frozen
from fastpref.rounds.examples import ends
from fastpref.rounds.replay import ReplayBuffer
from fastpref.rounds.run import Row, by_length, seed_of, write_jsonl
from fastpref.rounds.sampling import Sampling, transformers_generate
from fastpref.rounds.segments import choose_segment, ema_update, splice
from fastpref.trainer import PreferenceTrainer

STATE, AVERAGE, REFERENCE = "self_play.json", "average.safetensors", "reference.safetensors"
NEGATIVES = "negatives.jsonl"
UNUSABLE = {
    "sync_ref_model": "set ref_update_every and ref_update_mode",
    "precompute_ref_log_probs": "the negatives are made while training",
}
"""Options of a trainer that self-play has no use for, and why."""


@dataclass(frozen=True, kw_only=True)
class SelfPlay:
    """How negatives are made and drawn.

    Attributes:
        sampling: How a segment is written; ``max_new_tokens`` is its length.
        ema_decay: Share of its old weights that the average keeps at each step.
        buffer_capacity: Pairs that are kept to be drawn; the oldest go first.
        ref_update_every: Optimiser steps between updates of the reference; None: it stays.
        ref_update_mode: What it becomes: ``"ema"``, the average, or ``"policy"``.
        batch_size: Segments that are written at a time.

    Raises:
        ValueError: an option is out of range.
    """

    sampling: Sampling
    ema_decay: float = 0.5
    buffer_capacity: int = 2000
    ref_update_every: int | None = 108
    ref_update_mode: str = "ema"
    batch_size: int = 8

    def __post_init__(self) -> None:
        """See the class."""
        if self.sampling.n != 1 or self.sampling.backend != "transformers":
            raise ValueError(
                "sampling: a segment is written once, by the model in memory: expected n=1 and "
                f"backend='transformers', got {self.sampling.n} and {self.sampling.backend!r}"
            )
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay is a share: expected 0 to 1, got {self.ema_decay}")
        for name in ("buffer_capacity", "ref_update_every", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.ref_update_mode not in ("ema", "policy"):
            raise ValueError(
                f"ref_update_mode must be 'ema' or 'policy', got {self.ref_update_mode!r}"
            )


class Opponent:
    """The average of a policy, and the buffer of what it has written.

    Args:
        model: The policy as it starts, on its device.
        tokenizer: Of the policy.
        options: How.
        seed: Of everything that is drawn.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, options: SelfPlay, seed: int) -> None:
        """See the class."""
        self.average = twin(model)
        self.tokenizer, self.options, self.seed = tokenizer, options, seed
        self.ends = ends(tokenizer, getattr(model, "generation_config", None))
        self.buffer: ReplayBuffer[Row] = ReplayBuffer(options.buffer_capacity)
        self.tally = {"made": 0, "cut": 0, "unchanged": 0}
        """Of all negatives so far: how many, ended within the segment, equal to the chosen one."""

    def play(self, rows: Sequence[Row], step: int) -> list[Row]:
        """As many rows as are given, drawn from the buffer once it holds these rows' negatives.

        Args:
            rows: With ``example_ids``, ``prompt_ids`` and ``chosen_ids``.
            step: Optimiser steps done.

        Returns:
            ``{"example_ids", "start", "length", "rejected_ids"}``: the number of a row, the segment
            that was written anew, and the response with it.
        """
        draw = random.Random(seed_of(self.seed, "segments", step))
        segments = [
            choose_segment(len(row["chosen_ids"]), self.options.sampling.max_new_tokens, draw)
            for row in rows
        ]
        for row, (start, length), new in zip(
            rows, segments, self._write(rows, segments, step), strict=True
        ):
            chosen = row["chosen_ids"]
            rejected = splice(chosen, new, start, length, self.ends)
            self.tally["made"] += 1
            self.tally["cut"] += len(rejected) < len(chosen)
            self.tally["unchanged"] += rejected == chosen
            self.buffer.push(
                {
                    "example_ids": row["example_ids"],
                    "start": start,
                    "length": length,
                    "rejected_ids": rejected,
                }
            )
        return self.buffer.draw(len(rows), draw)

    def _write(
        self, rows: Sequence[Row], segments: Sequence[tuple[int, int]], step: int
    ) -> list[list[int]]:
        """New tokens for each row's segment, or up to an end token."""
        prefixes = [
            [*row["prompt_ids"], *row["chosen_ids"][:start]]
            for row, (start, _) in zip(rows, segments, strict=True)
        ]
        written: dict[int, list[int]] = {}
        device = next(self.average.parameters()).device
        # Training's own random state stays as it is, so that a resumed run finds the same.
        own = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(own, device_type=device.type):
            batches = by_length(list(map(len, prefixes)), self.options.batch_size)
            for number, indices in enumerate(batches):
                longest = max(segments[i][1] for i in indices)
                sampling = replace(self.options.sampling, max_new_tokens=longest)
                generate = transformers_generate(self.average, self.tokenizer, sampling, self.ends)
                seed = seed_of(self.seed, "tokens", step, number)
                answers = generate([prefixes[i] for i in indices], seed)
                written |= {i: answer[0] for i, answer in zip(indices, answers, strict=True)}
        return [written[i] for i in range(len(rows))]

    def statistics(self) -> dict[str, float]:
        """Of the negatives so far and the buffer now, by the names they are logged under."""
        made = max(self.tally["made"], 1)
        return {
            "negatives/made": self.tally["made"],
            "negatives/cut": self.tally["cut"] / made,
            "negatives/unchanged": self.tally["unchanged"] / made,
            "buffer/size": len(self.buffer),
            "buffer/draws": sum(self.buffer.counts) / max(len(self.buffer), 1),
        }

    def state_dict(self) -> dict[str, Any]:
        """Buffer and tally, as JSON can hold them."""
        return {"buffer": self.buffer.state_dict(), "tally": dict(self.tally)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.buffer.load_state_dict(state["buffer"])
        self.tally = dict(state["tally"])


class SelfPlayLoop(Loop):
    """The trainer's callback: moves average and reference, and keeps them in checkpoints.

    Args:
        trainer: A :class:`SelfPlayTrainer`.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the average follow the policy, and now and then the reference either of them."""
        super().on_step_end(args, state, control, **kwargs)
        trainer, options = self.trainer, self.trainer.self_play
        policy = weights(trainer.model, trainer.learned)
        average = weights(trainer.opponent.average, trainer.learned)
        ema_update(average.values(), policy.values(), options.ema_decay)
        if trainer.reference_moves and state.global_step % options.ref_update_every == 0:
            source = average if options.ref_update_mode == "ema" else policy
            ema_update(self._reference().values(), source.values(), 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what is left in the buffer for people to read, and the statistics."""
        trainer, folder = self.trainer, Path(args.output_dir)
        write_jsonl(folder / NEGATIVES, trainer.readable())
        checkpoint.write_json(folder / STATE, trainer.opponent.statistics())

    def save(self, folder: Path) -> None:
        """See :meth:`Loop.save`."""
        super().save(folder)
        trainer = self.trainer
        checkpoint.write_json(folder / STATE, trainer.opponent.state_dict())
        save_file(weights(trainer.opponent.average, trainer.learned), str(folder / AVERAGE))
        if trainer.reference_moves:
            save_file(self._reference(), str(folder / REFERENCE))

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        trainer = self.trainer
        trainer.opponent.load_state_dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
        models = {AVERAGE: weights(trainer.opponent.average, trainer.learned)}
        models |= {REFERENCE: self._reference()} if trainer.reference_moves else {}
        for file, own in models.items():
            saved = load_file(str(folder / file))
            ema_update(own.values(), [saved[name] for name in own], 0.0)

    def _refuse(self, step: int) -> None:
        self.trainer.opponent.load_state_dict(self.trainer.before)
        super()._refuse(step)

    def _reference(self) -> dict[str, Tensor]:
        return weights(self.trainer.reference.models[0], self.trainer.learned)


class SelfPlayTrainer(PreferenceTrainer):
    """A :class:`fastpref.PreferenceTrainer` on chosen responses alone; it writes the rejected ones.

    Before each optimiser step the average of the policy writes a segment of each of the step's
    chosen responses anew; the pairs go into a buffer, and the step trains on as many drawn from it.

    Args:
        model: As for :class:`fastpref.PreferenceTrainer`; the reference is a frozen copy of it.
        self_play: How negatives are made.
        args: A :class:`PreferenceConfig`.
        train_dataset: Rows with ``prompt_ids`` and ``chosen_ids``.
        **options: As for :class:`fastpref.PreferenceTrainer`.

    Raises:
        ValueError: an option has no use here.

    Source: Yin et al. 2024, arXiv:2405.20830 (SAPO).
    """

    loop_class = SelfPlayLoop

    def __init__(
        self,
        model: Any,
        *,
        self_play: SelfPlay,
        args: PreferenceConfig,
        train_dataset: Any,
        **options: Any,
    ) -> None:
        """See the class."""
        for name, why in UNUSABLE.items():
            if getattr(args, name):
                raise ValueError(f"training.{name} cannot be set: {why}")
        super().__init__(model, args=args, train_dataset=train_dataset, **options)
        if self.accelerator.num_processes > 1:
            raise ValueError("self-play has one buffer, and runs in one process: start one")
        self.self_play = self_play
        policy: Any = self.model
        self.learned = [name for name, p in policy.named_parameters() if p.requires_grad]
        self.opponent = Opponent(policy, self._tokenizer, self_play, args.seed)
        self.before = self.opponent.state_dict()
        if isinstance(self.reference, AdapterOff) and self_play.ref_update_every is not None:
            reference = Frozen([twin(policy)], is_start=True, **self.reference.options)
            reference.place(self.accelerator)
            self.reference = reference
        self.reference_moves = (
            isinstance(self.reference, Frozen) and self_play.ref_update_every is not None
        )
        numbers = self.train_dataset["example_ids"]
        self._places = {number: place for place, number in enumerate(numbers)}

    def _prepared(self, dataset: Any, name: str) -> Any:
        if name == "train":  # each step puts a negative in the place of this one
            dataset = dataset.add_column("rejected_ids", [ids[1:] for ids in dataset["chosen_ids"]])
        return super()._prepared(dataset, name)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step: as many pairs as its rows, drawn once their negatives are made."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        rows = [self._row(i) for batch in batches for i in batch["example_ids"].tolist()]
        self.before = self.opponent.state_dict()
        with self.compute_loss_context_manager():
            drawn = iter(self.opponent.play(rows, self.state.global_step))
        pairs = (
            {**self._row(item["example_ids"]), "rejected_ids": item["rejected_ids"]}
            for item in drawn
        )
        batches = [self.data_collator(list(islice(pairs, count(batch)))) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _row(self, number: int) -> Row:
        row: Row = self.train_dataset[self._places[number]]
        return row

    def drawn(self) -> list[Row]:
        """The pairs in the buffer that were trained on, as token ids, oldest first."""
        buffer = self.opponent.buffer
        return [
            {**self._row(item["example_ids"]), "rejected_ids": item["rejected_ids"]}
            for item, count in zip(buffer.items, buffer.counts, strict=True)
            if count
        ]

    def readable(self) -> list[Row]:
        """The pairs in the buffer as text, oldest first, with the number of times they were drawn.

        Returns:
            Rows ``{"prompt", "chosen", "rejected", "start", "length", "drawn"}``.
        """
        decode, found = self._tokenizer.decode, []
        buffer = self.opponent.buffer
        for item, drawn in zip(buffer.items, buffer.counts, strict=True):
            row = self._row(item["example_ids"])
            texts = {
                "prompt": row["prompt_ids"],
                "chosen": row["chosen_ids"],
                "rejected": item["rejected_ids"],
            }
            found.append(
                {name: decode(ids) for name, ids in texts.items()}
                | {"start": item["start"], "length": item["length"], "drawn": drawn}
            )
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See :meth:`PreferenceTrainer.log`."""
        if "loss" in logs:
            logs.update(self.opponent.statistics())
        super().log(logs, start_time)


def twin(model: nn.Module) -> Any:
    """A frozen copy that owns the weights that train, and shares the others."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Parameters by name, in the order of the names."""
    found = dict(model.named_parameters())
    return {name: found[name].detach() for name in names}
