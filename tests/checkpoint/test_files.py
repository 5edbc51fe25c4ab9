"""Which checkpoints count as damaged, by their manifest; whole jobs in tests/distributed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from megatron_fwpkm.checkpoint.files import JOB_FILE, MANIFEST_FILE, damage, describe_files, shares
from megatron_fwpkm.checkpoint.pieces import Pieces
from megatron_fwpkm.checkpoint.tensors import save_tensors
from megatron_fwpkm.errors import RankFailedError
from megatron_fwpkm.parallel.topology import Topology

ALONE = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, replica=0, replicas=1)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "tensors", {"numbers": Pieces.whole(torch.arange(5.0))})
    (tmp_path / JOB_FILE).write_text("{}")
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(describe_files(tmp_path, ALONE)))
    return tmp_path


def test_whole_and_changed_files(checkpoint: Path) -> None:
    assert damage(checkpoint, ALONE) == []
    (checkpoint / "tensors" / "__0_0.distcp").write_bytes(b"numbers")
    (checkpoint / JOB_FILE).write_text("[]")
    first, second = damage(checkpoint, ALONE)
    assert first == "the content of job.json doesn't match its hash"
    assert second.startswith("tensors/__0_0.distcp has 7 bytes instead of ")
    (checkpoint / MANIFEST_FILE).unlink()
    assert damage(checkpoint, ALONE) == [f"{MANIFEST_FILE} is missing"]


def test_each_file_is_described_by_the_rank_that_wrote_it(checkpoint: Path) -> None:
    second = dataclasses.replace(ALONE, rank=1)  # alone in its process group, which has one rank
    (checkpoint / "tensors" / "__1_0.distcp").write_bytes(b"numbers")
    (checkpoint / MANIFEST_FILE).unlink()
    assert describe_files(checkpoint, ALONE).keys() == {"job.json", "tensors/.metadata", "tensors/__0_0.distcp"}
    (checkpoint / "tensors" / "__0_0.distcp").unlink()
    with pytest.raises(RankFailedError, match=r"tensors/__0_0\.distcp was written and is not there"):
        describe_files(checkpoint, second)


def test_files_are_shared_by_their_bytes() -> None:
    sizes = {"a": 5, "b": 3, "c": 3, "d": 1, "e": 0}
    assert shares(sizes, 2) == [["a", "d", "e"], ["b", "c"]]
    assert shares(sizes, 1) == [["a", "b", "c", "d", "e"]]
    assert sorted(name for part in shares(sizes, 9) for name in part) == sorted(sizes)


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", '[["job.json", {}]]', '{"slow/weights.pt": {}}', "{"])
def test_a_manifest_that_names_no_checkpoint_is_damage(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST_FILE).write_text(content)
    (phrase,) = damage(checkpoint, ALONE)
    assert phrase.startswith(f"{MANIFEST_FILE} is no list") or phrase.startswith(f"{MANIFEST_FILE} cannot be read")
