"""Every registered loss through the trainer: fused head, packed rows and all, against materialised
logits in float64, one sequence at a time. The registry alone says how to feed a loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import fastpref
from fastpref import PreferenceConfig, PreferenceTrainer, losses
from fastpref.batches import extend_dataset
from fastpref.losses import GroupLogps, Packed, PairLogps, UnpairedLogps
from fastpref.losses.core import registry

SIZE = 4
REFERENCES = 3
KINDS = ("pair", "unpaired", "group")
CASES = [
    pytest.param(name, variant, id="-".join([name, *map(str, variant.values())]))
    for name, loss in registry.items()
    if loss.entry.kind in KINDS
    for variant in loss.entry.variants
]


def corrupted(prompt: list[int]) -> list[int]:
    return prompt[::-2]


def rows_of(kind: str) -> Dataset:
    """Every column that any loss of the kind may want."""
    draw = random.Random(1)

    def words(low: int, high: int) -> str:
        return "".join(f" w{draw.randrange(93)}" for _ in range(draw.randint(low, high)))

    def numbers(count: int) -> list[float]:
        return [draw.uniform(-3, 1) for _ in range(count)]

    found = []
    for i in range(SIZE):
        row: dict[str, Any] = {"prompt": words(2, 6), "weight": draw.uniform(0.5, 2)}
        if kind == "pair":
            row |= {name: words(1, 7) for name in ("chosen", "rejected", "third")}
            row |= {"chosen_score": draw.uniform(0.6, 0.9), "rejected_score": draw.uniform(0, 0.4)}
            for side in ("chosen", "rejected"):
                row |= {f"{side}_margins": numbers(1), f"{side}_aux": numbers(2)}
                row |= {f"prior_{side}": [10 * x for x in numbers(3)]}
            row["values"] = draw.random()
        elif kind == "unpaired":
            row |= {"completion": words(1, 7), "label": i % 2 == 0, "score": draw.random()}
            row |= {"values": draw.random(), "aux": numbers(2)}
        else:
            size = 4 - i % 3
            row |= {"completions": [words(1, 7) for _ in range(size)], "scores": numbers(size)}
        found.append(row)
    return Dataset.from_list(found)


class Truth:
    """All fields of a batch from the models' own logits, once for all losses."""

    def __init__(self, make: Any, tokenizer: Any, kind: str) -> None:
        self.tokenizer, self.kind, self.rows = tokenizer, kind, list(rows_of(kind))
        self.policy, *self.references = [
            make.model(i, initializer_range=0.1).double() for i in range(1 + REFERENCES)
        ]
        self.prompts = [tokenizer(row["prompt"])["input_ids"] for row in self.rows]
        self.epsilon = losses.get("epsilon_dpo").entry.defaults["epsilon"]
        fields = {"pair": self.pairs, "unpaired": self.singles, "group": self.groups}[kind]()
        self.fields = fields | {"weights": self.column("weight")}

    def column(self, name: str) -> Tensor:
        """Shape (B,), of lists (K, B)."""
        found = torch.tensor([row[name] for row in self.rows], dtype=torch.float64)
        return found.movedim(0, -1)

    def ids(self, i: int, text: str) -> list[int]:
        row = self.rows[i]["prompt"] + text + self.tokenizer.eos_token
        return self.tokenizer(row)["input_ids"][len(self.prompts[i]) :]

    def logits(self, model: Any, prompt: list[int], response: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *response]])
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

    def response(self, prompt: list[int], response: list[int]) -> dict[str, Any]:
        """What there is to know of one response."""
        targets = torch.tensor(response)[:, None]

        def tokens(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(-1, targets)[:, 0]

        z = self.logits(self.policy, prompt, response)
        with torch.no_grad():
            of_references = [self.logits(m, prompt, response) for m in self.references]
            base, e = of_references[0], self.epsilon
            plus, minus = (tokens((1 + s) * z - s * base).sum() for s in (e, -e))
            log_sum_sq = (2 * z.log_softmax(-1)).logsumexp(-1).mean()
        log_ref = base.log_softmax(-1)
        return {
            "tokens": tokens(z),
            "refs": torch.stack([tokens(x).sum() for x in of_references]),
            "ref_tokens": tokens(base),
            "length": len(response),
            "plus": plus,
            "minus": minus,
            "log_sum_sq": log_sum_sq,
            "kl": (log_ref.exp() * (log_ref - z.log_softmax(-1))).sum(),
        }

    def pairs(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for side in ("chosen", "rejected", "third"):
            ids = [self.ids(i, row[side]) for i, row in enumerate(self.rows)]
            found = [self.response(p, y) for p, y in zip(self.prompts, ids, strict=True)]
            fields[side] = torch.stack([x["tokens"].sum() for x in found])
            fields[f"ref_{side}"] = torch.stack([x["refs"] for x in found], 1)
            fields[f"{side}_lengths"] = torch.tensor([x["length"] for x in found])
            if side == "third":
                fields["ref_third"] = fields["ref_third"][0]
                continue
            bounds = torch.cat([torch.zeros(1), fields[f"{side}_lengths"].cumsum(0)]).int()
            for name in ("tokens", "ref_tokens"):
                key = f"ref_{side}_tokens" if name == "ref_tokens" else f"{side}_tokens"
                fields[key] = Packed(torch.cat([x[name] for x in found]), bounds)
            for name in ("plus", "minus", "log_sum_sq", "kl"):
                fields[f"{side}_{name}"] = torch.stack([x[name] for x in found])
            for name in (f"{side}_margins", f"prior_{side}", f"{side}_aux"):
                fields[name] = self.column(name)
            fields[f"{side}_scores"] = self.column(f"{side}_score")
        again = [
            self.response(corrupted(p), self.ids(i, self.rows[i]["chosen"]))
            for i, p in enumerate(self.prompts)
        ]
        fields["corrupted"] = torch.stack([x["tokens"].sum() for x in again])
        fields["ref_corrupted"] = torch.stack([x["refs"][0] for x in again])
        before = [self.response(p[:1], p[1:]) for p in self.prompts]
        fields["prompt"] = torch.stack([x["tokens"].sum() for x in before])
        fields["prompt_lengths"] = torch.tensor([x["length"] for x in before])
        return fields | {"values": self.column("values")}

    def singles(self) -> dict[str, Any]:
        ids = [self.ids(i, row["completion"]) for i, row in enumerate(self.rows)]
        found = [self.response(p, y) for p, y in zip(self.prompts, ids, strict=True)]
        others = [self.response(p, y) for p, y in zip(self.prompts, ids[-1:] + ids, strict=False)]
        return {
            "logps": torch.stack([x["tokens"].sum() for x in found]),
            "ref_logps": torch.stack([x["refs"][0] for x in found]),
            "labels": torch.tensor([row["label"] for row in self.rows]),
            "lengths": torch.tensor([x["length"] for x in found]),
            "kl_logps": torch.stack([x["tokens"].sum().detach() for x in others]),
            "ref_kl_logps": torch.stack([x["refs"][0] for x in others]),
            "scores": self.column("score"),
            "values": self.column("values"),
            "aux": self.column("aux"),
        }

    def groups(self) -> dict[str, Any]:
        shape = (SIZE, max(len(row["completions"]) for row in self.rows))
        fields: dict[str, Any] = {
            name: torch.zeros(shape, dtype=torch.float64) for name in ("logps", "ref_logps")
        }
        fields |= {"lengths": torch.zeros(shape, dtype=torch.int64)}
        fields |= {"scores": torch.zeros(shape, dtype=torch.float64)}
        for i, row in enumerate(self.rows):
            for k, text in enumerate(row["completions"]):
                found = self.response(self.prompts[i], self.ids(i, text))
                fields["logps"][i, k] = found["tokens"].sum()
                fields["ref_logps"][i, k] = found["refs"][0]
                fields["lengths"][i, k] = found["length"]
                fields["scores"][i, k] = row["scores"][k]
        return fields | {"mask": fields["lengths"] > 0}

    def loss(self, name: str, variant: Mapping[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of the batch and its gradients."""
        combined, fields = losses.combine(name, args=variant), dict(self.fields)
        if self.kind == "pair" and "refs" not in combined.needs:
            fields |= {f"ref_{side}": fields[f"ref_{side}"][0] for side in ("chosen", "rejected")}
        made: Any = {"pair": PairLogps, "unpaired": UnpairedLogps, "group": GroupLogps}[self.kind]
        torch.manual_seed(0)  # of the losses that draw
        scale = fields.pop("weights") if combined.aligned else fields.pop("weights") * 0 + 1
        loss = (combined(made(**fields)) * scale).sum() / SIZE
        weights = list(self.policy.parameters())
        return loss, list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))


@pytest.fixture(scope="module")
def truth(make: Any, tokenizer: Any) -> Callable[[str], Truth]:
    known: dict[str, Truth] = {}

    def of(kind: str) -> Truth:
        if kind not in known:
            known[kind] = Truth(make, tokenizer, kind)
        return known[kind]

    return of


def trainer_of(
    make: Any,
    tokenizer: Any,
    options: Callable[..., dict[str, Any]],
    name: str,
    stream: bool = False,
    **given: Any,
) -> PreferenceTrainer:
    entry = losses.get(name).entry
    args = PreferenceConfig(
        **options(
            loss_type=name,
            per_device_train_batch_size=SIZE,
            train_sampling_strategy="sequential",
            **{"self_check": False, **given},
        )
    )
    rows: Any = rows_of(entry.kind)
    if not entry.aligned:  # no pair has a number of its own to be weighed
        rows = rows.remove_columns("weight")
    several = range(1, 1 + (REFERENCES if "refs" in entry.needs else 1))
    return PreferenceTrainer(
        make.model(0, initializer_range=0.1),
        [make.model(i, initializer_range=0.1) for i in several],
        args,
        train_dataset=rows.to_iterable_dataset() if stream else rows,
        eval_dataset=rows.select([1, 2]),
        processing_class=tokenizer,
        corrupt_context=corrupted if "corrupted" in entry.needs else None,
    )


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_fused_equals_materialised(
    make: Any,
    tokenizer: Any,
    options: Callable[..., dict[str, Any]],
    truth: Callable[[str], Truth],
    name: str,
    variant: Mapping[str, Any],
) -> None:
    trainer = trainer_of(make, tokenizer, options, name, loss_args=dict(variant))
    batches = [trainer._prepare_inputs(b) for b in trainer.get_train_dataloader()]
    window = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=window)
    loss.backward()
    expected, gradients = truth(losses.get(name).entry.kind).loss(name, variant)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for (key, weight), wanted in zip(trainer.model.named_parameters(), gradients, strict=True):
        assert wanted is not None
        assert wanted.norm() > 0
        error = (weight.grad - wanted).norm() / wanted.norm()
        assert error <= 1e-5, f"{key}: {error:.3g} of its gradient"


WAYS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "scored ahead": {"precompute_ref_log_probs": True, "ref_cache_dir": "none"},
    "unshared": {"prefix_sharing": False},
    "a row each": {"packing": False},
    "streamed": {"stream": True},
}


@pytest.mark.parametrize("name", ["selm", "mdpo", "ld_dpo", "mrpo", "kto", "nca"])
def test_every_way_gives_the_same_steps(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]], name: str
) -> None:
    """Further responses, corrupted contexts and groups, in training and evaluation, with the checks
    at the start."""
    logs = {}
    for way, given in WAYS.items():
        steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "self_check": True}
        trainer = trainer_of(make, tokenizer, options, name, **steps, **given)
        trainer.train()
        logs[way] = trainer.state.log_history
    for key in ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "num_tokens"):
        found = {way: [log[key] for log in history if key in log] for way, history in logs.items()}
        for way, values in found.items():
            assert values == pytest.approx(found["as usual"], rel=1e-5, abs=1e-5), (key, way)
        assert found["as usual"]


def test_mismatched_responses_rotate_as_trls(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    """In each micro-batch, except that a response to the same prompt is passed over."""
    trl = pytest.importorskip("trl")
    rows = [{"prompt": f"w{i}", "completion": f" w{10 + i}", "label": i % 2 == 0} for i in range(7)]
    given = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 3}
    found = []
    for module in (trl, fastpref):
        trainer = module.KTOTrainer(
            make.model(),
            make.model(1),
            args=module.KTOConfig(**given, bf16=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        found.append(trainer.train_dataset)
    theirs, ours = found
    assert ours["mismatched_ids"][:6] == theirs["KL_completion_ids"][:6]
    assert ours["mismatched_ids"][6] == []  # theirs is its own
    rows[1]["prompt"] = "w0"
    again = extend_dataset(
        trainer._prepared(Dataset.from_list(rows), "again"), {"mismatched"}, trainer.args
    )
    ids = again["completion_ids"][:3]
    assert again["mismatched_ids"][:3] == [ids[2], ids[2], ids[1]]


def test_a_corrupted_context_must_be_one(
    make: Any, tokenizer: Any, options: Callable[..., dict[str, Any]]
) -> None:
    def build(name: str, corrupt: Any) -> PreferenceTrainer:
        return PreferenceTrainer(
            make.model(),
            args=PreferenceConfig(**options(loss_type=name)),
            train_dataset=make.pairs(2),
            processing_class=tokenizer,
            corrupt_context=corrupt,
        )

    with pytest.raises(ValueError, match=r"mdpo needs corrupted.*\(`corrupt_context`\)"):
        build("mdpo", None)
    with pytest.raises(ValueError, match=r"of example 0 it gave \[\]"):
        build("mdpo", lambda prompt: [])
    with pytest.raises(ValueError, match="corrupt_context has no effect on dpo"):
        build("dpo", corrupted)


def test_metrics_of_a_group_are_those_of_its_best_and_worst(
    make: Any,
    tokenizer: Any,
    options: Callable[..., dict[str, Any]],
    truth: Callable[[str], Truth],
) -> None:
    fields = {name: x.detach() for name, x in truth("group").fields.items()}
    found = trainer_of(make, tokenizer, options, "nca").evaluate(rows_of("group"))
    pairs = []
    for scores, mask, logps, ref in zip(
        *(fields[name].tolist() for name in ("scores", "mask", "logps", "ref_logps")), strict=True
    ):
        ranked = sorted((s, p, r) for s, m, p, r in zip(scores, mask, logps, ref, strict=True) if m)
        pairs.append((ranked[-1], ranked[0]))
    rewards = [[0.1 * (p - r) for _, p, r in pair] for pair in pairs]
    expected = {
        "rewards/chosen": sum(best for best, _ in rewards) / SIZE,
        "rewards/margins": sum(best - worst for best, worst in rewards) / SIZE,
        "rewards/accuracies": sum(best > worst for best, worst in rewards) / SIZE,
        "logps/rejected": sum(worst[1] for _, worst in pairs) / SIZE,
    }
    for key, value in expected.items():
        assert found[f"eval_{key}"] == pytest.approx(value, rel=1e-4, abs=1e-5), key
