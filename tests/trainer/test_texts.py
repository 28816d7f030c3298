"""References with tokenizers of their own: the sums of the same texts, each by its own tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastpref import DPOConfig, PreferenceConfig, PreferenceTrainer, cli, losses
from fastpref.losses import PairLogps

Options = Callable[..., dict[str, Any]]


def by_letters() -> PreTrainedTokenizerFast:
    """A tokenizer that gives each character a token, in an order of its own."""
    letters = ["</s>", "<unk>", *"9876543210w ", "<pad>"]
    pieces = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def foreign(make: Any, seed: int = 1, **options: Any) -> Any:
    sizes = {"vocab_size": 15, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": None}
    ends = {"eos_token_id": 0, "pad_token_id": 14}
    return make.model(seed, **{**sizes, **ends, **options})


def text_sum(model: Any, tokenizer: Any, prompt: str, response: str) -> Tensor:
    """Log-probability of a response and the end after it, from the model's own logits."""
    before = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]
    assert ids[: len(before)] == before
    logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids[1:])[:, None])[len(before) - 1 :].sum()


@torch.no_grad()
def sums(readers: list[tuple[Any, Any]], rows: Dataset) -> dict[str, Tensor]:
    """By response the sums ``(K, B)`` of models by their tokenizers."""
    return {
        side: torch.stack(
            [
                torch.stack([text_sum(m, t, row["prompt"], row[side]) for row in rows])
                for m, t in readers
            ]
        )
        for side in ("chosen", "rejected")
    }


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("loss", ["mrpo", "multi_dpo"])
def test_each_reference_scores_the_text_by_its_own_tokens(
    make: Any, tokenizer: Any, options: Options, loss: str
) -> None:
    rows, letters = make.pairs(8), by_letters()
    base, other, third = make.model(1), foreign(make, 2), foreign(make, 3, hidden_size=24)
    args = PreferenceConfig(
        **options(loss_type=loss, beta=0.5, max_steps=1, per_device_train_batch_size=8)
    )
    trainer = PreferenceTrainer(
        make.model(),
        [base, other, third],
        args,
        train_dataset=rows,
        eval_dataset=rows.select([5, 2]),
        processing_class=tokenizer,
        ref_processing_class=[None, letters, letters],
    )
    readers = [(base, tokenizer), (other, letters), (third, letters)]
    expected = sums(readers, rows)
    for side, values in expected.items():
        found = torch.tensor(trainer.train_dataset[f"ref_{side}_logps"]).T
        torch.testing.assert_close(found, values, rtol=0, atol=2e-5)
    ours = sums([(make.model(), tokenizer)], rows)
    given = {f"ref_{side}": values for side, values in expected.items()}
    given |= {side: values[0] for side, values in ours.items()}
    per_pair = losses.get(loss)(PairLogps(**given), beta=0.5)
    evaluated = trainer.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(float(per_pair[[5, 2]].mean()), abs=1e-5)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(float(per_pair.mean()), abs=1e-5)


