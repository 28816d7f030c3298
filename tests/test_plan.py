"""``fastpref plan``: what is counted is what a real step holds, and its advice is true."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from fastpref import cli, plan
from fastpref.estimate import Estimate, Lengths, Machine, Run, estimate, lay_out
from fastpref.footprint import HOLES, Layout, count_step, faked
from fastpref.policy import response_logps

spec = importlib.util.spec_from_file_location(
    "makers", Path(__file__).with_name("trainer") / "conftest.py"
)
makers = importlib.util.module_from_spec(spec)
sys.modules["makers"] = makers
spec.loader.exec_module(makers)

SMALL = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WEIGHTS = 21_728
"""Of the model below, by hand: two embeddings of 97 x 32; in each of two layers 32 x 32 twice and
16 x 32 twice for attention, three of 32 x 48, and two norms of 32; a last norm."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model's configuration and tokenizer, and no weights."""
    path = tmp_path_factory.mktemp("a model")
    makers.make_tokenizer().save_pretrained(path)
    makers.make_model().config.save_pretrained(path)
    return str(path)


def planned(model: str, *flags: str) -> Run:
    return without_process(["--model", model, "--device", "cpu", "--memory", "1GiB", *flags])


def without_process(given: list[str]) -> Run:
    """A run in a process that takes nothing: what this one takes changes from call to call."""
    run = plan.parse(given)[0]
    return replace(run, machine=run.machine._replace(base=0))


def found(model: str, *flags: str) -> Estimate:
    return estimate(planned(model, *flags))


def of_tensors(estimate: Estimate) -> dict[str, int]:
    """Its parts, without malloc's holes, which differ a little from process to process."""
    return {part: size for part, size in estimate.parts.items() if part != HOLES}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The status, and what was printed: the error if there was one."""
    status = cli.main(["plan", *arguments])
    out, error = capsys.readouterr()
    return status, error if status == 2 else out


# What is counted


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen2Config(**SMALL, tie_word_embeddings=False),
        Gemma2Config(**SMALL),
    ],
    ids=["tied", "untied", "gemma2"],
)
def test_parameters_are_the_real_models(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_config(config)
    got = found(str(tmp_path / "config.json"))
    assert got.parameters == got.trained == real.num_parameters()
    size = sum(x.numel() * x.element_size() for x in [*real.parameters(), *real.buffers()])
    assert got.parts["weights"] == size


def test_an_adapter_trains_what_it_adds(model: str) -> None:
    got = found(model, "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    assert got.trained == 2 * 4 * ((32 + 32) + (32 + 16))  # layers x rank x (in + out)
    assert got.parameters == WEIGHTS + got.trained
    assert got.parts["reference"] == 0
    # Adam's two numbers a weight, and a step counter for each of 8 matrices
    assert got.parts["optimiser"] == 2 * 4 * got.trained + 8 * 4


def test_each_part_of_a_full_run_by_hand(model: str) -> None:
    flags = ("--prompt_tokens", "2", "--response_tokens", "2", "--per_device_train_batch_size", "1")
    got = found(model, *flags, "--self_check", "false", "--gradient_accumulation_steps", "1")
    assert got.layout == Layout(1, 6, 4)  # a prompt and two responses
    assert got.parameters == WEIGHTS
    buffers = got.parts["weights"] - 4 * WEIGHTS
    assert 0 < buffers < 100  # frequencies of the rotary embedding
    assert got.parts["reference"] == got.parts["weights"]
    # so few tokens leave the peak to the end of the backward, where every gradient is there
    assert got.parts["gradients"] == 4 * WEIGHTS
    matrices = 2 * 9 + 3
    assert got.parts["optimiser"] == 2 * 4 * WEIGHTS + 4 * matrices
    # a tile of logits and its operands; E, which a CPU keeps
    assert got.parts["head"] == 4 * (4 * 97 + (4 + 97) * 32) + 4 * 4 * 97
    assert got.parts["attention mask"] == 2 * 6 * 6  # of this micro-batch and the next
    longer = found(model, "--prompt_tokens", "40", "--response_tokens", "40", *flags[4:])
    # log-prob gradients by hidden state, and E: of 80 response tokens instead of 4
    assert longer.parts["head"] >= 4 * (80 * 97 + (80 + 97) * 32) + 4 * 80 * 97


def test_the_count_is_what_a_real_step_holds() -> None:
    """The profiler's account of the same forward and backward, with real numbers."""
    model = makers.make_model(hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    layout = rows, tokens, _ = Layout(2, 256, 40)
    options: dict[str, Any] = {
        "head_options": {},
        "precision": None,
        "make_optimizer": lambda m: torch.optim.SGD(m.parameters()),
        "micro_batches": 1,
        "on_cpu": False,
    }
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.device("meta"):
            twin = AutoModelForCausalLM.from_config(model.config)
        if checkpointing:
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        with faked(twin):
            counted = count_step(twin, layout, **options)
        measured = profiled(model, layout)
        masks = 2 * rows * tokens**2  # this micro-batch's and the next's, made before measuring
        assert counted.total() - masks == pytest.approx(measured, rel=0.03), checkpointing


def profiled(model: Any, layout: Layout) -> int:
    """Most bytes at once of a forward and backward, by PyTorch's profiler."""
    rows, tokens, scored = layout
    batch = {
        "input_ids": torch.randint(97, (rows, tokens)),
        "position_ids": torch.arange(tokens).repeat(rows, 1),
        "attention_mask": torch.ones(layout.mask_shape, dtype=torch.bool).tril(),
        "response_rows": torch.arange(scored),
        "response_targets": torch.randint(97, (scored,)),
    }
    model.train()
    response_logps(model, batch)  # what is made once is made here
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        response_logps(model, batch).logps.sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    model.zero_grad()
    return most


# Layouts


def test_the_layout_is_the_collators(model: str) -> None:
    from fastpref.data import PreferenceCollator

    lengths = [(9, 5, 3), (2, 7, 7), (20, 1, 4)]
    rows = [
        {"prompt_ids": [1] * p, "chosen_ids": [1] * c, "rejected_ids": [1] * r}
        for p, c, r in lengths
    ]
    for flags, options in {
        (): {},
        ("--prefix_sharing", "false"): {"prefix_sharing": False},
        ("--max_tokens_per_batch", "32"): {"row_tokens": 32},
        ("--pad_to_multiple_of", "16"): {"pad_to_multiple_of": 16},
    }.items():
        batch = PreferenceCollator(0, **options)(rows)
        got = lay_out(lengths, planned(model, *flags).config, dense_mask=True, prompts=False)
        assert got == (*batch["input_ids"].shape, len(batch["response_targets"])), flags
    apart = planned(model, "--packing", "false").config
    assert lay_out(lengths, apart, dense_mask=True, prompts=True) == (6, 24, 27 + 8 + 1 + 19)


def test_the_longest_batch_that_can_come() -> None:
    rows = ((1, 2, 3), (9, 9, 9), (1, 1, 1), (8, 8, 8), (5, 5, 5))
    assert Lengths(rows).batch(2) == [(9, 9, 9), (8, 8, 8)]
    assert Lengths(rows, ordered=True).batch(2) == [(1, 2, 3), (9, 9, 9)]
    assert len(Lengths(rows).batch(7)) == 7
    assert Lengths(rows).scaled(2).longest == 36


def test_lengths_come_from_the_dataset(model: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "w1 w2 w3", "chosen": " w4", "rejected": " w5 w6"}] * 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = planned(model, "--dataset", str(data))
    assert run.lengths.rows == ((3, 2, 3),) * 3  # each response ends with an end-of-text token
    assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= run.columns


