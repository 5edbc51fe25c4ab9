"""Opening a finished or running training run for measuring: configuration, checkpoint, weights, fast state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_fwpkm.checkpoint.catalogue import choose_checkpoint, verify
from megatron_fwpkm.checkpoint.files import MANIFEST_FILE
from megatron_fwpkm.checkpoint.store import read_state
from megatron_fwpkm.checkpoint.whole_model import read_decoder
from megatron_fwpkm.config import TrainConfig, load_train_config
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import Backend

CHANGEABLE = ("evaluation.", "parallel.", "logging.", "data.corpus=", "data.directory=", "data.cache=")
"""What arguments of an evaluation may change; the rest describes what was trained. (Of a corpus the place alone: the
checkpoint knows its hash.)"""


@dataclass(frozen=True)
class TrainedRun:
    """A run directory and one of its complete checkpoints."""

    directory: Path
    config: TrainConfig
    checkpoint: Path
    step: int
    tokens: int
    """Tokens that it was trained on."""
    corpus: dict[str, str]
    """Hashes of the corpus and tokenizer that it was trained on."""
    identity: str
    """Hash of the checkpoint's content."""


def read_run_config(directory: Path, overrides: Sequence[str]) -> TrainConfig:
    """The run's resolved configuration, with CHANGEABLE keys overridden.

    Raises UserError if the folder holds no run, or an override would change what was trained.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory} holds no run (it has no config.yaml); give the run directory of a training run")
    wrong = [text for text in overrides if not text.startswith(CHANGEABLE)]
    if wrong:
        allowed = ", ".join(key.rstrip("=") for key in CHANGEABLE)
        raise UserError(
            f"override {wrong[0]!r}: an evaluation can change {allowed} only; the other keys describe what was trained"
        )
    return load_train_config(path, overrides)


def open_run(directory: Path, config: TrainConfig, checkpoint: str | None) -> TrainedRun:
    """The named or newest complete checkpoint of a run, its files compared with its manifest.

    Raises UserError if there is none, or it is damaged.
    """
    source = choose_checkpoint(directory, checkpoint)
    verify(source)
    state = read_state(source)
    identity = hashlib.sha256((source / MANIFEST_FILE).read_bytes()).hexdigest()
    return TrainedRun(directory, config, source, state.step, state.tokens, state.corpus, identity)


def load_decoder(
    run: TrainedRun,
    backend: Backend,
    replica: int,
    chunk_size: Literal["sequence"] | None = None,
    rope_factor: float | None = None,
) -> Decoder:
    """The run's model in evaluation mode with the weights and one replica's fast state of its checkpoint.

    `chunk_size` replaces that of the memories; `rope_factor` stretches RoPE by YaRN from the training length. Raises
    UserError if the checkpoint doesn't fit.
    """
    config = run.config.model
    if chunk_size is not None:
        config = replace(config, memory=replace(config.memory, chunk_size=chunk_size))
    if rope_factor is not None:
        from megatron_fwpkm.model.settings import YarnConfig

        length = run.config.data.sequence_length
        config = replace(config, rope_scaling=YarnConfig(factor=rope_factor, original_length=length))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.config.training.precision]
    try:
        model = read_decoder(run.checkpoint, config, backend, run.config.seed, replica, dtype)
    except ValueError as error:
        raise UserError(
            f"{run.checkpoint} doesn't fit the run's config.yaml or has no replica {replica} ({error}); give another "
            "--checkpoint or evaluation.replica"
        ) from error
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return model.to(device).eval()
