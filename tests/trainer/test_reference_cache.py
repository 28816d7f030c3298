"""The cache of reference log-probs: same numbers, found again, and nothing damaged ever used."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

from fastpref import PreferenceConfig, PreferenceTrainer, cli
from fastpref.reference_cache import ReferenceCache, cache_root, identity, weights_digest
from fastpref.reference_policy import Start, Stored

Options = Callable[..., dict[str, Any]]
HERE = Path(__file__).parent
OF = {"weights": "some"}


@pytest.fixture(autouse=True)
def _propagate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fastpref")


def losses_of(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def made(make: Any, tokenizer: Any, config: Any, **given: Any) -> Any:
    given = {"model": make.model(), "train_dataset": make.pairs(8), **given}
    return PreferenceTrainer(args=config, processing_class=tokenizer, **given)


def trained(*args: Any, **given: Any) -> Any:
    trainer = made(*args, **given)
    trainer.train()
    return trainer


def counts(trainer: Any) -> list[tuple[int, int]]:
    return [(cache.scored, cache.hits) for cache in trainer.caches]


# The same numbers as a reference that runs with the policy


def test_a_sweep_scores_once_and_gives_the_losses_of_a_live_reference(
    make: Any, tokenizer: Any, options: Options
) -> None:
    """Per token, so that sums, means and weighted sums come from the same cache."""
    sweep = [
        {"loss_type": "dpo", "beta": 0.1},
        {"loss_type": "ipo", "beta": 0.5},
        {"loss_type": "sampo", "learning_rate": 3e-3},
        {"ld_alpha": 0.5, "seed": 3, "per_device_train_batch_size": 2, "prefix_sharing": False},
        {"loss_type": ["sigmoid", "sft"], "gradient_accumulation_steps": 2},
    ]
    for i, changed in enumerate(sweep):
        runs = []
        for precompute in (False, True):
            config = PreferenceConfig(**options(**changed, precompute_ref_log_probs=precompute))
            trainer = trained(make, tokenizer, config, ref_model=make.model(1))
            runs.append(losses_of(trainer))
        assert runs[1] == pytest.approx(runs[0], abs=1e-6)
        assert isinstance(trainer.reference, Stored)
        assert counts(trainer) == [(16, 0) if i == 0 else (0, 16)]


def test_what_is_cut_shorter_is_found_in_what_is_longer(
    make: Any, tokenizer: Any, options: Options
) -> None:
    def run(**limits: Any) -> Any:
        config = PreferenceConfig(**options(precompute_ref_log_probs=True, **limits))
        return trained(make, tokenizer, config, ref_model=make.model(1))

    run()
    short = run(max_completion_length=3)
    assert counts(short) == [(0, 16)]
    alone = run(max_completion_length=3, ref_cache_dir="none")
    assert not alone.caches
    assert losses_of(short) == pytest.approx(losses_of(alone), abs=1e-6)
    longer = run(max_prompt_length=3)
    cut = sum(len(words.split()) > 3 for words in make.pairs(8)["prompt"])
    assert counts(longer) == [(2 * cut, 2 * (8 - cut))]


def test_no_copy_of_the_policy_is_needed(make: Any, tokenizer: Any, options: Options) -> None:
    config = PreferenceConfig(**options(precompute_ref_log_probs=True))
    trainer = made(make, tokenizer, config)
    assert trainer._scorer is None
    live = trained(make, tokenizer, PreferenceConfig(**options()))
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(live), abs=1e-6)
    # The weights have moved, so a new run from them starts from nothing.
    again = made(make, tokenizer, config, model=trainer.model)
    assert counts(trainer) == counts(again) == [(16, 0)]
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert Start.is_start


def test_several_references_have_a_cache_each(make: Any, tokenizer: Any, options: Options) -> None:
    def run(*seeds: int, **more: Any) -> Any:
        config = PreferenceConfig(**options(loss_type="multi_dpo", **more))
        return trained(make, tokenizer, config, ref_model=[make.model(seed) for seed in seeds])

    ahead = {"precompute_ref_log_probs": True}
    assert counts(run(1, 2, **ahead)) == [(16, 0), (16, 0)]
    swapped = run(2, 1, **ahead)
    assert counts(swapped) == [(0, 16), (0, 16)]
    assert losses_of(swapped) == pytest.approx(losses_of(run(2, 1)), abs=1e-6)
    third = run(2, 3, **ahead)
    assert [cache.scored for cache in third.caches] == [16, 16]
    assert losses_of(third) == pytest.approx(losses_of(run(2, 3)), abs=1e-6)


def test_masks_are_part_of_the_key(make: Any, tokenizer: Any, options: Options) -> None:
    def run(masked: bool, **more: Any) -> Any:
        rows = [
            {"prompt_ids": [1, 5 + i], "chosen_ids": [9, 8, 7, 2], "rejected_ids": [6, 2]}
            for i in range(4)
        ]
        for row in rows if masked else ():
            row |= {"chosen_mask": [1, 0, 0, 1], "rejected_mask": [1, 1]}
        config = PreferenceConfig(**options(**more))
        dataset = type(make.pairs(1)).from_list(rows)
        given = {"train_dataset": dataset, "ref_model": make.model(1)}
        return trained(make, tokenizer, config, **given)

    ahead = {"precompute_ref_log_probs": True}
    plain, masked = run(False, **ahead), run(True, **ahead)
    assert counts(masked) == [(8, 0)]  # a row is scored whole, though its rejected one is known
    assert losses_of(masked) == pytest.approx(losses_of(run(True)), abs=1e-6)
    assert losses_of(plain) == pytest.approx(losses_of(run(False)), abs=1e-6)
    assert losses_of(plain) != pytest.approx(losses_of(masked), abs=1e-4)


def test_an_empty_prompt(tmp_path: Path) -> None:
    """Nothing predicts a first token, so it is what the others follow."""
    cache = ReferenceCache(tmp_path, OF)
    cache.put([], [5, 6, 7], None, np.array([-1.0, -2.0]))
    cache.put([], [4], None, np.array([]))
    cache.flush()
    cache = ReferenceCache(tmp_path, OF)
    assert cache.get([], [5, 6, 7]).tolist() == [-1, -2]
    assert cache.get([5], [6]).tolist() == [-1]
    assert cache.get([], [4]).tolist() == []
    assert cache.get([], [6, 5, 7]) is None
    with pytest.raises(ValueError, match="expected 2 numbers, got 3"):
        cache.put([], [5, 6, 7], None, np.zeros(3))


def test_what_cannot_be_scored_ahead_says_so(make: Any, tokenizer: Any, options: Options) -> None:
    config = PreferenceConfig(**options(precompute_ref_log_probs=True))
    with pytest.raises(ValueError, match="the train data is a stream"):
        made(make, tokenizer, config, train_dataset=make.pairs(8).to_iterable_dataset())
    broken = make.model(1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    config = PreferenceConfig(**options(precompute_ref_log_probs=True, self_check=False))
    with pytest.raises(FloatingPointError, match=r"not finite to row \d+ of the train data"):
        made(make, tokenizer, config, ref_model=broken)


# Whose numbers they are


def test_other_weights_miss_and_adapters_off_are_the_base(
    make: Any, tokenizer: Any, options: Options
) -> None:
    def run(**given: Any) -> list[tuple[int, int]]:
        config = PreferenceConfig(**options(precompute_ref_log_probs=True))
        return counts(made(make, tokenizer, config, **given))

    fresh, known = [(16, 0)], [(0, 16)]
    assert run() == fresh
    assert run(ref_model=make.model()) == known
    nudged = make.model()
    with torch.no_grad():
        nudged.lm_head.weight[3, 4] += 1e-6
    assert run(ref_model=nudged) == fresh
    assert run(model=make.model(1), peft_config=LoraConfig(target_modules=["q_proj"])) == fresh
    both = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    assert run(peft_config=both) == known
    adapted = get_peft_model(make.model(), LoraConfig(target_modules=["q_proj"]))
    assert run(model=adapted) == fresh  # held to its adapter, though that changes nothing yet


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"use_cache": False, "attention_dropout": 0.1}, True),
        ({"rms_norm_eps": 1e-4}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, False),
        ({"attn_implementation": "eager"}, False),
    ],
)
def test_config_that_changes_numbers_is_told_from_config_that_does_not(
    make: Any, options: dict[str, Any], same: bool
) -> None:
    one, other = identity(make.model(), "no"), identity(make.model(**options), "no")
    assert one["weights"] == other["weights"]
    assert (one == other) == same
    assert identity(make.model(), "bf16") != one
    assert identity(make.model().bfloat16(), "no")["weights"] != one["weights"]


def test_a_digest_of_weights() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.ones(3, dtype=torch.bfloat16)
    digest = weights_digest({"a": x, "b": y})
    assert digest == weights_digest({"b": y.clone(), "a": x.clone()})
    assert digest == weights_digest({"a": x.T.contiguous().T, "b": y})
    others = [
        {"a": y, "b": x},
        {"a": x.view(3, 2), "b": y},
        {"a": x, "b": y.float()},
        {"a": x, "c": y},
        {"a": x},
        {"a": x.T, "b": y},
    ]
    assert digest not in map(weights_digest, others)
    with pytest.raises(ValueError, match="'w' is not on this process"):
        weights_digest({"w": torch.ones(2, device="meta")})


def test_tied_weights_are_read_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref import reference_cache

    read: list[Any] = []
    real = reference_cache._tensor_digest
    monkeypatch.setattr(
        reference_cache, "_tensor_digest", lambda x: read.append(x.shape) or real(x)
    )
    tied = make.model(tie_word_embeddings=True)
    identity(tied, "no")
    assert len(read) == len(list(tied.parameters()))


# Damage and death


def test_damaged_rows_alone_are_scored_again(
    make: Any, tokenizer: Any, options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> Any:
        config = PreferenceConfig(**options(precompute_ref_log_probs=True, max_steps=2))
        return trained(make, tokenizer, config)

    first = run()
    (path,) = first.caches[0].folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    last = load_file(path)["logps"][-1:].tobytes()
    content[content.rindex(last) + 1] ^= 0x10
    path.write_bytes(content)
    again = run()
    assert counts(again)[0][0] == 2
    # scored in a smaller batch, whose products may round otherwise
    assert losses_of(again) == pytest.approx(losses_of(first), abs=1e-6)
    assert len(again.caches[0].damage) == 1
    assert counts(run()) == [(0, 16)]
    assert cli.main(["cache", "verify"]) == 1
    assert f"{path}: sequence 15 is damaged" in capsys.readouterr().out
    assert cli.main(["cache", "verify", "--remove"]) == 1
    assert cli.main(["cache", "verify"]) == 0
    assert counts(run())[0][0] == 14


KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("makers", sys.argv[1])
makers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(makers)
from fastpref import PreferenceConfig, PreferenceTrainer, reference_cache, scoring
real, calls = scoring._scores, []
def scores(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
scoring._scores = scores
put = reference_cache.ReferenceCache.put
def put_and_flush(self, *args):
    put(self, *args)
    self.flush()
reference_cache.ReferenceCache.put = put_and_flush
config = PreferenceConfig(output_dir=sys.argv[2], use_cpu=True, per_device_train_batch_size=2,
                          precompute_ref_log_probs=True, disable_tqdm=True)
PreferenceTrainer(makers.make_model(), args=config, train_dataset=makers.make_pairs(8),
                  processing_class=makers.make_tokenizer())
"""


