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
    assert len(errors) == 12 * 2 * 10
    assert {name: error for name, error in errors.items() if not error < 1e-13} == {}
