"""Settings of processes and their layout."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_fwpkm.memory.placement import Routing, Sharding
from megatron_fwpkm.section import Section


class MemoryLayoutConfig(Section):
    """How memories are spread over ranks."""

    group: str = "tp"
    """Ranks that one memory's slots are spread over: "tp", a replica's tensor-parallel ranks; or "tp_dp_N", those of N
    replicas, whose batches then write one memory together."""
    replicas: Literal["independent", "synced"] = "independent"
    """Whether each group of replicas has a memory of its own, or all replicas write one: "synced" spreads its slots
    over all of them (the group "tp_dp_N" of all N replicas)."""
    sharding: Sharding = "slots"
    """"slots": a rank owns whole rows, reads are routed to the owners; "columns": a rank has some columns of all."""
    routing: Routing = "dynamic"
    """Of sharding "slots": "dynamic" sends what there is; "static" padded messages of known size, with fewer waits."""

    @property
    def group_replicas(self) -> int:
        """N of "tp_dp_N"; 1 of "tp"."""
        return 1 if self.group == "tp" else int(self.group.removeprefix("tp_dp_"))

    @field_validator("group")
    @classmethod
    def _check_group(cls, group: str) -> str:
        if not re.fullmatch(r"tp|tp_dp_[1-9][0-9]*", group):
            raise ValueError("it is tp, a replica's tensor-parallel ranks, or tp_dp_N, those of N replicas, as tp_dp_4")
        return group

    @model_validator(mode="after")
    def _check(self) -> MemoryLayoutConfig:
        if self.sharding == "columns" and (self.routing == "static" or self.group != "tp" or self.replicas == "synced"):
            raise ValueError(
                'sharding "columns" stays within the tensor-parallel ranks and routes no reads: it goes with group '
                f'"tp", replicas "independent" and routing "dynamic", not with {self.group}, {self.replicas} and '
                f"{self.routing}; set them so, or sharding to slots"
            )
        return self


class ParallelConfig(Section):
    """Processes and how they are laid out; replicas = processes / (tensor x pipeline)."""

    processes: int = Field(default=2, ge=1, le=64)
    """Processes that the command starts on this machine when no launcher has started it."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that every layer is split over (tensor parallelism)."""
    pipeline: int = Field(default=1, ge=1)
    """Stages that the layers are divided into (pipeline parallelism)."""
    context: int = Field(default=1, ge=1)
    """Ranks that divide a sequence beyond tensor parallelism (context parallelism): 1, there is none. A memory writes
    the chunks of a sequence one after the other; `--dry-run --device-memory` tells how long sequences may be."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks divide the tokens between the split layers among them, too."""
    memory: MemoryLayoutConfig = MemoryLayoutConfig()
    check_keys_every: int = Field(default=100, ge=0)
    """Steps between comparisons of the sub-keys, which all ranks of a memory have alike; 0 means never."""
    timeout_seconds: int = Field(default=300, ge=10, le=30 * 24 * 3600)
    """Longest wait for another process before the job fails."""

    @model_validator(mode="after")
    def _check_context(self) -> ParallelConfig:
        if self.context > 1:
            raise ValueError(
                f"parallel.context {self.context}: context parallelism is not supported, as a memory writes the chunks "
                "of a sequence one after the other; set parallel.context=1, and for longer sequences "
                "parallel.sequence_parallel=true with more parallel.tensor ranks, or "
                "training.activation_checkpointing=sublayers (--dry-run --device-memory=80GiB tells what fits)"
            )
        return self
