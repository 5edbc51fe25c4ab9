"""Typed configuration of a training job: one class per section of the YAML file.

Sections that belong to a library layer (model, memory) are plain dataclasses of that layer, so that the layer itself
needs no configuration library; everything else is defined here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_fwpkm.model.settings import DecoderConfig


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors, attribute docstrings describe the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which corpus, how it is tokenized, and how it is read."""

    source: Literal["stdlib"] = "stdlib"
    """Corpus: "stdlib" is the source and documentation of the installed Python's standard library."""
    directory: str = "data/stdlib"
    """Folder that holds prepared corpora; each preparation has its own subfolder, named by its fingerprint."""
    vocab_size: int = Field(default=4096, ge=257, le=1 << 20)
    """Number of tokens of the byte-level BPE, special token included."""
    sequence_length: int = Field(default=1024, ge=2)
    """Tokens that the model reads per sample."""
    validation_fraction: float = Field(default=0.02, gt=0.0, lt=0.5)
    """Share of documents (by hash of their content) held out."""
    max_documents: int | None = Field(default=None, ge=2)
    """Use only the first so many documents (for tests); null means all."""
    shard_megabytes: int = Field(default=8, ge=1, le=1024)
    """Largest size of one shard before compression, in MiB."""
    shuffle_seed: int = Field(default=17, ge=0)
    """Seed of the order of samples."""
    workers: int = Field(default=0, ge=0, le=64)
    """Loader processes per rank; 0 reads in the training process."""


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


class EvaluationConfig(Section):
    """Held-out perplexity."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training; 0 means at the end only."""
    sequences: int = Field(default=64, ge=1)
    """Held-out sequences read per evaluation, all processes together."""


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


class ParallelConfig(Section):
    """Processes and how they are laid out."""

    processes: int = Field(default=2, ge=1, le=64)
    """Processes that the command starts on this machine when no launcher has started it."""
    tensor: Literal[1] = 1
    """Tensor-parallel size; only 1 is supported so far."""
    timeout_seconds: int = Field(default=300, ge=10)
    """Longest wait for another process before the job fails."""


class TrainConfig(Section):
    """A whole training job."""

    name: str = Field(default="nano", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the run, shown in the summary."""
    seed: int = Field(default=1234, ge=0)
    """Seed of initialization, of the fast state and of the document split."""
    run_directory: str = "runs/nano"
    """Folder of the run: resolved config, metrics, TensorBoard files, checkpoints."""
    model: DecoderConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> TrainConfig:
        if self.optimizer.warmup_steps >= self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below training.steps "
                f"({self.training.steps})"
            )
        if self.evaluation.sequences < self.parallel.processes * self.training.micro_batch_size:
            raise ValueError(
                f"evaluation.sequences ({self.evaluation.sequences}) must be at least parallel.processes x "
                f"training.micro_batch_size ({self.parallel.processes * self.training.micro_batch_size})"
            )
        return self
