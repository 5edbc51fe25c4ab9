"""Metrics, TensorBoard, logs and what happens when they can't be written."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.files import is_no_space, strict_json
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.profiling.peak import device_peak
from megatron_fwpkm.train.environment import describe_environment, git_state
from megatron_fwpkm.train.logs import RankLog
from megatron_fwpkm.train.metrics import MetricsWriter, bin_edges, read_metrics
from megatron_fwpkm.train.recorder import Recorder, StepRecord
from megatron_fwpkm.train.samples import Sampler, continue_greedily, prompts_from
from megatron_fwpkm.train.step import StepResult, StepTimes

NANO = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"


def test_metrics_drop_what_will_be_made_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resumed_step=0, every=2) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "tra')  # cut short by a crash
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    lines[1:1] = [b"\xff\xfe\x00{}", b'{"loss": 3.0}', b"[1]"]  # damage costs no other line
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with MetricsWriter(tmp_path, resumed_step=3, every=2) as metrics:
        metrics.write(4, {"train/loss": 40.0})
    assert [(record["step"], record["train/loss"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def _refuse(text: str) -> float:
    raise AssertionError(f"{text} is no JSON")


def test_metrics_are_strict_json_and_histograms_reach_tensorboard(tmp_path: Path) -> None:
    gates, reads = [0.0, 3.0, 1.0, 0.0], [5.0, 2.0, 1.0]
    with MetricsWriter(tmp_path, resumed_step=0, every=5, configuration="name: x\n") as metrics:
        metrics.write(3, {"train/loss": math.nan}, {"memory/block_1/gate_histogram": gates})
        histograms = {"memory/block_1/gate_histogram": gates, "memory/block_1/reads_histogram": reads}
        metrics.write(5, {"train/loss": math.inf, "train/perplexity": 2.0}, histograms)
    lines = [json.loads(line, parse_constant=_refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 3, "train/loss": None},
        {"step": 5, "train/loss": None, "train/perplexity": 2.0, **histograms},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/perplexity")] == [5]
    histogram = events.Histograms("memory/block_1/gate_histogram")[0].histogram_value
    assert list(histogram.bucket_limit) == [0.25, 0.5, 0.75, 1.0] and list(histogram.bucket) == gates
    assert histogram.num == 4 and math.isclose(histogram.sum, 3 * 0.375 + 0.625)
    assert {"configuration/text_summary", "custom_scalars__config__"} <= set(events.Tags()["tensors"])


def test_bin_edges_follow_the_statistics() -> None:
    assert bin_edges("memory/block_1/gate_histogram", 10)[::5] == [0.0, 0.5, 1.0]
    assert bin_edges("memory/block_1/reads_histogram", 3) == [1.0, 2.0, 4.0, 8.0]
    assert bin_edges("anything", 2) == [0.0, 1.0, 2.0]


def test_strict_json_and_full_disks() -> None:
    assert (
        strict_json({"a": [math.nan, 1.0], "b": (math.inf,), "c": "x"}) == '{"a": [null, 1.0], "b": [null], "c": "x"}'
    )
    full = OSError(28, "No space left on device")
    wrapped = RuntimeError("unexpected pos")
    wrapped.__context__ = full
    assert is_no_space(full) and is_no_space(wrapped)
    assert is_no_space(ValueError("I/O error: No space left on device (os error 28)"))
    assert not is_no_space(OSError(2, "No such file or directory")) and not is_no_space(None)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _record(step: int) -> StepRecord:
    result = StepResult(True, 2.0, 1.0, 100, 100, False, False, {}, {}, StepTimes())
    return StepRecord(step, result, 1e-3, 0.5, 100 * step, 0, 200.0, 9.0, flops_per_token=10, peak_flops=1e6)


def test_recorder_keeps_the_first_failure_of_a_full_disk(full_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (full_disk / "logs").mkdir()
    config = load_train_config(NANO, [f"run_directory={full_disk}", "logging.every=1"])
    with Recorder(config, active=True) as recorder:
        recorder.open(resumed_step=0)
        recorder.step(_record(1))
        assert not recorder.failed
        recorder.check()
        step = 1
        while not recorder.failed:
            step += 1
            assert step < 1000
            recorder.step(_record(step))
        recorder.step(_record(step + 1))  # nothing more is written, nothing is raised
        with pytest.raises(OSError, match="No space left") as caught:
            recorder.check()
        assert is_no_space(caught.value)
    assert "step 1/560  loss 2.0000  200 tokens/s  MFU 0.2%" in capsys.readouterr().out
    assert 1 <= len(read_metrics(full_disk / "metrics.jsonl")) <= step


def test_silent_recorder_writes_nothing(tmp_path: Path) -> None:
    with Recorder(load_train_config(NANO, [f"run_directory={tmp_path}"]), active=False) as recorder:
        recorder.open(0)
        recorder.step(_record(1))
        recorder.say("nothing")
        recorder.check()
    assert not list(tmp_path.iterdir())


def test_rank_log_gets_warnings_thread_errors_and_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    with RankLog(tmp_path, 3, 8) as log:
        warnings.warn("take care", stacklevel=1)
        logging.getLogger("DeepSpeed").warning("engine says")
        thread = threading.Thread(target=lambda: 1 // 0)
        thread.start()
        thread.join()
        try:
            raise KeyError("lost")
        except KeyError as error:
            log.error("this rank failed", error)
    text = (tmp_path / "logs" / "rank_00003.log").read_text()
    for words in (
        "rank 3 of 8",
        "take care",
        "engine says",
        "ZeroDivisionError",
        "this rank failed",
        "KeyError: 'lost'",
    ):
        assert words in text, words
    assert "ZeroDivisionError" not in capsys.readouterr().err


def _model() -> Decoder:
    memory = MemoryConfig(heads=1, topk=4, n_subkeys=8, k_dim=16, v_dim=16, chunk_size=8)
    config = DecoderConfig(
        hidden_size=32,
        layers=2,
        attention_heads=2,
        key_value_heads=2,
        head_dim=16,
        mlp_size=48,
        memory_layers=(1,),
        memory=memory,
    )
    return Decoder(config, 64, TorchBackend(initial_std=0.5), seed=1)


def test_samples_are_greedy_and_change_nothing(tmp_path: Path) -> None:
    model = _model().train()
    ((_, state),) = model.fast_states()
    before = (state.snapshot(), torch.get_rng_state())
    rows = torch.arange(60).view(3, 20) % 50
    prompts_BT = prompts_from([TokenBatch(rows[:2], rows[:2]), TokenBatch(rows[2:], rows[2:])], 3, 12)
    assert prompts_BT is not None and prompts_BT.shape == (3, 12)
    words = {f"w{number} ": number for number in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0 "))
    tokenizer.decoder = decoders.Fuse()
    sampler = Sampler(model, tokenizer, prompts_BT, new_tokens=5)
    path = sampler.write(tmp_path, 7, sampler.continue_prompts())
    after = state.snapshot()
    assert torch.equal(after.table_ND, before[0].table_ND) and torch.equal(after.keys_H2nd, before[0].keys_H2nd)
    assert torch.equal(torch.get_rng_state(), before[1]) and model.training
    assert path.name == "step_00000007.txt" and path.read_text().count(">>>") == 4

    tokens_BT = continue_greedily(model, prompts_BT, 2, vocab_size=50)
    model.eval()
    with torch.no_grad():
        first = model.logits(prompts_BT)[:, -1, :50].argmax(-1)
        second = model.logits(tokens_BT[:, :-1])[:, -1, :50].argmax(-1)
    assert torch.equal(tokens_BT[:, -2:], torch.stack([first, second], 1))
    assert prompts_from([], 4, 12) is None


def test_environment_names_machine_commit_and_peak(tmp_path: Path) -> None:
    peak = device_peak(torch.device("cpu"), torch.float32, 2.5)
    assert peak.flops == 2.5e12 and peak.source == "logging.peak_teraflops"
    found = json.loads(strict_json(describe_environment(4, peak)))
    assert found["processes"] == 4 and found["peak_flops_per_process"] == 2.5e12
    assert found["libraries"]["torch"] == torch.__version__ and found["processor"] and found["command"]
    assert git_state(tmp_path) is None
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "--allow-empty", "-qm", "c"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "new").touch()
    changed = git_state(tmp_path)
    assert changed == {"commit": state["commit"], "dirty": True}


def test_measured_peak_is_plausible_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < peak.flops < 1e14 and peak.source.startswith("measured")


def test_samples_of_a_model_that_forgets_at_documents(tmp_path: Path) -> None:
    config = DecoderConfig(
        hidden_size=16,
        layers=1,
        memory_layers=(0,),
        memory=MemoryConfig(heads=1, topk=2, n_subkeys=8, k_dim=8, v_dim=8, chunk_size=4, reset="per_document"),
    )
    prompts_BT = torch.arange(12).view(2, 6)
    tokens_BT = continue_greedily(Decoder(config, 64, TorchBackend(initial_std=0.5), seed=1), prompts_BT, 3, 50)
    assert tokens_BT.shape == (2, 9) and torch.equal(tokens_BT[:, :6], prompts_BT)
