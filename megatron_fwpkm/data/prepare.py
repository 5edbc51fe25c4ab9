"""From documents to token shards: tokenizer, MDS files and manifest, finished or not there under its name.

    <data.directory>/<fingerprint>/
        tokenizer.json
        train/                  MDS shards, zstd, with hashes (blocks.py says what they hold)
            index.json          all shards in the order of the stream
            000000/ 000001/ ... the shards of each part
        validation/ test/
        manifest.json           written last

The folder is made as .<fingerprint>.partial and renamed last. Until then .progress/ in it has the plan and a file for
each finished part: a killed preparation goes on with the parts that are missing. Parts depend on the source and the
settings alone, and no part on another: the bytes are the same whatever the processes, and however often it was killed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_fwpkm.data.blocks import INDEX_FILE, smallest_dtype
from megatron_fwpkm.data.manifest import FORMAT_VERSION, MANIFEST_FILE, TOKENIZER_FILE, Manifest, SplitCounts
from megatron_fwpkm.data.parts import (
    PROGRESS_FOLDER,
    SPLITS,
    PartResult,
    PartWorker,
    SplitRule,
    prepare_in_process,
    start_process,
)
from megatron_fwpkm.data.progress import PartsProgress
from megatron_fwpkm.data.sources import Part, Source, open_source
from megatron_fwpkm.data.sources.base import naming_source
from megatron_fwpkm.data.tokenizer import (
    DEFAULT_VOCABULARY,
    END_OF_DOCUMENT,
    CorpusTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.files import sync_path, sync_tree, write_atomically

if TYPE_CHECKING:
    from megatron_fwpkm.data.settings import DataConfig

Report = Callable[[str], None]


class PreparationStopped(UserError):
    """A signal has stopped a preparation; started again it goes on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.message = message
        self.signal_number = number

    def __str__(self) -> str:
        return self.message


class _Interrupted(BaseException):
    """Raised by the handlers of SIGTERM and SIGINT."""


@dataclass(frozen=True)
class Preparation:
    """Everything that determines a corpus, found out before anything is written."""

    settings: DataConfig
    seed: int
    source: Source
    tokenizer: CorpusTokenizer | None
    """The given tokenizer; None where one is trained."""

    @property
    def part_bytes(self) -> int:
        """Text of a part."""
        return max(1, int(self.settings.part_megabytes * (1 << 20)))

    def request(self) -> dict[str, Any]:
        """What determines the content of the corpus, as JSON."""
        settings = self.settings
        tokenizer: dict[str, Any] = {"vocab_size": settings.vocab_size or DEFAULT_VOCABULARY}
        tokenizer["trained_on_megabytes"] = settings.tokenizer_megabytes
        if self.tokenizer is not None:
            tokenizer = {"vocab_size": self.tokenizer.vocab_size, "sha256": self.tokenizer.sha256()}
        names = ("source", "max_documents", "validation_fraction", "test_fraction")
        sizes = ("part_megabytes", "shard_megabytes", "block_tokens")
        return {
            "format_version": FORMAT_VERSION,
            "source_version": self.source.version(),
            "tokenizer": tokenizer,
            "seed": self.seed,
            **{name: getattr(settings, name) for name in (*names, *sizes)},
        }

    def parts(self) -> list[Part]:
        """The parts; one for all where only the first so many documents are used. Raises UserError if none."""
        with naming_source(str(self.settings.path)):
            parts = self.source.parts(self.part_bytes)
        if not any(parts):
            raise UserError(
                f"the source has no text: everything in {self.settings.path} that data.files matches is empty; give "
                f"another data.path or data.files"
            )
        return [tuple(itertools.chain.from_iterable(parts))] if self.settings.max_documents else parts

    def worker(self, folder: Path) -> PartWorker:
        """What prepares the parts."""
        settings = self.settings
        return PartWorker(
            folder=folder,
            source=self.source,
            rule=SplitRule(self.seed, settings.validation_fraction, settings.test_fraction),
            end_of_document=END_OF_DOCUMENT if self.tokenizer is None else self.tokenizer.end_of_document,
            block_tokens=settings.block_tokens,
            shard_bytes=settings.shard_megabytes << 20,
            window_bytes=self.part_bytes,
            max_documents=settings.max_documents,
        )


