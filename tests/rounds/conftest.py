"""A tiny random policy of a dozen words on disk, prompts and pairs for it: all made offline."""

from __future__ import annotations

import multiprocessing
import random
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"w{i}" for i in range(12)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def save_policy(folder: Path, seed: int = 0) -> str:
    make_model(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def make_prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"prompt": f"w{i % 12} {words(draw, 2, 5)}"} for i in range(count)]


def make_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed + 1)
    return [
        {**row, "chosen": " " + words(draw, 1, 6), "rejected": " " + words(draw, 1, 6)}
        for row in make_prompts(count, seed)
    ]


def count_w3(prompt: Any, response: str) -> float:
    """The gold reward of these tests: how often a response says w3."""
    return float(response.split().count("w3"))


class Make:
    """The makers, for tests."""

    model = staticmethod(make_model)
    tokenizer = staticmethod(make_tokenizer)
    policy = staticmethod(save_policy)
    prompts = staticmethod(make_prompts)
    pairs = staticmethod(make_pairs)
    reward = staticmethod(count_w3)


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy's folder."""
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another's."""
    return save_policy(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def stopped_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Runs a script killed and gone on with, and the same in one go; the folders of both.

    The script is given this folder, a folder with a policy, and a word. Each of ``kills`` has it
    kill itself with SIGKILL in a process of its own, one after the other in one folder; ``live``
    does not. ``killed`` is called with the folder and the word after each kill.
    """
    # Forked from a process that has all imported: a fresh interpreter takes seconds to get there.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fastpref.trainer", "transformers.models.llama", "datasets"])

    def play(
        source: str,
        kills: Sequence[str],
        live: str,
        killed: Callable[[Path, str], None] = lambda folder, kill: None,
    ) -> list[Path]:
        script = tmp_path / "killed.py"
        script.write_text(source)
        folders = [tmp_path / "stopped", tmp_path / "whole"]
        monkeypatch.setattr(sys, "path", list(sys.path))
        for folder in folders:
            save_policy(folder / "policy")
            arguments = [str(script), str(Path(__file__).parent), str(folder)]
            for kill in kills if folder.name == "stopped" else ():
                monkeypatch.setattr(sys, "argv", [*arguments, kill])
                process = processes.Process(target=runpy.run_path, args=(str(script),))
                process.start()
                process.join(180)
                assert process.exitcode == -9, f"{kill}: ended with {process.exitcode}"
                killed(folder, kill)
            monkeypatch.setattr(sys, "argv", [*arguments, live])
            runpy.run_path(str(script))
        return folders

    return play


@pytest.fixture
def options(tmp_path: Path, policy: str) -> Callable[..., dict[str, Any]]:
    """Options of a recipe that takes a second."""

    def build(**given: Any) -> dict[str, Any]:
        training = {
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
            "max_length": 64,
            **given.pop("training", {}),
        }
        return {
            "model": policy,
            "run_dir": str(tmp_path / "run"),
            "training": training,
            "use_cpu": True,
            "held_out": 4,
            "resamples": 20,
            "max_prompt_tokens": 16,
            "max_new_tokens": 8,
            **given,
        }

    return build
