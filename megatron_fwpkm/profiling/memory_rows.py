"""What the calls of a memory keep for their backward pass, by size: the tensors of `functional.SAVED_TENSORS`.

How many rows a chunk touches, and how many of the group's reads address the rows of one rank, depends on the data.
Where all slots are used alike, R reads of N slots are expected to touch N (1 - (1 - 1/N)^R) of them, and each of
several ranks has its share of the reads: that is the expected value. At most, no two reads meet, and all of them
address one rank.

Letters: as in chunk.py and routing.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_fwpkm.memory.chunk import ChunkSpan
from megatron_fwpkm.memory.column_sharding import ColumnMemoryGroup
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.pkm_layer import PKMConfig
from megatron_fwpkm.memory.routing import MemoryGroup
from megatron_fwpkm.memory.static_routing import StaticMemoryGroup

_ID, _NUMBER, _WIDE = 8, 4, 8
"""Bytes of an index, of a number of the fast state's precision, and of a float64."""


@dataclass(frozen=True)
class ReadGroup:
    """The ranks that a memory is spread over, as far as sizes depend on them."""

    ranks: int = 1
    tables: int = 1
    """Replicas whose memories are apart but have their rows spread over all ranks."""
    replicas: int = 1
    """Batches whose reads come together."""
    way: Literal["local", "dynamic", "static", "columns"] = "local"

    @classmethod
    def of(cls, group: MemoryGroup) -> ReadGroup:
        """The sizes of a memory group."""
        if group.size == 1:
            return cls()
        way: Literal["dynamic", "static", "columns"] = "dynamic"
        if isinstance(group, ColumnMemoryGroup):
            way = "columns"
        elif isinstance(group, StaticMemoryGroup):
            way = "static"
        return cls(group.size, group.tables, group.batches * group.tables, way)


@dataclass(frozen=True)
class CallBytes:
    """What one call keeps beside its inputs and its output."""

    expected_bytes: float
    most_bytes: float
    slots: float
    """Rows of this rank that the reads are spread over."""
    reads: float
    """Reads that address this rank's rows, over all chunks; expected."""
    row_bytes: int
    """Bytes of a row on this rank."""


def distinct_slots(slots: float, reads: float) -> float:
    """Expected number of slots that so many reads touch, when every slot is as likely as any other."""
    if slots <= 1:
        return min(slots, reads)
    return -slots * math.expm1(reads * math.log1p(-1 / slots))


def memory_call(
    config: MemoryConfig, batch: int, spans: Sequence[ChunkSpan], group: ReadGroup, touched: Sequence[int] | None = None
) -> CallBytes:
    """Of one `fast_memory` call on `batch` sequences; the rows that each chunk touches on this rank may be known."""
    memories = batch if config.reset in ("per_sequence", "per_document") else 1
    width = config.v_dim // (group.ranks if group.way == "columns" else 1)
    here = 1 if group.way == "columns" else group.ranks
    slots = group.tables * memories * config.num_slots / here
    expected = most = total = 0.0
    for index, span in enumerate(spans):
        queries = batch * (span.queries.stop - span.queries.start)
        tokens = group.replicas * batch * span.length
        fixed = _token_side(config, queries, memories, batch * span.own_length)
        reads = tokens * config.reads_per_token
        own = reads / here
        rows = distinct_slots(slots, own) if touched is None else touched[index]
        expected += fixed + _row_side(config, group, queries, tokens, own, rows, width)
        most_rows = min(slots, reads)
        most += fixed + _row_side(config, group, queries, tokens, reads, most_rows, width, worst=True)
        total += own
    if memories > 1 and spans:  # they all start from the same sub-keys
        same = _subkey_bytes(config, memories - 1)
        expected, most = expected - same, most - same
    if not config.moves_keys and not config.weight_decay:  # the sub-keys of all chunks are those of the fast state
        keys = _subkey_bytes(config, memories) * len(spans)
        expected, most = expected - keys, most - keys
    return CallBytes(expected, most, slots, total, width * _NUMBER)


