"""`make setup` without the network: a made-up interpreter stands for Python, venv and pip."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Answers the questions that the script asks of an interpreter. Its venv gets a copy of it as .venv/bin/python.
INTERPRETER = """#!/bin/sh
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3.12}" ;;
    *ensurepip*) exit "${FAKE_NO_VENV:-0}" ;;
    *venv*--clear*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> calls ;;
    *pip*install*)
        echo pip >> calls
        echo "$*" >> commands
        [ -z "$FAKE_PIP_SAYS" ] || { echo "$FAKE_PIP_SAYS"; exit 1; } ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that the script reads, in a folder whose name has a space."""
    folder = tmp_path / "a project"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/setup", folder / ".ci/setup")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(INTERPRETER)
    (folder / "python").chmod(0o755)
    return folder


def run_setup(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "EXTRAS", "PIP_ARGS")}
    path = f"{project / 'path'}:{settings['PATH']}"  # where a test puts a python3
    return subprocess.run(
        ["bash", ".ci/setup"], cwd=project, env={**settings, "PATH": path, **variables}, capture_output=True, text=True
    )


def calls(project: Path) -> list[str]:
    return (project / "calls").read_text().split() if (project / "calls").exists() else []


def is_finished(project: Path) -> bool:
    return (project / ".venv/.setup-done").exists()


def test_second_run_does_nothing(project: Path) -> None:
    assert "done" in run_setup(project, PYTHON="./python").stdout
    again = run_setup(project, PYTHON="./python")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert calls(project) == ["venv", "pip"]


def test_venv_keeps_its_interpreter_and_extras(project: Path) -> None:
    """After PYTHON=... and EXTRAS=... once, plain `make test` must not rebuild with the defaults."""
    run_setup(project, PYTHON="./python", EXTRAS="dev,gpu")
    (project / "path").mkdir()
    (project / "path/python3").write_text(INTERPRETER.replace("3.12", "3.13"))
    (project / "path/python3").chmod(0o755)
    assert run_setup(project).returncode == 0
    assert calls(project) == ["venv", "pip", "pip"]
    assert "extras=dev,gpu" in (project / ".venv/.setup-done").read_text()


def test_gpu_packages_are_built_against_the_installed_torch(project: Path) -> None:
    run_setup(project, PYTHON="./python", EXTRAS="gpu,dev", PIP_ARGS="--index-url file:///mirror --no-cache-dir")
    first, second = (project / "commands").read_text().splitlines()
    assert first.endswith(
        "--index-url file:///mirror --no-cache-dir torch torchvision setuptools wheel --editable .[dev]"
    )
    assert second.endswith("--no-build-isolation --editable .[gpu,dev]")


def test_changed_pins_update_and_a_changed_python_rebuilds(project: Path) -> None:
    run_setup(project, PYTHON="./python")
    with (project / "constraints.txt").open("a") as pins:
        pins.write("another==1.0\n")
    run_setup(project, PYTHON="./python")
    assert calls(project) == ["venv", "pip", "pip"]
    run_setup(project, PYTHON="./python", FAKE_VERSION="3.13")
    assert calls(project) == ["venv", "pip", "pip", "venv", "pip"]


def test_copied_folder_is_set_up_anew(project: Path, tmp_path: Path) -> None:
    run_setup(project, PYTHON="./python")
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    run_setup(copy, PYTHON="./python")
    assert calls(copy) == ["venv", "pip", "venv", "pip"]


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("ERROR: Could not find a version that satisfies torch (from versions: none)", "reached no package index"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: Cannot install a and b: they conflict", "pip failed"),
    ],
)
def test_failed_install_is_not_taken_for_finished(project: Path, says: str, expected: str) -> None:
    failed = run_setup(project, PYTHON="./python", FAKE_PIP_SAYS=says)
    assert failed.returncode == 1
    assert says in failed.stdout
    assert expected in failed.stderr and failed.stderr.count("\n") == 1
    assert not is_finished(project)
    assert run_setup(project, PYTHON="./python").returncode == 0
    assert is_finished(project)


def test_failed_update_is_tried_again(project: Path) -> None:
    run_setup(project, PYTHON="./python")
    with (project / "constraints.txt").open("a") as pins:
        pins.write("another==1.0\n")
    for _ in range(2):
        assert run_setup(project, PYTHON="./python", FAKE_PIP_SAYS="ERROR: no").returncode == 1
    assert run_setup(project, PYTHON="./python").returncode == 0
    assert calls(project) == ["venv", "pip", "pip", "pip", "pip"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHON": "./python", "FAKE_VERSION": "3.9"}, "Python 3.9, too old (need 3.11 to 3.13)"),
        ({"PYTHON": "./python", "FAKE_VERSION": "2.7"}, "Python 2.7, too old"),
        ({"PYTHON": "./python", "FAKE_VERSION": "3.14"}, "Python 3.14, too new"),
        ({"PYTHON": "./python", "FAKE_NO_VENV": "1"}, "apt install python3.12-venv"),
        ({"PYTHON": "./nowhere"}, "no interpreter './nowhere'"),
        ({"PYTHON": "false"}, "'false' does not run"),
    ],
)
def test_unusable_interpreter_is_one_clear_line(project: Path, variables: dict[str, str], expected: str) -> None:
    failed = run_setup(project, **variables)
    assert failed.returncode == 1
    assert expected in failed.stderr and failed.stderr.count("\n") == 1
    assert not (project / ".venv").exists()
