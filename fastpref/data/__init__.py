"""Datasets -> token ids -> packed, prefix-shared batches.

``load_preference_dataset`` reads, ``tokenize_dataset`` tokenises and reports,
``PreferenceCollator`` packs. ``pack`` and the mask functions are there for whoever wants the layout
alone.
"""

from __future__ import annotations

from .collator import PreferenceCollator, lengths
from .formats import extract_prompt, unpair_batch
from .load import load_preference_dataset
from .masks import dense_mask, mask_mod, to_attention_mask
from .mixture import Part, load_mixture, parts_of
from .packing import Document, PackedRows, pack, row_capacity
from .report import Issue, TokenizationReport
from .tokenize import tokenize_dataset

__all__ = [
    "Document",
    "Issue",
    "PackedRows",
    "Part",
    "PreferenceCollator",
    "TokenizationReport",
    "dense_mask",
    "extract_prompt",
    "lengths",
    "load_mixture",
    "load_preference_dataset",
    "mask_mod",
    "pack",
    "parts_of",
    "row_capacity",
    "to_attention_mask",
    "tokenize_dataset",
    "unpair_batch",
]
