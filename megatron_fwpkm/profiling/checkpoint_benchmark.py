"""How long training waits for checkpoints, and how fast they are written: beside training, and while it waits.

A job's model, engine and store, fed with random tokens. The two ways take turns, so that both meet the same machine; on
a machine whose processes share a few cores, writing beside training slows the steps down: that is measured too.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megatron_fwpkm.checkpoint.store import CheckpointStore, JobState
from megatron_fwpkm.config import TrainConfig, load_train_config
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.terminal import new_console, print_line
from megatron_fwpkm.train.dry_run import padded_vocabulary
from megatron_fwpkm.train.engine import build_training
from megatron_fwpkm.train.job import build_model, checkpoint_parts, describe_layout
from megatron_fwpkm.train.launcher import start_processes
from megatron_fwpkm.train.step import Stepper

TOKENS = 32_000
"""Of the vocabulary where the configuration leaves that to a tokenizer."""
WAYS = {True: "beside training", False: "training waits"}


@dataclass(frozen=True)
class CheckpointSettings:
    """What is measured, and where results go."""

    config: Path
    overrides: tuple[str, ...]
    folder: Path
    repeats: int
    steps: int
    out: Path


def start_benchmark(settings: CheckpointSettings, script: Sequence[str]) -> int:
    """Start the processes; returns their exit status."""
    config = load_train_config(settings.config, settings.overrides)
    return start_processes(script, config.parallel.processes, settings.folder)


def run_as_rank(settings: CheckpointSettings) -> None:
    """Measure as one of the processes, print and write the results on the first."""
    config = load_train_config(settings.config, settings.overrides)
    ranks = parallel.initialize(config.parallel)
    try:
        figures = _measure(settings, config, ranks)
        parallel.on_leader(lambda: _report(settings, config, figures), "writing the results")
    finally:
        if ranks.is_leader:
            shutil.rmtree(settings.folder, ignore_errors=True)
        parallel.shut_down()


def _random_batches(config: TrainConfig, vocabulary: int, seed: int) -> Iterator[TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.training.micro_batch_size, config.data.sequence_length + 1)
    while True:
        tokens_BT = torch.randint(vocabulary, shape, generator=generator)
        yield TokenBatch(tokens_BT[:, :-1], tokens_BT[:, 1:])


def _measure(settings: CheckpointSettings, config: TrainConfig, ranks: parallel.Topology) -> dict[str, Any]:
    tokens = config.data.vocab_size or TOKENS
    vocabulary = padded_vocabulary(tokens, config.parallel.tensor)
    model = build_model(config, ranks, vocabulary)
    bundle = build_training(model, config.optimizer, config.training)
    kind: type[Stepper] = Stepper
    if ranks.stages > 1:
        from megatron_fwpkm.train.pipeline_step import PipelineStepper

        kind = PipelineStepper
    batches = _random_batches(config, tokens, ranks.replica)
    stepper = kind(bundle, model, batches, training=config.training, seed=config.seed, topology=ranks)
    parts = checkpoint_parts(bundle, model, ranks)
    stores = {
        asynchronous: CheckpointStore(settings.folder / "checkpoints", ranks, parts, asynchronous=asynchronous)
        for asynchronous in WAYS
    }
    model.train()
    step = 0

    def timed_step() -> float:
        nonlocal step
        step += 1
        started = time.perf_counter()
        stepper.run(step, 1e-4, lambda: False)
        return time.perf_counter() - started

    alone = [timed_step() for _ in range(2 + settings.steps)][2:]
    found: dict[bool, list[dict[str, float]]] = {asynchronous: [] for asynchronous in WAYS}
    for _ in range(1 + settings.repeats):  # the first of each is not counted
        for asynchronous, store in stores.items():
            state = JobState(step, 0, 0, None, [], {}, {}, describe_layout(config, ranks))
            started = time.perf_counter()
            store.save(state)
            waited = time.perf_counter() - started
            beside = [timed_step() for _ in range(settings.steps)]
            store.finish()
            (report,) = store.take_reports()
            found[asynchronous].append(
                {
                    "waited_seconds": waited,
                    "write_seconds": report.seconds - (report.pause_seconds if asynchronous else 0.0),
                    "bytes": report.num_bytes,
                    "step_seconds": statistics.median(beside),
                }
            )
    return {
        "step_seconds_alone": statistics.median(alone),
        "ways": {WAYS[asynchronous]: _medians(rows[1:]) for asynchronous, rows in found.items()},
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _report(settings: CheckpointSettings, config: TrainConfig, figures: dict[str, Any]) -> None:
    table = Table(
        "checkpoint", "MiB", "training waits", "written in", "MiB/s", "a step meanwhile", title_justify="left"
    )
    for name, row in figures["ways"].items():
        size = row["bytes"] / 2**20
        table.add_row(
            name,
            f"{size:.1f}",
            f"{row['waited_seconds'] * 1000:.0f} ms",
            f"{row['write_seconds'] * 1000:.0f} ms",
            f"{size / row['write_seconds']:.0f}",
            f"{row['step_seconds'] * 1000:.0f} ms",
        )
    new_console().print(table)
    print_line(
        f"a step alone: {figures['step_seconds_alone'] * 1000:.0f} ms; medians of {settings.repeats}, first rank"
    )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    layout = {"processes": config.parallel.processes, "overrides": list(settings.overrides)}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps({**figures, "machine": machine, "layout": layout}, indent=2) + "\n")
