"""Settings of corpora and loaders."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_fwpkm.section import Section


class DataConfig(Section):
    """Which corpus, how it is tokenized, and how it is read."""

    source: Literal["stdlib"] = "stdlib"
    """Corpus: "stdlib" is the source and documentation of the installed Python's standard library."""
    directory: str = "data/stdlib"
    """Folder that holds prepared corpora; each preparation has its own subfolder, named by its fingerprint."""
    vocab_size: int = Field(default=4096, ge=257, le=1 << 20)
    """Number of tokens of the byte-level BPE, special token included."""
    sequence_length: int = Field(default=1024, ge=2)
    """Tokens that the model reads per sample."""
    validation_fraction: float = Field(default=0.02, gt=0.0, lt=0.5)
    """Share of documents (by hash of their content) held out."""
    max_documents: int | None = Field(default=None, ge=2)
    """Use only the first so many documents (for tests); null means all."""
    shard_megabytes: int = Field(default=8, ge=1, le=1024)
    """Largest size of one shard before compression, in MiB."""
    shuffle_seed: int = Field(default=17, ge=0)
    """Seed of the order of samples."""
    workers: int = Field(default=0, ge=0, le=64)
    """Loader processes per rank; 0 reads in the training process."""
