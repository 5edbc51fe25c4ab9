"""The recall measurement of a trained run against its twin without memory: from run directories to table and pictures.

<run>/recall.json          every figure and claim
<run>/recall-readings.png  accuracy over readings and numbers of pairs
<run>/recall-lengths.png   accuracy over the length of sequences
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fwpkm.config import TrainConfig, differing_keys
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.loading import load_decoder, open_run, read_run_config
from megatron_fwpkm.evaluate.recall import Claim, Figure, RecallTask, claims, gate_means, measure_all
from megatron_fwpkm.evaluate.recall_pictures import draw_lengths, draw_readings
from megatron_fwpkm.files import write_atomically
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend

_MAY_DIFFER = (
    "name",
    "run_directory",
    "model.memory",
    "checkpoint.",
    "evaluation.",
    "logging.",
    "parallel.timeout_seconds",
)
"""Keys (or how they begin) that tell twins apart, or that don't touch what is computed. A memory that isn't there may
have any settings."""


@dataclass(frozen=True)
class RecallReport:
    """What a measurement found."""

    task: RecallTask
    figures: list[Figure]
    claims: list[Claim]
    gates: dict[int, dict[str, float]]
    """Block -> kind of token -> mean gate."""
    seconds: float


def measure_recall_run(run: Path, against: Path, answers: int, say: Callable[[str], None]) -> RecallReport:
    """Measure a run and its twin, write recall.json and the pictures into `run`.

    `answers` is the least number of answers behind a figure. Raises UserError if a folder holds no finished recall run,
    or the runs differ in more than the memory.
    """
    started = time.perf_counter()
    config, plain_config = read_run_config(run, ()), read_run_config(against, ())
    _check_twin(run, config, against, plain_config)
    model, step = _load_model(run, config)
    plain, _ = _load_model(against, plain_config)
    assert config.data.recall is not None  # checked with the twin
    task = RecallTask(config.data.recall, config.data.sequence_length)
    figures = measure_all(model, plain, task, answers, say)
    gates = gate_means(model, task)
    report = RecallReport(task, figures, claims(figures, task), gates, time.perf_counter() - started)
    content: dict[str, Any] = {
        "run": str(run),
        "against": str(against),
        "step": step,
        "chance": task.chance,
        "sequence_length": task.sequence_length,
        "data": task.config.model_dump(),
        "claims": [asdict(claim) for claim in report.claims],
        "gates": gates,
        "figures": [asdict(figure) for figure in figures],
        "seconds": report.seconds,
    }
    write_atomically(run / "recall.json", json.dumps(content, indent=1) + "\n")
    draw_readings(figures, task, run / "recall-readings.png")
    draw_lengths(figures, task, run / "recall-lengths.png")
    return report


def _check_twin(run: Path, config: TrainConfig, against: Path, plain: TrainConfig) -> None:
    for folder, found in ((run, config), (against, plain)):
        if found.data.recall is None:
            raise UserError(f"{folder} was trained on data.source={found.data.source}; this measures recall runs only")
    attention = config.model
    reach = attention.layers * (attention.window - 1)
    filler = config.data.recall.filler_tokens(config.data.sequence_length) if config.data.recall else 0
    if set(attention.mixers) != {"sliding_attention"} or filler < reach:
        raise UserError(
            f"{run} could answer without its memory: model.mixers {list(attention.mixers)} reach {reach} tokens back "
            f"or further, and only {filler} tokens of filler lie between pairs and questions; use sliding_attention "
            "alone, a smaller model.window or a larger data.sequence_length"
        )
    if not config.model.memory_layers or plain.model.memory_layers:
        raise UserError(
            f"{run} must have memory layers and {against} none; they have {config.model.memory_layers} and "
            f"{plain.model.memory_layers}"
        )
    left, right = config.model_dump(mode="json"), plain.model_dump(mode="json")
    others = [text for text in differing_keys(left, right) if not text.startswith(_MAY_DIFFER)]
    if others:
        raise UserError(f"{run} and {against} differ in more than the memory: {'; '.join(others)}")


def _load_model(run: Path, config: TrainConfig) -> tuple[Decoder, int]:
    """The model of the newest complete checkpoint, and its step."""
    trained = open_run(run, config, checkpoint=None)
    if trained.step < config.training.steps:
        raise UserError(f"{run} stands at step {trained.step} of {config.training.steps}; train it to the end first")
    model = load_decoder(trained, TorchBackend(config.model.initial_std, config.model.norm_epsilon), replica=0)
    return model.float(), trained.step
