"""Which checkpoints count as damaged, by their manifest; whole jobs in tests/distributed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed

from megatron_fwpkm.checkpoint.files import JOB_FILE, MANIFEST_FILE, damage, describe_files
from megatron_fwpkm.parallel.topology import Topology

ALONE = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, replica=0, replicas=1)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "weights.pt").write_bytes(b"weights")
    (tmp_path / JOB_FILE).write_text("{}")
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(describe_files(tmp_path, ALONE)))
    return tmp_path


def test_whole_and_changed_files(checkpoint: Path) -> None:
    assert damage(checkpoint, ALONE) == []
    (checkpoint / "slow" / "weights.pt").write_bytes(b"weightz")
    assert damage(checkpoint, ALONE) == ["the content of slow/weights.pt doesn't match its hash"]
    (checkpoint / MANIFEST_FILE).unlink()
    assert damage(checkpoint, ALONE) == [f"{MANIFEST_FILE} is missing"]


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", '[["job.json", {}]]', '{"slow/weights.pt": {}}', "{"])
def test_a_manifest_that_names_no_checkpoint_is_damage(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST_FILE).write_text(content)
    (phrase,) = damage(checkpoint, ALONE)
    assert phrase.startswith(f"{MANIFEST_FILE} is no list") or phrase.startswith(f"{MANIFEST_FILE} cannot be read")
