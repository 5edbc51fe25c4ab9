"""The DeepSpeed engine around the model, and beside it the trained tables, which DeepSpeed does not optimize."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fwpkm.memory import FwPKMLayer
from megatron_fwpkm.parallel.groups import ParallelGroups
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


LARGEST_BUCKET = 40_000_000
"""Most gradients that ZeRO gathers before it reduces them; Megatron-Core's buckets start from the same number."""


def engine_settings(training: TrainingConfig, gradient_clipping: float, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a rank with so many elements in its parameters.

    Clipping is always set: its default is 1.0, not off. So is the size of buckets, for which ZeRO makes room at the
    first step: its default, 500 million elements, can be many times the model.
    """
    bf16 = training.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        # Without ZeRO our optimizer clips: DeepSpeed would know neither the tables nor of steps that are not finite.
        "gradient_clipping": gradient_clipping if training.zero_stage else 0.0,
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": max(1, min(parameters, LARGEST_BUCKET)),
        },
        "zero_allow_untested_optimizer": True,
        # In bf16 DeepSpeed looks for non-finite gradients only when asked; in fp32 it always does.
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        # Sums over microbatches and replicas would lose bits of bf16 gradients.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Parts of hidden states would be taken for wholes where tensor-parallel ranks have different tokens.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1 << 30,
    }


def build_training(model: nn.Module, optimizer: OptimizerConfig, training: TrainingConfig) -> EngineBundle:
    """Optimizer, DeepSpeed engine and trained tables for a model; all ranks call this together.

    The model's layers were made for the groups that Megatron has now. Raises UserError when a PKM layer is set to
    dense gradients.
    """
    import deepspeed

    groups = ParallelGroups()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    basic = build_optimizer(
        model,
        optimizer.learning_rate,
        optimizer.betas,
        optimizer.epsilon,
        optimizer.weight_decay,
        whole=None if training.zero_stage else (optimizer.gradient_clipping, groups.get_model_parallel_group()),
    )
    with redirect_stdout(io.StringIO()):  # one of its optimizers prints memory figures
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=basic,
            config=engine_settings(training, optimizer.gradient_clipping, trained),
            dist_init_required=False,
            # A pipeline brings its own groups, made of the same ranks.
            mpu=None if isinstance(model, deepspeed.PipelineModule) else groups,
        )
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        engine.communication_data_type = torch.float64  # comparisons; the configuration knows no such type
    check_fast_state(model)
    # After the engine has cast the parameters and made them equal on all replicas: the tables keep copies.
    own_rate = optimizer.pkm_values_learning_rate
    tables = TrainedTables(
        model,
        RowSettings(optimizer.betas, optimizer.epsilon, optimizer.weight_decay),
        is_decayed=is_decayed,
        rate_share=1.0 if own_rate is None else own_rate / optimizer.learning_rate,
        clipping=optimizer.gradient_clipping,
        group=groups.get_data_parallel_group(),
        model_group=groups.get_model_parallel_group(),
    )
    if tables.exist:
        include_in_gradient_norm(engine.optimizer, tables.join_norm, groups)
    return EngineBundle(engine, tables)


def include_in_gradient_norm(optimizer: Any, join: Callable[[Tensor], Tensor], groups: ParallelGroups) -> None:
    """Make DeepSpeed's global gradient norm the norm of all gradients, those of the tables included.

    `join` takes the norm of the other gradients and returns that of all; all ranks call it together, once in a step,
    after their own gradients are reduced. From the result DeepSpeed decides whether the step is finite, and how much
    to clip. So this is the one place where both sets of gradients meet: replicas exchange the tables' rows here, one
    clip coefficient follows from the joint norm, and a table's gradient that is not finite makes DeepSpeed skip the
    step on every rank. (Where a stage skips a step before it asks, the tables' gradients are dropped unread.) Each of
    DeepSpeed's optimizers asks in its own way.
    """
    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2, and ours without ZeRO
        norm_of_others = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: join(norm_of_others(norm_type))
    elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3 combines norms of groups
        norms_of_others = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [*(found := norms_of_others()), join(torch.zeros_like(found[0]))]
    else:  # ZeRO-1 in bf16: adds the squares of these tensors up over the ranks of a replica
        gradients_of_others = optimizer.get_grads_for_norm

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            found = gradients_of_others(for_clipping)
            if for_clipping:
                return found
            plain, of_experts = found
            norm = join(torch.zeros((), device=plain[0].device if plain else None))
            return ([*plain, norm] if groups.get_model_parallel_rank() == 0 else plain), of_experts

        optimizer.get_grads_for_norm = get_grads_for_norm


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