def test_a_run_killed_while_scoring_goes_on_where_it_was(
    make: Any, tokenizer: Any, options: Options, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(HERE / "conftest.py"), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=HERE.parents[1], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    config = PreferenceConfig(**options(precompute_ref_log_probs=True))
    resumed = trained(make, tokenizer, config)
    assert counts(resumed) == [(8, 8)]
    live = trained(make, tokenizer, PreferenceConfig(**options()))
    assert losses_of(resumed) == pytest.approx(losses_of(live), abs=1e-6)


# The command


def test_list_and_clear(
    make: Any, tokenizer: Any, options: Options, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert cli.main(["cache", "list"]) == 0
    assert f"nothing is kept in {cache / 'reference'}" in capsys.readouterr().out
    config = PreferenceConfig(**options(precompute_ref_log_probs=True))
    for seed in (1, 2):
        made(make, tokenizer, config, ref_model=make.model(seed))
    assert cli.main(["cache", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["sequences"] for row in rows] == [16, 16]
    assert {row["model"] for row in rows} == {"LlamaForCausalLM"}
    assert cli.main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    names = [Path(row["folder"]).name for row in rows]
    assert all(name[:12] in out for name in names)
    (cache / "reference" / "mine").mkdir()
    assert cli.main(["cache", "clear"]) == 2
    assert "give --all" in capsys.readouterr().err
    assert cli.main(["cache", "clear", "f" * 32]) == 2
    assert "fits 0 references" in capsys.readouterr().err
    assert cli.main(["cache", "clear", names[0][:12]]) == 0
    assert [row.name for row in cache_root().iterdir() if len(row.name) == 32] == [names[1]]
    assert cli.main(["cache", "clear", "--all"]) == 0
    assert [path.name for path in cache_root().iterdir()] == ["mine"]


def test_what_is_built_ahead_is_found_by_the_run(
    make: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    make.model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    make.pairs(6).to_json(pairs)
    flags = ["--model", str(model), "--dataset", str(pairs), "--use_cpu", "--disable_tqdm", "true"]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert cli.main(["cache", "build", *flags]) == 0
    assert "12 sequences scored, 0 were there" in capsys.readouterr().out
    assert cli.main(["cache", "build", *flags, "--beta", "0.5", "--loss", "ipo"]) == 0
    assert "0 sequences scored, 12 were there" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert cli.main(["cache", "build", *flags, "--loss", "simpo"]) == 2
    assert "there is nothing to score: simpo needs no reference" in capsys.readouterr().err
    folder = str(tmp_path / "elsewhere")
    more = ["--ref_cache_dir", folder, "--precompute_ref_log_probs", "true"]
    assert cli.main(["train", *flags, *more, "--save_strategy", "no"]) == 0
    assert cli.main(["cache", "verify", "--dir", folder]) == 0
    assert "1 files with 12 sequences are whole" in capsys.readouterr().out
