"""Whether all ranks of a memory have the same sub-keys, bit by bit, as they must to find the same slots."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fwpkm.model.decoder import BlockStack
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors


def digest(tensor: Tensor) -> Tensor:
    """Two 64-bit numbers [2] of a tensor's bits and of their places."""
    bits = tensor.detach().contiguous().view(-1).view(torch.int64 if tensor.element_size() == 8 else torch.int32).long()
    # Odd factors, in arithmetic modulo 2^64: a change of any one number changes both sums.
    factors = torch.arange(bits.numel(), device=bits.device) * 2 + 1
    return torch.stack([bits.sum(), (bits * factors).sum()])


def check_keys(model: BlockStack, topology: Topology) -> None:
    """Compare the sub-keys of every memory over its ranks; all ranks call this together.

    Raises RankFailedError, on all ranks, that names the layer and the rank whose sub-keys differ from its first rank's.
    """
    place = topology.placement
    layers = list(model.fast_states())
    if place.memory_group is None:
        return
    group = place.memory_group

    def compare() -> None:
        if not layers:
            return
        own_L2 = torch.stack([digest(state.keys_H2nd) for _, state in layers])
        of_rank = [torch.empty_like(own_L2) for _ in range(place.memory_ranks)]
        dist.all_gather(of_rank, own_L2, group=group)
        for (index, _), own, first in zip(layers, own_L2, of_rank[0], strict=True):
            if not torch.equal(own, first):
                raise RuntimeError(
                    f"the sub-keys of the memory in block {index} differ between rank {topology.rank} and rank "
                    f"{dist.get_global_rank(group, 0)}, which must have them alike; resume from the last checkpoint, "
                    "and look for a damaged device or an update that is not deterministic"
                )

    agree_on_errors(compare, "comparing sub-keys")
