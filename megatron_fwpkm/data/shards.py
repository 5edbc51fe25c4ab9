"""Unpacked shards in a cache folder that the processes of a machine share.

mosaicml-streaming's Stream fetches, checks and unpacks; its StreamingDataset is not used, whose shared memory and
barriers a killed job leaves to the next. Who has which shard in use is told by locks on files alone, which the kernel
frees when a process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy

from megatron_fwpkm.data.blocks import INDEX_FILE, import_streaming
from megatron_fwpkm.data.manifest import damaged
from megatron_fwpkm.errors import UserError

VALIDATED_HASH = "xxh64"
_LOCKS = ".locks"
_ATTEMPTS = 2
_TIMEOUT_SECONDS = 60.0


class ShardCache:
    """Random access to the blocks of one split; at most `open_shards` shards are in use by this object at a time.

    `folder` has the packed shards and is never changed; `cache` gets the unpacked ones. While all of them are no
    larger than `limit_bytes` they stay there; otherwise a shard is removed as soon as no process has it in use. Not
    shared with forked processes: each opens shards of its own.
    """

    def __init__(self, folder: Path, cache: Path, open_shards: int, limit_bytes: int) -> None:
        self._folder = folder
        self._cache = cache
        self._capacity = open_shards
        self._process = os.getpid()
        self._in_use: OrderedDict[int, IO[str]] = OrderedDict()
        """Shard -> file with a shared lock, least recently used first."""
        streaming = import_streaming()
        self._stream = streaming.Stream(
            remote=str(folder),
            local=str(cache),
            download_retry=_ATTEMPTS,
            download_timeout=_TIMEOUT_SECONDS,
            validate_hash=VALIDATED_HASH,
            keep_zip=False,
        )
        self._readers = self._open_index(streaming)
        sizes = [len(reader) for reader in self._readers]
        self._first_blocks = numpy.concatenate([[0], numpy.cumsum(sizes, dtype=numpy.int64)])
        self._keep_unused = sum(reader.get_raw_size() for reader in self._readers) <= limit_bytes

    def __len__(self) -> int:
        """Blocks in all shards."""
        return int(self._first_blocks[-1])

    def block(self, index: int) -> dict[str, Any]:
        """The record of a block, as blocks.py describes it. Raises UserError if its shard is damaged or missing."""
        shard = int(numpy.searchsorted(self._first_blocks, index, side="right")) - 1
        self._use(shard)
        try:
            record: dict[str, Any] = self._readers[shard][index - int(self._first_blocks[shard])]
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} was removed while it was in use; start again") from error
        return record

    def close(self) -> None:
        """Release all shards; blocks can still be read afterwards."""
        while self._in_use:
            self._release_oldest()

    def _open_index(self, streaming: Any) -> list[Any]:
        world = streaming.base.world.World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        try:
            (self._cache / _LOCKS).mkdir(parents=True, exist_ok=True)
            with self._lock_file("index") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                readers: list[Any] = self._stream.get_shards(world, allow_unsafe_types=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"cannot read {self._folder / INDEX_FILE} by way of {self._cache}: {error}; give a data.cache that can "
                f"be written, or an intact corpus"
            ) from error
        return readers

    def _lock_file(self, name: str) -> IO[str]:
        return open(self._cache / _LOCKS / name, "a")

    def _use(self, shard: int) -> None:
        """Make sure that the shard is unpacked, and stays so until it is released."""
        if self._process != os.getpid():
            # Forked: the files' locks are the parent's, and changing one here would change it there.
            self._process = os.getpid()
            self._in_use = OrderedDict()
        if shard in self._in_use:
            self._in_use.move_to_end(shard)
            return
        while len(self._in_use) >= self._capacity:
            self._release_oldest()
        try:
            self._in_use[shard] = self._lock_unpacked(shard)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left for unpacked shards in {self._cache}; free some, give another data.cache or lower "
                    f"data.cache_gigabytes"
                ) from error
            packed = self._folder / self._readers[shard].zip_data.basename
            raise UserError(f"cannot unpack {packed} into {self._cache}: {error}") from error

    def _lock_unpacked(self, shard: int) -> IO[str]:
        """A file with a shared lock, held on a shard that is unpacked."""
        lock = self._lock_file(str(shard))
        try:
            # Held from here on: nobody removes the shard. Turning it into an exclusive lock instead would wait for ever
            # for another rank that has the shard in use and waits for this one.
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not self._is_unpacked(shard):
                with self._lock_file(f"{shard}.unpacking") as unpacking:
                    fcntl.flock(unpacking, fcntl.LOCK_EX)
                    if not self._is_unpacked(shard):
                        self._unpack(shard)
        except BaseException:
            lock.close()
            raise
        return lock

    def _is_unpacked(self, shard: int) -> bool:
        """Whether the unpacked shard is there. Raises UserError if it is not what it should be."""
        from streaming.base.hashing import get_hash

        info = self._readers[shard].raw_data
        path = self._cache / info.basename
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False
        if len(content) != info.bytes or get_hash(VALIDATED_HASH, content) != info.hashes[VALIDATED_HASH]:
            raise UserError(f"unpacked shard {path} is damaged; delete the cache {self._cache}")
        return True

    def _unpack(self, shard: int) -> None:
        packed = self._readers[shard].zip_data.basename
        try:
            self._stream.prepare_shard(self._readers[shard])
        except ValueError as error:  # streaming's answer to a wrong hash
            (self._cache / packed).unlink(missing_ok=True)
            raise UserError(damaged(self._folder / packed, self._folder.parent)) from error

    def _release_oldest(self) -> None:
        shard, lock = self._in_use.popitem(last=False)
        with lock:
            if self._keep_unused:
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # in use elsewhere; who releases it last removes it
            (self._cache / self._readers[shard].raw_data.basename).unlink(missing_ok=True)
