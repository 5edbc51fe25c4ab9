"""Memory layers whose tokens and slots are divided among ranks compute what one rank with the whole computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_over_ranks_equals_one_on_one_rank(tiny_job: TinyJob, ranks: int) -> None:
    """Outputs, gradients by name, statistics, evaluation, caches and fast state."""
    errors = tiny_job.worker("layer_checks.py", str(ranks), processes=ranks)
    assert len({name.split(":")[0] for name in errors}) == 9 * 2 * 2
    # Statistics are float32.
    exact = {name: error for name, error in errors.items() if not error < 1e-12}
    assert {name: error for name, error in exact.items() if not error < 1e-6 or name.split(": ")[1][:2] == "d "} == {}
