"""Memory layers whose tokens and slots are divided among ranks compute what one rank with the whole computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def test_layers_over_ranks_equal_one_on_one_rank(tiny_job: TinyJob) -> None:
    """Outputs, gradients by name, statistics, evaluation, caches and fast state, in every layout of four ranks."""
    found = tiny_job.worker("layer_checks.py", processes=4)
    errors = found["errors"]
    assert len({name.split(":")[0] for name in errors}) == 70
    wrong = {}
    for name, error in errors.items():
        limit = 1e-6 if ": statistics" in name else 1e-12  # statistics are float32
        if not error < limit:
            wrong[name] = error
    assert wrong == {}
    assert len(found["said"]) == 11
    for layout, said in found["said"].items():
        assert "the loss mask has shape (36, 2); expected (2, 36), that of all tokens on every rank" in said[0], layout
        assert "the loss mask has shape (2, 18); expected (2, 36)" in said[1], layout
        assert "mask has dtype torch.float32; expected torch.bool" in said[2], layout
        cached = "sequence_parallel=True" in layout and "replicas=1" in layout
        assert len(said) == 3 + cached and (not cached or "a cache is for ranks that all have all tokens" in said[3])
