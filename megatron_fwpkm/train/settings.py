"""Settings of optimizer, batches, checkpoints and logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_fwpkm.section import Section

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    """AdamW over the slow weights."""

    learning_rate: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """Term added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled weight decay; biases and norms have none."""
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warmup."""
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the last step, as a share of the peak."""


class TrainingConfig(Section):
    """Batch shape and length of training."""

    steps: int = Field(default=300, ge=1)
    """Optimizer steps in all."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences per process and microbatch."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Microbatches per optimizer step."""
    zero_stage: Literal[1] = 1
    """ZeRO stage; only 1 is supported so far."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of slow weights and activations; fast state is fp32 always."""
    max_skipped_steps: int = Field(default=20, ge=1)
    """Steps in a row that may be skipped as not finite before the job ends with an error."""
    stop_after_step: int | None = Field(default=None, ge=1)
    """Stop with a checkpoint after this step although the schedule goes on; null means never."""


class CheckpointConfig(Section):
    """When to save."""

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep."""


class LoggingConfig(Section):
    """What to show and record."""

    every: int = Field(default=10, ge=1)
    """Steps between console lines and TensorBoard points; metrics.jsonl gets every step."""
