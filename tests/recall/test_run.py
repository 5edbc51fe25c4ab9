"""What launch/recall.py refuses to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fwpkm.config import UserError, load_train_config, to_yaml
from megatron_fwpkm.evaluate.recall_run import measure_recall_run

CONFIG = Path(__file__).parents[2] / "configs" / "train" / "recall.yaml"


def _run(folder: Path, *overrides: str) -> Path:
    """A run directory that has a configuration and no checkpoint yet."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_train_config(CONFIG, overrides)))
    return folder


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.memory_layers=[]"], "no complete checkpoint"),
        (["model.memory_layers=[]", "model.memory.topk=4", "logging.every=7"], "no complete checkpoint"),
        ([], "must have memory layers and .* none"),
        (["model.memory_layers=[]", "parallel.processes=1"], r"more than the memory: parallel\.processes"),
        (["model.memory_layers=[]", "optimizer.learning_rate=0.5"], r"more than the memory: optimizer\.learning_rate"),
        (["model.memory_layers=[]", "data.recall.pairs=32", "data.recall.questions=32"], r"data\.recall\.pairs"),
    ],
)
def test_only_twins_are_compared(tmp_path: Path, overrides: list[str], words: str) -> None:
    run, against = _run(tmp_path / "run"), _run(tmp_path / "plain", *overrides)
    with pytest.raises(UserError, match=words):
        measure_recall_run(run, against, 16, print)


@pytest.mark.parametrize("change", ["model.mixers=[full_attention]", "model.window=256", "data.sequence_length=256"])
def test_runs_that_could_answer_without_their_memory_are_refused(tmp_path: Path, change: str) -> None:
    run = _run(tmp_path / "run", change)
    with pytest.raises(UserError, match="could answer without its memory"):
        measure_recall_run(run, _run(tmp_path / "plain", change, "model.memory_layers=[]"), 16, print)


def test_runs_on_other_data_and_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="holds no run"):
        measure_recall_run(other, other, 16, print)
    config = load_train_config(CONFIG)
    text = to_yaml(
        config.model_copy(update={"data": config.data.model_copy(update={"source": "stdlib", "recall": None})})
    )
    (other / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.source=stdlib"):
        measure_recall_run(other, other, 16, print)
