"""From documents to token shards: tokenizer, MDS files and manifest, finished or not there at all.

    <data.directory>/<fingerprint>/
        tokenizer.json
        train/        MDS shards, zstd, with hashes; one sample is sequence_length + 1 tokens
        validation/
        manifest.json

The folder is written under another name and renamed last, so what is there under its own name is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fwpkm.data.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest, SplitCounts, read_manifest
from megatron_fwpkm.data.sources import Document, read_documents, source_version
from megatron_fwpkm.data.tokenizer import END_OF_DOCUMENT, tokenizer_hash, train_tokenizer
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import sync_path, sync_tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_fwpkm.data.settings import DataConfig

SHARD_HASHES = ("sha1", "xxh64")
_DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True)
class CorpusRequest:
    """Everything that determines a prepared corpus."""

    source: str
    vocab_size: int
    sequence_length: int
    validation_fraction: float
    seed: int
    max_documents: int | None
    shard_bytes: int

    def content(self) -> dict[str, Any]:
        """The request with what it depends on implicitly (format, version of the source)."""
        return {"format_version": FORMAT_VERSION, "source_version": source_version(self.source), **self.__dict__}

    def fingerprint(self) -> str:
        """Short hash of the content; names the folder."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:12]


def prepare_corpus(
    request: CorpusRequest, parent: Path, report: Callable[[str], None] = lambda line: None
) -> tuple[Path, Manifest]:
    """Return the folder and manifest of the requested corpus, preparing it first unless it is there already.

    `report` is called with one line of text per stage. Several processes may call this at once: one prepares, the
    others wait and reuse. Raises UserError on a damaged folder or an unusable source.
    """
    try:
        return _prepare_or_reuse(request, parent, report)
    except OSError as error:
        where = error.filename or parent
        raise UserError(
            f"cannot prepare data in {parent}: {error.strerror or error} ({where}); give another data.directory"
        ) from error


def _prepare_or_reuse(request: CorpusRequest, parent: Path, report: Callable[[str], None]) -> tuple[Path, Manifest]:
    target = parent / request.fingerprint()
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / ".lock"):
        if target.exists():
            manifest = read_manifest(target)
            report(f"data: reusing {target} ({manifest.splits['train'].tokens:,} training tokens)")
            return target, manifest
        partial = parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a preparation that was killed
        partial.mkdir()
        manifest = _prepare_into(partial, request, report)
        sync_tree(partial)
        os.rename(partial, target)
        sync_path(parent)
        report(f"data: prepared {target}")
    return target, manifest


def corpus_request(settings: DataConfig, seed: int) -> CorpusRequest:
    """The corpus that a data section asks for; `seed` decides the document split."""
    return CorpusRequest(
        source=settings.source,
        vocab_size=settings.vocab_size,
        sequence_length=settings.sequence_length,
        validation_fraction=settings.validation_fraction,
        seed=seed,
        max_documents=settings.max_documents,
        shard_bytes=settings.shard_megabytes << 20,
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare_into(folder: Path, request: CorpusRequest, report: Callable[[str], None]) -> Manifest:
    import tokenizers
    import torch

    from megatron_fwpkm.data.streaming import import_streaming

    documents = read_documents(request.source, request.max_documents)
    characters = sum(len(document.text) for document in documents)
    train, validation = split_documents(documents, request.validation_fraction, request.seed)
    report(f"data: {len(documents):,} documents, {characters / 1e6:.1f} million characters; training the tokenizer")
    tokenizer = train_tokenizer([document.text for document in train], request.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    dtype = smallest_dtype(request.vocab_size)
    report(f"data: tokenizing ({request.vocab_size} tokens, stored as {dtype})")
    splits = {
        name: _write_split(folder / name, part, tokenizer, dtype, request)
        for name, part in (("train", train), ("validation", validation))
    }
    corpus_hash = hashlib.sha256("".join(document.sha256 for document in documents).encode()).hexdigest()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=request.fingerprint(),
        request=request.content(),
        corpus_sha256=corpus_hash,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        vocab_size=request.vocab_size,
        sequence_length=request.sequence_length,
        token_dtype=dtype,
        characters=characters,
        splits=splits,
        versions={
            "tokenizers": tokenizers.__version__,
            "mosaicml-streaming": import_streaming().__version__,
            "torch": str(torch.__version__),
        },
        files={
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST_FILE
        },
    )
    manifest.write(folder)
    return manifest


def split_documents(
    documents: Sequence[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split by the hash of content and seed: a document's side depends on nothing else. Neither side is empty.

    The order of each side is by that hash too, so that neighbours in the token stream are unrelated documents.
    """

    def position(document: Document) -> str:
        return hashlib.sha256(f"{seed}:{document.sha256}".encode()).hexdigest()

    ordered = sorted(documents, key=position)
    boundary = int(validation_fraction * 2**64)
    count = sum(int(position(document)[:16], 16) < boundary for document in ordered)
    count = min(max(count, 1), len(ordered) - 1)
    return ordered[count:], ordered[:count]


def smallest_dtype(vocab_size: int) -> str:
    """Name of the smallest unsigned integer type that holds every token id."""
    for bits in (8, 16, 32):
        if vocab_size <= 1 << bits:
            return f"uint{bits}"
    return "uint64"


def _write_split(
    folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: str, request: CorpusRequest
) -> SplitCounts:
    import numpy

    from megatron_fwpkm.data.streaming import import_streaming

    length = request.sequence_length
    columns = {"tokens": f"ndarray:{dtype}:{length + 1}"}
    tokens = sequences = 0
    rest = numpy.empty(0, dtype=dtype)
    with import_streaming().MDSWriter(
        out=str(folder),
        columns=columns,
        compression="zstd",
        hashes=list(SHARD_HASHES),
        size_limit=request.shard_bytes,
    ) as writer:
        for stream in _token_stream(documents, tokenizer, dtype):
            tokens += len(stream)
            rest = numpy.concatenate([rest, stream])
            start = 0
            # Consecutive samples share one token: the last label of one is the first input of the next.
            while start + length + 1 <= len(rest):
                writer.write({"tokens": rest[start : start + length + 1]})
                sequences += 1
                start += length
            rest = rest[start:].copy()
    if sequences == 0:
        raise UserError(
            f"the {folder.name} split has {tokens:,} tokens, fewer than one sequence; lower data.sequence_length or "
            f"raise data.max_documents or data.validation_fraction"
        )
    return SplitCounts(documents=len(documents), tokens=tokens, sequences=sequences)


def _token_stream(documents: Sequence[Document], tokenizer: Tokenizer, dtype: str) -> Iterator[Any]:
    import numpy

    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    for first in range(0, len(documents), _DOCUMENTS_PER_BATCH):
        texts = [document.text for document in documents[first : first + _DOCUMENTS_PER_BATCH]]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            yield numpy.array([*encoding.ids, end], dtype=dtype)
