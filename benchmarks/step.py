"""Whole DPO training steps, this package beside TRL: pairs per second, peak memory, losses.

    python benchmarks/step.py --mix short                      # and: --mix long
    python benchmarks/step.py --mix short --model smollm2-135m --batch 2
    python benchmarks/step.py --pairs FILE --model FOLDER      # real text and a real tokenizer
    python benchmarks/step.py --mix short --out benchmarks/results/step.json

Every system is its library's own ``DPOTrainer`` with that library's defaults (gradient
checkpointing, AdamW), in a process of its own, so that peak memory is its own; all are there at
once and take turns, one optimiser step each a round, so that a noisy machine is noisy for all. A
ratio is the median of the ratios within a round to TRL's step with its reference computed in every
step. The one-off pass of a precomputed reference is timed by itself. A system whose logged losses
are further than 1e-3 from TRL's gets no row, and the exit status is 1.

Tokens through the model are those that reach its embedding, padding included; rows through the
head are those that the library gives to its head op. Both are counted as they come.

Without ``--pairs``: random words of exactly known lengths, uniform in the ranges of the mix, and a
random model of SmolLM2-135M's shape (H=576, V=49,152): all of its 30 layers, or 4.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pkgutil
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
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
CACHED = {"precompute_ref_log_probs": True, "ref_cache_dir": "none"}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("trl", {}),
    "trl, cached reference": ("trl", {"precompute_ref_log_probs": True}),
    "fastpref": ("fastpref", {}),
    "fastpref, prefix_sharing=False": ("fastpref", {"prefix_sharing": False}),
    "fastpref, cached reference": ("fastpref", CACHED),
    "fastpref, cached reference, prefix_sharing=False": (
        "fastpref",
        {**CACHED, "prefix_sharing": False},
    ),
}
BASELINE = "trl"
MODELS = {"small-backbone": 4, "smollm2-135m": 30}
"""Layers of the random models."""
VOCAB = 49_152
TOLERANCE = 1e-3


class Library(NamedTuple):
    """Where a library looks up what is watched: the owner, and the name there."""

    head: tuple[str, str]
    """Its first argument are the hidden states of the rows that it scores."""
    reference_pass: tuple[str, str]
    """Scores the training data with the reference, once."""


LIBRARIES = {
    "trl": Library(
        ("trl.kernels:ChunkedLogProbFunction", "apply"),
        ("trl:DPOTrainer", "_precompute_ref_logps"),
    ),
    "fastpref": Library(
        ("fastpref.policy", "linear_logprobs"), ("fastpref.trainer", "score_dataset")
    ),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", choices=MIXES, default="short")
    parser.add_argument("--pairs", type=Path, help="JSON lines: prompt, chosen, rejected")
    parser.add_argument(
        "--model",
        default="small-backbone",
        help=f"random: {', '.join(MODELS)}; with --pairs: a folder with model and tokenizer",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="append the rows to this JSON list")
    parser.add_argument("--commit", help="recorded in the rows (default: asked from git)")
    asked = parser.parse_args()
    if asked.pairs and asked.model in MODELS:
        parser.error("--pairs needs --model FOLDER: real text needs a real tokenizer")
    if not asked.pairs and asked.model not in MODELS:
        parser.error(f"--model {asked.model}: without --pairs, one of {', '.join(MODELS)}")
    if asked.rounds < 2 or asked.batch < 1:
        parser.error("--rounds must be at least 2 and --batch at least 1")
    return asked


def pairs(asked: argparse.Namespace) -> Any:
    """The training pairs; exactly as many as the steps consume."""
    from datasets import Dataset

    count = asked.batch * (asked.rounds + 1)
    if asked.pairs:
        # In memory, and so without datasets' cache, where TRL would find an earlier run's pass.
        with asked.pairs.open(encoding="utf-8") as lines:
            data = Dataset.from_list([json.loads(line) for line in islice(lines, count)])
        if len(data) < count:
            raise ValueError(f"{asked.pairs}: {len(data)} pairs, {count} are needed")
        return data
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


def model_config(layers: int) -> Any:
    """SmolLM2-135M's shape, with as many layers as asked for."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_model(folder: Path, layers: int = MODELS["small-backbone"]) -> None:
    """Save a random model and a tokenizer of as many words as the head has rows."""
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
    transformers.LlamaForCausalLM(model_config(layers)).save_pretrained(folder)


def watch(where: tuple[str, str], note: Callable[[Any, float], None]) -> None:
    """Call ``note`` with the first argument of each call of a function, and the call's seconds.

    Args:
        where: The owner, as :func:`pkgutil.resolve_name` takes it, and the function's name there.
        note: Called after each call.
    """
    owner, name = pkgutil.resolve_name(where[0]), where[1]
    watched = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = watched(*args, **kwargs)
        note(args[0], time.perf_counter() - began)
        return result

    setattr(owner, name, call)


class Step(NamedTuple):
    """What a system tells of an optimiser step."""

    seconds: float
    tokens: int
    """Through the model."""
    rows: int
    """Through the head."""


