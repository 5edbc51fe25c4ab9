"""What a configuration would do, without doing it: parameters, operations, memory and layout of a job.

The model is built from fake tensors, which have shapes and no content: nothing is allocated, drawn or read, so the
largest model takes seconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table
from torch import nn

from megatron_fwpkm.accounting import ParameterCount, total
from megatron_fwpkm.config import TrainConfig, to_yaml
from megatron_fwpkm.data.manifest import read_manifest
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.tokenizer import DEFAULT_VOCABULARY, load_tokenizer
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.memory.pkm_layer import slow_tables
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.terminal import values_table
from megatron_fwpkm.train.layout import check_processes

VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this. Tensor-parallel sizes that divide it make the same model."""
_BYTES = {"fp32": 4, "bf16": 2}
_MOMENT_BYTES = 8
"""Per slow weight: AdamW's two moments."""
_MASTER_BYTES = 4
"""Per slow weight: the fp32 copy that every ZeRO stage above 0 updates."""
_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def padded_vocabulary(tokens: int, tensor_parallel: int) -> int:
    """Rows of the embedding for a tokenizer of so many tokens, a multiple of the tensor-parallel size."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel)
    return -(-tokens // multiple) * multiple


@dataclass(frozen=True)
class LayerKind:
    """All layers of one kind together."""

    name: str
    layers: int
    slow: int
    fast: int
    active_per_token: int
    """Weights that one token meets: of a memory's slots those that it reads."""
    flops_per_token: int
    """Forward and backward; 0 where it is counted as nothing (norms, the embedding's look-up)."""


@dataclass(frozen=True)
class Plan:
    """The accounting of a job; bytes are those of one process."""

    kinds: tuple[LayerKind, ...]
    flops_per_token: int
    tokens_per_step: int
    steps: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    fast_bytes: int
    memory_activation_bytes: int
    """Upper bound of what the memory layers keep for the backward pass of one microbatch."""
    replicas: int
    tensor_parallel: int
    pipeline: int
    zero_stage: int

    @property
    def slow(self) -> int:
        """Slow weights of the whole model."""
        return sum(kind.slow for kind in self.kinds)

    @property
    def fast(self) -> int:
        """Fast weights of one replica."""
        return sum(kind.fast for kind in self.kinds)

    @property
    def active_per_token(self) -> int:
        """Slow and fast weights that one token meets."""
        return sum(kind.active_per_token for kind in self.kinds)

    @property
    def total_flops(self) -> int:
        """Floating-point operations of the whole training."""
        return self.flops_per_token * self.tokens_per_step * self.steps


def make_plan(config: TrainConfig) -> Plan:
    """Account for a job. Raises UserError if the number of processes doesn't fit the layout."""
    processes = int(os.environ.get("WORLD_SIZE", config.parallel.processes))
    tensor = config.parallel.tensor
    check_processes(config, processes)
    replicas = processes // (tensor * config.parallel.pipeline)
    training, length, stage = config.training, config.data.sequence_length, config.training.zero_stage
    memory = config.parallel.memory
    memory_ranks = tensor * (replicas if memory.replicas == "synced" else memory.group_replicas)
    model = _fake_model(config)
    kinds = tuple(_layer_kinds(model, length))
    slow = sum(kind.slow for kind in kinds) // (tensor * config.parallel.pipeline)
    tables = sum(table.values_ND.numel() for table in slow_tables(model).values())
    width = _BYTES[training.precision]
    tokens = training.micro_batch_size * length
    memories = [layer.config for _, layer in model.memory_layers()]
    return Plan(
        kinds=kinds,
        flops_per_token=model.num_flops_per_token(length),
        tokens_per_step=tokens * training.gradient_accumulation * replicas,
        steps=training.steps,
        weight_bytes=_divided(width * (slow - tables), replicas if stage >= 3 else 1) + width * tables,
        # Summed in fp32; of the tables, only rows that were read have one.
        gradient_bytes=_divided(4 * (slow - tables), replicas if stage >= 2 else 1),
        # Of PKM values every replica has them.
        optimizer_bytes=_divided(
            (_MOMENT_BYTES + (stage > 0) * _MASTER_BYTES) * (slow - tables), replicas if stage else 1
        )
        + (_MOMENT_BYTES + (width < 4) * _MASTER_BYTES) * tables,
        fast_bytes=sum(
            state.keys_H2nd.nbytes + _divided(state.table_ND.nbytes, memory_ranks) for _, state in model.fast_states()
        ),
        memory_activation_bytes=sum(
            memory_activation_bytes(memory, training.micro_batch_size, length) for memory in memories
        ),
        replicas=replicas,
        tensor_parallel=tensor,
        pipeline=config.parallel.pipeline,
        zero_stage=stage,
    )


def _divided(size: int, ranks: int) -> int:
    """The largest share of so many bytes."""
    return -(-size // ranks)


def _fake_model(config: TrainConfig) -> Decoder:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # skip_init() makes a module without content and then gives it storage, which fake tensors refuse and don't need.
    with (
        FakeTensorMode(),
        mock.patch.object(nn.utils, "skip_init", lambda kind, *sizes, **options: kind(*sizes, **options)),
    ):
        return Decoder(
            config.model,
            vocab_size=padded_vocabulary(_vocabulary(config.data), config.parallel.tensor),
            backend=TorchBackend(config.model.initial_std, config.model.norm_epsilon),
            seed=config.seed,
        )


def _vocabulary(data: DataConfig) -> int:
    """Tokens of the vocabulary as far as it is known before the corpus is prepared."""
    if data.recall is not None:
        return data.recall.vocab_size
    if data.corpus is not None:
        return read_manifest(Path(data.corpus)).vocab_size
    if data.vocab_size is None and data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, data.end_of_document).vocab_size
    return data.vocab_size or DEFAULT_VOCABULARY


