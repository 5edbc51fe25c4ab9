"""A standard output that can't be written: the job goes on, and its log says why nothing is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from megatron_fwpkm.terminal import print_line
from megatron_fwpkm.train.display import Display, StepLine

print_line("preparing")
with open(sys.argv[1], "w") as log:
    with Display(True, every=1, steps=2, first_step=0, log=lambda text: print(text, file=log)) as display:
        display.say("ready")
        for step in (1, 2):
            display.step(step, StepLine(2.5, 1000.0, 0.0, 0.3))
        display.table("end", [("name", "value")])
"""


def _run(log: Path, stdout: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(log)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("output", "reason"), [("full", "No space left on device"), ("pipe", "Broken pipe")])
def test_output_that_fails_ends_only_the_showing(tmp_path: Path, output: str, reason: str) -> None:
    log = tmp_path / "train.log"
    if output == "full":
        with open("/dev/full", "w") as full:
            _run(log, full.fileno())
    else:
        reader, writer = os.pipe()
        os.close(reader)
        _run(log, writer)
        os.close(writer)
    lines = log.read_text().splitlines()
    told = [line for line in lines if "standard output" in line]
    assert told == [f"standard output can't be written ({reason}): nothing more is shown, the job goes on"]
    assert [line.split()[0] for line in lines if line not in told] == ["ready", "step", "step", "end", "name:"]


def test_no_output_at_all_is_no_failure(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    command = 'exec "$0" -c "$1" "$2" >&-'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(["sh", "-c", command, sys.executable, SCRIPT, str(log)], check=True, env=environment)
    assert "standard output" not in log.read_text() and "ready" in log.read_text()


def test_letters_that_the_terminal_lacks_are_replaced(tmp_path: Path) -> None:
    script = 'from megatron_fwpkm.terminal import new_console, print_line\nprint_line("r\u00e4u")\n'
    script += 'new_console().print("r\u00e4u \u2502")'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.splitlines() == ["r?u", "r?u ?"]
