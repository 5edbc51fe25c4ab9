"""Settings of processes and their layout."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_fwpkm.section import Section


class ParallelConfig(Section):
    """Processes and how they are laid out."""

    processes: int = Field(default=2, ge=1, le=64)
    """Processes that the command starts on this machine when no launcher has started it."""
    tensor: Literal[1] = 1
    """Tensor-parallel size; only 1 is supported so far."""
    timeout_seconds: int = Field(default=300, ge=10, le=30 * 24 * 3600)
    """Longest wait for another process before the job fails."""