def work(name: str, asked: argparse.Namespace, model: str, pipe: Connection) -> None:
    """Train in this process, a step each time the other end says so."""
    import importlib

    import transformers

    torch.set_num_threads(asked.threads)
    library, options = SYSTEMS[name]
    module = importlib.import_module(library)
    places = LIBRARIES[library]
    counts: Counter[str] = Counter()
    passes: list[float] = []

    def embedded(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            counts["tokens"] += args[0].numel()

    def scored(hidden: torch.Tensor, _: float) -> None:
        counts["rows"] += hidden.numel() // hidden.shape[-1]

    class Turns(transformers.TrainerCallback):
        start = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if not passes and args.precompute_ref_log_probs:
                raise RuntimeError(f"{library}: {':'.join(places.reference_pass)} was not called")
            pipe.send(
                {
                    "constructed": began - constructing,
                    "begun": time.perf_counter() - began,
                    "passed": sum(passes),
                }
            )
            self.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not counts["rows"]:
                raise RuntimeError(f"{library}: nothing went through {':'.join(places.head)}")
            pipe.send(Step(time.perf_counter() - self.start, counts["tokens"], counts["rows"]))
            self.wait()

        def wait(self) -> None:
            pipe.recv()
            counts.clear()
            self.start = time.perf_counter()

    watch(places.head, scored)
    watch(places.reference_pass, lambda _, seconds: passes.append(seconds))
    torch.nn.modules.module.register_module_forward_pre_hook(embedded)
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
        began = time.perf_counter()
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    pipe.send((losses, peak_memory(torch.device("cpu"))))


def race(asked: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """What each system measured: its steps, losses and peak bytes, and the time before them."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in asked.systems:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(name, asked, model, theirs), daemon=True).start()
        theirs.close()
        # one at a time: preparing is not part of the turns and must not slow another's
        found[name] = {**pipes[name].recv(), "steps": []}
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


def model_name(asked: str) -> str:
    """A model as rows name it."""
    if asked not in MODELS:
        return Path(asked).name
    return f"random Llama, {MODELS[asked]} layers, H=576, V={VOCAB:,}, tied"


def rows(asked: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each system whose losses are TRL's."""
    base = found.get(BASELINE)
    made = []
    for name, got in found.items():
        seconds, tokens, scored = zip(*got["steps"][1:], strict=True)
        cached = "precompute_ref_log_probs" in SYSTEMS[name][1]
        row: dict[str, Any] = {
            "system": name,
            "mix": str(asked.pairs.name) if asked.pairs else asked.mix,
            "model": model_name(asked.model),
            "pairs_per_step": asked.batch,
            "steps": len(seconds),
            "device": device_name("wall"),
            "measured": True,
            "seconds_per_step": round(statistics.median(seconds), 3),
            "seconds_spread": round(max(seconds) - min(seconds), 3),
            "pairs_per_second": round(asked.batch / statistics.median(seconds), 4),
            "backbone_tokens_per_step": round(statistics.mean(tokens)),
            "backbone_tokens_spread": max(tokens) - min(tokens),
            "head_rows_per_step": round(statistics.mean(scored)),
            "peak_rss_bytes": got["peak"],
            # loading the model, tokenisation, and the pass of a precomputed reference
            "seconds_to_construct": round(got["constructed"], 2),
            # of which the pass over the pairs of all steps took
            "reference_pass_seconds": round(got["passed"], 2) if cached else None,
            "reference_pass_pairs": asked.batch * (asked.rounds + 1) if cached else None,
            "seconds_before_first_step": round(got["begun"], 2),
            "losses": [round(loss, 6) for loss in got["losses"]],
        }
        if base:
            ratios = [b.seconds / s for s, b in zip(seconds, base["steps"][1:], strict=True)]
            gaps = [abs(a - b) for a, b in zip(got["losses"], base["losses"], strict=True)]
            row |= {
                "pairs_per_second_over_trl": round(statistics.median(ratios), 3),
                "peak_rss_over_trl": round(got["peak"] / base["peak"], 3),
                "loss_difference": float(f"{max(gaps):.2g}"),
            }
            if not all(gap <= TOLERANCE for gap in gaps):  # a NaN is not
                print(
                    f"no row for {name}: its losses {got['losses']} are not TRL's {base['losses']}"
                )
                continue
        row |= {
            "versions": versions("cpu", "transformers", "trl"),
            "commit": asked.commit or commit(),
            "command": shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        }
        made.append(row)
    return made


def main() -> int:
    """Race, print the rows, and keep them if asked to."""
    asked = parse()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        if asked.model in MODELS:
            make_model(Path(folder), MODELS[asked.model])
        found = race(asked, folder if asked.model in MODELS else asked.model)
    made = rows(asked, found)
    for row in made:
        print(json.dumps({k: v for k, v in row.items() if k not in ("versions", "command")}))
    if asked.out and made:
        append(asked.out, made)
    return int(len(made) < len(found))


if __name__ == "__main__":
    sys.exit(main())
