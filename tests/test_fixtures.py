"""The sandbox of tests that start processes: a test may leave a mess, the next one must not meet it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_fwpkm.doctor_machine import SHARED_MEMORY

MESSY_TEST = """
import json, os, pathlib, subprocess, sys, tempfile
import pytest

@pytest.mark.distributed
def test_messy(free_port):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    pathlib.Path(os.environ["SEGMENT"]).write_bytes(b"x")
    lock = pathlib.Path(tempfile.gettempdir(), "000000_barrier_filelock")
    lock.touch()
    found = {"child": child.pid, "lock": str(lock), "tmpdir": os.environ["TMPDIR"], "port": free_port}
    pathlib.Path(os.environ["FOUND"]).write_text(json.dumps(found))
    raise SystemError("a failing test")
"""


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason=f"needs {SHARED_MEMORY}")
def test_a_messy_test_leaves_nothing(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_messy.py").write_text(MESSY_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    distributed\n    requires_gpu\n")
    segment = SHARED_MEMORY / f"{os.getpid() % 1_000_000:06d}_locals"
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "SEGMENT": str(segment), "FOUND": str(tmp_path / "found.json")}
    # Its own xdist worker name would make it look like part of this run.
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_messy.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert "SystemError: a failing test" in result.stdout, result.stdout + result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not psutil.pid_exists(found["child"])
    assert not segment.exists()
    assert not Path(found["tmpdir"]).exists()
    assert Path(found["lock"]).parent == Path(found["tmpdir"])
    assert len(found["tmpdir"]) < 60, "sockets below it may have paths of at most 107 characters"
    assert 1024 <= found["port"] < 65536
