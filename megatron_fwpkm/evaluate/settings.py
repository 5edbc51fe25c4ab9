"""Settings of measurements."""

from __future__ import annotations

from pydantic import Field

from megatron_fwpkm.section import Section


class EvaluationConfig(Section):
    """Held-out perplexity."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training; 0 means at the end only."""
    sequences: int = Field(default=64, ge=1)
    """Held-out sequences read per evaluation, all processes together."""
