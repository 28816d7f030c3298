"""What happens between steps: checks, stopping, and what a resumed run goes on from."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpref import checkpoint, moving, selfcheck
from fastpref.data.formats import response_names
from fastpref.data.sampling import set_epoch
from fastpref.metrics import Meter
from fastpref.reference_policy import Frozen

logger = logging.getLogger("fastpref")


class _Snapshot(NamedTuple):
    """What a step changes before it can be seen that it must not be taken."""

    loss: Tensor
    meter: Meter
    states: Mapping[str, Any]


def whole(x: Any) -> Tensor:
    """Whether all numbers are finite, of this rank's part."""
    local: Tensor = x.to_local() if hasattr(x, "to_local") else torch.as_tensor(x)
    return local.isfinite().all()


class Loop(TrainerCallback):  # type: ignore[misc]
    """The trainer's own callback. Reads the device once an optimiser step, for both stop signals.

    Args:
        trainer: A :class:`fastpref.PreferenceTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        """See the class."""
        self.trainer = trainer
        self.interrupt = checkpoint.Interrupt()
        self.stopping = False
        """All ranks agreed to stop after this step."""
        self.checked = False
        """The model was compared with itself."""
        self.resumed: Path | None = None
        """Checkpoint that the run goes on from."""
        self._window: list[tuple[Tensor, Tensor]] = []
        self._before: _Snapshot | None = None

    def note(self, example_ids: Tensor, losses: Tensor) -> None:
        """Remember a micro-batch of this optimiser step."""
        self._window.append((example_ids, losses.detach()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what a checkpoint holds beside transformers' own, and check the model."""
        trainer = self.trainer
        if args.fsdp and not trainer.is_fsdp_enabled:
            raise ValueError(
                "fsdp is set, but Accelerate shards no model on a CPU: every process would train a "
                "whole one. Drop fsdp, or run on accelerators"
            )
        self.stopping = False
        if self.resumed is not None:
            self._restore(self.resumed)
        if state.is_world_process_zero:
            trainer.metrics_file.begin(state.global_step)
        if args.self_check:
            self.check(trainer.train_dataset, fresh=state.global_step == 0)
        trainer.meter.restart()

    def check(self, dataset: Any, fresh: bool) -> None:
        """Compare the fused head, the packed rows and the reference with the model itself.

        A model that cannot read packed rows gets a row for each sequence from here on.
        """
        trainer = self.trainer
        self.checked = True
        rows = list(islice(dataset, 2))
        names = response_names(rows[0], trainer.combined.kind)
        examples = [selfcheck.shorten(row, names) for row in rows]

        def collate(rows: list[Any]) -> Any:
            return trainer._prepare_inputs(trainer.data_collator(rows))

        model, options = trainer.model_wrapped, trainer.head_options
        with trainer.accelerator.autocast():
            selfcheck.check_or_unpack(
                model, examples, collate, names, trainer.data_collator, **options
            )
            if trainer.reference.live and not trainer.reference.reads_texts:
                start = fresh and trainer.reference.is_start
                batch = collate(examples)
                selfcheck.check_reference(model, trainer.reference, batch, start=start, **options)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that goes on reads the rest of the epoch it was in, on every rank."""
        set_epoch(kwargs["train_dataloader"], int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the state before the step."""
        trainer = self.trainer
        self._window = []
        states = copy.deepcopy(trainer.combined.states)
        self._before = _Snapshot(trainer._tr_loss.clone(), copy.copy(trainer.meter), states)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the weights change: is every loss finite, and does anyone want to stop?"""
        trainer = self.trainer
        finite = torch.stack([losses.isfinite().all() for _, losses in self._window]).all()
        if trainer.grad_norm is not None and not args.fp16:  # a scaler skips such steps itself
            finite = finite & whole(trainer.grad_norm).to(finite.device)
        asked = torch.full_like(finite, self.interrupt.asked)
        flags = trainer.ranks.sum(torch.stack([~finite, asked]).double()).tolist()
        if flags[0]:
            self._refuse(state.global_step)
        self.stopping = bool(flags[1])

    def _refuse(self, step: int) -> None:
        """Save the state before this step, and say which examples' loss is not finite."""
        trainer, before = self.trainer, self._before
        assert before is not None
        rank = trainer.accelerator.process_index
        ids = [i[~losses.isfinite()].tolist() for i, losses in self._window]
        found = trainer.ranks.objects([(rank, [i for part in ids for i in part])])
        where = "; ".join(f"rank {r}: examples {sorted(set(i))}" for r, i in found if i)
        what = "the loss" if where else "the gradient"
        where = where or f"the losses of its examples are, rank 0: {self._window[0][0].tolist()}"
        trainer._tr_loss.copy_(before.loss)
        trainer.meter = before.meter
        for name, saved in before.states.items():
            trainer.combined.states[name].load_state_dict(saved.state_dict())
        if self.broken():
            state = "The weights are not finite either, and are not saved: take the last checkpoint"
        else:
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)
            state = f"The state before that step is saved in {trainer.checkpoint_path(step)}"
        raise FloatingPointError(
            f"{what} of step {step + 1} is not finite; {where} (row numbers of the training "
            f"dataset). {state}. "
            "Look at those rows; if they are fine, the step before has broken the weights: lower "
            "learning_rate, set max_grad_norm, or train in bf16 rather than fp16."
        )

    def broken(self) -> bool:
        """Whether a weight that trains is not finite, on any rank; one reduction and host sync."""
        trainer = self.trainer
        # of ZeRO-3 this rank's part
        parts = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]
        device = trainer.accelerator.device
        broken = torch.stack([~whole(part.detach()).to(device) for part in parts]).any()
        return bool(trainer.ranks.sum(broken.double()[None]).item())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move a reference that follows the policy; stop if all agreed to."""
        trainer = self.trainer
        trainer.meter.end_step()
        reference = trainer.reference
        moves = args.sync_ref_model and state.global_step % args.ref_model_sync_steps == 0
        if moves and isinstance(reference, Frozen):
            moving.move_towards(reference.models[0], trainer.model, args.ref_model_mixup_alpha)
        if self.stopping:
            control.should_save = True
            control.should_training_stop = True

    def save(self, folder: Path) -> None:
        """Write what this rank needs to go on as if it had not stopped."""
        trainer = self.trainer
        content = {
            "ranks": trainer.accelerator.num_processes,
            "loss_since_log": trainer._tr_loss.item(),
            "last_logged": trainer._globalstep_last_logged,
            "meter": trainer.meter.state_dict(),
        }
        checkpoint.write_json(folder / self._rank_file(), content)
        if trainer.args.sync_ref_model:
            moving.save(trainer.reference.models[0], folder, trainer.args.should_save)

    def _restore(self, folder: Path) -> None:
        trainer = self.trainer
        saved = checkpoint.manifest(folder)
        if saved is None:
            return
        trainer.combined.load_state_dict(saved["losses"])
        if trainer.args.sync_ref_model:
            moving.load(trainer.reference.models[0], folder)
        path = folder / self._rank_file()
        content = json.loads(path.read_text()) if path.exists() else {"ranks": None}
        if content["ranks"] != trainer.accelerator.num_processes:
            logger.warning("the run had another number of ranks: the first log is of fewer steps")
            return
        trainer._tr_loss.fill_(content["loss_since_log"])
        trainer._globalstep_last_logged = content["last_logged"]
        trainer.meter.load_state_dict(content["meter"], trainer.accelerator.device)

    def _rank_file(self) -> str:
        return f"fastpref_rank{self.trainer.accelerator.process_index}.json"
