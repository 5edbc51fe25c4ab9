"""The reference cases, through the same replay as `launch/verify.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fwpkm.memory.golden import GoldenCaseError, find_cases, replay_case

CASES = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("path", find_cases(CASES), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_case(path: Path, dtype: torch.dtype) -> None:
    result = replay_case(path, dtype)
    wrong = [f"{a.name}: {a.error:.2e} > {a.tolerance:.1e}" for a in result.arrays if not a.passed]
    assert result.passed, wrong


def test_a_changed_array_is_noticed(tmp_path: Path) -> None:
    shutil.copy(CASES / "00_base.json", tmp_path)
    with np.load(CASES / "00_base.npz") as arrays:
        changed = dict(arrays)
    changed["d_gates"][0, 5] *= 1 + 1e-6
    np.savez(tmp_path / "00_base.npz", **changed)
    result = replay_case(tmp_path / "00_base.json")
    assert [a.name for a in result.arrays if not a.passed] == ["d_gates"]


def test_unreadable_cases_are_named(tmp_path: Path) -> None:
    with pytest.raises(GoldenCaseError, match="holds no case"):
        find_cases(tmp_path)
    with pytest.raises(GoldenCaseError, match="not a folder"):
        find_cases(tmp_path / "none")
    (tmp_path / "a.json").write_text(json.dumps({"name": "a"}))
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(GoldenCaseError, match=r"a\.json: not a usable layer case"):
        replay_case(tmp_path / "a.json")


def _copy(name: str, folder: Path, change_arrays: dict | None = None, change_json: dict | None = None) -> Path:
    """A case with arrays dropped (None) or replaced, and entries of its description replaced."""
    description = json.loads((CASES / f"{name}.json").read_text())
    with np.load(CASES / f"{name}.npz") as arrays:
        tensors = dict(arrays)
    for key, value in (change_arrays or {}).items():
        tensors.pop(key)
        if value is not None:
            tensors[key] = value
    for key, value in (change_json or {}).items():
        section, _, entry = key.partition(".")
        if entry:
            description[section].pop(entry, None)
            description[section].update({} if value is None else {entry: value})
        else:
            description.pop(section, None)
            description.update({} if value is None else {section: value})
    np.savez(folder / f"{name}.npz", **tensors)
    (folder / f"{name}.json").write_text(json.dumps(description))
    return folder / f"{name}.json"


@pytest.mark.parametrize(
    ("name", "arrays", "description", "message"),
    [
        ("00_base", {"d_q": None}, {}, "not those that the .json names: d_q"),
        ("00_base", {"q": None}, {"arrays": None}, "KeyError"),
        ("00_base", {}, {"name": None}, "KeyError"),
        ("00_base", {}, {"module.mem_rank": 2}, "unknown settings mem_rank"),
        ("00_base", {}, {"module.optimizer_type": "adam"}, "only 'sgd' is known"),
        ("34_past_decode1", {}, {"run.calls": [5, 5]}, ""),
        ("29_two_calls", {}, {"run.ncalls": 3}, "KeyError"),
    ],
)
def test_incomplete_cases_are_refused(tmp_path: Path, name: str, arrays: dict, description: dict, message: str) -> None:
    path = _copy(name, tmp_path, arrays, description)
    if not message:
        assert not replay_case(path).passed
        return
    with pytest.raises(GoldenCaseError, match=message):
        replay_case(path)


@pytest.mark.parametrize(
    ("name", "description", "left_over"),
    [("29_two_calls", {"run.ncalls": 1}, "d_q_call1"), ("00_base", {"run.train": False}, "d_values0")],
)
def test_arrays_that_nothing_was_compared_with_fail(
    tmp_path: Path, name: str, description: dict, left_over: str
) -> None:
    result = replay_case(_copy(name, tmp_path, None, description))
    assert f"{left_over} (never computed)" in [a.name for a in result.arrays if not a.passed]


def _verify(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(CASES.parents[1] / "launch" / "verify.py"), "--cases", str(folder)]
    source = os.pathsep.join(str(CASES.parents[1] / part) for part in (".", "kernels"))
    return subprocess.run(
        [*command, "--dtype", "float64"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )


def test_exit_codes_of_the_command(tmp_path: Path) -> None:
    good, wrong, broken = (tmp_path / name for name in ("good", "wrong", "broken"))
    for folder in (good, wrong, broken):
        folder.mkdir()
        _copy("02_topk1", folder)
    passed = _verify(good)
    assert passed.returncode == 0 and "1 cases, 0 arrays out of tolerance" in passed.stdout
    _copy("02_topk1", wrong, {"output": np.full((2, 24, 8), np.nan)})
    failed = _verify(wrong)
    assert failed.returncode == 1 and "02_topk1 output" in failed.stdout
    with open(broken / "02_topk1.npz", "r+b") as file:
        file.truncate(1000)
    refused = _verify(broken)
    assert refused.returncode == 2 and "not a usable layer case" in refused.stdout
    (broken / "02_topk1.npz").unlink()
    assert _verify(broken).returncode == 2
