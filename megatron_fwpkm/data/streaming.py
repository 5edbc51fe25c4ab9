"""Batches of a corpus: each replica its own share, in an order that the seed alone decides, resumable in O(1)."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.data.manifest import Manifest
from megatron_fwpkm.data.order import SequenceOrder
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.token_stream import TokenStream
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.processes import end_with_parent


@dataclass(frozen=True)
class ReadingPlan:
    """What decides which tokens sample number n has, and in which form they come."""

    sequence_length: int
    documents: Literal["joined", "separate"] = "joined"
    shuffle_seed: int | None = None
    """None reads in the order of the stream."""
    stretch_tokens: int = 1 << 16
    group: int = 64
    cache_bytes: int = 1 << 62

    @classmethod
    def of(cls, settings: DataConfig, shuffle: bool) -> ReadingPlan:
        """The plan of a data section."""
        return cls(
            sequence_length=settings.sequence_length,
            documents=settings.documents,
            shuffle_seed=settings.shuffle_seed if shuffle else None,
            stretch_tokens=settings.shuffle_stretch,
            group=settings.shuffle_group,
            cache_bytes=int(settings.cache_gigabytes * (1 << 30)),
        )


class _Samples(Dataset[torch.Tensor]):
    """Samples by their number; used by the training process or by its loader processes, which each have a copy."""

    def __init__(self, corpus: Path, manifest: Manifest, split: str, cache: Path, plan: ReadingPlan) -> None:
        self.plan = plan
        # A stretch may lie in two shards.
        self._stream = TokenStream(corpus, manifest, split, cache, 2 * plan.group, plan.cache_bytes)
        self.sequences = manifest.split(split).sequences(plan.sequence_length)
        if not self.sequences:
            raise UserError(
                f"the {split} split has {self._stream.tokens:,} tokens, fewer than one sequence; lower "
                f"data.sequence_length or prepare more documents"
            )
        stretch = max(1, plan.stretch_tokens // plan.sequence_length)
        self._order = SequenceOrder(self.sequences, stretch, plan.group, plan.shuffle_seed)

    def rows(self) -> int:
        """Rows of a sample: tokens, and with documents kept apart their numbers and positions."""
        return 3 if self.plan.documents == "separate" else 1

    def read(self, samples: Sequence[int]) -> torch.Tensor:
        """[rows, B, T + 1] int64."""
        length = self.plan.sequence_length
        batch = numpy.empty((self.rows(), len(samples), length + 1), numpy.int64)
        for place, sample in enumerate(samples):
            start = self._order(sample) * length
            if self.plan.documents == "separate":
                for row, values in enumerate(self._stream.read(start, length + 1)):
                    batch[row, place] = values
            else:
                batch[0, place] = self._stream.read_tokens(start, length + 1)
        return torch.from_numpy(batch)

    def __getitems__(self, samples: list[int]) -> torch.Tensor | UserError:
        """What loader processes call. An error is handed over as a value: raised, it would come with a traceback."""
        try:
            return self.read(samples)
        except UserError as error:
            return error


class TokenLoader:
    """Endless microbatches of one split: each replica's share, with a cursor that can be saved and restored.

    The global order of samples depends on the plan alone. A microbatch of all `replicas` takes the next replicas x B
    samples of it, of which replica r gets B from r x B on; so a cursor, the number of the next sample, means the same
    with any number of replicas, batch size and loader processes. Epochs follow one another, each in an order of its
    own. Sequence i has tokens i x T to (i + 1) x T of the split's stream; the last is a label alone.

    With a `group`, only its first rank reads and the others get the batch from it; all must call next() alike.
    """

    def __init__(
        self,
        corpus: Path,
        manifest: Manifest,
        split: str,
        *,
        cache: Path,
        plan: ReadingPlan,
        batch_size: int,
        replica: int = 0,
        replicas: int = 1,
        workers: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self._samples = _Samples(corpus, manifest, split, cache, plan)
        self._batch_size = batch_size
        self._replica = replica
        self._replicas = replicas
        self._workers = workers
        self._group = group
        self._cursor = 0
        self._from_workers: Iterator[torch.Tensor | UserError] | None = None
        self._agreed = {
            "corpus": manifest.corpus_sha256,
            "split": split,
            "sequence_length": plan.sequence_length,
            "shuffle_seed": plan.shuffle_seed,
            "shuffle_stretch": plan.stretch_tokens,
            "shuffle_group": plan.group,
        }

    @property
    def sequences(self) -> int:
        """Sequences of one epoch, of all replicas together."""
        return self._samples.sequences

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        values = self._read() if self._group is None else _read_once(self._group, self._read, self._shape())
        self._cursor += self._replicas * self._batch_size
        tokens, labels = values[0, :, :-1], values[0, :, 1:]
        if len(values) == 1:
            return TokenBatch(tokens, labels)
        documents, positions = values[1], values[2, :, :-1]
        # Rotary embeddings know differences alone, and in float32 lose them far inside a long document.
        cut = documents[:, :-1] == documents[:, :1]
        positions = positions - torch.where(cut, positions[:, :1], 0)
        inside = documents[:, 1:] == documents[:, :-1]
        return TokenBatch(tokens, labels.where(inside, IGNORED_LABEL), documents[:, :-1], positions)

    def state_dict(self) -> dict[str, Any]:
        """Where reading stands, the same on all ranks: the number of the next sample, and what it belongs to."""
        return {"sample": self._cursor, **self._agreed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved cursor; the next batch starts there. Raises UserError if it is of another order."""
        differing = [
            f"{name} ({state.get(name)!r}, {value!r})"
            for name, value in self._agreed.items()
            if state.get(name) != value
        ]
        if not isinstance(state.get("sample"), int):
            differing.append("sample (none, a number)")
        if differing:
            raise UserError(
                f"the saved place in the data belongs to another order of samples (then, now): {'; '.join(differing)}; "
                f"give the same data settings, or another run_directory to begin anew"
            )
        self._cursor = state["sample"]
        self._from_workers = None

    def close(self) -> None:
        """End the loader processes, if there are any; the next batch starts new ones."""
        self._from_workers = None

    def _shape(self) -> tuple[int, int, int]:
        return self._samples.rows(), self._batch_size, self._samples.plan.sequence_length + 1

    def _read(self) -> torch.Tensor:
        """This replica's next samples, [rows, B, T + 1]."""
        if not self._workers:
            return self._samples.read(next(self._batches()))
        if self._from_workers is None:
            loader = DataLoader(
                self._samples,
                batch_sampler=self._batches(),  # type: ignore[arg-type]  # any iterable serves
                num_workers=self._workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # __getitems__ has made the batch
                worker_init_fn=_start_loader_process,
                generator=torch.Generator(),  # the global one would move, and differently after a resume
            )
            self._from_workers = iter(loader)
        values = next(self._from_workers)
        if isinstance(values, UserError):
            raise values
        return values

    def _batches(self) -> Iterator[list[int]]:
        """Numbers of the samples of this replica's batches, from the cursor on."""
        for first in itertools.count(
            self._cursor + self._replica * self._batch_size, self._replicas * self._batch_size
        ):
            yield list(range(first, first + self._batch_size))


