"""The run directory: a contract about what lies where.

<run>/
    config.yaml        the resolved configuration
    environment.json   what it runs on: see environment.py
    logs/              train.log: rank 0's lines; rank_00000.log ...: each rank's warnings and tracebacks
    metrics.jsonl      one record per step or evaluation
    tensorboard/       event files
    samples/           continued prompts, one file per evaluation
    checkpoints/       see checkpoint.py
    summary.json       result of the last finished evaluation
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_fwpkm.config import TrainConfig, UserError, differing_keys, to_yaml
from megatron_fwpkm.files import strict_json, write_atomically

CONFIG_FILE = "config.yaml"
CHANGEABLE_ON_RESUME = (
    "logging",
    "checkpoint",
    "evaluation",
    "name",
    "run_directory",
    "training.stop_after_step",
    "training.max_skipped_steps",
    "training.activation_checkpointing",
    "training.zero_stage",
    "training.micro_batch_size",
    "training.gradient_accumulation",
    "data.workers",
    "data.directory",
    "data.corpus",
    "data.cache",
    "data.cache_gigabytes",
    "data.processes",
    "parallel",
)
"""Keys that don't touch what is computed, so that a run may go on with other values.

(How a step's sequences are divided into microbatches is looked at when the checkpoint is loaded.)
"""


def check_same_configuration(run_directory: Path, config: TrainConfig) -> None:
    """Compare with the configuration that the run began with; call only where there is a checkpoint.

    Raises UserError if a key differs that changes what is computed, or config.yaml can't be read.
    """
    before, now = _read_configuration(run_directory), config.model_dump(mode="json")
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


def _read_configuration(run_directory: Path) -> dict[str, Any]:
    import yaml

    path = run_directory / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(
            f"cannot read {path} ({reason}), which has the settings that the checkpoints beside it were trained with; "
            "restore it to resume, or give another run_directory to begin anew"
        ) from error
    return content


@contextmanager
def _held(file: IO[str]) -> Iterator[None]:
    with file:
        yield


def lock_run_directory(run_directory: Path) -> AbstractContextManager[None]:
    """Take the run directory for this job, for as long as the context lasts.

    Raises UserError if another job has it, or it can't be written.
    """
    try:
        for folder in ("checkpoints", "logs", "samples"):
            (run_directory / folder).mkdir(parents=True, exist_ok=True)
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


def check_run_directory(config: TrainConfig) -> None:
    """What can be found wrong with the run directory before any process starts; the ranks check again.

    Raises UserError if it can't be written, another job has it, or it has a run of another configuration.
    """
    run_directory = Path(config.run_directory)
    with lock_run_directory(run_directory):
        if any((run_directory / "checkpoints").glob("step_*")):
            check_same_configuration(run_directory, config)


def write_description(run_directory: Path, config: TrainConfig, environment: dict[str, Any]) -> None:
    """Write config.yaml and environment.json."""
    write_atomically(run_directory / CONFIG_FILE, to_yaml(config))
    write_atomically(run_directory / "environment.json", strict_json(environment, indent=2) + "\n")


def write_summary(run_directory: Path, values: dict[str, Any]) -> None:
    """Write summary.json."""
    write_atomically(run_directory / "summary.json", strict_json(values, indent=2) + "\n")
