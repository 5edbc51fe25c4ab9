"""Preparing a corpus in several processes that are killed, stopped and started again."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.sources import open_source

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
PARTS = 12


class Preparation:
    """data_prep/tokenize.py on a source of PARTS parts."""

    def __init__(self, folder: Path, texts: Path) -> None:
        self.folder = folder
        self.texts = texts
        self.started: list[subprocess.Popen[str]] = []
        self._part_megabytes = texts.stat().st_size / (PARTS - 0.5) / (1 << 20)

    def start(self, directory: str, processes: int) -> subprocess.Popen[str]:
        """Start the command in a session of its own."""
        command = [sys.executable, str(ROOT / "data_prep" / "tokenize.py"), "--processes", str(processes)]
        command += ["--config", str(ROOT / "configs" / "data" / "jsonl.yaml"), f"path={self.texts}"]
        command += [f"part_megabytes={self._part_megabytes}", "vocab_size=400", "files=null", "tokenizer_megabytes=1"]
        command += ["validation_fraction=0.2", "test_fraction=0.2", f"directory={self.folder / directory}"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
        )
        self.started.append(process)
        return process

    def run(self, directory: str, processes: int) -> str:
        """Run it to its end; returns what it printed."""
        process = self.start(directory, processes)
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
        return output

    def finished(self, directory: str) -> set[int]:
        """Numbers of the parts that a killed preparation has finished."""
        return {int(path.stem) for path in self.folder.glob(f"{directory}/.*.partial/.progress/[0-9]*.json")}

    def wait_for(self, directory: str, process: subprocess.Popen[str], count: int) -> None:
        """Return when so many parts are finished."""
        deadline = time.monotonic() + 120
        while len(self.finished(directory)) < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)

    def shards(self, directory: str, parts: set[int]) -> dict[str, tuple[int, int]]:
        """Inode and time of change of the shards of some parts."""
        return {
            path.relative_to(path.parents[2]).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in self.folder.glob(f"{directory}/*/*/*/*.zstd")
            if int(path.parent.name) in parts
        }

    def hashes(self, directory: str) -> dict[str, str]:
        """SHA-256 of all files of the finished corpus."""
        (corpus,) = [path.parent for path in self.folder.glob(f"{directory}/*/manifest.json")]
        return {
            path.relative_to(corpus).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in corpus.rglob("*")
            if path.is_file()
        }


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of so many parts."""
    source = open_source(DataConfig())
    documents = itertools.chain.from_iterable(source.read(piece) for part in source.parts(1 << 20) for piece in part)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with path.open("w") as file:
        while file.tell() < PARTS * 150_000:
            file.write(json.dumps({"text": next(documents).text}) + "\n")
    return path


@pytest.fixture
def preparation(tmp_path: Path, texts: Path) -> Iterator[Preparation]:
    found = Preparation(tmp_path, texts)
    yield found
    for process in found.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _kill_command(process: subprocess.Popen[str]) -> None:
    """Kill the command alone; its processes must end by themselves."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def _kill_a_worker(process: subprocess.Popen[str]) -> None:
    """Kill one of its processes, as the kernel does when memory is short; the command must say so."""
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 2 and "error: a process of the preparation was killed" in output, output
    assert "Traceback" not in output


def test_killed_preparations_go_on_and_end_with_the_same_bytes(preparation: Preparation) -> None:
    preparation.run("whole", processes=1)
    kills: list[Callable[[subprocess.Popen[str]], None]] = [_kill_command, _kill_a_worker]
    for number, kill in enumerate(kills):
        process = preparation.start("killed", processes=2)
        preparation.wait_for("killed", process, 3 * number + 1)
        kill(process)
    finished = preparation.finished("killed")
    assert 4 <= len(finished) < PARTS
    assert not list((preparation.folder / "killed").glob("*/manifest.json"))
    before = preparation.shards("killed", finished)
    output = preparation.run("killed", processes=1)
    assert f"{len(finished)} of {PARTS} parts were finished before" in output
    assert before and before.items() <= preparation.shards("killed", set(range(PARTS))).items()  # not written again
    assert preparation.hashes("killed") == preparation.hashes("whole")
    assert len(preparation.shards("whole", set(range(PARTS)))) > PARTS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(preparation: Preparation, number: signal.Signals) -> None:
    process = preparation.start("stopped", processes=2)
    preparation.wait_for("stopped", process, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)  # as a terminal does: all processes get it
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 128 + number, output
    assert "parts are finished; start again to go on" in output and "Traceback" not in output, output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_ranks_wait_longer_for_a_preparation_than_for_each_other(tiny_job: TinyJob) -> None:
    first, second = tiny_job.worker("slow_preparation.py")["ranks"]
    assert first == second and first["waited"]
    assert first["folder"] == first["fingerprint"] and first["message"] == "built-in mistake"
