"""One rank of a job dies: the others stop soon, one message names it, nothing is left behind."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed
ENDLESS = ("training.steps=100000", "checkpoint.every=100000", "logging.every=100000")
FAULTY = str(Path(__file__).parent / "workers" / "faulty_job.py")


def _assert_clean(processes: list[psutil.Process]) -> None:
    """No process, temporary folder or shared memory of the job is left."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert not list(Path(tempfile.gettempdir()).glob("fwpkm-job-*"))
    for segment in Path("/dev/shm").glob("*_locals"):  # these name the folder whose data they are about
        assert tempfile.gettempdir().encode() not in segment.read_bytes()


def test_killed_rank_of_the_own_launcher_is_named_with_its_signal(tiny_job: TinyJob) -> None:
    process = tiny_job.start(*tiny_job.command(*ENDLESS))
    tiny_job.wait_for_step(3, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    killed = time.monotonic()
    tiny_job.ranks(process)[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    log = tiny_job.folder / "run" / "logs" / "rank_00001.log"
    assert process.returncode == 1
    assert output.count("error: ") == 1 and "rank 1 was ended by SIGKILL (status -9); the others" in output, output
    assert str(log) in output and "Traceback" not in output
    survivor = log.with_name("rank_00000.log").read_text()
    assert "ended because rank 1 is gone" in survivor and "Traceback" in survivor
    _assert_clean(everyone)


def test_killed_first_rank_under_torchrun_is_named_by_a_survivor(tiny_job: TinyJob) -> None:
    process = tiny_job.torchrun(*ENDLESS)
    tiny_job.wait_for_step(3, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    tiny_job.ranks(process)[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count("error: rank 0 is gone without a word") == 1, output
    assert str(tiny_job.folder / "run" / "logs" / "rank_00000.log") in output
    _assert_clean(everyone)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("raise", "rank 1 failed: ValueError: built-in fault"), ("hang", "rank 1 was ended by SIGKILL")],
)
def test_failing_rank_is_named_with_its_reason(tiny_job: TinyJob, fault: str, words: str) -> None:
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), fault, *ENDLESS)
    tiny_job.wait_for_step(2, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    if fault == "hang":  # rank 0 will never come back from its third step to notice that rank 1 is gone
        tiny_job.ranks(process)[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count("error: ") == 1 and words in output and "Traceback" not in output, output
    logs = tiny_job.folder / "run" / "logs"
    assert ("ValueError: built-in fault" in (logs / "rank_00001.log").read_text()) == (fault == "raise")
    assert ("was still waiting" in (logs / "rank_00000.log").read_text()) == (fault == "hang")
    _assert_clean(everyone)
