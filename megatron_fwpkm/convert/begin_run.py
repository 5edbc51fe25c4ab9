"""A run directory that begins with given weights: `launch/train.py` goes on from them, at any layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fwpkm.checkpoint.store import JobState, save_alone
from megatron_fwpkm.checkpoint.whole_model import whole_model_pieces
from megatron_fwpkm.config import TrainConfig, load_train_config, to_yaml
from megatron_fwpkm.convert.folder import new_folder
from megatron_fwpkm.convert.source import WholeModel
from megatron_fwpkm.data.tokenizer import CorpusTokenizer
from megatron_fwpkm.errors import UserError

ORIGIN_FILE = "origin.json"
"""In a run directory: what its first weights were converted from."""
TOKENIZER_FILE = "tokenizer.json"
_MODEL = "model."


def training_config(
    settings: Path | None,
    model: WholeModel,
    out: Path,
    overrides: Sequence[str],
    tokenizer: CorpusTokenizer | None = None,
) -> TrainConfig:
    """The settings of a run of this model in `out`: those of a file, or the defaults with its length of sequences.

    A tokenizer is set to be that of the run's data. Raises UserError for settings that can't be used.
    """
    wrong = [text for text in overrides if text.startswith((_MODEL, "run_directory="))]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: the model is that of the weights, and the run's folder is {out}")
    # JSON has the types that YAML has, and none of Python's.
    replaced: dict[str, Any] = {
        "model": json.loads(json.dumps(dataclasses.asdict(model.config))),
        "run_directory": str(out),
    }
    if settings is None and model.max_positions > 1:
        replaced["data"] = {"sequence_length": model.max_positions}
    own = []
    if tokenizer is not None:
        own = [
            f"data.tokenizer={json.dumps(str(out / TOKENIZER_FILE))}",
            f"data.end_of_document={json.dumps(tokenizer.end_of_document)}",
            "data.vocab_size=null",
        ]
    return load_train_config(settings, [*own, *overrides], replaced)


def begin_run(
    model: WholeModel, config: TrainConfig, out: Path, origin: str, tokenizer: CorpusTokenizer | None = None
) -> Path:
    """Write config.yaml and a checkpoint of step 0 that has the model's weights and memories; returns the checkpoint.

    Moments of the optimizer there are none: they begin at zero. With a tokenizer the run goes on with no other.
    `origin` is a phrase about where the weights come from. Raises UserError if the folder can't be written.
    """
    state = JobState(
        step=0,
        tokens=0,
        skipped_steps=0,
        first_loss=None,
        recent_losses=[],
        data_cursor={},
        corpus={} if tokenizer is None else {"tokenizer": tokenizer.sha256()},
        layout={},
    )
    with new_folder(out) as folder:
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / ORIGIN_FILE).write_text(json.dumps({"converted_from": origin}) + "\n")
        if tokenizer is not None:
            tokenizer.tokenizer.save(str(folder / TOKENIZER_FILE))
        checkpoint = save_alone(folder / "checkpoints", state, whole_model_pieces(model.decoder))
    return out / checkpoint.relative_to(folder)


def read_origin(run_directory: Path) -> str | None:
    """What the first weights of a run were converted from; None where they were not."""
    try:
        return str(json.loads((run_directory / ORIGIN_FILE).read_text())["converted_from"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
