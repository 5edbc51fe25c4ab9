"""One process as a rank of a job: from the process group to the watch over the other ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch.distributed

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.scratch import (
    SCRATCH_VARIABLE,
    clean_abandoned,
    hold_scratch,
    open_scratch,
    use_as_temporary_folder,
)
from megatron_fwpkm.parallel import topology as parallel
from megatron_fwpkm.train.launcher import report_failure
from megatron_fwpkm.train.layout import check_processes
from megatron_fwpkm.train.logs import RankLog
from megatron_fwpkm.train.peers import TRAINING, PeerWatch, Wording
from megatron_fwpkm.train.run_directory import lock_run_directory
from megatron_fwpkm.train.stop import StopRequest, end_with_parent


@dataclass(frozen=True)
class Joined:
    """What a rank has once it takes part in a job."""

    ranks: parallel.Topology
    scratch: Path
    """Temporary folder of this machine's ranks."""
    stop: StopRequest


@contextmanager
def joined_job(config: TrainConfig, wording: Wording = TRAINING) -> Iterator[Joined]:
    """Take part in the job of a configuration, which has config.run_directory for itself meanwhile.

    Raises UserError for what the user can mend, and SystemExit with a status above 0, the reason said and logged, when
    this rank or another one fails inside.
    """
    end_with_parent()
    check_processes(config, int(os.environ["WORLD_SIZE"]))
    ranks = parallel.initialize(config.parallel)
    stop = StopRequest()  # not before: until here there is nothing to save, and a signal may end the process
    run_directory = Path(config.run_directory)
    with ExitStack() as open_things:
        open_things.callback(parallel.shut_down)
        scratch = open_things.enter_context(_shared_scratch(ranks))
        run_lock = parallel.agree_on_errors(
            lambda: lock_run_directory(run_directory) if ranks.is_leader else nullcontext(), "locking the run directory"
        )
        open_things.enter_context(run_lock)
        log = RankLog(run_directory, ranks.rank, ranks.world_size)
        parallel.agree_on_errors(lambda: open_things.enter_context(log), "opening the logs")
        watch = PeerWatch(
            ranks, run_directory, report_failure, lambda: _clean_up_after_others(scratch), wording=wording
        )
        open_things.enter_context(watch)
        with watch.reporting(log):
            yield Joined(ranks, scratch, stop)
            watch.stop()
            torch.distributed.barrier()  # the others watch no more either: this process may go


@contextmanager
def _shared_scratch(ranks: parallel.Topology) -> Iterator[Path]:
    """The job's temporary folder, shared by this machine's ranks and theirs alone."""
    given = os.environ.get(SCRATCH_VARIABLE)
    with ExitStack() as opened:
        own = None
        if given is not None:
            opened.enter_context(hold_scratch(Path(given)))
        elif ranks.local_rank == 0:
            own, _ = opened.enter_context(open_scratch())
        folders: list[Path | None] = [None] * ranks.world_size
        torch.distributed.all_gather_object(folders, own)
        folder = Path(given) if given else folders[ranks.rank - ranks.local_rank]
        assert folder is not None
        use_as_temporary_folder(folder)
        yield folder
        if given is None:
            torch.distributed.barrier()  # the folder is in use until the last rank is done


def _clean_up_after_others(scratch: Path) -> None:
    """Remove the job's temporary folder and shared memory if the process that would have done so is dead."""
    if SCRATCH_VARIABLE not in os.environ:
        tempfile.tempdir = str(scratch.parent)
        clean_abandoned()
