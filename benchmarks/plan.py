"""Peak memory that ``fastpref plan`` predicts, beside what ``fastpref train`` then takes, on a CPU.

    python benchmarks/plan.py                                        # prints the rows
    python benchmarks/plan.py --out benchmarks/results/plan.json     # and keeps them

Plan and training get the same flags, each in a process of its own. The measured number is the
kernel's own peak resident size of the training process, from start to saved model: imports,
loading, checks and optimiser steps. Models are random, pairs are random words of exactly known
lengths. ``FOUND_ON`` names the configurations on which the counting was worked out; the others were
looked at afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import step
import torch
import transformers

from fastpref.bench import append
from fastpref.provenance import commit, device_name, versions

STEPS = 2
LLAMA = "random Llama, 4 layers, H=576, V=49,152, tied"
SMALLEST = "random Llama, 1 layer, H=64, V=49,152, tied"
UNTIED = "random Llama, 8 layers, H=384, V=49,152, untied"
SHORT, LONG = (160, 160), (1024, 128)
CONFIGURATIONS: dict[str, tuple[str, tuple[int, int], int, str]] = {
    "almost no model: the process": (SMALLEST, (64, 64), 1, "--loss simpo"),
    "full, reference copied": (LLAMA, SHORT, 4, "--gradient_checkpointing false"),
    "LoRA, adapter off": (
        *(LLAMA, SHORT, 4),
        "--gradient_checkpointing false --use_peft true --lora_target_modules q_proj v_proj",
    ),
    "full, checkpointing, reference cached, long prompts": (
        *(LLAMA, LONG, 4),
        "--gradient_checkpointing true --precompute_ref_log_probs true --ref_cache_dir none",
    ),
    "SimPO, untied, Adafactor, two micro-batches": (
        *(UNTIED, (300, 200), 2),
        "--gradient_checkpointing false --loss simpo --optim adafactor "
        "--gradient_accumulation_steps 2",
    ),
    "LoRA on every layer, prompts not shared, budget 0": (
        *(LLAMA, (500, 100), 2),
        "--gradient_checkpointing true --use_peft true --lora_target_modules q_proj k_proj v_proj "
        "o_proj gate_proj up_proj down_proj --prefix_sharing false --head_memory_budget 0",
    ),
    "KTO, checkpointing": (
        *(LLAMA, (200, 300), 4),
        "--gradient_checkpointing true --loss kto",
    ),
    "ORPO, untied, checkpointing": (
        *(UNTIED, (120, 380), 3),
        "--gradient_checkpointing true --loss orpo",
    ),
    "LoRA on attention, adapter off, two micro-batches": (
        *(LLAMA, (600, 100), 2),
        "--gradient_checkpointing false --gradient_accumulation_steps 2 --use_peft true "
        "--lora_r 64 --lora_target_modules q_proj k_proj v_proj o_proj",
    ),
}
"""Model, tokens of prompt and of response, pairs a micro-batch, flags."""
FOUND_ON = tuple(CONFIGURATIONS)[:7]


def make_models(folder: Path) -> dict[str, Path]:
    """The models by name, each with the tokenizer of as many words as its head has rows."""
    paths = {LLAMA: folder / "llama", UNTIED: folder / "untied", SMALLEST: folder / "smallest"}
    step.make_model(paths[LLAMA])
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths[LLAMA])
    known = transformers.AutoConfig.from_pretrained(paths[LLAMA]).to_dict()
    smallest = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    untied = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    more = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    made = {
        SMALLEST: transformers.LlamaConfig(**known | smallest | few),
        UNTIED: transformers.LlamaConfig(**known | untied | more | {"tie_word_embeddings": False}),
    }
    for name, config in made.items():
        tokenizer.save_pretrained(paths[name])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(paths[name])
    return paths


def make_pairs(path: Path, lengths: tuple[int, int], count: int) -> None:
    """Write pairs whose prompt and responses have exactly these many tokens."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(4, step.VOCAB)}" for _ in range(number))

    prompt, response = lengths
    rows = [
        # one word less: a response ends with an end-of-text token
        {"prompt": words(prompt), **{k: " " + words(response - 1) for k in ("chosen", "rejected")}}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# The kernel counts to a process what its parent held when it was started: a small one starts it.
WATCH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def peak_of(command: list[str], environment: dict[str, str]) -> int:
    """Peak resident bytes of a command, which must succeed."""
    watched = [sys.executable, "-c", WATCH, *command]
    done = subprocess.run(watched, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def compare(
    name: str, models: dict[str, Path], folder: Path, threads: int, recorded: str
) -> dict[str, Any]:
    """A row: what is predicted for a configuration, and what it took."""
    model, lengths, size, text = CONFIGURATIONS[name]
    data = folder / "pairs.jsonl"
    make_pairs(data, lengths, 2 * STEPS * size)
    flags = [
        *("--model", str(models[model]), "--dataset", str(data), "--max_length", "8192"),
        *("--per_device_train_batch_size", str(size), "--use_cpu", "true", *text.split()),
    ]
    running = [
        *("--output_dir", str(folder / "run"), "--max_steps", str(STEPS), "--save_strategy", "no"),
        *("--logging_steps", "1", "--dataloader_pin_memory", "false"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    fastpref = [sys.executable, "-m", "fastpref"]
    plan = [*fastpref, "plan", *flags, "--json"]
    done = subprocess.run(plan, capture_output=True, text=True, env=environment, check=False)
    if not done.stdout:
        raise RuntimeError(f"{shlex.join(plan)}\n{done.stderr}")
    predicted = json.loads(done.stdout)
    measured = peak_of([*fastpref, "train", *flags, *running], environment)
    return {
        "system": name,
        "model": model,
        "tokens": list(lengths),
        "pairs_per_micro_batch": size,
        "flags": text,
        "device": device_name("wall"),
        "measured": True,
        "worked_out_on": name in FOUND_ON,
        "predicted_parts": predicted["parts"],
        "predicted_bytes": predicted["total"],
        "peak_rss_bytes": measured,
        "error": round(predicted["total"] / measured - 1, 4),
        "versions": versions("cpu", "transformers", "peft"),
        "commit": recorded,
        "command": shlex.join(["python", "benchmarks/plan.py", *sys.argv[1:]]),
    }


def main() -> None:
    """Compare, print the rows, and keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--commit", default=commit(), help="recorded in the rows")
    parser.add_argument("--out", type=Path, help="append the rows to this JSON list")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    made = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder)
        for configuration in asked.only:
            row = compare(configuration, models, folder, asked.threads, asked.commit)
            print(json.dumps({k: v for k, v in row.items() if k not in ("versions", "command")}))
            made.append(row)
    if asked.out:
        append(asked.out, made)


if __name__ == "__main__":
    main()
