"""``fastpref plan``: how much memory a run will take, whether it fits, and what to change if not.

Takes the options of ``fastpref train``, as flags or YAML. Nothing is run and no weights are read.
The exit status is 0 if the run fits, 1 if it does not, 2 if it cannot be planned.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.config import PreferenceConfig, native_bf16
from fastpref.estimate import (
    IMPORTED,
    PROCESS,
    REFERENCE,
    WEIGHTS,
    Estimate,
    Lengths,
    Machine,
    Run,
    estimate,
)
from fastpref.footprint import ACTIVATIONS, GRADIENTS, HEAD, HOLES, MASK, OPTIMISER
from fastpref.options import ModelArguments, ScriptArguments, parse_options

USAGE = "fastpref plan --model MODEL [--dataset DATA] [--memory 24GiB] [options of fastpref train]"
MIB = 1 << 20

GPUS = {
    **{"a10": 23_028, "l4": 23_034, "rtx4090": 24_564, "rtx3090": 24_576, "rtx5090": 32_607},
    **{"a100-40gb": 40_960, "l40s": 46_068, "a6000": 49_140, "h100": 81_559, "a100": 81_920},
    **{"h200": 143_771, "b200": 183_359},
}
"""Memory of GPUs that compute in bf16, MiB, as their driver reports it."""

CUDA_BASE = 600 * MIB
"""What a process takes on a GPU before any tensor: context, kernels, cuBLAS workspace. Stated, not
measured here; the allocator's fragments come on top."""
CPU_RUNNING = 60 * MIB
"""What a process that trains takes beyond its imports and tensors: code of kernels, tokenizer,
dataset. Measured on almost no model (benchmarks/plan.py)."""

ORDER = (PROCESS, WEIGHTS, REFERENCE, GRADIENTS, OPTIMISER, ACTIVATIONS, MASK, HEAD, HOLES)
"""Of the parts in the table."""
RESPONSES = {"pair": 2, "unpaired": 1, "group": 4}
"""To a prompt, by kind of data, where no dataset says how many."""
_PAIRS_LIMIT, _TOKENS_LIMIT = 512, 1 << 16


def main(argv: Sequence[str]) -> int:
    """Prints the plan; 0, or 1 if the run does not fit."""
    run, as_json = parse(argv)
    found = estimate(run)
    fits = found.total <= run.machine.memory
    if as_json:
        print(json.dumps(to_dict(run, found), indent=2))
        return 0 if fits else 1
    print(describe(run, found))
    if not fits:
        print(advice(run, found))
    print(limits(run))
    return 0 if fits else 1


# What is asked


def _own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("plan")
    add = group.add_argument
    add("--memory", help=f"to fit into: 24GiB, or a GPU: {', '.join(GPUS)}; this machine's")
    add("--device", choices=("cpu", "cuda"), help="that the memory is of; this machine's")
    add("--prompt_tokens", type=int, help="of every prompt, without --dataset")
    add("--response_tokens", type=int, help="of every response, without --dataset")
    add("--json", action="store_true", help="print the table as JSON, bytes, without advice")
    return parser


def parse(argv: Sequence[str]) -> tuple[Run, bool]:
    """The run that flags, and the YAML file that ``--config`` names, describe; and ``--json``.

    Raises:
        ValueError: A value is missing, out of range, or contradicts another.
        TypeError: An option does not exist; the message names the nearest.
        FileNotFoundError: The dataset is not there.
    """
    # A GPU can be planned for where there is none, which transformers would refuse.
    here = [*argv] if torch.cuda.is_available() else [*argv, "--use_cpu", "true"]
    *_, config, own = parse_options(here, USAGE, [_own_flags()])
    machine = machine_of(own.memory, own.device, config.use_cpu)
    data, model, config, own = parse_options(here, USAGE, [_own_flags()], bf16=machine.bf16)
    if model.model_name_or_path is None:
        raise ValueError(f"--model is missing. Usage: {USAGE}")
    lengths, columns = _lengths(data, model, config, own)
    return Run(model, config, lengths, machine, columns), own.json


def machine_of(memory: str | None, device: str | None, use_cpu: bool = False) -> Machine:
    """The machine to fit into.

    Args:
        memory: A size, such as ``"24GiB"`` or ``"80 GB"``; the name of a GPU; None: this machine's.
        device: ``"cpu"`` or ``"cuda"``; None: a named GPU's, else what this machine trains on.
        use_cpu: It trains on its CPU.

    Raises:
        ValueError: There is no such size or GPU.
    """
    gpu = None if memory is None else re.sub(r"^nvidia|[\s_]", "", memory.lower())
    if gpu in GPUS:
        return Machine(gpu, "cuda", GPUS[gpu] * MIB, CUDA_BASE, True)
    has_gpu = torch.cuda.is_available() and not use_cpu
    device = device or ("cuda" if has_gpu else "cpu")
    bf16 = device == "cuda" and (not has_gpu or native_bf16())
    base = CUDA_BASE if device == "cuda" else process_bytes() + CPU_RUNNING
    if memory is not None:
        return Machine("--memory", device, _size(memory), base, bf16)
    if device == "cpu":
        return Machine("this machine", device, host_memory(), base, bf16)
    if not has_gpu:
        raise ValueError("--device cuda: no GPU is visible here; give its memory by --memory")
    name = torch.cuda.get_device_name()
    return Machine(name, device, torch.cuda.get_device_properties(0).total_memory, base, bf16)


