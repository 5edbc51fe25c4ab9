"""What a configuration would do, without doing it: parameters, operations, memory and layout of a job.

The model is built from fake tensors, which have shapes and no content: nothing is allocated, drawn or read, so the
largest model takes seconds.
"""

from __future__ import annotations

import math
import os
import re
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
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.parallel.topology import import_engine
from megatron_fwpkm.terminal import values_table
from megatron_fwpkm.train.layout import check_processes
from megatron_fwpkm.train.memory_plan import USABLE, MemoryPlan, plan_memory

VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this. Tensor-parallel sizes that divide it make the same model."""
_FAST_BYTES = 4
"""Of a number of the fast state."""
_STAGES_SHOWN = 6
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(KiB|MiB|GiB|TiB|KB|MB|GB|TB)?", re.IGNORECASE)
_SIZE_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
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
    """The accounting of a job."""

    kinds: tuple[LayerKind, ...]
    flops_per_token: int
    tokens_per_step: int
    steps: int
    memory: MemoryPlan
    device_memory: int | None
    """Bytes of one GPU, if it was asked for one."""
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


def make_plan(config: TrainConfig, device_memory: int | None = None, processes: int | None = None) -> Plan:
    """Account for a job of so many processes, on GPUs with so many bytes of memory each or on this machine.

    Without a number the processes are those of the launcher that has started this one, or else those that the
    configuration asks for. Raises UserError if they don't fit the layout.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", config.parallel.processes))
    tensor, stages = config.parallel.tensor, config.parallel.pipeline
    check_processes(config, processes)
    replicas = processes // (tensor * stages)
    training, length = config.training, config.data.sequence_length
    vocab_size = padded_vocabulary(_vocabulary(config.data), tensor)
    model = _fake_model(config, vocab_size)
    bounds = [0, config.model.layers + 3]
    if stages > 1:
        import_engine()
        from megatron_fwpkm.model.pipeline import stage_bounds

        bounds = stage_bounds(model.flops_per_token_of_layers(length), stages)
    return Plan(
        kinds=tuple(_layer_kinds(model, length)),
        flops_per_token=model.num_flops_per_token(length),
        tokens_per_step=training.micro_batch_size * length * training.gradient_accumulation * replicas,
        steps=training.steps,
        memory=plan_memory(config, vocab_size, replicas, bounds, device_memory),
        device_memory=device_memory,
        replicas=replicas,
        tensor_parallel=tensor,
        pipeline=stages,
        zero_stage=training.zero_stage,
    )


def _fake_model(config: TrainConfig, vocab_size: int) -> Decoder:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # skip_init() makes a module without content and then gives it storage, which fake tensors refuse and don't need.
    with (
        FakeTensorMode(),
        mock.patch.object(nn.utils, "skip_init", lambda kind, *sizes, **options: kind(*sizes, **options)),
    ):
        return Decoder(
            config.model,
            vocab_size=vocab_size,
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
    console.print(_memory_table(plan))
    for line in _memory_remarks(config, plan):
        console.print(line, markup=False, highlight=False)
    console.print(values_table("Work", _work_rows(config, plan)))
    console.print(values_table("Layout", list(_layout_rows(plan))))


def _memory_table(plan: Plan) -> Table:
    """Bytes by category of a rank of each stage; of many stages the first, the one with most and the last."""
    stages, largest = plan.memory.stages, plan.memory.largest
    shown = sorted({0, largest.stage, len(stages) - 1}) if len(stages) > _STAGES_SHOWN else range(len(stages))
    title = f"Memory of one process (ZeRO-{plan.zero_stage} over {plan.replicas} replicas)"
    table = Table("", title=title, title_justify="left")
    for stage in shown:
        most = " (most)" if len(stages) > 1 and stage == largest.stage else ""
        table.add_column("bytes" if len(stages) == 1 else f"stage {stage}{most}", justify="right")
    table.add_column("share" if len(stages) == 1 else f"share of stage {largest.stage}", justify="right")
    columns = [list(stages[stage].parts().values()) for stage in shown]
    for index, (name, size) in enumerate(largest.parts().items()):
        if any(column[index] for column in columns):
            sizes = (readable_bytes(column[index]) for column in columns)
            table.add_row(name, *sizes, f"{size / largest.total:.0%}")
    table.add_section()
    table.add_row("microbatches in flight", *(str(stages[stage].microbatches) for stage in shown), "")
    table.add_row("all", *(readable_bytes(stages[stage].total) for stage in shown), "100%")
    return table


def _memory_remarks(config: TrainConfig, plan: Plan) -> Iterator[str]:
    """What dominates, what is expected and not known, and what a device holds."""
    largest = plan.memory.largest
    name, size = max(largest.parts().items(), key=lambda part: part[1])
    yield f"Most of it: {name}, {readable_bytes(size)} of {readable_bytes(largest.total)}."
    if largest.most_memory_rows > largest.memory_rows:
        yield (
            f"Rows kept by memories: {readable_bytes(largest.memory_rows)} where all slots are used alike; at most "
            f"{readable_bytes(largest.most_memory_rows)}, when no two reads of a chunk meet and one rank owns all."
        )
    kernels = "of this machine" if plan.device_memory is None else "of a GPU (flash-linear-attention)"
    yield f"Delta nets count with the kernels {kernels}. Temporaries of the backward pass are in none of the numbers."
    if config.checkpoint.asynchronous:
        most = max(stage.saving_copy for stage in plan.memory.stages)
        yield f"Beside all that, a save copies {readable_bytes(most)} a process to the CPU's memory and keeps the room."
    longest = plan.memory.longest_sequence
    if plan.device_memory is None or longest is None:
        return
    fits = largest.total <= USABLE * plan.device_memory
    yield (
        f"{'Fits' if fits else 'Does not fit'} a device of {readable_bytes(plan.device_memory)}, of which {USABLE:.0%} "
        f"are planned with, at {config.data.sequence_length:,} tokens a sequence. Longest sequence that fits: "
        + (f"{longest:,} tokens." if longest else "none.")
    )


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
        ("fast state of a replica", readable_bytes(_FAST_BYTES * plan.fast)),
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


def parse_bytes(text: str) -> int:
    """Bytes of a text like 80GiB or 80 GB; a number alone is bytes. Raises UserError for others and for 0."""
    match = _SIZE.fullmatch(text.strip())
    size = 0 if match is None else round(float(match[1]) * _SIZE_UNITS.get((match[2] or "").lower(), 1))
    if size <= 0:
        raise UserError(f"{text!r} is no size of memory; write it as 80GiB or 80GB")
    return size


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
