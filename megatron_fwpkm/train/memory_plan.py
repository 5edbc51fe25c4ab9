"""Bytes of one rank, category by category, for any layout, without starting it.

Weights, gradients and optimizer state follow from the sizes of the parameters and what DeepSpeed makes of them under
each ZeRO stage; fast state and trained tables from their shapes; what is kept for the backward pass from running the
layers without content (profiling/rank_trace.py). Of what depends on which slots are read it is the expected value for
evenly used slots, and beside it the most that it can be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.parallel.topology import import_engine
from megatron_fwpkm.profiling.memory_rows import distinct_slots
from megatron_fwpkm.profiling.rank_trace import MemoryReads, RankShape, RankTracer, Trace, silent_ranks
from megatron_fwpkm.train.engine import engine_settings
from megatron_fwpkm.train.optimizer import is_decayed
from megatron_fwpkm.train.settings import TrainingConfig

USABLE = 0.9
"""Share of a device's memory that is planned with: the rest is for temporaries of the backward pass, fragmentation and
the libraries' own."""
_WIDTH = {"fp32": 4, "bf16": 2}
_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FP32, _MOMENTS, _ID = 4, 8, 8
_POSITION = 4
"""Bytes of an overlay for each slot under it."""
_ROW_CLOCKS = 16
"""Bytes of a table's row beside its numbers: the count and the clock of its updates."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank of a pipeline stage; all ranks of a stage have about the same."""

    stage: int
    parameters: int
    gradients: int
    """Held at the end of the last microbatch's backward pass, rows of trained tables among them."""
    optimizer: int
    """Moments, and master copies where they are apart from the parameters."""
    slow_tables: int
    """Values of PKM layers with moments, clocks and master copies."""
    fast_state: int
    written_rows: int
    """What undo log and overlays hold of the rows that a step has written; expected."""
    memory_rows: int
    """Kept by memories for the backward passes of the microbatches in flight; expected."""
    most_memory_rows: int
    """The same at most."""
    activations: int
    """Kept by everything else for these."""
    buffers: int
    """In which DeepSpeed gathers gradients and weights, and a pipeline's messages."""
    microbatches: int
    """Microbatches in flight at once."""
    saving_copy: int = 0
    """In the CPU's memory, beside all that: what an asynchronous save copies, and keeps room for."""

    def parts(self) -> dict[str, int]:
        """Bytes by category, in words."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "trained tables (PKM)": self.slow_tables,
            "fast state": self.fast_state,
            "undo log and overlays": self.written_rows,
            "rows kept by memories": self.memory_rows,
            "other activations": self.activations,
            "buffers of DeepSpeed": self.buffers,
        }

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts().values())


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a job: a rank of each stage, and how far it goes."""

    stages: tuple[RankBytes, ...]
    longest_sequence: int | None = None
    """Most tokens of a sequence that fit the device; 0: none do. None: nobody asked."""

    @property
    def largest(self) -> RankBytes:
        """The stage with most."""
        return max(self.stages, key=lambda stage: stage.total)


def plan_memory(
    config: TrainConfig,
    vocab_size: int,
    replicas: int,
    bounds: Sequence[int],
    device_memory: int | None = None,
) -> MemoryPlan:
    """Account for every stage.

    Args:
        config: of the job
        vocab_size: padded
        replicas: model copies
        bounds: where stages begin and the last one ends, in the list of embedding, blocks, norm and head
        device_memory: bytes of one GPU; then delta nets are counted as GPU kernels keep them, and the longest sequence
            that fits is found
    """
    import_engine()
    shape = RankShape(
        model=config.model,
        vocab_size=vocab_size,
        layout=config.parallel,
        replicas=replicas,
        batch=config.training.micro_batch_size,
        dtype=_DTYPE[config.training.precision],
        separate_documents=config.data.documents == "separate",
        recompute=config.training.activation_checkpointing == "sublayers",
        gpu_kernels=device_memory is not None,
    )
    with silent_ranks(config.parallel, replicas) as ranks:
        tracer = RankTracer(shape, ranks)
        ends = list(itertools.pairwise(bounds))

        def stages_at(length: int, trace: Callable[[int, int, int], Trace] = tracer.trace) -> tuple[RankBytes, ...]:
            traces = [trace(first, end, length) for first, end in ends]
            return tuple(_stage_bytes(config, shape, replicas, *pair, len(ends), length) for pair in enumerate(traces))

        stages = stages_at(config.data.sequence_length)
        longest = None
        if device_memory is not None:
            longest = _longest(config, tracer, stages_at, round(device_memory * USABLE))
    return MemoryPlan(stages, longest)


