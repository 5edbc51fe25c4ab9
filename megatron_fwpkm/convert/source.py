"""What is converted: a model in one process, with what is known of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fwpkm.checkpoint.catalogue import choose_checkpoint
from megatron_fwpkm.checkpoint.files import TENSORS
from megatron_fwpkm.checkpoint.parts import count_memories
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.checkpoint.whole_model import read_decoder
from megatron_fwpkm.convert.official_config import decoder_config
from megatron_fwpkm.convert.official_names import load_official
from megatron_fwpkm.convert.weight_files import read_weights
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.loading import TrainedRun, open_run, read_run_config
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend


@dataclass(frozen=True)
class WholeModel:
    """A decoder in one process, weights and fast state in float32."""

    decoder: Decoder
    vocab_size: int
    """Rows of the embedding."""
    max_positions: int
    """Tokens of a sequence in training."""
    run: TrainedRun | None = None
    """Where it was trained, if it was trained here."""

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        return self.decoder.config


def model_of_run(place: Path, checkpoint: str | None = None, memory: int = 0) -> WholeModel:
    """The model of a run directory or of one of its checkpoints, whatever its layout, with one of its memories.

    Raises UserError where there is none, or it is damaged.
    """
    source = choose_checkpoint(place.resolve(), checkpoint)
    directory = source.parent.parent
    config = read_run_config(directory, ())
    run = open_run(directory, config, source.name)
    there = count_run_memories(run)
    if config.model.memory_layers and not 0 <= memory < there:
        raise UserError(f"{source} has no memory {memory}: {there} were written on their own, from 0 on")
    backend = TorchBackend(config.model.initial_std, config.model.norm_epsilon)
    try:
        decoder = read_decoder(source, config.model, backend, config.seed, memory)
    except ValueError as error:
        raise UserError(f"{source} doesn't fit {directory / 'config.yaml'} ({error}); restore that file") from error
    return WholeModel(decoder, decoder.vocab_size, config.data.sequence_length, run)


def count_run_memories(run: TrainedRun) -> int:
    """Memories of each layer that a run's checkpoint has. Raises UserError if it can't be read."""
    try:
        return count_memories(SavedTensors(run.checkpoint / TENSORS))
    except ValueError as error:
        raise UserError(f"{run.checkpoint} can't be loaded: {error}") from error


def model_of_files(weights: Path, config: Mapping[str, Any]) -> WholeModel:
    """The model of weights in official names and the config.json that belongs to them.

    Raises UserError that lists names which are missing or unknown, and settings that nothing here corresponds to.
    """
    shape, vocab_size = decoder_config(config)
    positions = config.get("max_position_embeddings") or 0
    if not isinstance(positions, int) or positions < 0:
        raise UserError(f"max_position_embeddings is {positions!r}; it must be a number of tokens")
    tensors = read_weights(weights)
    decoder = Decoder(shape, vocab_size, TorchBackend(shape.initial_std, shape.norm_epsilon), seed=0)
    load_official(decoder, tensors)
    return WholeModel(decoder, vocab_size, positions)
