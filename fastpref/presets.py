"""The trainer with the defaults of TRL 1.16's trainers, under their names."""

from __future__ import annotations

from fastpref.config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from fastpref.trainer import PreferenceTrainer


class DPOTrainer(PreferenceTrainer):
    """:class:`PreferenceTrainer` with the defaults of TRL 1.16's ``DPOTrainer``."""

    config_class = DPOConfig


class KTOTrainer(PreferenceTrainer):
    """:class:`PreferenceTrainer` with the defaults of TRL 1.16's ``KTOTrainer``."""

    config_class = KTOConfig


class CPOTrainer(PreferenceTrainer):
    """:class:`PreferenceTrainer` with the options of TRL 1.16's ``CPOTrainer``."""

    config_class = CPOConfig


class ORPOTrainer(PreferenceTrainer):
    """:class:`PreferenceTrainer` with the defaults of TRL 1.16's ``ORPOTrainer``."""

    config_class = ORPOConfig
