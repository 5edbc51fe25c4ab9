"""Loaders of which only the first rank of each group reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed


def test_only_leaders_read_and_their_peers_get_the_same(tiny_job: TinyJob) -> None:
    found = tiny_job.worker("loader_groups.py", processes=4)
    assert found["readers"] == [0, 2]
    for name in ("joined", "separate"):
        assert found[name] == {"peers_agree": True, "as_one_process": True, "cursors": [12, 12, 12, 12]}, name
    assert found["documents"] > 2
    assert all(found["errors"][rank].startswith("UserError: ") for rank in range(4))
    assert all("is damaged; delete" in message for message in found["errors"])
