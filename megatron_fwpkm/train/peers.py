"""What happens when one process of a job dies: the others learn who it was and end, instead of waiting.

Each rank watches the processes of its machine (the kernel tells when one is gone) and asks the launcher's store whether
a rank anywhere has failed. A rank that fails by an error posts its reason there; for one that was killed, whoever
notices does. Then the main thread has some time to end by itself (with gloo, waiting for a dead peer fails at once;
with NCCL it doesn't), after which the process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed

from megatron_fwpkm.errors import RankFailedError, UserError
from megatron_fwpkm.parallel.topology import Topology
from megatron_fwpkm.phase import PHASE
from megatron_fwpkm.train.logs import RankLog, rank_log_path

GRACE_SECONDS = 20.0
"""Time that this process's main thread has to end by itself, once another rank has failed."""
EXIT_FAILED = 1
EXIT_BECAUSE_OF_ANOTHER = 3
"""Exit status of a rank that ended because another one failed."""
GONE = "is gone without a word: killed, crashed or out of memory"
_POLL_SECONDS = 1.0
_CAUSE_SECONDS = 3.0
"""How long a rank with an error looks for another's that caused it: a broken connection is seldom the beginning."""


@dataclass(frozen=True)
class Failure:
    """Why a rank failed."""

    rank: int
    reason: str
    noticed: str = ""
    """Of a rank that left no reason: which rank noticed, and what it was doing, "rank 0 was ..."."""


@dataclass(frozen=True)
class Wording:
    """What messages say about a kind of job."""

    stopping: str = "after this step"
    """When a job stops that is asked to."""
    afterwards: str = "The same command goes on from the newest checkpoint"
    """What to do about a failed one."""


TRAINING = Wording()


def describe_failure(failure: Failure, run_directory: Path, wording: Wording = TRAINING) -> str:
    """The one message about a failed job."""
    noticed = f", while {failure.noticed}" if failure.noticed else ""
    return (
        f"rank {failure.rank} {failure.reason}{noticed}; the others were stopped. See "
        f"{rank_log_path(run_directory, failure.rank)}. {wording.afterwards}"
    )


