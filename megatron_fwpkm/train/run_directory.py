"""The run directory: a contract about what lies where.

<run>/
    config.yaml        the resolved configuration
    environment.json   versions of Python and libraries, number of processes
    metrics.jsonl      one record per step or evaluation
    tensorboard/       event files
    checkpoints/       see checkpoint.py
    summary.json       result of the last finished evaluation
"""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from megatron_fwpkm.config import TrainConfig, UserError, differing_keys, to_yaml
from megatron_fwpkm.files import write_atomically

CHANGEABLE_ON_RESUME = (
    "logging",
    "checkpoint",
    "evaluation",
    "name",
    "run_directory",
    "training.stop_after_step",
    "parallel",
)
"""Keys that don't touch what is computed, so that a run may go on with other values."""
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "mosaicml-streaming", "tokenizers", "safetensors", "numpy")


def check_same_configuration(run_directory: Path, config: TrainConfig) -> None:
    """Compare with the configuration that the run began with; call only where there is a checkpoint.

    Raises UserError if a key differs that changes what is computed.
    """
    import yaml

    path = run_directory / "config.yaml"
    if not path.exists():
        return
    before, now = yaml.safe_load(path.read_text()), config.model_dump(mode="json")
    changed = [
        text
        for text in differing_keys(before, now)
        if not text.startswith(tuple(f"{key}." for key in CHANGEABLE_ON_RESUME))
        and text.split(" ", 1)[0] not in CHANGEABLE_ON_RESUME
    ]
    if changed:
        raise UserError(
            f"{run_directory} has a run that began with other values (then, now): {'; '.join(changed)}. Give the same "
            f"values to resume it, another run_directory to begin anew, or delete {run_directory}"
        )


@contextmanager
def _held(file: IO[str]) -> Iterator[None]:
    with file:
        yield


def lock_run_directory(run_directory: Path) -> AbstractContextManager[None]:
    """Take the run directory for this job, for as long as the context lasts.

    Raises UserError if another job has it, or it can't be written.
    """
    try:
        run_directory.mkdir(parents=True, exist_ok=True)
        file = open(run_directory / ".lock", "w")  # noqa: SIM115 - held open by the context
    except OSError as error:
        raise UserError(f"cannot write to {run_directory}: {error.strerror}; give another run_directory") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another job is running in {run_directory}; wait for it, stop it, or give another run_directory"
        ) from None
    return _held(file)


def write_description(run_directory: Path, config: TrainConfig, world_size: int) -> None:
    """Write config.yaml and environment.json."""
    write_atomically(run_directory / "config.yaml", to_yaml(config))
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processes": world_size,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    write_atomically(run_directory / "environment.json", json.dumps(environment, indent=2) + "\n")


def write_summary(run_directory: Path, values: dict[str, Any]) -> None:
    """Write summary.json."""
    write_atomically(run_directory / "summary.json", json.dumps(values, indent=2) + "\n")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
