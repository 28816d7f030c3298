"""A ``transformers.Trainer`` that can be stopped at any time and goes on as if it had not been."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints

from fastpref import checkpoint
from fastpref.card import model_card
from fastpref.data.sampling import EvenTokens
from fastpref.disk import write_text

logger = logging.getLogger("fastpref")


@contextmanager
def holding(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of ``target`` with other values within."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


class SeededByLength(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' ``group_by_length``, whose order is of seed and epoch alone: one that starts in
    the middle of a run finds the order of its epoch again.

    Args:
        seed: Of the shuffle.
        **options: Of transformers.
    """

    def __init__(self, seed: int, **options: Any) -> None:
        """See the class."""
        super().__init__(**options)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Indices of the epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        found: Iterator[int] = super().__iter__()
        return found


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Checkpoints are whole or not there; Ctrl-C finishes the step and saves.

    A subclass sets ``loop``, a :class:`fastpref.loop.Loop`, ``meter`` and ``ranks``, and overrides
    ``checkpoint_content``.
    """

    loop: Any
    meter: Any
    ranks: Any
    current_flos: float
    _globalstep_last_logged: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``transformers.Trainer``."""
        self.run_id = uuid.uuid4().hex
        self._staging: Path | None = None
        self.grad_norm: Any = None
        super().__init__(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """transformers', kept for the loop to look at before the weights change."""
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """transformers', whose log is summed over the ranks and read with the metrics, at once."""
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0:
            beside = {"summed": tr_loss, "flos": self.current_flos}
            if grad_norm is not None:  # of FSDP2 in parts
                full = getattr(grad_norm, "full_tensor", None)
                beside["grad_norm"] = grad_norm if full is None else full()
            if found := self.meter.read(self.ranks.sum, beside=beside):
                summed = found.pop("summed")
                rate = self._get_learning_rate() if learning_rate is None else learning_rate
                self.state.total_flos += found.pop("flos") * self.accelerator.num_processes
                self.current_flos = 0
                tr_loss.zero_()
                self._total_loss_scalar += summed
                self._globalstep_last_logged = self.state.global_step
                own = {"loss": summed / steps, "learning_rate": rate}
                self.log(own | found | own, start_time)
        super()._maybe_log_save_evaluate(
            *(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time),
            learning_rate=learning_rate,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """transformers', seeded anew each epoch, and the one of ``even_tokens``."""
        args, data = self.args, self.train_dataset if train_dataset is None else train_dataset
        strategy, micro = args.train_sampling_strategy, args.gradient_accumulation_steps
        if strategy not in ("even_tokens", "group_by_length"):
            return super()._get_train_sampler(data)
        seed = args.seed if args.data_seed is None else args.data_seed
        sizes, size = data[args.length_column_name][:], self._train_batch_size
        if strategy == "even_tokens":
            return EvenTokens(sizes, size, micro * args.world_size, seed)
        return SeededByLength(seed, batch_size=size * micro, lengths=sizes)

    def checkpoint_content(self) -> dict[str, Any]:
        """What the checkpoint's ``fastpref.json`` holds beside its list of files."""
        return {"run": self.run_id, "step": self.state.global_step}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; Ctrl-C finishes the step, saves, and raises ``KeyboardInterrupt``.

        Args:
            resume_from_checkpoint: A checkpoint's path, or True for the last whole one of the run.
            trial: Of a hyper-parameter search.
            ignore_keys_for_eval: As in transformers.

        Raises:
            ValueError: There is no whole checkpoint to resume from, it holds the model alone, or
                ranks find different ones.
            FloatingPointError: A loss or a gradient is not finite; the state before the step is
                saved, unless its weights are not finite either. Or a checkpoint was due and the
                weights are not finite; nothing is saved.
        """
        self.run_id = self.ranks.objects([self.run_id])[0]  # one for all ranks
        path = self._checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        old = [p.name for p in Path(self.args.output_dir).glob("checkpoint-*")] if not path else []
        if old and self.is_world_process_zero():
            logger.warning(
                "%s has %s of an earlier run; of the same steps they are replaced. To go on from "
                "the last: resume_from_checkpoint=True",
                self.args.output_dir,
                ", ".join(sorted(old)),
            )
        self.loop.resumed = path
        with self.loop.interrupt.listening():
            output = super().train(None if path is None else str(path), trial, ignore_keys_for_eval)
        if self.loop.stopping:
            raise KeyboardInterrupt(
                f"stopped after step {self.state.global_step} and saved; go on with "
                "trainer.train(resume_from_checkpoint=True)"
            )
        return output

    def _checkpoint(self, given: str | bool) -> Path:
        """The checkpoint to go on from, if every rank finds the same."""
        path, wrong = Path(), ""
        try:
            found = checkpoint.last_complete(self.args.output_dir) if given is True else None
            path = found or checkpoint.verify(str(given))
            checkpoint.check_state(path)
        except ValueError as error:
            wrong = str(error)
        answers = self.ranks.objects([(path.name, wrong)])
        if len({name for name, _ in answers}) > 1 or len({bool(why) for _, why in answers}) > 1:
            said = "; ".join(f"rank {r}: {why or name}" for r, (name, why) in enumerate(answers))
            raise ValueError(
                f"the ranks cannot go on from one checkpoint. {said}. Where machines have a disk "
                "each, save with save_on_each_node=True"
            )
        if wrong:
            raise ValueError(wrong)
        return path

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write ``README.md`` into the run's directory, as :func:`fastpref.card.model_card` has it.

        ``push_to_hub`` calls this with its own further arguments.

        Args:
            model_name: Title; None: the directory's name.
            dataset_name: What the model was trained on; None: not said.
            tags: For the hub, beside those of the losses.
        """
        if self.is_world_process_zero():
            text = model_card(
                self.accelerator.unwrap_model(self.model),
                self.args,
                model_name=model_name,
                dataset_name=dataset_name,
                tags=[tags] if isinstance(tags, str) else tags or [],
            )
            write_text(Path(self.args.output_dir, "README.md"), text)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers', in which each file of the folder is whole, or what it was before.

        Args:
            output_dir: The folder; None: that of the run.
            _internal_call: As in transformers.
        """
        if self._staging is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        staging, card = folder / checkpoint.STAGING / "model", folder / "README.md"
        divided = self.is_fsdp_enabled or self.is_deepspeed_enabled  # else one rank may come alone
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            if card.exists():  # which PEFT adds to
                shutil.copy(card, staging)
        if divided:
            self.accelerator.wait_for_everyone()
        super().save_model(str(staging), True)
        if divided:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.merge(staging, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """transformers'; a run that stops early goes on later: it keeps its last checkpoint, and
        the best weights are not loaded."""
        kept = {"save_total_limit": None, "load_best_model_at_end": False}
        with holding(self.args, **(kept if self.loop.stopping else {})):
            return super()._finalize_training(*args, **kwargs)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' checkpoint and ours, whole or not at all."""
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        final, started = run_dir / f"checkpoint-{step}", time.perf_counter()
        if (checkpoint.manifest(final) or {}).get("run") == self.run_id:
            return
        if self.loop.broken():
            raise FloatingPointError(
                f"the weights after step {step} are not finite, though every loss and gradient "
                "was: they are not saved, and the checkpoints before are kept. Go on from the last "
                "with a lower learning_rate, or max_grad_norm set, or in bf16 rather than fp16"
            )
        # A run that stops early goes on later.
        whole = {"save_only_model": False} if self.loop.stopping else {}
        content = self.checkpoint_content()
        with checkpoint.staged(
            run_dir,
            final.name,
            content,
            writes=self.args.should_save,
            cleans=self.accelerator.is_local_main_process,
            barrier=self.accelerator.wait_for_everyone,
        ) as folder:
            self._staging = folder.parent
            try:
                with holding(self.args, **whole):
                    super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self.loop.save(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)
        self.meter.skip(time.perf_counter() - started)
