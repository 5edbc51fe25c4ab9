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
    def _check_pipeline(self) -> TrainConfig:
        stages = self.parallel.pipeline
        if stages > self.model.layers:
            raise ValueError(
                f"parallel.pipeline ({stages}) must be at most model.layers ({self.model.layers}): a stage has at "
                "least one block"
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
        check_evaluation(self, max(1, self.parallel.processes // (self.parallel.tensor * self.parallel.pipeline)))
        return self

    @model_validator(mode="after")
    def _check_split(self) -> TrainConfig:
        parallel, ranks = self.parallel, self.parallel.tensor
        for name, size in _split_sizes(self).items():
            if size % ranks:
                raise ValueError(
                    f"{name} ({size}) can't be divided over parallel.tensor ({ranks}) ranks; make it a multiple of "
                    f"{ranks}, or lower parallel.tensor"
                )
        check_memories(self, parallel.memory.group_replicas)
        if parallel.pipeline > 1 and self.training.zero_stage > 1:
            raise ValueError(
                f"training.zero_stage {self.training.zero_stage} divides gradients, which pipeline stages add up over "
                f"microbatches; with parallel.pipeline ({parallel.pipeline}) above 1 set training.zero_stage to 0 or 1"
            )
        return self


def check_evaluation(config: TrainConfig, replicas: int) -> None:
    """Raise ValueError, naming the numbers, unless each replica has a batch of held-out sequences."""
    if config.evaluation.sequences < replicas * config.training.micro_batch_size:
        raise ValueError(
            f"evaluation.sequences ({config.evaluation.sequences}) must be at least the number of replicas x "
            f"training.micro_batch_size ({replicas} x {config.training.micro_batch_size})"
        )


def check_memories(config: TrainConfig, together: int) -> None:
    """Raise ValueError, naming the numbers, unless memories can be spread over the ranks of `together` replicas."""
    model, parallel = config.model, config.parallel
    spread: dict[str, tuple[int, int]] = {}  # sub-keys and ranks
    if model.memory_layers and parallel.memory.sharding == "slots":
        spread["model.memory.n_subkeys"] = model.memory.n_subkeys, parallel.tensor * together
    if model.pkm_layers:
        spread["model.pkm.n_subkeys"] = model.pkm.n_subkeys, parallel.tensor
    for name, (subkeys, ranks) in spread.items():
        if subkeys < ranks:
            raise ValueError(
                f"{name} ({subkeys}) must be at least the number of ranks that a memory is spread over ({ranks}); "
                "raise it, or spread memories over fewer"
            )
    if model.memory_layers and model.memory.reset == "per_document" and together > 1:
        raise ValueError(
            f"model.memory.reset per_document doesn't go with memories of {together} replicas together "
            f"(parallel.memory.group={parallel.memory.group}, replicas={parallel.memory.replicas}): each replica has "
            "other documents; set model.memory.reset to carry, per_step or per_sequence, or parallel.memory.group=tp "
            "and parallel.memory.replicas=independent"
        )


def _split_sizes(config: TrainConfig) -> dict[str, int]:
    """What tensor-parallel ranks divide among them, by the name of its setting."""
    model, parallel = config.model, config.parallel
    mixers = {model.mixer(index) for index in range(model.layers)}
    sizes: dict[str, int] = {}
    if mixers - {"gated_delta_net"}:
        sizes |= {"model.attention_heads": model.attention_heads, "model.key_value_heads": model.key_value_heads}
    if "gated_delta_net" in mixers:
        sizes["model.delta_net.key_heads"] = model.delta_net.key_heads
    if len(set(model.pkm_layers)) < model.layers:
        sizes["model.mlp_size"] = model.mlp_size
    if parallel.memory.sharding == "columns":
        sizes |= {"model.memory.v_dim": model.memory.v_dim} if model.memory_layers else {}
    if parallel.sequence_parallel:
        sizes["data.sequence_length"] = config.data.sequence_length
    return sizes
