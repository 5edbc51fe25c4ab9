"""Settings of corpora and loaders."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_fwpkm.data.recall import RecallConfig
from megatron_fwpkm.section import Section


class DataConfig(Section):
    """Which corpus, how it is tokenized, and how it is read (docs/data.md)."""

    source: Literal["stdlib", "folder", "jsonl", "parquet", "huggingface", "recall"] = "stdlib"
    """Where documents come from; "stdlib" is the source and documentation of the installed Python's library. "recall"
    has none: sequences are drawn as they are read (see `recall`), and only sequence_length concerns it."""
    path: str | None = None
    """Folder, file or glob of the source; for "huggingface" the dataset's name or folder."""
    files: str | None = None
    """Glob of the files below a folder; null means **/*.txt, **/*.jsonl* or **/*.parquet, by source."""
    text_field: str = "text"
    """Field or column with the text ("jsonl", "parquet", "huggingface")."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, where it has several."""
    source_split: str = "train"
    """Split of a Hugging Face dataset that is read; validation and test documents are held out of it by hash."""
    max_documents: int | None = Field(default=None, ge=2)
    """Use only the first so many documents (for trials); null means all."""

    tokenizer: str | None = None
    """Hugging Face tokenizer: a tokenizer.json or a folder; null trains a byte-level BPE on the training documents."""
    vocab_size: int | None = Field(default=None, ge=257, le=1 << 20)
    """Tokens of the vocabulary, special ones included; null means 4096 for a trained one, or what the tokenizer has."""
    tokenizer_megabytes: int = Field(default=256, ge=1, le=1 << 14)
    """Text that a tokenizer is trained on at most, taken from all over the source, in MiB."""
    end_of_document: str | None = None
    """Token that ends a document; null means the tokenizer's end-of-sequence token."""

    directory: str = "data/stdlib"
    """Folder that holds prepared corpora; each preparation has its own subfolder, named by its fingerprint."""
    corpus: str | None = None
    """Folder of a finished preparation to use as it is; source and directory are then not looked at."""
    validation_fraction: float = Field(default=0.02, gt=0.0, lt=0.5)
    """Share of documents (by hash of their content) held out for validation."""
    test_fraction: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of documents (by hash of their content) held out for tests; 0 makes no such split."""
    part_megabytes: float = Field(default=16.0, gt=0.0, le=1 << 14)
    """Text that one process prepares at a time, in MiB: what a kill costs, and the memory a process needs (x 4)."""
    shard_megabytes: int = Field(default=8, ge=1, le=1024)
    """Largest size of one shard before compression, in MiB."""
    block_tokens: int = Field(default=4096, ge=16, le=1 << 24)
    """Tokens of one record of a shard; sequences of any length are cut across records."""
    processes: int | None = Field(default=None, ge=1, le=1024)
    """Processes that prepare; null means one a core. The result doesn't depend on it."""

    sequence_length: int = Field(default=1024, ge=2)
    """Tokens that the model reads per sample; one prepared corpus serves any."""
    documents: Literal["joined", "separate"] = "joined"
    """"joined" reads a sequence as one text; "separate" gives documents and positions; no loss across their ends."""
    shuffle_seed: int = Field(default=17, ge=0)
    """Seed of the order of sequences."""
    shuffle_stretch: int = Field(default=1 << 16, ge=1)
    """Neighbouring tokens that stay together in the outer shuffle: what is read of a shard in one go."""
    shuffle_group: int = Field(default=64, ge=1, le=256)
    """Stretches whose sequences are shuffled among one another: shards in use at a time."""
    workers: int = Field(default=0, ge=0, le=64)
    """Loader processes per reading rank; 0 reads in the training process."""
    cache: str | None = None
    """Folder for unpacked shards that later jobs of this machine use too; null means the job's temporary folder."""
    cache_gigabytes: float = Field(default=64.0, ge=0.0)
    """Size that unpacked shards may have, in GiB; beyond, a shard is removed when nobody reads it any more."""

    recall: RecallConfig | None = None
    """Pairs and questions of source "recall"; filler takes what they leave of sequence_length."""

    @model_validator(mode="after")
    def _check_recall(self) -> DataConfig:
        if (self.source == "recall") != (self.recall is not None):
            raise ValueError('source "recall" and the section `recall` belong together: give both or neither')
        if self.recall is not None:
            self.recall.filler_tokens(self.sequence_length)  # raises if they don't fit
        return self

    @model_validator(mode="after")
    def _check_source(self) -> DataConfig:
        if self.corpus is None and self.source not in ("stdlib", "recall") and self.path is None:
            what = "a dataset's name or folder" if self.source == "huggingface" else "a folder, file or glob"
            raise ValueError(f"data.source {self.source} needs data.path: {what}")
        if self.source == "stdlib" and self.path is not None:
            raise ValueError("data.path is given but data.source is stdlib; give data.source too, for example folder")
        return self
