"""Writing a checkpoint again as a job of another layout would: loaded by that job's processes, saved by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed

from megatron_fwpkm.checkpoint.folder import CHECKPOINTS, check_whole, checkpoints_in, is_checkpoint_name
from megatron_fwpkm.checkpoint.store import CheckpointStore, check_batch, group_for_files
from megatron_fwpkm.config import TrainConfig, load_train_config, to_yaml
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.files import sync_path, write_atomically
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.terminal import print_line
from megatron_fwpkm.train.engine import build_training
from megatron_fwpkm.train.job import build_model, checkpoint_parts, describe_layout, vocabulary_of
from megatron_fwpkm.train.joining import Joined, joined_job
from megatron_fwpkm.train.peers import Wording
from megatron_fwpkm.train.run_directory import CONFIG_FILE

CHANGEABLE = (
    "parallel.",
    "training.zero_stage=",
    "training.micro_batch_size=",
    "training.gradient_accumulation=",
    "checkpoint.",
)

RESHARDING = Wording(stopping="unless it is writing already", afterwards="Start the same command again")
_BEGUN = f".{CONFIG_FILE}.partial"


def reshard_config(run: Path, out: Path, overrides: Sequence[str], source: Path) -> TrainConfig:
    """The run's configuration in the new layout, for the directory `out` and a checkpoint of the run.

    Raises UserError if the folder holds no run, `out` holds one or what another such command has begun, or an override
    changes more than the layout.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run} holds no run (it has no config.yaml); give the run directory of a training run")
    if any(is_checkpoint_name(place.name) or _is_of_a_run(place) for place in (out.resolve(), *out.resolve().parents)):
        raise UserError(f"{out} is among the checkpoints of a run; give another directory to write to")
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} holds a run already; give another directory to write to")
    wrong = [text for text in overrides if not text.startswith(CHANGEABLE)]
    if wrong:
        allowed = ", ".join(key.rstrip("=") for key in CHANGEABLE)
        raise UserError(f"override {wrong[0]!r}: resharding can change {allowed} only")
    config = load_train_config(path, [*overrides, f"run_directory={out}"])
    if checkpoints_in(out / CHECKPOINTS) and _read_begun(out) != _content(config, source):
        raise UserError(
            f"{out} has a checkpoint and no {CONFIG_FILE}: another command was killed there; delete {out}, or give "
            "another directory to write to"
        )
    return config


def _is_of_a_run(folder: Path) -> bool:
    return folder.name == CHECKPOINTS and (folder.parent / CONFIG_FILE).exists()


def _content(config: TrainConfig, source: Path) -> str:
    """Of config.yaml."""
    return f"# Resharded from {source.resolve()}\n{to_yaml(config)}"


def _read_begun(out: Path) -> str:
    """What a command that did not come to its end has written."""
    begun = out / _BEGUN
    return begun.read_text() if begun.is_file() else ""


def reshard(config: TrainConfig, source: Path) -> None:
    """Load a checkpoint and save it into config.run_directory, as one rank of the new layout; all call this.

    Asked to stop before it has begun to write, it writes nothing. Raises SharedUserError if the checkpoint is damaged
    or does not fit the layout.
    """
    with joined_job(config, RESHARDING) as joined:
        _reshard(config, source, joined)


def _reshard(config: TrainConfig, source: Path, joined: Joined) -> None:
    ranks, out = joined.ranks, Path(config.run_directory)
    say: Callable[[str], None] = print_line if ranks.is_leader else lambda line: None
    files = group_for_files(config.checkpoint.timeout_seconds)
    say(f"reading {source}")
    check_whole(source, ranks, files)
    model = build_model(config, ranks, vocabulary_of(source, ranks.tensor_ranks, files))
    bundle = build_training(model, config.optimizer, config.training)
    parts = checkpoint_parts(bundle, model, ranks, config.checkpoint.memories)
    store = CheckpointStore(out / CHECKPOINTS, ranks, parts, group=files)
    state = store.load(source, say)
    layout = describe_layout(config, ranks)
    for note in parallel.agree_on_errors(lambda: check_batch(state.layout, layout), "comparing batches"):
        say(note)
    if any(stopped for stopped in _everywhere(joined.stop.is_set(), ranks)):
        raise SharedUserError(f"stopped as asked; no checkpoint is written to {out}")
    # Named last, as a configuration without a checkpoint would train from the beginning; written before: by it the same
    # command goes on with what it has left, and the disk can't be too full for it.
    parallel.on_leader(lambda: write_atomically(out / _BEGUN, _content(config, source)), f"writing to {out}")
    store.save(replace(state, layout=layout))
    parallel.on_leader(lambda: _finish(out), f"writing to {out}")
    for report in store.take_reports():
        say(str(report))


def _finish(out: Path) -> None:
    (out / _BEGUN).rename(out / CONFIG_FILE)
    sync_path(out)


def _everywhere(own: bool, ranks: parallel.Topology) -> list[bool]:
    found = [own] * ranks.world_size
    torch.distributed.all_gather_object(found, own)
    return found
