"""What a run takes at its peak: its options, lengths and machine -> bytes by part.

The reference, the layout of a batch, the head's tiles and the optimiser come from what trains
(``choose_reference``, ``pack``, ``schedule.plan``, transformers' ``Trainer``); the step itself is
counted by :mod:`fastpref.footprint`.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpref.attention import FLEX, choose_attention
from fastpref.config import PreferenceConfig
from fastpref.costs import Head, scratch_bytes
from fastpref.data.packing import Document, pack
from fastpref.footprint import HEAD, Layout, count_step, faked, weight_bytes
from fastpref.heads import causal_lm, output_embedding, read_head
from fastpref.models import adjust, load_config, prepare_policy
from fastpref.objective import make_losses
from fastpref.options import ModelArguments
from fastpref.reference_policy import choose_reference
from fastpref.schedule import plan
from fastpref.selfcheck import PROMPT_TOKENS, RESPONSE_TOKENS
from fastpref.train import lora

IMPORTED = ("fastpref.trainer", "datasets", "peft")
"""Modules that a training run imports."""
PROCESS, WEIGHTS, REFERENCE = "process", "weights", "reference"


class Machine(NamedTuple):
    """Where a run is to fit."""

    name: str
    device: str
    """``"cpu"`` or ``"cuda"``."""
    memory: int
    """Bytes."""
    base: int
    """Bytes that the process takes there besides its tensors."""
    bf16: bool
    """It computes in bf16 itself."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses."""

    rows: tuple[tuple[int, ...], ...]
    """Of each example: its prompt, and each response to it."""
    ordered: bool = False
    """Batches are taken in this order; else any examples can meet in one."""

    def batch(self, size: int) -> list[tuple[int, ...]]:
        """Of the micro-batches that can come, the one with the most tokens."""
        rows = list(self.rows) * -(-size // len(self.rows))
        if self.ordered:
            windows = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
            return max(windows, key=lambda window: sum(map(sum, window)))
        return sorted(rows, key=sum, reverse=True)[:size]

    def scaled(self, factor: float) -> Lengths:
        """Everything ``factor`` times as long."""
        rows = tuple(tuple(max(1, round(factor * n)) for n in row) for row in self.rows)
        return replace(self, rows=rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + response."""
        return max(row[0] + max(row[1:]) for row in self.rows)


@dataclass(frozen=True)
class Run:
    """A run that is planned."""

    model: ModelArguments
    config: PreferenceConfig
    lengths: Lengths
    machine: Machine
    columns: frozenset[str] = frozenset()
    """Of the dataset, if there is one."""

    def changed(self, **options: Any) -> Run:
        """The run with other values of options."""
        config, model = copy.copy(self.config), copy.copy(self.model)
        for name, value in options.items():
            setattr(config if hasattr(config, name) else model, name, value)
        return replace(self, config=config, model=model)


class Estimate(NamedTuple):
    """What a run takes at its peak."""

    parts: Counter[str]
    """Bytes by part."""
    moment: str
    """When that is."""
    layout: Layout
    """Of a micro-batch."""
    parameters: int
    trained: int
    """Parameters that train."""
    copies: int
    """Reference models beside the policy."""

    @property
    def total(self) -> int:
        """Bytes."""
        return self.parts.total()


def estimate(run: Run) -> Estimate:
    """The memory that a run takes at its peak.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Options contradict each other, or the model's code cannot run on fake tensors.
    """
    if run.machine.device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return _count(run)
    # Malloc's answer depends on what it has been asked before: each plan asks in a process that has
    # imported what a training run has, and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, *IMPORTED])
    with ProcessPoolExecutor(1, context) as fresh:
        return fresh.submit(_quietly, run).result()


def _quietly(run: Run) -> Estimate:
    """Without what transformers says of a model, once more for each task."""
    logging.disable()
    warnings.simplefilter("ignore")
    return _count(run)


def _count(run: Run) -> Estimate:
    config, machine = run.config, run.machine
    combined = make_losses(config)
    with torch.device("meta"):
        policy = _policy(run)
        reference = _reference(run, policy, combined)
    named = _loading(run).get("attn_implementation")
    flex = choose_attention(policy, config, named, machine.device).name == FLEX
    batch = run.lengths.batch(config.per_device_train_batch_size)
    layout = lay_out(batch, config, dense_mask=not flex, prompts="prompt" in combined.needs)
    precision = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    # Scored before training, and not in it.
    ahead = config.precompute_ref_log_probs or reference.reads_texts
    held = Counter({PROCESS: machine.base, WEIGHTS: weight_bytes(policy)})
    held[REFERENCE] = sum(map(weight_bytes, reference.models))
    with faked(policy, *reference.models):
        try:
            counted = count_step(
                policy,
                layout,
                head_options={"memory_budget": config.head_memory_budget},
                precision=precision,
                make_optimizer=lambda model: _optimizer(config, model),
                micro_batches=config.gradient_accumulation_steps,
                on_cpu=machine.device == "cpu",
                reference=reference if reference.live and not ahead else None,
                dense=not flex,
            )
        except (RuntimeError, NotImplementedError) as error:
            name = type(causal_lm(policy)).__name__
            raise ValueError(f"the memory of {name} cannot be counted: {error}") from error
        weight = read_head(output_embedding(policy), torch.zeros(1, _hidden_size(policy))).weight
    parameters = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    # Tiles of logits, and the operands that are converted for them.
    size = precision.itemsize if precision else weight.itemsize
    head = Head(weight.shape[1], weight.shape[0])
    how = plan(
        layout.responses,
        *(head.vocab_size, head.hidden_size, size, machine.device, config.head_memory_budget),
    )
    counted[HEAD] += scratch_bytes(how, layout.responses, head, size, machine.device)[0]
    moments = {"in an optimiser step": held + counted}
    if config.self_check:
        # Logits of two short pairs, and their magnitudes.
        tokens = 2 * (PROMPT_TOKENS + 2 * RESPONSE_TOKENS)
        logits = Counter({HEAD: 2 * tokens * head.vocab_size * size})
        moments["in the self-check before training"] = held + logits
    moment = max(moments, key=lambda name: moments[name].total())
    return Estimate(
        moments[moment],
        moment,
        layout,
        sum(n for n, _ in parameters),
        sum(n for n, trains in parameters if trains),
        len(reference.models),
    )


def lay_out(
    batch: list[tuple[int, ...]], config: PreferenceConfig, *, dense_mask: bool, prompts: bool
) -> Layout:
    """The rows in which a micro-batch is laid out.

    Args:
        batch: Of each example the tokens of its prompt and of each response.
        config: ``packing``, ``prefix_sharing``, ``max_tokens_per_batch``, ``pad_to_multiple_of``.
        dense_mask: As in :func:`fastpref.data.packing.pack`.
        prompts: Prompts are scored too.
    """
    documents = [Document([0] * prompt, [[0] * n for n in sizes]) for prompt, *sizes in batch]
    packed = pack(
        documents,
        row_tokens=config.max_tokens_per_batch,
        prefix_sharing=config.prefix_sharing and config.packing,
        dense_mask=dense_mask,
        pad_to_multiple_of=config.pad_to_multiple_of,  # type: ignore[arg-type]
    )
    rows, tokens = packed.input_ids.shape
    if not config.packing:
        rows = sum(len(sizes) for _, *sizes in batch)
        tokens = max(prompt + max(sizes) for prompt, *sizes in batch)
    scored = len(packed.response_rows)
    if prompts:
        scored += sum(max(prompt - 1, 0) for prompt, *_ in batch)
    return Layout(rows, tokens, scored)


def _hidden_size(model: nn.Module) -> int:
    return int(causal_lm(model).config.get_text_config().hidden_size)


def _loading(run: Run) -> dict[str, Any]:
    """The arguments that the model would be loaded with."""
    given = {
        "revision": run.model.model_revision,
        "dtype": run.model.dtype,
        "attn_implementation": run.model.attn_implementation,
    }
    own: Any = run.config.model_init_kwargs or {}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return {**asked, **own}


def _fake_model(name: str, run: Run, dtype: torch.dtype) -> Any:
    """A model as its configuration says, without weights."""
    from transformers import AutoModelForCausalLM

    given = _loading(run)
    quantised = run.model.load_in_4bit or run.model.load_in_8bit
    if quantised or given.get("quantization_config") is not None:
        raise ValueError(
            "what quantised weights take cannot be planned; without load_in_4bit, load_in_8bit or "
            "quantization_config the plan is an upper bound"
        )
    found = load_config(name, run.config, revision=given.get("revision"))
    asked = given.get("dtype", dtype)
    if isinstance(asked, str):
        asked = found.dtype or torch.float32 if asked == "auto" else getattr(torch, asked, None)
    if not isinstance(asked, torch.dtype):
        raise ValueError(f"dtype={given['dtype']!r}: expected float32, bfloat16, float16 or auto")
    attention = given.get("attn_implementation")
    return AutoModelForCausalLM.from_config(
        found,
        dtype=asked,
        # FlexAttention keeps what SDPA keeps, but for the mask.
        attn_implementation="sdpa" if attention == FLEX else attention,
        trust_remote_code=run.config.trust_remote_code,
    )


def _policy(run: Run) -> Any:
    """The model that trains, adapters and checkpointing included."""
    config, adapter = run.config, lora(run.model)
    assert run.model.model_name_or_path is not None
    low = adapter is not None and run.machine.bf16
    model = _fake_model(run.model.model_name_or_path, run, torch.bfloat16 if low else torch.float32)
    model = prepare_policy(model, run.changed(model_init_kwargs=None).config, None, adapter)
    # Compiled code is not counted: it keeps less.
    adjust(model, SimpleNamespace(disable_dropout=config.disable_dropout, torch_compile=False))
    if config.gradient_checkpointing:
        options = config.gradient_checkpointing_kwargs
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def _reference(run: Run, policy: Any, combined: Any) -> Any:
    name, names = run.model.ref_model_name_or_path, run.config.ref_models
    given = [name] if name is not None else names
    dtype = causal_lm(policy).dtype
    models = [_fake_model(each, run, dtype) for each in given] if given else None
    fresh = run.model.use_peft
    return choose_reference(
        policy, models, run.config, combined, run.columns, fresh, tokenizer=None
    )


def _optimizer(config: PreferenceConfig, model: nn.Module) -> Any:
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(config, model)
    return kind([p for p in model.parameters() if p.requires_grad], **options)