def _layer_kinds(model: Decoder, length: int) -> Iterator[LayerKind]:
    """One entry for each kind of sublayer, in order of first appearance; what belongs to none is the norms'."""
    head_flops = model.num_flops_per_token(length)
    found: dict[str, list[tuple[ParameterCount, int]]] = {}
    for block in model.blocks:
        layer: Any
        for layer in block.children():
            if hasattr(layer, "num_parameters"):
                flops = layer.num_flops_per_token(length)
                head_flops -= flops
                found.setdefault(type(layer).__name__, []).append((layer.num_parameters(), flops))
    ends = model.num_parameters_of_ends()
    yield LayerKind("embedding and head", 1, ends.slow, 0, ends.active_per_token, head_flops)
    counted = ends
    for name, layers in found.items():
        count = total(count for count, _ in layers)
        counted += count
        flops = sum(flops for _, flops in layers)
        yield LayerKind(name, len(layers), count.slow, count.fast, count.active_per_token, flops)
    rest = model.num_parameters().slow - counted.slow
    yield LayerKind("norms between them", 2 * len(model.blocks) + 1, rest, 0, rest, 0)


def memory_activation_bytes(config: MemoryConfig, batch: int, length: int) -> int:
    """Upper bound of the bytes that one call of a memory keeps for its backward pass.

    It is reached when no two reads of a chunk meet in a slot. Projections and norms around the memory are not in it.
    """
    chunk = length if config.chunk_size == "sequence" else min(config.chunk_size, length)
    heads_k, width = config.heads * config.k_dim, config.v_dim
    memories = batch if config.reset in ("per_sequence", "per_document") else 1
    total = batch * length * (4 * heads_k + 8 * width + 8)  # query; value and output; gate and write weight
    for start in range(0, length, chunk):
        reads = batch * min(chunk, length - start) * config.reads_per_token
        slots = min(reads, config.num_slots * memories)
        total += 64 * reads  # sub-key indices, ranks and scores; slot scores and weights; places of reads and slots
        total += slots * (28 + 4 * width * (2 if config.gradient_clip else 1))  # slots, counts, steps; rows
        total += memories * 4 * config.n_subkeys * heads_k * (2 if config.gradient_clip else 1)  # the chunk's sub-keys
        total += memories * 16 * config.n_subkeys  # their mean use, in float64
    return total


def print_plan(config: TrainConfig, plan: Plan, console: Console) -> None:
    """Show the resolved configuration, the accounting and the layout."""
    console.print(to_yaml(config), markup=False)
    table = Table(
        "layers", "number", "slow", "fast", "active a token", "FLOP a token", title="Model", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in plan.kinds:
        numbers = (kind.layers, kind.slow, kind.fast, kind.active_per_token, kind.flops_per_token)
        table.add_row(kind.name, *(f"{number:,}" for number in numbers))
    table.add_section()
    totals = (plan.slow, plan.fast, plan.active_per_token, plan.flops_per_token)
    table.add_row("all", "", *(f"{number:,}" for number in totals))
    console.print(table)
    console.print(values_table("Memory of one process", _memory_rows(plan)))
    console.print(values_table("Work", _work_rows(config, plan)))
    console.print(values_table("Layout", list(_layout_rows(plan))))


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    parts = [
        ("weights", plan.weight_bytes),
        ("gradients", plan.gradient_bytes),
        (f"optimizer (ZeRO-{plan.zero_stage} over {plan.replicas} replicas)", plan.optimizer_bytes),
        ("fast state", plan.fast_bytes),
        ("saved by memory layers per microbatch, at most", plan.memory_activation_bytes),
    ]
    rows = [(name, readable_bytes(size)) for name, size in parts]
    return [*rows, ("all of these", readable_bytes(sum(size for _, size in parts)))]


def _work_rows(config: TrainConfig, plan: Plan) -> list[tuple[str, str]]:
    training = config.training
    return [
        (
            "tokens a step",
            f"{plan.tokens_per_step:,} = {plan.replicas} replicas x {training.gradient_accumulation} microbatches x "
            f"{training.micro_batch_size} sequences x {config.data.sequence_length:,} tokens",
        ),
        ("tokens in all", f"{plan.tokens_per_step * plan.steps:,} in {plan.steps:,} steps"),
        ("FLOP a step", _readable(plan.flops_per_token * plan.tokens_per_step)),
        ("FLOP in all", _readable(plan.total_flops)),
        ("fast state of all replicas", readable_bytes(plan.fast_bytes * plan.replicas)),
    ]


def _layout_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Replicas and their ranks; of many replicas the first and the last."""
    for replica in range(plan.replicas):
        size = plan.tensor_parallel * plan.pipeline
        ranks = list(range(replica * size, (replica + 1) * size))
        if replica < 4 or replica == plan.replicas - 1:
            yield f"replica {replica}", f"rank {', '.join(str(rank) for rank in ranks)}"
        elif replica == 4:
            yield "...", f"{plan.replicas} replicas of {size} ranks"


def readable_bytes(size: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size} B"


def _readable(value: float) -> str:
    if value >= 1e15:
        return f"{value:.3e}"
    for unit, factor in _UNITS:
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"
