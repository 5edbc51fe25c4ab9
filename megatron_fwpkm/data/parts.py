"""Preparing one part of a source: documents, split, tokens, shards. What the processes of a preparation do."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_fwpkm.data.blocks import BlockWriter, StreamCounts, smallest_dtype
from megatron_fwpkm.data.manifest import TOKENIZER_FILE
from megatron_fwpkm.data.sources import Document, Part, Source
from megatron_fwpkm.data.sources.base import read_documents
from megatron_fwpkm.data.tokenizer import CorpusTokenizer, load_tokenizer
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import sync_path, sync_tree, write_atomically

PROGRESS_FOLDER = ".progress"
"""What is finished, while a preparation is not."""
SPLITS = ("train", "validation", "test")
_CHARACTERS_PER_BATCH = 1 << 20


@dataclass(frozen=True)
class SplitRule:
    """Which split a document belongs to: decided by the hash of its content and the seed, by nothing else."""

    seed: int
    validation_fraction: float
    test_fraction: float

    def key(self, document: Document) -> str:
        """The hash that decides, and that orders documents so that neighbours are unrelated."""
        return hashlib.sha256(f"{self.seed}:{document.sha256}".encode()).hexdigest()

    def split(self, document: Document) -> str:
        """Name of the document's split."""
        place = int(self.key(document)[:16], 16) / 2**64
        if place < self.validation_fraction:
            return "validation"
        return "test" if place < self.validation_fraction + self.test_fraction else "train"


@dataclass(frozen=True)
class PartResult:
    """What a finished part holds; written to disk last, as the proof that it is finished."""

    characters: int
    duplicates: int
    sha256: str
    """Hash over its documents in the order of the streams."""
    splits: dict[str, StreamCounts]

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(counts.tokens for counts in self.splits.values())


