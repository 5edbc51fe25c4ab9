"""What processes tell the command that started them, also when the disk that holds the messages is full."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fwpkm.errors import JobFailedError, UserError
from megatron_fwpkm.train import agent, launcher
from megatron_fwpkm.train.launcher import start_processes

FILL = """
import contextlib, os, sys
with contextlib.suppress(OSError), open(os.path.join(os.environ["TMPDIR"], "filler"), "wb", buffering=0) as file:
    while True:
        file.write(bytes(512))
"""
TELL = """
from megatron_fwpkm.train.launcher import report_user_error
assert report_user_error("the disk is full")
"""


@pytest.fixture
def tiny_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 1 MiB as the temporary folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_messages_reach_the_user_from_a_full_disk(
    tiny_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.py"
    script.write_text(FILL + TELL)
    with pytest.raises(UserError, match=r"^the disk is full$"):
        start_processes([str(script)], 1, tmp_path)

    script.write_text(f"{FILL}os.kill(os.getpid(), 9)\n")
    with pytest.raises(JobFailedError, match=r"rank 0 was ended by SIGKILL"):
        start_processes([str(script)], 1, tmp_path)
    assert "Traceback" not in capfd.readouterr().err
    assert list(tiny_disk.iterdir()) == []


def test_a_temporary_folder_without_room_is_named(tiny_disk: Path, tmp_path: Path) -> None:
    (tiny_disk / "filler").write_bytes(bytes((1 << 20) - 4096))
    with pytest.raises(UserError, match=rf"temporary folder {tiny_disk}: No space left on device; .*TMPDIR"):
        start_processes([str(tmp_path / "never.py")], 1, tmp_path)


def test_a_message_ends_where_it_ends_and_none_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "user-error"
    assert agent.read_message(file) == ""
    monkeypatch.setenv(launcher.SCRATCH_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    assert not launcher.report_user_error("nobody made room")
    agent.reserve_message(file)
    assert agent.read_message(file) == ""
    agent.write_message(file, "é" * agent.RESERVED_BYTES)
    assert agent.read_message(file) == "é" * ((agent.RESERVED_BYTES - 1) // 2)
    assert launcher.report_user_error("short")
    assert agent.read_message(file) == "short"
    assert file.stat().st_size == agent.RESERVED_BYTES