def test_the_caches_hold_tokens_of_each_tokenizer(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    """A second run scores nothing; the foreign model finds its scores when it is a policy too."""
    rows, letters, other = make.pairs(6), by_letters(), foreign(make)
    other.save_pretrained(tmp_path / "other")
    letters.save_pretrained(tmp_path / "other")
    runs = []
    for beta in (0.1, 0.2):
        trainer = PreferenceTrainer(
            make.model(),
            [make.model(1), str(tmp_path / "other")],
            PreferenceConfig(**options(loss_type="mrpo", beta=beta)),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        runs.append([(cache.scored, cache.hits) for cache in trainer.caches])
    assert runs == [[(12, 0), (12, 0)], [(0, 12), (0, 12)]]
    alone = PreferenceTrainer(
        other,
        args=DPOConfig(**options(precompute_ref_log_probs=True)),
        train_dataset=rows,
        processing_class=letters,
    )
    assert [(cache.scored, cache.hits) for cache in alone.caches] == [(0, 12)]


def test_one_reference_and_single_responses(make: Any, tokenizer: Any, options: Options) -> None:
    """DPO with a reference of another family, and single responses made of pairs."""
    rows, letters, other = make.pairs(4), by_letters(), foreign(make)
    expected = sums([(other, letters)], rows)
    common = {"processing_class": tokenizer, "ref_processing_class": letters}
    trainer = PreferenceTrainer(
        make.model(), other, DPOConfig(**options()), train_dataset=rows, **common
    )
    assert trainer.train_dataset["ref_chosen_logps"] == pytest.approx(
        expected["chosen"][0].tolist(), abs=2e-5
    )
    args = PreferenceConfig(**options(loss_type="apo_zero_unpaired"))
    trainer = PreferenceTrainer(make.model(), other, args, train_dataset=rows, **common)
    both = torch.cat([expected["chosen"][0], expected["rejected"][0]]).tolist()
    assert trainer.train_dataset["ref_logps"] == pytest.approx(both, abs=2e-5)
    trainer.train()


def test_rows_that_are_cut_or_unreadable_are_left_out_and_said(
    make: Any, tokenizer: Any, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make.pairs(6)
    long = {"prompt": "w1", "chosen": " w2" * 30, "rejected": " w3"}
    alike = {"prompt": "w1", "chosen": " w1Y", "rejected": " w1X"}  # two unknown letters
    rows = Dataset.from_list([long, *list(rows)[:2], alike, *list(rows)[2:]])
    words = tokenizer.get_vocab()
    known = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({**words, "w1Y": 97, "w1X": 98}, unk_token="<unk>")
        ),
        **{name: tokenizer.special_tokens_map[name] for name in ("pad_token", "eos_token")},
    )
    known.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = PreferenceTrainer(
        make.model(vocab_size=99),
        foreign(make),
        DPOConfig(**options(max_length=25)),
        train_dataset=rows,
        processing_class=known,
        ref_processing_class=by_letters(),
    )
    kept = [1, 2, 4, 5, 6, 7]
    assert trainer.train_dataset["example_ids"] == kept
    expected = sums([(foreign(make), by_letters())], rows.select(kept))["rejected"][0]
    assert trainer.train_dataset["ref_rejected_logps"] == pytest.approx(expected.tolist(), abs=2e-5)
    assert "train: 1 of 7 rows are left out, which not every" in caplog.text


@pytest.mark.parametrize(
    ("given", "rows", "said"),
    [
        ({"loss_type": "sampo"}, None, "sampo needs the reference to score the policy's token ids"),
        ({"ld_alpha": 0.5}, None, "ld_alpha needs the reference to score the policy's token ids"),
        ({"loss_type": "kto"}, None, "kto needs the reference to score the policy's token ids"),
        ({"sync_ref_model": True}, None, "sync_ref_model moves the reference towards the policy"),
        ({}, "stream", "the train data is a stream"),
        ({}, "ids", "the train data is token ids"),
        ({}, "twice", "example_ids of the train data names rows twice"),
    ],
)
def test_what_sums_of_texts_do_not_do_for(
    make: Any, tokenizer: Any, options: Options, given: dict[str, Any], rows: Any, said: str
) -> None:
    data = make.pairs(4)
    if rows == "stream":
        data = data.to_iterable_dataset()
    elif rows == "twice":
        data = data.add_column("example_ids", [3, 1, 2, 3])
    elif rows == "ids":
        ids = {"prompt_ids": [1, 5], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
        data = Dataset.from_list([ids] * 4)
    with pytest.raises(ValueError, match=said):
        PreferenceTrainer(
            make.model(),
            foreign(make),
            PreferenceConfig(**options(**given)),
            train_dataset=data,
            processing_class=tokenizer,
            ref_processing_class=by_letters(),
        )


def test_a_tokenizer_too_few(make: Any, tokenizer: Any, options: Options) -> None:
    with pytest.raises(ValueError, match="has 1 tokenizers for 2 references"):
        PreferenceTrainer(
            make.model(),
            [make.model(1), foreign(make)],
            PreferenceConfig(**options(loss_type="mrpo")),
            train_dataset=make.pairs(4),
            processing_class=tokenizer,
            ref_processing_class=[by_letters()],
        )


def test_a_model_without_a_tokenizer_is_taken_to_read_the_policys_ids(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make.model(1).save_pretrained(tmp_path / "bare")
    trainer = PreferenceTrainer(
        make.model(),
        str(tmp_path / "bare"),
        PreferenceConfig(**options()),
        train_dataset=make.pairs(4),
        processing_class=tokenizer,
    )
    assert trainer.reference.live
    assert "bare has no tokenizer: it is taken to read the policy's token ids" in caplog.text


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_from_the_command_line(make: Any, tokenizer: Any, tmp_path: Path, how: str) -> None:
    names = {"policy": (make.model(), tokenizer), "base": (make.model(1), tokenizer)}
    names["other"] = (foreign(make), by_letters())
    for name, parts in names.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    rows = make.pairs(8)
    rows.to_json(tmp_path / "pairs.jsonl")
    run, references = tmp_path / "run", [str(tmp_path / "base"), str(tmp_path / "other")]
    more = ["--loss", "mrpo", "--ref_models", *references]
    if how == "yaml":
        config = {"loss_type": ["mrpo"], "ref_models": references}
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        more = ["--config", str(tmp_path / "run.yaml")]
    flags = ["--model", str(tmp_path / "policy"), "--dataset", str(tmp_path / "pairs.jsonl")]
    flags += ["--output_dir", str(run), "--max_steps", "1", "--use_cpu", "--disable_tqdm", "true"]
    flags += ["--per_device_train_batch_size", "8", "--save_strategy", "no", "--logging_steps", "1"]
    assert cli.main(["train", *flags, *more]) == 0
    expected = sums([names["base"], names["other"]], rows)
    ours = sums([names["policy"]], rows)
    pairs = PairLogps(
        chosen=ours["chosen"][0],
        rejected=ours["rejected"][0],
        ref_chosen=expected["chosen"],
        ref_rejected=expected["rejected"],
    )
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(float(losses.get("mrpo")(pairs).mean()), abs=1e-5)


def test_fastpref_score_refuses_another_tokenizer(
    make: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though every token id of the data is one that the reference has too."""
    wide = foreign(make, vocab_size=97)
    for name, part in (("policy", make.model()), ("other", wide)):
        part.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "policy")
    by_letters().save_pretrained(tmp_path / "other")
    make.pairs(3).to_json(tmp_path / "pairs.jsonl")
    argv = ["score", "--model", "policy", "--ref_model", "other", "--dataset", "pairs.jsonl"]
    argv = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in argv]
    assert cli.main([*argv, "--output", str(tmp_path / "scores.jsonl"), "--use_cpu"]) == 2
    assert "other has another tokenizer than" in capsys.readouterr().err
