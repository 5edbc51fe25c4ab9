"""What a process says that it is doing."""

from __future__ import annotations

import pytest

from megatron_fwpkm.phase import Phase


def test_phase_is_restored_but_stays_where_an_error_was_raised() -> None:
    phase = Phase()
    assert str(phase) == "starting"
    with phase.during("in the forward pass of step 7"):
        with phase.at("memory of block 2"):
            assert str(phase) == "in the forward pass of step 7 (memory of block 2)"
            with phase.during("reading the data of step 8"):
                assert str(phase) == "reading the data of step 8"
            assert phase.place == "memory of block 2"
        assert str(phase) == "in the forward pass of step 7"
    assert str(phase) == "starting"
    with pytest.raises(ValueError, match="broken"), phase.during("in the backward pass of step 7"), phase.at("head"):
        raise ValueError("broken")
    assert str(phase) == "in the backward pass of step 7 (head)"
