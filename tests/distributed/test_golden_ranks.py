"""The reference cases of the memory layer, with tokens and slots divided among ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fwpkm.memory.golden import GoldenCaseError, find_cases
from megatron_fwpkm.memory.golden_ranks import replay_over_ranks

pytestmark = pytest.mark.distributed

CASES = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (4, torch.float64)])
def test_cases_replay_over_ranks(ranks: int, dtype: torch.dtype) -> None:
    results = replay_over_ranks(find_cases(CASES), dtype, ranks)
    assert len(results) == 40
    wrong = [(result.name, a.name, a.error) for result in results for a in result.arrays if not a.passed]
    assert wrong == [] and all(result.arrays for result in results)


def test_a_case_that_cannot_be_read_ends_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(GoldenCaseError, match=r"broken\.json: not a usable layer case"):
        replay_over_ranks([path], torch.float64, 2)