def plan_preparation(settings: DataConfig, seed: int) -> Preparation:
    """Open the source and the given tokenizer. Raises UserError if either can't be used."""
    tokenizer = None
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer, settings.end_of_document)
        if settings.vocab_size not in (None, tokenizer.vocab_size):
            raise UserError(
                f"data.vocab_size is {settings.vocab_size} but tokenizer {settings.tokenizer} has "
                f"{tokenizer.vocab_size} tokens; leave data.vocab_size out (null)"
            )
    elif settings.end_of_document is not None:
        raise UserError("data.end_of_document is for a given data.tokenizer; a trained one has its own end token")
    with naming_source(str(settings.path)):
        source = open_source(settings)
    return Preparation(settings, seed, source, tokenizer)


def fingerprint(request: dict[str, Any]) -> str:
    """Short hash of a request; names the folder of its corpus."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]


def prepare_missing(preparation: Preparation, processes: int | None, report: Report) -> Path:
    """The folder of a corpus, prepared first unless it is there; what is there is not looked at.

    Several processes may call this at once: one prepares, the others wait. Raises UserError if the source, the disk or
    a process fails, and PreparationStopped on SIGTERM or SIGINT; finished parts stay in all these cases.
    """
    request = preparation.request()
    parent = Path(preparation.settings.directory)
    target = parent / fingerprint(request)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent / f".{target.name}.lock", report):
            if not target.exists():
                _prepare(preparation, request, target, processes or len(os.sched_getaffinity(0)), report)
    except OSError as error:
        where = error.filename or parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the device of {parent} ({where}); finished parts are kept: free some space and "
                f"start again, or give another data.directory"
            ) from error
        raise UserError(
            f"cannot prepare data in {parent}: {error.strerror or error} ({where}); give another data.directory"
        ) from error
    return target


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("data: another process prepares this corpus; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(preparation: Preparation, request: dict[str, Any], target: Path, processes: int, report: Report) -> None:
    partial = target.with_name(f".{target.name}.partial")
    parts = preparation.parts()
    worker = preparation.worker(partial)
    versions = {name: version(name) for name in ("tokenizers", "mosaicml-streaming", "zstd", "numpy")}
    results: dict[int, PartResult] = {}
    try:
        with _raising_signals():
            if not (partial / MANIFEST_FILE).exists():
                _begin_or_go_on(partial, {"request": request, "versions": versions, "parts": parts})
                tokenizer = _make_tokenizer(preparation, worker, parts, report)
                _prepare_parts(worker, parts, results, processes, report)
                ordered = [results[number] for number in range(len(parts))]
                _finish(partial, preparation, request, versions, tokenizer, ordered)
            shutil.rmtree(partial / PROGRESS_FOLDER, ignore_errors=True)
            sync_tree(partial)
            os.rename(partial, target)
            sync_path(target.parent)
    except _Interrupted as interrupt:
        raise PreparationStopped(
            f"preparation stopped, {len(results)} of {len(parts)} parts are finished; start again to go on",
            interrupt.args[0],
        ) from None
    report(f"data: prepared {target}")


@contextmanager
def _raising_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end what is inside by an exception (in the main thread, where handlers can be set)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Interrupted(number)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _begin_or_go_on(partial: Path, plan: dict[str, Any]) -> None:
    """Keep what a killed preparation has finished, if it had the same plan and libraries."""
    path = partial / PROGRESS_FOLDER / "plan.json"
    text = json.dumps(plan, sort_keys=True)
    if not path.exists() or path.read_text() != text:
        shutil.rmtree(partial, ignore_errors=True)
        path.parent.mkdir(parents=True)
        write_atomically(path, text)


def _make_tokenizer(
    preparation: Preparation, worker: PartWorker, parts: Sequence[Part], report: Report
) -> CorpusTokenizer:
    """Put the tokenizer into the folder, unless a killed preparation has."""
    path = worker.folder / TOKENIZER_FILE
    if not path.exists():
        tokenizer = preparation.tokenizer
        if tokenizer is None:
            settings = preparation.settings
            report(f"data: {len(parts):,} parts; training the tokenizer")
            texts = worker.training_texts(parts, settings.tokenizer_megabytes << 20)
            tokenizer = train_tokenizer(texts, settings.vocab_size or DEFAULT_VOCABULARY)
        write_atomically(path, tokenizer.tokenizer.to_str())
    return load_tokenizer(str(path), worker.end_of_document)


def _prepare_parts(
    worker: PartWorker, parts: Sequence[Part], results: dict[int, PartResult], processes: int, report: Report
) -> None:
    """Prepare the parts that are missing, each by one of several processes."""
    found = ((number, worker.finished(number)) for number in range(len(parts)))
    results |= {number: result for number, result in found if result is not None}
    missing = [number for number in range(len(parts)) if number not in results]
    if results:
        report(f"data: {len(results)} of {len(parts)} parts were finished before")
    if not missing:
        return
    processes = min(processes, len(missing))
    report(f"data: tokenizing {len(missing)} parts in {processes} {'process' if processes == 1 else 'processes'}")
    with PartsProgress(report, len(parts), len(results)) as progress:
        for number, result in _run(worker, parts, missing, processes):
            results[number] = result
            progress.part_done(result.tokens)


def _run(
    worker: PartWorker, parts: Sequence[Part], missing: Sequence[int], processes: int
) -> Iterator[tuple[int, PartResult]]:
    if processes == 1:
        for number in missing:
            yield number, worker.prepare(number, parts[number])
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a forked child would inherit the tokenizer's dead threads
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=start_process, initargs=(worker,))
    waiting = iter(missing)
    running: dict[Future[PartResult], int] = {}
    try:
        while True:
            for number in itertools.islice(waiting, 2 * processes - len(running)):
                running[pool.submit(prepare_in_process, number, parts[number])] = number
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the preparation was killed, perhaps for want of memory; finished parts are kept: start "
            "again with fewer processes (data.processes) or a smaller data.part_megabytes"
        ) from error
    finally:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()  # at the end they are idle, after a failure what they do is not wanted
        # Its thread must end before the interpreter does, which would wake it through a pipe that it may be closing.
        pool.shutdown(cancel_futures=True)


def _finish(
    partial: Path,
    preparation: Preparation,
    request: dict[str, Any],
    versions: dict[str, str],
    tokenizer: CorpusTokenizer,
    results: Sequence[PartResult],
) -> None:
    """Write the indexes and, last, the manifest."""
    settings = preparation.settings
    wanted = SPLITS if settings.test_fraction else SPLITS[:2]
    splits = {}
    for split in wanted:
        counts = [result.splits[split] for result in results]
        documents, tokens = [one.documents for one in counts], [one.tokens for one in counts]
        splits[split] = SplitCounts(sum(documents), sum(tokens), documents, tokens)
    _refuse_empty(splits, partial)
    index_sha256 = {}
    for split in wanted:
        shards = [
            _in_folder(shard, f"{number:06}")
            for number, result in enumerate(results)
            for shard in result.splits[split].shards
        ]
        index = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
        write_atomically(partial / split / INDEX_FILE, index)
        index_sha256[split] = hashlib.sha256(index.encode()).hexdigest()
    content = hashlib.sha256("".join(result.sha256 for result in results).encode()).hexdigest()
    Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint(request),
        request=request,
        seed=preparation.seed,
        corpus_sha256=content,
        index_sha256=index_sha256,
        tokenizer_sha256=tokenizer.sha256(),
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        token_dtype=smallest_dtype(tokenizer.vocab_size),
        block_tokens=settings.block_tokens,
        characters=sum(result.characters for result in results),
        duplicates=sum(result.duplicates for result in results),
        splits=splits,
        versions=versions,
        files={
            path.relative_to(partial).as_posix(): path.stat().st_size
            for path in sorted(partial.glob("[!.]*")) + sorted(partial.glob("[!.]*/**/[!.]*"))
            if path.is_file()
        },
    ).write(partial)


def _refuse_empty(splits: dict[str, SplitCounts], partial: Path) -> None:
    documents = sum(counts.documents for counts in splits.values())
    for name, counts in splits.items():
        if not counts.documents:
            shutil.rmtree(partial)  # other settings have another folder, so nothing here would be used again
            share = "lower data.validation_fraction, raise" if name == "train" else f"raise data.{name}_fraction or"
            raise UserError(
                f"the {name} split is empty: the source has {documents} documents; {share} data.max_documents, or "
                f"give more documents"
            )


def _in_folder(shard: dict[str, Any], folder: str) -> dict[str, Any]:
    """An index entry whose files lie in a subfolder."""
    moved = {
        key: {**shard[key], "basename": f"{folder}/{shard[key]['basename']}"}
        for key in ("raw_data", "zip_data")
        if shard[key]
    }
    return {**shard, **moved}
