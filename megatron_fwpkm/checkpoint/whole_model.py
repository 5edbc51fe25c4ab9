"""A checkpoint's model in one process, whatever layout wrote it: for measuring, converting and comparing."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_fwpkm.checkpoint.files import TENSORS
from megatron_fwpkm.checkpoint.parts import (
    BY_SLOT,
    WEIGHTS,
    SlotRows,
    count_memories,
    embedding_rows,
    fast_name,
    load_memory,
    memory_pieces,
)
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.memory.pkm_layer import named_slow_weights, slow_tables
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend


def read_decoder(
    checkpoint: Path,
    config: DecoderConfig,
    backend: Backend,
    seed: int,
    memory: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """The model of a checkpoint, weights cast to `dtype`; memory number `memory` of those that it has.

    Raises ValueError when the checkpoint is not of that configuration, or can't be read.
    """
    source = SavedTensors(checkpoint / TENSORS)
    try:
        model = Decoder(config, embedding_rows(source), backend, seed)
        model.to(dtype)
        load_whole_model(model, source, memory)
    except Exception as error:  # torch and its readers have exceptions of their own
        raise ValueError(str(error) or repr(error)) from error
    return model


@torch.no_grad()
def load_whole_model(model: Decoder, source: SavedTensors, memory: int = 0) -> None:
    """Set weights, cast to the model's dtype, and fast states, of the replicas that wrote memory number `memory`.

    Raises ValueError when weights or memories are not those of the model; some of it may be loaded then.
    """
    weights, tables = dict(named_slow_weights(model)), slow_tables(model)
    names = {_saved_name(name, name in tables): name for name in weights}
    there = {name for name in source.descriptions if name.startswith(WEIGHTS)}
    lost = sorted(there ^ set(names))
    if lost:
        raise ValueError(f"weights that only one side has: {', '.join(lost[:3])}")
    for saved, name in names.items():
        weight = weights[name]
        if name in tables:
            config = tables[name].config
            read = SlotRows(config.n_subkeys, config.v_dim).read(source, saved, _wide(weight))
        else:
            read = source.read_like(saved, _wide(weight))
        weight.copy_(read)
    states = list(model.fast_states())
    memories = count_memories(source)
    if states and memory >= memories:
        raise ValueError(f"there is no memory {memory}: {memories} were written, from 0 on")
    for index, state in states:
        load_memory(state, [fast_name(memory, index)], source)


@torch.no_grad()
def whole_model_pieces(model: Decoder) -> dict[str, Pieces]:
    """Weights and fast states of a model as `load_whole_model` reads them; moments there are none."""
    found, tables, staging = {}, slow_tables(model), Staging()
    for name, weight in named_slow_weights(model):
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        saved = _saved_name(name, name in tables)
        if name in tables:
            config = tables[name].config
            found[saved] = SlotRows(config.n_subkeys, config.v_dim).pieces(saved, wide, staging)
        else:
            found[saved] = Pieces.whole(wide)
    for index, state in model.fast_states():
        found |= memory_pieces(state, fast_name(0, index), staging)
    return found


def _saved_name(name: str, is_table: bool) -> str:
    return f"{WEIGHTS}{name}{BY_SLOT if is_table else ''}"


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """As it is kept in files."""
    return torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device="meta")
