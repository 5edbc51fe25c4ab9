"""One rank of a job dies: the others stop soon, one message names it, nothing is left behind."""

from __future__ import annotations

import re
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
    output, _ = process.communicate(timeout=150)
    assert time.monotonic() - killed < 60
    log = tiny_job.folder / "run" / "logs" / "rank_00001.log"
    assert process.returncode == 1
    assert output.count("error: ") == 1 and "rank 1 was ended by SIGKILL (status -9), while" in output, output
    assert re.search(r"while rank 0 was [^;]* step \d+( \(.*\))?; the others were stopped", output), output
    assert str(log) in output and "Traceback" not in output
    survivor = log.with_name("rank_00000.log").read_text()
    assert "ended because rank 1 is gone" in survivor and "Traceback" in survivor
    _assert_clean(everyone)


def test_killed_first_rank_under_torchrun_is_named_by_a_survivor(tiny_job: TinyJob) -> None:
    process = tiny_job.torchrun(*ENDLESS)
    tiny_job.wait_for_step(3, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    tiny_job.ranks(process)[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert output.count("error: rank 0 is gone without a word") == 1, output
    assert str(tiny_job.folder / "run" / "logs" / "rank_00000.log") in output
    _assert_clean(everyone)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "rank 1 failed exchanging numbers in step 3: ValueError: built-in fault"),
        ("hang", "rank 1 was ended by SIGKILL (status -9), while rank 0 was exchanging numbers in step 3; the others"),
    ],
)
def test_failing_rank_is_named_with_its_reason(tiny_job: TinyJob, fault: str, words: str) -> None:
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), fault, *ENDLESS)
    tiny_job.wait_for_step(2, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    if fault == "hang":  # rank 0 will never come back from its third step to notice that rank 1 is gone
        tiny_job.ranks(process)[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert output.count("error: ") == 1 and words in output and "Traceback" not in output, output
    logs = tiny_job.folder / "run" / "logs"
    assert ("ValueError: built-in fault" in (logs / "rank_00001.log").read_text()) == (fault == "raise")
    if fault == "hang":
        assert "exchanging numbers in step 3" in (logs / "rank_00000.log").read_text()
    _assert_clean(everyone)


TENSOR = ("parallel.tensor=2", "model.key_value_heads=2")
STAGES = ("parallel.pipeline=2",)
MEMORY = "(memory of block 1)"


@pytest.mark.parametrize(
    ("fault", "phase", "layout"),
    [
        ("die", f"in the forward pass of step 3 {MEMORY}", TENSOR),
        ("die", f"in the backward pass of step 3 {MEMORY}", (*TENSOR, "parallel.sequence_parallel=true")),
        ("die", "in the update of step 3", ("training.zero_stage=2",)),
        ("die", "exchanging with another stage in step 3", STAGES),
        ("raise", f"in the forward pass of step 3 {MEMORY}", TENSOR),
        ("raise", f"in the backward pass of step 3 {MEMORY}", (*TENSOR, "parallel.memory.sharding=columns")),
        ("raise", "writing a checkpoint", (*TENSOR, "checkpoint.asynchronous=false")),
        ("raise", "writing a checkpoint", (*TENSOR, "checkpoint.every=20")),
    ],
)
def test_rank_lost_in_an_exchange_ends_all_with_the_phase(
    tiny_job: TinyJob, fault: str, phase: str, layout: tuple[str, ...]
) -> None:
    """Within the timeout, although the other rank is in the same exchange."""
    overrides = (ENDLESS[0], "logging.every=100000", *layout)
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), f"{fault}@{phase}", *overrides)
    tiny_job.wait_for_step(2, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    if fault == "die":
        assert f"rank 1 was ended by SIGKILL (status -9), while rank 0 was {phase}; the others were stopped" in output
    else:
        assert f"rank 1 failed {phase}: ValueError: built-in fault; the others were stopped" in output, output
    if "checkpoint.every=20" in layout:  # not at the next checkpoint only
        assert 20 <= len(tiny_job.records()) < 40
    survivor = (tiny_job.folder / "run" / "logs" / "rank_00000.log").read_text()
    assert "ended because rank 1" in survivor and f"this rank was {phase}" in survivor, survivor
    _assert_clean(everyone)


def test_a_rank_lost_among_four_ends_all(tiny_job: TinyJob) -> None:
    """Its tensor-parallel peer waits in the same exchange, the next stage for a message."""
    layout = (*TENSOR, *STAGES, "parallel.processes=4", "model.memory_layers=[0,1]")
    phase = "in the forward pass of step 3 (memory of block 0)"
    overrides = (ENDLESS[0], "logging.every=100000", *layout)
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), f"die@{phase}", *overrides)
    tiny_job.wait_for_step(2, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    assert "rank 1 was ended by SIGKILL (status -9), while rank " in output, output
    logs = [(tiny_job.folder / "run" / "logs" / f"rank_{rank:05d}.log").read_text() for rank in (0, 2, 3)]
    assert f"this rank was {phase}" in logs[0], logs[0]
    for log in logs:
        assert "ended because rank 1" in log and "this rank was " in log, log
    _assert_clean(everyone)


def test_sub_keys_that_differ_on_one_rank_end_all(tiny_job: TinyJob) -> None:
    """One bit of one rank's copy, found at the next comparison, with block and rank."""
    overrides = (*ENDLESS, *TENSOR, "parallel.check_keys_every=1")
    process = tiny_job.start(sys.executable, FAULTY, str(tiny_job.config), "flip", *overrides)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: rank 1 failed while comparing sub-keys: " in output, output
    assert "the sub-keys of the memory in block 1 differ between rank 1 and rank 0, which must have them" in output
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    logs = tiny_job.folder / "run" / "logs"
    for rank in range(2):
        assert "the sub-keys of the memory in block 1 differ" in (logs / f"rank_{rank:05d}.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("parallel.memory.replicas=synced", "model.memory.n_subkeys=1", "model.memory.topk=1"),
            "model.memory.n_subkeys (1) must be at least the number of ranks that a memory is spread over (2)",
        ),
        (("parallel.tensor=2", "model.mlp_size=49"), "model.mlp_size (49) can't be divided over parallel.tensor (2)"),
    ],
)
def test_layout_that_does_not_fit_is_told_once_under_torchrun(
    tiny_job: TinyJob, overrides: tuple[str, ...], words: str
) -> None:
    """By whichever rank is first: the launcher ends the others when that one has gone."""
    process = tiny_job.torchrun("model.key_value_heads=2", *overrides)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.count("error: ") == 1 and words in output, output
    assert not (tiny_job.folder / "run").exists()
