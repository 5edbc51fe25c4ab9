"""Settings of optimizer, batches, checkpoints and logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_fwpkm.section import Section

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    """AdamW over the slow weights."""

    learning_rate: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate."""
    pkm_values_learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the values of PKM layers, on the same schedule; null means that of the other parameters."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """Term added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled weight decay; parameters whose name contains "bias", "ln" or "norm" have none."""
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Course of the learning rate: warmup and cosine decay, or warmup, stable phase and decay."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warmup."""
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the last step, as a share of the peak."""
    wsd_decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of training.steps that the decay of schedule "wsd" takes, at the end."""
    wsd_decay_shape: Literal["linear", "1-sqrt"] = "1-sqrt"
    """Shape of that decay: linear, or 1 - sqrt of its progress."""

    @model_validator(mode="after")
    def _check_decay(self) -> OptimizerConfig:
        for name in ("learning_rate", "pkm_values_learning_rate"):
            if (getattr(self, name) or 0.0) * self.weight_decay >= 1.0:
                raise ValueError(f"{name} ({getattr(self, name)}) x weight_decay ({self.weight_decay}) must be below 1")
        return self


class TrainingConfig(Section):
    """Batch shape and length of training."""

    steps: int = Field(default=300, ge=1)
    """Optimizer steps in all."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences per replica and microbatch."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Microbatches per optimizer step."""
    sliding_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of steps, drawn by seed and step, in which full attention sees the sliding window only."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What replicas divide among them: 0 nothing (fp32 only), 1 optimizer state, 2 gradients too, 3 weights too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of slow weights and activations; fast state and sums of gradients are fp32 always."""
    activation_checkpointing: Literal["none", "sublayers"] = "none"
    """"sublayers": attention, delta nets and MLPs keep their input alone and compute again in the backward pass;
    memories, which write as they read, keep what they need."""
    max_skipped_steps: int = Field(default=20, ge=1)
    """Steps in a row that may be skipped as not finite before the job ends with an error."""
    stop_after_step: int | None = Field(default=None, ge=1)
    """Stop with a checkpoint after this step although the schedule goes on; null means never."""

    @model_validator(mode="after")
    def _check_stage(self) -> TrainingConfig:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 keeps no float32 weights beside bf16 ones, and DeepSpeed makes a step of its own at the "
                "start; set training.zero_stage to 1, 2 or 3, or training.precision=fp32"
            )
        return self


MemoryPolicy = Literal["keep", "first", "average", "reset"]


class CheckpointConfig(Section):
    """When and how to save, and how to load what another layout saved."""

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep_last_k: int = Field(default=2, ge=1)
    """Newest whole checkpoints to keep; damaged ones that were set aside are never deleted."""
    keep_every: int | None = Field(default=None, ge=1)
    """Milestones: checkpoints of multiples of so many steps are kept for good; null means none."""
    asynchronous: bool = True
    """Whether training goes on while files are written: it waits for a copy of the state in the CPU's memory only."""
    memories: MemoryPolicy | None = None
    """What becomes of memories that replicas write each on their own, where a checkpoint has another number of them:
    "keep": memory i goes on with memory i modulo the number there; "first": all with the first; "average": all with
    the mean of all; "reset": all begin anew; null: the job ends with an error."""
    timeout_seconds: int = Field(default=1800, ge=10, le=30 * 24 * 3600)
    """Longest wait of one rank for another that reads or writes its share of the files."""

    @model_validator(mode="after")
    def _check_milestones(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of every ({self.every}): other steps have no "
                "checkpoint to keep"
            )
        return self


class LoggingConfig(Section):
    """What to show and record."""

    every: int = Field(default=10, ge=1)
    """Steps between console lines and TensorBoard points; metrics.jsonl gets every step."""
    peak_teraflops: float | None = Field(default=None, gt=0.0)
    """Peak of one process's device for MFU, in 10^12 floating-point operations a second; null takes the published
    dense bf16 peak of a known GPU, else what a matrix product measures at the start."""
    samples: int = Field(default=4, ge=0, le=64)
    """Held-out prompts that are continued greedily at each evaluation, into samples/; 0 means none."""
    sample_prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of each prompt, from the beginning of a held-out sequence."""
    sample_new_tokens: int = Field(default=48, ge=1)
    """Tokens that continue each prompt."""
