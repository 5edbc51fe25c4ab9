"""Small corpora of real text."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fwpkm.data.corpus import prepare_corpus
from megatron_fwpkm.data.manifest import Manifest
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.sources import open_source

Corpus = tuple[Path, Manifest]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """120 texts of 100 to 5000 characters."""
    source = open_source(DataConfig())
    documents = itertools.chain.from_iterable(source.read(piece) for part in source.parts(1 << 20) for piece in part)
    return [document.text[: 100 + 41 * index] for index, document in enumerate(itertools.islice(documents, 120))]


@pytest.fixture(scope="session")
def jsonl(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as lines of one file."""
    path = tmp_path_factory.mktemp("jsonl") / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def settings(jsonl: Path) -> Callable[..., DataConfig]:
    """Makes data sections over the texts: several parts, several blocks a part, several shards."""

    def make(directory: Path, **changes: Any) -> DataConfig:
        values: dict[str, Any] = {
            "source": "jsonl",
            "path": str(jsonl),
            "directory": str(directory),
            "vocab_size": 300,
            "validation_fraction": 0.2,
            "test_fraction": 0.1,
            "part_megabytes": 0.06,
            "block_tokens": 100,
            "sequence_length": 64,
            "processes": 1,
        }
        return DataConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def corpus(settings: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The texts, prepared."""
    return prepare_corpus(settings(tmp_path_factory.mktemp("corpus")), seed=3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
