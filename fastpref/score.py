"""``fastpref score``: log-probabilities and implicit rewards of a dataset's responses.

Everything computed goes to the cache of reference log-probs as it comes, whichever model it is of.
So a killed command starts again where it was, and a model that training or another comparison has
scored on this data already is not run at all. The output appears whole, at the end.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastpref import selfcheck
from fastpref.batches import TOKEN_COLUMN, TrainerCollator, make_collator, prepare_dataset
from fastpref.config import PreferenceConfig
from fastpref.data import load_preference_dataset
from fastpref.data.formats import Kind, response_names
from fastpref.heads import causal_lm
from fastpref.models import load_model, load_tokenizer
from fastpref.ref_tokenizers import tokenizers_of
from fastpref.reference_policy import Frozen
from fastpref.scoring import caches_of, kind_of, score_dataset

FORMATS = {".jsonl": "to_json", ".parquet": "to_parquet"}
OWN_TOKENS = "{}_token_logps"
"""Column of the policy's log-probability of each token of a response."""


def main(argv: Sequence[str]) -> int:
    """Scores, writes, and prints a summary; 0."""
    given = _parser().parse_args(argv)
    output = Path(given.output)
    if output.suffix not in FORMATS:
        raise ValueError(f"--output {output}: expected a name in {' or '.join(FORMATS)}")
    if output.exists() and not given.overwrite:
        raise ValueError(f"{output} exists: give another --output, or --overwrite")
    config = PreferenceConfig(
        output_dir=str(output.parent),
        per_device_train_batch_size=given.batch_size,
        max_length=given.max_length or None,
        max_prompt_length=given.max_prompt_length,
        max_completion_length=given.max_completion_length,
        truncation_mode=given.truncation_mode,
        trust_remote_code=given.trust_remote_code,
        ref_cache_dir=given.ref_cache_dir,
        use_cpu=given.use_cpu,
        bf16=False,
        model_init_kwargs={
            name: value
            for name in ("dtype", "attn_implementation")
            if (value := getattr(given, name)) is not None
        },
    )
    dataset = load_preference_dataset(given.dataset, given.split, name=given.dataset_config)
    rows, kind = score(given.model, given.ref_model, dataset, config)
    columns = responses(rows, kind, given.beta if given.ref_model else None, given.per_token)
    if config.process_index == 0:
        write(columns, dataset if given.keep_columns else None, output)
        print(summary(columns, kind))
        print(f"{len(columns['example_id']):,} rows are in {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastpref score", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="policy: hub id or directory")
    add("--ref_model", help="reference; without it there are log-probs, but no rewards")
    add("--dataset", required=True, help="hub id, or a file or directory")
    add("--dataset_config", help="configuration of a hub dataset")
    add("--split", default="train", help="of the dataset, sliced if you like: test[:100]")
    add("--output", required=True, metavar="FILE", help="NAME.jsonl or NAME.parquet")
    add("--overwrite", action="store_true", help="replace the output if it is there")
    add("--keep_columns", action="store_true", help="write the dataset's own columns too")
    add("--per_token", action="store_true", help="write the log-prob of every token too")
    add("--beta", type=float, default=0.1, help="reward = beta * (policy - reference)")
    add("--batch_size", type=int, default=8, help="rows at a time")
    add("--max_length", type=int, default=1024, help="of prompt + response, tokens; 0: no limit")
    add("--max_prompt_length", type=int, help="longest prompt; its end is kept")
    add("--max_completion_length", type=int, help="longest response; its start is kept")
    add("--truncation_mode", default="keep_start", choices=("keep_start", "keep_end"))
    add("--dtype", help="of the weights: float32, bfloat16, auto; default: as fastpref train")
    add("--attn_implementation", help="sdpa, eager, flex_attention, ...")
    add("--ref_cache_dir", default="auto", help="where log-probs are kept; none: nowhere")
    add("--use_cpu", action="store_true", help="though there is an accelerator")
    add("--trust_remote_code", action="store_true", help="run Python code that ships with a model")
    return parser


def score(
    policy: str, reference: str | None, dataset: Any, config: PreferenceConfig
) -> tuple[Any, Kind]:
    """The dataset as token ids, with the log-probability of each response token under each model.

    Args:
        policy: Name or path; its tokenizer makes the tokens.
        reference: Name or path, or None.
        dataset: In any layout of :mod:`fastpref.data.formats`.
        config: Limits, device, cache.

    Returns:
        Rows with ``OWN_TOKENS`` and ``TOKEN_COLUMN`` by response, and their kind.

    Raises:
        ValueError: The data cannot be read, or the two models differ in vocabulary.
    """
    from accelerate import Accelerator

    tokenizer = load_tokenizer(policy, trust_remote_code=config.trust_remote_code)
    accelerator = Accelerator(cpu=config.use_cpu)
    kind, rows = kind_of(dataset.column_names), dataset
    for name in filter(None, (policy, reference)):
        if tokenizers_of([name], None, tokenizer, config) != [None]:
            raise ValueError(
                f"{reference} has another tokenizer than {policy}, and would read its token ids as "
                "other text: the reference must have the policy's tokenizer"
            )
        model = load_model(name, config, frozen=True).to(accelerator.device)
        size = causal_lm(model).get_input_embeddings().num_embeddings
        if name == policy:
            rows, _ = prepare_dataset(rows, tokenizer, config, kind, "data", vocab_size=size)
            names = response_names(rows.column_names, kind)
        elif size <= (largest := _largest_id(rows, names)):
            raise ValueError(
                f"{reference} knows {size} tokens, and {policy} makes one of id {largest} of the "
                "data: the reference must have the policy's tokenizer"
            )
        rows = _scored(model, tokenizer, rows, kind, config, accelerator, name)
        if OWN_TOKENS.format(names[0]) not in rows.column_names:
            rows = rows.rename_columns(
                {TOKEN_COLUMN.format(n): OWN_TOKENS.format(n) for n in names}
            )
        del model
    return rows, kind


