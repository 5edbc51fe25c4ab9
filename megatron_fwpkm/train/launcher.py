"""Starting the job's processes on this machine when no launcher has."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_fwpkm.data.scratch import SCRATCH_VARIABLE, clean_abandoned, is_held_by_others, open_scratch
from megatron_fwpkm.errors import JobFailedError, SharedUserError, UserError
from megatron_fwpkm.terminal import print_line
from megatron_fwpkm.train import agent
from megatron_fwpkm.train.peers import (
    EXIT_BECAUSE_OF_ANOTHER,
    GONE,
    TRAINING,
    Failure,
    Wording,
    connect_to_launcher,
    describe_failure,
)
from megatron_fwpkm.train.stop import SAME_REQUEST_SECONDS, STOP_FILE_VARIABLE, end_with_parent

ORDERLY_STOP_SECONDS = 120
"""Time that processes have to save and stop, once their launcher was told to end, before they are killed."""
_USER_ERROR_FILE = "user-error"
_FAILURE_FILE = "failure"
_EXITS_FILE = "exits.json"
_MESSAGE_FILES = (_USER_ERROR_FILE, _FAILURE_FILE, _EXITS_FILE)


def start_processes(script: Sequence[str], processes: int, run_directory: Path, wording: Wording = TRAINING) -> int:
    """Run `script` (path and arguments) in so many processes under torch.distributed.run; returns the exit status.

    SIGTERM and SIGINT ask the processes, by a file, to stop after their current step; a second one ends them. The
    processes get a temporary folder of their own, removed at the end. Raises UserError with the message that the
    processes left by report_user_error() or when there is no room for the temporary folder, JobFailedError when one of
    the processes failed or was killed.
    """
    try:
        return _run(script, processes, run_directory, wording)
    finally:
        clean_abandoned()


def _run(script: Sequence[str], processes: int, run_directory: Path, wording: Wording) -> int:
    cores = len(os.sched_getaffinity(0))
    with open_scratch() as (scratch, lock):
        _reserve_messages(scratch)
        stop_file = scratch / "stop"
        environment = {
            **os.environ,
            SCRATCH_VARIABLE: str(scratch),
            STOP_FILE_VARIABLE: str(stop_file),
            "TMPDIR": str(scratch),
            "OMP_NUM_THREADS": str(max(1, cores // processes)),
        }
        command = [
            *(sys.executable, "-P", str(agent.__file__), str(scratch / _EXITS_FILE), "--standalone"),
            *(f"--nproc-per-node={processes}", f"--shutdown-timeout={ORDERLY_STOP_SECONDS}", *script),
        ]
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which asks for an orderly stop.
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, pass_fds=(lock,), preexec_fn=end_with_parent
        )
        ended_at_once: list[bool] = []

        asked: list[float] = []

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            if asked:
                if time.monotonic() - asked[0] > SAME_REQUEST_SECONDS:
                    ended_at_once.append(True)
                    _kill_tree(child.pid)
            elif child.poll() is None:
                asked.append(time.monotonic())
                stop_file.touch()
                print_line(f"{signal.Signals(number).name}: stopping {wording.stopping}; once more to end at once")

        previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = child.wait()
            _wait_for_processes(lock, ended_at_once, wording)
            if message := agent.read_message(scratch / _USER_ERROR_FILE):
                raise UserError(message)
            if status != 0 and not ended_at_once:
                raise JobFailedError(_describe_exits(scratch, run_directory, status, wording))
            return status if status >= 0 else 128 - status  # as a shell says it
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if child.poll() is None:
                _kill_tree(child.pid)
                child.wait()


def _wait_for_processes(lock: int, ended_at_once: list[bool], wording: Wording) -> None:
    """Keep the temporary folder while processes use it: they outlive torch's launcher if that was killed.

    Its death has told them to save and stop, see end_with_parent.
    """
    deadline = time.monotonic() + ORDERLY_STOP_SECONDS
    said = False
    while is_held_by_others(lock) and not ended_at_once and time.monotonic() < deadline:
        if not said:
            print_line(f"the launcher of the processes is gone; they stop {wording.stopping}")
            said = True
        time.sleep(0.1)


def _reserve_messages(scratch: Path) -> None:
    """Take the room for what processes may have to tell while it is there. Raises UserError on a full disk."""
    try:
        for name in _MESSAGE_FILES:
            agent.reserve_message(scratch / name)
    except OSError as error:
        raise UserError(
            f"cannot write to the temporary folder {scratch.parent}: {error.strerror}; free some space, or name "
            "another folder in the environment variable TMPDIR"
        ) from error


def _describe_exits(scratch: Path, run_directory: Path, status: int, wording: Wording) -> str:
    """Which rank ended a job, and how: what a survivor found out, and the exit status that only the parent learns."""
    told, listed = (agent.read_message(scratch / name) for name in (_FAILURE_FILE, _EXITS_FILE))
    if not listed:
        return told or f"the launcher of the processes ended with status {status}"
    exits = json.loads(listed)
    first = next((entry for entry in exits if entry["status"] != EXIT_BECAUSE_OF_ANOTHER), exits[0])
    # What the ranks found out counts more than a SIGTERM, which is what a launcher sends to those that are left.
    killed = first["status"] < 0 and first["status"] != -signal.SIGTERM
    if told and not (killed and f"rank {first['rank']} " in told):
        return told
    how = f"was ended by {signal.Signals(-first['status']).name}" if first["status"] < 0 else "ended"
    how += f" (status {first['status']})"
    found = f"rank {first['rank']} {GONE}"
    if found in told:
        return told.replace(found, f"rank {first['rank']} {how}")
    return describe_failure(Failure(first["rank"], how), run_directory, wording)


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
    if os.environ.get("RANK") != "0":
        return SCRATCH_VARIABLE in os.environ
    return _leave(_USER_ERROR_FILE, message)


def report_failure(message: str) -> None:
    """Tell the user why the job failed: through the command that started this process, or on the terminal."""
    if not _leave(_FAILURE_FILE, message):
        _say_error(message)


@contextmanager
def ending_with_a_status() -> Iterator[None]:
    """Turn the errors of a command, or of one of its processes, into one message and an exit status.

    2 for what the user can mend, 1 for a job of which a process failed or was killed.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, SharedUserError) and report_user_error(str(error)):
            return
        if _is_first_to_tell(isinstance(error, SharedUserError)):
            _say_error(str(error))
        raise SystemExit(2) from None
    except JobFailedError as error:
        _say_error(str(error))
        raise SystemExit(1) from None


def _is_first_to_tell(shared: bool) -> bool:
    """Whether this process tells of an error that all ranks have, or all of this machine if it is not `shared`.

    Launchers end all processes as soon as one has gone: not always does the first rank come to tell.
    """
    rank = os.environ.get("RANK" if shared else "LOCAL_RANK")
    if rank is None:
        return True
    store = connect_to_launcher()
    with contextlib.suppress(RuntimeError):  # its owner has gone
        if store is not None:
            return bool(store.add("error-told" if shared else f"error-told/{platform.node()}", 1) == 1)
    return rank == "0"


def _say_error(message: str) -> None:
    with contextlib.suppress(OSError):  # whoever closed the terminal needs no message
        print(f"error: {message}", file=sys.stderr, flush=True)


def _leave(name: str, message: str) -> bool:
    scratch = os.environ.get(SCRATCH_VARIABLE)
    if scratch is None:
        return False
    try:
        agent.write_message(Path(scratch, name), message)
    except OSError:  # the caller has other ways of telling
        return False
    return True
