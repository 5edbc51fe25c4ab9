"""Starting the job's processes on this machine when no launcher has."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_fwpkm.data.scratch import SCRATCH_VARIABLE, clean_abandoned, open_scratch
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.train.stop import STOP_FILE_VARIABLE, end_with_parent

ORDERLY_STOP_SECONDS = 120
"""Time that processes have to save and stop, once their launcher was told to end, before they are killed."""
_ERROR_FILE = "user-error"


def start_processes(script: Sequence[str], processes: int) -> int:
    """Run `script` (path and arguments) in so many processes under torch.distributed.run; returns the exit status.

    SIGTERM and SIGINT ask the processes, by a file, to stop after their current step; a second one ends them. The
    processes get a temporary folder of their own, removed at the end. Raises UserError with the message that the
    processes left by report_user_error().
    """
    try:
        return _run(script, processes)
    finally:
        clean_abandoned()


def _run(script: Sequence[str], processes: int) -> int:
    cores = len(os.sched_getaffinity(0))
    with open_scratch() as (scratch, lock):
        stop_file = scratch / "stop"
        environment = {
            **os.environ,
            SCRATCH_VARIABLE: str(scratch),
            STOP_FILE_VARIABLE: str(stop_file),
            "TMPDIR": str(scratch),
            "OMP_NUM_THREADS": str(max(1, cores // processes)),
        }
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", f"--shutdown-timeout={ORDERLY_STOP_SECONDS}", *script),
        ]
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which asks for an orderly stop.
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, pass_fds=(lock,), preexec_fn=end_with_parent
        )

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            if stop_file.exists():
                _kill_tree(child.pid)
            elif child.poll() is None:
                print(f"{signal.Signals(number).name}: stopping after this step; once more to end at once", flush=True)
                stop_file.touch()

        previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = child.wait()
            if (scratch / _ERROR_FILE).exists():
                raise UserError((scratch / _ERROR_FILE).read_text())
            return status
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if child.poll() is None:
                _kill_tree(child.pid)
                child.wait()


def _kill_tree(pid: int) -> None:
    """Kill a process and all below it: torch.distributed.run starts each process in a session of its own."""
    below = [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        _kill_tree(child)


def report_user_error(message: str) -> bool:
    """Leave a message to the command that started this process; False if no such command did.

    The process may then end with status 0, which spares the user the launcher's own report of a failure.
    """
    scratch = os.environ.get(SCRATCH_VARIABLE)
    if scratch is None:
        return False
    if os.environ.get("RANK") == "0":
        Path(scratch, _ERROR_FILE).write_text(message)
    return True
