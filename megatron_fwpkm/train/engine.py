"""The DeepSpeed engine around the model, and beside it the trained tables, which DeepSpeed does not optimize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_fwpkm.memory import FwPKMLayer
from megatron_fwpkm.train.optimizer import build_optimizer, is_decayed
from megatron_fwpkm.train.settings import OptimizerConfig, TrainingConfig
from megatron_fwpkm.train.tables import TrainedTables
from megatron_fwpkm.train.touched_rows import RowSettings


@dataclass(frozen=True)
class EngineBundle:
    """What updates the weights of a model."""

    engine: Any
    """DeepSpeed's engine: all slow weights but the tables."""
    tables: TrainedTables
    """The values of the PKM layers; none in a model without such layers."""


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
        # Sums over replicas would lose bits of bf16 gradients.
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 30,
    }


def build_training(model: nn.Module, optimizer: OptimizerConfig, training: TrainingConfig) -> EngineBundle:
    """Optimizer, DeepSpeed engine and trained tables for a model; all ranks call this together.

    Raises UserError when a PKM layer is set to dense gradients.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(
            model, optimizer.learning_rate, optimizer.betas, optimizer.epsilon, optimizer.weight_decay
        ),
        config=engine_settings(training, optimizer.gradient_clipping),
        dist_init_required=False,
    )
    check_fast_state(model)
    # After the engine has cast the parameters and made them equal on all replicas: the tables keep copies.
    own_rate = optimizer.pkm_values_learning_rate
    tables = TrainedTables(
        model,
        RowSettings(optimizer.betas, optimizer.epsilon, optimizer.weight_decay),
        is_decayed=is_decayed,
        rate_share=1.0 if own_rate is None else own_rate / optimizer.learning_rate,
        clipping=optimizer.gradient_clipping,
        group=engine.optimizer.dp_process_group,
    )
    _include_in_gradient_norm(engine.optimizer, tables)
    return EngineBundle(engine, tables)


def _include_in_gradient_norm(optimizer: Any, tables: TrainedTables) -> None:
    """Make DeepSpeed's global gradient norm the norm of all gradients, those of the tables included.

    In a step DeepSpeed's ZeRO optimizer asks `scaled_global_norm` once, on all replicas together, after its own
    gradients are reduced; from the result it decides whether the step is finite, and how much to clip. So this is the
    one place where both sets of gradients meet: replicas exchange the tables' rows here, one clip coefficient follows
    from the joint norm, and a table's gradient that is not finite makes DeepSpeed skip the step on every rank. (When
    its own gradients are not finite in bf16, DeepSpeed skips without asking, and the tables' are dropped unread.)
    """
    norm_of_others = optimizer.scaled_global_norm

    def scaled_global_norm(norm_type: float = 2) -> torch.Tensor:
        return tables.join_norm(norm_of_others(norm_type))

    if tables.exist:
        optimizer.scaled_global_norm = scaled_global_norm


def check_fast_state(model: nn.Module) -> None:
    """Raise RuntimeError unless fast state stayed fp32 (or wider), outside of what the engine casts and trains."""
    trained = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    for name, layer in model.named_modules():
        if isinstance(layer, FwPKMLayer):
            for tensor in (layer.fast_state.keys_H2nd, layer.fast_state.table_ND):
                if tensor.dtype not in (torch.float32, torch.float64) or tensor.data_ptr() in trained:
                    raise RuntimeError(
                        f"the fast state of {name} is {tensor.dtype}, or a parameter or buffer: it must be float32 "
                        "and neither"
                    )
