"""What comes from the hub and what goes there; the hub itself is a folder, or never asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from fastpref import DPOConfig, DPOTrainer, PreferenceConfig, disk
from fastpref.models import load_model, load_tokenizer

Options = Callable[..., dict[str, Any]]


@pytest.fixture
def cached(make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a model in the hub's cache: two revisions, ``main`` and ``old``, whose tokenizers
    have other words for padding."""
    cache = tmp_path / "hub"
    repo = cache / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    for revision, commit, pad in (("main", "a" * 40, "w90"), ("old", "b" * 40, "w91")):
        (repo / "refs" / revision).write_text(commit)
        folder = repo / "snapshots" / commit
        make.model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text().replace("<pad>", pad))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return "someone/tiny"


@pytest.mark.parametrize(("revision", "pad"), [(None, "w90"), ("main", "w90"), ("old", "w91")])
def test_the_tokenizer_is_that_of_the_models_revision(
    make: Any, options: Options, cached: str, revision: str | None, pad: str
) -> None:
    kwargs = None if revision is None else {"revision": revision}
    trainer = DPOTrainer(
        cached,
        args=DPOConfig(**options(model_init_kwargs=kwargs)),
        train_dataset=make.pairs(),
    )
    assert trainer.processing_class.pad_token == pad
    assert load_tokenizer(cached, revision=revision or "main").pad_token == pad


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_the_hub_does_not_give(cached: str, options: Options, load: Any) -> None:
    args = () if load is load_tokenizer else (PreferenceConfig(**options()),)
    with pytest.raises(FileNotFoundError, match=r"^some/one: no such folder, and the hub could"):
        load("some/one", *args)


def test_weights_take_the_dtype_that_is_asked_for(cached: str, options: Options) -> None:
    args = PreferenceConfig(**options())
    assert load_model(cached, args).dtype == torch.float32
    assert load_model(cached, args, dtype=torch.bfloat16).dtype == torch.bfloat16
    args.model_init_kwargs = {"dtype": "float16"}
    assert load_model(cached, args, dtype=torch.bfloat16).dtype == torch.float16


def test_a_script_ends_with_a_push(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL's scripts do; what would be uploaded is a card that the hub reads."""
    sent: dict[str, Any] = {}
    pushed = tmp_path / "pushed"

    def upload_folder(folder_path: str, **kwargs: Any) -> None:
        sent.update(kwargs)
        shutil.copytree(folder_path, pushed)

    api = SimpleNamespace(
        upload_folder=upload_folder,
        create_repo=lambda name, **_: SimpleNamespace(repo_id=f"me/{name}"),
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    model = make.model()
    model.config._name_or_path = "someone/base"
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.25])),
        train_dataset=make.pairs(),
        processing_class=tokenizer,
    )
    trainer.push_to_hub(dataset_name="someone/pairs", tags="mine")
    assert sent["repo_id"] == "me/run"
    assert (pushed / "model.safetensors").exists()
    card = ModelCard.load(pushed / "README.md")
    data = yaml.safe_load(card.data.to_yaml())
    assert (data["base_model"], data["datasets"]) == ("someone/base", ["someone/pairs"])
    assert (data["model_name"], data["library_name"]) == ("run", "transformers")
    assert set(data["tags"]) >= {"fastpref", "dpo", "sft", "mine"}
    assert "| loss | 1 dpo + 0.25 sft |" in card.text
    assert f"torch {torch.__version__}" in card.text


def test_a_card_tells_no_path(make: Any, tokenizer: Any, options: Options, tmp_path: Path) -> None:
    make.model().save_pretrained(tmp_path / "base")
    trainer = DPOTrainer(
        str(tmp_path / "base"),
        args=DPOConfig(**options()),
        train_dataset=make.pairs(),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.create_model_card(dataset_name=str(tmp_path / "pairs.jsonl"))
    text = Path(trainer.args.output_dir, "README.md").read_text()
    assert str(tmp_path) not in text
    assert "library_name: peft" in text
    assert "| dataset | pairs.jsonl |" in text


def test_folders_are_not_opened_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "file", []
    disk.write_text(path, "before")
    really = os.open
    monkeypatch.setattr(os, "open", lambda p, flags: (opened.append(p), really(p, flags))[1])
    disk.sync(tmp_path)
    assert opened == [tmp_path]
    monkeypatch.setattr(os, "name", "nt")
    disk.sync(tmp_path)
    disk.sync(path)
    assert opened == [tmp_path, path]
    monkeypatch.undo()
    assert path.read_text() == "before"


def test_a_reference_by_name_has_the_policys_dtype(
    make: Any, tokenizer: Any, options: Options, cached: str
) -> None:
    trainer = DPOTrainer(
        make.model().bfloat16(),
        cached,
        args=DPOConfig(**options()),
        train_dataset=make.pairs(),
        processing_class=tokenizer,
    )
    assert trainer.ref_model.dtype == torch.bfloat16
