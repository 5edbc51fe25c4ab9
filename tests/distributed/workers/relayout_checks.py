"""Training that goes on in other layouts: a checkpoint of each is loaded by the next, saved again, and trained from.

Run as a script: relayout_checks.py <configuration, unused> <file of legs as JSON>

A leg is a layout, where it begins and what it does there; all of a file have as many processes. Legs of one chain see
the same sequences: where fewer replicas read a microbatch each reads what several read elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_fwpkm.checkpoint.folder import newest_whole
from megatron_fwpkm.checkpoint.parts import count_memories
from megatron_fwpkm.checkpoint.store import CheckpointStore, JobState
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.memory import PKMConfig
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train.job import checkpoint_parts
from tests.distributed.cells import Cell
from tests.distributed.workers import equivalence

RATES = equivalence.RATES


@dataclasses.dataclass(frozen=True)
class Leg:
    """One layout in a chain."""

    name: str
    cell: Cell
    folder: str
    """Where the chain's checkpoints are: <folder>/<name of a leg>."""
    come_from: str = ""
    """The leg whose last checkpoint is loaded; none: the beginning of training."""
    steps: tuple[int, ...] = ()
    """Steps to make, after which a checkpoint is written; with none what was loaded is written at once."""
    more_steps: tuple[int, ...] = ()
    """Steps to make after that."""
    streams: int = 1
    """Replicas of the chain's data that all replicas of this layout share evenly."""
    memories: str | None = None
    """Policy for another number of memories."""
    with_table: bool = True
    """Whether the model has a PKM layer."""


def shared_batches(leg: Leg, replica: int) -> Iterator[TokenBatch]:
    """What this replica reads of the chain's streams."""
    each = leg.streams // leg.cell.replicas
    streams = [equivalence.batches(leg.cell, replica * each + number) for number in range(each)]
    return (equivalence.concatenated(list(parts)) for parts in zip(*streams, strict=True))


def with_table(config: DecoderConfig) -> DecoderConfig:
    """The same with a PKM layer."""
    table = PKMConfig(heads=1, topk=2, n_subkeys=equivalence.SUBKEYS, k_dim=16, v_dim=12)
    return dataclasses.replace(config, pkm_layers=(1,), pkm=table)


def run_leg(leg: Leg) -> dict[str, Any]:
    """Losses of the leg's steps."""
    config = with_table(equivalence.CONFIG) if leg.with_table else equivalence.CONFIG
    with (
        mock.patch.object(equivalence, "CONFIG", config),
        mock.patch.object(equivalence, "batches", lambda cell, replica: iter(())),
    ):
        trainer = equivalence.Trainer(leg.cell)
    stream = shared_batches(leg, trainer.ranks.replica)
    trainer.stepper._loader = stream
    parts = checkpoint_parts(trainer.bundle, trainer.model, trainer.ranks, leg.memories)  # type: ignore[arg-type]
    losses: list[float] = []
    notes: list[str] = []
    done = 0
    if leg.come_from:
        before = Path(leg.folder) / leg.come_from
        source = newest_whole(before, trainer.ranks, notes.append)
        assert source is not None
        done = CheckpointStore(before, trainer.ranks, parts).load(source, notes.append).step
        for _ in range(done * leg.cell.accumulation):
            next(stream)

    def train(steps: tuple[int, ...]) -> None:
        for step in steps:
            losses.append(trainer.stepper.run(step, RATES[step - 1], lambda: False).loss)

    train(leg.steps)
    done += len(leg.steps)
    folder = Path(leg.folder) / leg.name
    store = CheckpointStore(folder, trainer.ranks, parts, asynchronous=True)
    path = store.save(JobState(done, 0, 0, None, [], {}, {}, {}))
    train(leg.more_steps)
    store.finish()
    found = {
        "losses": losses,
        "notes": notes,
        "checkpoint": str(path),
        "memories": count_memories(SavedTensors(path / "tensors")),
    }
    trainer.end()
    return found


def main() -> None:
    legs = [
        Leg(**{**values, "cell": Cell(**values["cell"]), "steps": tuple(values["steps"]),
               "more_steps": tuple(values["more_steps"])})
        for values in json.loads(Path(sys.argv[2]).read_text())
    ]  # fmt: skip
    topology.initialize(ParallelConfig(timeout_seconds=120))
    found = {}
    for leg in legs:
        found[leg.name] = run_leg(leg)
        topology.end_groups()
    leads = dist.get_rank() == 0
    topology.shut_down()
    if leads:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
