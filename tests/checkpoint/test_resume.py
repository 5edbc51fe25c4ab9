"""What a resumed job knows of the one before; whole jobs in tests/distributed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed

from megatron_fwpkm.checkpoint.store import CheckpointStore
from megatron_fwpkm.data.recall import TRAINING, RecallConfig, RecallLoader
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.parallel.topology import Topology
from megatron_fwpkm.train.loop import Job, Progress, resume, save

ALONE = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, replica=0, replicas=1)


class OtherLayout(RecallLoader):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise UserError("the cursor is of another layout")


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _job(folder: Path, loader: type[RecallLoader] = RecallLoader) -> Job:
    recall = RecallConfig(pairs=2, questions=2, keys=8, values=4, fillers=4)
    config = DecoderConfig(hidden_size=16, layers=1, memory_layers=())
    model = Decoder(config, 64, TorchBackend(initial_std=0.5), seed=1)
    recorder = SimpleNamespace(check=lambda: None, say=lambda line: None)
    return Job(
        config=cast(Any, None),
        topology=ALONE,
        engine_bundle=cast(Any, None),
        model=model,
        loader=loader(recall, 32, 2, TRAINING, 0, 1),
        held_out=[],
        store=CheckpointStore(folder, ALONE, {}),
        layout={"microbatch": 2, "accumulation": 1},
        corpus={"corpus": "recall"},
        recorder=cast(Any, recorder),
    )


def test_a_run_that_diverges_has_no_new_tries_after_a_resume(tmp_path: Path) -> None:
    job = _job(tmp_path)
    next(job.loader)
    source = save(job, Progress(step=5, tokens=50, skipped_steps=4, skipped_in_a_row=3))
    found = resume(_job(tmp_path), source, lambda line: None)
    assert (found.step, found.skipped_steps, found.skipped_in_a_row) == (5, 4, 3)

    state = json.loads((source / "job.json").read_text())
    del state["skipped_in_a_row"]  # written by an earlier version
    (source / "job.json").write_text(json.dumps(state))
    assert resume(_job(tmp_path), source, lambda line: None).skipped_in_a_row == 0


def test_a_cursor_that_one_rank_cannot_use_is_told_to_all(tmp_path: Path) -> None:
    source = save(_job(tmp_path), Progress(step=5))
    with pytest.raises(SharedUserError, match="the cursor is of another layout"):
        resume(_job(tmp_path, OtherLayout), source, lambda line: None)
