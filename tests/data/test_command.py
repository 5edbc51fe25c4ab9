"""data_prep/tokenize.py as people start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fwpkm.config import load_data_config

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / "tokenize.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_prepares_once_and_then_reuses(tmp_path: Path) -> None:
    arguments = ["--processes", "1", f"directory={tmp_path}", "vocab_size=300", "max_documents=40"]
    arguments += ["validation_fraction=0.2", "test_fraction=0.2"]
    first, second = _run(*arguments), _run(*arguments)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "prepared" in first.stdout
    assert "prepared" not in second.stdout and "reading" in second.stdout
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1


def test_mistakes_end_with_one_line_and_status_2(tmp_path: Path) -> None:
    result = _run("vocabsize=300")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "error: override 'vocabsize=300': unknown key `vocabsize`; did you mean `vocab_size`?"
    ]
    result = _run("source=folder", f"path={tmp_path / 'nowhere'}")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        f"error: there is no {tmp_path / 'nowhere'}; give an existing folder, file or glob as data.path"
    ]


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")))
def test_presets_are_valid(preset: str) -> None:
    assert load_data_config(ROOT / "configs" / "data" / f"{preset}.yaml").source == preset
