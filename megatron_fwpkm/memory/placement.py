"""How a memory layer is spread over ranks, as plain values: what a layer is told about the layout of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

Sharding = Literal["slots", "columns"]
Routing = Literal["dynamic", "static"]


@dataclass(frozen=True)
class Placement:
    """Where the slots of a memory and the tokens of a batch are. The default: all on this rank."""

    tensor_group: dist.ProcessGroup | None = None
    """The ranks that work on one batch together (tensor parallelism); None: this one alone."""
    memory_group: dist.ProcessGroup | None = None
    """The ranks that one memory's slots are spread over: `tensor_group`, or several such groups in order of their
    replicas, whose batches then write one memory together; None: this one alone."""
    sequence_parallel: bool = False
    """Whether a rank of `tensor_group` has its 1/R of every sequence, contiguous, instead of all tokens."""
    sharding: Sharding = "slots"
    """Whole rows of some slots, or some columns of all."""
    routing: Routing = "dynamic"
    """Messages of what there is to send, or padded ones of known size."""

    @property
    def tensor_ranks(self) -> int:
        """Ranks that work on one batch."""
        return 1 if self.tensor_group is None else dist.get_world_size(self.tensor_group)

    @property
    def tensor_rank(self) -> int:
        """This rank among them."""
        return 0 if self.tensor_group is None else dist.get_rank(self.tensor_group)

    @property
    def memory_ranks(self) -> int:
        """Ranks that one memory is spread over."""
        return 1 if self.memory_group is None else dist.get_world_size(self.memory_group)

    @property
    def memory_rank(self) -> int:
        """This rank among them."""
        return 0 if self.memory_group is None else dist.get_rank(self.memory_group)

    @property
    def replicas(self) -> int:
        """Batches that write one memory together."""
        return self.memory_ranks // self.tensor_ranks


ALONE = Placement()
