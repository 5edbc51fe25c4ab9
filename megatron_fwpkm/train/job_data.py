"""What a job reads: a prepared corpus, or sequences that are drawn as they are read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.batch import Loader, TokenBatch
from megatron_fwpkm.data.corpus import corpus_tokenizer, prepare_corpus
from megatron_fwpkm.data.manifest import Manifest, check_shards, read_manifest
from megatron_fwpkm.data.recall import FORMAT_VERSION, HELD_OUT, TRAINING, RecallLoader
from megatron_fwpkm.data.streaming import ReadingPlan, TokenLoader, held_out_batches
from megatron_fwpkm.errors import SharedUserError
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors

_POLL_SECONDS = 0.2
_actions_of_the_leader = itertools.count()
"""Ranks count alike, so each action has a key of its own."""


@dataclass(frozen=True)
class JobData:
    """The data of a job on one rank."""

    loader: Loader
    held_out: list[TokenBatch]
    """This rank's fixed held-out batches."""
    vocab_size: int
    identity: dict[str, str]
    """Hashes that tell corpora and tokenizers apart; a run goes on only with the same."""
    tokenizer: Path | None
    """tokenizer.json of the corpus; None for data without text."""


def prepare_data(config: TrainConfig, report: Callable[[str], None]) -> None:
    """Prepare the corpus that the configuration asks for, if it is not there and there is something to prepare."""
    if config.data.source != "recall":
        prepare_corpus(config.data, config.seed, report)


def open_data(config: TrainConfig, ranks: Topology, scratch: Path, say: Callable[[str], None]) -> JobData:
    """Open what the configuration's source names, on this rank; all ranks call this together.

    `scratch` is the job's temporary folder. Raises SharedUserError on every rank for what the user can mend.
    """
    if config.data.source == "recall":
        return _open_recall(config, ranks)
    corpus, manifest = _prepare_in_turns(config, ranks, say)
    _check_sizes(config, ranks, manifest)
    return JobData(
        loader=_loader(config, ranks, corpus, manifest, scratch),
        held_out=_held_out(config, ranks, corpus, manifest, scratch),
        vocab_size=manifest.vocab_size,
        identity={"corpus": manifest.corpus_sha256, "tokenizer": manifest.tokenizer_sha256},
        tokenizer=corpus / "tokenizer.json",
    )


def _open_recall(config: TrainConfig, ranks: Topology) -> JobData:
    """Nothing to prepare: sequences are drawn when they are read."""
    recall, batch_size = config.data.recall, config.training.micro_batch_size
    assert recall is not None  # checked by DataConfig

    def loader(stream: int) -> RecallLoader:
        return RecallLoader(recall, config.data.sequence_length, batch_size, stream, ranks.replica, ranks.replicas)

    batches = config.evaluation.sequences // (ranks.replicas * batch_size)
    return JobData(
        loader=loader(TRAINING),
        held_out=list(itertools.islice(loader(HELD_OUT), max(1, batches))),
        vocab_size=recall.vocab_size,
        identity={"corpus": f"recall, format {FORMAT_VERSION}"},
        tokenizer=None,
    )


def _prepare_in_turns(config: TrainConfig, ranks: Topology, say: Callable[[str], None]) -> tuple[Path, Manifest]:
    """Rank 0 prepares what is missing and names the folder; the others then read what is there."""
    prepared: list[Path | None] = [None]

    def prepare() -> None:
        with _others_waiting(ranks):
            if ranks.is_leader:
                prepared[0], _ = _prepare_and_verify(config, say)

    agree_on_errors(prepare, "preparing the data")
    torch.distributed.broadcast_object_list(prepared, 0)
    folder = prepared[0]
    assert folder is not None
    return folder, agree_on_errors(lambda: read_manifest(folder), "reading the manifest")


@contextmanager
def _others_waiting(ranks: Topology) -> Iterator[None]:
    """What is inside may take the leader hours; the other ranks come to it when the leader leaves it, however it does.

    They ask the store that the ranks have met at: in a collective they would fail after parallel.timeout_seconds.
    Where the store is gone, with the process that kept it, they fail.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"fwpkm-leader-done-{next(_actions_of_the_leader)}"
    if not ranks.is_leader:
        while not store.check([key]):
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        if ranks.is_leader:
            store.set(key, "done")


def _prepare_and_verify(config: TrainConfig, say: Callable[[str], None]) -> tuple[Path, Manifest]:
    corpus, manifest = prepare_corpus(config.data, config.seed, say)
    corpus_tokenizer(corpus)  # compares it with the manifest
    check_shards(corpus)
    return corpus, manifest


def _loader(config: TrainConfig, ranks: Topology, corpus: Path, manifest: Manifest, scratch: Path) -> TokenLoader:
    return agree_on_errors(
        lambda: TokenLoader(
            corpus,
            manifest,
            "train",
            cache=_cache(config, scratch),
            plan=ReadingPlan.of(config.data, shuffle=True),
            batch_size=config.training.micro_batch_size,
            replica=ranks.replica,
            replicas=ranks.replicas,
            workers=config.data.workers,
        ),
        "opening the training data",
    )


def _held_out(
    config: TrainConfig, ranks: Topology, corpus: Path, manifest: Manifest, scratch: Path
) -> list[TokenBatch]:
    """This rank's fixed held-out batches: as many as asked for, at most what there is."""
    return agree_on_errors(
        lambda: held_out_batches(
            corpus,
            manifest,
            "validation",
            cache=_cache(config, scratch),
            plan=ReadingPlan.of(config.data, shuffle=False),
            sequences=config.evaluation.sequences,
            batch_size=config.training.micro_batch_size,
            replica=ranks.replica,
            replicas=ranks.replicas,
        ),
        "reading the held-out data",
    )


def _cache(config: TrainConfig, scratch: Path) -> Path:
    """Where shards are unpacked."""
    return Path(config.data.cache) if config.data.cache is not None else scratch / "shards"


def _check_sizes(config: TrainConfig, ranks: Topology, manifest: Manifest) -> None:
    """Raise UserError, on every rank alike, if a split has too few sequences for one batch on every rank."""
    needed = ranks.replicas * config.training.micro_batch_size
    for split in ("train", "validation"):
        sequences = manifest.split(split).sequences(config.data.sequence_length)
        if sequences < needed:
            raise SharedUserError(
                f"the {split} split has {sequences} sequences and one microbatch on each of {ranks.replicas} "
                f"replicas takes {needed}; lower training.micro_batch_size or data.sequence_length, or prepare more "
                f"documents (data.max_documents, data.validation_fraction)"
            )
