"""Which attention is chosen, and that FlexAttention gives what SDPA gives, gradients too.

What needs a GPU is marked ``gpu``. On a CPU PyTorch refuses FlexAttention's backward, though its
plain arithmetic has one: with that check out of the way the same masks go through it here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import transformers.integrations.flex_attention as hf_flex
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref import DPOConfig, DPOTrainer
from fastpref.attention import (
    FLEX,
    VERSIONS,
    attention_of,
    choose_attention,
    flex_fault,
    settle_attention,
)
from fastpref.batches import make_collator
from fastpref.data import PreferenceCollator
from fastpref.models import load_model
from fastpref.policy import response_logps

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 40}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen3": {},
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "gemma2": GEMMA,  # by name alone: the default leaves it eager
    "phi3": {},
}
DEFAULTS: Any = SimpleNamespace(packing=True, disable_dropout=True, bf16=False, fp16=False)
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tiny(name: str, implementation: str | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS.get(name, {}), **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def rows(count: int = 3, scale: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """Longer together than one block of a mask, and each longer than the windows above."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low * scale, high * scale, (1,), generator=draw))
        return torch.randint(3, 97, (size,), generator=draw).tolist()

    return [
        {"prompt_ids": ids(20, 50), "chosen_ids": ids(5, 40), "rejected_ids": ids(5, 40)}
        for _ in range(count)
    ]


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer: Any) -> Callable[[], Path]:
    """A folder with a tiny model and its tokenizer."""

    def build() -> Path:
        tiny("llama").save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


@pytest.mark.parametrize(
    ("name", "given", "named", "device", "chosen", "why"),
    [
        ("llama", {}, None, "cuda", FLEX, "skips what the mask of packed rows hides"),
        ("gemma3_text", {}, None, "cuda", FLEX, "skips"),
        ("llama", {}, None, "cpu", "sdpa", "FlexAttention trains on CUDA devices, .* a cpu"),
        ("llama", {}, "sdpa", "cuda", "sdpa", "as it was loaded"),
        ("llama", {}, FLEX, "cpu", FLEX, "as it was loaded"),
        ("llama", {"packing": False}, None, "cuda", "sdpa", "packing=False"),
        ("gemma2", {}, None, "cuda", "eager", "what transformers takes for Gemma2ForCausalLM"),
        ("gpt2", {}, None, "cuda", "sdpa", "no FlexAttention for GPT2LMHeadModel"),
    ],
)
def test_the_choice(
    name: str, given: dict[str, Any], named: str | None, device: str, chosen: str, why: str
) -> None:
    args = SimpleNamespace(**{**vars(DEFAULTS), **given})
    found = choose_attention(tiny(name), args, named, device)
    assert found.name == chosen
    assert re.search(why, found.why)


def test_dropout_keeps_sdpa() -> None:
    """transformers' FlexAttention raises for it."""
    model = tiny("llama", attention_dropout=0.1)
    args = SimpleNamespace(**{**vars(DEFAULTS), "disable_dropout": False})
    assert choose_attention(model, args, None, "cuda").name == "sdpa"
    assert choose_attention(model, DEFAULTS, None, "cuda").name == FLEX


