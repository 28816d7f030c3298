"""Token rows of a dataset -> the batch dict that the model side reads.

==================  ==========================================================================
input_ids           (R, T) int64. R rows, not examples: several documents lie in a row
position_ids        (R, T) int64
document_ids        (R, T) int32, -1 = pad
branch_ids          (R, T) int32, 0 = prompt, k = k-th response of the document
attention_mask      (R, 1, T, T) bool, true = may attend; only with ``dense_mask=True``
response_rows       (n,) int64 into the flattened (R * T): whose hidden state predicts the token
response_targets    (n,) int64, the token, or -100 where a mask column says no loss
cu_seqlens          (S + 1,) int32 into the two above
lengths             (S,) int64, response tokens that count
example_ids         (B,) int64, if the dataset has them
numeric columns     (B,) float32, or (B, K) where the dataset holds lists of K, under their names
*pairs*             S = 2B, all chosen, then all rejected (then B ``third``, B ``corrupted`` where
                    given)
pairs               (B, 2) int64: sequence of the chosen, of the rejected response
third, corrupted    (B,) int64: sequence of that response
*groups*            S = B K, all first responses, then all second ones, ...
groups              (B, K) int64: sequence of each response; one that is absent has length 0
*unpaired*          S = B, the completions (then B ``mismatched`` where given)
label               (B,) bool, true = desirable
mismatched          (M,) int64: sequences that hold a response to another example's prompt, whose
                    log-probs estimate KTO's reference point; where there is none it has length 0
                    and does not count
==================  ==========================================================================

A further response is a branch of the same document: with prefix sharing it costs a response, not a
prompt. One that has a prompt of its own, in a column ``corrupted_prompt_ids``, is a document.

No tensor has to be read back from a device to use the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .formats import NUMERIC_COLUMNS, RESPONSES, Kind, response_names
from .masks import dense_mask
from .packing import Document, pack
from .tokenize import token_counts

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class PreferenceCollator:
    """Batches of packed rows; call it on a list of rows that ``tokenize_dataset`` made.

    Attributes:
        pad_token_id: Token at the end of short rows; nothing attends it, so any id will do.
        kind: ``"pair"``, ``"unpaired"`` or ``"group"``.
        prefix_sharing: Lay a prompt out once for all its responses. Needs attention that takes an
            arbitrary mask in every layer.
        row_tokens: Most tokens of a row; None = ``packing.row_capacity`` decides.
        dense_mask: Ship ``attention_mask``. Without it the model side builds its mask, dense or
            block, from ``document_ids`` and ``branch_ids`` on its own device.
        pad_to_multiple_of: As in ``packing.pack``.
        extra_columns: Numeric columns to pass on beyond ``formats.NUMERIC_COLUMNS``.
    """

    pad_token_id: int
    kind: Kind = "pair"
    prefix_sharing: bool = True
    row_tokens: int | None = None
    dense_mask: bool = True
    pad_to_multiple_of: int | None = None
    extra_columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an option out of range."""
        if self.kind not in RESPONSES:
            raise ValueError(f"kind must be 'pair', 'unpaired' or 'group', got {self.kind!r}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of ``examples``: see the table in the module's text.

        Args:
            examples: Rows with ``prompt_ids``, the ids of each response, optional masks and
                numeric columns; all rows with the same columns.

        Returns:
            Tensors on CPU by name.

        Raises:
            ValueError: no examples, a column missing, or lists of a numeric column that differ in
                length.
        """
        if not examples:
            raise ValueError("cannot collate an empty batch")
        columns = examples[0]
        names = response_names(columns, self.kind)
        needed = ["prompt_ids", *(name + "_ids" for name in names)]
        needed += ["label"] if self.kind == "unpaired" else []
        if missing := [name for name in needed if name not in columns]:
            raise ValueError(
                f"examples lack {missing}, they have {list(columns)}. Tokenise the dataset with "
                "tokenize_dataset; in a transformers.Trainer, set remove_unused_columns=False"
            )
        # A response with a prompt of its own is a document of its own.
        own = [name for name in names if name + "_prompt_ids" in columns]
        shared = [name for name in names if name not in own]
        packed = pack(
            [
                *(_document(example, shared) for example in examples),
                *(
                    _document(example, [name], names.index(name), name + "_prompt_ids")
                    for name in own
                    for example in examples
                ),
            ],
            row_tokens=self.row_tokens,
            prefix_sharing=self.prefix_sharing,
            dense_mask=self.dense_mask,
            pad_token_id=self.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        batch: dict[str, Tensor] = dict(vars(packed))
        if self.dense_mask:
            batch["attention_mask"] = dense_mask(packed.document_ids, packed.branch_ids)
        size = len(examples)
        sequences = torch.arange(len(names) * size).view(len(names), size)
        if self.kind == "pair":
            batch["pairs"] = sequences[:2].T.contiguous()
            batch |= dict(zip(names[2:], sequences[2:], strict=True))
        elif self.kind == "group":
            batch["groups"] = sequences.T.contiguous()
        else:
            batch["label"] = torch.tensor([bool(example["label"]) for example in examples])
            if "mismatched" in names:
                batch["mismatched"] = sequences[1][packed.lengths[size:] > 0]
        for name in (*NUMERIC_COLUMNS[self.kind], *self.extra_columns):
            if name in columns:
                batch[name] = _numbers(name, examples)
        if "example_ids" in columns:
            batch["example_ids"] = torch.tensor([int(e["example_ids"]) for e in examples])
        return batch


def lengths(dataset: Dataset, *, prefix_sharing: bool = True) -> list[int]:
    """Tokens that each row of a tokenised dataset takes in a batch, for samplers that group by it.

    Add them as the column ``length``, and ``train_sampling_strategy="group_by_length"`` of
    ``transformers.Trainer`` works: ``dataset.add_column("length", lengths(dataset))``.

    Args:
        dataset: A tokenised ``datasets.Dataset``.
        prefix_sharing: Count the prompt once, not once per response.

    Returns:
        One number per row.
    """
    kind = next(k for k, names in RESPONSES.items() if names[0] + "_ids" in dataset.column_names)
    columns = [name + "_ids" for name in response_names(dataset.column_names, kind)]
    own = [n for n in dataset.column_names if n.endswith("_prompt_ids")]
    counts = token_counts(dataset, ["prompt_ids", *columns, *own])
    prompts = counts.pop("prompt_ids") * (1 if prefix_sharing else len(columns) - len(own))
    return [int(n) for n in prompts + sum(counts.values())]


def _document(
    example: Mapping[str, Any], names: Sequence[str], first: int = 0, prompt: str = "prompt_ids"
) -> Document:
    return Document(
        prompt=example[prompt],
        responses=[example[name + "_ids"] for name in names],
        masks=[example.get(name + "_mask") for name in names],
        first=first,
    )


def _numbers(name: str, examples: Sequence[Mapping[str, Any]]) -> Tensor:
    try:
        values = np.asarray([example[name] for example in examples])
    except ValueError:  # lists of several lengths
        values = np.asarray(None)
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"column {name!r} must hold a number, or a list of numbers of one length, in every row"
        )
    return torch.from_numpy(values.astype(np.float32))