def _scored(
    model: Any,
    tokenizer: Any,
    rows: Any,
    kind: Kind,
    config: PreferenceConfig,
    accelerator: Any,
    name: str,
) -> Any:
    """The rows with the model's log-probabilities as ``TOKEN_COLUMN``."""
    model.config._name_or_path = name
    wanted = SimpleNamespace(kind=kind, needs=frozenset())
    collator = TrainerCollator(make_collator(config, tokenizer, wanted, model), kind)
    reference = Frozen([model])
    caches = caches_of(reference, model, config, accelerator)
    selfcheck.check_rows(model, rows, collator, accelerator, kind)
    return score_dataset(
        reference,
        model,
        rows,
        collator,
        batch_size=config.per_device_train_batch_size,
        accelerator=accelerator,
        kind=kind,
        description="given",
        caption=f"Log-probs by {name}",
        scorer=name,
        caches=caches,
    )


def _largest_id(rows: Any, names: Sequence[str]) -> int:
    columns = ["prompt_ids", *(f"{name}_ids" for name in names)]
    return max(max(ids, default=0) for column in columns for ids in rows[column])


def responses(
    rows: Any, kind: Kind, beta: float | None, per_token: bool = False
) -> dict[str, list[Any]]:
    """The output's columns.

    Args:
        rows: Of :func:`score`.
        kind: Of the rows.
        beta: Scale of the rewards; None: there is no reference.
        per_token: Keep log-probabilities by token.

    Returns:
        ``example_id``, the row's number in the dataset as given, and for each response
        ``chosen_logps`` (nats, the sum), ``chosen_tokens`` (that count), ``ref_chosen_logps``,
        ``chosen_rewards = beta * (chosen_logps - ref_chosen_logps)``; of pairs also ``margins``.
        Single responses have no name in front: ``logps``, ``tokens``, ``ref_logps``, ``rewards``.
    """
    found: dict[str, list[Any]] = {"example_id": list(rows["example_ids"])}
    if kind == "unpaired":
        found["label"] = list(rows["label"])
    for name in response_names(rows.column_names, kind):
        stem = "" if kind == "unpaired" else f"{name}_"
        own = [np.asarray(values) for values in rows[OWN_TOKENS.format(name)]]
        counts = rows[f"{name}_mask"] if f"{name}_mask" in rows.column_names else own
        found[f"{stem}logps"] = [float(values.sum(dtype=np.float64)) for values in own]
        if counts is own:
            found[f"{stem}tokens"] = list(map(len, own))
        else:
            found[f"{stem}tokens"] = list(map(sum, counts))
        if per_token:
            found[f"{stem}token_logps"] = own
        if beta is None:
            continue
        ref = [np.asarray(values) for values in rows[TOKEN_COLUMN.format(name)]]
        found[f"ref_{stem}logps"] = [float(values.sum(dtype=np.float64)) for values in ref]
        ratios = zip(found[f"{stem}logps"], found[f"ref_{stem}logps"], strict=True)
        found[f"{stem}rewards"] = [beta * (ours - theirs) for ours, theirs in ratios]
        if per_token:
            found[f"ref_{stem}token_logps"] = ref
    if kind == "pair" and beta is not None:
        both = zip(found["chosen_rewards"], found["rejected_rewards"], strict=True)
        found["margins"] = [chosen - rejected for chosen, rejected in both]
    return found


def write(columns: Mapping[str, list[Any]], dataset: Any, output: Path) -> None:
    """Write the columns, and those of ``dataset`` in front unless it is None, whole or not at all.

    Raises:
        ValueError: The dataset has a column of the same name already.
    """
    from datasets import Dataset, concatenate_datasets

    made = Dataset.from_dict(dict(columns))
    if dataset is not None:
        if taken := sorted(set(columns) & set(dataset.column_names)):
            raise ValueError(f"the dataset has columns {taken} already: leave out --keep_columns")
        made = concatenate_datasets([dataset.select(columns["example_id"]), made], axis=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{uuid.uuid4().hex}{output.suffix}")
    try:
        getattr(made, FORMATS[output.suffix])(str(temporary))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def summary(columns: Mapping[str, list[Any]], kind: Kind) -> str:
    """Means of what was found, in words."""
    lines = []
    for name in [name for name in columns if name.endswith("logps") and "token" not in name]:
        stem = name.removesuffix("logps").removeprefix("ref_")
        total, tokens = sum(columns[name]), sum(columns[f"{stem}tokens"])
        mean = total / max(len(columns[name]), 1)
        lines.append(f"{name}: {mean:.3f} a response, {total / max(tokens, 1):.4f} a token (nats)")
    for name in [name for name in columns if name.endswith("rewards")]:
        lines.append(f"{name}: {np.mean(columns[name]):.4f}")
    if "margins" in columns:
        margins = np.asarray(columns["margins"])
        lines.append(f"margins: {margins.mean():.4f}, accuracy {(margins > 0).mean():.3f}")
    return "\n".join(lines)
