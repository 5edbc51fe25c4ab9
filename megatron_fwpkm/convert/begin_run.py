"""A run directory that begins with given weights: `launch/train.py` goes on from them, at any layout."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fwpkm.checkpoint.store import JobState, save_alone
from megatron_fwpkm.checkpoint.whole_model import whole_model_pieces
from megatron_fwpkm.config import TrainConfig, load_train_config, to_yaml
from megatron_fwpkm.convert.folder import check_new_folder, new_folder
from megatron_fwpkm.convert.source import WholeModel
from megatron_fwpkm.errors import UserError

_MODEL = "model."


def training_config(settings: Path | None, model: WholeModel, out: Path, overrides: Sequence[str]) -> TrainConfig:
    """The settings of a run of this model in `out`: those of a file, or the defaults with its length of sequences.

    Raises UserError for settings that can't be used, or where `out` is there already.
    """
    check_new_folder(out)
    wrong = [text for text in overrides if text.startswith((_MODEL, "run_directory="))]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: the model is that of the weights, and the run's folder is {out}")
    content: dict[str, Any] = {"data": {"sequence_length": model.max_positions}} if model.max_positions else {}
    if settings is not None:
        content = load_train_config(settings).model_dump(mode="json")
    # JSON has the types that YAML has, and none of Python's.
    content |= {"model": json.loads(json.dumps(dataclasses.asdict(model.config))), "run_directory": str(out)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(content))  # YAML reads JSON
        try:
            return load_train_config(path, overrides)
        except UserError as error:
            raise UserError(str(error).replace(str(path), str(settings or "the defaults"))) from error


def begin_run(model: WholeModel, config: TrainConfig, out: Path) -> Path:
    """Write config.yaml and a checkpoint of step 0 that has the model's weights and memories; returns the checkpoint.

    Moments of the optimizer there are none: they begin at zero. Raises UserError if the folder can't be written.
    """
    state = JobState(
        step=0,
        tokens=0,
        skipped_steps=0,
        first_loss=None,
        recent_losses=[],
        data_cursor={},
        corpus={},
        layout={},
    )
    with new_folder(out) as folder:
        (folder / "config.yaml").write_text(to_yaml(config))
        checkpoint = save_alone(folder / "checkpoints", state, whole_model_pieces(model.decoder))
    return out / os.path.relpath(checkpoint, folder)
