"""The DeepSpeed engine around the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_fwpkm.train.settings import OptimizerConfig, TrainingConfig


def engine_settings(training: TrainingConfig, gradient_clipping: float) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping is always set: its default is 1.0, not off."""
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        # In bf16 DeepSpeed looks for non-finite gradients only when asked; in fp32 it always does.
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": True},
        "steps_per_print": 1 << 30,
    }


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: TrainingConfig, optimizer_config: OptimizerConfig
) -> Any:
    """Wrap model and optimizer in a DeepSpeed engine; all ranks call this together."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=engine_settings(training, optimizer_config.gradient_clipping),
        dist_init_required=False,
    )
    return engine