def held_out_batches(
    corpus: Path,
    manifest: Manifest,
    split: str,
    *,
    cache: Path,
    plan: ReadingPlan,
    sequences: int,
    batch_size: int,
    replica: int = 0,
    replicas: int = 1,
    group: torch.distributed.ProcessGroup | None = None,
) -> list[TokenBatch]:
    """This replica's share of the first `sequences` sequences of a split, in the order of the stream.

    As many as there are where there are fewer, rounded down to whole batches on every replica, but at least one batch.
    """
    loader = TokenLoader(
        corpus,
        manifest,
        split,
        cache=cache,
        plan=ReadingPlan(plan.sequence_length, plan.documents, cache_bytes=plan.cache_bytes),
        batch_size=batch_size,
        replica=replica,
        replicas=replicas,
        group=group,
    )
    batches = min(sequences, loader.sequences) // (batch_size * replicas)
    return list(itertools.islice(loader, max(1, batches)))


def _read_once(group: torch.distributed.ProcessGroup, read: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """What `read` returns on the group's first rank, on all its ranks; so are its errors."""
    first = torch.distributed.get_global_rank(group, 0)
    leads = torch.distributed.get_rank() == first
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    count = int(numpy.prod(shape))
    failure: Exception | None = None
    buffer = torch.empty(count + 1, dtype=torch.int64)
    if leads:
        try:
            buffer[:-1] = read().flatten()
            buffer[-1] = 0
        except Exception as error:
            failure = error
            buffer.fill_(1)
    # The last number tells whether there is a batch, so that one broadcast is enough.
    buffer = buffer.to(device)
    torch.distributed.broadcast(buffer, first, group=group)
    buffer = buffer.cpu()
    if buffer[-1]:
        told: list[Any] = [failure and (isinstance(failure, UserError), str(failure))]
        torch.distributed.broadcast_object_list(told, first, group=group, device=device)
        if failure is not None:
            raise failure
        by_user, message = told[0]
        raise UserError(message) if by_user else RuntimeError(f"reading data failed on rank {first}: {message}")
    return buffer[:-1].reshape(shape)


def _as_it_is(values: torch.Tensor | UserError) -> torch.Tensor | UserError:
    return values


def _start_loader_process(number: int) -> None:
    """Let the training process decide when loader processes end, and end them with it.

    It has handlers of its own, which they inherit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # One that outlives a killed rank keeps the locks that it has inherited: of the scratch folder, of shards in use.
    parent = multiprocessing.parent_process()
    end_with_parent(signal.SIGKILL, None if parent is None else parent.pid)
