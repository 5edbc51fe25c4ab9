"""The reference cases, through the same replay as `launch/verify.py`."""

import json
import shutil
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
