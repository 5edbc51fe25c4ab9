"""Tiny jobs for tests that start processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.fork_server import ANSWER

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 600

TINY = """
name: tiny
run_directory: RUN
seed: 5
model:
  hidden_size: 32
  layers: 2
  attention_heads: 2
  key_value_heads: 1
  head_dim: 16
  mlp_size: 48
  window: 16
  memory_layers: [1]
  memory: {heads: 2, topk: 4, n_subkeys: 16, k_dim: 16, v_dim: 16, chunk_size: 16}
data:
  directory: DATA
  vocab_size: 300
  sequence_length: 64
  validation_fraction: 0.2
  test_fraction: 0.1
  max_documents: 40
optimizer: {learning_rate: 1.0e-2, warmup_steps: 2}
training: {steps: 6, micro_batch_size: 2, gradient_accumulation: 2}
evaluation: {sequences: 8}
checkpoint: {every: 2, keep_last_k: 2}
logging: {every: 1}
parallel: {processes: 2, timeout_seconds: 60}
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Wait until something holds; fails when the process ends before."""
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None:
            assert process.stdout is not None
            raise AssertionError(f"ended before {what}: {process.stdout.read()}")
        assert time.monotonic() < deadline, f"no {what} in 240 s"
        time.sleep(0.01)


WHOLE = ("training.steps=24", "checkpoint.every=4", "checkpoint.keep_last_k=6")


def environment() -> dict[str, str]:
    """Of processes that tests start: the library on their path, and one thread each."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class Forks:
    """The server that starts the ranks of workers."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, script: Path, arguments: list[str], processes: int, output: Path) -> list[int]:
        """Exit codes of the ranks of a script. Whatever goes wrong, or takes too long, ends server and ranks."""
        request: dict[str, Any] = {"script": str(script), "arguments": arguments, "processes": processes}
        request.update(environment=environment(), output=str(output))
        try:
            if self._server is None or self._server.poll() is not None:
                self.start()
            assert self._server is not None and self._server.stdin is not None
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            codes: list[int] = json.loads(self._answer())
        except BaseException:  # a test's timeout, too
            self.end()
            raise
        return codes

    def start(self) -> None:
        """Begin to import libraries; does not wait for that."""
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.fork_server"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _answer(self) -> str:
        """The next one."""
        assert self._server is not None and self._server.stdout is not None
        for line in self._server.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise AssertionError("the server that starts ranks has ended")

    def end(self) -> None:
        """Kill the server and its ranks."""
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


FORKS = Forks()


@pytest.fixture(scope="session", autouse=True)
def forks() -> Iterator[None]:
    """The server lives from before the first test, whose children end with it, to after the last."""
    FORKS.start()
    yield
    FORKS.end()


class TinyJob:
    """A configuration in a folder of its own, and ways to start it."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.config.write_text(TINY.replace("RUN", str(folder / "run")).replace("DATA", str(data)))
        self.started: list[subprocess.Popen[str]] = []

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(self.config), *overrides]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a session of its own, with the library on its path."""
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def torchrun(self, *overrides: str) -> subprocess.Popen[str]:
        """Start launch/train.py under plain torchrun."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return self.start(*launcher, *self.command(*overrides)[1:])

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Wait until the job has recorded a step."""
        wait_for(lambda: len(self.records()) >= step, process, f"step {step}")

    def ranks(self, process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
        """The processes of a started job by rank."""
        found = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                parent = child.parent()
                if "RANK" in child.environ() and parent is not None and "RANK" not in parent.environ():
                    found[int(child.environ()["RANK"])] = child  # not its helpers
        return found

    def train(self, *overrides: str, expected: int = 0) -> str:
        """Run launch/train.py to its end; returns what it printed."""
        process = self.start(*self.command(*overrides))
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == expected, output
        return output

    def worker(self, name: str, *arguments: str, processes: int = 2) -> Any:
        """Run a script of workers/ in several processes; returns the JSON of its last line."""
        text = self._fork(Path(__file__).parent / "workers" / name, [str(self.config), *arguments], processes)
        return json.loads(next(line for line in text.splitlines() if line.startswith("{")))

    def train_ranks(self, *overrides: str, processes: int = 2) -> str:
        """As `train` for tests that are not about starting: the ranks are forked, and need not import libraries."""
        arguments = ["--config", str(self.config), *overrides, f"parallel.processes={processes}"]
        return self._fork(ROOT / "launch" / "train.py", arguments, processes)

    def command_ranks(self, script: Path, *arguments: str, processes: int) -> str:
        """As `train_ranks` for another command."""
        return self._fork(script, [*arguments, f"parallel.processes={processes}"], processes)

    def _fork(self, script: Path, arguments: list[str], processes: int) -> str:
        """Run a script's ranks to their end; returns what they printed."""
        output = self.folder / f"{script.stem}.txt"
        output.unlink(missing_ok=True)
        codes = FORKS.run(script, arguments, processes, output)
        text = output.read_text(errors="replace")
        assert not any(codes), f"exit codes {codes}\n{text}"
        return text

    def records(self, run: str = "run") -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def begin_from(self, whole: TinyJob, *steps: int, folder: Path | None = None) -> Path:
        """Copy another job's run directory with these of its checkpoints; returns the checkpoints folder."""
        run = folder or self.folder / "run"
        shutil.copytree(whole.folder / "run", run)
        checkpoints = run / "checkpoints"
        for path in checkpoints.glob("step_*"):
            if int(path.name.removeprefix("step_")) not in steps:
                shutil.rmtree(path)
        (checkpoints / "latest").write_text(f"step_{max(steps):08d}\n")
        return checkpoints

    def end(self) -> None:
        """Kill whatever still runs."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first job prepares the tiny corpus and the others find it."""
    return tmp_path_factory.mktemp("tiny-data")


@pytest.fixture
def tiny_job(tmp_path: Path, tiny_data: Path) -> Iterator[TinyJob]:
    """A tiny job; its processes are killed when the test ends, however it ends."""
    job = TinyJob(tmp_path, tiny_data)
    yield job
    job.end()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[TinyJob]:
    """A job of 24 steps that was never interrupted: what others are compared with."""
    job = TinyJob(tmp_path_factory.mktemp("whole"), tiny_data)
    output = job.train(*WHOLE)
    assert "training loss" in output and "held-out perplexity" in output
    yield job
    job.end()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
