"""What the dry run says of a rank's memory, against the live tensors of a step through the real build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from megatron_fwpkm.train.dry_run import make_plan
from megatron_fwpkm.train.memory_plan import RankBytes

from .workers.accounting_checks import CASES, configuration

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

EXACT = {"parameters", "optimizer", "slow tables", "fast state", "activations"}
"""What does not depend on which slots are read. The worker reads slots at random: all are used alike, as planned."""


def predicted(stage: RankBytes) -> dict[str, float]:
    """By the names of the worker, of one microbatch."""
    return {
        "parameters": stage.parameters,
        "gradients": stage.gradients,
        "optimizer": stage.optimizer,
        "slow tables": stage.slow_tables,
        "fast state": stage.fast_state,
        "written rows": stage.written_rows,
        "memory rows": stage.memory_rows / stage.microbatches,
        "activations": stage.activations / stage.microbatches,
    }


@pytest.mark.parametrize("processes", sorted(CASES))
def test_every_category_is_as_measured(tiny_job: TinyJob, processes: int) -> None:
    cases = CASES[processes]
    found: dict[str, list[dict[str, Any]]] = tiny_job.worker("accounting_checks.py", *cases, processes=processes)
    assert set(found) == set(cases)
    errors = {}
    for name, ranks in found.items():
        config = configuration(processes, name)
        stages = make_plan(config).memory.stages
        for rank, measured in enumerate(ranks):
            stage = stages[rank // config.parallel.tensor % config.parallel.pipeline]
            wanted = predicted(stage)
            large = 0.02 * sum(wanted.values())
            for category, size in wanted.items():
                limit = 0.01 if category in EXACT else 0.1
                if max(size, measured[category]) > large and abs(size - measured[category]) > limit * size:
                    errors[name, rank, category] = (size, measured[category])
            # Replicas have even shares but where they take turns with whole tensors (ZeRO-0), or where a shared
            # embedding, which the first stage saves, is in the flat partition of one of the last.
            limit = {1: 0.03, 2: 0.1}[config.parallel.pipeline]
            if config.training.zero_stage == 0 and config.parallel.tensor * config.parallel.pipeline < processes:
                limit = 0.5
            if abs(stage.saving_copy - measured["saving copy"]) > limit * stage.saving_copy:
                errors[name, rank, "saving copy"] = (stage.saving_copy, measured["saving copy"])
            if config.parallel.pipeline == 1 and measured["buffers"]:  # without the weights that ZeRO-3 gathers
                assert 0 <= stage.buffers - measured["buffers"] <= stage.parameters
            # Nothing else of any size lives when the weights are updated: batches, tables of angles, constants; and of
            # a last pipeline stage outputs, which are among its buffers.
            allowed = stage.buffers if config.parallel.pipeline > 1 else 0
            assert measured["others"] < 0.02 * sum(wanted.values()) + 1.2 * allowed, (name, measured["largest"])
    assert not errors