def _size(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(b|ib)?\s*", text.lower())
    if found is not None:
        step = 1000 if found[3] == "b" else 1024
        size = int(float(found[1]) * step ** ("kmgt".index(found[2]) + 1))
        if size > 0:
            return size
    near = difflib.get_close_matches(text.lower(), GPUS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"--memory {text!r}: expected a size with its unit, such as 24GiB or 80GB, or a GPU: "
        f"{', '.join(GPUS)}.{hint}"
    )


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less in a container."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(total, int(text)) if text.isdigit() else total


def process_bytes() -> int:
    """Resident bytes of this process, once it has imported what a run imports."""
    import psutil

    for name in IMPORTED:
        importlib.import_module(name)
    return int(psutil.Process().memory_info().rss)


def _lengths(
    data: ScriptArguments, model: ModelArguments, config: PreferenceConfig, own: argparse.Namespace
) -> tuple[Lengths, frozenset[str]]:
    """Lengths of a dataset's rows, or as the flags say; and the dataset's columns."""
    from fastpref.objective import make_losses

    combined = make_losses(config)
    kind: Any = combined.kind
    if data.dataset_name is not None or data.datasets:
        if own.prompt_tokens is not None or own.response_tokens is not None:
            raise ValueError(
                "--prompt_tokens and --response_tokens stand in for a dataset, and one is given: "
                "drop either"
            )
        return _measured(data, model, config, kind)
    whole = config.max_length or 2048
    prompt = own.prompt_tokens
    response = own.response_tokens
    if response is None:
        response = config.max_completion_length or max(whole - (prompt or whole // 2), 1)
    if prompt is None:
        prompt = config.max_prompt_length or max(whole - response, 1)
    for name, value in {"prompt_tokens": prompt, "response_tokens": response}.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    extra = sum(word in combined.needs for word in ("third", "mismatched"))
    count = RESPONSES[kind] + extra
    return Lengths(((prompt, *[response] * count),)), frozenset()


def _measured(
    data: ScriptArguments, model: ModelArguments, config: PreferenceConfig, kind: Any
) -> tuple[Lengths, frozenset[str]]:
    from fastpref.batches import tokenised
    from fastpref.data.formats import response_names
    from fastpref.data.tokenize import token_counts
    from fastpref.models import load_tokenizer
    from fastpref.train import load_data

    assert model.model_name_or_path is not None
    tokenizer = load_tokenizer(model.model_name_or_path, trust_remote_code=config.trust_remote_code)
    dataset, _ = load_data(data, config)
    rows, _ = tokenised(dataset, tokenizer, config, kind)
    names = ["prompt", *response_names(rows.column_names, kind)]
    counts = token_counts(rows, [f"{name}_ids" for name in names])
    found = zip(*(column.tolist() for column in counts.values()), strict=True)
    ordered = config.train_sampling_strategy == "sequential"
    return Lengths(tuple(found), ordered), frozenset(rows.column_names)


# What is said


def to_dict(run: Run, found: Estimate) -> dict[str, Any]:
    """The plan as plain numbers, strings and dicts (JSON-safe); memory in bytes."""
    return {
        "parts": {part: found.parts[part] for part in ORDER},
        "total": found.total,
        "moment": found.moment,
        "memory": run.machine.memory,
        "fits": found.total <= run.machine.memory,
        "parameters": found.parameters,
        "trained": found.trained,
        **found.layout._asdict(),
    }


def describe(run: Run, found: Estimate) -> str:
    """The plan as a table: what is trained, the parts, the total, and whether it fits."""
    config, (rows, tokens, scored) = run.config, found.layout
    size = config.per_device_train_batch_size
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else run.model.dtype or "float32"
    lines = [
        f"{run.model.model_name_or_path}: {found.parameters:,} parameters, "
        f"{found.trained:,} trained, {precision}, {_optimiser(config)}",
        f"{'+'.join(config.loss_type)}, {size} a micro-batch: {rows} rows of {tokens:,} tokens, "
        f"{scored:,} scored",
        "",
    ]
    notes = {
        PROCESS: "Python and libraries" if run.machine.device == "cpu" else "CUDA and libraries",
        REFERENCE: _reference_note(run, found),
        ACTIVATIONS: "layers recomputed" if config.gradient_checkpointing else "all layers kept",
        MASK: f"{tokens:,} x {tokens:,} a row",
        HEAD: "tiles of logits, kept exponentials",
        HOLES: "free between blocks",
    }
    for part in ORDER if run.machine.device == "cpu" else [p for p in ORDER if p != HOLES]:
        note = notes.get(part, "")
        lines.append(f"  {part:<15}{_mib(found.parts[part])}  {note}".rstrip())
    lines.append(f"  {'total':<15}{_mib(found.total)}  {found.moment}")
    memory = run.machine.memory
    verdict = "it fits" if found.total <= memory else "it does not fit"
    share = found.total / memory
    lines += ["", f"{share:.0%} of {_mib(memory).strip()} ({run.machine.name}): {verdict}"]
    return "\n".join(lines)


def _reference_note(run: Run, found: Estimate) -> str:
    if found.copies:
        return "a copy of the model" if found.copies == 1 else f"{found.copies} models"
    if run.config.precompute_ref_log_probs:
        return "its log-probs are stored"
    return "the model without its adapter" if run.model.use_peft else "none"


def _optimiser(config: PreferenceConfig) -> str:
    return str(getattr(config.optim, "value", config.optim))


def _mib(size: int) -> str:
    return f"{size / MIB:>10,.0f} MiB"


class Change(NamedTuple):
    """One setting that could be another."""

    flags: str
    options: dict[str, Any]
    note: str = ""


def changes(run: Run, found: Estimate) -> Iterator[Change]:
    """The settings of a run that would take less memory otherwise."""
    config = run.config
    if not config.gradient_checkpointing:
        yield Change("--gradient_checkpointing true", {"gradient_checkpointing": True})
    if not run.model.use_peft:
        yield Change("--use_peft true", {"use_peft": True}, "LoRA; the reference is the model")
    if found.copies and not (config.sync_ref_model or config.precompute_ref_log_probs):
        named = run.model.ref_model_name_or_path or config.ref_models
        if not named:
            yield Change("--precompute_ref_log_probs true", {"precompute_ref_log_probs": True})
    size, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if size > 1:
        half = -(-size // 2)
        options = {"per_device_train_batch_size": half, "gradient_accumulation_steps": 2 * steps}
        yield Change(" ".join(f"--{k} {v}" for k, v in options.items()), options)
    if not (config.bf16 or config.fp16) and run.model.dtype != "bfloat16":
        yield Change("--bf16 true", {"bf16": True}, "activations in bf16")
    if config.head_memory_budget != 0:
        yield Change("--head_memory_budget 0", {"head_memory_budget": 0}, "slower head")
    if _optimiser(config).startswith("adamw"):
        yield Change("--optim adafactor", {"optim": "adafactor"})


def advice(run: Run, found: Estimate) -> str:
    """What each single setting would save, the most first, and whether the run then fits."""
    tried = [(change, estimate(run.changed(**change.options))) for change in changes(run, found)]
    tried = [(change, then) for change, then in tried if then.total < found.total]
    tried.sort(key=lambda pair: pair[1].total)
    lines = ["", "one setting to change:"]
    for change, then in tried:
        fits = "fits" if then.total <= run.machine.memory else "does not fit"
        note = f"; {change.note}" if change.note else ""
        lines.append(f"  {_mib(then.total - found.total)}  {change.flags}  ({fits}{note})")
    if not tried:
        return "\nno setting makes it smaller: take a smaller model or more memory"
    if all(then.total > run.machine.memory for _, then in tried):
        options = {k: v for change, _ in tried for k, v in change.options.items()}
        least = estimate(run.changed(**options))
        fits = "fits" if least.total <= run.machine.memory else "does not fit either"
        lines.append(f"no single one is enough; all of them: {_mib(least.total).strip()}, {fits}")
    return "\n".join(lines)


def limits(run: Run) -> str:
    """The most pairs in a micro-batch, and the longest prompt + response, that fit."""

    def pairs(n: int) -> Run:
        return run.changed(per_device_train_batch_size=n)

    def context(n: int) -> Run:
        return replace(run, lengths=run.lengths.scaled(n / run.lengths.longest))

    size = run.config.per_device_train_batch_size
    most = _most(run, pairs, _PAIRS_LIMIT, 1)
    longest = _most(run, context, _TOKENS_LIMIT, 64)
    if not most:
        return "not even one a micro-batch fits"
    told = [f"{most:,}{' or more' if most == _PAIRS_LIMIT else ''} a micro-batch"]
    if longest:
        more = " or more" if longest == _TOKENS_LIMIT else ""
        told.append(f"prompt + response of {longest:,} tokens{more} at {size} a micro-batch")
    return f"at most: {'; '.join(told)}"


def _most(run: Run, changed: Callable[[int], Run], limit: int, step: int) -> int:
    """The largest multiple of ``step`` that fits, up to ``limit``; 0 if none does."""

    def fits(n: int) -> bool:
        return estimate(changed(n * step)).total <= run.machine.memory

    low, high, top = 0, 1, limit // step
    while high <= top and fits(high):
        low, high = high, 2 * high
    high = min(high, top + 1)
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step
