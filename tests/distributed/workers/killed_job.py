"""One start of a training job that is killed on the way, as when its machine loses power.

killed_job.py <configuration> <fault as JSON> [overrides]

A fault names who dies ("all" ranks, or one of them), and when: {"seconds": ...} after the start, or at a place of a
save: {"place": name, "save": which save of this start}. {} is no fault. A place is where something is about to happen,
unless it is in the middle of something.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint.filesystem as files

from megatron_fwpkm.checkpoint import folder, store
from megatron_fwpkm.checkpoint.files import MANIFEST_FILE
from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.errors import SharedUserError
from megatron_fwpkm.train.job import run_job

PLACES: dict[str, tuple[Any, str]] = {
    "copying the state": (store.CheckpointStore, "_pieces"),
    "making the folder": (store, "make_room"),
    "writing tensors": (store, "save_tensors"),
    "in the middle of a file of tensors": (files, "_write_item"),
    "writing job.json": (store, "_write_job"),
    "hashing files": (store, "describe_files"),
    "writing the manifest": (store, "commit"),
    "forcing folders to the disk": (folder, "sync_path"),
    "renaming the folder": (folder, "rename"),
    "pointing latest at it": (store, "point_at"),
    "deleting the oldest": (store, "remove_superfluous"),
    "renaming the oldest": (folder, "remove_checkpoint"),
    "in the middle of deleting": (folder, "_delete"),
}
"""Some are passed by rank 0 alone."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_delete(partial: Path) -> None:
    """The files of a folder but every second one, the manifest among them."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in (partial / MANIFEST_FILE, *files[::2]):
        path.unlink(missing_ok=True)


def die_at(place: str, save: int) -> None:
    """At the place of the save-th save of this start."""
    owner, name = PLACES[place]
    action, begin = getattr(owner, name), store.CheckpointStore.save
    saves: list[int] = []
    calls: list[int] = []

    def watched_save(self: Any, state: Any) -> Any:
        saves.append(1)
        return begin(self, state)

    def watched(*arguments: Any, **options: Any) -> Any:
        if len(saves) >= save:
            calls.append(1)
            # Half of a file is there once some of its pieces are written.
            if len(calls) >= (10 if name == "_write_item" else 1):
                if name == "_delete":
                    half_delete(*arguments)
                die()
        return action(*arguments, **options)

    setattr(store.CheckpointStore, "save", watched_save)  # noqa: B010 - as the others are set
    setattr(owner, name, watched)


def build_in(fault: dict[str, Any], rank: int) -> None:
    if not fault or fault["who"] not in ("all", rank):
        return
    if "seconds" in fault:
        timer = threading.Timer(fault["seconds"], die)
        timer.daemon = True
        timer.start()
        return
    die_at(fault["place"], fault["save"])


def main(run: Callable[[Any], None] = run_job) -> int:
    build_in(json.loads(sys.argv[2]), int(os.environ["RANK"]))
    try:
        run(load_train_config(Path(sys.argv[1]), sys.argv[3:]))
    except SharedUserError as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
