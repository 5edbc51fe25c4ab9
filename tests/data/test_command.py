"""data_prep/tokenize.py as people start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / "tokenize.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_prepares_once_and_then_reuses(tmp_path: Path) -> None:
    arguments = [f"directory={tmp_path}", "vocab_size=300", "max_documents=6", "sequence_length=64"]
    first, second = _run(*arguments), _run(*arguments)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "prepared" in first.stdout and "reusing" in second.stdout
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1


def test_mistakes_end_with_one_line_and_status_2() -> None:
    result = _run("vocabsize=300")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "error: override 'vocabsize=300': unknown key `vocabsize`; did you mean `vocab_size`?"
    ]
