"""What a memory group sends, from its sizes: the formulas of docs/sharding.md, and a model of the time that takes.

Letters: R ranks, B sequences, C tokens of a chunk, S = B * ceil(C / R) the largest share, P = heads * topk, D = v_dim,
n sub-keys, k = k_dim, w bytes of a number, i bytes of an id (4 up to 2^31 slots, or rows of an owner).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.exchange import id_type
from megatron_fwpkm.memory.sharding import Owners

Kind = Literal["dynamic", "static", "columns", "rows"]


@dataclass(frozen=True)
class Remote:
    """What of a chunk is on another rank than its token, summed over all tokens.

    Attributes:
        pairs: (token, owner) pairs
        reads: reads
        rows: (rank, distinct row) pairs
    """

    pairs: int
    reads: int
    rows: int


def count_remote(slot_YP: Tensor, owners: Owners, rank: int) -> Remote:
    """Of the slots of one rank's tokens in a chunk."""
    far_YP = owners.locate(slot_YP)[0]
    elsewhere = [far_YP == owner for owner in range(owners.ranks) if owner != rank]
    pairs = sum(int(one.any(1).sum()) for one in elsewhere)
    return Remote(pairs, int((far_YP != rank).sum()), sum(slot_YP[one].unique().numel() for one in elsewhere))


@dataclass(frozen=True)
class Link:
    """A kind of connection between ranks; the figures are assumptions of the model, not measurements."""

    name: str
    bytes_per_second: float
    seconds_per_message: float


LINKS = (Link("NVLink", 450e9, 2e-6), Link("InfiniBand NDR", 50e9, 5e-6))


def expected_bytes(
    kind: Kind, config: MemoryConfig, batch: int, lengths: list[int], remote: list[Remote], ranks: int, width: int
) -> Counter[str]:
    """Bytes that all ranks together send for one call, forward and backward, by phase.

    Of one memory and one replica, without mask. `lengths` and `remote` are those of each chunk; `width` is w.
    """
    total: Counter[str] = Counter()
    if ranks == 1:
        return total
    keys = ring(config.heads * config.n_subkeys * config.k_dim, ranks, width) * config.moves_keys
    usage = ring(2 * config.n_subkeys, ranks, 8) * config.has_addressing_loss  # in float64 always
    for index, (length, far) in enumerate(zip(lengths, remote, strict=True)):
        last = index == len(lengths) - 1
        cost = _chunk_costs(kind, config, batch * -(-length // ranks), far, ranks, width)
        total["plan"] += cost.plan
        total["read"] += cost.to_tokens
        total["write"] += cost.to_rows + cost.number
        total["keys"] += usage + keys
        total["backward"] += cost.to_rows + cost.reads + (0 if last else cost.to_tokens)
        total["backward"] += keys if index else 0
        total["backward"] += 0 if last else usage
        if not config.values_only and length > config.lookahead:
            total["keys"] += cost.reads
            # The slope again; with exact gradients its cotangents to the rows, and what the rows make of them.
            exact = config.key_gradient == "exact"
            total["backward"] += 0 if last else cost.reads + exact * (cost.reads + cost.slope)
    if kind == "columns" and config.weigh_write_by_gate:
        total["backward"] += ring(batch * sum(lengths), ranks, width)
    return +total


def ring(numbers: int, ranks: int, width: int) -> int:
    """Bytes that all ranks send for one all-reduce."""
    return ranks * 2 * (ranks - 1) * -(-numbers // ranks) * width


@dataclass(frozen=True)
class _Costs:
    plan: int
    to_tokens: int
    to_rows: int
    number: int  # write weights, beside the errors
    reads: int  # a number of each read
    slope: int  # vectors for the second order of values_only=False


def _chunk_costs(kind: Kind, config: MemoryConfig, share: int, far: Remote, ranks: int, width: int) -> _Costs:
    # Sent to its owner, a slot goes as one of the owner's rows.
    ids = Owners(config.n_subkeys, ranks).rows if kind in ("dynamic", "rows") else config.num_slots
    ident = id_type(ids).itemsize
    reads_per_token, vector = config.reads_per_token, config.v_dim * width
    even = ranks * (ranks - 1)
    if kind == "dynamic":
        plan = even * 2 * 8 + far.pairs * 4 + far.reads * (ident + width)
        return _Costs(
            plan, far.pairs * vector, far.pairs * vector, far.pairs * width, far.reads * width, far.pairs * vector
        )
    if kind == "rows":
        plan = even * 8 + far.rows * (ident + 2 * 4)
        return _Costs(plan, far.rows * vector, far.rows * vector, 0, 0, 0)
    sent = even * share
    plan, reads = sent * reads_per_token * (ident + width), sent * reads_per_token * width
    if kind == "columns":
        return _Costs(plan, 0, 0, 0, reads, 0)
    return _Costs(plan, sent * vector, sent * vector, sent * width, reads, sent * vector)


def modelled_seconds(sent_bytes: float, messages: float, link: Link) -> float:
    """Seconds that one rank takes to send so much, one message after the other: no overlap with work or each other."""
    return sent_bytes / link.bytes_per_second + messages * link.seconds_per_message
