"""manifest.json: what a prepared corpus holds, and the proof that its preparation finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fwpkm.data.blocks import INDEX_FILE
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import write_atomically

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 4
VERIFY_AT_START = 1 << 30
"""Bytes of shards whose hashes are compared before a job starts; further ones are checked when they are read."""


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split."""

    documents: int
    tokens: int
    part_documents: list[int]
    """Documents of each part, in the order of the stream."""
    part_tokens: list[int]
    """Tokens of each part, in the order of the stream."""

    def sequences(self, length: int) -> int:
        """Sequences of `length` tokens, each with its labels: sequence i has tokens i*length to (i+1)*length."""
        return max(0, (self.tokens - 1) // length)


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    format_version: int
    fingerprint: str
    request: dict[str, Any]
    """The settings that determine the content; the fingerprint is their hash."""
    seed: int
    """Seed of the split."""
    corpus_sha256: str
    """Hash over the documents of all splits in the order of their streams."""
    index_sha256: dict[str, str]
    """Hash of each split's index, which has the hashes of its shards."""
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: str
    token_dtype: str
    block_tokens: int
    characters: int
    duplicates: int
    """Documents left out because their part had the same text before."""
    splits: dict[str, SplitCounts]
    versions: dict[str, str]
    files: dict[str, int]
    """Every other file, relative to the folder, with its size in bytes."""

    def write(self, directory: Path) -> None:
        """Write manifest.json into the folder."""
        write_atomically(directory / MANIFEST_FILE, json.dumps(asdict(self), sort_keys=True, indent=1) + "\n")

    def split(self, name: str) -> SplitCounts:
        """The counts of a split. Raises UserError if the corpus has none of that name."""
        if name not in self.splits:
            raise UserError(
                f"the corpus has no {name} split, only {', '.join(sorted(self.splits))}; the settings "
                f"data.validation_fraction and data.test_fraction make splits"
            )
        return self.splits[name]


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a prepared corpus; check that its files are there with their sizes, and the indexes' hashes.

    Hashes of the shards are checked when they are read. Raises UserError if anything is missing or unreadable.
    """
    path = directory / MANIFEST_FILE
    again = f"delete {directory} to prepare the corpus again, or replace it by an intact copy"
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {again}")
        content["splits"] = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
        manifest = Manifest(**content)
        sizes, indexes = list(manifest.files.items()), list(manifest.index_sha256.items())
        for name, counts in manifest.splits.items():
            if sum(counts.part_tokens) != counts.tokens:
                raise ValueError(f"the parts of {name} have {sum(counts.part_tokens)} tokens, not {counts.tokens}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; {again}") from error
    for name, size in sizes:
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file} is missing or damaged; {again}")
    for split, sha256 in indexes:
        index = directory / split / INDEX_FILE
        if _digest(index, "sha256") != sha256:
            raise UserError(f"{index} is damaged; {again}")
    return manifest


def check_shards(directory: Path) -> None:
    """Compare the shards of every split with the hashes in its index, up to VERIFY_AT_START bytes of them.

    A shard that is found damaged only when it is read stops one rank and leaves the others waiting. Raises UserError.
    """
    left = VERIFY_AT_START
    for index in sorted(directory.glob(f"*/{INDEX_FILE}")):
        try:
            for shard in json.loads(index.read_text())["shards"]:
                stored = shard.get("zip_data") or shard["raw_data"]
                left -= stored["bytes"]
                if left < 0:
                    return
                path = index.parent / stored["basename"]
                for algorithm, wanted in stored["hashes"].items():
                    if algorithm in hashlib.algorithms_available and _digest(path, algorithm) != wanted:
                        raise UserError(damaged(path, directory))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(damaged(index, directory)) from error


def damaged(path: Path, directory: Path) -> str:
    """What to say about a damaged shard or index."""
    return f"{path} is damaged; delete {directory} to prepare the corpus again, or replace the file by an intact copy"


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
