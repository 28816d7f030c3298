"""``fastpref demo``: DPO of a small real model on real pairs, measured on pairs it never saw.

It is the library's ordinary path (:class:`fastpref.PreferenceTrainer`, one dataset, a few options);
only where model and data come from, and the closing table, are the demo's own. What it measured is
``summary.json`` in the run directory, a row for ``benchmarks/results/demo.json``: copy it there.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.cli import command

STEPS, RATE = 27, 1e-5  # 27 x 4 pairs: no training pair twice
HELD_OUT = 40
BATCH = 4
PROMPT_TOKENS, RESPONSE_TOKENS = 192, 160
RESAMPLES = 2_000
LAST = 5  # steps of four pairs each: one alone says little

DESCRIPTION = (
    "Preference-tune SmolLM2-135M-Instruct by DPO on real pairs, on this machine. The first run "
    "downloads 100 MB and keeps what it needs, see FASTPREF_CACHE."
)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Mean and interval, three decimals."""
        return f"{self.mean:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Tensor, resamples: int = RESAMPLES) -> Interval:
    """The mean of ``values (n,)`` and how far another draw of as many would move it.

    Args:
        values: One number a pair.
        resamples: Number of draws with replacement; their seed is fixed.

    Returns:
        Mean, 2.5 % and 97.5 % quantile of the means of the draws.
    """
    generator = torch.Generator().manual_seed(0)
    values = values.double().cpu()
    draws = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return Interval(float(values.mean()), float(low), float(high))


def wins(margins: Tensor) -> Tensor:
    """1 where the chosen response has the larger reward, 0 where the rejected one, 0.5 if equal."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def split_by_prompt(
    rows: Sequence[dict[str, Any]], held_out: int, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and about ``held_out`` others, no prompt on both sides; repeatable."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(row["prompt"]), []).append(row)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    kept: list[dict[str, Any]] = []
    while shuffled and len(kept) < held_out:
        kept += shuffled.pop()
    return [row for group in shuffled for row in group], kept


def main(argv: Sequence[str]) -> int:
    """Runs the demo; 0."""
    parser = argparse.ArgumentParser(prog="fastpref demo", description=DESCRIPTION)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, help=f"of {BATCH} pairs each (default {STEPS})")
    add("--learning-rate", type=float, default=RATE, help=f"at the start (default {RATE})")
    add("--run-dir", type=Path, help="where results go (default runs/demo-DATE-TIME)")
    add("--cpu", action="store_true", help="leave a GPU alone")
    add("--tiny", action="store_true", help="a random model and made-up pairs: offline, seconds")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    run_dir = options.run_dir or Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    make_model, tokenizer, rows = _tiny() if options.tiny else _real()
    summary = tune(
        make_model,
        tokenizer,
        rows,
        run_dir=run_dir,
        steps=options.steps,
        learning_rate=options.learning_rate,
        cpu=options.cpu,
        origin=shlex.join(["fastpref", "demo", *argv]),
    )
    print(report(summary))
    print(what_next(run_dir))
    return 0


Ingredients = tuple[Callable[[], Any], Any, list[dict[str, Any]]]


def _tiny() -> Ingredients:
    return lambda: tiny_model()[0], tiny_model()[1], tiny_pairs(60)


def _real() -> Ingredients:
    """SmolLM2-135M-Instruct, its tokenizer, and the pairs whose prompts are short."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpref import assets

    directory, rows = assets.demo_model(), assets.demo_pairs()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [row["prompt"] for row in rows]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    short = [row for row, prompt in zip(rows, ids, strict=True) if len(prompt) <= PROMPT_TOKENS]
    return (
        lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        tokenizer,
        short,
    )


