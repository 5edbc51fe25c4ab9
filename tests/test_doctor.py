"""doctor: its report on this machine, and what it says where something is missing, broken or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fwpkm import doctor, doctor_machine, doctor_probes
from megatron_fwpkm.doctor_machine import Check
from megatron_fwpkm.doctor_probes import ProbeResult

ROOT = Path(__file__).resolve().parent.parent
# Python runs a sitecustomize.py at start-up; this one makes libraries look as if they were not installed.
BLOCKER = """
import importlib.metadata, os, sys
blocked = set(os.environ.get("BLOCKED_MODULES", "").split(","))
hidden = set(os.environ.get("HIDDEN_DISTRIBUTIONS", "").split(","))
version = importlib.metadata.version

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def visible_version(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, Blocker())
importlib.metadata.version = visible_version
"""


@pytest.fixture
def blocker(tmp_path: Path) -> dict[str, str]:
    """Environment of a process in which BLOCKED_MODULES and HIDDEN_DISTRIBUTIONS are obeyed."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run_doctor(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.slow
def test_json_report_of_this_machine() -> None:
    result = run_doctor("--json")
    report = json.loads(result.stdout)
    checks = {(check["area"], check["name"]): check for check in report["checks"]}
    assert checks["backend", "gloo"]["status"] == "ok"
    assert checks["library", "torch"]["status"] == "ok"
    assert checks["library", "mosaicml-streaming"]["status"] == "ok"
    assert {name for area, name in checks if area == "machine"} >= {"shared memory", "stale segments", "open files"}
    assert report["ok"] and result.returncode == 0


def test_with_torch_alone_it_names_all_that_is_missing(blocker: dict[str, str]) -> None:
    hidden = [library.distribution for library in doctor.LIBRARIES if library.distribution != "torch"]
    modules = (
        "numpy safetensors deepspeed megatron streaming transformers tokenizers pydantic omegaconf yaml typer rich"
    )
    result = run_doctor(
        env={
            **blocker,
            "HIDDEN_DISTRIBUTIONS": ",".join(hidden),
            "BLOCKED_MODULES": ",".join([*modules.split(), "packaging", "tensorboard", "matplotlib", "triton"]),
        }
    )
    assert result.returncode == 1, result.stderr
    assert "needed first" in result.stdout and "deepspeed" in result.stdout.splitlines()[-1]
    for name in ("deepspeed", "megatron-core", "mosaicml-streaming", "typer"):
        assert f"  {name}: make setup, or: pip install -c constraints.txt '{name}" in result.stdout
    assert "gloo: process group and all-reduce work" in result.stdout


def test_missing_and_broken_libraries_are_told_apart(blocker: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**blocker, "BLOCKED_MODULES": "deepspeed"}.items():
        monkeypatch.setenv(name, value)
    result = doctor_probes.run_probe("deepspeed")
    assert result == ProbeResult(False, "ModuleNotFoundError: No module named 'deepspeed'")

    library = doctor.Library("deepspeed", "deepspeed")
    broken = doctor.check_library(library, {"deepspeed": result})
    assert broken.status == "broken" and "No module named 'deepspeed'" in broken.detail and "reinstall" in broken.hint

    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    missing = doctor.check_library(library, {})
    assert missing.status == "missing" and "make setup" in missing.hint
    assert not doctor.Report((missing,)).ok and not doctor.Report((broken,)).ok


def test_transformer_engine_on_a_cpu_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its meta package alone breaks `import megatron.core`, and the error doesn't say so."""
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.16.1")
    failed = {name: ProbeResult(False, "AssertionError: no core") for name in ("megatron", "transformer_engine")}
    for library in (doctor.Library("megatron-core", "megatron"), doctor.Library("transformer-engine", extra="gpu")):
        check = doctor.check_library(library, failed)
        assert check.status == "broken" and "pip uninstall transformer-engine" in check.hint


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time; time.sleep(60)", "no answer within 2 seconds"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("pass", "without an answer"),
        ("raise SystemExit(7)", "exit status 7"),
        ("import os; os.write(2, b'ValueError: reason\\n  hint\\n'); os._exit(1)", "ValueError: reason"),
    ],
)
def test_crashes_and_hangs_of_a_probe_are_findings(source: str, expected: str) -> None:
    result = doctor_probes.run_script(source, {}, timeout=2.0)
    assert not result.ok and expected in result.detail


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 9), "broken"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "broken"), ((4, 0, 0), "broken")],
)
def test_python_range(version: tuple[int, int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_declared_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.8", "torchvision>=0.23", "mosaicml_streaming<0.14,>=0.13", 'a[b,c]<3,>=1; extra == "gpu"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.declared_range("torch") == ">=2.8"
    assert doctor.declared_range("mosaicml-streaming") == "<0.14,>=0.13"
    assert doctor.declared_range("A") == "<3,>=1"
    assert doctor.declared_range("unknown") == ""
    assert doctor.in_range("2.13.0+cpu", ">=2.8,<3") and not doctor.in_range("2.7", ">=2.8")


def test_only_unused_streaming_segments_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("000000_locals", "000001_barrier", "000001_barrier_filelock", "torch_1", "psm_abc"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(doctor_machine, "mapped_files", lambda folder: {str(folder / "000001_barrier")})
    assert doctor_machine.stale_segments(tmp_path) == [tmp_path / "000000_locals"]
    check = doctor_machine.check_stale_segments(tmp_path)
    assert check.status == "warning" and str(tmp_path / "000000_locals") in check.hint
    assert doctor_machine.check_stale_segments(tmp_path / "nowhere").status == "ok"


def test_mapped_files_are_found(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "000000_locals"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert str(path) in doctor_machine.mapped_files(tmp_path)
    assert str(path) not in doctor_machine.mapped_files(tmp_path)


@pytest.mark.parametrize(
    ("limits", "status", "hint"),
    [
        ((1024, 65536), "warning", "ulimit -n 65536"),
        ((1024, 2048), "warning", "administrator"),
        ((9000, 9000), "ok", ""),
    ],
)
def test_file_descriptor_limits(
    limits: tuple[int, int], status: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    check = doctor_machine.check_file_descriptors()
    assert check.status == status and hint in check.hint


def test_output_without_and_with_rich(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.Report(
        (
            Check("library", "torch", "ok", "2.13.0", required=True),
            Check("library", "deepspeed", "missing", "not installed", "make setup", required=True),
            Check("backend", "cuda", "missing", "none"),
        )
    )
    assert doctor.main([], lambda: report) == 1
    for text in (capsys.readouterr().out, doctor.render_plain(report)):
        assert "MISSING" in text and "deepspeed: make setup" in text and "needed first: deepspeed." in text
    assert doctor.main(["--json"], lambda: doctor.Report(report.checks[::2])) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
