"""What a checkpoint is made of: each part saves and loads itself, in a folder of its own.

A part makes no collective call of its own, so that an error on one rank leaves no other waiting; DeepSpeed's save does,
and is held together by `_errors_held`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_fwpkm.model.decoder import BlockStack
from megatron_fwpkm.parallel.topology import Topology


class CheckpointPart(Protocol):
    """Owner of a part of a job's state. All ranks call both methods; each names its files after itself."""

    def save(self, folder: Path) -> None:
        """Write into the folder, which exists."""

    def load(self, folder: Path) -> None:
        """Restore from a folder that save() wrote, bitwise."""


class SlowWeights:
    """Weights and optimizer of a DeepSpeed engine, in DeepSpeed's own format."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def save(self, folder: Path) -> None:
        """Write this rank's shards."""
        with _errors_held(self._engine):
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read this rank's shards. Raises ValueError if there are no weights."""
        loaded, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise ValueError("DeepSpeed found no weights in it")


class FastStates:
    """The memories of a model, one folder for each replica; of a memory over several ranks each writes its shard."""

    def __init__(self, model: BlockStack, topology: Topology) -> None:
        self._states = list(model.fast_states())
        self._folder = f"replica_{topology.replica:05d}"
        place = topology.placement
        self._shard = f".shard_{place.memory_rank:05d}_of_{place.memory_ranks:05d}" if place.memory_ranks > 1 else ""

    def save(self, folder: Path) -> None:
        """Write this replica's memories, or this rank's shards of them."""
        (folder / self._folder).mkdir(exist_ok=True)
        for index, state in self._states:
            state.save(self._file(folder, index))

    def load(self, folder: Path) -> None:
        """Read this replica's memories, or this rank's shards of them."""
        for index, state in self._states:
            state.load(self._file(folder, index))

    def _file(self, folder: Path, index: int) -> Path:
        return folder / self._folder / f"block_{index:03d}{self._shard}.safetensors"


class RandomGenerators:
    """The random generators of torch (CPU and this rank's GPU) and Python."""

    def __init__(self, topology: Topology) -> None:
        self._name = f"rank_{topology.rank:05d}.pt"

    def save(self, folder: Path) -> None:
        """Write this rank's generators."""
        states = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        with (folder / self._name).open("wb") as file:
            torch.save(states, file)

    def load(self, folder: Path) -> None:
        """Read this rank's generators."""
        states = torch.load(folder / self._name, weights_only=True)
        torch.set_rng_state(states["torch"])
        random.setstate(_as_tuples(states["python"]))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


@contextmanager
def _errors_held(engine: Any) -> Iterator[None]:
    """Within the context a failed write of DeepSpeed waits until all ranks are through its barriers, then is raised.

    engine.save_checkpoint() has barriers before and after the files: a rank that raised between them (a full disk)
    would leave the others there until the process group's timeout.
    """
    errors: list[Exception] = []

    def held(action: Callable[..., Any]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            try:
                action(*arguments, **options)
            except Exception as error:
                errors.append(error)

        return run

    def save(state_dict: Any, path: str) -> None:
        # Through a file of Python's: torch's own writer doesn't tell a full disk from other errors.
        with open(path, "wb") as file:
            writer.save(state_dict, file)

    class HoldingWriter:
        def __getattr__(self, name: str) -> Any:
            return getattr(writer, name)

    writer, holding = engine.checkpoint_engine, HoldingWriter()
    holding.__dict__.update(save=held(save), makedirs=held(writer.makedirs))
    engine.checkpoint_engine = holding
    engine._copy_recovery_script = held(engine._copy_recovery_script)
    try:
        yield
    finally:
        engine.checkpoint_engine = writer
        del engine._copy_recovery_script
    if errors:
        raise errors[0]
