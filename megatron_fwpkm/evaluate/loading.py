"""Opening a finished or running training run for measuring: configuration, checkpoint, weights, fast state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_fwpkm.config import TrainConfig, load_train_config
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory.pkm_layer import named_slow_weights
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import Backend
from megatron_fwpkm.train.checkpoint_files import JOB_FILE, MANIFEST_FILE, compare_file
from megatron_fwpkm.train.tables import read_tables

CHANGEABLE = ("evaluation.", "parallel.", "logging.", "data.corpus=", "data.directory=", "data.cache=")
"""What arguments of an evaluation may change; the rest describes what was trained. (Of a corpus the place alone: the
checkpoint knows its hash.)"""
_EMBEDDING = "embedding.weight"
_TABLES = "slow_tables"  # values of PKM layers, in runs that have them
_WEIGHTS = Path("slow", "mp_rank_00_model_states.pt")


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
    source = _find_checkpoint(directory / "checkpoints", checkpoint)
    _verify(source)
    state = json.loads((source / "job.json").read_text())
    ranks = {key: count for key, count in state.get("layout", {}).items() if isinstance(count, int) and count > 1}
    if ranks or config.training.zero_stage == 3:
        spread = ", ".join(f"{key}={count}" for key, count in ranks.items()) or "training.zero_stage=3"
        raise UserError(
            f"{source} is spread over several ranks ({spread}), which can't be read into one process yet; give a run "
            "that was trained with parallel.tensor=1, parallel.pipeline=1 and a training.zero_stage below 3"
        )
    identity = hashlib.sha256((source / MANIFEST_FILE).read_bytes()).hexdigest()
    return TrainedRun(directory, config, source, state["step"], state["tokens"], state["corpus"], identity)


def _find_checkpoint(folder: Path, name: str | None) -> Path:
    complete = sorted(path.parent for path in folder.glob(f"step_*/{MANIFEST_FILE}"))
    if not complete:
        raise UserError(f"{folder} has no complete checkpoint; train for at least checkpoint.every steps")
    if name is None:
        return complete[-1]
    if folder / name not in complete:
        raise UserError(
            f"{folder} has no complete checkpoint {name!r}; there are {', '.join(p.name for p in complete)}"
        )
    return folder / name


def _verify(source: Path) -> None:
    """Raise UserError unless the files of a checkpoint are those of its manifest."""
    try:
        manifest = json.loads((source / MANIFEST_FILE).read_text())
        if JOB_FILE not in manifest:
            raise UserError(f"{source / MANIFEST_FILE} does not name {JOB_FILE}; give another --checkpoint")
        for name, wanted in manifest.items():
            wrong = compare_file(source, name, wanted)
            if wrong is not None:
                raise UserError(f"{source} is damaged ({wrong}); give another --checkpoint, or train again from there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {source}: {error}; give another --checkpoint") from error


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
    try:
        weights = _read_weights(run.checkpoint)
        model = Decoder(config, weights[_EMBEDDING].shape[0], backend, run.config.seed)
        model.to(weights[_EMBEDDING].dtype)
        _load_weights(model, weights)
        for block, fast_state in model.fast_states():
            fast_state.load(run.checkpoint / "fast_state" / f"replica_{replica:05d}" / f"block_{block:03d}.safetensors")
    except Exception as error:  # torch, safetensors and our own readers have exceptions of their own
        raise UserError(
            f"{run.checkpoint} doesn't fit the run's config.yaml or has no replica {replica} ({error}); give another "
            "--checkpoint or evaluation.replica"
        ) from error
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return model.to(device).eval()


def _read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    # The manifest has vouched for the file; DeepSpeed keeps more than tensors in it.
    content: dict[str, Any] = torch.load(checkpoint / _WEIGHTS, map_location="cpu", weights_only=False, mmap=True)
    weights = {name: value for name, value in content["module"].items() if isinstance(value, torch.Tensor)}
    tables = read_tables(checkpoint / _TABLES)
    return {**weights, **{name: table.to(weights[_EMBEDDING].dtype) for name, table in tables.items()}}


def _load_weights(model: Decoder, weights: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless every slow weight is given and every weight has a place."""
    _, unexpected = model.load_state_dict(weights, strict=False)
    lost = sorted({name for name, _ in named_slow_weights(model)} - set(weights)) + sorted(unexpected)
    if lost:
        raise ValueError(f"weights that only one side has: {', '.join(lost[:3])}")