def _subkey_bytes(config: MemoryConfig, memories: int) -> int:
    return memories * config.heads * config.n_subkeys * config.k_dim * _NUMBER


def _token_side(config: MemoryConfig, queries: int, memories: int, vectors: int) -> int:
    """Addresses of this rank's queries, write weights, sub-keys and their use."""
    reads = queries * config.reads_per_token
    per_read = 2 * _ID + 2 * _NUMBER + 2 * _ID + 2 * _NUMBER  # of both halves: sub-keys, scores, ranks; score, weight
    clamp = memories * config.heads * config.n_subkeys * config.k_dim if config.gradient_clip else 0
    usage = memories * 2 * config.n_subkeys * _WIDE
    return reads * per_read + vectors * _NUMBER + _subkey_bytes(config, memories) + clamp + usage


def _row_side(
    config: MemoryConfig,
    group: ReadGroup,
    queries: int,
    tokens: int,
    reads: float,
    rows: float,
    width: int,
    worst: bool = False,
) -> float:
    """The plan, the rows, and what tokens of all ranks have sent. `reads` address rows of this rank."""
    clamp = rows * width if config.gradient_clip and config.learning_rate > 0 else 0
    of_rows = rows * (width * _NUMBER + 3 * _ID + _NUMBER) + _ID + clamp  # rows, slots, counts, offsets, steps
    places = 2 * reads * _ID  # of the reads among the rows, and their order
    if group.way == "local":
        return of_rows + places
    weights = reads * _NUMBER
    if group.way == "columns":
        return of_rows + places + weights
    owners = group.ranks if worst else owners_of_token(group.ranks, config.reads_per_token)
    if group.way == "static":
        pairs, sent = float(tokens), reads * _ID  # places of the reads among those of all tokens
    else:
        pairs = tokens if worst else tokens * owners / group.ranks
        sent = queries * config.reads_per_token * _ID + queries * owners * _ID + 4 * group.ranks * _ID
    vectors = pairs * (width + 1) * _NUMBER  # errors and write weights
    return of_rows + places + weights + vectors + reads * _ID + (pairs + 1) * _ID + sent


def owners_of_token(ranks: int, reads: int) -> float:
    """Expected number of ranks that own a slot of a token."""
    return distinct_slots(ranks, reads)


def pkm_call(
    config: PKMConfig, queries: int, tokens: int, group: ReadGroup, width: int, touched: int | None = None
) -> CallBytes:
    """Of one read of slow values by this rank's `queries`, of `tokens` of all ranks; numbers have `width` bytes.

    Queries, sub-keys and weights, which autograd saves, are not in it; the rows are read again.
    """
    settings = config.addressing
    reads = tokens * settings.reads_per_token
    slots, own = settings.num_slots / group.ranks, reads / group.ranks
    # Of both halves: sub-keys, scores and ranks; slots, their scores in float64.
    addresses = queries * settings.reads_per_token * (2 * _ID + 2 * width + 2 * _ID + _ID + _WIDE)

    def plan(reads_here: float, rows: float, owners: float, pairs: float) -> float:
        found = 2 * reads_here * _ID + rows * 3 * _ID + reads_here * width
        if group.way == "local":
            return found
        sent = queries * settings.reads_per_token * _ID + queries * owners * _ID
        if group.way == "static":
            sent = reads_here * _ID
        return found + reads_here * _ID + pairs * _ID + sent

    owners = owners_of_token(group.ranks, settings.reads_per_token)
    rows = distinct_slots(slots, own) if touched is None else touched
    expected = addresses + plan(own, rows, owners, tokens * owners / group.ranks)
    most = addresses + plan(reads, min(slots, reads), group.ranks, tokens)
    return CallBytes(expected, most, slots, own, config.v_dim * width)
