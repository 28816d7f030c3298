"""Whole DPO training steps, this package beside TRL: pairs per second, peak memory, losses.

    python benchmarks/step.py --mix short                      # and: --mix long
    python benchmarks/step.py --pairs FILE --model FOLDER      # real text and a real tokenizer
    python benchmarks/step.py --mix short --out benchmarks/results/step.json

Every system is its library's own ``DPOTrainer`` with that library's defaults (gradient
checkpointing, AdamW), in a process of its own, so that peak memory is its own; all run at once and
take turns, one optimiser step each a round, so that a noisy machine is noisy for all. A ratio is
the median of the ratios within a round to TRL's step with its reference computed in every step.
The one-off pass of a precomputed reference is reported apart. A system whose logged losses are
further than 1e-3 from TRL's gets no row, and the exit status is 1.

Without ``--pairs``: a random 4-layer model with the head of SmolLM2-135M (H=576, V=49,152), and
random words of exactly known lengths, uniform in the ranges of the mix.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.bench import append
from fastpref.metrics import peak_memory
from fastpref.provenance import commit, device_name, versions


class Mix(NamedTuple):
    """Ranges of lengths in tokens."""

    prompt: tuple[int, int]
    response: tuple[int, int]


MIXES = {"short": Mix((64, 256), (64, 256)), "long": Mix((1024, 1024), (128, 128))}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("trl", {}),
    "trl, cached reference": ("trl", {"precompute_ref_log_probs": True}),
    "fastpref": ("fastpref", {}),
    "fastpref, prefix_sharing=False": ("fastpref", {"prefix_sharing": False}),
    "fastpref, cached reference": (
        "fastpref",
        {"precompute_ref_log_probs": True, "ref_cache_dir": "none"},
    ),
}
BASELINE = "trl"
VOCAB = 49_152
TOLERANCE = 1e-3


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", choices=MIXES, default="short")
    parser.add_argument("--pairs", type=Path, help="JSON lines: prompt, chosen, rejected")
    parser.add_argument("--model", help="with --pairs: the model and its tokenizer")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="append the rows to this JSON list")
    asked = parser.parse_args()
    if bool(asked.pairs) != bool(asked.model):
        parser.error("--pairs and --model go together: real text needs a real tokenizer")
    if asked.rounds < 2 or asked.batch < 1:
        parser.error("--rounds must be at least 2 and --batch at least 1")
    return asked


def pairs(asked: argparse.Namespace) -> Any:
    """The training pairs; exactly as many as the steps consume."""
    from datasets import Dataset, load_dataset

    count = asked.batch * (asked.rounds + 1)
    if asked.pairs:
        data = load_dataset("json", data_files=str(asked.pairs), split="train")
        if len(data) < count:
            raise ValueError(f"{asked.pairs}: {len(data)} pairs, {count} are needed")
        return data.select(range(count))
    draw, mix = random.Random(0), MIXES[asked.mix]

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(4, VOCAB)}" for _ in range(draw.randint(low, high)))

    rows = [
        {
            "prompt": words(*mix.prompt),
            # one word less: both libraries end a response with an end-of-text token
            **{key: " " + words(*(n - 1 for n in mix.response)) for key in ("chosen", "rejected")},
        }
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def make_model(folder: Path) -> None:
    """Save a small random model and a tokenizer of as many words as the head has rows."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    ids = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, VOCAB))])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def work(name: str, asked: argparse.Namespace, model: str, pipe: Connection) -> None:
    """Train in this process, a step each time the other end says so."""
    import importlib

    import transformers

    torch.set_num_threads(asked.threads)
    library, options = SYSTEMS[name]
    module = importlib.import_module(library)
    tokens = [0]

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            tokens[0] += args[0].numel()

    class Turns(transformers.TrainerCallback):
        start = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pipe.send((began - constructing, time.perf_counter() - began))
            pipe.recv()
            tokens[0], self.start = 0, time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pipe.send((time.perf_counter() - self.start, tokens[0]))
            pipe.recv()
            tokens[0], self.start = 0, time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        args = module.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=asked.batch,
            max_steps=asked.rounds + 1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_length=None,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **options,
        )
        constructing = time.perf_counter()
        trainer = module.DPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=args,
            train_dataset=pairs(asked),
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
        )
        trainer.add_callback(Turns())
        torch.nn.modules.module.register_module_forward_pre_hook(count)
        began = time.perf_counter()
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    pipe.send((losses, peak_memory(torch.device("cpu"))))


def race(asked: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """What each system measured: seconds and tokens of each step, losses, peak bytes."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in asked.systems:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(name, asked, model, theirs), daemon=True).start()
        theirs.close()
        # one at a time: preparing is not part of the turns and must not slow another's
        built, once = pipes[name].recv()
        found[name] = {"built": built, "once": once, "steps": []}
        print(f"ready: {name}", file=sys.stderr)
    for step in range(asked.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(None)
            found[name]["steps"].append(pipe.recv())
        print(f"step {step + 1} of {asked.rounds + 1}", file=sys.stderr)
    for name, pipe in pipes.items():
        pipe.send(None)
        found[name]["losses"], found[name]["peak"] = pipe.recv()
    return found


def rows(asked: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each system whose losses are TRL's."""
    base = found.get(BASELINE)
    made = []
    for name, got in found.items():
        seconds = [s for s, _ in got["steps"][1:]]
        tokens = [t for _, t in got["steps"][1:]]
        row: dict[str, Any] = {
            "system": name,
            "mix": str(asked.pairs.name) if asked.pairs else asked.mix,
            "model": asked.model or f"random Llama, 4 layers, H=576, V={VOCAB:,}, tied",
            "pairs_per_step": asked.batch,
            "steps": len(seconds),
            "device": device_name("wall"),
            "measured": True,
            "seconds_per_step": round(statistics.median(seconds), 3),
            "seconds_spread": round(max(seconds) - min(seconds), 3),
            "pairs_per_second": round(asked.batch / statistics.median(seconds), 4),
            "backbone_tokens_per_step": round(statistics.mean(tokens)),
            "backbone_tokens_spread": max(tokens) - min(tokens),
            "peak_rss_bytes": got["peak"],
            # tokenisation, and the pass of a precomputed reference
            "seconds_to_construct": round(got["built"], 2),
            "seconds_before_first_step": round(got["once"], 2),
        }
        if base:
            ratios = [b / s for s, (b, _) in zip(seconds, base["steps"][1:], strict=True)]
            apart = max(abs(a - b) for a, b in zip(got["losses"], base["losses"], strict=True))
            row |= {
                "pairs_per_second_over_trl": round(statistics.median(ratios), 3),
                "peak_rss_over_trl": round(got["peak"] / base["peak"], 3),
                "loss_difference": float(f"{apart:.2g}"),
            }
            if not apart <= TOLERANCE:
                print(
                    f"no row for {name}: its losses {got['losses']} are not TRL's {base['losses']}"
                )
                continue
        row |= {
            "versions": versions("cpu", "transformers", "trl"),
            "commit": commit(),
            "command": shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        }
        made.append(row)
    return made


def main() -> int:
    """Race, print the rows, and keep them if asked to."""
    asked = parse()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        if not asked.model:
            make_model(Path(folder))
        found = race(asked, asked.model or folder)
    made = rows(asked, found)
    for row in made:
        print(json.dumps({k: v for k, v in row.items() if k not in ("versions", "command")}))
    if asked.out and made:
        append(asked.out, made)
    return int(len(made) < len(found))


if __name__ == "__main__":
    sys.exit(main())
