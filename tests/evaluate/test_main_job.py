"""What `make train` does: two trainings that differ in the memory alone, then their comparison."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_fwpkm.config import differing_keys, load_train_config

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "configs" / "train"


def test_the_plain_twin_differs_in_the_memory_alone() -> None:
    nano, plain = (load_train_config(PRESETS / name).model_dump() for name in ("nano.yaml", "nano-plain.yaml"))
    assert plain["model"]["memory_layers"] == () and nano["model"]["memory_layers"]
    changed = {text.split(" ")[0] for text in differing_keys(nano, plain)}
    assert changed == {"name", "run_directory", "model.memory_layers"}


def commands(arguments: str) -> list[str]:
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "train", f"ARGS={arguments}"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return [line.split("bin/python ")[1] for line in shown.stdout.splitlines() if "launch/" in line]


def test_overrides_go_to_both_trainings() -> None:
    nano, plain, evaluation = commands("training.steps=80 evaluation.sequences=8")
    assert nano == "launch/train.py --config configs/train/nano.yaml training.steps=80 evaluation.sequences=8"
    assert plain == "launch/train.py --config configs/train/nano-plain.yaml training.steps=80 evaluation.sequences=8"
    assert evaluation == "launch/evaluate.py --run runs/nano --against runs/nano-plain"


def test_the_twin_gets_no_memory() -> None:
    nano, plain, _ = commands("model.memory_layers=[2]")
    assert nano.endswith("model.memory_layers=[2]") and "memory" not in plain
    nano, plain, _ = commands("model.pkm_layers=[1]")
    assert nano.endswith("model.pkm_layers=[1]") and "pkm" not in plain


@pytest.mark.parametrize("arguments", ["--config configs/train/other.yaml", "run_directory=runs/x", "--help"])
def test_another_job_is_trained_alone(arguments: str) -> None:
    (line,) = commands(arguments)
    assert line.startswith("launch/train.py") and line.endswith(arguments)
