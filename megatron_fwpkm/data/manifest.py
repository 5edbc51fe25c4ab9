"""manifest.json: what a prepared corpus holds, and the proof that its preparation finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fwpkm.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
VERIFY_AT_START = 1 << 30
"""Bytes of shards whose hashes are compared before a job starts; further ones are checked when they are read."""


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split."""

    documents: int
    tokens: int
    sequences: int


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    format_version: int
    fingerprint: str
    request: dict[str, Any]
    """The settings that determine the content; the fingerprint is their hash."""
    corpus_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    sequence_length: int
    token_dtype: str
    characters: int
    splits: dict[str, SplitCounts]
    versions: dict[str, str]
    files: dict[str, int]
    """Every other file, relative to the folder, with its size in bytes."""

    def write(self, directory: Path) -> None:
        """Write manifest.json into the folder."""
        (directory / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a prepared corpus and check that its files are there with the sizes it names.

    Hashes of the shards are checked when they are read. Raises UserError if anything is missing or unreadable.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_text())
        content["splits"] = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
        manifest = Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; delete {directory} to prepare the corpus again") from error
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.format_version}, this program reads {FORMAT_VERSION}; delete "
            f"{directory} to prepare the corpus again"
        )
    for name, size in manifest.files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file} is missing or damaged; delete {directory} to prepare the corpus again")
    return manifest


def check_shards(directory: Path) -> None:
    """Compare the shards of every split with the hashes in its index, up to VERIFY_AT_START bytes of them.

    A shard that is found damaged only when it is read stops one rank and leaves the others waiting. Raises UserError.
    """
    left = VERIFY_AT_START
    for index in sorted(directory.glob("*/index.json")):
        for shard in json.loads(index.read_text())["shards"]:
            stored = shard.get("zip_data") or shard["raw_data"]
            left -= stored["bytes"]
            if left < 0:
                return
            path = index.parent / stored["basename"]
            for algorithm, wanted in stored["hashes"].items():
                if algorithm in hashlib.algorithms_available and _digest(path, algorithm) != wanted:
                    raise UserError(f"{path} is damaged; delete {directory} to prepare the corpus again")


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