class PeerWatch:
    """Watches the other ranks, from __enter__ to stop(). All ranks enter together.

    `announce` is called on one rank with the message for the user, `clean` on each before it ends for a failure.
    """

    def __init__(
        self,
        ranks: Topology,
        run_directory: Path,
        announce: Callable[[str], None],
        clean: Callable[[], None],
        *,
        grace_seconds: float = GRACE_SECONDS,
        wording: Wording = TRAINING,
    ) -> None:
        self._ranks = ranks
        self._run_directory = run_directory
        self._announce = announce
        self._clean = clean
        self._grace_seconds = grace_seconds
        self._wording = wording
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._descriptors: dict[int, int] = {}
        self._launcher: int | None = None
        self._dead: list[int] = []
        self._poll = select.poll()
        self._lock = threading.Lock()
        self._store: Any = None
        self._log: RankLog | None = None

    def __enter__(self) -> PeerWatch:
        places: list[Any] = [None] * self._ranks.world_size
        torch.distributed.all_gather_object(places, (_process_space(), os.getpid()))
        for rank, (space, process) in enumerate(places):
            if rank != self._ranks.rank and space is not None and space == _process_space():
                with contextlib.suppress(OSError, AttributeError):  # a kernel without it
                    descriptor = os.pidfd_open(process)
                    self._descriptors[descriptor] = rank
                    self._poll.register(descriptor, select.POLLIN)
        with contextlib.suppress(OSError, AttributeError):
            self._launcher = os.pidfd_open(os.getppid())
            self._poll.register(self._launcher, select.POLLIN)
        self._store = connect_to_launcher()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        for descriptor in (*self._descriptors, self._launcher):
            if descriptor is not None:
                os.close(descriptor)

    def stop(self) -> None:
        """Watch no more: from here the other ranks may leave. Follow it with a barrier before leaving oneself."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def reporting(self, log: RankLog) -> Iterator[None]:
        """Turn an unexpected error inside into an entry of the rank's log, one message in all, and SystemExit."""
        self._log = log
        try:
            yield
        except UserError:
            raise  # every rank raises it alike
        except Exception as error:
            status = self._report(error)
            self._clean()
            self._end_undisturbed(status)
            raise SystemExit(status) from None

    def _report(self, error: Exception) -> int:
        if isinstance(error, RankFailedError):  # all ranks have it, and it says whose it is
            other = Failure(error.rank, error.reason)
        else:
            own = Failure(self._ranks.rank, f"failed {PHASE}: {type(error).__name__}: {error}")
            other = self._find_other(_CAUSE_SECONDS) or self._post(own)
        if other.rank == self._ranks.rank:
            self._note("this rank failed", error)
            self._tell(other)
            return EXIT_FAILED
        self._note(f"ended because rank {other.rank} {other.reason}; this rank was {PHASE}", error)
        self._tell(other)
        return EXIT_BECAUSE_OF_ANOTHER

    def _end_undisturbed(self, status: int) -> None:
        """Let this process clean up after itself: launchers send SIGTERM as soon as another rank has gone."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        timer = threading.Timer(self._grace_seconds, os._exit, (status,))
        timer.daemon = True
        timer.start()

    def _note(self, message: str, error: BaseException | None = None) -> None:
        if self._log is not None:
            self._log.error(message, error)

    def _tell(self, failure: Failure) -> None:
        if self._ask(lambda: self._store.add("told", 1), 1) == 1:
            self._announce(describe_failure(failure, self._run_directory, self._wording))

    def _watch(self) -> None:
        while not self._stopping.is_set():
            other = self._find_other(_POLL_SECONDS)
            if other is not None:
                if self._stopping.wait(self._grace_seconds):
                    return
                self._note(f"ended because rank {other.rank} {other.reason}; this rank was still {PHASE}")
                self._tell(other)
                self._clean()
                sys.stderr.flush()
                os._exit(EXIT_BECAUSE_OF_ANOTHER)

    def _find_other(self, seconds: float) -> Failure | None:
        """Another rank's failure, waiting for news of one for so long."""
        deadline = time.monotonic() + seconds
        self._wait_for_death(0)  # if the launcher is dead, its store can't be asked
        while True:
            posted = self._ask(lambda: self._store.check(["failure"]), False)
            if posted:
                failure = Failure(**json.loads(self._store.get("failure")))
                if failure.rank != self._ranks.rank:
                    return failure
            left = deadline - time.monotonic()
            dead = self._wait_for_death(max(0.0, min(left, _POLL_SECONDS)))
            if dead is not None and not self._ask(lambda: self._store.check(["failure"]), False):
                return self._post(Failure(dead, GONE, f"rank {self._ranks.rank} was {PHASE}"))
            if left <= 0:
                return None

    def _wait_for_death(self, seconds: float) -> int | None:
        with self._lock:
            if self._dead:
                time.sleep(min(seconds, 0.05))
                return self._dead[0]
            for descriptor, _ in self._poll.poll(seconds * 1000):
                self._poll.unregister(descriptor)
                if descriptor == self._launcher:  # and its store with it; this process was told by SIGTERM
                    self._store = None
                else:
                    self._dead.append(self._descriptors[descriptor])
            return self._dead[0] if self._dead else None

    def _post(self, failure: Failure) -> Failure:
        """Make a failure known unless another is known already; returns the one that is."""
        text = json.dumps(asdict(failure))
        return Failure(**json.loads(self._ask(lambda: self._store.compare_set("failure", "", text), text)))

    def _ask(self, question: Callable[[], Any], otherwise: Any) -> Any:
        """An answer of the store, or `otherwise` where it can't be reached: its owner may have died."""
        if self._store is None:
            return otherwise
        try:
            return question()
        except Exception:
            self._store = None
            return otherwise


def _process_space() -> tuple[str, str] | None:
    """What two processes share that can name each other by process number; None where that can't be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}", os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def connect_to_launcher() -> Any:
    """A connection of its own to the launcher's store: the job's may be busy waiting. None where there is none."""
    try:
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
    except (KeyError, ValueError, RuntimeError):
        return None
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return torch.distributed.PrefixStore(f"fwpkm-peers/{start}", store)
