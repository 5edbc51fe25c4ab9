"""Memory layers whose tokens and slots are divided among ranks compute what one rank with the whole computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def test_layers_over_ranks_equal_one_on_one_rank(tiny_job: TinyJob) -> None:
    """Outputs, gradients by name, statistics, evaluation, caches and fast state, in every layout of four ranks."""
    errors = tiny_job.worker("layer_checks.py", processes=4)
    assert len({name.split(":")[0] for name in errors}) == 9 * 9 - 3
    wrong = {}
    for name, error in errors.items():
        limit = 1e-6 if ": statistics" in name else 1e-12  # statistics are float32
        if not error < limit:
            wrong[name] = error
    assert wrong == {}
