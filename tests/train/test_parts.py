"""Schedule, parameter groups, metrics, stop requests and the run directory."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
from torch import nn

from megatron_fwpkm.config import UserError, load_train_config
from megatron_fwpkm.train.display import Display, duration, perplexity
from megatron_fwpkm.train.metrics import MetricsWriter, read_metrics
from megatron_fwpkm.train.optimizer import Schedule, build_optimizer, parameter_groups, set_learning_rate
from megatron_fwpkm.train.run_directory import check_same_configuration, write_description
from megatron_fwpkm.train.stop import STOP_FILE_VARIABLE, StopRequest

NANO = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"


def test_schedule_warms_up_then_falls_to_the_final_share() -> None:
    schedule = Schedule(peak=2.0, warmup_steps=4, steps=24, final_fraction=0.1)
    rates = [schedule.learning_rate(step) for step in range(1, 25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert math.isclose(rates[13], 0.5 * (2.0 + 0.2))
    assert math.isclose(rates[-1], 0.2)
    assert Schedule(1.0, 0, 10, 0.0).learning_rate(1) < 1.0


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.query_norm = nn.Module()
        self.query_norm.weight = nn.Parameter(nn.init.zeros_(nn.Linear(2, 1).weight))


def test_biases_and_norms_are_not_decayed() -> None:
    model = _Model()
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["params"] == [model.linear.weight] and decayed["weight_decay"] == 0.1
    assert kept["params"] == [model.linear.bias, model.query_norm.weight] and kept["weight_decay"] == 0.0
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_metrics_drop_what_will_be_made_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resumed_step=0, every=2) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tra')  # cut short by a crash
    with MetricsWriter(tmp_path, resumed_step=3, every=2) as metrics:
        metrics.write(4, {"train/loss": 40.0})
    assert [(record["step"], record["train/loss"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]
    assert len(list((tmp_path / "tensorboard").glob("events*"))) >= 1


def test_stop_by_signal_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(tmp_path / "stop"))
    previous = signal.getsignal(signal.SIGUSR2)
    try:
        request = StopRequest(signals=[signal.SIGUSR2])
        assert not request.is_set()
        (tmp_path / "stop").touch()
        assert request.is_set()
        (tmp_path / "stop").unlink()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.is_set()
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_run_resumes_with_its_own_configuration_only(tmp_path: Path) -> None:
    config = load_train_config(NANO, [f"run_directory={tmp_path}"])
    check_same_configuration(tmp_path, config)
    write_description(tmp_path, config, world_size=2)
    allowed = ["logging.every=3", "checkpoint.keep=5", "training.stop_after_step=4", "evaluation.sequences=64"]
    check_same_configuration(tmp_path, load_train_config(NANO, [f"run_directory={tmp_path}", *allowed]))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate \(.*, 0\.5\)"):
        check_same_configuration(
            tmp_path, load_train_config(NANO, [f"run_directory={tmp_path}", "optimizer.learning_rate=0.5"])
        )
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["processes"] == 2 and environment["libraries"]["torch"]


def test_plain_display_shows_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(active=True, every=4, steps=10, first_step=0) as display:
        for step in range(1, 11):
            display.step(step, 2.5, 1000.0, 61.0, "skipped" if step == 6 else "")
        display.table("title", [("name", "value")])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 4", "step 6", "step 8", "step 10"]
    assert lines[0] == "step 1/10  loss 2.5000  1,000 tokens/s  1:01 left"
    assert lines[2].endswith("skipped")
    assert "title" in shown and "value" in shown
    with Display(active=False, every=1, steps=1, first_step=0) as silent:
        silent.step(1, 2.5, 1000.0, 0.0)
        silent.say("nothing")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3725, "1:02:05"), (-3, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
