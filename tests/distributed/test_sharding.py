"""Memories spread over ranks compute what one rank with the whole memory computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from megatron_fwpkm.profiling.traffic_benchmark import TrafficSettings, run_traffic_benchmark

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def test_a_memory_over_ranks_equals_a_whole_one(tiny_job: TinyJob) -> None:
    """Outputs, losses, all gradients, values and sub-keys after two calls in float64, ranks without a token included.

    Slots in messages of any size and padded ones, and columns; over the ranks of one batch, and of two replicas'.
    """
    found = tiny_job.worker("sharding_checks.py", processes=4)
    errors = found["errors"]
    assert len(errors) == 12 * (2 * 5 + 3 + 2)
    assert {name: error for name, error in errors.items() if not error < 1e-13} == {}
    said = found["said"]
    assert "those of 2 replicas" in said["columns of replicas"]
    assert "v_dim is 5: its columns don't divide among 4 ranks" in said["indivisible columns"]
    assert "n_subkeys is 3" in said["few sub-keys"]
    assert "can't be written by 2 replicas' batches together" in said["one for all, each its own"]
    assert "has rows for 1 replicas' memories, the group for 2" in said["apart, but one table"]
    assert "an input of another rank holds NaN or infinity" in said["not finite"]


def test_what_is_sent_is_what_the_formulas_say(tiny_job: TinyJob) -> None:
    """Bytes of every phase exactly, for slots, padded messages, columns and row shipping, which computes the same."""
    found = tiny_job.worker("traffic_checks.py", processes=4)
    assert len(found["traffic"]) == 6 * 4 + 3
    assert {name: both for name, both in found["traffic"].items() if both[0] != both[1]} == {}
    assert {name: error for name, error in found["errors"].items() if not error < 1e-13} == {}


def test_the_benchmark_measures_every_way(tmp_path: Path) -> None:
    """Small, over 1 and 2 processes: all ways are there, and slots keep to their bound."""
    settings = TrafficSettings(ranks=(1, 2), n=16, tokens=32, chunk=16, width=16, topk=2, repeats=1)
    found = run_traffic_benchmark(settings, tmp_path / "traffic.json")
    assert json.loads((tmp_path / "traffic.json").read_text())["rows"] == found["rows"]
    rows = {(row["ranks"], row["kind"]): row for row in found["rows"]}
    assert list(rows) == [(1, "whole"), *((2, kind) for kind in ("dynamic", "static", "columns", "rows"))]
    vectors = settings.tokens * settings.width * 4  # one vector a token: there is one other rank
    assert rows[2, "dynamic"]["sent_bytes"]["read"] <= rows[2, "static"]["sent_bytes"]["read"] == vectors
    assert rows[2, "columns"]["sent_bytes"]["read"] == 0 and not sum(rows[1, "whole"]["sent_bytes"].values())
    assert all(row["total_s"] >= row["lowest_s"] > 0 for row in found["rows"])
    assert all(1 <= row[way] <= row["ranks"] for row in found["imbalance"] for way in ("sum_of_subkeys", "slot"))
