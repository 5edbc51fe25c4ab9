"""A whole training job: its sections, and the checks across them.

Each section is declared beside what it configures: model/settings.py, memory/config.py, data/settings.py,
train/settings.py, evaluate/settings.py, parallel/settings.py.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.evaluate.settings import EvaluationConfig
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.section import Section
from megatron_fwpkm.train.settings import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig


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
