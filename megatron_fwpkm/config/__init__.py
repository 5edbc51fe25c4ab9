"""Typed configuration, YAML composition and dotted overrides."""

from megatron_fwpkm.config.load import differing_keys, load_data_config, load_train_config, to_yaml
from megatron_fwpkm.config.schema import DataConfig, OptimizerConfig, TrainConfig, TrainingConfig
from megatron_fwpkm.errors import UserError

__all__ = [
    "DataConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainingConfig",
    "UserError",
    "differing_keys",
    "load_data_config",
    "load_train_config",
    "to_yaml",
]
