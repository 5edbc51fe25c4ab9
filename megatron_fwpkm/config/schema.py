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
from megatron_fwpkm.train.schedule import build_schedule
from megatron_fwpkm.train.settings import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig

LARGEST_SEED = 2**63 - 1
"""What a signed 64-bit integer holds: prepared corpora and generators keep seeds in one."""


class TrainConfig(Section):
    """A whole training job."""

    name: str = Field(default="nano", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the run, shown in the summary."""
    seed: int = Field(default=1234, ge=0, le=LARGEST_SEED)
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
    def _check_seeds(self) -> TrainConfig:
        seeds = {"data.shuffle_seed": self.data.shuffle_seed, "evaluation.needles.seed": self.evaluation.needles.seed}
        if self.data.recall is not None:
            seeds["data.recall.seed"] = self.data.recall.seed
        for key, seed in seeds.items():
            if seed > LARGEST_SEED:
                raise ValueError(f"{key} ({seed}) must be at most {LARGEST_SEED}")
        return self

    @model_validator(mode="after")
    def _check_documents(self) -> TrainConfig:
        if not self.model.memory_layers or self.model.memory.reset != "per_document":
            return self
        if self.data.source == "recall":
            raise ValueError(
                'model.memory.reset per_document needs documents and data.source "recall" has none; set '
                "model.memory.reset=per_sequence"
            )
        if self.data.documents == "joined":
            raise ValueError(
                "model.memory.reset per_document needs to know the documents, which data.documents joined doesn't "
                "tell; set data.documents=separate, or another model.memory.reset"
            )
        return self

    @model_validator(mode="after")
    def _check_tables(self) -> TrainConfig:
        if self.model.pkm_layers and not self.model.pkm.sparse_gradients:
            raise ValueError(
                "training updates the touched rows of PKM values alone; set model.pkm.sparse_gradients=true (false is "
                "for other trainers)"
            )
        return self

    @model_validator(mode="after")
    def _check_across_sections(self) -> TrainConfig:
        try:
            build_schedule(self.optimizer, self.training.steps)
        except ValueError as error:
            raise ValueError(
                f"{error}; lower optimizer.warmup_steps or optimizer.wsd_decay_fraction, or raise training.steps"
            ) from error
        if self.evaluation.sequences < self.parallel.processes * self.training.micro_batch_size:
            raise ValueError(
                f"evaluation.sequences ({self.evaluation.sequences}) must be at least parallel.processes x "
                f"training.micro_batch_size ({self.parallel.processes * self.training.micro_batch_size})"
            )
        return self
