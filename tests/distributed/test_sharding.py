"""Memories spread over ranks compute what one rank with the whole memory computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def test_a_memory_over_ranks_equals_a_whole_one(tiny_job: TinyJob) -> None:
    """Outputs, losses, all gradients, values and sub-keys after two calls in float64, ranks without a token included.

    Slots in messages of any size and padded ones, and columns; over the ranks of one batch, and of two replicas'.
    """
    errors = tiny_job.worker("sharding_checks.py", processes=4)
    assert len(errors) == 12 * (2 * 5 + 3 + 2)
    assert {name: error for name, error in errors.items() if not error < 1e-13} == {}


def test_what_is_sent_is_what_the_formulas_say(tiny_job: TinyJob) -> None:
    """Bytes of every phase exactly, for slots, padded messages, columns and row shipping, which computes the same."""
    found = tiny_job.worker("traffic_checks.py", processes=4)
    assert len(found["traffic"]) == 3 * 4
    assert {name: both for name, both in found["traffic"].items() if both[0] != both[1]} == {}
    assert {name: error for name, error in found["errors"].items() if not error < 1e-13} == {}