# What the options change


def test_references(model: str) -> None:
    copied = found(model)
    assert copied.parts["reference"] == copied.parts["weights"]
    for flags in (
        ("--precompute_ref_log_probs", "true"),
        ("--loss", "simpo"),
        ("--reference_free", "true"),
        ("--use_peft", "--lora_target_modules", "q_proj"),
    ):
        assert found(model, *flags).parts["reference"] == 0, flags
    named = found(model, "--ref_model_name_or_path", model, "--dtype", "bfloat16")
    assert named.parts["reference"] == named.parts["weights"] < 0.6 * copied.parts["weights"]


def test_a_run_s_own_config_is_planned(model: str, tmp_path: Path) -> None:
    flags = ("--loss", "ipo", "--optim", "adafactor", "--per_device_train_batch_size", "3")
    run = planned(model, *flags)
    from fastpref.recorder import resolved

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(resolved(run.model, run.config)))
    again = without_process(["--config", str(path), "--device", "cpu", "--memory", "1GiB"])
    assert of_tensors(estimate(again)) == of_tensors(found(model, *flags))


# Machines and advice


@pytest.mark.parametrize(
    ("text", "device", "size"),
    [
        ("24GiB", "cpu", 24 << 30),
        ("24 gb", "cpu", 24 * 10**9),
        ("0.5TiB", "cpu", 1 << 39),
        ("8G", "cpu", 8 << 30),
        ("h100", "cuda", 81_559 << 20),
        ("NVIDIA RTX 4090", "cuda", 24_564 << 20),
    ],
)
def test_memory_in_words(text: str, device: str, size: int) -> None:
    machine = plan.machine_of(text, None, use_cpu=True)
    assert (machine.device, machine.memory) == (device, size)


