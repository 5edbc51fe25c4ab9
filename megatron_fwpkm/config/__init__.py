"""Typed configuration, YAML composition and dotted overrides."""

from megatron_fwpkm.config.load import (
    differing_keys,
    load_data_config,
    load_model_config,
    load_train_config,
    to_yaml,
)
from megatron_fwpkm.config.schema import TrainConfig
from megatron_fwpkm.errors import UserError

__all__ = [
    "TrainConfig",
    "UserError",
    "differing_keys",
    "load_data_config",
    "load_model_config",
    "load_train_config",
    "to_yaml",
]
