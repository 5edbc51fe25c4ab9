"""Which memory group goes with a placement."""

from __future__ import annotations

from megatron_fwpkm.memory.column_sharding import ColumnMemoryGroup
from megatron_fwpkm.memory.config import MemoryConfig
from megatron_fwpkm.memory.exchange import RankGroup
from megatron_fwpkm.memory.placement import Placement
from megatron_fwpkm.memory.routing import LOCAL, LocalGroup
from megatron_fwpkm.memory.sharding import Owners, ProcessMemoryGroup
from megatron_fwpkm.memory.static_routing import StaticMemoryGroup


def make_memory_group(placement: Placement, config: MemoryConfig, *, apart: bool = False) -> LocalGroup | RankGroup:
    """The ranks of a memory and how they exchange.

    `apart` is for memories that each sequence has one of: replicas' batches then don't write together.

    Raises:
        ValueError: columns over several replicas' ranks, or that don't divide; more ranks than sub-keys; a memory
            group that does not hold whole tensor groups.
    """
    group = placement.memory_group
    if placement.memory_ranks % placement.tensor_ranks:
        raise ValueError(
            f"a memory over {placement.memory_ranks} ranks for batches that {placement.tensor_ranks} ranks share: the "
            "memory group must hold the tensor group, or several of them"
        )
    if group is None or placement.memory_ranks == 1:
        return LOCAL
    options = {
        "replicas": placement.replicas,
        "apart": apart,
        "tensor_group": placement.tensor_group if placement.tensor_ranks > 1 else None,
    }
    if placement.sharding == "columns":
        return ColumnMemoryGroup(group, config, **options)
    if placement.memory_ranks > config.n_subkeys:
        raise ValueError(
            f"n_subkeys is {config.n_subkeys}: slots of so many sub-keys go to 1 to that many ranks, not "
            f"{placement.memory_ranks}"
        )
    kind = StaticMemoryGroup if placement.routing == "static" else ProcessMemoryGroup
    return kind(group, Owners(config.n_subkeys, placement.memory_ranks), config.reads_per_token, **options)