# -- one rank ---------------------------------------------------------------------------------------------------------


def _stage_bytes(
    config: TrainConfig, shape: RankShape, replicas: int, stage: int, trace: Trace, stages: int, length: int
) -> RankBytes:
    training = config.training
    flight = min(stages - stage, training.gradient_accumulation)
    accumulation = training.gradient_accumulation
    width = _WIDTH[training.precision]
    weights = weight_bytes(trace.parameters, training, replicas)
    tables = sum(
        rows * (columns * (width + _MOMENTS + (_FP32 if width < _FP32 else 0)) + _ROW_CLOCKS)
        for rows, columns in trace.table_rows
    )
    table_gradients = sum(
        distinct_slots(reads.slots, reads.reads * accumulation) * (columns * _FP32 + _ID)
        for reads, (_, columns) in zip(trace.table_reads, trace.table_rows, strict=True)
    )
    written = sum(_written_bytes(config, reads, accumulation, flight) for reads in trace.memory_reads)
    if config.model.memory.reset == "carry":
        written += trace.subkey_bytes  # as they were at the start of the step
    # Fp32 weights and moments: replicas have a share each, or take turns tensor by tensor. An embedding that is also
    # the head's is the first stage's to save.
    numbers = sum(size for name, size in trace.parameters if stage == 0 or not name.startswith("embedding."))
    saved_tables = sum(rows * (columns * (_FP32 + _MOMENTS) + _ROW_CLOCKS) for rows, columns in trace.table_rows)
    return RankBytes(
        stage=stage,
        saving_copy=-(-((_FP32 + _MOMENTS) * numbers + saved_tables) // replicas) + trace.fast_bytes,
        parameters=weights.parameters,
        gradients=weights.gradients + round(table_gradients),
        optimizer=weights.optimizer,
        slow_tables=tables,
        fast_state=trace.fast_bytes,
        written_rows=round(written),
        memory_rows=flight * trace.memory_bytes,
        most_memory_rows=flight * trace.most_memory_bytes,
        activations=flight * trace.activation_bytes,
        buffers=weights.buffers + _message_bytes(config, shape, stage, stages, flight, length),
        microbatches=flight,
    )


def _written_bytes(config: TrainConfig, reads: MemoryReads, accumulation: int, flight: int) -> float:
    """What is held of the rows that one memory has written, beside what the newest call keeps anyway."""
    row = reads.row_bytes + _ID
    if config.model.memory.reset == "carry":
        return distinct_slots(reads.slots, reads.reads * (accumulation - 1)) * row
    per_step = config.model.memory.reset == "per_step"
    touched = distinct_slots(reads.slots, reads.reads * (accumulation if per_step else 1))
    # An overlay makes room for the rows of its first chunk, and then twice as much whenever it is full.
    room = distinct_slots(reads.slots, reads.reads / reads.chunks)
    while room < touched:
        room *= 2
    return (1 if per_step else flight) * (room * row + _POSITION * reads.slots)


@dataclass(frozen=True)
class WeightBytes:
    """Of the parameters and all that DeepSpeed has beside them."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int


def weight_bytes(parameters: Sequence[tuple[str, int]], training: TrainingConfig, replicas: int) -> WeightBytes:
    """What DeepSpeed 0.19 holds of parameters with these names and numbers of elements.

    Gradients are those at the end of the last microbatch's backward pass: whole and fp32 under ZeRO-0 and 1 (in bf16
    with a bf16 copy), this rank's share under ZeRO-2 and 3. ZeRO-3 keeps small parameters whole everywhere, and of the
    others gathers as many at a time as its limit of live parameters allows.
    """
    stage, width = training.zero_stage, _WIDTH[training.precision]
    sizes = [size for _, size in parameters]
    number = sum(sizes)
    if stage == 0:
        return WeightBytes(width * number, _FP32 * number, _MOMENTS * number, 0)
    limits = _zero_limits(training, number)
    if stage == 3:
        own = sum(-(-size // replicas) for size in sizes)
        persistent = sum(size for size in sizes if size <= limits.param_persistence_threshold)
        gathered = min(number - persistent, limits.max_live_parameters)
        return WeightBytes(
            parameters=width * (own + persistent),
            gradients=_FP32 * own,
            optimizer=(_MOMENTS + _FP32) * own,
            buffers=_FP32 * limits.reduce_bucket_size + width * gathered,
        )
    # Each parameter group is divided, and padded, on its own.
    decayed = sum(size for name, size in parameters if is_decayed(name))
    own = sum(-(-group // replicas) for group in (decayed, number - decayed))
    optimizer = (_MOMENTS + _FP32) * own
    if stage == 1 and width < _FP32:  # another of DeepSpeed's optimizers, which reduces sums where they are
        return WeightBytes(width * number, (_FP32 + width) * number, optimizer, 0)
    gradients = _FP32 * (number if stage == 1 else own)
    return WeightBytes(width * number, gradients, optimizer, width * limits.reduce_bucket_size)


def _zero_limits(training: TrainingConfig, parameters: int) -> Any:
    """DeepSpeed's settings as this job has them, its defaults filled in."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**engine_settings(training, 0.0, parameters)["zero_optimization"])


