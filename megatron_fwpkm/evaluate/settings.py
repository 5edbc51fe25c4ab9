"""Settings of measurements."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_fwpkm.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class NeedleConfig(Section):
    """Needles in haystacks that are read several times before the question (docs/evaluation.md)."""

    samples: int = Field(default=16, ge=0)
    """Haystacks for each length; every number of readings gets the same ones. 0 leaves the measurement out."""
    lengths: tuple[Annotated[int, Field(ge=64)], ...] = ()
    """Tokens of a prompt, haystack and question together; empty means 1, 2 and 4 times data.sequence_length."""
    iterations: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    """How often the haystack is read before it is read once more with the question."""
    needles: int = Field(default=5, ge=1, le=1000)
    """Needles in a haystack, one of which is asked for."""
    depths: tuple[Share, ...] = ()
    """Places of the needles as shares of the haystack, one for each needle; empty means at random."""
    protocol: Literal["aligned", "official"] = "aligned"
    """How the memory is written: as trained, one memory a sample; or as the paper's code, one memory for all."""
    batch: int = Field(default=8, ge=1)
    """Samples read together."""
    seed: int = Field(default=0, ge=0)
    """Seed of needles, haystacks and depths."""


class EvaluationConfig(Section):
    """Held-out perplexity, needles and pictures."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training; 0 means at the end only."""
    sequences: int = Field(default=64, ge=1)
    """Held-out sequences read per evaluation, all processes together."""
    split: Literal["validation", "test"] = "validation"
    """Split that launch/evaluate.py reads."""
    streams: int = Field(default=4, ge=1)
    """Parts of the held-out sequences; in each the memory starts as trained and is carried from one to the next."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind the 95 % intervals of perplexities."""
    replica: int = Field(default=0, ge=0)
    """Replica whose memory is measured; each has its own."""
    rope_scaling: Literal["auto", "none"] | Annotated[float, Field(ge=1.0)] = "auto"
    """YaRN beyond the training length: "auto" by length / training length for full attention; or a factor."""
    gate_tokens: int = Field(default=320, ge=16, le=4096)
    """Held-out tokens in the picture of the gates."""
    needles: NeedleConfig = NeedleConfig()
