"""A tiny random Llama, a tokenizer of a hundred words, and preference pairs: all made offline."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastpref

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCAB = SPECIAL + [f"w{i}" for i in range(93)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_model(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(VOCAB),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.2,
            **options,
        }
    )
    return LlamaForCausalLM(config)


def make_pairs(count: int = 12, seed: int = 0, **columns: Any) -> Dataset:
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(93)}" for _ in range(draw.randint(low, high)))

    rows = [
        {"prompt": words(2, 9), "chosen": " " + words(1, 8), "rejected": " " + words(1, 12)}
        for _ in range(count)
    ]
    return Dataset.from_list([{**row, **columns} for row in rows])


def sketch(tensors: list[torch.Tensor]) -> list[float]:
    """Four numbers that differ if any of the tensors does."""
    flat = torch.cat([x.detach().flatten() for x in tensors])
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(3, len(flat), generator=draw, dtype=torch.float64)
    return [flat.norm().item(), *(directions @ flat).tolist()]


def load_script(name: str) -> Any:
    """The module ``name.py`` of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_two_ranks(name: str, folder: Path) -> dict[str, Any]:
    """What ``name.py FOLDER`` leaves in ``result.json``, run by two processes of a thread each."""
    folder.mkdir()
    package = Path(fastpref.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name(f"{name}.py")), str(folder)],
        env={**os.environ, **common},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def leave() -> None:
    """End this rank, once all ranks get here.

    Not by the interpreter's own end: gloo's threads release tensors meanwhile, want its lock, and
    abort the process every now and then.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


class Make:
    """The makers, for tests: ``make.model(seed)``, ``make.pairs(count, seed)``."""

    script = staticmethod(load_script)
    on_two_ranks = staticmethod(on_two_ranks)
    model = staticmethod(make_model)
    pairs = staticmethod(make_pairs)


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Keyword arguments of a quiet, deterministic config."""

    def build(**overrides: Any) -> dict[str, Any]:
        return {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "max_steps": 3,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            **overrides,
        }

    return build
