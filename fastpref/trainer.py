"""Preference training as a thin ``transformers.Trainer``: what is computed, logged and saved is
ours; loop, optimiser, schedule and distribution are transformers' and Accelerate's.

A loss is ``sum(weight * loss) / number of examples`` of the whole accumulation window over all
ranks, so micro-batching, rank count and packing do not change the update.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from fastpref.batches import (
    TOKEN_COLUMN,
    Corrupt,
    TrainerCollator,
    columns_of,
    count,
    each,
    extend_dataset,
    likelihood_rates,
    make_collator,
    prepare_dataset,
    refuse_splits,
)
from fastpref.config import PreferenceConfig
from fastpref.contrast import NEEDS, against
from fastpref.data.formats import RESPONSES
from fastpref.data.sampling import refuse_stream
from fastpref.heads import Head
from fastpref.loop import Loop
from fastpref.metrics import Meter, MetricsFile, accuracy_by_length, example_rows
from fastpref.models import (
    adjust,
    balancing_weight,
    load_tokenizer,
    options_for,
    prepare_policy,
    vocab_size,
)
from fastpref.objective import (
    check_needs,
    make_examples,
    make_losses,
    tell_coupled,
    weigh,
    window_of,
)
from fastpref.policy import Batch, response_logps
from fastpref.ranks import Ranks
from fastpref.ref_columns import REF_COLUMNS, references_in
from fastpref.reference_cache import ReferenceCache
from fastpref.reference_policy import AdapterOff, Stored, choose_reference
from fastpref.resumable import ResumableTrainer
from fastpref.scoring import caches_of, score_dataset
from fastpref.texts import add_texts, score_texts

logger = logging.getLogger("fastpref")


class PreferenceTrainer(ResumableTrainer):
    """Trains a causal language model on preferences, with any loss of :mod:`fastpref.losses`.

    Signature, dataset columns and metric keys are those of TRL 1.16's trainers.

    Args:
        model: A model, a PEFT model, or a name or path. A PEFT model's adapter as it is now is the
            reference.
        ref_model: The reference: a model, a name or path, or a list of them (several references,
            the base first). None: for a fresh adapter the model without it; else a copy of the
            model as it is now, or, where the dataset has ``ref_*_logps`` columns, those.
        args: A :class:`PreferenceConfig`.
        data_collator: Makes batches as :class:`fastpref.data.PreferenceCollator` does; None: that.
        train_dataset: Preferences, in any layout of :mod:`fastpref.data.formats`.
        eval_dataset: The same, or several by name.
        processing_class: The tokenizer; None: the model's own.
        compute_metrics: Gets the log-probabilities of each example as predictions, ``(N, 4)``:
            chosen, rejected, and both under the reference (unpaired: ``(N, 2)``).
        callbacks: Of transformers.
        optimizers: Optimiser and schedule; None: from ``args``.
        quantization_config: For a model given by name.
        peft_config: Train a fresh adapter.
        corrupt_context: For losses that score the chosen response in a corrupted context too
            (mdpo): gives, for a prompt's token ids, those of that context; called before training.
        ref_processing_class: The reference's tokenizer, or a list of one each; None: that of the
            model by its name, else the policy's. A reference whose tokenizer differs scores the
            texts before training.

    Raises:
        ValueError: Options contradict each other, or the data lacks what the loss needs.
        TypeError: An argument has the wrong type.
    """

    loss_is_scaled_for_ga = True
    config_class: type[PreferenceConfig] = PreferenceConfig
    loop_class: type[Loop] = Loop
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        corrupt_context: Corrupt | None = None,
        ref_processing_class: Any = None,
    ) -> None:
        """See the class."""
        args = options_for(model, args, self.config_class)
        if args.activation_offloading and args.device.type == "cpu":
            raise ValueError("activation_offloading: on a CPU they are in its memory; drop it")
        if train_dataset is None and eval_dataset is None:
            raise ValueError("train_dataset is required (or an eval_dataset, to evaluate only)")
        refuse_splits(train_dataset, "train_dataset")
        refuse_stream(train_dataset, args.train_sampling_strategy)
        self.combined = make_losses(args)
        self._extend = partial(
            extend_dataset, needs=self.combined.needs, args=args, corrupt=corrupt_context
        )
        loads: Any = (args.model_init_kwargs if isinstance(model, str) else None) or {}
        set_seed(args.seed)  # a fresh adapter's weights are drawn in the next line
        model = prepare_policy(model, args, quantization_config, peft_config)
        if processing_class is None:
            trust, revision = args.trust_remote_code, loads.get("revision")
            processing_class = load_tokenizer(model, trust_remote_code=trust, revision=revision)
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.reference = choose_reference(
            *(model, ref_model, args, self.combined, columns_of(train_dataset, eval_dataset)),
            *(peft_config is not None, self._tokenizer, ref_processing_class),
            references_in(self.combined.kind, train_dataset, eval_dataset),
        )
        for each_model in (model, *self.reference.models):
            adjust(each_model, args)
        args.remove_unused_columns = False  # of ours, the collator knows which it wants
        args.accelerator_config.dispatch_batches = False  # batches differ in shape
        self._vocab_size = vocab_size(model)
        self.args, self.data_reports = args, dict[str, Any]()  # what became of each dataset's rows
        train_dataset = each(self._prepared, train_dataset, "train")
        eval_dataset = each(self._prepared, eval_dataset, "eval")
        if data_collator is None:
            data_collator = make_collator(args, self._tokenizer, self.combined, model)
        super().__init__(
            model=model,
            args=args,
            data_collator=TrainerCollator(
                data_collator, self.combined.kind, prompts="prompt" in self.combined.needs
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs are visible to one process: start with `accelerate launch` or "
                "`torchrun`, or show one GPU by CUDA_VISIBLE_DEVICES"
            )
        self.model_accepts_loss_kwargs = True  # what transformers before 5.19 reads
        self.aux_weight = balancing_weight(model, args.router_aux_loss_coef)
        self.head_options = args.head_options()
        self.ranks = Ranks(self.accelerator)
        self.meter, self.eval_meter = Meter(), Meter()
        self.metrics_file = MetricsFile(Path(args.output_dir) / "metrics.jsonl")
        self._scorer: Any = None
        self.caches: list[ReferenceCache] = []
        self.loop = self.loop_class(self)
        self.add_callback(self.loop)
        tell_coupled(self.combined, args.per_device_train_batch_size * args.world_size)
        self._settle_reference()

    @property
    def ref_model(self) -> Any:
        """As in TRL: the reference's model; None if it has none of its own, or was freed."""
        return next(iter(self.reference.models), None)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without Accelerate's compiler: it would trace the hooks on the head once and for all."""
        found: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        found.pop("dynamo_plugin", None)
        return found

    def _prepared(self, dataset: Any, name: str) -> Any:
        """A dataset as token ids, with all that the losses need."""
        reference, kind = self.reference, self.combined.kind
        rows, self.data_reports[name] = prepare_dataset(
            *(dataset, self._tokenizer, self.args, kind, name),
            *(self._extend, self._vocab_size, reference.reads_texts),
        )
        if reference.reads_texts:
            rows = add_texts(rows, dataset, reference, kind, self.args, name)
        live = reference.live and not self._ahead
        given = type(reference) is Stored and REF_COLUMNS[kind][0] in columns_of(rows)
        check_needs(self.combined, columns_of(rows), reference.count, live, given)
        return rows

    @property
    def _ahead(self) -> bool:
        """The reference scores the data before training."""
        asked = self.args.precompute_ref_log_probs or self.reference.reads_texts
        return asked and self.reference.live

    def _settle_reference(self) -> None:
        """Move the reference's models to their device; score the data with it, if asked to."""
        reference, ahead = self.reference, self._ahead
        if ahead:
            self.caches = caches_of(reference, self.model, self.args, self.accelerator)
        reference.place(self.accelerator)
        if not self.args.packing:
            self.data_collator.unpack()
        if ahead:
            self._check_once(self.train_dataset)
            self._scorer = reference
            self.train_dataset = each(self._scored, self.train_dataset, "train")
            self.eval_dataset = each(self._scored, self.eval_dataset, "eval")
            self._scorer = reference if isinstance(reference, AdapterOff) else None
            self.reference = Stored(reference.count)
            self.data_collator.references = reference.count

    def _check_once(self, dataset: Any) -> None:
        """The self-check before the first use of the model, where it is not sharded later."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.self_check and dataset is not None and not self.loop.checked and not sharded:
            self.loop.check(dataset, fresh=False)

    def _scored(self, dataset: Any, name: str) -> Any:
        args = self.args
        given = {
            "batch_size": args.precompute_ref_batch_size or args.per_device_train_batch_size,
            "accelerator": self.accelerator,
            "kind": self.combined.kind,
            "description": name,
            "caches": self.caches,
        }
        if self._scorer.reads_texts:
            texts = (self._tokenizer, args, self.combined)
            return score_texts(self._scorer, self.model, dataset, *texts, **given)
        return score_dataset(self._scorer, self.model, dataset, self.data_collator, **given)

    # Losses

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """See :func:`fastpref.objective.window_of`."""
        return window_of(batch_samples, self.ranks, device) if batch_samples else None

    def _losses(
        self, model: nn.Module, batch: Batch, rates: Mapping[str, Any], update: bool
    ) -> tuple[Tensor, Any, dict[str, tuple[Tensor, Tensor]]]:
        """The loss of each example, the examples, and their metrics."""
        keep = Head.detach if self.combined.needs & NEEDS else None
        scored = self.reference.score(model, batch, keep)
        policy = response_logps(
            model,
            batch,
            return_stats=True,
            inspect=against(scored, batch, self.combined, self.head_options),
            balance_experts=self.aux_weight > 0,
            watch=self.meter.head if update else None,
            **self.head_options,
        )
        reference = None if scored is None else scored.logps
        examples = make_examples(self.combined, batch, policy, reference, self.args.ld_alpha)
        losses, metrics = weigh(self.combined, examples, self.ranks, rates, update)
        metrics |= example_rows(examples, batch, policy, reference, self.combined)
        if policy.aux_loss is not None:
            losses = losses + self.aux_weight * policy.aux_loss
            one = torch.ones_like(losses)
            metrics |= {"aux_loss": (policy.aux_loss.detach() * one, one)}
            metrics["loss"] = (losses.detach(), one)
        return losses, examples, metrics

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A micro-batch's share of the loss of its accumulation window."""
        window = num_items_in_batch or {"examples": torch.tensor(float(count(inputs))), "rates": {}}
        losses, examples, metrics = self._losses(model, inputs, window["rates"], update=True)
        unknown = torch.full_like(losses, -1, dtype=torch.int64)
        self.loop.note(inputs.get("example_ids", unknown), losses)
        self.meter.add(metrics, inputs["num_tokens"], laid_out=inputs["input_ids"].numel())
        # Ranks average their gradients: scaled by their number, they add up.
        scale = self.accelerator.num_processes / window["examples"]
        loss = losses.sum() * scale.to(losses)
        return (loss, examples) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds a batch to the evaluation; log-probabilities if ``compute_metrics`` wants them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, examples, metrics = self._losses(model, inputs, self._eval_rates, update=False)
        metrics |= accuracy_by_length(metrics)
        self.eval_meter.add(metrics, inputs["num_tokens"], self.ranks.counted(len(losses)))
        if prediction_loss_only:
            return None, None, None
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "logps", "ref_logps")
        found = [getattr(examples, name, None) for name in names]
        return None, torch.stack([x for x in found if x is not None], -1), torch.ones_like(losses)

    def checkpoint_content(self) -> dict[str, Any]:
        """See :meth:`ResumableTrainer.checkpoint_content`."""
        return super().checkpoint_content() | {"losses": self.combined.state_dict()}

    # Metrics

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics over ``eval_dataset``, in any layout; None: the trainer's own."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._ready(eval_dataset, "eval")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[no-any-return]

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> Any:
        """Log-probabilities of each example, as for ``compute_metrics``, and the metrics."""
        refuse_splits(test_dataset, "test_dataset")
        ready = self._ready(test_dataset, "test")
        return super().predict(ready, ignore_keys, metric_key_prefix)

    def _ready(self, dataset: Any, name: str) -> Any:
        """A dataset that was not there at the start, as those that were."""
        dataset = self._prepared(dataset, name)
        kind = self.combined.kind
        scores = {*REF_COLUMNS[kind], TOKEN_COLUMN.format(RESPONSES[kind][0])}
        if not isinstance(self.reference, Stored) or scores & columns_of(dataset):
            return dataset
        if self._scorer is None:
            raise ValueError(
                "the reference was freed after it had scored the data, and this dataset came "
                "later: give it to the trainer as eval_dataset, or set "
                "precompute_ref_log_probs=False"
            )
        return self._scored(dataset, name)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers' loop, with nothing gathered but the sums of the metrics."""
        self.eval_meter, started = Meter(), time.perf_counter()
        kind, prompts = self.combined.kind, "prompt" in self.combined.needs
        self._eval_rates = likelihood_rates(dataloader.dataset, kind, prompts)
        self._check_once(dataloader.dataset)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        found = self.eval_meter.read(self.ranks.sum, rates=False)
        found["num_tokens"] = self.meter.tokens_so_far(self.ranks.sum, self.accelerator.device)
        output.metrics.update({f"{metric_key_prefix}_{key}": x for key, x in found.items()})
        self.meter.skip(time.perf_counter() - started)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers, and a line of ``metrics.jsonl``."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.metrics_file.append({**logs, "step": self.state.global_step})
