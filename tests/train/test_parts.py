"""Metrics, stop requests and the run directory."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest

from megatron_fwpkm.config import UserError, load_train_config
from megatron_fwpkm.terminal import duration
from megatron_fwpkm.train.display import Display, StepLine, perplexity
from megatron_fwpkm.train.run_directory import check_same_configuration, write_description
from megatron_fwpkm.train.stop import STOP_FILE_VARIABLE, StopRequest

NANO = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"


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
        os.kill(os.getpid(), signal.SIGUSR2)  # at once: the same request, passed on by another process
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_run_resumes_with_its_own_configuration_only(tmp_path: Path) -> None:
    config = load_train_config(NANO, [f"run_directory={tmp_path}"])
    write_description(tmp_path, config, {"processes": 2, "speed": math.nan})
    allowed = ["logging.every=3", "checkpoint.keep_last_k=5", "training.stop_after_step=4", "evaluation.sequences=64"]
    allowed += ["data.workers=2", "training.zero_stage=3", "training.gradient_accumulation=2", "parallel.processes=4"]
    check_same_configuration(tmp_path, load_train_config(NANO, [f"run_directory={tmp_path}", *allowed]))
    for override in (
        *("optimizer.learning_rate=0.5", "training.precision=bf16", "seed=7"),
        *("training.steps=700", "model.window=8", "model.memory.topk=4", "data.sequence_length=512"),
    ):
        key, value = override.split("=")
        with pytest.raises(UserError, match=rf"{key.replace('.', '[.]')} \(.*, '?{value}'?\)"):
            check_same_configuration(tmp_path, load_train_config(NANO, [f"run_directory={tmp_path}", override]))
    assert json.loads((tmp_path / "environment.json").read_text()) == {"processes": 2, "speed": None}


@pytest.mark.parametrize("content", [None, b"", b"a: [", b"- 1", b"hello", b"\xff\xfe\x00"])
def test_a_run_without_readable_settings_is_not_resumed(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml .* restore it to resume"):
        check_same_configuration(tmp_path, load_train_config(NANO, []))


def test_plain_display_shows_and_logs_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[str] = []
    with Display(active=True, every=4, steps=10, first_step=0, log=logged.append) as display:
        for step in range(1, 11):
            display.step(step, StepLine(2.5, 1000.0, 61.0, 0.314, "skipped" if step == 6 else ""))
        display.table("title", [("name", "value")])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 4", "step 6", "step 8", "step 10"]
    assert lines[0] == "step 1/10  loss 2.5000  1,000 tokens/s  MFU 31.4%  1:01 left"
    assert lines[2].endswith("skipped")
    assert "title" in shown and "value" in shown
    assert logged == [*lines, "title\n  name: value"]
    with Display(active=False, every=1, steps=1, first_step=0, log=logged.append) as silent:
        silent.step(1, StepLine(2.5, 1000.0, 0.0, 0.0))
        silent.say("nothing")
    assert capsys.readouterr().out == "" and len(logged) == 6


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3725, "1:02:05"), (-3, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