def test_a_gpu_trains_in_bf16_and_keeps_frozen_weights_in_it(model: str) -> None:
    run = plan.parse(["--model", model, "--memory", "h100", "--use_peft", "true"])[0]
    assert run.config.bf16
    assert run.machine.base == plan.CUDA_BASE
    on_cpu = found(model, "--use_peft", "true")
    assert estimate(run).parts["weights"] < 0.6 * on_cpu.parts["weights"]
    explicit = ["--model", model, "--memory", "h100", "--bf16", "false"]
    assert not plan.parse(explicit)[0].config.bf16


def test_what_a_setting_is_said_to_save_it_saves(model: str) -> None:
    flags = ("--gradient_checkpointing", "false", "--per_device_train_batch_size", "4")
    run = planned(model, *flags, "--prompt_tokens", "60", "--response_tokens", "60")
    whole = estimate(run)
    tried = {c.flags: estimate(run.changed(**c.options)) for c in plan.changes(run, whole)}
    assert len(tried) == 7
    for text, then in list(tried.items())[::3]:  # what the flags themselves would give
        given = found(model, *flags, *text.split(), *LENGTHS)
        assert (of_tensors(then), then.layout) == (of_tensors(given), given.layout), text
    short = run.machine._replace(memory=whole.total - 1)
    told = plan.advice(Run(run.model, run.config, run.lengths, short), whole)
    saved = [float(line.split()[0].replace(",", "")) for line in told.splitlines()[2:]]
    assert saved == sorted(saved)
    assert "(fits" in told
    nothing = run.machine._replace(memory=run.machine.base)
    told = plan.advice(Run(run.model, run.config, run.lengths, nothing), whole)
    assert "no single one is enough" in told
    assert "does not fit either" in told


LENGTHS = ("--prompt_tokens", "60", "--response_tokens", "60")


def test_the_largest_that_fits_fits_and_one_more_does_not(model: str) -> None:
    # of a GPU, whose plan has no holes
    run = planned(model, *LENGTHS, "--self_check", "false", "--device", "cuda")
    five = estimate(run.changed(per_device_train_batch_size=5)).total
    run = Run(run.model, run.config, run.lengths, run.machine._replace(memory=five))
    told = plan.limits(run)
    assert told.startswith("at most: 5 a micro-batch")
    assert "prompt + response of" in told
    none = Run(run.model, run.config, run.lengths, run.machine._replace(memory=1))
    assert plan.limits(none) == "not even one a micro-batch fits"


def test_the_command(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--model", model, "--device", "cpu", *LENGTHS)
    total = json.loads(said(capsys, *given, "--memory", "1TiB", "--json")[1])["total"]
    status, text = said(capsys, *given, "--memory", f"{total // 1024 + 200_000}K")
    assert status == 0
    assert "it fits" in text
    assert "a copy of the model" in text
    assert "at most:" in text
    status, text = said(capsys, *given, "--memory", "1MiB")
    assert status == 1
    assert "it does not fit" in text
    # what an adapter saves of a model this small is less than malloc's holes vary by, so that the
    # table may leave it out; it is tried all the same
    run = plan.parse([*given, "--memory", "1MiB"])[0]
    tried = [change.flags for change in plan.changes(run, plan.estimate(run))]
    assert "--use_peft true" in tried
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in text
    assert "not even one" in text
    status, text = said(capsys, *given, "--memory", "1TiB", "--json")
    answer = json.loads(text)
    assert answer["total"] == sum(answer["parts"].values())
    assert (status, answer["fits"], answer["memory"]) == (0, True, 1 << 40)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./nowhere"], "./nowhere: no such file or directory"),
        (["--model", "{model}", "--gradient_checkpoint", "true"], "'gradient_checkpointing'?"),
        (["--model", "{model}", "--memry", "1GiB"], "Did you mean 'memory'?"),
        (["--model", "{model}", "--memory", "24 bananas"], "expected a size with its unit"),
        (["--model", "{model}", "--memory", "h10"], "Did you mean 'h100'?"),
        (["--model", "{model}", "--memory", "0GiB"], "expected a size with its unit"),
        (["--model", "{model}", "--response_tokens", "0"], "--response_tokens must be at least 1"),
        (["--model", "{model}", "--optim", "adamw8"], "adamw8"),
        (["--model", "{model}", "--loss", "dpoo"], "dpo"),
        (["--memory", "1GiB"], "--model is missing"),
    ],
)
def test_errors_say_what_to_do(
    model: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    status, text = said(capsys, *(flag.format(model=model) for flag in flags))
    assert status == 2
    assert message in text
    assert "Traceback" not in text


def test_a_machine_is_this_one() -> None:
    machine = plan.machine_of(None, "cpu")
    assert isinstance(machine, Machine)
    assert machine.base < machine.memory == plan.host_memory()


def test_the_page_shows_the_rows() -> None:
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("tables", root / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (root / "docs" / "plan.md").read_text()
    assert tables.rewritten(text) == text, "run: python benchmarks/tables.py"