def _message_bytes(config: TrainConfig, shape: RankShape, stage: int, stages: int, flight: int, length: int) -> int:
    """A pipeline's messages beside what layers keep of them: outputs in flight, buffers that are idle, gradients."""
    if stages == 1:
        return 0
    shares = config.parallel.tensor if config.parallel.sequence_parallel else 1
    width = _WIDTH[config.training.precision]
    message = shape.batch * length // shares * shape.model.hidden_size * width
    last = stage == stages - 1
    output = shape.batch * length * shape.vocab_size // config.parallel.tensor * width if last else message
    idle = max(2, flight) - flight
    # Float32 logits are overwritten by what the loss keeps of them.
    outputs = idle + (0 if last and width == _FP32 else flight)
    gradients = (stage > 0) + (not last)
    return idle * (stage > 0) * message + outputs * output + gradients * message


# -- how far it goes --------------------------------------------------------------------------------------------------


def _longest(
    config: TrainConfig,
    tracer: RankTracer,
    stages_at: Callable[..., tuple[RankBytes, ...]],
    usable: int,
) -> int:
    """Largest sequence length, in steps of whole chunks, windows and shares, at which every stage fits."""
    chunk = config.model.memory.chunk_size if config.model.memory_layers else 1
    unit = math.lcm(chunk if isinstance(chunk, int) else 1, config.model.window, 2 * config.parallel.tensor)

    def fits(length: int, **how: Any) -> bool:
        return max(stage.total for stage in stages_at(length, **how)) <= usable

    low, high = 0, 2 * unit
    if not fits(high):
        return unit if fits(unit) else 0

    def estimate(first: int, end: int, length: int) -> Trace:
        return _extrapolated([tracer.trace(first, end, k * unit) for k in (2, 3, 4)], length / unit)

    while fits(high, trace=estimate):
        low, high = high, 2 * high
    while high - low > unit:
        middle = (low + high) // (2 * unit) * unit
        low, high = (middle, high) if fits(middle, trace=estimate) else (low, middle)
    while not fits(low):  # chunks as long as the sequence touch fewer new rows the longer they are
        low -= unit * max(1, low // unit // 50)
    return low


def _extrapolated(traces: Sequence[Trace], units: float) -> Trace:
    """From sequences of 2, 3 and 4 units: what layers keep grows as a polynomial of at most second degree."""

    def at(name: str) -> int:
        two, three, four = (getattr(trace, name) for trace in traces)
        x = units - 2
        return round(two + x * (three - two) + x * (x - 1) / 2 * (four - 2 * three + two))

    def scaled(reads: tuple[MemoryReads, ...]) -> tuple[MemoryReads, ...]:
        return tuple(replace(one, reads=one.reads * units / 2) for one in reads)

    first = traces[0]
    return replace(
        first,
        memory_bytes=at("memory_bytes"),
        most_memory_bytes=at("most_memory_bytes"),
        activation_bytes=at("activation_bytes"),
        memory_reads=scaled(first.memory_reads),
        table_reads=scaled(first.table_reads),
    )