def test_the_log_says_which_and_why(
    make_folder: Callable[[], Path], options: Callable[..., dict[str, Any]], caplog: Any
) -> None:
    args = DPOConfig(**options())
    folder = str(make_folder())
    with caplog.at_level(logging.INFO, logger="fastpref"):
        assert attention_of(load_model(folder, args)) == "sdpa"
        assert attention_of(load_model(folder, args, attn_implementation="eager")) == "eager"
    assert [record.message for record in caplog.records] == [
        f"attention of LlamaForCausalLM: {words}. attn_implementation sets another: of "
        "from_pretrained, in model_init_kwargs, or as a flag"
        for words in (
            "sdpa (FlexAttention trains on CUDA devices, and this is a cpu)",
            "eager (as it was loaded)",
        )
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlexAttention works on a GPU")
def test_flex_attention_that_fails_is_not_taken(caplog: Any) -> None:
    """Here because there is no GPU; elsewhere for want of a compiler, or of shared memory."""
    model = tiny("llama")
    settle_attention(model, DEFAULTS, None, torch.device("cuda"))
    assert attention_of(model) == "sdpa"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "sdpa (FlexAttention, the default, fails here: AssertionError: Torch not" in (
        record.message
    )
    fault = flex_fault(4, 2, 16, torch.float32, torch.device("cpu"), None)
    assert fault is not None
    assert "does not support backward on CPU" in fault


def test_flex_attention_may_be_compiled_in_more_versions(caplog: Any) -> None:
    with torch._dynamo.config.patch(recompile_limit=8), caplog.at_level("INFO", logger="fastpref"):
        settle_attention(tiny("llama"), DEFAULTS, None, torch.device("cpu"))
        assert torch._dynamo.config.recompile_limit == 8
        settle_attention(tiny("llama", FLEX), DEFAULTS, FLEX, torch.device("cpu"))
        assert torch._dynamo.config.recompile_limit == VERSIONS
    assert "flex_attention (as it was loaded)" in caplog.text


def test_rows_for_blocks_come_without_a_mask_and_in_whole_blocks() -> None:
    tokenizer, losses = SimpleNamespace(pad_token_id=0), SimpleNamespace(kind="pair")
    model = tiny("llama", FLEX)
    args = SimpleNamespace(prefix_sharing=True, max_tokens_per_batch=None, pad_to_multiple_of=None)
    batch = make_collator(args, tokenizer, losses, model)(rows())
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape[0] == 1
    assert batch["input_ids"].shape[1] % 128 == 0
    args.pad_to_multiple_of = 8
    width = make_collator(args, tokenizer, losses, model)(rows())["input_ids"].shape[1]
    assert width % 8 == 0
    assert batch["input_ids"].shape[1] - width < 128


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_reference_reads_what_was_laid_out_for_blocks(name: str) -> None:
    """With attention of another kind than the policy's."""
    model, examples = tiny(name), rows()
    with torch.no_grad():
        lean = response_logps(model, PreferenceCollator(0, dense_mask=False)(examples)).logps
        full = response_logps(model, PreferenceCollator(0)(examples)).logps
    torch.testing.assert_close(lean, full, rtol=0, atol=1e-5)


def logps_and_gradients(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logps = response_logps(model, batch).logps
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    """Log-probs in nats, gradients of each parameter's largest."""
    assert (found[0] - expected[0]).abs().max() <= tolerance
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max(), name


def both(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Log-probs and gradients with what transformers takes, and with FlexAttention."""
    model = tiny(name).to(device)
    examples = rows()
    found = []
    for dense in (True, False):
        batch = PreferenceCollator(0, dense_mask=dense, row_tokens=300)(examples)
        batch = {key: value.to(device) for key, value in batch.items()}
        if not dense:
            model.set_attn_implementation(FLEX)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found.append(logps_and_gradients(model, batch))
    return found[0], found[1]


@pytest.mark.parametrize("name", MODELS)
def test_flex_attention_is_sdpa_in_plain_arithmetic(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncompiled(query: Any, key: Any, value: Any, training: bool = False, **rest: Any) -> Any:
        return torch_flex.flex_attention(query, key, value, **rest)

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", uncompiled)
    expected, found = both(name, "cpu")
    assert_same(found, expected, 1e-5)


class TestOnAGpu:
    """Not run where these lines were written."""

    pytestmark = GPU

    @pytest.mark.parametrize("name", MODELS)
    def test_equal_in_fp32(self, name: str) -> None:
        expected, found = both(name, "cuda")
        assert_same(found, expected, 1e-4)

    @pytest.mark.parametrize("name", MODELS)
    def test_equal_under_autocast(self, name: str) -> None:
        expected, found = both(name, "cuda", torch.bfloat16)
        assert_same(found, expected, 0.05)

    def test_it_is_the_default(
        self, make_folder: Callable[[], Path], options: Callable[..., dict[str, Any]], make: Any
    ) -> None:
        """The losses of a short training are SDPA's."""
        losses = []
        for kwargs in ({}, {"attn_implementation": "sdpa"}):
            given = {"use_cpu": False, "bf16": False, "model_init_kwargs": kwargs}
            trainer = DPOTrainer(
                str(make_folder()),
                args=DPOConfig(**options(max_steps=5, **given)),
                train_dataset=make.pairs(20),
            )
            assert attention_of(trainer.model) == kwargs.get("attn_implementation", FLEX)
            assert ("attention_mask" in next(iter(trainer.get_train_dataloader()))) == bool(kwargs)
            trainer.train()
            losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    def test_lengths_that_change_are_not_compiled_each(self) -> None:
        """PyTorch would fall back on all scores at once, silently, after a few versions."""
        model = tiny("gemma3_text", FLEX).to("cuda").train()
        settle_attention(model, DEFAULTS, FLEX, torch.device("cuda"))
        torch._dynamo.reset()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for seed in range(30):
                batch = PreferenceCollator(0, dense_mask=False)(rows(2, 1 + seed % 7, seed))
                batch = {key: value.to("cuda") for key, value in batch.items()}
                with torch.no_grad():
                    response_logps(model.eval(), batch)
                response_logps(model.train(), batch).logps.sum().backward()
