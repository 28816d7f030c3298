"""A ``transformers.Trainer`` that can be stopped at any time and goes on as if it had not been."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from fastpref import checkpoint
from fastpref.card import model_card
from fastpref.disk import write_text


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Checkpoints are whole or not there; Ctrl-C finishes the step and saves.

    A subclass sets ``loop``, a :class:`fastpref.loop.Loop`, and overrides ``checkpoint_content``.
    """

    loop: Any
    meter: Any

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
            ValueError: There is no whole checkpoint to resume from.
            FloatingPointError: A loss or a gradient is not finite; the state before the step is
                saved, unless its weights are not finite either.
        """
        path = None
        if resume_from_checkpoint is True:
            path = checkpoint.last_complete(self.args.output_dir)
        elif resume_from_checkpoint:
            path = checkpoint.verify(str(resume_from_checkpoint))
        self.loop.resumed = path
        with self.loop.interrupt.listening():
            output = super().train(None if path is None else str(path), trial, ignore_keys_for_eval)
        if self.loop.stopping:
            raise KeyboardInterrupt(
                f"stopped after step {self.state.global_step} and saved; go on with "
                "trainer.train(resume_from_checkpoint=True)"
            )
        return output

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