@dataclass(frozen=True)
class PartWorker:
    """Prepares parts; it is sent to other processes."""

    folder: Path
    source: Source
    rule: SplitRule
    end_of_document: str
    block_tokens: int
    shard_bytes: int
    window_bytes: int
    """Text that is held and ordered at a time."""
    max_documents: int | None

    def prepare(self, number: int, part: Part) -> PartResult:
        """Write the shards of a part. What an earlier, killed attempt has left of it is removed first."""
        tokenizer = _tokenizer(self.folder / TOKENIZER_FILE, self.end_of_document)
        folders = {split: self.folder / split / f"{number:06}" for split in SPLITS}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        dtype = smallest_dtype(tokenizer.vocab_size)
        writers = {
            split: BlockWriter(folder, dtype, self.block_tokens, self.shard_bytes) for split, folder in folders.items()
        }
        seen: set[bytes] = set()
        characters = duplicates = 0
        contents = {split: hashlib.sha256() for split in SPLITS}
        for window in _windows(self._documents(part), self.window_bytes):
            fresh = []
            for document in window:
                digest = bytes.fromhex(document.sha256)
                duplicates += digest in seen
                if digest not in seen:
                    seen.add(digest)
                    fresh.append(document)
            fresh.sort(key=self.rule.key)
            characters += sum(len(document.text) for document in fresh)
            for split, documents in itertools.groupby(fresh, key=self.rule.split):
                for document, tokens in _tokenize(list(documents), tokenizer, dtype):
                    writers[split].add(tokens)
                    contents[split].update(bytes.fromhex(document.sha256))
        counts = {split: writer.finish() for split, writer in writers.items()}
        for folder in folders.values():
            if folder.exists():
                sync_tree(folder)
                sync_path(folder.parent)
        sync_path(self.folder)
        together = hashlib.sha256(b"".join(contents[split].digest() for split in SPLITS)).hexdigest()
        result = PartResult(characters, duplicates, together, counts)
        write_atomically(_result_path(self.folder, number), json.dumps(asdict(result)))
        return result

    def finished(self, number: int) -> PartResult | None:
        """The result of a part that is finished already."""
        path = _result_path(self.folder, number)
        if not path.exists():
            return None
        content = json.loads(path.read_text())
        splits = {split: StreamCounts(**counts) for split, counts in content.pop("splits").items()}
        return PartResult(**content, splits=splits)

    def training_texts(self, parts: Sequence[Part], limit: int) -> Iterator[str]:
        """Up to `limit` bytes of text from training documents, in equal shares from parts all over the source."""
        count = min(len(parts), max(1, limit >> 20))
        share = limit // count
        for index in range(count):
            used = 0
            for document in self._documents(parts[index * len(parts) // count]):
                if used >= share:
                    break
                if self.rule.split(document) == "train":
                    used += len(document.text)
                    yield document.text

    def _documents(self, part: Part) -> Iterator[Document]:
        return itertools.islice(read_documents(self.source, part), self.max_documents)


def _result_path(folder: Path, number: int) -> Path:
    return folder / PROGRESS_FOLDER / f"{number:06}.json"


def _tokenizer(path: Path, end_of_document: str) -> CorpusTokenizer:
    """The tokenizer of a file; a large one takes seconds to load, so a process keeps the last one."""
    return _loaded_tokenizer(path, hashlib.sha256(path.read_bytes()).hexdigest(), end_of_document)


@functools.lru_cache(maxsize=1)
def _loaded_tokenizer(path: Path, sha256: str, end_of_document: str) -> CorpusTokenizer:
    """`sha256` is that of the file: another content under the same name is another tokenizer."""
    return load_tokenizer(str(path), end_of_document)


def _windows(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Consecutive documents of about `size` characters."""
    window: list[Document] = []
    held = 0
    for document in documents:
        window.append(document)
        held += len(document.text)
        if held >= size:
            yield window
            window, held = [], 0
    if window:
        yield window


def _tokenize(
    documents: Sequence[Document], tokenizer: CorpusTokenizer, dtype: str
) -> Iterator[tuple[Document, numpy.ndarray]]:
    """Each document with its tokens, end token included."""
    end = tokenizer.end_id
    # Else a text with the name of a special token in it would get that token: the end token is at ends alone.
    tokenizer.tokenizer.encode_special_tokens = True
    for batch in _windows(documents, _CHARACTERS_PER_BATCH):
        texts = [document.text for document in batch]
        encodings = tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids if end not in encoding.ids else _without_end(document, tokenizer)
            yield document, numpy.array([*ids, end], dtype=dtype)


def _without_end(document: Document, tokenizer: CorpusTokenizer) -> list[int]:
    """Tokens of a text in which the end token's name stands, for tokenizers that have it among their ordinary tokens.

    The name is tokenized in two halves, which no tokenizer joins again. Raises UserError if the end token comes from
    something else, an unknown character say.
    """
    name = tokenizer.end_of_document
    halves = [name[: len(name) // 2], name[len(name) // 2 :]]
    pieces: list[str] = []
    for index, text in enumerate(document.text.split(name)):
        pieces += [*(halves if index else []), text]
    encodings = tokenizer.tokenizer.encode_batch_fast([p for p in pieces if p], add_special_tokens=False)
    ids = [token for encoding in encodings for token in encoding.ids]
    if tokenizer.end_id in ids:
        raise UserError(
            f"{document.name}: the tokenizer makes its end token {name!r} out of ordinary text; give another "
            "data.end_of_document, a token that stands for nothing else"
        )
    return ids


_this_process: dict[str, Any] = {}
"""The worker that this process was started with."""


def start_process(worker: PartWorker) -> None:
    """Set up a process of a preparation: one core, no signals from the terminal, and an end with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _this_process["worker"] = worker


def prepare_in_process(number: int, part: Part) -> PartResult:
    """PartWorker.prepare() of the worker that this process was started with."""
    worker: PartWorker = _this_process["worker"]
    return worker.prepare(number, part)


def _end_with_parent() -> None:
    """A killed parent can't tell its processes to end; two preparations would then write the same parts."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
