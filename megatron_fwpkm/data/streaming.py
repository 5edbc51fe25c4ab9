"""Reading token shards with mosaicml-streaming: each data-parallel rank its own share, resumable in mid-epoch."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_fwpkm.compatibility import mend_torchvision
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.errors import UserError

_CANONICAL_NODES = 1
"""Into how many parts the order of samples is divided; fixed, so that it depends on the seed alone."""

_SEGMENT_NUMBERS = 900_000
"""Names of shared memory have six digits."""


def import_streaming() -> ModuleType:
    """mosaicml-streaming, which imports transformers and with it torchvision."""
    mend_torchvision()
    import streaming

    return streaming


class TokenLoader:
    """Endless microbatches of one split, one share per rank, with a cursor that can be saved and restored.

    Samples are [T + 1] tokens; a batch has the first T as input and the last T as labels. Shards are unpacked from
    `folder`, which is never changed, into `cache` (checked against their hashes on the way), which one machine's
    ranks share. Needs the process group of torch.distributed if there are several ranks.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        batch_size: int,
        shuffle: bool,
        seed: int,
        workers: int = 0,
    ) -> None:
        streaming = import_streaming()
        _number_segments_after(cache)
        self._dataset = streaming.StreamingDataset(
            remote=str(folder),
            local=str(cache),
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            num_canonical_nodes=_CANONICAL_NODES,
            validate_hash="xxh64",
        )
        self._loader = streaming.StreamingDataLoader(
            self._dataset,
            batch_size=batch_size,
            num_workers=workers,
            drop_last=True,
            collate_fn=_collate,
            persistent_workers=False,
        )
        self._folder = folder
        self._epoch: Iterator[TokenBatch] | None = None
        # Always state where to start: streaming would otherwise take the cursor from any shared memory it finds
        # under the name it uses, a killed job's too. Every rank writes the same bytes before it reads them.
        beginning = {
            "epoch": 0,
            "sample_in_epoch": 0,
            "num_canonical_nodes": _CANONICAL_NODES,
            "shuffle_seed": seed,
            "initial_physical_nodes": streaming.base.world.World.detect().num_nodes,
        }
        if streaming.base.world.World.detect().is_local_leader:
            self.load_state_dict(beginning)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # two ranks that create one segment at the same moment can fail
        self.load_state_dict(beginning)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        for _ in range(3):
            if self._epoch is None:
                self._epoch = self._one_epoch()
            batch = next(self._epoch, None)
            if batch is not None:
                return batch
            self._epoch = None  # at its end, or resumed exactly at the end of an epoch
        raise UserError(
            f"{self._folder} has too few sequences for one batch on every rank; lower training.micro_batch_size or "
            f"prepare more documents"
        )

    def _one_epoch(self) -> Iterator[TokenBatch]:
        for tokens in self._loader:
            yield TokenBatch(tokens[:, :-1], tokens[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        """Where reading stands: call it on every rank between batches; all ranks hold the same."""
        return dict(self._loader.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved cursor, on all ranks; the next batch starts there."""
        self._epoch = None
        self._loader.load_state_dict(state)


def _number_segments_after(cache: Path) -> None:
    """Make streaming look for free names of shared memory from a number that belongs to this cache folder.

    It looks from 0 otherwise, on every rank by itself: jobs of one machine that start or end at the same moment could
    then get in each other's way, and a killed job's segments in everybody's.
    """
    prefix: Any = importlib.import_module("streaming.base.shared.prefix")
    digest = hashlib.sha256(str(cache.resolve()).encode()).digest()
    first = int.from_bytes(digest[:8], "big") % _SEGMENT_NUMBERS
    prefix._each_prefix_int = lambda: itertools.count(first)


def _collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.stack([sample["tokens"] for sample in samples]).astype(numpy.int64))
