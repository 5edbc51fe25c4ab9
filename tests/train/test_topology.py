"""Joining processes, and errors that all ranks hear of; more ranks in tests/distributed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.errors import RankFailedError, SharedUserError, UserError
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train.layout import check_processes

NANO = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"


def test_wrong_number_of_processes_is_refused_before_any_rank_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SharedUserError, match=r"3 processes .* parallel\.tensor=2 .* = 2; start a multiple of 2"):
        topology.initialize(ParallelConfig(tensor=2))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("layout", "processes", "message"),
    [
        (
            {"tensor": 2, "pipeline": 2},
            6,
            r"6 processes .* parallel\.tensor=2 x parallel\.pipeline=2 = 4; start a multiple of 4",
        ),
        ({"tensor": 2, "memory": {"group": "tp_dp_3"}}, 8, r"4 replicas \(8 processes .* groups of 3.* multiple of 6"),
        ({"memory": {"group": "tp_dp_2", "replicas": "synced"}}, 4, r"all 4 replicas .* only 2; set .*tp_dp_4"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_their_numbers(
    layout: dict[str, Any], processes: int, message: str
) -> None:
    with pytest.raises(SharedUserError, match=message):
        topology.check_layout(ParallelConfig.model_validate(layout), processes)
    topology.check_layout(ParallelConfig(tensor=2, pipeline=2), 8)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (
            ["model.memory.n_subkeys=32"],
            66,
            r"n_subkeys \(32\) must be at least .* \(66\); raise it.* \(66 processes\)",
        ),
        (["model.memory.reset=per_document"], 2, r"per_document doesn't go with memories of 2 replicas together"),
        (["parallel.tensor=2"], 3, r"3 processes can't be divided"),
    ],
)
def test_memories_of_all_replicas_are_checked_against_the_processes_that_there_are(
    overrides: list[str], processes: int, message: str
) -> None:
    fixed = ["parallel.memory.replicas=synced", "parallel.processes=1", "data.documents=separate"]
    config = load_train_config(NANO, [*fixed, "model.attention_heads=4", "model.key_value_heads=2", *overrides])
    with pytest.raises(SharedUserError, match=message):
        check_processes(config, processes)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _raise(error: Exception) -> None:
    raise error


def test_errors_say_what_the_user_can_mend(one_rank: None) -> None:
    assert topology.agree_on_errors(lambda: 7, "counting") == 7
    assert topology.on_leader(lambda: 8, "counting") == 8
    with pytest.raises(SharedUserError, match=r"^give another$"):
        topology.agree_on_errors(lambda: _raise(UserError("give another")), "reading")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    with pytest.raises(SharedUserError, match=r"no space left on the disk while writing \(/disk/file\); free some"):
        topology.on_leader(lambda: _raise(full), "writing")
    with pytest.raises(RankFailedError, match="reading failed on rank 0: KeyError: 'a'") as caught:
        topology.agree_on_errors(lambda: _raise(KeyError("a")), "reading")
    assert caught.value.rank == 0 and isinstance(caught.value.__cause__, KeyError)