def tune(
    make_model: Callable[[], Any],
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    run_dir: Path,
    steps: int,
    learning_rate: float,
    cpu: bool = False,
    origin: str = "",
) -> dict[str, Any]:
    """DPO on most of the pairs; model before and after, measured on the others.

    Args:
        make_model: The causal language model to start from; all of it is trained.
        tokenizer: Its tokenizer, with a chat template.
        rows: ``{"prompt", "chosen", "rejected"}``.
        run_dir: Where metrics, curves, config and the tuned model go.
        steps: Optimiser steps.
        learning_rate: Learning rate of the first step; it falls linearly to 0.
        cpu: Leave a GPU alone.
        origin: The command that the numbers come from.

    Returns:
        The numbers of the table, with the machine, the versions and the command that made them, as
        in a row of ``fastpref bench``; also in ``run_dir/summary.json``.
    """
    from datasets import Dataset

    from fastpref import PreferenceConfig, PreferenceTrainer, backends
    from fastpref.disk import write_text
    from fastpref.metrics import peak_memory
    from fastpref.provenance import commit, device_name, versions
    from fastpref.recorder import claim, draw_run, record, resolved

    claim(run_dir)
    train, held_out = (Dataset.from_list(part) for part in split_by_prompt(rows, HELD_OUT))
    config = PreferenceConfig(
        output_dir=str(run_dir),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=learning_rate,
        max_length=PROMPT_TOKENS + RESPONSE_TOKENS,
        max_completion_length=RESPONSE_TOKENS,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        use_cpu=cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not cpu,
    )
    config_values = resolved(config)

    def trainer_of(model: Any, **data: Dataset) -> Any:
        return PreferenceTrainer(model, args=config, processing_class=tokenizer, **data)

    trainer = trainer_of(make_model(), train_dataset=train, eval_dataset=held_out)
    record(trainer, config_values)
    try:
        done = trainer.train()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what was downloaded is kept") from None
    device = trainer.args.device
    logged = [row for row in trainer.state.log_history if "loss" in row]
    summary: dict[str, Any] = {
        "pairs": {"train": min(len(train), steps * BATCH), "held_out": len(held_out)},
        "steps": steps,
        "loss": {
            "first": logged[0]["loss"],
            "last": logged[-1]["loss"],
            "last_mean": sum(row["loss"] for row in logged[-LAST:]) / len(logged[-LAST:]),
        },
        "seconds": done.metrics["train_runtime"],
        "pairs_per_second": steps * BATCH / done.metrics["train_runtime"],
        "peak_bytes": peak_memory(device),
        "backend": backends.explain(device.type, trainer.model.dtype)[0],
        "device": device_name("device" if device.type == "cuda" else "wall"),
        "measured": True,
        "versions": versions(device.type, "transformers"),
        "commit": commit(),
        "command": origin,
    }
    trainer.save_model()
    print(f"measuring {len(held_out)} held-out pairs: the tuned model, then the one before")
    summary["after"] = _measure(trainer)
    # Measured last, on the start weights loaded anew, so that training begins at once.
    summary["before"] = _measure(trainer_of(make_model(), eval_dataset=held_out))
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    measured = [
        {"step": step, **{f"eval_{key}": value["mean"] for key, value in summary[when].items()}}
        for step, when in ((0, "before"), (steps, "after"))
    ]
    draw_run(run_dir, *measured)
    return summary


def _measure(trainer: Any) -> dict[str, dict[str, float]]:
    """Held-out accuracy and margin with intervals, from the trainer's own evaluation."""
    found = torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)
    chosen, rejected, ref_chosen, ref_rejected = found.double().unbind(-1)
    margins = trainer.combined.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return {
        "rewards/accuracies": asdict(bootstrap(wins(margins))),
        "rewards/margins": asdict(bootstrap(margins)),
    }


def report(summary: dict[str, Any]) -> str:
    """The closing table."""
    pairs = summary["pairs"]
    lines = [
        "",
        f"{pairs['held_out']} held-out pairs, 95 % bootstrap intervals; "
        f"trained on {pairs['train']} others",
        f"{'':<10}{'reward accuracy':<26}{'reward margin':<26}",
    ]
    for when in ("before", "after"):
        accuracy, margin = (Interval(**value) for value in summary[when].values())
        lines.append(f"{when:<10}{accuracy!s:<26}{margin!s:<26}")
    loss = summary["loss"]
    lines += [
        "",
        f"training loss   {loss['first']:.4f} in the first step, {loss['last']:.4f} in the last "
        f"(mean of the last {min(LAST, summary['steps'])}: {loss['last_mean']:.4f})",
        f"speed           {summary['pairs_per_second']:.2f} pairs/s "
        f"({summary['steps']} steps in {summary['seconds']:.0f} s)",
        f"peak memory     {summary['peak_bytes'] / 2**30:.2f} GiB",
        f"ran on          {summary['device']}, backend {summary['backend']}",
        "",
        "Accuracy: share of pairs whose chosen response has the larger reward, a tie counting 1/2;",
        "before training policy and reference are the same model, so every pair is a tie.",
    ]
    return "\n".join(lines)


def what_next(run_dir: Path) -> str:
    """What to type for a model and data of one's own."""
    fastpref = command()
    return "\n".join(
        [
            "",
            f"{run_dir}: curves.png, metrics.jsonl, config.yaml, summary.json and the tuned model",
            "",
            "next, with your model and data (JSON lines with prompt, chosen, rejected):",
            f"  {fastpref} train --model PATH_OR_NAME --dataset pairs.jsonl --loss dpo \\",
            "      --output_dir runs/mine --use_peft",
            f"  {fastpref} losses    # what else --loss takes",
            f"  {fastpref} doctor    # which kernels run here, and what would add more",
        ]
    )


def tiny_model() -> tuple[Any, Any]:
    """A random two-layer Llama and a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|start|>", "<|end|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *symbols])}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    make_tokenizer: Any = PreTrainedTokenizerFast  # its constructor carries no types
    tokenizer = make_tokenizer(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            tie_word_embeddings=True,
        )
    )
    return model, tokenizer


def tiny_pairs(count: int) -> list[dict[str, Any]]:
    """Made-up pairs: the chosen answer repeats the number asked about, the rejected one evades."""

    def says(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return [
        {
            "prompt": says("user", f"Which number comes after {number}?"),
            "chosen": says("assistant", f"After {number} comes {number + 1}."),
            "rejected": says("assistant", "Who knows?"),
        }
        for number in range(count)
    ]
