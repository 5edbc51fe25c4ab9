"""Kills of training jobs and damage to what they leave; `python -m tests.distributed.kill_sweep` makes more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import FORKS
from tests.distributed.kill_sweep import Sweep, document

pytestmark = pytest.mark.distributed
KILLS = 20


def test_nothing_is_lost_whenever_a_job_is_killed(tmp_path: Path, tiny_data: Path) -> None:
    sweep = Sweep(tmp_path / "sweep", tiny_data, FORKS)
    sweep.run(KILLS // 2)
    half = sweep.trials
    trials = Sweep(tmp_path / "sweep", tiny_data, FORKS).run(KILLS)  # goes on
    assert trials[: len(half)] == half
    assert sum(trial["killed"] for trial in trials) == KILLS
    assert sum(bool(trial.get("damage")) for trial in trials) >= 2
    assert f"{KILLS} jobs were killed" in document(trials, KILLS)
