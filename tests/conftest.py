"""What all tests share: threads, seeds, hypothesis profiles, and a clean place for tests that start processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import torch

from megatron_fwpkm.doctor_machine import SHARED_MEMORY, mapped_files, stale_segments

# CI must not fail by a new random example on one day and pass on the next; look for new ones with
# HYPOTHESIS_PROFILE=search. Deadlines measure the machine's load, not the code.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Give each test process few threads: small tensors don't gain from many, and xdist workers share the cores."""
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for a CUDA device where there is none, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("requires_gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from one seed, so that its outcome doesn't depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def free_port() -> int:
    """A TCP port of this host that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def process_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of its own (TMPDIR) for the processes of one test; whatever they leave behind is removed.

    Data loaders keep lock files in TMPDIR and segments in shared memory under names that the next test would meet.
    Tests marked `distributed` get it without asking.
    """
    tmp_path_factory.getbasetemp()  # made now: later it would lie in this test's folder
    # Not tmp_path: sockets in it may have paths of at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="fwpkm-"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    this = psutil.Process()
    children = set(this.children(recursive=True))
    shared = _shared_memory_names()
    yield folder
    _kill([child for child in this.children(recursive=True) if child not in children])
    _remove_unused_shared_memory(_shared_memory_names() - shared)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _distributed_sandbox(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("distributed"):
        request.getfixturevalue("process_sandbox")


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _shared_memory_names() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def _remove_unused_shared_memory(names: set[str]) -> None:
    """Remove those of these segments that are a loader's or torch's and that no live process has mapped."""
    unused = {path.name for path in stale_segments()}
    if any(name.startswith("torch_") for name in names):
        used = mapped_files(SHARED_MEMORY)
        unused |= {name for name in names if name.startswith("torch_") and str(SHARED_MEMORY / name) not in used}
    for name in names & unused:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
